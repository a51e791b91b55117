"""The process around the verbs: descriptors and environment in, stdout and exit status out."""

import posix
import sys

from meshcni.plugin.effects import Effects
from meshcni.plugin.verbs import run

_STDOUT = 1
_PREFIX = b"CNI_"


def main() -> int:
    """Answers one verb; the exit status is also 1 when the answer cannot be delivered."""
    _occupy_closed_descriptors()
    environ = {
        name.decode("utf-8", "surrogateescape"): value.decode("utf-8", "surrogateescape")
        for name, value in posix.environ.items()
        if name.startswith(_PREFIX)
    }
    exit_status, stdout = run(environ, Effects())
    return exit_status if _write_all(stdout.encode()) else 1


def _occupy_closed_descriptors() -> None:
    """Where the caller closed 0, 1 or 2, a file opened later would get that number and receive what is not for it."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if stream is None:
            posix.open("/", posix.O_PATH | posix.O_CLOEXEC)


def _write_all(data: bytes) -> bool:
    try:
        while data:
            data = data[posix.write(_STDOUT, data) :]
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
