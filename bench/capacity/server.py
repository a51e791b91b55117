"""A real API server with its etcd in a lab node's network, and what it says of its own cost."""

from __future__ import annotations

import json
import re
import secrets
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from lab import namespaces
from lab.apiserver.tls import Certificates, make_certificates
from lab.node import LabError, Node, last_lines, wait_until

from bench.runs import process_cpu_milliseconds

ROOT = Path(__file__).parent.parent.parent
HYPERKUBE = ROOT / "build" / "kubernetes" / "hyperkube"
MANIFEST = ROOT / "docs" / "manifests" / "istio-cni-node.yaml"  # whose role the agents get
PORT = 6443
AGENTS_ADDRESS, ADMIN_ADDRESS = "127.0.0.1", "127.0.0.2"  # what goes to the first is counted
ACCOUNT_NAMESPACE, ACCOUNT = "istio-system", "istio-cni"
CALLERS = 8  # threads that make objects
START_SECONDS, STOP_SECONDS, CALL_SECONDS = 180.0, 20.0, 60.0
TABLE = "capacity"
AUDIT_POLICY = f"""\
apiVersion: audit.k8s.io/v1
kind: Policy
rules:
  - level: Metadata
    userGroups: ["system:serviceaccounts:{ACCOUNT_NAMESPACE}"]
    omitStages: [RequestReceived]
  - level: None
"""


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a simulated agent as the API server's audit log has it; `at` is in seconds since the epoch."""

    agent: str
    verb: str
    resource: str
    code: int
    at: float
    began: float


@dataclass(frozen=True, slots=True)
class Reading:
    """Readings of one moment, in bytes. `bytes_out` went to agents, over TLS, headers included."""

    heap: int
    resident: int
    bytes_in: int
    bytes_out: int
    watches: int


@dataclass
class Limits:
    """How many requests the API server works on at once."""

    reading: int = 400
    writing: int = 200


