"""The contract of a ztunnel, row by row: of the stand-in, and of the real one (MESHCNI_ZTUNNEL names its binary)."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from lab.node import wait_readable
from lab.ztunnel.client import Program
from tests.agent.scene import wait_until
from tests.agent.ztunnels import KINDS, PATIENCE_SECONDS, ZTUNNEL_PORTS, AgentSide, Ztunnel, listening, wait_listening
from tests.kernel.world import Netns, make_pod

from meshcni.protocols import zds_pb2 as pb
from meshcni.protocols.zds import MAX_SENT_BYTES, Add, Delete, Keep, SnapshotSent, encode_request

HELLO = bytes.fromhex("0801")
DONE = ""


def add(uid: str, name: str = "web") -> Add:
    return Add(uid, name, "shop", "default")


class Rows:
    """One ztunnel, connected to an agent that the test moves."""

    def __init__(self, agent: AgentSide, ztunnel: Ztunnel, stack: ExitStack) -> None:
        self.agent, self.ztunnel = agent, ztunnel
        self._stack = stack

    def pod(self) -> Netns:
        pod = make_pod()
        self._stack.callback(pod.close)
        return pod

    def live(self, *uids: str) -> list[Netns]:
        """Pods that are served, and the snapshot."""
        pods = [self.pod() for _ in uids]
        for uid, pod in zip(uids, pods, strict=True):
            assert self.agent.ask(add(uid), pod.fd) == DONE
        assert self.agent.ask(SnapshotSent()) == DONE
        return pods

    def reconnect(self) -> None:
        self.agent.connection.close()
        assert self.agent.accept() == HELLO

    def exit_status(self) -> int:
        return self.ztunnel.process.wait(PATIENCE_SECONDS)


@pytest.fixture(params=KINDS)
def rows(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rows]:
    with ExitStack() as stack:
        agent = AgentSide(tmp_path / "ztunnel.sock")
        stack.callback(agent.close)
        ztunnel = KINDS[request.param](tmp_path, agent.path, stack)
        assert agent.accept() == HELLO
        yield Rows(agent, ztunnel, stack)


# --- what is read -----------------------------------------------------------------------------------------------------


def test_nothing_is_said_unasked(rows: Rows) -> None:
    assert not wait_readable(rows.agent.connection.fileno(), 0.3)


def test_the_end_of_a_connection_brings_the_next_at_once(rows: Rows) -> None:
    for _ in range(5):
        rows.reconnect()


def padded(size: int) -> bytes:
    """An Add of exactly so many bytes; ztunnel ignores fields it does not know."""
    data = encode_request(add("u"))
    return (
        data
        + b"\x7a"
        + bytes([0x80 | (size - len(data) - 3) & 0x7F, (size - len(data) - 3) >> 7])
        + bytes(size - len(data) - 3)
    )


def test_a_message_of_1024_bytes_is_read(rows: Rows) -> None:
    rows.agent.send(padded(MAX_SENT_BYTES), [rows.pod().fd])
    assert rows.agent.answer() == DONE


BROKEN = {
    "longer than 1024 bytes": (padded(MAX_SENT_BYTES + 1), 1),
    "undecodable": (b"\xff", 0),
    "no payload": (b"\x7a\x00", 0),
    "add without descriptor": (encode_request(add("u")), 0),
    "add with two descriptors": (encode_request(add("u")), 2),
    "keep with a descriptor": (encode_request(Keep("u")), 1),
    "del with a descriptor": (encode_request(Delete("u")), 1),
    "snapshot with a descriptor": (encode_request(SnapshotSent()), 1),
}


@pytest.mark.parametrize(("data", "descriptors"), BROKEN.values(), ids=BROKEN)
def test_a_broken_message_is_refused_and_ends_the_connection(rows: Rows, data: bytes, descriptors: int) -> None:
    rows.agent.send(data, [rows.pod().fd] * descriptors)
    assert rows.agent.answer()
    assert rows.agent.answer() is None
    assert rows.agent.accept() == HELLO
    rows.live("a")
    assert set(rows.ztunnel.workloads()) == {"a"}


def test_an_add_of_nobody_is_taken_but_not_one_without_info(rows: Rows) -> None:
    assert rows.agent.ask(Add("u", "", "", ""), rows.pod().fd) == DONE
    request = pb.WorkloadRequest(add=pb.AddWorkload(uid="v"))
    rows.agent.send(request.SerializeToString(), [rows.pod().fd])
    assert rows.agent.answer()
    assert rows.exit_status() == 1


@pytest.mark.parametrize("request_", [Keep("a"), SnapshotSent()], ids=["keep", "second snapshot"])
def test_what_must_not_follow_the_snapshot_ends_the_process(rows: Rows, request_: Keep | SnapshotSent) -> None:
    (pod,) = rows.live("a")
    assert rows.agent.ask(request_)
    assert rows.exit_status() == 1
    wait_listening(pod, set())


def test_requests_in_a_row_are_answered_in_order(rows: Rows) -> None:
    pod = rows.pod()
    rows.agent.send(encode_request(add("a")), [pod.fd])
    with open("/dev/null") as file:
        rows.agent.send(encode_request(add("b")), [file.fileno()])
    rows.agent.send(encode_request(Delete("b")))
    first, second, third = (rows.agent.answer() for _ in range(3))
    assert (first, third) == (DONE, DONE)
    assert second


# --- pods -------------------------------------------------------------------------------------------------------------


def test_listeners_are_there_when_the_ack_comes(rows: Rows) -> None:
    pod = rows.pod()
    assert rows.agent.ask(add("a"), pod.fd) == DONE
    assert listening(pod) == ZTUNNEL_PORTS
    workload = rows.ztunnel.workloads()["a"]
    assert workload["state"] == "Up"
    assert workload["info"] == {"name": "web", "namespace": "shop", "serviceAccount": "default"}


def test_the_netns_lives_as_long_as_it_is_served(rows: Rows) -> None:
    pod = make_pod()
    inode = os.fstat(pod.fd).st_ino
    copy = os.dup(pod.fd)
    assert rows.agent.ask(add("a"), pod.fd) == DONE
    pod.close()
    again = Netns(copy)
    assert listening(again) == ZTUNNEL_PORTS
    assert os.fstat(again.fd).st_ino == inode
    again.close()


def test_the_same_netns_again_changes_nothing(rows: Rows) -> None:
    (pod,) = rows.live("a")
    assert rows.agent.ask(add("a", "renamed"), pod.fd) == DONE
    assert rows.ztunnel.workloads()["a"]["info"]["name"] == "web"
    assert listening(pod) == ZTUNNEL_PORTS


def test_another_netns_moves_the_pod(rows: Rows) -> None:
    (old,) = rows.live("a")
    new = rows.pod()
    assert rows.agent.ask(add("a"), new.fd) == DONE
    assert listening(new) == ZTUNNEL_PORTS
    wait_listening(old, set())


def test_two_pods_may_share_a_netns(rows: Rows) -> None:
    (pod,) = rows.live("a")
    assert rows.agent.ask(add("b"), pod.fd) == DONE
    assert rows.agent.ask(Delete("a")) == DONE
    wait_until("a to be gone", lambda: set(rows.ztunnel.workloads()) == {"b"})
    assert listening(pod) == ZTUNNEL_PORTS


def test_del_ends_the_listeners(rows: Rows) -> None:
    (pod,) = rows.live("a")
    assert rows.agent.ask(Delete("a")) == DONE
    wait_listening(pod, set())
    assert rows.agent.ask(Delete("a")) == DONE
    assert rows.agent.ask(Delete("never heard of")) == DONE


def test_without_ipv6_on_lo_one_listener_is_missing(rows: Rows) -> None:
    pod = rows.pod()
    pod.shell("sysctl", "-q", "-w", "net.ipv6.conf.lo.disable_ipv6=1")
    assert rows.agent.ask(add("a"), pod.fd) == DONE
    assert listening(pod) == ZTUNNEL_PORTS
    assert "::1" not in pod.shell("ss", "-Hltnu")


# --- the snapshot -----------------------------------------------------------------------------------------------------


def test_what_is_not_named_ends_with_the_snapshot(rows: Rows) -> None:
    kept, dropped, added = rows.live("kept", "dropped", "added")
    rows.reconnect()
    assert rows.agent.ask(Keep("kept")) == DONE
    assert rows.agent.ask(Keep("never heard of")) == DONE
    assert rows.agent.ask(add("added"), added.fd) == DONE
    assert all(listening(pod) == ZTUNNEL_PORTS for pod in (kept, dropped, added))
    assert rows.agent.ask(SnapshotSent()) == DONE
    wait_listening(dropped, set())
    assert all(listening(pod) == ZTUNNEL_PORTS for pod in (kept, added))
    assert set(rows.ztunnel.workloads()) == {"kept", "added"}


def test_del_before_the_snapshot_takes_effect_with_it(rows: Rows) -> None:
    (pod,) = rows.live("a")
    rows.reconnect()
    assert rows.agent.ask(Keep("a")) == DONE
    assert rows.agent.ask(Delete("a")) == DONE
    assert listening(pod) == ZTUNNEL_PORTS
    assert rows.agent.ask(SnapshotSent()) == DONE
    wait_listening(pod, set())


def test_ready_follows_the_snapshot_and_the_connection(rows: Rows) -> None:
    pod = rows.pod()
    assert rows.agent.ask(add("a"), pod.fd) == DONE
    assert not rows.ztunnel.is_ready()
    assert rows.agent.ask(SnapshotSent()) == DONE
    wait_until("readiness", rows.ztunnel.is_ready)
    rows.reconnect()
    wait_until("no readiness", lambda: not rows.ztunnel.is_ready())
    assert listening(pod) == ZTUNNEL_PORTS


# --- pods that cannot be served ---------------------------------------------------------------------------------------


def test_what_is_no_netns_is_refused_and_only_that(rows: Rows) -> None:
    (pod,) = rows.live("a")
    with open("/dev/null") as file:
        error = rows.agent.ask(add("b"), file.fileno())
    assert error is not None
    assert "EINVAL" in error
    assert rows.agent.ask(add("a"), pod.fd) == DONE


def test_a_refusal_takes_readiness_with_the_next_ack_until_del(rows: Rows) -> None:
    (pod,) = rows.live("a")
    wait_until("readiness", rows.ztunnel.is_ready)
    with open("/dev/null") as file:
        assert rows.agent.ask(add("b"), file.fileno())
    assert rows.ztunnel.is_ready()
    assert rows.agent.ask(add("a"), pod.fd) == DONE
    wait_until("no readiness", lambda: not rows.ztunnel.is_ready())
    assert rows.ztunnel.workloads()["b"]["state"] == "Pending"
    assert rows.agent.ask(Delete("b")) == DONE
    wait_until("readiness", rows.ztunnel.is_ready)


def test_a_port_in_use_refuses_the_pod_and_heals_itself(rows: Rows) -> None:
    pod = rows.pod()
    thief = pod.call(lambda: socket.create_server(("0.0.0.0", 15006)))
    error = rows.agent.ask(add("a"), pod.fd)
    assert error is not None
    assert "AddrInUse" in error
    assert listening(pod) == {15006}
    thief.close()
    wait_listening(pod, ZTUNNEL_PORTS)
    assert rows.ztunnel.workloads()["a"]["state"] == "Up"


def test_lo_has_to_be_up(rows: Rows) -> None:
    pod = Netns()
    error = rows.agent.ask(add("a"), pod.fd)
    assert error is not None
    assert "AddrNotAvailable" in error
    assert listening(pod) == set()
    pod.close()


# --- endings ----------------------------------------------------------------------------------------------------------


def test_sigterm_ends_the_connection_and_the_listeners_in_order(rows: Rows) -> None:
    (pod,) = rows.live("a")
    rows.ztunnel.process.send_signal(signal.SIGTERM)
    assert rows.agent.answer() is None
    wait_listening(pod, set())
    assert rows.exit_status() == 0


def test_nothing_is_left_open(rows: Rows) -> None:
    rows.live()
    descriptors = f"/proc/{rows.ztunnel.process.pid}/fd"

    def round_of(pods: list[Netns]) -> int:
        for number, pod in enumerate(pods):
            assert rows.agent.ask(add(f"u{number}"), pod.fd) == DONE
        with open("/dev/null") as file:
            assert rows.agent.ask(add("bad"), file.fileno())
        for uid in ["bad", *(f"u{number}" for number in range(len(pods)))]:
            assert rows.agent.ask(Delete(uid)) == DONE
        for pod in pods:
            wait_listening(pod, set())
        return len(os.listdir(descriptors))

    pods = [rows.pod() for _ in range(10)]
    before = round_of(pods)
    wait_until("descriptors to be closed", lambda: round_of(pods) <= before)


# --- the stand-in alone -----------------------------------------------------------------------------------------------


def test_an_absent_agent_is_tried_with_growing_delays(tmp_path: Path) -> None:
    with Program(tmp_path, tmp_path / "none.sock") as program:
        wait_until("some tries", lambda: len(program.records("connect-failed")) >= 5)
        delays = [record["seconds"] for record in program.records("connect-failed")][:5]
        assert delays == [0.02, 0.04, 0.08, 0.16, 0.32]


def test_orders_and_records(tmp_path: Path) -> None:
    agent = AgentSide(tmp_path / "ztunnel.sock")
    with Program(tmp_path, agent.path) as program:
        assert agent.accept() == HELLO
        with open("/proc/self/ns/net") as netns:
            assert agent.ask(add("a"), netns.fileno()) == DONE
            inode = os.fstat(netns.fileno()).st_ino
        program.order(do="set", faults=["nack:uid/b=no", "nack:nth/3=@1500"])
        with open("/proc/self/ns/net") as netns:
            assert agent.ask(add("b"), netns.fileno()) == "no"
        assert agent.ask(Keep("c")) == "x" * 1500
        program.order(do="say", hex="0a00")
        assert agent.answer() == DONE
        state = program.wait("the table", lambda state: state["messages"] == 3)
        assert state["connected"]
        assert state["workloads"]["a"]["inode"] == inode
        assert program.records("add")[0]["inode"] == inode
        assert [record["error"] for record in program.records() if record["event"] in ("add", "keep")][:2] == ["", "no"]
        program.order(do="hang-up")
        assert agent.answer() is None
        assert agent.accept() == HELLO
        assert program.terminate() == 0
    agent.close()
