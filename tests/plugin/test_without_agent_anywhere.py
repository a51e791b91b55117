"""The question to the API server from anywhere: by name, in an empty root, with little, in a hostile environment."""

from __future__ import annotations

import json
import re
import resource
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from lab import namespaces
from tests.plugin.apidouble import ApiDouble, Authority, objects, pod
from tests.plugin.harness import PLUGIN, RESULT, Outcome, conf, run, variables
from tests.plugin.test_environment import HOSTILE

SETTINGS = {"ambient_enabled": False, "agent_wait_seconds": 1}
NAME = "api.example.test"
MAX_RSS_KIB = 14 * 1024
# Each would change what OpenSSL or a resolver does, were it asked.
HOSTILE_TO_TLS = {
    "SSL_CERT_FILE": "/etc/ssl/certs/ca-certificates.crt",
    "SSL_CERT_DIR": "/etc/ssl/certs",
    "OPENSSL_CONF": "{folder}/openssl.cnf",
    "OPENSSL_CONF_INCLUDE": "{folder}",
    "OPENSSL_MODULES": "{folder}",
    "OPENSSL_ENGINES": "{folder}",
    "OPENSSL_ia32cap": "~0x0:~0x0:~0x0:~0x0",
    "OPENSSL_armcap": "0xffffffff",
    "OPENSSL_TRACE": "ALL",
    "RANDFILE": "/nonexistent",
    "CTLOG_FILE": "/nonexistent",
    "SSLKEYLOGFILE": "{folder}/keys",
    "QLOGDIR": "{folder}",
    "HTTPS_PROXY": "http://127.0.0.1:1",
    "https_proxy": "http://127.0.0.1:1",
    "ALL_PROXY": "http://127.0.0.1:1",
    "KUBECONFIG": "/nonexistent",
    "KUBERNETES_SERVICE_HOST": "192.0.2.1",
    "LOCALDOMAIN": "evil.test",
    "HOSTALIASES": "{folder}/aliases",
    "RES_OPTIONS": "ndots:15 use-vc",
    "RESOLV_HOST_CONF": "{folder}/host.conf",
}
EVIL_CONF = """openssl_conf = all
[all]
providers = none
ssl_conf = tls
[none]
evil = evil_section
[evil_section]
module = /nonexistent/evil.so
activate = 1
[tls]
system_default = strict
[strict]
MinProtocol = TLSv1.3
CipherString = NULL
"""


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def tls(authority: Authority) -> ssl.SSLContext:
    return authority.server()


@pytest.fixture
def api(run_dir: Path, authority: Authority, tls: ssl.SSLContext) -> Iterator[ApiDouble]:
    with ApiDouble(tls, objects(pod(), pod("mesh", is_meshed=True))) as double:
        double.write_kubeconfig(run_dir, authority.pem)
        yield double


def assert_both(run_once: Callable[[dict[str, str]], Outcome], netns: str, environ: dict[str, str]) -> None:
    """The unmeshed pod passes, the mesh pod does not, and both for the right reason."""
    passed = run_once({**environ, **variables(netns=netns)})
    assert (passed.status, passed.json) == (0, RESULT), passed
    assert b"the API server says that the pod is not for the mesh" in passed.stderr
    refused = run_once({**environ, **variables(netns=netns, name="mesh")})
    assert refused.json["code"] == 11
    assert "the API server, asked instead, says that the pod is for the mesh" in refused.json["msg"]


@pytest.fixture
def hostile(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "openssl.cnf").write_text(EVIL_CONF)
    return {name: value.format(folder=tmp_path) for name, value in HOSTILE_TO_TLS.items()}


@pytest.mark.parametrize("name", HOSTILE_TO_TLS)
def test_one_hostile_variable(
    run_dir: Path, api: ApiDouble, shared_netns: str, hostile: dict[str, str], tmp_path: Path, name: str
) -> None:
    stdin = conf(run_dir, **SETTINGS)
    assert_both(lambda environ: run(environ, stdin, cwd=tmp_path), shared_netns, {name: hostile[name]})


