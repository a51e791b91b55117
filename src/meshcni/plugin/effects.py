"""Everything the plugin does to the world, in one object, so that its logic runs in a test without any of it."""

import fcntl
import posix

from meshcni.cni.spec import MAX_STDIN_BYTES, Request
from meshcni.errors import CNI_IO_FAILURE, CniInputError, NetnsError
from meshcni.istio import OWN_NETNS
from meshcni.protocols.podadd import AddReply

_STDIN = 0
_STDERR = 2
_NS_GET_NSTYPE = 0xB703  # linux/nsfs.h; answers the CLONE_NEW* flag of a namespace, fails on anything else
_CLONE_NEWNET = 0x40000000
_FILE_TYPE = 0o170000
_REGULAR_FILE = 0o100000


class Effects:
    """The real ones."""

    def read_stdin(self) -> bytes:
        """Standard input to its end, or one byte more than is allowed. Raises CniInputError (code 5)."""
        parts = []
        size = 0
        try:
            while size <= MAX_STDIN_BYTES:
                part = posix.read(_STDIN, min(65536, MAX_STDIN_BYTES + 1 - size))
                if not part:
                    break
                parts.append(part)
                size += len(part)
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

    def ask_agent(self, request: Request, message: bytes, netns: int) -> AddReply:
        """The agent's reply to the encoded request; `netns` travels with it. See agentcall.ask_agent."""
        from meshcni.plugin.agentcall import ask_agent  # not needed, so not loaded, by ADDs decided here

        return ask_agent(request.conf.run_dir, message, netns, request.conf.agent_wait_seconds)

    def log(self, level: str, message: str, request: Request | None) -> None:
        """One log line; `request` is None while the conf is not known."""
        from meshcni.plugin.log import write_log  # not needed, so not loaded, by the verbs that log nothing

        if request is None:
            write_log("", "", level, message, "")
        else:
            conf = request.conf
            pod = f"{request.pod_namespace}/{request.pod_name}" if request.pod_name else ""
            write_log(conf.run_dir, conf.log_level, level, message, pod)

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
