"""The run directory: sockets that vanish or change hands, the plugins' log."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.agent.scene import Scene, wait_until

from meshcni import istio
from meshcni.agent.rundir import SocketLostError, SocketPaths, rotate
from meshcni.host.sockets import listen_seqpacket


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


def test_agent_without_its_socket_ends_and_leaves_everything(scene: Scene) -> None:
    agent = scene.start()
    agent.wait_ready()
    (scene.run_dir / istio.AGENT_SOCKET_NAME).unlink()
    wait_until("its end", lambda: agent.process.poll() is not None)
    assert agent.process.returncode == 1
    assert "leaving everything in place" in agent.log
    assert istio.PLUGIN_NAME in scene.conf.read_text()
    scene.start().wait_ready()
