"""Runtimes that put a pod behind a network stack of its own, where rules in the pod's netns do not reach the traffic.

gVisor takes the addresses off the netns and answers for them itself; a virtual machine's packets pass between two
interfaces of the netns below netfilter. Redirected by our rules, such a pod would look enrolled and bypass the mesh.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A kind of sandboxed runtime; with `keeps_addresses` the netns has the pod's addresses, but not its traffic."""

    name: str
    keeps_addresses: bool


GVISOR = Sandbox("gVisor", keeps_addresses=False)
KATA = Sandbox("Kata Containers", keeps_addresses=True)
VIRTUAL_MACHINE = Sandbox("a virtual machine", keeps_addresses=True)

_PROCESS_PREFIXES = {
    "runsc": GVISOR,
    "containerd-shim-runsc": GVISOR,
    "containerd-shim-kata": KATA,
    "kata": KATA,
    "virtiofsd": KATA,
    "nydusd": KATA,
    "qemu": VIRTUAL_MACHINE,
    "cloud-hyperviso": VIRTUAL_MACHINE,  # the kernel keeps 15 bytes of a name
    "firecracker": VIRTUAL_MACHINE,
    "dragonball": VIRTUAL_MACHINE,
    "stratovirt": VIRTUAL_MACHINE,
    "jailer": VIRTUAL_MACHINE,  # Firecracker's
}
# gVisor starts itself through /proc/self/exe, and shims' names are cut: only the command line tells what these are.
_TELLS_NOTHING = frozenset({"exe", "containerd-shim"})
_RUNTIME_PREFIXES = ("conmon", "containerd-shim", "crun", "runc", "youki")


def needs_command(comm: str) -> bool:
    """Whether the name of a process (/proc/PID/comm) leaves open what it is, so that its command line is needed."""
    return comm in _TELLS_NOTHING


def sandbox_of_process(comm: str, command: str = "") -> Sandbox | None:
    """Return the sandbox that a process is part of, by its name and the first word of its command line."""
    for name in (comm, command.rsplit("/", 1)[-1]):
        for prefix, sandbox in _PROCESS_PREFIXES.items():
            if name.startswith(prefix):
                return sandbox
    return None


def is_runtime_process(comm: str) -> bool:
    """Whether a process in a pod's cgroup is the runtime's own and runs in the host's netns by right."""
    return comm.startswith(_RUNTIME_PREFIXES)
