"""Real packets through a pod with a proxy in it: what is captured, what is not, in every mode and backend.

A node and a pod are joined by a veth pair. Servers and clients are sockets made inside the namespaces and owned by root
(the pod's application); the proxy is a process of its own with uid and gid 1337.
"""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from ipaddress import ip_network
from itertools import product
from pathlib import Path

import pytest
from tests.kernel.world import VARIANTS, Netns, apply, remove

from meshcni.pods.interception import Interception, InterceptionMode, NumberRange

PYTHON = "/usr/bin/python3"  # one that every user may execute
NODE = {4: "10.78.0.1", 6: "fd00:78::1"}
POD = {4: "10.78.0.2", 6: "fd00:78::2"}
EXCLUDED_NODE = {4: "10.79.0.1", 6: "fd00:79::1"}
PROXY_SOURCE = {4: "127.0.0.6", 6: "::6"}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
APP_PORT, EXCLUDED_APP_PORT, STATUS_PORT = 8080, 8082, 15020
SERVER_PORT, EXCLUDED_SERVER_PORT = 9090, 9092
PROXY_ID = 1337
CLIENT = (
    "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5); print(s.makefile().read())"
)

PARAMETERS = Interception(
    inbound_exclude_ports=(NumberRange.single(EXCLUDED_APP_PORT), NumberRange.single(STATUS_PORT)),
    outbound_exclude_ports=(NumberRange.single(EXCLUDED_SERVER_PORT),),
    outbound_exclude_cidrs=(ip_network("10.79.0.0/24"), ip_network("fd00:79::/64")),
)


class Mesh:
    """A node with servers, and a pod with an application and a proxy."""

    def __init__(self, mode: InterceptionMode, variant: str, stack: ExitStack) -> None:
        self.mode, self.variant = mode, variant
        self.node, self.pod = Netns(), Netns()
        stack.callback(self.node.close)
        stack.callback(self.pod.close)
        self.node.ip(
            "link set lo up",
            f"link add pod type veth peer name eth0 netns /proc/{os.getpid()}/fd/{self.pod.fd}",
            "link set pod up",
            *(f"addr add {address}/{length} dev pod {extra}" for address, length, extra in _prefixes(NODE)),
            *(f"addr add {address}/{length} dev pod {extra}" for address, length, extra in _prefixes(EXCLUDED_NODE)),
        )
        self.pod.ip(
            "link set lo up",
            "link set eth0 up",
            *(f"addr add {address}/{length} dev eth0 {extra}" for address, length, extra in _prefixes(POD)),
            f"route add default via {NODE[4]}",
            f"route add default via {NODE[6]}",
        )
        for port in (APP_PORT, EXCLUDED_APP_PORT, STATUS_PORT):
            stack.enter_context(serving(self.pod, "application", port))
        for port in (SERVER_PORT, EXCLUDED_SERVER_PORT, 53):
            stack.enter_context(serving(self.node, "server", port))
        stack.enter_context(proxy(self.pod, mode))

    def to_pod(self, address: str, port: int) -> list[str]:
        """What a client on the node reads."""
        return self.node.call(lambda: fetch(address, port))

    def from_pod(self, address: str, port: int) -> list[str]:
        """What the application reads."""
        return self.pod.call(lambda: fetch(address, port))

    def from_pod_as(self, uid: int, gid: int, address: str, port: int) -> list[str]:
        """What a process of the pod with these ids reads."""

        def run() -> str:
            command = [PYTHON, "-c", CLIENT, address, str(port)]
            return subprocess.check_output(command, user=uid, group=gid, extra_groups=[], text=True, cwd="/")

        return self.pod.call(run).split("\n")[:-2]


def _prefixes(addresses: dict[int, str]) -> list[tuple[str, int, str]]:
    return [(addresses[4], 24, ""), (addresses[6], 64, "nodad")]


def fetch(address: str, port: int) -> list[str]:
    with socket.create_connection((address, port), 5) as connection, connection.makefile() as file:
        return file.read().splitlines()


@contextmanager
def serving(netns: Netns, name: str, port: int) -> Iterator[None]:
    """Answer each connection to `port`, of both families, with `NAME sees ADDRESS`."""

    def answer(listener: socket.socket) -> None:
        while True:
            try:
                connection, peer = listener.accept()
            except OSError:
                return  # closed: the test is over
            with connection:
                connection.sendall(f"{name} sees {peer[0].removeprefix('::ffff:')}\n".encode())

    def listen() -> socket.socket:
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)

    listener = netns.call(listen)
    thread = threading.Thread(target=answer, args=(listener,))
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@contextmanager
def proxy(pod: Netns, mode: InterceptionMode) -> Iterator[None]:
    source = Path(__file__).with_name("proxy.py").read_text()
    # Transparent sockets need the capability; a sidecar in TPROXY mode has it from its securityContext.
    setpriv = ["setpriv", f"--reuid={PROXY_ID}", f"--regid={PROXY_ID}", "--clear-groups"]
    setpriv += ["--inh-caps=-all,+net_admin", "--ambient-caps=-all,+net_admin"]
    command = [*setpriv, PYTHON, "-c", source, mode.value]
    process = pod.call(lambda: subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd="/"))
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
    finally:
        process.kill()
        process.communicate()


