"""The double as a process of its own, and on a thread."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lab.apiserver import run_in_thread
from tests.kube.worlds import pod_object

ROOT = Path(__file__).parents[2]


@contextmanager
def program(*arguments: str) -> Iterator[dict[str, Any]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "lab.apiserver", "--control", "127.0.0.1:0", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
    finally:
        process.terminate()
        assert process.wait(10) == 0


def ask(url: str, token: str = "", body: Any = None) -> Any:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    if body is not None:
        request.data = json.dumps(body).encode()
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def status_of(url: str, token: str = "") -> int:
    try:
        ask(url, token)
    except urllib.error.HTTPError as error:
        return error.code
    return 200


def test_it_is_driven_over_its_control_address(tmp_path: Path) -> None:
    objects = {"items": [{"kind": "Pod", **pod_object("loaded")}]}
    (tmp_path / "objects.json").write_text(json.dumps(objects))
    account = tmp_path / "account"
    with program(
        "--token", "secret", "--load", str(tmp_path / "objects.json"), "--service-account-dir", str(account)
    ) as said:
        assert (account / "token").read_text() == "secret"
        pods = f"{said['url']}/api/v1/pods"
        assert status_of(pods) == 401
        ask(f"{said['control']}/add_pod", body={"obj": pod_object("added")})
        assert [pod["metadata"]["name"] for pod in ask(pods, "secret")["items"]] == ["added", "loaded"]

        ask(f"{said['control']}/fault", body={"kind": "status", "status": 503, "prefix": "/api/v1/pods"})
        assert [status_of(pods, "secret"), status_of(pods, "secret")] == [503, 200]

        asked = ask(f"{said['control']}/requests", body={})["result"]
        assert [entry["path"] for entry in asked] == ["/api/v1/pods"] * 4


@pytest.mark.parametrize(
    ("command", "body", "status"),
    [("unheard-of", {}, 404), ("fault", {"kind": "none"}, 400), ("delete_pod", {"namespace": "a", "name": "b"}, 400)],
)
def test_commands_that_cannot_be_done(command: str, body: Any, status: int) -> None:
    with program() as said:
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(f"{said['control']}/{command}", body=body)
        assert caught.value.code == status
        assert "error" in json.load(caught.value)


def test_on_a_thread_it_can_crash_and_come_back() -> None:
    with run_in_thread() as running:
        running.do(lambda server: server.add_pod(pod_object("a")))
        pods = f"{running.url}/api/v1/pods"
        assert len(ask(pods)["items"]) == 1
        running.crash()
        with pytest.raises(urllib.error.URLError):
            ask(pods)
        running.restart()
        assert len(ask(pods)["items"]) == 1
