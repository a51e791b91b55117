"""The dev variant: its tools run, and dpkg and apt can work with the database that no maintainer script made."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from image.model import ARCHITECTURES
from tests.image.layers import Node, file_system, unpack

from image import definition, lockfile

ROOT = Path(__file__).resolve().parents[2]
DEFINITION = definition.read(ROOT / "image" / "image.toml", ROOT / "src")
LOCK = lockfile.read(ROOT / "image" / "lock.json")
TAG = f"{DEFINITION.version}-dev"
# What dpkg is told to leave out too.
LEFT_OUT = (
    "/usr/share/doc/",
    "/usr/share/man/",
    "/usr/share/locale/",
    "/usr/share/info/",
    "/usr/share/lintian/",
    "/usr/share/bug/",
)


PACKAGE_AND_BACK = r"""
set -e
cd /tmp
mkdir -p p/DEBIAN p/usr/share/doc/sample p/usr/share/sample
printf 'Package: sample\nVersion: 1\nArchitecture: all\nMaintainer: nobody <n@example.org>\n' > p/DEBIAN/control
printf 'Description: a sample\n' >> p/DEBIAN/control
printf '#!/bin/sh\nset -e\necho configured > /run/sample\n' > p/DEBIAN/postinst
chmod 755 p/DEBIAN/postinst
echo x > p/usr/share/doc/sample/README
echo y > p/usr/share/sample/file
dpkg-deb --root-owner-group -b p sample.deb
dpkg -i sample.deb
cat /run/sample /usr/share/sample/file
test ! -e /usr/share/doc/sample/README
dpkg -P sample strace
dpkg --audit
"""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def dev(built_image: Path, request: pytest.FixtureRequest) -> dict[str, Node]:
    return file_system(built_image, TAG, request.param)


@pytest.fixture(scope="module")
def root(built_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("chroot needs root")
    folder = tmp_path_factory.mktemp("dev")
    unpack(file_system(built_image, TAG, "amd64"), folder)
    yield folder
    shutil.rmtree(folder)


def run(root: Path, script: str) -> subprocess.CompletedProcess[str]:
    """A shell in the image, with /dev/null and /proc, in network and mount namespaces of its own."""
    prepare = 'mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" && exec chroot "$1" /bin/bash -c "$2"'
    words = ["unshare", "--net", "--mount", "sh", "-c", prepare, "-", str(root), script]
    environment = {"PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(words, capture_output=True, text=True, env=environment)


def test_every_package_of_the_lock_is_installed(root: Path) -> None:
    done = run(root, "dpkg-query -W -f '${Package} ${Version} ${db:Status-Status}\\n'")
    expected = {f"{one.name} {one.version} installed" for one in LOCK.group("dev/amd64")}
    assert set(done.stdout.splitlines()) == expected, done.stderr


def test_dpkg_and_apt_find_nothing_wrong(root: Path) -> None:
    assert run(root, "dpkg --audit").stdout == ""
    done = run(root, "apt-get check")
    assert done.returncode == 0, done.stdout + done.stderr
    listed = run(root, "apt list --installed").stdout.splitlines()
    assert len([line for line in listed if "[installed" in line]) == len(LOCK.group("dev/amd64"))


def test_every_file_is_as_its_package_brought_it(root: Path) -> None:
    lines = run(root, "dpkg -V").stdout.splitlines()
    assert lines
    unexpected = [line for line in lines if not (line.startswith("missing") and line.split()[-1].startswith(LEFT_OUT))]
    assert unexpected == []


def test_a_changed_file_is_found(root: Path) -> None:
    target = root / "usr/bin/cat"
    kept = target.read_bytes()
    try:
        target.write_bytes(kept + b"\0")
        assert "/usr/bin/cat" in run(root, "dpkg -V coreutils").stdout
    finally:
        target.write_bytes(kept)


def test_a_package_can_be_removed_and_another_one_installed(root: Path) -> None:
    """With dpkg alone, for there is no archive within reach of the test."""
    done = run(root, PACKAGE_AND_BACK)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "configured\ny\n" in done.stdout
    assert not (root / "usr/bin/strace").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("bash --version", "GNU bash"),
        ("ip -V", "iproute2"),
        ("conntrack -V", "conntrack"),
        ("tcpdump --version", "tcpdump version"),
        ("ss -V", "iproute2"),
        ("ps --version", "procps"),
        ("ping -V", "iputils"),
        ("nft --version", "nftables"),
        ("iptables -V", "nf_tables"),
        ("iptables-legacy -V", "legacy"),
        ("python3 -c 'import asyncio, ssl, sqlite3, ctypes, nftables; print(ssl.OPENSSL_VERSION)'", "OpenSSL 3"),
        ("perl -e 'print 6*7'", "42"),
        ("awk 'BEGIN {print 6*7}'", "42"),
        ("which pager nc netcat rmt && readlink -f $(which pager)", "/usr/bin/less"),
        ("update-alternatives --query iptables", "Best: /usr/sbin/iptables-nft"),
        ("update-alternatives --query awk", "Status: auto"),
        ("update-alternatives --set iptables /usr/sbin/iptables-legacy && iptables -V", "legacy"),
        ("update-alternatives --auto iptables && iptables-save -V", "nf_tables"),
        ("getent passwd _apt nonroot", "_apt:x:42"),
        ("id", "uid=0(root)"),
        ("ls -ld /home/nonroot", "nonroot nonroot"),
        (
            "cd /usr/share/ca-certificates/mozilla && openssl verify -CAfile /usr/lib/ssl/cert.pem ISRG_Root_X1.crt",
            ": OK",
        ),
        ("install-cni version", f"install-cni {DEFINITION.version}"),
        ("find / -xdev -perm /6000 | wc -l", "0"),
    ],
)
def test_tools(root: Path, command: str, said: str) -> None:
    done = run(root, command)
    assert (done.returncode, said in done.stdout + done.stderr) == (0, True), done.stdout + done.stderr


def test_no_archive_is_named(dev: dict[str, Node]) -> None:
    lists = {path: node for path, node in dev.items() if path.startswith("etc/apt/sources.list") and node.data}
    assert set(lists) == {"etc/apt/sources.list"}
    assert all(line.startswith("#") for line in lists["etc/apt/sources.list"].data.decode().split("\n") if line)


def test_the_standard_library_is_the_packages_own(dev: dict[str, Node]) -> None:
    assert "usr/lib/python3.13/os.py" in dev
    assert "usr/lib/python3.13/os.pyc" not in dev
    assert "usr/lib/python3.13/__pycache__/os.cpython-313.pyc" in dev
    assert "usr/lib/meshcni/h11/__init__.pyc" in dev
    assert not [path for path in dev if path.startswith("var/lib/dpkg/status.d")]


def test_every_path_of_the_database_is_there(dev: dict[str, Node]) -> None:
    lists = [node for path, node in dev.items() if path.startswith("var/lib/dpkg/info/") and path.endswith(".list")]
    assert len(lists) > 100
    for node in lists:
        for line in node.data.decode().splitlines():
            assert line == "/." or line.lstrip("/") in dev or line.startswith(LEFT_OUT), line
