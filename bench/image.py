"""The image: its agent's way to Ready against that of the checkout's, and what it weighs."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

from lab.agent import ROOT, Agent, AgentOptions, milliseconds_since
from lab.imageagent import ImageAgent
from lab.imagelayout import Image, find_image
from lab.mesh import Mesh
from lab.node import wait_until

from bench.report import Row, ratio
from meshcni import istio

ROUNDS = 7
PAUSE_SECONDS = 0.002
WAIT_SECONDS = 20.0
OPTIONS = AgentOptions(nftables=True)
MAX_RATIO, MAX_UNPACKED_MIB, MAX_COMPRESSED_MIB = 1.5, 45.0, 16.0
MAX_BUILD_SECONDS = 60.0
MIB = 1 << 20


def start(mesh: Mesh) -> list[Row]:
    """From asking the runtime for the container, which is pulled and has run before, to 200 from /readyz."""
    checkout = mesh.agent
    checkout.terminate()
    account = mesh.node.folder / "serviceaccount"
    image = ImageAgent(mesh.node, mesh.runtime, mesh.api.environment, account, host_network=True)  # as the checkout's
    checkout_times, image_times = [], []
    ready_after(image)  # the first start unpacks the image
    try:
        for _ in range(ROUNDS):
            checkout_times.append(ready_after(checkout))
            image_times.append(ready_after(image))
    finally:
        image.close()
        checkout.start(OPTIONS)
    what = "agent: start to Ready, from the image"
    return [
        ratio(what, statistics.median(image_times), statistics.median(checkout_times), MAX_RATIO, "checkout's agent")
    ]


def ready_after(agent: Agent) -> float:
    """Start an agent, wait until it is ready, stop it; returns the milliseconds to Ready."""
    begin = time.monotonic()
    agent.start(OPTIONS, wait=False)
    wait_until("the agent is ready", lambda: answers_ready(agent), WAIT_SECONDS, PAUSE_SECONDS)
    taken = milliseconds_since(begin)
    agent.terminate()
    return taken


def answers_ready(agent: Agent) -> bool:
    """Ask /readyz and nobody else: asking the runtime, too, whether the container runs would slow both down."""
    try:
        return agent.get(istio.HEALTH_PORT, istio.READY_PATH)[0] == 200
    except OSError:
        return False


def sizes(_: Mesh) -> list[Row]:
    """Unpacked and compressed size of the runtime variant for each architecture."""
    rows = []
    for architecture in ("amd64", "arm64"):
        image = find_image(architecture=architecture)
        unpacked, compressed = unpacked_bytes(image), sum(path.stat().st_size for path in image.layers)
        rows += [
            Row(f"image, {architecture}: unpacked", unpacked / MIB, MAX_UNPACKED_MIB, "MiB", "regular files"),
            Row(f"image, {architecture}: compressed", compressed / MIB, MAX_COMPRESSED_MIB, "MiB", "layers"),
        ]
    return rows


def unpacked_bytes(image: Image) -> int:
    """The sum of the sizes of its regular files, a hard link counted once."""
    total = 0
    for layer in image.layers:
        with tarfile.open(layer) as archive:
            total += sum(member.size for member in archive if member.isreg())
    return total


def build(_: Mesh) -> list[Row]:
    """A build of everything whose parts are all there, which is what a change of nothing costs."""
    with tempfile.TemporaryDirectory(prefix="meshcni-bench-") as folder:
        begin = time.monotonic()
        command = [sys.executable, "-m", "image", "build", "--output", f"{folder}/image"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        return [
            Row("image: build, warm", time.monotonic() - begin, MAX_BUILD_SECONDS, "s", "two variants, each for two")
        ]


def measure(mesh: Mesh) -> list[Row]:
    """Start, sizes, build."""
    return [*start(mesh), *sizes(mesh), *build(mesh)]
