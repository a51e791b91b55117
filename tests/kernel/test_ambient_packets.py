"""Real packets through an ambient pod: what reaches ztunnel, what does not, and from which address.

A host and a pod are joined by a veth pair, as most CNI plugins do. Servers and clients are sockets made inside the
namespaces; ztunnel's stand-in is a process of its own in the pod's namespace.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from tests.kernel import ambient_oracle
from tests.kernel.test_ambient_contract import make_sets
from tests.kernel.test_packets import CLIENT, PYTHON, serving
from tests.kernel.world import KIND, VARIANTS, Netns, node_choice

from meshcni.host.ambient import apply_pod, remove_pod
from meshcni.host.hostrules import apply_host, remove_host
from meshcni.pods.ambient import AmbientParameters
from meshcni.rules.model import Family

HOST = {4: "10.88.0.1", 6: "fd00:88::1"}
POD = {4: "10.88.0.2", 6: "fd00:88::2"}
VM = {4: "10.89.0.2", 6: "fd00:89::2"}
POD_TO_VM = {4: "10.89.0.1", 6: "fd00:89::1"}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
PROBE = {4: ambient_oracle.P4, 6: ambient_oracle.P6}
SETS = {4: "istio-inpod-probes-v4", 6: "istio-inpod-probes-v6"}
APP_PORT, SERVER_PORT, HBONE_PORT = 8080, 9090, 15008
ZTUNNEL_MARK = 0x539
KUBELET_UID, OTHER_UID = 0, 2000
DEFAULT = AmbientParameters(dns_capture=True, virtual_interfaces=("k6t-+",))
families = pytest.mark.parametrize("family", [4, 6], ids=["ipv4", "ipv6"])


class Node:
    """A host with servers; a pod with an application, a virtual machine behind an interface, and ztunnel's sockets."""

    def __init__(self, variant: str, stack: ExitStack) -> None:
        self.variant = variant
        self.host, self.pod, self.vm = Netns(), Netns(), Netns()
        for netns in (self.host, self.pod, self.vm):
            stack.callback(netns.close)
        join(self.host, "pod", HOST, self.pod, "eth0", POD)
        join(self.pod, "k6t-eth0", POD_TO_VM, self.vm, "eth0", VM)
        self.pod.ip(*(f"route add default via {HOST[family]}" for family in (4, 6)))
        self.vm.ip(*(f"route add default via {POD_TO_VM[family]}" for family in (4, 6)))
        self.host.ip(*(f"route add {VM[family]} via {POD[family]}" for family in (4, 6)))
        forwarding = "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding"
        self.pod.shell("sh", "-c", forwarding)
        stack.enter_context(serving(self.pod, "application", APP_PORT))
        for port in (SERVER_PORT, 53):
            stack.enter_context(serving(self.host, "server", port))
        stack.enter_context(answering(self.host))
        stack.enter_context(ztunnel(self.pod))

    def apply(self, parameters: AmbientParameters) -> None:
        choice = node_choice(self.variant)
        self.pod.call(lambda: apply_pod(parameters, frozenset(Family), KIND[self.variant], choice=choice))

    def to_pod(self, family: int, port: int = APP_PORT, *, source: str = "", mark: int = 0) -> list[str]:
        """What a client on the host reads, from an address of its own choice."""
        return self.host.call(lambda: fetch_from(POD[family], port, source, mark))

    def from_pod(self, address: str, port: int = SERVER_PORT, *, mark: int = 0) -> list[str]:
        """What the application reads, or ztunnel with its mark."""
        return self.pod.call(lambda: fetch_from(address, port, "", mark))

    def from_vm(self, address: str, port: int = SERVER_PORT) -> list[str]:
        """What the virtual machine reads."""
        return self.vm.call(lambda: fetch_from(address, port, "", 0))

    def ask(self, address: str, *, port: int = 53, mark: int = 0) -> bytes:
        """What answers a datagram of the application, or of ztunnel with its mark."""
        return self.pod.call(lambda: ask(address, port, mark))


def join(
    one: Netns, name: str, addresses: dict[int, str], other: Netns, other_name: str, others: dict[int, str]
) -> None:
    there = f"/proc/{os.getpid()}/fd/{other.fd}"
    one.ip("link set lo up", f"link add {name} type veth peer name {other_name} netns {there}", f"link set {name} up")
    other.ip("link set lo up", f"link set {other_name} up")
    for netns, interface, own in ((one, name, addresses), (other, other_name, others)):
        netns.ip(f"addr add {own[4]}/24 dev {interface}", f"addr add {own[6]}/64 dev {interface} nodad")


def fetch_from(address: str, port: int, source: str, mark: int) -> list[str]:
    """Read what a server says to a connection with that source address and mark."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as connection:
        connection.settimeout(5)
        if mark:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        if source:
            connection.bind((source, 0))
        connection.connect((address, port))
        with connection.makefile() as file:
            return file.read().splitlines()


def ask(address: str, port: int, mark: int) -> bytes:
    """Send a datagram and return the answer, which must come from where it was sent (the socket is connected)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        if mark:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        client.connect((address, port))
        client.send(b"a question")
        return client.recv(512)


