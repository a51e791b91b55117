"""The image under podman, which gives a container's user other capabilities than containerd does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.imagelayout import Image
from lab.node import Node, wait_until
from lab.podman import Podman
from tests.image.running import ADDED, FIVE, LISTINGS, NO_PERMISSION, NO_PROGRAMS, NONROOT, dev_image, runtime_image

from meshcni import __version__

IDLE = "changes nothing on this node"
READ_ONLY = ("--read-only", "--read-only-tmpfs=false")
DROPPED = ("--cap-drop", "ALL", *(part for name in ADDED for part in ("--cap-add", name)))


@pytest.fixture(scope="module")
def image(built_image: Path) -> Image:
    return runtime_image(built_image)


@pytest.fixture(scope="module")
def podman(image: Image) -> Iterator[Podman]:
    with Node() as node:
        made = Podman(node)
        made.load(image)
        yield made


def test_the_version_without_any_right(podman: Podman, image: Image) -> None:
    done = podman.run(image.name, "version", options=(*READ_ONLY, "--cap-drop", "ALL"))
    assert (done.status, done.output.split()[:2]) == (0, ["install-cni", __version__]), done


@pytest.mark.parametrize("program", ["/bin/sh", *NO_PROGRAMS])
def test_there_is_no_shell_interpreter_or_package_manager(podman: Podman, image: Image, program: str) -> None:
    done = podman.run(image.name, options=("--entrypoint", program, "--user", "0"))
    assert done.status == 127, done
    assert "not found" in done.errors or "no such file" in done.errors


@pytest.mark.parametrize("listing", LISTINGS, ids=" ".join)
@pytest.mark.parametrize("rights", [("--privileged",), DROPPED], ids=["privileged", "the five"])
def test_rules_can_be_listed_by_root(
    podman: Podman, image: Image, listing: tuple[str, ...], rights: tuple[str, ...]
) -> None:
    options = ("--user", "0", *rights, *READ_ONLY, "--tmpfs", "/run", "--entrypoint", listing[0])
    done = podman.run(image.name, *listing[1:], options=options)
    assert done.status == 0, done


@pytest.mark.parametrize(
    ("rights", "user"),
    [
        (("--privileged",), NONROOT),
        (DROPPED, NONROOT),
        ((*DROPPED, "--user", "0"), 0),
    ],
    ids=["image's user, privileged", "image's user, the five", "root, the five"],
)
def test_the_agent_has_exactly_the_five(podman: Podman, image: Image, rights: tuple[str, ...], user: int) -> None:
    podman.start(image.name, "agent", options=(*rights, *READ_ONLY))
    try:
        wait_until("the agent says what is missing", lambda: IDLE in podman.logs("agent"), 30)
        status = podman.process_status("agent")
    finally:
        podman.remove("agent")
    assert status["Uid"].split() == [str(user)] * 4
    for kind in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
        assert int(status[kind], 16) == FIVE, (kind, status[kind])


REFUSED = {
    "nothing said": (),
    "everything dropped": ("--cap-drop", "ALL"),
    "no new privileges": ("--privileged", "--security-opt", "no-new-privileges"),
    "root without any": ("--user", "0", "--cap-drop", "ALL"),
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=[*REFUSED])
def test_without_capabilities_it_says_which_and_ends(podman: Podman, image: Image, options: tuple[str, ...]) -> None:
    done = podman.run(image.name, options=options)
    text = done.output + done.errors
    assert done.status == NO_PERMISSION, text
    for part in ("CAP_NET_ADMIN", "CAP_SYS_ADMIN", "securityContext:", f"add: [{', '.join(ADDED)}]"):
        assert part in text
    assert ("allowPrivilegeEscalation: true" in text) == ("no-new-privileges" in options)


def test_the_agent_installs_into_folders_of_root(podman: Podman, image: Image) -> None:
    """As the image's user, with the mounts of the manifest; the API server is away."""
    node = podman.node
    places = {"bin": "/host/opt/cni/bin", "net.d": "/host/etc/cni/net.d", "run": "/var/run/istio-cni"}
    for name in places:
        (node.folder / name).mkdir(mode=0o755)
    conf = node.folder / "net.d" / "10-other.conflist"
    conf.write_text(json.dumps({"cniVersion": "1.0.0", "name": "other", "plugins": [{"type": "bridge"}]}))
    account = node.folder / "account"
    account.mkdir()
    (account / "token").write_text("token")
    (account / "namespace").write_text("istio-system")
    mounts = [part for name, inside in places.items() for part in ("--volume", f"{node.folder / name}:{inside}")]
    mounts += [
        "--volume",
        f"{account}:/var/run/secrets/kubernetes.io/serviceaccount:ro",
        "--volume",
        "/proc:/host/proc:ro",
    ]
    mounts += [
        "--env",
        "KUBERNETES_SERVICE_HOST=127.0.0.1",
        "--env",
        "KUBERNETES_SERVICE_PORT=1",
        "--env",
        "NODE_NAME=n",
    ]
    podman.start(image.name, "installs", options=("--privileged", *READ_ONLY, *mounts), network="host")
    try:
        plugin = node.folder / "bin" / "istio-cni"
        wait_until("the plugin is installed", plugin.exists, 30)
        assert "supportedVersions" in node.run([str(plugin)], environment={"CNI_COMMAND": "VERSION"})
        wait_until("the entry is in the list", lambda: "istio-cni" in conf.read_text(), 30)
    finally:
        podman.remove("installs")


def test_the_dev_variant_has_tools_and_is_root(podman: Podman, built_image: Path) -> None:
    name = podman.load(dev_image(built_image))
    for command in (
        ("bash", "-c", "test $(id -u) = 0"),
        ("apt", "--version"),
        ("dpkg", "--audit"),
        ("apt-get", "check"),
        ("python3", "-c", "import ssl, json, asyncio"),
        ("ip", "link"),
        ("tcpdump", "--version"),
        ("conntrack", "--version"),
    ):
        done = podman.run(name, *command[1:], options=("--entrypoint", command[0]))
        assert done.status == 0, (command, done)
    assert podman.run(name, "version").output.startswith(f"install-cni {__version__}")
