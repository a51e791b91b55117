"""The agent and the variables that would lead it to the API server by other ways: HTTPS_PROXY, NO_PROXY, KUBECONFIG."""

from __future__ import annotations

import base64
import socket
import threading
from pathlib import Path

import pytest
from lab.apiserver.tls import make_certificates
from lab.namespaces import call_in_netns
from tests.agent.scene import Scene, wait_until

from meshcni import istio

API = {"KUBERNETES_SERVICE_HOST": "198.51.100.1", "KUBERNETES_SERVICE_PORT": "443", "KUBERNETES_SERVICE_PROTOCOL": ""}


@pytest.fixture
def account(scene: Scene) -> Path:
    """The scene's service account, with a CA that can be used."""
    folder = scene.directory / "account"
    made = make_certificates(scene.directory / "tls")
    if made is None:
        pytest.skip("HTTPS is not tested: this machine has no `openssl` (apt-get install openssl)")
    (folder / "ca.crt").write_bytes(made.ca_cert.read_bytes())
    return folder


def refuse_all(listening: socket.socket, heads: list[bytes]) -> None:
    """A proxy that allows nothing."""
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        with connection:
            heads.append(connection.recv(65536))
            connection.sendall(b"HTTP/1.1 403 Not from here\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.usefixtures("account")
def test_it_asks_the_proxy_and_says_what_that_answers_but_not_the_password(scene: Scene) -> None:
    heads: list[bytes] = []
    with call_in_netns(scene.netns, lambda: socket.create_server(("127.0.0.1", 0))) as listening:
        thread = threading.Thread(target=refuse_all, args=(listening, heads), daemon=True)
        thread.start()
        proxy = f"127.0.0.1:{listening.getsockname()[1]}"
        agent = scene.start(**API, HTTPS_PROXY=f"http://me:s3cret@{proxy}")
        wait_until(
            "the refusal", lambda: f"proxy {proxy} (HTTPS_PROXY) opens no tunnel to 198.51.100.1:443" in agent.log
        )
        wait_until("the conf entry", lambda: istio.PLUGIN_NAME in scene.conf.read_text())
        assert agent.stop() == 0
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
    login = base64.b64encode(b"me:s3cret")
    expected = b"CONNECT 198.51.100.1:443 HTTP/1.1\r\nHost: 198.51.100.1:443\r\nProxy-Authorization: Basic " + login
    assert set(heads) == {expected + b"\r\n\r\n"}
    assert "it answers 403 Not from here" in agent.log
    assert "s3cret" not in agent.log
    assert login.decode() not in agent.log


@pytest.mark.usefixtures("account")
def test_it_goes_past_a_proxy_from_which_the_api_server_is_exempt(scene: Scene) -> None:
    agent = scene.start(**API, https_proxy="http://127.0.0.1:1", no_proxy="a.example,198.51.100.0/24")
    wait_until("the failure", lambda: "198.51.100.1:443: " in agent.log)
    assert agent.stop() == 0
    assert "127.0.0.1:1 " not in agent.log


@pytest.mark.usefixtures("account")
def test_a_proxy_that_cannot_be_used_is_told(scene: Scene) -> None:
    agent = scene.start(**API, HTTPS_PROXY="socks5://me:s3cret@127.0.0.1:1080")
    wait_until("the complaint", lambda: "proxies of socks5:// are not supported" in agent.log)
    assert "HTTPS_PROXY is '***@127.0.0.1:1080'" in agent.log
    assert agent.stop() == 0
    assert "s3cret" not in agent.log


def test_there_is_no_flag_for_a_kubeconfig(scene: Scene) -> None:
    ended = scene.run("--kubeconfig", "/etc/kubernetes/admin.conf")
    assert (ended.returncode, ended.stderr.splitlines()[0]) == (2, "error: unknown flag: --kubeconfig")
    assert not scene.run_dir.exists()
