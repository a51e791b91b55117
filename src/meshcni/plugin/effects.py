"""Everything the plugin does to the world, in one object, so that its logic runs in a test without any of it."""

import fcntl
import posix

from meshcni.cni.spec import Request
from meshcni.errors import CNI_IO_FAILURE, CniInputError, NetnsError
from meshcni.istio import OWN_NETNS

_STDIN = 0
_STDERR = 2
_NS_GET_NSTYPE = 0xB703  # linux/nsfs.h; answers the CLONE_NEW* flag of a namespace, fails on anything else
_CLONE_NEWNET = 0x40000000
_FILE_TYPE = 0o170000
_REGULAR_FILE = 0o100000


class Effects:
    """The real ones."""

    def read_stdin(self, limit_bytes: int) -> bytes:
        """Standard input to its end, but no more than the limit. Raises CniInputError (code 5)."""
        parts = []
        wanted = limit_bytes
        try:
            while wanted > 0:
                part = posix.read(_STDIN, min(wanted, 65536))
                if not part:
                    break
                parts.append(part)
                wanted -= len(part)
        except OSError as error:
            raise CniInputError(
                CNI_IO_FAILURE, f"the conf on stdin cannot be read: {error.strerror}", "the runtime must open stdin"
            ) from None
        return b"".join(parts)

    def open_netns(self, path: str) -> int:
        """A descriptor of the network namespace at `path`. Raises NetnsError when it is none."""
        hint = "CNI_NETNS must be the path of the pod's network namespace"
        flags = posix.O_RDONLY | posix.O_CLOEXEC | posix.O_NONBLOCK | posix.O_NOCTTY
        try:
            netns = posix.open(path, flags)
        except (OSError, ValueError) as error:
            text = getattr(error, "strerror", "") or str(error)
            raise NetnsError(f"netns {path!r} cannot be opened: {text}", hint) from None
        # Only regular files get the request: what an unknown device does with it is anybody's guess.
        if posix.fstat(netns).st_mode & _FILE_TYPE != _REGULAR_FILE or _namespace_type(netns) != _CLONE_NEWNET:
            posix.close(netns)
            raise NetnsError(f"{path!r} is no network namespace", hint)
        return netns

    def is_own_netns(self, netns: int) -> bool:
        """Whether the descriptor is the namespace this process lives in; False when there is no /proc to tell."""
        try:
            own = posix.stat(OWN_NETNS)
        except OSError:
            return False
        given = posix.fstat(netns)
        return (own.st_dev, own.st_ino) == (given.st_dev, given.st_ino)

    def ask_agent(self, request: Request, message: bytes, netns: int) -> bytes | str:
        """The agent's reply, or in words why the pod may start without one. See agentcall.ask_agent."""
        from meshcni.plugin.agentcall import ask_agent  # not loaded by ADDs that are decided without the agent

        return ask_agent(request, message, netns)

    def log(self, run_dir: str, threshold: str, level: str, message: str, pod: str) -> None:
        """One log line. See log.write_log."""
        from meshcni.plugin.log import write_log  # not loaded by the verbs that log nothing

        write_log(run_dir, threshold, level, message, pod)

    def say(self, text: str) -> None:
        """Plain text on stderr, for a person who started the plugin by hand."""
        try:
            posix.write(_STDERR, text.encode())
        except OSError:
            pass


def _namespace_type(descriptor: int) -> int:

    try:
        return fcntl.ioctl(descriptor, _NS_GET_NSTYPE)
    except OSError:
        return 0
