"""The plugin's log: single JSON lines, to stderr (warnings and errors) and to `istio-cni.log` in the run directory.

Many plugins write at once and none rotates: each line is one O_APPEND write, rotation is the agent's business. The
agent logs every ADD it answers, so nothing goes to its log socket from here. A log that cannot be written fails no ADD.
"""

import posix
import time

from meshcni.cni.jsontext import compact
from meshcni.istio import PLUGIN_LOG_NAME

SCOPE = "cni-plugin"
_SEVERITY = {"debug": 0, "info": 1, "warn": 2, "error": 3, "fatal": 4, "none": 5}
_STDERR = 2


def write_log(run_dir: str, threshold: str, level: str, message: str, pod: str) -> None:
    """Logs one line; `run_dir` empty: the conf is not known, so there is no file. Never raises.

    `threshold` is `plugin_log_level` of the conf: empty means info, unknown text none, as in the original.
    """
    now = time.time_ns()
    members: dict[str, object] = {"level": level, "time": _rfc3339(now), "scope": SCOPE, "msg": message}
    if pod:
        members["pod"] = pod
    line = (compact(members) + "\n").encode()
    if level in ("warn", "error"):
        _write(_STDERR, line)
    if run_dir and _SEVERITY[level] >= _SEVERITY.get(threshold or "info", _SEVERITY["none"]):
        _append(f"{run_dir}/{PLUGIN_LOG_NAME}", line)


def _append(path: str, line: bytes) -> None:
    posix.umask(0o077)  # the runtime's may be anything, and 0777 would make a file that nobody can open again
    flags = posix.O_WRONLY | posix.O_APPEND | posix.O_CREAT | posix.O_CLOEXEC | posix.O_NOFOLLOW | posix.O_NONBLOCK
    try:
        log = posix.open(path, flags, 0o600)
    except OSError:
        return
    _write(log, line)
    posix.close(log)


def _write(descriptor: int, line: bytes) -> None:
    try:
        posix.write(descriptor, line)
    except OSError:
        pass


def _rfc3339(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    utc = time.gmtime(seconds)
    day = f"{utc.tm_year:04d}-{utc.tm_mon:02d}-{utc.tm_mday:02d}"
    return f"{day}T{utc.tm_hour:02d}:{utc.tm_min:02d}:{utc.tm_sec:02d}.{rest // 1000:06d}Z"
