"""Three pods talk through the stand-in, in all three dialects of the ambient rules, and it can tell what it carried."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from lab.namespaces import family_of
from lab.ztunnel import dns
from lab.ztunnel.client import Program
from tests.agent.scene import wait_until
from tests.agent.ztunnels import AgentSide, wait_listening
from tests.kernel.world import KIND, VARIANTS, Netns, node_choice

from meshcni.host.ambient import apply_pod
from meshcni.pods.ambient import AmbientParameters
from meshcni.protocols.zds import Add, Delete, SnapshotSent
from meshcni.rules.model import Family

APP_PORT = 8080
PATIENCE_SECONDS = 10.0
HELLO = bytes.fromhex("0801")
families = pytest.mark.parametrize("version", [4, 6], ids=["ipv4", "ipv6"])


class Pod:
    """A pod on the node's bridge, with an application that says who called, then returns what it gets."""

    def __init__(self, name: str, number: int, node: Netns, stack: ExitStack) -> None:
        self.name = name
        self.addresses = {4: f"10.66.0.{number}", 6: f"fd00:66::{number}"}
        self.netns = Netns()
        stack.callback(self.netns.close)
        path = f"/proc/{os.getpid()}/fd/{self.netns.fd}"
        node.ip(f"link add veth{number} type veth peer name eth0 netns {path}", f"link set veth{number} master br0 up")
        self.netns.ip("link set lo up", "link set eth0 up", *(
            f"addr add {address}/{24 if version == 4 else 64} dev eth0{' nodad' if version == 6 else ''}"
            for version, address in self.addresses.items()
        ))  # fmt: skip
        for version in (4, 6):
            stack.enter_context(self._application(version))

    def _application(self, version: int) -> socket.socket:
        listener = self.netns.call(
            lambda: socket.create_server((self.addresses[version], APP_PORT), family=family_of(self.addresses[version]))
        )

        def answer(client: socket.socket, caller: str) -> None:
            with client:
                client.sendall(f"{caller}\n".encode())
                while data := client.recv(65536):
                    client.sendall(data)

        def serve() -> None:
            while True:
                try:
                    client, address = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answer, args=(client, address[0]), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        return listener

    def connect(self, other: Pod, version: int, port: int = APP_PORT) -> socket.socket:
        address = other.addresses[version]

        def make() -> socket.socket:
            made = socket.socket(family_of(address), socket.SOCK_STREAM)
            made.settimeout(PATIENCE_SECONDS)
            made.connect((address, port))
            return made

        return self.netns.call(make)

    def call(self, other: Pod, version: int, data: bytes = b"hello") -> tuple[str, bytes]:
        """Who the other's application saw, and what came back."""
        with self.connect(other, version) as connection, connection.makefile("rb") as file:
            caller = file.readline().decode().strip()
            sender = threading.Thread(target=lambda: (connection.sendall(data), connection.shutdown(socket.SHUT_WR)))
            sender.start()
            returned = file.read()
            sender.join()
        return caller, returned


class World:
    """A node with pods `a` and `b` in the mesh and `out` outside, served by a stand-in."""

    def __init__(self, folder: Path, variant: str, stack: ExitStack) -> None:
        node = Netns()
        stack.callback(node.close)
        node.ip("link add br0 type bridge", "link set br0 up")
        self.pods = {name: Pod(name, number, node, stack) for number, name in enumerate(("a", "b", "out"), 2)}
        self.agent = AgentSide(folder / "ztunnel.sock")
        stack.callback(self.agent.close)
        arguments = ("--listen", "--name", "web.shop=10.66.0.3", "--name", "six.shop=fd00:66::3")
        self.ztunnel = stack.enter_context(Program(folder, self.agent.path, *arguments))
        assert self.agent.accept() == HELLO
        for name in ("a", "b"):
            pod = self.pods[name]
            pod.netns.call(
                lambda: apply_pod(
                    AmbientParameters(dns_capture=True),
                    frozenset(Family),
                    KIND[variant],
                    choice=node_choice(variant),
                )
            )
            assert self.agent.ask(Add(name, name, "shop", "default"), pod.netns.fd) == ""
        assert self.agent.ask(SnapshotSent()) == ""

    def carried(self, name: str) -> dict[str, int]:
        """Connections by direction that the stand-in took for a pod."""
        counters = self.ztunnel.state()["workloads"][name]["counters"]
        return {direction: values["connections"] for direction, values in counters.items() if values["connections"]}

    def bytes_of(self, name: str, direction: str) -> int:
        found: int = self.ztunnel.state()["workloads"][name]["counters"][direction]["bytes"]
        return found


@pytest.fixture(params=VARIANTS)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(tmp_path, request.param, stack)