def test_all_hostile_variables(
    run_dir: Path, api: ApiDouble, shared_netns: str, hostile: dict[str, str], tmp_path: Path
) -> None:
    stdin = conf(run_dir, **SETTINGS)
    assert_both(lambda environ: run(environ, stdin, cwd=tmp_path), shared_netns, {**HOSTILE, **hostile})
    assert [path.name for path in tmp_path.iterdir()] == ["openssl.cnf"]


@pytest.mark.parametrize("read_only", [False, True])
def test_in_an_empty_root(run_dir: Path, api: ApiDouble, shared_netns: str, tmp_path: Path, read_only: bool) -> None:
    """The executable, the run directory and a netns: no /proc, /dev, /tmp, /etc, and so no random device either."""
    shutil.copy(PLUGIN, tmp_path / "istio-cni")
    (tmp_path / "r").mkdir()
    (tmp_path / "n").touch()
    mounts = f"mount --rbind {tmp_path} {tmp_path} && mount --bind {run_dir} {tmp_path}/r"
    mounts += f" && mount --bind {shared_netns} {tmp_path}/n"
    if read_only:
        mounts += f" && mount -o remount,ro,bind {tmp_path} && mount -o remount,ro,bind {tmp_path}/r"
    prefix = ["/usr/bin/unshare", "-m", "/bin/sh", "-c", f'{mounts} && exec /usr/sbin/chroot {tmp_path} "$0"']
    stdin = conf("/r", **SETTINGS)
    options: dict[str, Any] = {"prefix": prefix, "path": "/istio-cni"}
    assert_both(lambda environ: run(environ, stdin, **options), "/n", {"PATH": "/usr/bin:/bin"})


def test_few_descriptors_and_little_memory(run_dir: Path, api: ApiDouble, shared_netns: str) -> None:
    def poor() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))
        resource.setrlimit(resource.RLIMIT_AS, (48 << 20, 48 << 20))
        resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, 1 << 20))

    stdin = conf(run_dir, **SETTINGS)
    assert_both(lambda environ: run(environ, stdin, preexec_fn=poor), shared_netns, {})


@pytest.mark.parametrize("limit_mib", range(13, 25))
def test_too_little_memory_never_lets_a_mesh_pod_start(
    run_dir: Path, api: ApiDouble, shared_netns: str, limit_mib: int
) -> None:
    def starve() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit_mib << 20, limit_mib << 20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    stdin = conf(run_dir, **SETTINGS | {"agent_wait_seconds": 0})
    done = run(variables(netns=shared_netns, name="mesh"), stdin, preexec_fn=starve)
    assert done.status != 0
    if done.status == 1:
        assert done.json["code"] in (11, 999)


def test_closed_descriptors(run_dir: Path, api: ApiDouble, shared_netns: str) -> None:
    """What goes to the API server goes nowhere else."""
    done = subprocess.run(
        ["/bin/sh", "-c", f"exec {PLUGIN} 2>&-"],
        input=conf(run_dir, **SETTINGS),
        env=variables(netns=shared_netns),
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, json.loads(done.stdout)) == (0, RESULT)


# --- by name ----------------------------------------------------------------------------------------------------------


class NameServer:
    """Answers questions for `NAME`, with an alias in between, as a host's name server would. Context manager."""

    def __init__(self, netns: str, addresses: dict[int, bytes], address: str = "127.0.0.53") -> None:
        self.netns, self.addresses, self.address = netns, addresses, address
        self.questions: list[tuple[str, int]] = []
        self.is_ready, self.is_over = threading.Event(), threading.Event()

    def __enter__(self) -> NameServer:
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()
        assert self.is_ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self.thread.join()

    def serve(self) -> None:
        namespaces.enter(self.netns, namespaces.CLONE_NEWNET)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
            listener.bind((self.address, 53))
            listener.settimeout(0.05)
            self.is_ready.set()
            while not self.is_over.is_set():
                with suppress(TimeoutError):
                    message, sender = listener.recvfrom(512)
                    listener.sendto(self.answer(message), sender)

    def answer(self, message: bytes) -> bytes:
        at, labels = 12, []
        while message[at]:
            labels.append(message[at + 1 : at + 1 + message[at]].decode())
            at += 1 + message[at]
        kind = int.from_bytes(message[at + 1 : at + 3], "big")
        self.questions.append((".".join(labels), kind))
        alias = b"\x04node\x07example\xc0\x1c"  # the name itself ends in that pointer to "test", wrong but unread
        records = b"\xc0\x0c\x00\x05\x00\x01\x00\x00\x00\x05" + len(alias).to_bytes(2, "big") + alias
        address = self.addresses.get(kind, b"")
        if address:
            records += alias + kind.to_bytes(2, "big") + b"\x00\x01\x00\x00\x00\x05"
            records += len(address).to_bytes(2, "big") + address
        count = 2 if address else 1
        return (
            message[:2] + b"\x81\x80\x00\x01" + count.to_bytes(2, "big") + b"\0\0\0\0" + message[12 : at + 5] + records
        )


