"""Input that nobody would send: always exactly one CNI answer, never a traceback, never code 999."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

from tests.plugin.harness import Outcome, conf, run
from tests.pure.plugin.doubles import RecordedEffects

from meshcni.cni.versions import SUPPORTED_VERSIONS
from meshcni.errors import AgentUnavailableError
from meshcni.plugin.verbs import run as run_in_process
from meshcni.protocols.podadd import accepted, encode_reply, refused

IN_PROCESS_INPUTS = 100_000
PROCESS_INPUTS = 2_500

COMMANDS = ["ADD"] * 12 + ["CHECK", "GC", "STATUS", "DEL", "VERSION", "add", "", "RUN"]
ERROR_CODES = {1, 4, 5, 6, 7, 11}
ERROR_KEYS = {"cniVersion", "code", "msg", "details"}

DOCUMENTS: list[dict[str, Any]] = [
    {
        "cniVersion": version,
        "name": "pods",
        "type": "istio-cni",
        "plugin_log_level": "info",
        "ambient_enabled": False,
        "enablement_selectors": [{"podSelector": {"matchLabels": {"a": "b"}}, "namespaceSelector": {}}],
        "exclude_namespaces": ["kube-system", "istio-system"],
        "pod_namespace": "istio-system",
        "agent_wait_seconds": 0,
        "runtimeConfig": {"portMappings": [{"hostPort": 80.5, "containerPort": 1e3}]},
        "prevResult": previous,
    }
    for version in SUPPORTED_VERSIONS
    for previous in (
        None,
        {"cniVersion": version, "ip4": {"ip": "10.0.0.2/24", "routes": [{"dst": "0.0.0.0/0"}]}, "dns": {}},
        {
            "cniVersion": version,
            "interfaces": [{"name": "eth0", "mac": "0a:58:0a:00:00:02", "sandbox": "/run/netns/pod", "mtu": 1500}],
            "ips": [{"version": "4", "interface": 0, "address": "10.0.0.2/24", "gateway": "10.0.0.1"}],
            "routes": [{"dst": "0.0.0.0/0", "gw": "10.0.0.1", "priority": 1}],
            "dns": {"nameservers": ["10.96.0.10"], "search": ["svc"]},
        },
    )
]
JUNK: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    10**30,
    "",
    "x",
    "10.0.0.2/24",
    "fd00::1/64",
    "1.1.0",
    "9",
    "\u0000",
    "😀",
    "\ud800",
]
JUNK += [[], {}, [[]], [{}], {"a": None}, ["a"], [None], {"address": "10.0.0.2/24"}, "x" * 300, [0] * 50, "../..", "-"]
FRAGMENTS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b'"',
    b"\\",
    b"\\u",
    b"\\ud800",
    b"0",
    b"-",
    b"1e999",
    b"null",
    b"tru",
    b"\0",
    b"\xff",
]
FRAGMENTS += [b"\n", b"\xc3\xa9", b"\xed\xa0\x80", b"[" * 300, b'{"a":' * 300, b'"prevResult":', b'"ips":[]', b"//"]
VARIABLES = {
    "CNI_CONTAINERID": ["abc", "abc", "abc", "", "-", "a/b", "x" * 300, "\udcff"],
    "CNI_NETNS": ["/run/netns/pod", "/run/netns/pod", "", "/", "/nonexistent", "a\udcffb", "/dev/null", "." * 5000],
    "CNI_IFNAME": ["eth0", "eth0", "eth0", "", "..", "a b", "x" * 16, "\udcff", "é"],
    "CNI_PATH": ["/opt/cni/bin", "/opt/cni/bin", ""],
    "CNI_NETNS_OVERRIDE": ["", "1", "TRUE", "maybe"],
    "CNI_ARGS": [
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=u",
        "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web",
        "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=dns",
        "K8S_POD_NAMESPACE=istio-system;K8S_POD_NAME=istio-cni-node-x",
        "K8S_POD_NAMESPACE=\udcff;K8S_POD_NAME=" + "x" * 70_000,
        "",
        ";",
        "a=b",
        "=",
        "IgnoreUnknown=;x=y",
        "IgnoreUnknown=1;=",
        "K8S_POD_NAME==",
    ],
}
REPLIES: list[bytes | str | Exception] = [
    encode_reply(accepted("sidecar", "r", "m")),
    encode_reply(accepted("skip", "r")),
    encode_reply(refused(11, "no", "wait")),
    encode_reply(refused(7, "no")),
    "nobody needs to be asked",
    b"",
    b"{",
    b"\xff" * 100,
    b"x" * 70_000,
    AgentUnavailableError("nobody", "do this"),
]


def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found.append((value, key))
        places(item, found)
    return found


def changed_document(chance: random.Random) -> bytes:
    document = copy.deepcopy(chance.choice(DOCUMENTS))
    for _ in range(chance.choice((0, 1, 1, 2, 4))):
        container, key = chance.choice(places(document, []) or [({}, "x")])
        action = chance.randrange(4)
        if action == 0:
            del container[key]
        elif action == 1 and isinstance(container, dict):
            container[chance.choice((key.upper(), key.title(), key + "x"))] = container.pop(key)
        else:
            container[key] = copy.deepcopy(chance.choice(JUNK))
    return json.dumps(document, ensure_ascii=chance.random() < 0.9).encode("utf-8", "surrogatepass")


def changed_bytes(chance: random.Random, data: bytes) -> bytes:
    for _ in range(chance.choice((0, 0, 1, 1, 2, 5))):
        begin = chance.randrange(len(data) + 1)
        end = min(len(data), begin + chance.choice((0, 0, 1, 1, 3, 50)))
        data = (
            data[:begin] + chance.choice((b"", chance.choice(FRAGMENTS), bytes([chance.randrange(256)]))) + data[end:]
        )
    return data[: chance.randrange(len(data) + 1)] if chance.random() < 0.05 else data


def changed_environ(chance: random.Random) -> dict[str, str]:
    chosen = {name: values[0] if chance.random() < 0.8 else chance.choice(values) for name, values in VARIABLES.items()}
    environ = {"CNI_COMMAND": chance.choice(COMMANDS), **chosen}
    return {name: value for name, value in environ.items() if chance.random() < 0.99}


def check(environ: dict[str, str], done: Outcome, codes: set[int]) -> None:
    """Exactly one answer of the form that the verb demands."""
    command = environ.get("CNI_COMMAND", "")
    assert b"Traceback" not in done.stdout + done.stderr
    if command in ("DEL", ""):
        assert (done.status, done.stdout) == (0, b"")
    elif command == "VERSION":
        assert done.status == 0
        assert done.json["supportedVersions"] == list(SUPPORTED_VERSIONS)
    elif done.status == 0 and command == "ADD":
        assert done.json["cniVersion"] in SUPPORTED_VERSIONS
        assert "code" not in done.json
    elif done.status == 0:
        assert command in ("CHECK", "GC", "STATUS")
        assert done.stdout == b""
    else:
        assert done.status == 1
        assert ERROR_KEYS - {"details"} <= set(done.json) <= ERROR_KEYS
        assert done.json["code"] in codes
        assert done.json["msg"]
        assert done.json["cniVersion"] in SUPPORTED_VERSIONS


def test_in_process() -> None:
    chance = random.Random(20)
    statuses = {0: 0, 1: 0}
    seen_codes = set()
    for number in range(IN_PROCESS_INPUTS):
        environ = changed_environ(chance)
        stdin = changed_bytes(chance, changed_document(chance))
        effects = RecordedEffects(stdin, chance.choice(REPLIES), own_netns=chance.random() < 0.02)
        status, stdout = run_in_process(environ, effects)
        try:
            check(environ, Outcome(status, stdout.encode(), b""), ERROR_CODES)
        except Exception as error:
            raise AssertionError(f"input {number}: {environ!r} {stdin!r} answered {status} {stdout!r}") from error
        statuses[status] += 1
        if status:
            seen_codes.add(json.loads(stdout)["code"])
    assert min(statuses.values()) > IN_PROCESS_INPUTS // 10  # the inputs are neither all good nor all bad
    assert seen_codes == ERROR_CODES


def test_whole_processes(run_dir: Path) -> None:
    chance = random.Random(21)
    run_dir_key = json.dumps(str(run_dir)).encode()
    for number in range(PROCESS_INPUTS):
        environ = {name: value for name, value in changed_environ(chance).items() if "\0" not in value}
        stdin = changed_document(chance).replace(b'"pods"', b'"pods","cni_agent_run_dir":' + run_dir_key, 1)
        stdin = changed_bytes(chance, stdin)
        done = run(environ, stdin)
        try:
            check(environ, done, ERROR_CODES)
        except Exception as error:
            raise AssertionError(f"input {number}: {environ!r} {stdin!r} answered {done!r}") from error


def test_ten_megabytes(run_dir: Path) -> None:
    environ = {name: values[0] for name, values in VARIABLES.items()} | {"CNI_COMMAND": "ADD"}
    for stdin in (conf(run_dir, padding="x" * 10_000_000), b"[" * 10_000_000, b"\0" * 10_000_000):
        done = run(environ, stdin)
        assert (done.status, done.json["code"]) == (1, 6)
        assert "1048576 bytes" in done.json["msg"]


def test_the_largest_conf_that_is_read(run_dir: Path) -> None:
    environ = {name: values[0] for name, values in VARIABLES.items()} | {"CNI_COMMAND": "ADD"}
    environ["CNI_ARGS"] = "K8S_POD_NAMESPACE=kube-system;K8S_POD_NAME=dns"
    base = len(conf(run_dir, padding=""))
    assert run(environ, conf(run_dir, padding="x" * ((1 << 20) - base))).status == 0
    assert run(environ, conf(run_dir, padding="x" * ((1 << 20) - base + 1))).status == 1
    many = conf(run_dir, padding=[{"key": number} for number in range(60_000)])
    assert run(environ, many).status == 0
