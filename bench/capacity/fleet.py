"""The simulated agents' processes, and the life of pods that they hear of."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lab.node import LabError

from bench.capacity import objects
from bench.capacity.server import ACCOUNT_NAMESPACE, AGENTS_ADDRESS, PORT, ROOT, Server

PROGRAM = Path(__file__).parent / "agents.py"
ENVIRONMENT = {"KUBERNETES_SERVICE_HOST": AGENTS_ADDRESS, "KUBERNETES_SERVICE_PORT": str(PORT)}
PER_PROCESS = 50
STOP_SECONDS = 30.0
GRACE = {"gracePeriodSeconds": 30}
AT_ONCE = {"gracePeriodSeconds": 0}
MERGE_PATCH = "application/merge-patch+json"
LIVES = 6  # pods whose lives pass side by side


class Fleet:
    """Context manager: the processes of `count` agents run inside the `with`; nothing is connected before `start`."""

    def __init__(self, server: Server, count: int, *, ambient: bool) -> None:
        self.server, self.count, self.ambient = server, count, ambient
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        accounts = service_accounts(self.server, self.count)
        agents = [
            {"number": number, "node": objects.node_name(number), "serviceAccount": str(account)}
            for number, account in enumerate(accounts)
        ]
        for first in range(0, self.count, PER_PROCESS):
            config = {
                "environment": ENVIRONMENT,
                "namespace": ACCOUNT_NAMESPACE,
                "ambient": self.ambient,
                "agents": agents[first : first + PER_PROCESS],
            }
            path = self.server.folder / f"agents-{first}.json"
            path.write_text(json.dumps(config))
            self._processes.append(
                self.server.node.spawn(
                    [sys.executable, str(PROGRAM), str(path)],
                    environment={"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    log="fleet",
                )
            )
        self.report()  # answers when all is loaded
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start(self) -> list[float]:
        """Start all agents at the same moment; returns after how many seconds each was ready."""
        return [seconds for answer in self._ask({"do": "start"}) for seconds in answer]

    def report(self) -> Mapping[str, Any]:
        """Return what all informers counted."""
        total: Counter[str] = Counter()
        nested: dict[str, Counter[str]] = {"errors": Counter(), "counts": Counter()}
        for answer in self._ask({"do": "report"}):
            for name, value in answer.items():
                if name in nested:
                    nested[name] += Counter(value)
                else:
                    total[name] += value
        return {**total, **nested}

    def add(self, number: int, pod: Mapping[str, Any]) -> None:
        """Tell the agent of a node that the runtime starts a pod."""
        metadata = pod["metadata"]
        line = {
            "do": "add",
            "node": objects.node_name(number),
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
        }
        with self._lock:
            _tell(self._processes[number // PER_PROCESS], line)

    def _ask(self, command: Mapping[str, Any]) -> list[Any]:
        with self._lock:
            for process in self._processes:
                _tell(process, command)
        return [_answer(process) for process in self._processes]


def _tell(process: subprocess.Popen[bytes], command: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(command).encode() + b"\n")
    process.stdin.flush()


def _answer(process: subprocess.Popen[bytes]) -> Any:  # noqa: ANN401
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise LabError(f"simulated agents ended with status {process.wait(STOP_SECONDS)}")
    return json.loads(line)


def service_accounts(server: Server, count: int) -> Sequence[Path]:
    """Make service account folders as a kubelet mounts them, each with a token of its own."""
    folders = []
    authority = server.certificates.ca_cert.read_bytes()
    for number, token in enumerate(server.tokens(count)):
        folder = server.folder / "accounts" / str(number)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "token").write_text(token)
        (folder / "ca.crt").write_bytes(authority)
        (folder / "namespace").write_text(ACCOUNT_NAMESPACE)
        folders.append(folder)
    return folders


class Pods:
    """Makes pods in the API server, and lets some live and end as a scheduler and kubelets would."""

    def __init__(self, server: Server, namespaces: int) -> None:
        self.server = server
        self._namespaces = [objects.namespace(number)["metadata"]["name"] for number in range(namespaces)]
        self._made = 0

    def make_namespaces(self) -> None:
        """Make all namespaces."""
        found = (objects.namespace(number) for number in range(len(self._namespaces)))
        self.server.make_all(("/api/v1/namespaces", one) for one in found)

    def fill(self, node: str, count: int) -> None:
        """Put pods on a node, which no kubelet reports of."""
        for path, pod in self._new(node, count, ambient=False):
            self.server.call("POST", path, pod)

    def fill_all(self, nodes: int, count: int) -> None:
        """Put running pods on each of the first nodes, some nodes at once."""
        with ThreadPoolExecutor(LIVES) as pool:
            list(pool.map(lambda number: self.fill(objects.node_name(number), count), range(nodes)))

    def churn(
        self, fleet: Fleet | None, nodes: Sequence[str], lives: int, per_second: float, *, ambient: bool
    ) -> float:
        """Let pods live and end, `per_second` of them begun in a second; returns the seconds that it took."""
        begin = time.monotonic()
        with ThreadPoolExecutor(LIVES) as pool:
            pending = []
            for number in range(lives):
                time.sleep(max(0.0, begin + number / per_second - time.monotonic()))
                where = number % len(nodes)
                pending.append(pool.submit(self._live, fleet, where, nodes[where], ambient))
            for one in pending:
                one.result()
        return time.monotonic() - begin

    def _live(self, fleet: Fleet | None, number: int, node: str, ambient: bool) -> None:
        """Seven events: made and bound, three reports of the kubelet, deletion asked for, ended, gone."""
        ((path, pod),) = self._new(node, 1, ambient=ambient)
        made = self.server.call("POST", path, pod)
        if fleet is not None:
            fleet.add(number, made)
        for step in (0, 1, 2):
            self._report(made, step)
        own = f"{path}/{made['metadata']['name']}"
        self.server.call("DELETE", own, GRACE)
        self._report(made, 3)
        self.server.call("DELETE", own, AT_ONCE)

    def _new(self, node: str, count: int, *, ambient: bool) -> list[tuple[str, dict[str, Any]]]:
        found = []
        for _ in range(count):
            self._made += 1
            namespace = self._namespaces[self._made % len(self._namespaces)]
            name = f"{'ambient' if ambient else 'sidecar'}-{self._made:06d}-{node}"
            pod = objects.pod(namespace, name, node, ambient=ambient)
            found.append((f"/api/v1/namespaces/{namespace}/pods", pod))
        return found

    def _report(self, pod: Mapping[str, Any], step: int) -> None:
        metadata = pod["metadata"]
        path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/status"
        number = int(metadata["name"].split("-")[1])
        address = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
        self.server.call("PATCH", path, objects.status(step, address), MERGE_PATCH)
