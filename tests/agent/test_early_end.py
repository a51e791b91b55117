"""A stop that comes while the agent is still starting ends it, also as the first process of a container."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from lab.node import wait_until


def child(pid: int) -> int:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(found[0]) if found else 0


def catches_sigterm(pid: int) -> bool:
    line = next(one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if one.startswith("SigCgt:"))
    return bool(int(line.split()[1], 16) >> signal.SIGTERM - 1 & 1)


def test_process_1_hears_a_stop_before_the_agent_lives() -> None:
    """The kernel drops signals to a namespace's process 1 that has no handler for them, SIGTERM too."""
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-m", "meshcni.agent"]
    environment = {"PYTHONPATH": "src", "PATH": os.environ["PATH"]}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as started:
        try:
            wait_until("the agent's process", lambda: child(started.pid), 10, pause_seconds=0.001)
            wait_until("its handler", lambda: catches_sigterm(child(started.pid)), 10, pause_seconds=0.001)
            os.kill(child(started.pid), signal.SIGTERM)
            said, complaints = started.communicate(timeout=20)
        finally:
            started.kill()
    assert started.returncode == 0
    assert "on node" not in said + complaints, "it had not begun"
