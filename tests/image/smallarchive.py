"""A small Debian archive: real packages, indices and signature, and a server whose faults a test orders."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from image.archive import Archive
from image.debfile import control
from image.model import DebPackage

SUITES = ("trixie", "trixie-updates", "trixie-security")
Fault = Callable[[SimpleHTTPRequestHandler], None]


def make_package(pool: Path, name: str, version: str = "1", architecture: str = "amd64", *lines: str) -> Path:
    """Build a package with one file; `lines` are more lines of its control file."""
    tree = pool / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    (tree / "DEBIAN").mkdir(parents=True)
    about = {"Package": name, "Version": version, "Architecture": architecture, "Maintainer": "A <a@example.org>"}
    text = "".join(f"{key}: {value}\n" for key, value in about.items()) + "".join(line + "\n" for line in lines)
    (tree / "DEBIAN" / "control").write_text(text + "Description: a package\n of two lines\n")
    (tree / "usr" / "share").mkdir(parents=True)
    (tree / "usr" / "share" / name).write_text(f"{name} {version} {architecture}\n")
    (tree / "usr" / "share" / f"{name}-link").symlink_to(name)
    path = pool / f"{name}_{version.rpartition(':')[2]}_{architecture}.deb"
    argv = ["dpkg-deb", "--root-owner-group", "--build", str(tree), str(path)]
    # The same package has the same bytes whenever it is built: its times are clamped.
    subprocess.run(argv, check=True, capture_output=True, env=os.environ | {"SOURCE_DATE_EPOCH": "1000000000"})
    shutil.rmtree(tree)
    return path


def locked(path: Path, root: Path) -> DebPackage:
    """The entry of a lock for a package's file below the root of `debian`."""
    about, data = control(path), path.read_bytes()
    return DebPackage(
        about["Package"],
        about["Version"],
        about["Architecture"],
        "debian",
        str(path.relative_to(root)),
        hashlib.sha256(data).hexdigest(),
        len(data),
        about["Package"],
        about["Version"],
    )


class Signer:
    """A key pair of GnuPG in a folder of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir(mode=0o700)
        self.keyring = home / "archive.gpg"
        self.run("--quick-gen-key", "--passphrase", "", "archive@example.org", "rsa2048", "sign", "never")
        self.keyring.write_bytes(self.run("--export"))

    def run(self, *arguments: str, data: bytes = b"") -> bytes:
        argv = ["gpg", "--homedir", str(self.home), "--batch", "--yes", "--quiet", *arguments]
        return subprocess.run(argv, input=data, check=True, capture_output=True).stdout

    def sign(self, text: str) -> bytes:
        return self.run("--clearsign", "--digest-algo", "SHA512", data=text.encode())

    def close(self) -> None:
        subprocess.run(["gpgconf", "--homedir", str(self.home), "--kill", "all"], check=False, capture_output=True)


def publish(root: Path, suite: str, pool: Sequence[Path], signer: Signer | None) -> None:
    """Write the indices of a suite for both architectures, signed; without a signer they only look like it."""
    folder = root / "dists" / suite
    hashes = ""
    for architecture in ("amd64", "arm64"):
        index = folder / "main" / f"binary-{architecture}" / "Packages"
        index.parent.mkdir(parents=True, exist_ok=True)
        index.write_text("".join(_stanza(path, root) for path in pool if path.stem.endswith((architecture, "_all"))))
        data = index.read_bytes()
        hashes += f" {hashlib.sha256(data).hexdigest()} {len(data)} {index.relative_to(folder)}\n"
    label = "Debian-Security" if suite.endswith("-security") else "Debian"
    text = f"Origin: Debian\nLabel: {label}\nSuite: {suite}\nCodename: {suite}\nDate: {formatdate(usegmt=True)}\n"
    text += f"Architectures: amd64 arm64\nComponents: main\nSHA256:\n{hashes}"
    (folder / "InRelease").write_bytes(signer.sign(text) if signer else text.encode())


def _stanza(path: Path, root: Path) -> str:
    data = path.read_bytes()
    about = subprocess.run(["dpkg-deb", "--field", str(path)], check=True, capture_output=True, text=True).stdout
    digest = hashlib.sha256(data).hexdigest()
    return f"{about}Filename: {path.relative_to(root)}\nSize: {len(data)}\nSHA256: {digest}\n\n"


@dataclass
class Server:
    """A running server of a folder: counts requests, and answers with the faults that were ordered for a path."""

    folder: Path
    url: str = ""
    requests: Counter[str] = field(default_factory=Counter)
    faults: dict[str, list[Fault]] = field(default_factory=dict)

    @property
    def archive(self) -> Archive:
        return Archive({"debian": f"{self.url}/debian", "debian-security": f"{self.url}/debian-security"})


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, server: Server, *arguments: object) -> None:
        self.ordered = server
        super().__init__(*arguments, directory=str(server.folder))  # type: ignore[arg-type]

    def do_GET(self) -> None:
        name = unquote(self.path).rpartition("/")[2]
        self.ordered.requests[name] += 1
        faults = self.ordered.faults.get(name)
        if faults:
            faults.pop(0)(self)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, server)) as listener:  # type: ignore[arg-type]
        server.url = f"http://127.0.0.1:{listener.server_address[1]}"
        listener.daemon_threads = True
        listener.block_on_close = False
        thread = threading.Thread(target=listener.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()


def status(code: int) -> Fault:
    """Answer with an error."""
    return lambda handler: handler.send_error(code)


def body(data: bytes, length: int | None = None) -> Fault:
    """Answer with other bytes; a `length` beyond theirs makes the connection end too early."""

    def answer(handler: SimpleHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data) if length is None else length))
        handler.end_headers()
        handler.wfile.write(data)
        handler.close_connection = True

    return answer