class Server:
    """Context manager: etcd and the API server run inside the `with`."""

    def __init__(self, node: Node, hyperkube: Path = HYPERKUBE) -> None:
        self.node, self.hyperkube = node, hyperkube
        self.folder = node.folder / "capacity"
        self.token = secrets.token_hex(16)
        self._etcd: subprocess.Popen[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._audit_read = 0
        self._local = threading.local()
        self._callers = ThreadPoolExecutor(CALLERS, "capacity")
        self._tls: ssl.SSLContext | None = None

    def __enter__(self) -> Self:
        if not self.hyperkube.exists():
            raise LabError(f"no Kubernetes: {self.hyperkube} is not there (scripts/build-kubernetes makes it)")
        self.folder.mkdir()
        self.certificates = self._make_certificates()
        self._tls = ssl.create_default_context(cafile=str(self.certificates.ca_cert))
        subprocess.run(
            ["openssl", "genrsa", "-out", "sa.key", "2048"], cwd=self.folder, check=True, capture_output=True
        )
        (self.folder / "tokens.csv").write_text(f'{self.token},admin,1,"system:masters"\n')
        (self.folder / "audit.yaml").write_text(AUDIT_POLICY)
        self._count_bytes()
        self._start_etcd()
        self.start(Limits())
        self._grant()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._callers.shutdown(wait=True, cancel_futures=True)
        self.stop()
        if self._etcd is not None:
            self._etcd.kill()
            self._etcd.wait(STOP_SECONDS)

    def start(self, limits: Limits) -> None:
        """Start the API server and wait until it is ready."""
        self._process = self.node.spawn(self._command(limits), log="apiserver")
        try:
            wait_until("the API server is ready", self._is_ready, START_SECONDS, 0.1)
        except LabError as error:
            log = last_lines(self.node.log_path("apiserver").read_text(errors="replace"), 8)
            raise LabError(f"{error}; its log ends with\n{log}") from None

    def stop(self) -> None:
        """End the API server; etcd keeps what it knows."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_SECONDS)
            self._process = None

    # --- requests of ours ---------------------------------------------------------------------------------------------

    def call(self, method: str, path: str, body: Any = None, kind: str = "application/json") -> Any:  # noqa: ANN401
        """Make one call as administrator and return the answer's JSON, or its text; LabError when it is refused."""
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": kind, "Accept": "application/json"}
        content = None if body is None else json.dumps(body)
        for attempt in (1, 2):
            connection = self._connection()
            try:
                connection.request(method, path, content, headers)
                answer = connection.getresponse()
                data = answer.read()
            except (OSError, HTTPException):
                self._local.connection = None
                if attempt == 2:
                    raise
                continue
            break
        if answer.status >= 400:
            raise LabError(f"{method} {path}: {answer.status} {data[:300].decode(errors='replace')}")
        return json.loads(data) if data[:1] in b"{[" and data else data

    def make_all(self, objects: Iterable[tuple[str, Any]]) -> None:
        """POST every (path, object), some at once."""
        for _ in self._callers.map(lambda item: self.call("POST", item[0], item[1]), objects):
            pass

    def ask_once(self, path: str, token: str) -> None:
        """GET as an agent over a connection of its own."""
        with closing(self._connect(AGENTS_ADDRESS)) as connection:
            connection.request("GET", path, headers={"Authorization": f"Bearer {token}"})
            connection.getresponse().read()

    def tokens(self, count: int) -> list[str]:
        """Return tokens of the agents' account, each another."""
        path = f"/api/v1/namespaces/{ACCOUNT_NAMESPACE}/serviceaccounts/{ACCOUNT}/token"
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 86400}}
        return list(self._callers.map(lambda _: str(self.call("POST", path, body)["status"]["token"]), range(count)))

    # --- readings -----------------------------------------------------------------------------------------------------

    def read(self) -> Reading:
        """Read every meter; the heap after a collection of garbage, so that it is what is in use. That costs CPU."""
        assert self._process is not None
        self.call("GET", "/debug/pprof/heap?gc=1")
        metrics = self.call("GET", "/metrics").decode()
        counters = json.loads(self.node.run(["nft", "-j", "list", "counters", "table", "inet", TABLE]))["nftables"]
        counted = {one["counter"]["name"]: one["counter"]["bytes"] for one in counters if "counter" in one}
        return Reading(
            heap=int(sum(_samples(metrics, "go_memstats_heap_inuse_bytes|go_memstats_stack_inuse_bytes"))),
            resident=_status_kib(self._process.pid, "VmRSS") * 1024,
            bytes_in=counted["in"],
            bytes_out=counted["out"],
            watches=int(sum(_samples(metrics, r'apiserver_longrunning_requests\{[^}]*verb="WATCH"[^}]*\}'))),
        )

    @property
    def cpu(self) -> float:
        """CPU time of the API server so far, in ms."""
        assert self._process is not None
        return process_cpu_milliseconds(self._process.pid)

    @property
    def etcd_cpu(self) -> float:
        """The same of etcd."""
        assert self._etcd is not None
        return process_cpu_milliseconds(self._etcd.pid)

    def peak_resident(self) -> int:
        """Return the largest resident size of the API server since the last call, in bytes."""
        assert self._process is not None
        peak = _status_kib(self._process.pid, "VmHWM") * 1024
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")
        return peak

    def requests(self) -> list[Request]:
        """Return the agents' requests that were answered since the last call; a watch counts when it is opened."""
        with (self.folder / "audit.log").open("rb") as log:
            log.seek(self._audit_read)
            data = log.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._audit_read += len(whole)
        return [_request(event) for event in map(json.loads, whole.splitlines()) if _is_answer(event)]

    # --- setting up ---------------------------------------------------------------------------------------------------

    def _make_certificates(self) -> Certificates:
        names = tuple(f"IP:{address}" for address in (AGENTS_ADDRESS, ADMIN_ADDRESS))
        made = make_certificates(self.folder / "tls", names)
        if made is None:
            raise LabError("not installed: openssl, which makes the certificates of the API server")
        return made

    def _count_bytes(self) -> None:
        rules = f"""
            table inet {TABLE} {{
                counter in {{ }}
                counter out {{ }}
                chain counted {{
                    type filter hook output priority 0
                    ip daddr {AGENTS_ADDRESS} tcp dport {PORT} counter name in
                    ip saddr {AGENTS_ADDRESS} tcp sport {PORT} counter name out
                }}
            }}"""
        self.node.run(["nft", "-f", "-"], text=rules)

    def _start_etcd(self) -> None:
        client, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
        command = [self._program, "etcd", "--data-dir", str(self.folder / "etcd"), "--unsafe-no-fsync"]
        command += ["--listen-client-urls", client, "--advertise-client-urls", client, "--log-level", "error"]
        command += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        command += ["--initial-cluster", f"default={peer}", "--quota-backend-bytes", str(4 * 2**30)]
        self._etcd = self.node.spawn(command, log="etcd")

    @property
    def _program(self) -> str:
        return str(self.hyperkube.resolve())

    def _command(self, limits: Limits) -> list[str]:
        folder, tls = self.folder, self.certificates
        values = {
            "etcd-servers": "http://127.0.0.1:2379",
            "bind-address": "0.0.0.0",
            "secure-port": PORT,
            "advertise-address": "192.0.2.1",
            "endpoint-reconciler-type": "none",
            "cert-dir": folder / "certs",
            "tls-cert-file": tls.server_cert,
            "tls-private-key-file": tls.server_key,
            "token-auth-file": folder / "tokens.csv",
            "authorization-mode": "RBAC",
            "service-account-issuer": "https://kubernetes.default.svc",
            "service-account-key-file": folder / "sa.key",
            "service-account-signing-key-file": folder / "sa.key",
            "service-cluster-ip-range": "10.96.0.0/16",
            "disable-admission-plugins": "ServiceAccount",
            "audit-policy-file": folder / "audit.yaml",
            "audit-log-path": folder / "audit.log",
            "max-requests-inflight": limits.reading,
            "max-mutating-requests-inflight": limits.writing,
        }
        return [self._program, "kube-apiserver", *(f"--{name}={value}" for name, value in values.items())]

    def _grant(self) -> None:
        """Make account and role as documented."""
        paths = {
            "Namespace": "/api/v1/namespaces",
            "ServiceAccount": f"/api/v1/namespaces/{ACCOUNT_NAMESPACE}/serviceaccounts",
            "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles",
            "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
        }
        system = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": ACCOUNT_NAMESPACE}}
        documents = [one for one in yaml.safe_load_all(MANIFEST.read_text()) if one and one["kind"] in paths]
        for one in (system, *documents):
            self.call("POST", paths[one["kind"]], one)

    def _is_ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise LabError("the API server ended")
        try:
            return bool(self.call("GET", "/readyz") == b"ok")
        except (OSError, HTTPException, LabError):
            return False

    def _connection(self) -> HTTPSConnection:
        found: HTTPSConnection | None = getattr(self._local, "connection", None)
        if found is None:
            found = self._local.connection = self._connect(ADMIN_ADDRESS)
        return found

    def _connect(self, address: str) -> HTTPSConnection:
        assert self._tls is not None
        plain = namespaces.connect(self.node.netns, address, PORT)
        plain.settimeout(CALL_SECONDS)
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as http.client does with its own sockets
        made = HTTPSConnection(address, PORT)
        made.sock = self._tls.wrap_socket(plain, server_hostname=address)
        return made


def _samples(metrics: str, name: str) -> Iterator[float]:
    for match in re.finditer(rf"^(?:{name})(?:\{{\}})? (\S+)$", metrics, re.MULTILINE):
        yield float(match.group(1))


def _status_kib(pid: int, name: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found.group(1)) if found else 0


def _is_answer(event: Mapping[str, Any]) -> bool:
    """Whether an event of the audit log is the one of its request that counts: a watch that was opened also ends."""
    opened = event["verb"] == "watch" and event.get("responseStatus", {}).get("code") == 200
    return bool(event["stage"] == ("ResponseStarted" if opened else "ResponseComplete"))


def _request(event: Mapping[str, Any]) -> Request:
    target = event.get("objectRef", {})
    resource = "/".join(filter(None, (target.get("resource"), target.get("subresource"))))
    agent = str(event.get("userAgent", "")).split(" ")[0]
    return Request(
        agent,
        event["verb"],
        resource,
        int(event.get("responseStatus", {}).get("code", 0)),
        _seconds(event["stageTimestamp"]),
        _seconds(event["requestReceivedTimestamp"]),
    )


def _seconds(text: str) -> float:

    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
