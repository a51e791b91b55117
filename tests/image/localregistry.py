"""A real registry on the loopback of a network namespace of its own, with passwords."""

from __future__ import annotations

import base64
import ctypes
import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab.namespaces import call_in_netns, connect

from image import tools

PORT = 5055
HOST = f"127.0.0.1:{PORT}"
USER, PASSWORD = "mesh", "correct horse"
READY_S = 20.0


@dataclass(frozen=True)
class LocalRegistry:
    """A registry that runs. `credentials` are a pull secret's `.dockerconfigjson`; `wrong` have another password."""

    netns: str
    credentials: Path
    wrong: Path
    storage: Path

    def tags(self, repository: str) -> set[str]:
        """Ask the registry itself for a repository's tags."""
        found = json.loads(self.get(f"/v2/{repository}/tags/list"))["tags"]
        return set(found)

    def get(self, path: str, accept: str = "*/*") -> bytes:
        """Get something over HTTP, without any tool."""
        login = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        headers = {"Authorization": f"Basic {login}", "Accept": accept}
        request = urllib.request.Request(f"http://{HOST}{path}", headers=headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

        def work() -> bytes:
            with opener.open(request, timeout=20) as answer:
                data = answer.read()
                assert isinstance(data, bytes)
                return data

        return call_in_netns(self.netns, work)


def bcrypt(password: str) -> str:
    """Hash a password as htpasswd -B does, by the C library's own crypt."""
    library = ctypes.CDLL("libcrypt.so.1")
    library.crypt.restype = ctypes.c_char_p
    hashed = library.crypt(password.encode(), b"$2b$05$abcdefghijklmnopqrstuu")
    assert isinstance(hashed, bytes)
    assert hashed.startswith(b"$2b$05$")
    return hashed.decode()


def docker_config(path: Path, password: str) -> Path:
    """Write credentials in the form that a Kubernetes pull secret has."""
    auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {HOST: {"auth": auth}}}))
    return path


@contextmanager
def running(folder: Path) -> Iterator[LocalRegistry]:
    """Run a registry with its files in `folder`."""
    folder.mkdir()
    (folder / "htpasswd").write_text(f"{USER}:{bcrypt(PASSWORD)}\n")
    configuration = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "storage")}},
        "auth": {"htpasswd": {"realm": "meshcni", "path": str(folder / "htpasswd")}},
        "http": {"addr": HOST},
    }
    (folder / "registry.yml").write_text(json.dumps(configuration))  # JSON is YAML
    serve = [str(tools.find("docker-registry")), "serve", str(folder / "registry.yml")]
    script = 'ip link set lo up && exec "$@"'
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(["unshare", "--net", "sh", "-ec", script, "sh", *serve], stdout=log, stderr=log)
    try:
        netns = f"/proc/{process.pid}/ns/net"
        _wait_ready(process, netns, folder / "log")
        right, wrong = docker_config(folder / "right.json", PASSWORD), docker_config(folder / "wrong.json", "wrong")
        yield LocalRegistry(netns, right, wrong, folder / "storage")
    finally:
        process.terminate()
        process.wait()


def _wait_ready(process: subprocess.Popen[bytes], netns: str, log: Path) -> None:
    end = time.monotonic() + READY_S
    while True:
        assert process.poll() is None, log.read_text()
        try:
            if Path(netns).readlink() != Path("/proc/self/ns/net").readlink():
                connect(netns, "127.0.0.1", PORT).close()
                return
        except OSError:
            assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)