@contextmanager
def mesh_of(mode: InterceptionMode, variant: str, parameters: Interception) -> Iterator[Mesh]:
    with ExitStack() as stack:
        mesh = Mesh(mode, variant, stack)
        # Before there are rules everything is direct: the tests below could fail.
        for family in (4, 6):
            assert mesh.to_pod(POD[family], APP_PORT) == [f"application sees {NODE[family]}"]
            assert mesh.from_pod(NODE[family], SERVER_PORT) == [f"server sees {POD[family]}"]
        apply(mesh.pod, parameters, variant)
        yield mesh


@pytest.fixture(
    scope="module", params=product(InterceptionMode, VARIANTS), ids=lambda pair: f"{pair[0].value}-{pair[1]}"
)
def mesh(request: pytest.FixtureRequest) -> Iterator[Mesh]:
    mode, variant = request.param
    with mesh_of(mode, variant, with_mode(mode)) as made:
        yield made


def with_mode(mode: InterceptionMode) -> Interception:
    return replace(PARAMETERS, mode=mode)


families = pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])


@families
def test_inbound_is_captured(mesh: Mesh, family: int) -> None:
    assert mesh.to_pod(POD[family], APP_PORT) == [
        f"inbound {POD[family]} {APP_PORT}",
        f"application sees {PROXY_SOURCE[family]}",
    ]


@families
def test_outbound_is_captured(mesh: Mesh, family: int) -> None:
    assert mesh.from_pod(NODE[family], SERVER_PORT) == [
        f"outbound {NODE[family]} {SERVER_PORT}",
        f"server sees {POD[family]}",
    ]


@families
@pytest.mark.parametrize("port", [EXCLUDED_APP_PORT, STATUS_PORT])
def test_excluded_inbound_port_is_direct(mesh: Mesh, family: int, port: int) -> None:
    assert mesh.to_pod(POD[family], port) == [f"application sees {NODE[family]}"]


@families
def test_excluded_outbound_port_is_direct(mesh: Mesh, family: int) -> None:
    assert mesh.from_pod(NODE[family], EXCLUDED_SERVER_PORT) == [f"server sees {POD[family]}"]


@families
def test_excluded_cidr_is_direct(mesh: Mesh, family: int) -> None:
    assert mesh.from_pod(EXCLUDED_NODE[family], SERVER_PORT) == [f"server sees {POD[family]}"]


@families
@pytest.mark.parametrize(("uid", "gid"), [(PROXY_ID, PROXY_ID), (PROXY_ID, 2000), (2000, PROXY_ID)])
def test_the_proxys_own_connections_are_direct(mesh: Mesh, family: int, uid: int, gid: int) -> None:
    assert mesh.from_pod_as(uid, gid, NODE[family], SERVER_PORT) == [f"server sees {POD[family]}"]


@families
def test_connections_of_other_users_are_captured(mesh: Mesh, family: int) -> None:
    first = mesh.from_pod_as(2000, 2000, NODE[family], SERVER_PORT)[0]
    assert first == f"outbound {NODE[family]} {SERVER_PORT}"


@families
def test_loopback_is_left_alone(mesh: Mesh, family: int) -> None:
    for address in (LOOPBACK[family], POD[family]):
        assert mesh.from_pod(address, APP_PORT) == [f"application sees {address}"]


@families
def test_the_proxy_calling_its_own_pod_comes_in_again(mesh: Mesh, family: int) -> None:
    assert mesh.from_pod_as(PROXY_ID, PROXY_ID, POD[family], APP_PORT) == [
        f"inbound {POD[family]} {APP_PORT}",
        f"application sees {PROXY_SOURCE[family]}",
    ]


@families
def test_a_client_that_names_the_proxys_port_gets_its_refusal(mesh: Mesh, family: int) -> None:
    assert mesh.to_pod(POD[family], 15006)[-1:] == ["a loop"]


# --- DNS -------------------------------------------------------------------------------------------------------------


def ask(address: str) -> bytes:
    """Send a datagram to port 53 and return the answer, which must come from there (the socket is connected)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        client.connect((address, 53))
        client.send(b"a question")
        return client.recv(512)


def test_dns_is_captured(variant: str) -> None:
    parameters = Interception(redirect_dns=True, capture_all_dns=True)
    with mesh_of(InterceptionMode.REDIRECT, variant, parameters) as mesh:
        assert mesh.pod.call(lambda: ask(NODE[4])) == b"captured by the proxy"
        assert mesh.pod.call(lambda: ask("10.78.0.77")) == b"captured by the proxy"
        assert mesh.from_pod(NODE[4], SERVER_PORT)[0] == f"outbound {NODE[4]} {SERVER_PORT}"
        # TCP questions go to the same port of the proxy, where only UDP is served here.
        with pytest.raises(ConnectionRefusedError):
            mesh.from_pod(NODE[4], 53)


# --- leaving and changing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", InterceptionMode)
def test_after_removal_everything_is_direct(mode: InterceptionMode, variant: str) -> None:
    with mesh_of(mode, variant, with_mode(mode)) as mesh:
        assert len(mesh.to_pod(POD[4], APP_PORT)) == 2
        remove(mesh.pod)
        for family in (4, 6):
            assert mesh.to_pod(POD[family], APP_PORT) == [f"application sees {NODE[family]}"]
            assert mesh.from_pod(NODE[family], SERVER_PORT) == [f"server sees {POD[family]}"]