@pytest.fixture
def world(netns: str) -> str:
    """A network of its own, in which the API server and the name server are."""
    subprocess.run(["nsenter", f"--net={netns}", "ip", "link", "set", "lo", "up"], check=True)
    return netns


def listening_in(netns: str, api: ApiDouble) -> ApiDouble:
    """The same server, entered from a thread of that network, whose sockets it makes."""
    thread = threading.Thread(
        target=lambda: (namespaces.enter(netns, namespaces.CLONE_NEWNET), api.__enter__())  # type: ignore[func-returns-value]
    )
    thread.start()
    thread.join()
    return api


def by_name(run_dir: Path, world: str, pod_netns: str, tmp_path: Path, hosts: str, resolv: str, *trace: str) -> Outcome:
    (tmp_path / "hosts").write_text(hosts)
    (tmp_path / "resolv.conf").write_text(resolv)
    mounts = f"mount --bind {tmp_path}/hosts /etc/hosts && mount --bind {tmp_path}/resolv.conf /etc/resolv.conf"
    command = f'{mounts} && exec {" ".join(trace)} "$0"'
    prefix = ["/usr/bin/nsenter", f"--net={world}", "/usr/bin/unshare", "-m", "/bin/sh", "-c", command]
    environ = {**variables(netns=pod_netns), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}
    return run(environ, conf(run_dir, **SETTINGS), prefix=prefix)


NAMES = {
    "hosts": (f"127.0.0.1 localhost\n\n127.0.0.1\tother  {NAME.upper()} # here\n", "", None, 0),
    "hosts, IPv6 first": (f"::1 {NAME}\n127.0.0.1 {NAME}\n", "", None, 0),
    "a name server": ("", "search evil.test\nnameserver 127.0.0.53\noptions ndots:5\n", {1: bytes((127, 0, 0, 1))}, 2),
    "one that is away first": ("", "nameserver 127.0.0.9\nnameserver 127.0.0.53\n", {1: bytes((127, 0, 0, 1))}, 2),
    "both kinds": ("", "nameserver 127.0.0.53\n", {1: bytes((127, 0, 0, 1)), 28: bytes(15) + b"\1"}, 2),
}


@pytest.mark.parametrize(("hosts", "resolv", "addresses", "questions"), NAMES.values(), ids=NAMES)
def test_by_name(
    run_dir: Path,
    world: str,
    shared_netns: str,
    tmp_path: Path,
    authority: Authority,
    tls: ssl.SSLContext,
    hosts: str,
    resolv: str,
    addresses: dict[int, bytes] | None,
    questions: int,
) -> None:
    api = listening_in(world, ApiDouble(tls, objects(pod())))
    try:
        api.write_kubeconfig(run_dir, authority.pem, host=NAME)
        with NameServer(world, addresses or {}) as names:
            done = by_name(run_dir, world, shared_netns, tmp_path, hosts, resolv)
    finally:
        api.__exit__()
    assert (done.status, done.json) == (0, RESULT), done
    assert api.asked[0].fields["host"] == f"{NAME}:{api.port}"
    assert [name for name, _ in names.questions] == [NAME] * questions


@pytest.mark.parametrize("resolv", ["", "nameserver 127.0.0.53\n", "nameserver nonsense\nnameserver\n"])
def test_a_name_that_nobody_knows(
    run_dir: Path, world: str, shared_netns: str, tmp_path: Path, authority: Authority, resolv: str
) -> None:
    ApiDouble.port = 1
    ApiDouble(None).write_kubeconfig(run_dir, authority.pem, host=NAME)
    with NameServer(world, {}):
        done = by_name(run_dir, world, shared_netns, tmp_path, "127.0.0.1 localhost\n", resolv)
    assert done.json["code"] == 11
    assert f"could not be asked: {NAME} has no address" in done.json["msg"]