@families
def test_pods_in_the_mesh_talk_and_see_each_other(world: World, version: int) -> None:
    a, b = world.pods["a"], world.pods["b"]
    assert a.call(b, version) == (a.addresses[version], b"hello")
    assert world.carried("a") == {"outbound": 1}
    assert world.carried("b") == {"inbound": 1}
    assert b.call(a, version) == (b.addresses[version], b"hello")
    assert world.carried("a") == world.carried("b") == {"outbound": 1, "inbound": 1}


@families
def test_who_is_outside_bypasses_on_its_own_side_only(world: World, version: int) -> None:
    a, out = world.pods["a"], world.pods["out"]
    assert a.call(out, version) == (a.addresses[version], b"hello")
    assert out.call(a, version) == (out.addresses[version], b"hello")
    assert world.carried("a") == {"outbound": 1, "inbound": 1}
    assert world.carried("b") == {}


@families
def test_much_data_arrives_whole_and_is_counted(world: World, version: int) -> None:
    a, b = world.pods["a"], world.pods["b"]
    data = os.urandom(3 << 20)
    caller, returned = a.call(b, version, data)
    assert returned == data
    for name, direction in (("a", "outbound"), ("b", "inbound")):
        assert world.bytes_of(name, direction) == 2 * len(data) + len(f"{caller}\n")


@families
def test_a_closed_port_is_told(world: World, version: int) -> None:
    a, b = world.pods["a"], world.pods["b"]
    with a.connect(b, version, 9) as connection:  # taken by the stand-in, which finds nobody
        assert connection.recv(1) == b""
    assert world.carried("b") == {"inbound": 1}


def test_a_connection_to_its_own_ports_is_no_loop(world: World) -> None:
    for port in (15001, 15006, 15008):
        with world.pods["out"].connect(world.pods["a"], 4, port) as connection:
            assert connection.recv(1) == b""
    assert world.carried("a") == {"inbound": 2, "tunnel": 1}


@families
def test_names_are_answered_over_udp_and_tcp(world: World, version: int) -> None:
    a, out = world.pods["a"], world.pods["out"]
    resolver = (out.addresses[version], 53)

    def over_udp(name: str, kind: int) -> bytes:
        with socket.socket(family_of(resolver[0]), socket.SOCK_DGRAM) as asking:
            asking.settimeout(PATIENCE_SECONDS)
            asking.connect(resolver)
            asking.send(dns.ask(name, kind))
            return asking.recv(512)

    def over_tcp(name: str) -> bytes:
        with socket.create_connection(resolver, PATIENCE_SECONDS) as asking, asking.makefile("rb") as file:
            query = dns.ask(name)
            asking.sendall(len(query).to_bytes(2) + query)
            return file.read(int.from_bytes(file.read(2)))

    assert dns.answers(a.netns.call(lambda: over_udp("web.shop.", dns.A))) == ["10.66.0.3"]
    assert dns.answers(a.netns.call(lambda: over_udp("six.shop", dns.AAAA))) == ["fd00:66::3"]
    assert dns.answers(a.netns.call(lambda: over_udp("six.shop", dns.A))) == []
    assert a.netns.call(lambda: over_udp("else.where", dns.A))[3] & 15 == dns.NO_SUCH_NAME
    assert dns.answers(a.netns.call(lambda: over_tcp("web.shop"))) == ["10.66.0.3"]
    assert world.carried("a") == {"dns": 5}


def test_del_cuts_what_is_open_and_refuses_what_comes(world: World) -> None:
    a, b = world.pods["a"], world.pods["b"]
    with a.connect(b, 4) as connection, connection.makefile("rb") as file:
        assert file.readline()
        assert world.agent.ask(Delete("b")) == ""
        assert file.read() == b""
    wait_listening(b.netns, {APP_PORT})
    with pytest.raises(ConnectionRefusedError):
        world.pods["out"].connect(b, 4)


def test_sigterm_leaves_open_connections_some_time(world: World) -> None:
    a, b = world.pods["a"], world.pods["b"]
    with a.connect(b, 4) as connection, connection.makefile("rb") as file:
        assert file.readline()
        ended: list[int] = []
        ending = threading.Thread(target=lambda: ended.append(world.ztunnel.terminate()))
        ending.start()
        wait_until("the listeners to be gone", lambda: not _accepts(a, b))
        connection.sendall(b"still here")
        assert file.read(10) == b"still here"
        connection.shutdown(socket.SHUT_WR)
        assert file.read() == b""
        ending.join()
        assert ended == [0]


def _accepts(a: Pod, b: Pod) -> bool:
    try:
        a.connect(b, 4).close()
    except (ConnectionRefusedError, ConnectionResetError):
        return False
    return True
