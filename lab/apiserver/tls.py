"""A CA and a server certificate for the double, made by the `openssl` program."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

DAYS = "3650"


@dataclass(frozen=True)
class Certificates:
    """Files in PEM."""

    ca_cert: Path
    server_cert: Path
    server_key: Path


def make_certificates(
    directory: Path, names: tuple[str, ...] = ("IP:127.0.0.1", "DNS:localhost")
) -> Certificates | None:
    """Make them in `directory`; None when this machine has no `openssl`, so that callers can say so and use HTTP.

    The extensions are those that Python 3.13's strict verification asks for.
    """
    openssl = shutil.which("openssl")
    if openssl is None:
        return None
    directory.mkdir(parents=True, exist_ok=True)

    def run(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], cwd=directory, check=True, capture_output=True, text=True)

    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    ca_extensions = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign,cRLSign")
    ca_flags = [flag for extension in ca_extensions for flag in ("-addext", extension)]
    run(
        "req",
        "-x509",
        *new_key,
        "-keyout",
        "ca.key",
        "-out",
        "ca.crt",
        "-days",
        DAYS,
        "-subj",
        "/CN=double-ca",
        *ca_flags,
    )
    run("req", *new_key, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=double")
    (directory / "extensions").write_text(
        f"subjectAltName={','.join(names)}\n"
        "basicConstraints=critical,CA:FALSE\n"
        "keyUsage=critical,digitalSignature\n"
        "extendedKeyUsage=serverAuth\n"
        "subjectKeyIdentifier=hash\n"
        "authorityKeyIdentifier=keyid\n"
    )
    signing = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", DAYS, "-extfile", "extensions")
    run("x509", "-req", "-in", "server.csr", "-out", "server.crt", *signing)
    return Certificates(directory / "ca.crt", directory / "server.crt", directory / "server.key")