def test_a_name_that_the_certificate_has_not(
    run_dir: Path, world: str, shared_netns: str, tmp_path: Path, authority: Authority
) -> None:
    """Whoever answers for the name has to have its certificate; one for the address that was given does not count."""
    api = listening_in(world, ApiDouble(authority.server(("127.0.0.1", "other.example.test")), objects(pod())))
    try:
        api.write_kubeconfig(run_dir, authority.pem, host=NAME)
        done = by_name(run_dir, world, shared_netns, tmp_path, f"127.0.0.1 {NAME}\n", "")
    finally:
        api.__exit__()
    assert done.json["code"] == 11
    assert "ostname mismatch" in done.json["msg"]
    assert api.asked == []


# --- what it touches --------------------------------------------------------------------------------------------------

TOUCHED = {
    "{run_dir}/istio-cni.log",
    "{run_dir}/agent.sock",
    "{run_dir}/uninstalled",
    "{run_dir}/istio-cni-kubeconfig",
    "{netns}",
    "/proc/self/ns/net",
}
ALWAYS = {str(PLUGIN), "/proc/self/exe", "/proc/sys/vm/overcommit_memory"}
TRACE = ("strace", "-f", "-e", "trace=%file,%network,execve,clone,fork,vfork,mprotect", "-o")


def touched(trace: Path) -> tuple[set[str], list[str]]:
    calls = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines()]
    calls = calls[next(i for i, call in enumerate(calls) if call.startswith(f'execve("{PLUGIN}"')) :]
    named = [call for call in calls if not call.startswith(("send", "recv"))]  # what goes over the wire names no files
    return {name for call in named for name in re.findall(r'"(/[^"]*)"', call)} - ALWAYS, calls


def test_paths_touched(run_dir: Path, api: ApiDouble, shared_netns: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    done = run(
        {**variables(netns=shared_netns), "PATH": "/usr/bin"}, conf(run_dir, **SETTINGS), prefix=[*TRACE, str(trace)]
    )
    assert done.status == 0
    paths, calls = touched(trace)
    assert paths == {path.format(run_dir=run_dir, netns=shared_netns) for path in TOUCHED}
    assert not [call for call in calls if call.startswith(("clone", "fork", "vfork"))]
    assert len([call for call in calls if call.startswith("execve")]) == 1
    assert len([call for call in calls if call.startswith("connect(") and "AF_INET" in call]) == 1
    assert not [call for call in calls if "PROT_EXEC" in call and "PROT_WRITE" in call]
    # The data that OpenSSL's relocations are made in is writable for that long only.
    assert [call for call in calls if call.startswith("mprotect")][-1].split(",")[2].startswith(" PROT_READ)")


def test_paths_touched_with_a_name(
    run_dir: Path, world: str, shared_netns: str, tmp_path: Path, authority: Authority, tls: ssl.SSLContext
) -> None:
    api = listening_in(world, ApiDouble(tls, objects(pod())))
    trace = tmp_path / "trace"
    try:
        api.write_kubeconfig(run_dir, authority.pem, host=NAME)
        with NameServer(world, {1: bytes((127, 0, 0, 1))}):
            resolv = "nameserver 127.0.0.53\n"
            done = by_name(run_dir, world, shared_netns, tmp_path, "", resolv, *TRACE, str(trace))
    finally:
        api.__exit__()
    assert done.status == 0, done
    paths, _ = touched(trace)
    expected = {path.format(run_dir=run_dir, netns=shared_netns) for path in TOUCHED}
    assert paths == expected | {"/etc/hosts", "/etc/resolv.conf"}


def test_memory(run_dir: Path, api: ApiDouble, shared_netns: str, tmp_path: Path) -> None:
    from tests.plugin.test_executable import MEASURE

    report = tmp_path / "rss"
    prefix = ["/usr/bin/python3", "-I", "-S", "-c", MEASURE, str(report)]
    assert run(variables(netns=shared_netns), conf(run_dir, **SETTINGS), prefix=prefix).status == 0
    assert 0 < int(report.read_text()) <= MAX_RSS_KIB
