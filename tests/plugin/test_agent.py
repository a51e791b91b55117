"""The plugin and an agent that is there, late, gone, dying, lying or slow."""

# ruff: noqa: RUF005
from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path
from socket import socket

import pytest
from tests.plugin.harness import RESULT, AgentDouble, conf, identity, outcome, run, say, start, variables

from meshcni.protocols.podadd import accepted, encode_reply, refused

KILL_ROUNDS = 120


def test_the_agent_gets_the_pod_and_its_netns(agent: AgentDouble, netns: str) -> None:
    done = run(variables(netns=netns), conf(agent.run_dir))
    assert (done.status, done.json) == (0, RESULT)
    assert done.stderr == b""
    (received,) = agent.received
    assert received.files == [identity(netns)]
    assert received.uid == 0
    request = received.request
    assert (request.pod_namespace, request.pod_name, request.pod_uid) == ("shop", "web", "uid-1")
    assert (request.netns, request.ips) == (netns, ("10.0.0.2/24",))


def test_a_refusal_is_printed(agent: AgentDouble, netns: str) -> None:
    agent.answers.append(say(encode_reply(refused(7, "bad annotation", "correct it"))))
    done = run(variables(netns=netns), conf(agent.run_dir))
    assert done.status == 1
    assert done.json == {"cniVersion": "1.0.0", "code": 7, "msg": "bad annotation", "details": "correct it"}


@pytest.mark.parametrize("wait", [0, 0.3, 1])
def test_no_agent_is_code_11_and_says_what_to_do(run_dir: Path, netns: str, wait: float) -> None:
    done = run(variables(netns=netns), conf(run_dir, agent_wait_seconds=wait))
    assert done.status == 1
    assert done.json["code"] == 11
    assert f"within {wait:g} s" in done.json["msg"]
    for words in ("istio-cni-node", "install-cni uninstall", "remove the entry"):
        assert words in done.json["details"]


