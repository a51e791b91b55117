"""The image under containerd, through CRI: what can be started in it, as whom, and with which capabilities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from lab.container import Container, ContainerSpec, Pod, Security
from lab.cri import CriError
from lab.imagelayout import Image
from lab.node import wait_until
from tests.image.running import (
    ADDED,
    CHART_NONROOT,
    CHART_ROOT,
    FIVE,
    LISTINGS,
    NO_PERMISSION,
    NO_PROGRAMS,
    NONROOT,
    PRIVILEGED,
    PRIVILEGED_ROOT,
    Runtime,
    process_status,
    running_containerd,
    runtime_image,
)

from meshcni import __version__

IDLE = "changes nothing on this node"
READ_ONLY = Security(read_only_root=True)


@pytest.fixture(scope="module")
def image(built_image: Path) -> Image:
    return runtime_image(built_image)


@pytest.fixture(scope="module")
def runtime(image: Image) -> Iterator[Runtime]:
    with running_containerd(image) as made:
        yield made


def wait_idle(pod: Pod) -> None:
    """Return when an agent without mounts has said so; from then on it waits."""
    wait_until("the agent says what is missing", lambda: IDLE in pod.log_text(), 30)


def status_of_idle_agent(runtime: Runtime, pod: Pod, container: Container) -> dict[str, str]:
    """/proc/PID/status of an agent that waits for its manifest."""
    wait_idle(pod)
    return process_status(runtime.node.outer_pid(container.pid))


# --- entry point ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [(), ("install-cni",), ("/usr/local/bin/install-cni",)], ids=["none", "name", "path"]
)
@pytest.mark.parametrize(
    "argument",
    ["version", "--version"],
)
def test_the_version_without_any_right(runtime: Runtime, image: Image, command: tuple[str, ...], argument: str) -> None:
    status, text = runtime.run(image, argument, command=command, security=READ_ONLY)
    assert (status, text.split()[:2]) == (0, ["install-cni", __version__])


@pytest.mark.parametrize("program", [*NO_PROGRAMS, "/bin/sh", "/usr/bin/python3", "/usr/bin/env"])
def test_there_is_no_shell_interpreter_or_package_manager(runtime: Runtime, image: Image, program: str) -> None:
    with pytest.raises(CriError, match=r"no such file or directory|executable file not found"):
        runtime.run(image, command=(program,), security=Security(user=0))


# --- the programs of netfilter ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("listing", LISTINGS, ids=" ".join)
def test_rules_can_be_listed_with_the_charts_capabilities(
    runtime: Runtime, image: Image, listing: tuple[str, ...]
) -> None:
    status, text = runtime.run(image, command=listing, security=CHART_ROOT, mounts=(runtime.lock(),))
    assert status == 0, text


def test_the_tools_themselves_carry_no_rights(runtime: Runtime, image: Image) -> None:
    """Only the entry point hands capabilities on: a tool that is started as the image's user is refused."""
    status, text = runtime.run(image, command=("nft", "list", "ruleset"), security=PRIVILEGED)
    assert status != 0
    assert "Operation not permitted" in text


# --- capabilities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("security", "user", "bounding"),
    [
        (PRIVILEGED, NONROOT, None),
        (CHART_NONROOT, NONROOT, FIVE),
        (CHART_ROOT, 0, FIVE),
        # runc makes the five permitted before it executes the entry point, so that no_new_privs sees no gain in them
        (replace(CHART_NONROOT, no_new_privileges=True), NONROOT, FIVE),
    ],
    ids=["image's user, privileged", "image's user, the five", "root, the five", "the five, no new privileges"],
)
def test_the_agent_has_exactly_the_five(
    runtime: Runtime, image: Image, security: Security, user: int, bounding: int | None
) -> None:
    with runtime.pod(privileged=security.privileged) as pod:
        container = pod.run(ContainerSpec(image.name, security=security))  # no mount: it waits for its manifest
        status = status_of_idle_agent(runtime, pod, container)
        assert status["Uid"].split() == [str(user)] * 4
        for kind in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
            assert int(status[kind], 16) == FIVE, (kind, status[kind])
        if bounding is not None:
            assert int(status["CapBnd"], 16) == bounding
        container.stop()


def test_privileged_root_keeps_what_it_was_given(runtime: Runtime, image: Image) -> None:
    with runtime.pod(privileged=True) as pod:
        container = pod.run(ContainerSpec(image.name, security=PRIVILEGED_ROOT))
        status = status_of_idle_agent(runtime, pod, container)
        assert int(status["CapEff"], 16) & FIVE == FIVE
        assert int(status["CapAmb"], 16) == FIVE, "what programs of other users would inherit"
        container.stop()


UNPRIVILEGED = {
    "nothing said": Security(),
    "everything dropped": Security(drop=("ALL",)),
    "root without any": Security(user=0, drop=("ALL",)),
}


@pytest.mark.parametrize("security", UNPRIVILEGED.values(), ids=[*UNPRIVILEGED])
def test_without_capabilities_it_says_which_and_ends(runtime: Runtime, image: Image, security: Security) -> None:
    status, text = runtime.run(image, security=security)
    assert status == NO_PERMISSION, text
    for part in ("CAP_NET_ADMIN", "CAP_SYS_ADMIN", "securityContext:", f"add: [{', '.join(ADDED)}]"):
        assert part in text
    assert "Traceback" not in text


@pytest.mark.parametrize("dropped", ADDED)
def test_one_capability_less_is_named(runtime: Runtime, image: Image, dropped: str) -> None:
    left = tuple(name for name in ADDED if name != dropped)
    with runtime.pod() as pod:
        container = pod.run(ContainerSpec(image.name, security=Security(add=left, drop=("ALL",))))
        ends = dropped != "SYS_PTRACE"  # of which the sidecar mode has no need
        if not ends:
            wait_idle(pod)
        status = container.wait() if ends else container.stop()
        assert status == (NO_PERMISSION if ends else 0), pod.log_text()
        assert f"CAP_{dropped}" in pod.log_text()