@contextmanager
def answering(netns: Netns) -> Iterator[None]:
    """Answer datagrams to port 53 and to another one with `answered by the server`, at each address of the host."""
    code = (
        "import socket, selectors\n"
        "found = selectors.DefaultSelector()\n"
        f"for address in {tuple(HOST.values())}:\n"
        " for port in (53, 5300):\n"
        "  server = socket.socket(socket.AF_INET6 if ':' in address else socket.AF_INET, socket.SOCK_DGRAM)\n"
        "  server.bind((address, port)); found.register(server, 1)\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        " for key, _ in found.select():\n"
        "  key.fileobj.sendto(b'answered by the server', key.fileobj.recvfrom(512)[1])\n"
    )
    with running(netns, code):
        yield


@contextmanager
def ztunnel(pod: Netns) -> Iterator[None]:
    with running(pod, Path(__file__).with_name("ambient_proxy.py").read_text()):
        yield


@contextmanager
def running(netns: Netns, code: str) -> Iterator[None]:
    """Run a Python program in a namespace, from its line `ready` on."""
    process = netns.call(lambda: subprocess.Popen([PYTHON, "-c", code], stdout=subprocess.PIPE, text=True, cwd="/"))
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield
    finally:
        process.kill()
        process.communicate()


@contextmanager
def node_with(variant: str, parameters: AmbientParameters) -> Iterator[Node]:
    with ExitStack() as stack:
        node = Node(variant, stack)
        for family in (4, 6):  # before there are rules everything is direct: the tests below could fail
            assert node.to_pod(family) == [f"application sees {HOST[family]}"]
            assert node.from_pod(HOST[family]) == [f"server sees {POD[family]}"]
            assert node.from_vm(HOST[family]) == [f"server sees {VM[family]}"]
        node.apply(parameters)
        yield node


@pytest.fixture(scope="module", params=VARIANTS)
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    with node_with(str(request.param), DEFAULT) as made:
        yield made


# --- inbound ----------------------------------------------------------------------------------------------------------


@families
def test_inbound_goes_to_ztunnel_and_on_with_the_clients_address(node: Node, family: int) -> None:
    """The second line is the application's answer, which came back to ztunnel by mark, policy rule and route."""
    assert node.to_pod(family) == [f"inbound {POD[family]} {APP_PORT}", f"application sees {HOST[family]}"]


@families
def test_tunnelled_inbound_is_direct(node: Node, family: int) -> None:
    assert node.to_pod(family, HBONE_PORT) == ["tunnelled"]


@families
def test_probes_are_direct(node: Node, family: int) -> None:
    with extra_address(node.host, PROBE[family]):
        assert node.to_pod(family, source=PROBE[family]) == [f"application sees {PROBE[family]}"]


@contextmanager
def extra_address(netns: Netns, address: str) -> Iterator[None]:
    length = 128 if ":" in address else 32
    netns.ip(f"addr add {address}/{length} dev lo {'nodad' if length == 128 else ''}")
    try:
        yield
    finally:
        netns.ip(f"addr del {address}/{length} dev lo")


@families
def test_a_mark_on_another_machine_means_nothing_here(node: Node, family: int) -> None:
    assert node.to_pod(family, mark=ZTUNNEL_MARK)[0] == f"inbound {POD[family]} {APP_PORT}"


@families
def test_a_client_that_names_ztunnels_port_gets_its_refusal(node: Node, family: int) -> None:
    for port in (15001, 15006):
        assert node.to_pod(family, port)[-1] == "a loop"


# --- outbound ---------------------------------------------------------------------------------------------------------


@families
def test_outbound_goes_to_ztunnel_and_on(node: Node, family: int) -> None:
    expected = [f"outbound {HOST[family]} {SERVER_PORT}", f"server sees {POD[family]}"]
    assert node.from_pod(HOST[family]) == expected


@families
def test_ztunnels_own_connections_are_direct(node: Node, family: int) -> None:
    assert node.from_pod(HOST[family], mark=ZTUNNEL_MARK) == [f"server sees {POD[family]}"]
    assert node.from_pod(HOST[family], mark=0xABC000 | ZTUNNEL_MARK) == [f"server sees {POD[family]}"]
    assert node.from_pod(HOST[family], mark=0x1539)[0] == f"server sees {POD[family]}"
    assert node.from_pod(HOST[family], mark=0x53A)[0] == f"outbound {HOST[family]} {SERVER_PORT}"


@families
def test_the_application_calling_its_own_pod_is_left_alone(node: Node, family: int) -> None:
    for address in (LOOPBACK[family], POD[family]):
        assert node.from_pod(address, APP_PORT) == [f"application sees {address}"]


@families
def test_a_virtual_machine_is_captured_as_outbound(node: Node, family: int) -> None:
    assert node.from_vm(HOST[family]) == [f"outbound {HOST[family]} {SERVER_PORT}", f"server sees {POD[family]}"]