def test_a_socket_that_nobody_serves(run_dir: Path, netns: str) -> None:
    with AgentDouble(run_dir) as agent:
        (run_dir / "kept").hardlink_to(agent.path)
    (run_dir / "kept").rename(run_dir / "agent.sock")
    done = run(variables(netns=netns), conf(run_dir, agent_wait_seconds=0.2))
    assert done.json["code"] == 11
    assert "Connection refused" in done.json["msg"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_something_else_in_place_of_the_socket(run_dir: Path, netns: str, kind: str) -> None:
    path = run_dir / "agent.sock"
    if kind == "file":
        path.touch()
    else:
        path.mkdir()
    assert run(variables(netns=netns), conf(run_dir, agent_wait_seconds=0.2)).json["code"] == 11


def test_an_agent_that_comes_late(run_dir: Path, netns: str) -> None:
    process = start(variables(netns=netns), conf(run_dir, agent_wait_seconds=30))
    time.sleep(0.5)
    assert process.poll() is None
    with AgentDouble(run_dir) as agent:
        done = outcome(process)
    assert (done.status, done.json) == (0, RESULT)
    assert len(agent.received) == 1


def test_an_agent_that_dies_in_the_middle_is_asked_again(agent: AgentDouble, netns: str) -> None:
    agent.answers += [say(b""), say(b"")]  # closes without a reply
    done = run(variables(netns=netns), conf(agent.run_dir))
    assert (done.status, done.json) == (0, RESULT)
    assert [received.files for received in agent.received] == [[identity(netns)]] * 3


def test_an_agent_that_always_dies(run_dir: Path, netns: str) -> None:
    with AgentDouble(run_dir, answers=[say(b"")] * 10_000) as agent:
        done = run(variables(netns=netns), conf(run_dir, agent_wait_seconds=0.5))
    assert done.status == 1
    assert done.json["code"] == 11
    assert "without a reply" in done.json["msg"]
    assert len(agent.received) > 1


def test_an_agent_that_never_replies(agent: AgentDouble, netns: str) -> None:
    over = threading.Event()

    def hang(connection: socket) -> None:
        over.wait(60)

    agent.answers.append(hang)
    done = run(variables(netns=netns), conf(agent.run_dir, agent_wait_seconds=0))
    over.set()
    assert done.status == 1
    assert done.json["code"] == 11
    assert "sent no reply within" in done.json["msg"]


@pytest.mark.parametrize(
    "reply",
    [
        b"\0",
        b"{",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b'{"version":2,"ok":true,"verdict":"sidecar"}',
        b'{"version":1,"ok":true,"verdict":"unheard-of"}',
        encode_reply(accepted("sidecar", "r")) + b" " * 70_000,
        b"x" * 100_000,
    ],
)
def test_garbage_never_lets_a_pod_start(agent: AgentDouble, netns: str, reply: bytes) -> None:
    agent.answers.append(say(reply))
    done = run(variables(netns=netns), conf(agent.run_dir))
    assert done.status == 1
    assert done.json["code"] == 5
    assert len(agent.received) == 1


def test_an_uninstalled_agent_lets_pods_start(run_dir: Path, netns: str) -> None:
    (run_dir / "uninstalled").touch()
    done = run(variables(netns=netns), conf(run_dir, agent_wait_seconds=60))
    assert (done.status, done.json) == (0, RESULT)
    assert b"uninstalled" in done.stderr


def test_an_agent_that_answers_counts_more_than_the_marker(agent: AgentDouble, netns: str) -> None:
    (agent.run_dir / "uninstalled").touch()
    agent.answers.append(say(encode_reply(refused(11, "no"))))
    assert run(variables(netns=netns), conf(agent.run_dir)).status == 1


def test_fifty_at_once_through_a_small_backlog(run_dir: Path, netns: str) -> None:
    with AgentDouble(run_dir, backlog=2) as agent:
        processes = [start(variables(netns=netns), conf(run_dir, agent_wait_seconds=30)) for _ in range(50)]
        results = [outcome(process) for process in processes]
    assert {(done.status, done.stdout) for done in results} == {(0, results[0].stdout)}
    assert len(agent.received) == 50


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gone", "/run/netns/mc-none"),
        ("file", "/etc/hostname"),
        ("directory", "/run"),
        ("other kind", "/proc/self/ns/uts"),
    ]
    + [("own", "/proc/self/ns/net"), ("device", "/dev/zero"), ("not UTF-8", "\udc80")],
)
def test_what_is_no_pod_netns_is_refused(agent: AgentDouble, name: str, path: str) -> None:
    done = run(variables(netns=path), conf(agent.run_dir))
    assert done.status == 1
    assert done.json["code"] == 4
    assert agent.received == []


def test_a_fifo_as_netns_does_not_block(agent: AgentDouble, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert run(variables(netns=str(tmp_path / "fifo")), conf(agent.run_dir)).json["code"] == 4


def test_kill_at_random_points_leaves_nothing_and_harms_nobody(run_dir: Path, netns: str) -> None:
    chance = random.Random(3)
    stdin = conf(run_dir, plugin_log_level="none")

    def answer_slowly(connection: socket) -> None:
        time.sleep(chance.random() * 0.004)
        say(encode_reply(accepted("sidecar", "r")))(connection)

    killed = 0
    with AgentDouble(run_dir, answers=[answer_slowly] * KILL_ROUNDS * 2) as agent:
        for _ in range(KILL_ROUNDS):
            process = start(variables(netns=netns), stdin)
            time.sleep(chance.random() * 0.012)
            process.kill()
            done = outcome(process)
            killed += done.status == -9
            if done.status == 0:
                assert done.json == RESULT
            else:
                assert done.stdout == b"" or done.json == RESULT
        after = run(variables(netns=netns), stdin)
    assert killed > KILL_ROUNDS // 10
    assert (after.status, after.json) == (0, RESULT)
    assert [received for received in agent.received if received.files != [identity(netns)]] == []
    assert list(run_dir.iterdir()) == []
