"""Names of sandboxed runtimes."""

from __future__ import annotations

import pytest

from meshcni.pods.sandboxes import (
    GVISOR,
    KATA,
    VIRTUAL_MACHINE,
    Sandbox,
    is_runtime_process,
    needs_command,
    sandbox_of_process,
)


@pytest.mark.parametrize(
    ("comm", "command", "expected"),
    [
        ("exe", "runsc-sandbox", GVISOR),
        ("exe", "runsc-gofer", GVISOR),
        ("exe", "/usr/local/bin/runsc-sandbox", GVISOR),
        ("runsc-sandbox", "", GVISOR),
        ("containerd-shim", "/usr/local/bin/containerd-shim-runsc-v1", GVISOR),
        ("containerd-shim", "/opt/kata/bin/containerd-shim-kata-v2", KATA),
        ("virtiofsd", "", KATA),
        ("qemu-system-x86", "", VIRTUAL_MACHINE),
        ("cloud-hyperviso", "", VIRTUAL_MACHINE),
        ("firecracker", "", VIRTUAL_MACHINE),
        ("exe", "/proc/self/exe", None),
        ("containerd-shim", "/usr/bin/containerd-shim-runc-v2", None),
        ("pause", "/pause", None),
        ("java", "java -jar qemu.jar", None),
        ("", "", None),
    ],
)
def test_processes(comm: str, command: str, expected: Sandbox | None) -> None:
    assert sandbox_of_process(comm, command) == expected
    if command and expected and sandbox_of_process(comm) is None:
        assert needs_command(comm)


def test_only_a_virtual_machine_leaves_the_addresses_in_place() -> None:
    assert (GVISOR.keeps_addresses, KATA.keeps_addresses, VIRTUAL_MACHINE.keeps_addresses) == (False, True, True)


def test_the_runtimes_own_processes() -> None:
    assert all(is_runtime_process(name) for name in ("conmon", "conmonrs", "containerd-shim", "runc:[2:INIT]", "crun"))
    assert not any(is_runtime_process(name) for name in ("pause", "nginx", "kubelet", "node_exporter"))
