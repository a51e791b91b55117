"""Pods with a user namespace of their own (`hostUsers: false`), and an agent from the image, which has no `nsenter`.

A kubelet has containerd 2.0 make such pods; Debian 12's cannot. So their network namespaces are made by hand and handed
to the plugin that the agent has installed. The agent's user, capabilities and tools are the image's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path

import pytest
from lab.agent import AgentOptions
from lab.imageagent import ImageAgent
from lab.mesh import Mesh
from lab.objects import sidecar_pod
from lab.plugin import PodNetns, call
from tests.image.running import NONROOT, process_status

from meshcni.host.backends.iptables import ENTER_USERNS, NS_GET_USERNS, SEARCH_PATH

MAKING = """
cd {folder}
unshare --user --net sh -c 'echo >ready; exec sleep 60' & pid=$!
until [ -e ready ]; do sleep 0.01; done
for kind in uid gid; do echo 0 100000 65536 >/proc/$pid/${{kind}}_map; done  # as a kubelet has it
ip netns attach {name} $pid
kill $pid
rm ready
"""


class OwnedNetns(PodNetns):
    """A pod's netns that a user namespace other than the node's owns."""

    def making(self) -> str:
        """Return the script that makes the netns itself."""
        return MAKING.format(folder=self.node.folder, name=self.name)

    @property
    def owner(self) -> int:
        """The inode of the user namespace."""
        with open(self.path, "rb") as netns:
            fd = ioctl(netns, NS_GET_USERNS)
        try:
            return os.fstat(fd).st_ino
        finally:
            os.close(fd)


@pytest.fixture(params=[("image", NONROOT), ("image-root", 0)], ids=["65532", "root"])
def mesh(built_image: Path, request: pytest.FixtureRequest) -> Iterator[Mesh]:
    which, uid = request.param
    with Mesh(which) as made:
        made.runtime.start()
        yield made
        assert isinstance(made.agent, ImageAgent)
        assert process_status(made.agent.pid)["Uid"].split() == [str(uid)] * 4


@pytest.mark.parametrize("flavour", ["nft", "legacy"])
def test_rules_are_made_from_inside(mesh: Mesh, flavour: str) -> None:
    agent = mesh.agent
    assert isinstance(agent, ImageAgent)
    agent.start(AgentOptions(nftables=False, force_iptables=flavour))
    root = agent.image.unpack(mesh.node.folder / "unpacked")
    assert os.access(root / ENTER_USERNS.lstrip("/"), os.X_OK)
    assert [folder for folder in SEARCH_PATH if (root / folder.lstrip("/") / "nsenter").exists()] == []

    for number, mode in enumerate(("REDIRECT", "TPROXY")):
        pod = sidecar_pod("shop", f"owned-{number}", mode=mode)
        mesh.add_object(pod)
        with OwnedNetns(mesh.node, f"owned-{number}", number) as netns:
            assert netns.owner != os.stat("/proc/self/ns/user").st_ino
            answer = call(agent, "ADD", pod, netns)
            assert (answer.status, answer.text) == (0, "")
            rules = mesh.rules(netns.path)
            assert (rules.iptables_nft, rules.iptables_legacy, rules.nftables) == (
                flavour == "nft",
                flavour == "legacy",
                False,
            )
            for command in ("iptables", "ip6tables"):
                saved = mesh.node.run([f"{command}-{flavour}-save"], netns=netns.path)
                assert "--gid-owner 1337" in saved
