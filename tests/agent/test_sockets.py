"""log.sock and pluginevent.sock, as the original's plugin uses them."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.agent.scene import Agent, Scene, answer_to_nobody, wait_until

from meshcni import istio


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("unix", timeout=10)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(str(self.path))


def send(path: Path, target: str, body: bytes, method: str = "POST") -> tuple[int, str]:
    connection = UnixConnection(path)
    connection.request(method, target, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


@pytest.fixture
def agent(scene: Scene) -> Iterator[Agent]:
    started = scene.start(KUBERNETES_SERVICE_HOST="")
    wait_until("its sockets", lambda: started.get(istio.LIVE_PATH)[0] == 200)
    return started


def line(**fields: object) -> str:
    return json.dumps({"level": "info", "time": "2024-01-02T03:04:05Z", "msg": "hello"} | fields) + "\n"


# --- log.sock ---------------------------------------------------------------------------------------------------------


def test_plugin_lines_are_printed(scene: Scene, agent: Agent) -> None:
    body = json.dumps([line(pod="shop/cart"), line(msg="evil\nline", level="error")]).encode()
    assert send(scene.run_dir / istio.LOG_SOCKET_NAME, istio.LOG_PATH, body) == (200, "")
    assert "2024-01-02T03:04:05.000000Z\tinfo\tcni-plugin\thello\tpod=shop/cart\n" in agent.log
    assert "\terror\tcni-plugin\tevil\\nline\n" in agent.log
    assert agent.metrics()['istio_cni_plugin_log_lines_total{result="printed"}'] == 2


@pytest.mark.parametrize("body", [b"", b"nonsense", b"{}", b"[]", b'["x"]'])
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_bad_log_bodies_are_answered_all_the_same(scene: Scene, agent: Agent, body: bytes, method: str) -> None:
    assert send(scene.run_dir / istio.LOG_SOCKET_NAME, istio.LOG_PATH, body, method) == (200, "")


def test_log_body_has_a_limit(scene: Scene, agent: Agent) -> None:
    status, _ = send(scene.run_dir / istio.LOG_SOCKET_NAME, istio.LOG_PATH, b"[" + b" " * (1 << 20) + b"]")
    assert status == 413
    assert agent.metrics()['istio_cni_requests_refused_total{cause="oversized",socket="log"}'] == 1


def test_flood_of_lines_is_limited(scene: Scene, agent: Agent) -> None:
    body = json.dumps([line()] * 3000).encode()
    send(scene.run_dir / istio.LOG_SOCKET_NAME, istio.LOG_PATH, body)
    metrics = agent.metrics()
    # about 1,000; the slower the machine, the more the allowance grows meanwhile
    assert metrics['istio_cni_plugin_log_lines_total{result="limited"}'] >= 100
    assert agent.log.count("some are dropped") == 1


def test_connection_is_kept_for_the_next_batch(scene: Scene, agent: Agent) -> None:
    connection = UnixConnection(scene.run_dir / istio.LOG_SOCKET_NAME)
    for _ in range(3):
        connection.request("POST", istio.LOG_PATH, b"[]")
        assert connection.getresponse().read() == b""
    connection.close()


# --- pluginevent.sock -------------------------------------------------------------------------------------------------

NOT_AMBIENT = "pod shop/cart: ambient is not enabled on this node (set AMBIENT_ENABLED on the agent)\n"
EVENT = {"Netns": "/var/run/netns/x", "PodName": "cart", "PodNamespace": "shop", "IPs": None}


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_event_without_ambient_is_an_error(scene: Scene, agent: Agent, method: str) -> None:
    path = scene.run_dir / istio.EVENT_SOCKET_NAME
    status, text = send(path, istio.EVENT_PATH, json.dumps(EVENT).encode(), method)
    assert (status, text) == (500, NOT_AMBIENT)
    assert agent.metrics()['istio_cni_plugin_requests_total{response_code="500"}'] == 1


@pytest.mark.parametrize("body", [b"", b"{", b'{"PodName": 1}'])
def test_event_that_cannot_be_read(scene: Scene, agent: Agent, body: bytes) -> None:
    status, text = send(scene.run_dir / istio.EVENT_SOCKET_NAME, istio.EVENT_PATH, body)
    assert status == 400
    assert text.endswith("\n")
    assert agent.metrics()['istio_cni_plugin_requests_total{response_code="400"}'] == 1


# --- both -------------------------------------------------------------------------------------------------------------

NAMES = [istio.LOG_SOCKET_NAME, istio.EVENT_SOCKET_NAME, "control.sock"]


@pytest.mark.parametrize("name", NAMES)
def test_unknown_path(scene: Scene, agent: Agent, name: str) -> None:
    assert send(scene.run_dir / name, "/nothing", b"")[0] == 404


@pytest.mark.parametrize("name", NAMES)
def test_garbage_is_answered_and_closed(scene: Scene, agent: Agent, name: str) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(scene.run_dir / name))
        connection.sendall(b"\x00\x01 garbage\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("name", NAMES)
def test_peer_that_is_not_root_is_refused(scene: Scene, agent: Agent, name: str) -> None:
    scene.open_to_everybody()
    request = b"POST /log HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n[]"
    assert answer_to_nobody(scene.run_dir / name, socket.SOCK_STREAM, request) == b""
    label = {"log.sock": "log", "pluginevent.sock": "event", "control.sock": "control"}[name]
    assert agent.metrics()[f'istio_cni_requests_refused_total{{cause="peer",socket="{label}"}}'] == 1


def test_sockets_survive_a_restart(scene: Scene, agent: Agent) -> None:
    agent.process.kill()
    agent.process.wait()
    again = scene.start(KUBERNETES_SERVICE_HOST="")
    wait_until("its sockets", lambda: again.get(istio.LIVE_PATH)[0] == 200)
    assert send(scene.run_dir / istio.LOG_SOCKET_NAME, istio.LOG_PATH, b"[]") == (200, "")
