"""What the tests that run the image share: a node with its runtime, the ways to start the image, what they look at."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lab.container import ContainerSpec, Mount, Pod, Security
from lab.containerd import Containerd
from lab.imageagent import import_image
from lab.imagelayout import Image, find_image
from lab.node import Node

from meshcni.agent.privileges import EXIT_STATUS
from meshcni.host.capabilities import CAPABILITIES

FIVE = sum(1 << capability.number for capability in CAPABILITIES)
ADDED = tuple(capability.short_name for capability in CAPABILITIES)
NO_PERMISSION = EXIT_STATUS
NONROOT = 65532
# What the chart of Istio grants, to root and to the image's own user.
CHART_ROOT = Security(user=0, group=0, add=ADDED, drop=("ALL",), read_only_root=True)
CHART_NONROOT = Security(add=ADDED, drop=("ALL",), read_only_root=True)
PRIVILEGED = Security(privileged=True, read_only_root=True)
PRIVILEGED_ROOT = Security(user=0, privileged=True, read_only_root=True)

LISTINGS = (
    ("nft", "list", "ruleset"),
    *((f"{family}{flavour}", "-t", "nat", "-S") for family in ("iptables", "ip6tables") for flavour in ("", "-nft")),
    *((f"{family}-legacy", "-t", "nat", "-S") for family in ("iptables", "ip6tables")),
    *((f"{family}{flavour}-save",) for family in ("iptables", "ip6tables") for flavour in ("", "-nft", "-legacy")),
)
NO_PROGRAMS = (
    "sh",
    "bash",
    "dash",
    "python3",
    "python3.13",
    "apt",
    "apt-get",
    "dpkg",
    "pip",
    "perl",
    "openssl",
    "busybox",
)
_numbers = itertools.count(1)


class Runtime:
    """A lab node with containerd and images; containers run in pods on the node's network."""

    def __init__(self, node: Node, containerd: Containerd) -> None:
        self.node, self.containerd = node, containerd

    @contextmanager
    def pod(self, *, privileged: bool = False) -> Iterator[Pod]:
        """A pod that is there for as long as the block lasts."""
        number = next(_numbers)
        uid = f"00000000-0000-4000-a000-{number:012d}"
        pod = Pod(self.containerd, "istio-system", f"image-{number}", uid, privileged=privileged)
        pod.start()
        try:
            yield pod
        finally:
            pod.close()

    def run(self, image: Image, *arguments: str, command: tuple[str, ...] = (), **options: object) -> tuple[int, str]:
        """Run a container to its end: exit status and what it wrote."""
        security = options.pop("security", Security())
        assert isinstance(security, Security)
        mounts = options.pop("mounts", ())
        assert isinstance(mounts, tuple)
        spec = ContainerSpec(image.name, command=command, arguments=arguments, security=security, mounts=mounts)
        with self.pod(privileged=security.privileged) as pod:
            return pod.run_to_end(spec)

    def lock(self) -> Mount:
        """The lock of iptables-legacy, which the manifest mounts too, for the root file system is read-only."""
        path = "/run/xtables.lock"
        self.node.run(["touch", path])
        return Mount(path, path)


@contextmanager
def running_containerd(*images: Image) -> Iterator[Runtime]:
    """A node whose containerd has these images."""
    with Node() as node:
        containerd = Containerd(node)
        try:
            containerd.start()
            for image in images:
                import_image(containerd, image)
            yield Runtime(node, containerd)
        finally:
            containerd.close()


def runtime_image(layout: Path) -> Image:
    """The runtime variant for this machine."""
    return find_image(layout=layout)


def dev_image(layout: Path) -> Image:
    """The dev variant for this machine."""
    return find_image(dev=True, layout=layout)


def process_status(pid: int) -> dict[str, str]:
    """/proc/PID/status as a mapping; empty when the process has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {}
