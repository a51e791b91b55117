"""The run directory: sockets that vanish or change hands, the plugins' log."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.agent.scene import Scene, wait_until

from meshcni import istio
from meshcni.agent.rundir import SocketLostError, SocketPaths, rotate
from meshcni.host.sockets import listen_seqpacket, listen_stream


def test_a_path_that_is_gone_is_said_and_fatal(tmp_path: Path) -> None:
    path, paths = tmp_path / "agent.sock", SocketPaths()
    with listen_seqpacket(path):
        paths.add(path)
        assert paths.reasons() == ()
        paths.check()
        path.unlink()
        assert paths.reasons() == (f"{path} was removed: no plugin reaches this agent",)
        with pytest.raises(SocketLostError, match="was removed"):
            paths.check()


def test_a_path_that_another_process_took_is_said_and_left_to_it(tmp_path: Path) -> None:
    path, paths = tmp_path / "agent.sock", SocketPaths()
    with listen_seqpacket(path):
        paths.add(path)
        with listen_seqpacket(path):
            assert paths.reasons() == (f"another process serves {path}",)
            paths.check()


@pytest.mark.parametrize("listen", [listen_seqpacket, listen_stream])
def test_a_path_that_another_process_took_and_left_is_fatal(
    tmp_path: Path, listen: Callable[[Path], socket.socket]
) -> None:
    path, paths = tmp_path / "agent.sock", SocketPaths()
    with listen_seqpacket(path):
        paths.add(path)
        listen(path).close()
        with pytest.raises(SocketLostError, match="left behind"):
            paths.check()


def test_a_path_at_which_a_call_means_something_is_not_called(tmp_path: Path) -> None:
    path, paths = tmp_path / "ztunnel.sock", SocketPaths()
    with listen_seqpacket(path):
        paths.add(path, callable_by_us=False)
        listen_seqpacket(path).close()
        paths.check()
        path.unlink()
        with pytest.raises(SocketLostError, match="was removed"):
            paths.check()


def test_log_is_put_aside_once_it_is_long(tmp_path: Path) -> None:
    log, older = tmp_path / "istio-cni.log", tmp_path / "istio-cni.log.1"
    assert not rotate(log, 10)
    log.write_text("x" * 10)
    assert not rotate(log, 10)
    writer = os.open(log, os.O_WRONLY | os.O_APPEND)
    log.write_text("y" * 11)
    assert rotate(log, 10)
    os.write(writer, b"the end of a line")
    os.close(writer)
    assert (log.exists(), older.read_text()) == (False, "y" * 11 + "the end of a line")


def test_agent_whose_socket_another_one_took_is_not_ready(scene: Scene) -> None:
    agent = scene.start()
    agent.wait_ready()
    with listen_seqpacket(scene.run_dir / istio.AGENT_SOCKET_NAME):
        status, text = agent.get(istio.READY_PATH)
    assert status == 503
    assert f"another process serves {scene.run_dir / istio.AGENT_SOCKET_NAME}" in text


def test_agent_whose_socket_another_one_took_cleans_nothing_up(scene: Scene) -> None:
    agent = scene.start(DISABLE_SAFE_UPGRADE="true")
    agent.wait_ready()
    with listen_seqpacket(scene.run_dir / istio.AGENT_SOCKET_NAME):
        assert agent.stop() == 0
    assert "another agent serves this node" in agent.log
    assert istio.PLUGIN_NAME in scene.conf.read_text()
    assert not (scene.run_dir / istio.UNINSTALLED_MARKER_NAME).exists()


def test_agent_without_its_socket_ends_and_leaves_everything(scene: Scene) -> None:
    agent = scene.start()
    agent.wait_ready()
    (scene.run_dir / istio.AGENT_SOCKET_NAME).unlink()
    wait_until("its end", lambda: agent.process.poll() is not None)
    assert agent.process.returncode == 1
    assert "leaving everything in place" in agent.log
    assert istio.PLUGIN_NAME in scene.conf.read_text()
    scene.start().wait_ready()


def test_two_agents_on_one_node_do_not_undo_each_other(scene: Scene) -> None:
    """As in a rollout with maxSurge; each has a token of its own, which differs in the kubeconfig."""
    older = scene.start()
    older.wait_ready()
    account = scene.directory / "account-of-newer"
    account.mkdir()
    (account / "ca.crt").write_text("the double speaks plain HTTP\n")
    (account / "token").write_text("another-token")
    newer = scene.start(SERVICE_ACCOUNT_DIR=str(account), HEALTH_PORT="8001", MONITORING_PORT="15015")
    wait_until("the newer agent to be ready", lambda: newer.get(istio.READY_PATH, 8001)[0] == 200)
    kubeconfig = scene.run_dir / istio.KUBECONFIG_NAME
    wait_until("the older agent to see it", lambda: "a newer agent installs" in older.get(istio.READY_PATH)[1])
    kubeconfig.unlink()
    wait_until("the newer agent to repair", lambda: newer.log.count(f"wrote {kubeconfig}") == 2)
    assert "another-token" in kubeconfig.read_text()
    assert older.log.count(f"wrote {kubeconfig}") == 1
    assert older.stop() == 0
    assert newer.get(istio.READY_PATH, 8001)[0] == 200


def test_agent_takes_the_node_back_when_its_successor_is_gone(scene: Scene) -> None:
    """It ends, and the kubelet starts it anew: a rollout that fails must not leave the node without an agent."""
    older = scene.start()
    older.wait_ready()
    newer = scene.start(HEALTH_PORT="8001", MONITORING_PORT="15015")
    wait_until("the newer agent to be ready", lambda: newer.get(istio.READY_PATH, 8001)[0] == 200)
    assert older.process.poll() is None
    newer.kill()
    wait_until("its end", lambda: older.process.poll() is not None)
    assert older.process.returncode == 1
    assert "left behind by another agent" in older.log
    scene.start().wait_ready()


def test_nothing_is_written_after_the_signal(scene: Scene) -> None:
    agent = scene.start(SHUTDOWN_GRACE_SECONDS="2")
    agent.wait_ready()
    scene.api.do(lambda server: server.fault("hang", count=-1, prefix="/apis/apps/v1"))
    agent.process.terminate()
    wait_until("the signal's arrival", lambda: "Exit signal received" in agent.log)
    (scene.run_dir / istio.KUBECONFIG_NAME).unlink()
    wait_until("its end", lambda: agent.process.poll() is not None)
    assert "at shutdown: keep" in agent.log
    assert not (scene.run_dir / istio.KUBECONFIG_NAME).exists()
