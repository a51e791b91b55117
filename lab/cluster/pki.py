"""The cluster's keys: one CA, the API server's certificates, the service accounts' key, and a token for each client."""

from __future__ import annotations

import datetime
import ipaddress
import json
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from lab.cluster.addresses import API_PORT, API_SERVER, API_SERVER_V6, FIRST_SERVICE

DAYS = 30
EARLIER = datetime.timedelta(hours=1)  # valid from before now, should a clock be set back
API_NAMES = ("kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost")
API_ADDRESSES = ("127.0.0.1", "::1", API_SERVER, API_SERVER_V6, FIRST_SERVICE)
AUTHENTICATED = "system:authenticated"


class Pki:
    """All of it, in `folder`: ca.crt, apiserver.{crt,key}, kubelet-client.{crt,key}, sa.{key,pub}, tokens.csv."""

    def __init__(self, folder: Path, nodes: Sequence[str]) -> None:
        self.folder = folder
        self.tokens: dict[str, str] = {}
        folder.mkdir(mode=0o700, exist_ok=True)
        self._ca_key = ec.generate_private_key(ec.SECP256R1())
        self._ca_name = named("meshcni-lab-ca")
        self._make_ca()
        self._issue("apiserver", named("kube-apiserver"), ExtendedKeyUsageOID.SERVER_AUTH, alternative_names())
        client = named("apiserver-kubelet-client", "system:masters")
        self._issue("kubelet-client", client, ExtendedKeyUsageOID.CLIENT_AUTH)
        accounts = ec.generate_private_key(ec.SECP256R1())
        self.write("sa.key", private_pem(accounts))
        self.write("sa.pub", public_pem(accounts))
        self._users(nodes)

    @property
    def ca(self) -> Path:
        """The CA's certificate."""
        return self.folder / "ca.crt"

    def kubeconfig(self, user: str) -> Path:
        """Return the kubeconfig of a user: admin, kcm, scheduler, proxy or kubelet-NODE."""
        return self.folder / f"{user}.kubeconfig"

    def write(self, name: str, data: bytes) -> None:
        """Write a file that only root may read."""
        path = self.folder / name
        path.touch(mode=0o600)
        path.write_bytes(data)

    def _users(self, nodes: Sequence[str]) -> None:
        users = {
            "admin": ("admin", "system:masters"),
            "kcm": ("system:kube-controller-manager", AUTHENTICATED),
            "scheduler": ("system:kube-scheduler", AUTHENTICATED),
            "proxy": ("system:kube-proxy", AUTHENTICATED),
            **{f"kubelet-{node}": (f"system:node:{node}", "system:nodes") for node in nodes},
        }
        lines = []
        for user, (name, group) in users.items():
            token = self.tokens[user] = secrets.token_hex(16)
            lines.append(f'{token},{name},{user},"{group}"\n')
            self.write(f"{user}.kubeconfig", kubeconfig(self.ca, token).encode())
        self.write("tokens.csv", "".join(lines).encode())

    def _make_ca(self) -> None:
        usage = key_usage(certificates=True)
        key = x509.SubjectKeyIdentifier.from_public_key(self._ca_key.public_key())
        builder = dated(self._ca_name, self._ca_name).public_key(self._ca_key.public_key())
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        builder = builder.add_extension(usage, critical=True).add_extension(key, critical=False)
        self.write("ca.crt", builder.sign(self._ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))

    def _issue(
        self,
        name: str,
        subject: x509.Name,
        use: x509.ObjectIdentifier,
        names: x509.SubjectAlternativeName | None = None,
    ) -> None:
        """Make NAME.key and NAME.crt; the extensions are those that Python 3.13's strict verification asks for."""
        key = ec.generate_private_key(ec.SECP256R1())
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._ca_key.public_key())
        builder = dated(subject, self._ca_name).public_key(key.public_key())
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(key_usage(certificates=False), critical=True)
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
        builder = builder.add_extension(authority, critical=False)
        if names is not None:
            builder = builder.add_extension(names, critical=False)
        made = builder.sign(self._ca_key, hashes.SHA256())
        self.write(f"{name}.key", private_pem(key))
        self.write(f"{name}.crt", made.public_bytes(serialization.Encoding.PEM))


def named(common: str, organization: str = "") -> x509.Name:
    """Return a subject; Kubernetes reads a group from the organization."""
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, common)]
    if organization:
        parts.insert(0, x509.NameAttribute(NameOID.ORGANIZATION_NAME, organization))
    return x509.Name(parts)


def alternative_names() -> x509.SubjectAlternativeName:
    """Return the names and addresses by which clients reach the API server."""
    addresses = [x509.IPAddress(ipaddress.ip_address(address)) for address in API_ADDRESSES]
    return x509.SubjectAlternativeName([*(x509.DNSName(name) for name in API_NAMES), *addresses])


def dated(subject: x509.Name, issuer: x509.Name) -> x509.CertificateBuilder:
    """Begin a certificate that is valid from now on."""
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer)
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - EARLIER)
    return builder.not_valid_after(now + datetime.timedelta(days=DAYS))


def key_usage(*, certificates: bool) -> x509.KeyUsage:
    """Return the usage of a CA's key, or of one that signs handshakes."""
    return x509.KeyUsage(
        digital_signature=not certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certificates,
        crl_sign=certificates,
        encipher_only=False,
        decipher_only=False,
    )


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key in PEM, not encrypted."""
    kind = serialization.PrivateFormat.TraditionalOpenSSL
    return key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption())


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return the public half of a key in PEM."""
    kind = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, kind)


def kubeconfig(ca: Path, token: str) -> str:
    """Return a kubeconfig, as JSON, which is YAML too."""
    cluster = {"server": f"https://{API_SERVER}:{API_PORT}", "certificate-authority": str(ca)}
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": cluster}],
            "users": [{"name": "lab", "user": {"token": token}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
            "current-context": "lab",
        },
        indent=1,
    )
