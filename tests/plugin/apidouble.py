"""An API server as the plugin meets it: certificates made to measure, TLS, and any answer, good or bad."""

from __future__ import annotations

import json
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from meshcni.cni.kubeconfig import kubeconfig, server_url
from meshcni.istio import KUBECONFIG_NAME

TOKEN = "token-of-the-agent"
LOOPBACK_NAMES = ("127.0.0.1", "::1", "api.example.test")
DAY = timedelta(days=1)


class Authority:
    """A CA, itself signed by `parent` or by nobody else."""

    def __init__(self, name: str = "ca", parent: Authority | None = None) -> None:
        self.parent = parent
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self.issue(name, self.key.public_key(), is_authority=True)

    def issue(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        names: tuple[str, ...] = (),
        *,
        is_authority: bool = False,
        begin: timedelta = -DAY,
        end: timedelta = DAY,
        usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.SERVER_AUTH,
    ) -> x509.Certificate:
        """A certificate that this authority signs, valid from `begin` to `end` from now on."""
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        by, by_key = (
            (self.parent.certificate.subject, self.parent.key) if is_authority and self.parent else (None, None)
        )
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(by or (subject if is_authority else self.certificate.subject))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + begin)
            .not_valid_after(now + end)
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        )
        if not is_authority:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(list(map(general_name, names))), critical=False)
        return builder.sign(by_key or self.key, hashes.SHA256())

    @property
    def pem(self) -> bytes:
        """Its certificate."""
        return pem(self.certificate)

    def server(
        self,
        names: tuple[str, ...] = LOOPBACK_NAMES,
        *,
        version: ssl.TLSVersion | None = None,
        chain: bytes = b"",
        common_name: str = "server",
        **how: Any,
    ) -> ssl.SSLContext:
        """What a server with a certificate for `names` needs; `version` of TLS is the only one it speaks."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self.issue(common_name, key.public_key(), names, **how)
        key_text = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if version is not None:
            context.minimum_version = context.maximum_version = version
        with tempfile.NamedTemporaryFile() as file:
            file.write(pem(certificate) + chain + key_text)
            file.flush()
            context.load_cert_chain(file.name)
        return context


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


@dataclass(frozen=True)
class Asked:
    """One request, as far as it matters."""

    path: str
    token: str
    fields: Mapping[str, str]


Handler = Callable[[socket.socket, str], None]  # a connection and the path that was asked for


def http(status: int, body: bytes, *fields: str, version: str = "HTTP/1.1") -> bytes:
    """A response; without fields it says how long the body is."""
    head = [
        f"{version} {status} Whatever",
        "Content-Type: application/json",
        *(fields or [f"Content-Length: {len(body)}"]),
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def status(code: int, message: str = "no") -> bytes:
    """What an API server answers when it refuses."""
    return http(code, json.dumps({"kind": "Status", "status": "Failure", "message": message, "code": code}).encode())


def says(data: bytes) -> Handler:
    """A server that answers everything with these bytes."""
    return lambda connection, _: connection.sendall(data)


def in_turn(*handlers: Handler) -> Handler:
    """A server that answers each request with the next, and then always with the last."""
    left = list(handlers)
    return lambda connection, path: (left.pop(0) if len(left) > 1 else left[0])(connection, path)


def objects(*all_objects: Mapping[str, Any]) -> Handler:
    """A server that knows these pods and namespaces, and answers 404 for others."""
    known = {path_of(one): one for one in all_objects}

    def answer(connection: socket.socket, path: str) -> None:
        found = known.get(path)
        connection.sendall(status(404, "not found") if found is None else http(200, json.dumps(found).encode()))

    return answer


def path_of(one: Mapping[str, Any]) -> str:
    metadata = one["metadata"]
    if one["kind"] == "Namespace":
        return f"/api/v1/namespaces/{metadata['name']}"
    return f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}"


def pod(name: str = "web", *, uid: str = "uid-1", is_meshed: bool = False, **metadata: Any) -> dict[str, Any]:
    """A pod of namespace `shop`; a meshed one has an injected sidecar."""
    containers: list[dict[str, Any]] = [{"name": "app", "image": "app"}]
    annotations = {}
    if is_meshed:
        containers.append({"name": "istio-proxy", "args": ["proxy", "sidecar"]})
        annotations["sidecar.istio.io/status"] = "{}"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": "shop", "name": name, "uid": uid, "annotations": annotations, **metadata},
        "spec": {"containers": containers},
    }


def namespace(name: str = "shop", **labels: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


@dataclass
class ApiDouble:
    """Listens on a loopback address with TLS (without: a plain listener) and keeps every request. Context manager."""

    tls: ssl.SSLContext | None
    handler: Handler = field(default_factory=objects)
    host: str = "127.0.0.1"
    asked: list[Asked] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    connections: int = 0

    def __enter__(self) -> Self:
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        self.over = threading.Event()
        self.listener = socket.create_server((self.host, 0), family=family, backlog=128)
        self.port: int = self.listener.getsockname()[1]
        self.threads = [threading.Thread(target=self.accept)]
        self.threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join()
        self.listener.close()

    def write_kubeconfig(self, run_dir: Path, ca: bytes | None, token: str = TOKEN + "\n", host: str = "") -> None:
        """As the agent would that has this API server."""
        text = kubeconfig(server_url("https", host or self.host, str(self.port)), token, ca)
        (run_dir / KUBECONFIG_NAME).write_text(text)

    def accept(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.connections += 1
            thread = threading.Thread(target=self.serve, args=(connection,))
            self.threads.append(thread)
            thread.start()

    def serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.settimeout(60)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as servers in Go
            if self.tls is None:
                self.handler(connection, "")
                return
            try:
                secured = self.tls.wrap_socket(connection, server_side=True)
            except OSError as error:
                self.failures.append(str(error))
                return
            with secured:
                self.answer(secured)
                with suppress(OSError):
                    secured.unwrap()

    def answer(self, connection: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            part = connection.recv(65536)
            if not part:
                return
            data += part
        first, *lines = data.decode().split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
        path = first.split()[1]
        self.asked.append(Asked(path, fields.get("authorization", "").removeprefix("Bearer "), fields))
        self.handler(connection, path)

    def hang(self, connection: socket.socket, _: str) -> None:
        """Answers nothing until the test is over."""
        self.over.wait(60)
