"""Debian's containerd inside a lab node, with a bridge chain of our own: dual stack, host-local addresses, portmap."""

from __future__ import annotations

import ipaddress
import json
import shutil
import subprocess
from pathlib import Path

from lab.cri import CriClient, Sandbox
from lab.images import PAUSE_IMAGE, pause_archive
from lab.node import LabError, Node, wait_until

SYSTEM_PLUGINS = Path("/usr/lib/cni")
CHAIN_PLUGINS = ("bridge", "host-local", "portmap", "loopback")
CONF_NAME = "10-lab.conflist"
SUBNET_V4, GATEWAY_V4 = "10.77.0.0/16", "10.77.0.1"
SUBNET_V6, GATEWAY_V6 = "fd00:77::/64", "fd00:77::1"
START_SECONDS = 20.0
SOCKET = "/run/containerd/containerd.sock"

# restrict_oom_score_adj and disable_apparmor: a container or a small machine may not have the right to either.
CONFIG = """
version = 2
root = "{folder}/containerd"
state = "/run/containerd"
[grpc]
  address = "{socket}"
[plugins."io.containerd.internal.v1.opt"]
  path = "{folder}/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  disable_tcp_service = true
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{bin_dir}"
    conf_dir = "{conf_dir}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{snapshotter}"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
"""


class Containerd:
    """The runtime of a node; `start` returns when it takes sandboxes. Its process ends with the node."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.conf_dir = node.folder / "net.d"
        self.bin_dir = node.folder / "bin"
        self.process: subprocess.Popen[bytes] | None = None
        self.cri = CriClient(node.path(SOCKET), f"/{node.name}")

    def start(self) -> None:
        """Write configuration and chain, start containerd, import the pause image."""
        self.conf_dir.mkdir(exist_ok=True)
        self.bin_dir.mkdir(exist_ok=True)
        for plugin in CHAIN_PLUGINS:
            source = SYSTEM_PLUGINS / plugin
            if not source.exists():
                raise LabError(f"no CNI plugin {source} (Debian's package containernetworking-plugins has it)")
            shutil.copy2(source, self.bin_dir / plugin)  # a link would lead nowhere in a container
        self.write_chain()
        archive = pause_archive()
        config = self.node.folder / "containerd.toml"
        # an overlay cannot lie on an overlay, which is what a container's root usually is
        on_overlay = self.node.run(["stat", "-f", "-c", "%T", str(self.node.folder)]).strip() == "overlayfs"
        config.write_text(self.configuration("native" if on_overlay else "overlayfs"))
        self.process = self.node.spawn(["containerd", "--config", str(config)], log="containerd")
        self.cri.wait_ready(START_SECONDS)
        self.node.run(["ctr", "--address", SOCKET, "--namespace", "k8s.io", "images", "import", str(archive)])
        wait_until("containerd loads the CNI chain", self.cri.network_ready, START_SECONDS)

    def close(self) -> None:
        """Close the client; the processes end with the node."""
        self.cri.close()

    def configuration(self, snapshotter: str) -> str:
        """Return containerd's configuration file."""
        return CONFIG.format(
            folder=self.node.folder,
            socket=SOCKET,
            image=PAUSE_IMAGE,
            bin_dir=self.bin_dir,
            conf_dir=self.conf_dir,
            snapshotter=snapshotter,
        )

    def write_chain(self) -> None:
        """(Re)write the conflist as a primary CNI does: without our plugin, by rename."""
        partial = self.conf_dir / f".{CONF_NAME}.partial"
        partial.write_text(json.dumps(chain(), indent=2) + "\n")
        partial.rename(self.conf_dir / CONF_NAME)

    def hand_out_again(self, *addresses: str) -> None:
        """Have the address plugin begin with these the next time, one of each family, if they are free."""
        for index, address in enumerate(addresses):
            before = ipaddress.ip_address(address) - 1
            self.node.path(f"/var/lib/cni/networks/lab/last_reserved_ip.{index}").write_text(str(before))

    def netns_path(self, sandbox: Sandbox) -> str:
        """Return the path from outside of the sandbox's netns; that of the node for one on the host's network."""
        if not sandbox.netns:
            return self.node.netns
        return str(self.node.path(sandbox.netns.replace("/var/run/", "/run/")))


def chain() -> dict[str, object]:
    """Return the conflist: a bridge with both families, and portmap."""
    return {
        "cniVersion": "1.0.0",
        "name": "lab",
        "plugins": [
            {
                "type": "bridge",
                "bridge": "cni0",
                "isDefaultGateway": True,
                "hairpinMode": True,
                "ipam": {
                    "type": "host-local",
                    "ranges": [[{"subnet": SUBNET_V4}], [{"subnet": SUBNET_V6}]],
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }
