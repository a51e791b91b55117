"""`make demo`: shows what it says, and leaves nothing behind however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab.clean import leftovers
from lab.node import missing_requirements, start_ticks

ROOT = Path(__file__).parents[2]
DEMO_SECONDS = 120
NODE_NAME = re.compile(r"meshcni-lab-[0-9a-f]{8}")

CANNOT_RUN = missing_requirements()
MOMENTS = ("CNI chain: bridge", "Pod ledger without", "istio-cni", "Pod ledger with the")
ENDINGS = [
    *((signal.SIGINT, moment) for moment in MOMENTS),
    (signal.SIGTERM, MOMENTS[2]),
    (signal.SIGKILL, MOMENTS[3]),
    (signal.SIGTERM, "joins by a label"),
    (signal.SIGKILL, "stand-in for ztunnel"),
]

pytestmark = pytest.mark.skipif(bool(CANNOT_RUN), reason=f"THE DEMO CANNOT RUN HERE: {CANNOT_RUN}")


def start_demo(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lab.demo", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def descendants(pid: int) -> set[int]:
    """All processes below `pid`, in every pid namespace."""
    found, looked_at = set(), [pid]
    while looked_at:
        for path in Path(f"/proc/{looked_at.pop()}/task").glob("*/children"):
            children = {int(child) for child in path.read_text().split()} - found
            found |= children
            looked_at += children
    return found


def traces_on_the_host() -> list[str]:
    """Mounts, named netns and interfaces of the host that only a node may have."""
    mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if "meshcni-lab" in line]
    names = sorted(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else []
    return (
        mounts
        + [name for name in names if name.startswith("cni-")]
        + [name for name in os.listdir("/sys/class/net") if name == "cni0"]
    )


@pytest.mark.parametrize("backend", ["nftables", "iptables"])
def test_the_demo_shows_what_it_says(backend: str) -> None:
    demo = start_demo("--backend", backend)
    output, _ = demo.communicate(timeout=DEMO_SECONDS)
    assert demo.returncode == 0, output
    assert output.count("Envoy: 0 in, 0 out") == 2
    assert output.count("Envoy: 1 in, 1 out") == 2
    assert output.count("straight through") >= 2
    for text in ("sidecar-injected", "no-proxy-container", "127.0.0.6", "ISTIO_OUTPUT", "Where to look next"):
        assert text in output
    for text in (
        "ambient-enabled",
        "3 out, 3 in",
        "169.254.7.127",
        "ISTIO_PRERT",
        "none failed",
        "all through ztunnel",
    ):
        assert text in output
    for name in ("web", "orders", "stock", "report"):
        assert re.search(rf"market/{name} +enrolled +enabled", output), "install-cni status"
    names = set(NODE_NAME.findall(output))
    assert len(names) == 1
    assert not names & leftovers()
    assert traces_on_the_host() == []


@pytest.mark.parametrize(("number", "moment"), ENDINGS)
def test_an_interrupted_demo_leaves_nothing(number: signal.Signals, moment: str) -> None:
    demo = start_demo()
    assert demo.stdout is not None
    seen = ""
    while moment not in seen:
        line = demo.stdout.readline()
        assert line, seen
        seen += line
    pids = {pid: start_ticks(pid) for pid in descendants(demo.pid)}
    assert pids, "the node has processes"
    demo.send_signal(number)
    rest, _ = demo.communicate(timeout=DEMO_SECONDS)
    name = NODE_NAME.findall(seen)[0]
    if number == signal.SIGKILL:  # the kernel ends what runs; folder and cgroups are for lab.clean
        subprocess.run([sys.executable, "-m", "lab.clean"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    else:
        assert demo.returncode == 130, seen + rest
        assert "Interrupted" in rest
    deadline = time.monotonic() + 10
    while alive := [pid for pid, ticks in pids.items() if start_ticks(pid) == ticks]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
    assert name not in leftovers()
    assert traces_on_the_host() == []
