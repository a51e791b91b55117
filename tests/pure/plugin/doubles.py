"""The plugin's effects without effects."""

from __future__ import annotations

from meshcni.cni.spec import Request
from meshcni.errors import NetnsError
from meshcni.plugin.effects import Effects
from meshcni.protocols.podadd import accepted, encode_reply

NETNS = 7
SIDECAR = encode_reply(accepted("sidecar", "injected", ""))


class RecordedEffects(Effects):
    """Gives what it is told to give, and keeps what the plugin did, in order."""

    def __init__(
        self,
        stdin: bytes = b"",
        reply: bytes | str | Exception = SIDECAR,
        netns_paths: tuple[str, ...] = ("/run/netns/pod",),
        own_netns: bool = False,
    ) -> None:
        self.stdin = stdin
        self.reply = reply
        self.netns_paths = netns_paths
        self.own_netns = own_netns
        self.done: list[str] = []
        self.messages: list[bytes] = []
        self.logged: list[tuple[str, str]] = []

    def read_stdin(self, limit_bytes: int) -> bytes:
        self.done.append("stdin")
        return self.stdin[:limit_bytes]

    def open_netns(self, path: str) -> int:
        self.done.append("netns")
        if path not in self.netns_paths:
            raise NetnsError(f"netns {path!r} cannot be opened")
        return NETNS

    def is_own_netns(self, netns: int) -> bool:
        assert netns == NETNS
        return self.own_netns

    def ask_agent(self, request: Request, message: bytes, netns: int) -> bytes | str:
        assert netns == NETNS
        self.done.append("agent")
        self.messages.append(message)
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply

    def log(self, run_dir: str, threshold: str, level: str, message: str, pod: str) -> None:
        self.logged.append((level, message))

    def say(self, text: str) -> None:
        self.done.append("say")