@families
def test_datagrams_are_left_alone(node: Node, family: int) -> None:
    assert node.ask(HOST[family], port=5300) == b"answered by the server"


# --- DNS --------------------------------------------------------------------------------------------------------------


@families
def test_dns_goes_to_ztunnel(node: Node, family: int) -> None:
    elsewhere = {4: "10.88.0.77", 6: "fd00:88::77"}[family]
    for address in (HOST[family], elsewhere):
        assert node.ask(address) == b"answered by ztunnel"
        assert node.from_pod(address, 53) == [f"dns {address} 53"]


@families
def test_ztunnels_own_questions_are_direct(node: Node, family: int) -> None:
    for _time in range(3):
        assert node.ask(HOST[family], mark=ZTUNNEL_MARK) == b"answered by the server"
        assert node.ask(HOST[family]) == b"answered by ztunnel"
    assert node.from_pod(HOST[family], 53, mark=ZTUNNEL_MARK) == [f"server sees {POD[family]}"]


def test_without_capture_dns_is_direct(variant: str) -> None:
    with node_with(variant, replace(DEFAULT, dns_capture=False)) as node:
        for family in (4, 6):
            assert node.ask(HOST[family]) == b"answered by the server"
            assert node.from_pod(HOST[family], 53)[0] == f"outbound {HOST[family]} 53"


# --- overrides, leaving -----------------------------------------------------------------------------------------------


def test_ingress_pods_are_captured_outbound_only(variant: str) -> None:
    with node_with(variant, replace(DEFAULT, ingress=True)) as node:
        for family in (4, 6):
            assert node.to_pod(family) == [f"application sees {HOST[family]}"]
            assert node.from_pod(HOST[family])[0] == f"outbound {HOST[family]} {SERVER_PORT}"


def test_after_removal_everything_is_direct(variant: str) -> None:
    with node_with(variant, DEFAULT) as node:
        assert len(node.to_pod(4)) == 2
        node.pod.call(remove_pod)
        for family in (4, 6):
            assert node.to_pod(family) == [f"application sees {HOST[family]}"]
            assert node.from_pod(HOST[family]) == [f"server sees {POD[family]}"]
            assert node.ask(HOST[family]) == b"answered by the server"


# --- the host ---------------------------------------------------------------------------------------------------------


def set_member(node: Node, verb: str, family: int) -> None:
    """Put the pod's address into the host's set (`add`), or take it out (`del`)."""
    if node.variant == "nftables":
        verb = {"add": "add", "del": "delete"}[verb]
        node.host.shell("nft", verb, "element", "inet", "istio-ambient-nat", SETS[family], f"{{ {POD[family]} }}")
    else:
        node.host.shell("ipset", verb, SETS[family], POD[family])


def from_host_as(node: Node, uid: int, family: int) -> list[str]:
    command = [PYTHON, "-c", CLIENT, POD[family], str(APP_PORT)]
    run = subprocess.check_output
    text = node.host.call(lambda: run(command, user=uid, group=uid, extra_groups=[], text=True, cwd="/"))
    return text.split("\n")[:-2]


@pytest.fixture
def with_host_rules(node: Node) -> Iterator[Node]:
    make_sets(node.host, node.variant)
    probe_v4, probe_v6 = DEFAULT.probe_v4, DEFAULT.probe_v6
    choice = node_choice(node.variant)
    everyone = frozenset(Family)
    node.host.call(
        lambda: apply_host(probe_v4, probe_v6, everyone, KIND[node.variant], kubelet_uid=KUBELET_UID, choice=choice)
    )
    yield node
    node.host.call(remove_host)
    if node.variant == "nftables":
        node.host.shell("nft", "delete", "table", "inet", "istio-ambient-nat")
    else:
        for name in SETS.values():
            node.host.shell("ipset", "destroy", name)


@families
def test_the_hosts_probes_of_enrolled_pods_are_direct(with_host_rules: Node, family: int) -> None:
    node = with_host_rules
    assert node.to_pod(family)[0] == f"inbound {POD[family]} {APP_PORT}"  # not enrolled yet
    set_member(node, "add", family)
    assert node.to_pod(family) == [f"application sees {PROBE[family]}"]
    assert node.from_pod(HOST[family])[0] == f"outbound {HOST[family]} {SERVER_PORT}"
    set_member(node, "del", family)
    assert node.to_pod(family)[0] == f"inbound {POD[family]} {APP_PORT}"


@families
def test_who_is_taken_for_the_kubelet(with_host_rules: Node, family: int) -> None:
    """With iptables every process of the host, with nft every process of the kubelet's user."""
    node = with_host_rules
    set_member(node, "add", family)
    probe = [f"application sees {PROBE[family]}"]
    captured = [f"inbound {POD[family]} {APP_PORT}", f"application sees {HOST[family]}"]
    assert from_host_as(node, KUBELET_UID, family) == probe
    assert from_host_as(node, OTHER_UID, family) == (captured if node.variant == "nftables" else probe)
    set_member(node, "del", family)
