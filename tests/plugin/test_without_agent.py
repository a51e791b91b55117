"""The agent is down: what the plugin asks the API server, whom it believes, and whom it lets pass."""

from __future__ import annotations

import json
import os
import socket
import ssl
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from tests.plugin.apidouble import (
    DAY,
    TOKEN,
    ApiDouble,
    Authority,
    Handler,
    http,
    in_turn,
    namespace,
    objects,
    pod,
    says,
    status,
)
from tests.plugin.harness import RESULT, AgentDouble, Outcome, conf, outcome, run, start, variables

OFF = {"ambient_enabled": False, "enablement_selectors": [], "agent_wait_seconds": 1}
MODE = "istio.io/dataplane-mode"
SELECTORS = [
    {"podSelector": {"matchLabels": {MODE: "ambient"}}, "namespaceSelector": {}},
    {
        "podSelector": {"matchExpressions": [{"key": MODE, "operator": "NotIn", "values": ["none"]}]},
        "namespaceSelector": {"matchLabels": {MODE: "ambient"}},
    },
]
ON = {"ambient_enabled": True, "enablement_selectors": SELECTORS, "agent_wait_seconds": 1}
SAYS_DOWN = "agent.sock: No such file or directory"


@pytest.fixture(scope="session")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="session")
def tls(authority: Authority) -> ssl.SSLContext:
    return authority.server()


@pytest.fixture(scope="session")
def netns(shared_netns: str) -> str:
    return shared_netns


def add(run_dir: Path, netns: str, **changes: Any) -> Outcome:
    return run(variables(netns=netns), conf(run_dir, **{**OFF, **changes}))


def ask(run_dir: Path, netns: str, authority: Authority, api: ApiDouble, **changes: Any) -> Outcome:
    """One ADD with this API server in the kubeconfig."""
    api.write_kubeconfig(run_dir, authority.pem)
    return add(run_dir, netns, **changes)


def assert_passes(done: Outcome) -> None:
    assert (done.status, done.json) == (0, RESULT)
    line = json.loads(done.stderr)
    assert line["level"] == "warn"
    assert line["msg"].startswith("passes through: the node agent is down (")
    assert "the API server says that the pod is not for the mesh" in line["msg"]
    assert line["pod"] == "shop/web"


def assert_waits(done: Outcome, *words: str) -> None:
    """Code 11, with both facts and the next step."""
    assert done.status == 1
    assert done.json["code"] == 11
    assert "the node agent did not answer within" in done.json["msg"]
    for word in (SAYS_DOWN, "the API server, asked instead, ", *words):
        assert word in done.json["msg"] + done.json["details"]
    assert "is the istio-cni-node pod of this node running?" in done.json["details"]


def test_a_pod_outside_of_the_mesh_does_not_wait(run_dir: Path, netns: str, authority: Authority, tls: Any) -> None:
    with ApiDouble(tls, objects(pod())) as api:
        assert_passes(ask(run_dir, netns, authority, api, agent_wait_seconds=600))
    (asked,) = api.asked
    assert (asked.path, asked.token) == ("/api/v1/namespaces/shop/pods/web", TOKEN)
    assert asked.fields["host"] == f"127.0.0.1:{api.port}"
    assert "no istio-proxy container" in (run_dir / "istio-cni.log").read_text()


def test_a_mesh_pod_waits_and_asks_once(run_dir: Path, netns: str, authority: Authority, tls: Any) -> None:
    with ApiDouble(tls, objects(pod(is_meshed=True))) as api:
        done = ask(run_dir, netns, authority, api, agent_wait_seconds=2)
    assert_waits(done, "says that the pod is for the mesh: It has an injected sidecar.", "waits for the agent")
    assert len(api.asked) == 1


def test_a_mesh_pod_starts_when_the_agent_is_back(run_dir: Path, netns: str, authority: Authority, tls: Any) -> None:
    with ApiDouble(tls, objects(pod(is_meshed=True))) as api:
        api.write_kubeconfig(run_dir, authority.pem)
        process = start(variables(netns=netns), conf(run_dir, **{**OFF, "agent_wait_seconds": 60}))
        wait_until_asked(api)
        with AgentDouble(run_dir) as agent:
            done = outcome(process)
    assert (done.status, done.json, done.stderr) == (0, RESULT, b"")
    assert len(agent.received) == 1


def test_an_agent_that_is_back_ends_a_question(run_dir: Path, netns: str, authority: Authority, tls: Any) -> None:
    """The API server hangs; the agent is served at once, with no second connection, and without a word on stderr."""
    with ApiDouble(tls) as api:
        api.handler = api.hang
        api.write_kubeconfig(run_dir, authority.pem)
        process = start(variables(netns=netns), conf(run_dir, **{**OFF, "agent_wait_seconds": 60}))
        wait_until_asked(api)
        with AgentDouble(run_dir) as agent:
            done = outcome(process)
            asked = len(api.asked)
    assert (done.status, done.json, done.stderr) == (0, RESULT, b"")
    assert len(agent.received) == asked == 1


def wait_until_asked(api: ApiDouble) -> None:
    end = time.monotonic() + 30
    while not api.asked:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_agent_that_is_there_is_the_only_one_asked(
    agent: AgentDouble, netns: str, authority: Authority, tls: Any
) -> None:
    with ApiDouble(tls, objects(pod())) as api:
        assert ask(agent.run_dir, netns, authority, api).status == 0
    assert api.connections == 0
    assert len(agent.received) == 1


def test_the_marker_of_an_uninstall_asks_nobody(run_dir: Path, netns: str, authority: Authority, tls: Any) -> None:
    (run_dir / "uninstalled").touch()
    with ApiDouble(tls, objects(pod(is_meshed=True))) as api:
        done = ask(run_dir, netns, authority, api)
    assert (done.status, done.json, api.connections) == (0, RESULT, 0)
    assert b"uninstalled" in done.stderr


def test_a_backlog_that_is_full_is_no_agent(run_dir: Path, netns: str, authority: Authority, tls: Any) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(run_dir / "agent.sock"))
    listener.listen(0)
    waiting = [socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    for one in waiting:
        one.setblocking(False)
        if one.connect_ex(str(run_dir / "agent.sock")):
            break
    with ApiDouble(tls, objects(pod())) as api:
        done = ask(run_dir, netns, authority, api, agent_wait_seconds=600)
    for one in (*waiting, listener):
        one.close()
    assert_passes(done)
    assert b"agent.sock: nobody accepts)" in done.stderr


# --- ambient mode -----------------------------------------------------------------------------------------------------

IN_MESH, OUTSIDE = namespace(**{MODE: "ambient"}), namespace()
# pod's labels, namespace, conf -> whether it passes, how many requests
AMBIENT: dict[str, tuple[dict[str, str], dict[str, Any], dict[str, Any], bool, int]] = {
    "by the namespace's label": ({}, IN_MESH, ON, False, 2),
    "by its own label": ({MODE: "ambient"}, OUTSIDE, ON, False, 1),
    "neither": ({}, OUTSIDE, ON, True, 2),
    "opted out": ({MODE: "none"}, IN_MESH, ON, True, 1),
    "ambient mode is off": ({MODE: "ambient"}, IN_MESH, OFF, True, 1),
    "no selector": ({MODE: "ambient"}, IN_MESH, {**ON, "enablement_selectors": []}, True, 1),
    "ztunnel elsewhere": ({"app": "ztunnel", MODE: "ambient"}, OUTSIDE, ON, False, 1),
    "ztunnel": ({"app": "ztunnel", MODE: "ambient"}, OUTSIDE, {**ON, "system_namespace": "shop"}, True, 1),
}


@pytest.mark.parametrize(("labels", "its_namespace", "changes", "passes", "requests"), AMBIENT.values(), ids=AMBIENT)
def test_ambient_mode(
    run_dir: Path,
    netns: str,
    authority: Authority,
    tls: Any,
    labels: dict[str, str],
    its_namespace: dict[str, Any],
    changes: dict[str, Any],
    passes: bool,
    requests: int,
) -> None:
    with ApiDouble(tls, objects(pod(labels=labels), its_namespace)) as api:
        done = ask(run_dir, netns, authority, api, **changes)
    if passes:
        assert_passes(done)
    else:
        assert_waits(done, "An enablement selector takes it into ambient mode.")
    assert [one.path for one in api.asked] == ["/api/v1/namespaces/shop/pods/web", "/api/v1/namespaces/shop"][:requests]


def test_a_namespace_that_cannot_be_read(run_dir: Path, netns: str, authority: Authority, tls: Any) -> None:
    with ApiDouble(tls, objects(pod())) as api:
        assert_waits(ask(run_dir, netns, authority, api, **ON), "answered 404 to 'get namespaces/shop'")


# --- answers that do not count ----------------------------------------------------------------------------------------

POD = json.dumps(pod()).encode()
NOT_FOR_US: dict[str, tuple[Handler, str]] = {
    "401": (says(status(401, "Unauthorized")), "answered 401 to 'get namespaces/shop/pods/web': Unauthorized"),
    "401 says why": (says(status(401)), "the token in the kubeconfig counts until the agent's pod is deleted"),
    "403": (
        says(status(403, "pods is forbidden")),
        "answered 403 to 'get namespaces/shop/pods/web': pods is forbidden",
    ),
    "403 says what to look at": (says(status(403)), "may the agent's service account get pods and namespaces?"),
    "404": (objects(), "answered 404"),
    "429": (says(status(429)), "answered 429"),
    "500": (says(http(500, b"")), "answered 500"),
    "503 in HTML": (says(http(503, b"<html>")), "answered 503"),
    "redirection": (says(http(302, b"", "Location: https://127.0.0.1/", "Content-Length: 0")), "answered 302"),
    "nothing": (says(b""), "not HTTP"),
    "not HTTP": (says(b"SSH-2.0-x\r\n\r\n"), "not HTTP"),
    "HTTP/2": (says(http(200, POD, version="HTTP/2")), "not HTTP"),
    "half a head": (says(b"HTTP/1.1 200 OK\r\nContent-"), "not HTTP"),
    "no status": (says(b"HTTP/1.1 abc OK\r\n\r\n" + POD), "not HTTP"),
    "half a body": (
        says(http(200, POD, f"Content-Length: {len(POD) + 1}")),
        f"gave {len(POD)} of {len(POD) + 1} bytes",
    ),
    "too long a body": (says(http(200, POD, "Content-Length: 2")), "of 2 bytes"),
    "half a body, no length": (says(http(200, POD[:-1], "Date: x")), "not JSON"),
    "length that is none": (says(http(200, POD, "Content-Length: -1")), "of -1 bytes"),
    "half of the chunks": (says(http(200, b"5\r\n" + POD[:5] + b"\r\n", "Transfer-Encoding: chunked")), "only a part"),
    "a chunk too short": (says(http(200, b"ff\r\nxx\r\n0\r\n\r\n", "Transfer-Encoding: chunked")), "only a part"),
    "a chunk without a size": (says(http(200, b"\r\nxx\r\n0\r\n\r\n", "Transfer-Encoding: chunked")), "only a part"),
    "not JSON": (says(http(200, b"<html>")), "not JSON"),
    "not UTF-8": (says(http(200, b'{"kind":"\xff"}')), "not JSON"),
    "empty": (says(http(200, b"")), "not JSON"),
    "a list": (says(http(200, b"[]")), "no JSON object"),
    "deep": (says(http(200, b"[" * 100_000)), "not JSON"),
    "another kind": (says(http(200, json.dumps(pod() | {"kind": "Service"}).encode())), "something else"),
    "another name": (says(http(200, json.dumps(pod("other")).encode())), "something else"),
    "no metadata": (says(http(200, b'{"kind":"Pod"}')), "something else"),
    "another namespace": (says(http(200, json.dumps(pod(namespace="mall")).encode())), "knows another pod mall/web"),
    "another UID": (objects(pod(uid="uid-2")), "its UID is uid-2, the runtime's is uid-1"),
    "no UID": (objects(pod(uid="")), "knows another pod"),
    "a field of a wrong type": (objects(pod(labels={"a": 1})), "metadata.labels[a] is 1, expected a string"),
    "too large": (says(http(200, b'"' + b"x" * (9 << 20))), "more than 8388608 bytes"),
}


@pytest.mark.parametrize(("handler", "words"), NOT_FOR_US.values(), ids=NOT_FOR_US)
def test_an_answer_that_does_not_count(
    run_dir: Path, netns: str, authority: Authority, tls: Any, handler: Handler, words: str
) -> None:
    with ApiDouble(tls, handler) as api:
        assert_waits(ask(run_dir, netns, authority, api, agent_wait_seconds=0.1), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ambient_enabled": ...}, "does not say which pods are for ambient mode"),
        ({"ambient_enabled": True, "enablement_selectors": ...}, "does not say which pods are for ambient mode"),
        ({**ON, "enablement_selectors": [{"podSelectors": {}}]}, "has the unknown field 'podSelectors'"),
        (
            {**ON, "enablement_selectors": [{"podSelector": {"matchExpressions": [{"key": "a", "operator": "Like"}]}}]},
            "operator is 'Like'",
        ),
        ({**ON, "enablement_selectors": [{"podSelector": {"matchLabels": {"-": "x"}}}]}, "'-' is no label key"),
    ],
)
def test_a_conf_that_does_not_tell(
    run_dir: Path, netns: str, authority: Authority, tls: Any, changes: dict[str, Any], words: str
) -> None:
    with ApiDouble(tls, objects(pod(labels={MODE: "ambient"}))) as api:
        assert_waits(ask(run_dir, netns, authority, api, **{**changes, "agent_wait_seconds": 0.1}), words)


def test_a_runtime_that_does_not_say_the_uid(run_dir: Path, netns: str, authority: Authority, tls: Any) -> None:
    environ = variables(netns=netns) | {"CNI_ARGS": "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web"}
    with ApiDouble(tls, objects(pod())) as api:
        api.write_kubeconfig(run_dir, authority.pem)
        done = run(environ, conf(run_dir, **OFF))
    assert_waits(done, "the runtime does not say the pod's UID")
    assert api.connections == 0


@pytest.mark.parametrize("name", ["../../nodes", "web/log", "web?x", "web x", "Web", "web\r\nX: y", "web%2f", "é", "."])
def test_a_name_that_would_be_another_request(
    run_dir: Path, netns: str, authority: Authority, tls: Any, name: str
) -> None:
    with ApiDouble(tls, objects(pod())) as api:
        api.write_kubeconfig(run_dir, authority.pem)
        done = run(variables(netns=netns, name=name), conf(run_dir, **{**OFF, "agent_wait_seconds": 0.1}))
    assert_waits(done, "names nothing that it could know")
    assert api.connections == 0


def test_the_uid_of_a_static_pod(run_dir: Path, netns: str, authority: Authority, tls: Any) -> None:
    mirror = pod(uid="of-the-api", annotations={"kubernetes.io/config.mirror": "uid-1"})
    with ApiDouble(tls, objects(mirror)) as api:
        assert_passes(ask(run_dir, netns, authority, api))


# --- asking again -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first", [status(403), status(401), status(404), status(503), b"", b"garbage"], ids=lambda data: str(data[9:12])
)
def test_it_asks_again_after_a_refusal(run_dir: Path, netns: str, authority: Authority, tls: Any, first: bytes) -> None:
    """An API server that has just started refuses everybody for a second."""
    with ApiDouble(tls, in_turn(says(first), says(first), objects(pod()))) as api:
        assert_passes(ask(run_dir, netns, authority, api, agent_wait_seconds=60))
    assert len(api.asked) == 3


def test_the_token_is_read_again(run_dir: Path, netns: str, authority: Authority, tls: Any) -> None:
    def renew(connection: socket.socket, _: str) -> None:
        api.write_kubeconfig(run_dir, authority.pem, "a-newer-token")
        connection.sendall(status(401))

    with ApiDouble(tls, in_turn(renew, objects(pod()))) as api:
        assert_passes(ask(run_dir, netns, authority, api, agent_wait_seconds=60))
    assert [one.token for one in api.asked] == [TOKEN, "a-newer-token"]


def test_it_stops_asking(run_dir: Path, netns: str, authority: Authority, tls: Any) -> None:
    """A few times in ten seconds, however long the ADD waits."""
    with ApiDouble(tls, says(status(403))) as api:
        assert_waits(ask(run_dir, netns, authority, api, agent_wait_seconds=14), "answered 403")
    assert 4 <= len(api.asked) <= 6


def test_a_slow_answer(run_dir: Path, netns: str, authority: Authority, tls: Any) -> None:
    def slowly(connection: socket.socket, _: str) -> None:
        for byte in http(200, POD):
            connection.sendall(bytes([byte]))
            time.sleep(0.002)

    with ApiDouble(tls, slowly) as api:
        assert_passes(ask(run_dir, netns, authority, api))


CHUNKED = b"".join(f"{len(part):x};ext=1\r\n".encode() + part + b"\r\n" for part in (POD[:7], POD[7:])) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        http(200, CHUNKED, "Transfer-Encoding: chunked"),
        http(200, POD, "Date: x"),
        http(200, POD, version="HTTP/1.0"),
        http(200, json.dumps(pod(managedFields=[{"x": "y" * 100}] * 5000)).encode()),
    ],
    ids=["chunked", "no length", "HTTP/1.0", "half a megabyte"],
)
def test_forms_of_an_answer(run_dir: Path, netns: str, authority: Authority, tls: Any, answer: bytes) -> None:
    with ApiDouble(tls, says(answer)) as api:
        assert_passes(ask(run_dir, netns, authority, api))


def test_twenty_at_once(run_dir: Path, netns: str, authority: Authority, tls: Any) -> None:
    with ApiDouble(tls, objects(pod())) as api:
        api.write_kubeconfig(run_dir, authority.pem)
        stdin = conf(run_dir, **{**OFF, "agent_wait_seconds": 60})
        for done in list(map(outcome, [start(variables(netns=netns), stdin) for _ in range(20)])):
            assert_passes(done)


# --- who the server is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_one_version_of_tls(run_dir: Path, netns: str, authority: Authority, version: ssl.TLSVersion) -> None:
    with ApiDouble(authority.server(version=version), objects(pod())) as api:
        assert_passes(ask(run_dir, netns, authority, api))


def test_ipv6(run_dir: Path, netns: str, authority: Authority, tls: Any) -> None:
    with ApiDouble(tls, objects(pod()), host="::1") as api:
        assert_passes(ask(run_dir, netns, authority, api))
    assert api.asked[0].fields["host"] == f"[::1]:{api.port}"


def test_an_authority_between(run_dir: Path, netns: str, authority: Authority) -> None:
    """The server sends it along; or the kubeconfig has nothing but it, which Go's clients accept too."""
    between = Authority("between", parent=authority)
    for ca, chain in ((authority, between.pem), (between, b"")):
        with ApiDouble(between.server(chain=chain), objects(pod())) as api:
            assert_passes(ask(run_dir, netns, ca, api))


def test_several_authorities(run_dir: Path, netns: str, authority: Authority, tls: Any) -> None:
    with ApiDouble(tls, objects(pod())) as api:
        api.write_kubeconfig(run_dir, Authority("other").pem + b"a comment\n" + authority.pem)
        assert_passes(add(run_dir, netns))


UNTRUSTED: dict[str, tuple[dict[str, Any], str]] = {
    "expired": ({"end": -DAY / 2}, "certificate has expired"),
    "not yet valid": ({"begin": DAY / 2}, "not yet valid"),
    "another address": ({"names": ("127.0.0.2", "api.example.test")}, "IP address mismatch"),
    "address as a name": ({"names": ("127.0.0.1.nip.test",)}, "IP address mismatch"),
    "common name only": ({"names": (), "common_name": "127.0.0.1"}, "IP address mismatch"),
    "for clients": ({"usage": ExtendedKeyUsageOID.CLIENT_AUTH}, "purpose"),
}


@pytest.mark.parametrize(("how", "words"), UNTRUSTED.values(), ids=UNTRUSTED)
def test_a_certificate_that_proves_nothing(
    run_dir: Path, netns: str, authority: Authority, how: dict[str, Any], words: str
) -> None:
    with ApiDouble(authority.server(**how), objects(pod())) as api:
        done = ask(run_dir, netns, authority, api, agent_wait_seconds=0.1)
    assert_waits(done, "could not be asked safely", "certificate is not accepted", words)
    assert api.asked == []


def test_another_authority(run_dir: Path, netns: str, authority: Authority) -> None:
    with ApiDouble(Authority().server(), objects(pod())) as api:
        done = ask(run_dir, netns, authority, api, agent_wait_seconds=0.1)
    assert_waits(done, "could not be asked safely", "anew when it starts")
    assert api.asked == []  # and so the token went to nobody


def test_a_certificate_that_signed_itself(run_dir: Path, netns: str, authority: Authority) -> None:
    stranger = Authority("server")
    with ApiDouble(stranger.server(), objects(pod())) as api:
        assert_waits(ask(run_dir, netns, authority, api, agent_wait_seconds=0.1), "could not be asked safely")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            b"HTTP/1.1 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n",
            "TLS could not be agreed",
        ),
        (b"\x15\x03\x01\x00\x02\x02\x28", "TLS could not be agreed on"),
        (b"", "TLS could not be agreed on"),
    ],
    ids=["HTTP", "alert", "end"],
)
def test_a_server_without_tls(run_dir: Path, netns: str, authority: Authority, answer: bytes, words: str) -> None:
    with ApiDouble(None, says(answer)) as api:
        assert_waits(ask(run_dir, netns, authority, api, agent_wait_seconds=0.1), words)


@pytest.mark.parametrize("has_tls", [True, False])
def test_a_server_that_hangs(run_dir: Path, netns: str, authority: Authority, tls: Any, has_tls: bool) -> None:
    with ApiDouble(tls if has_tls else None) as api:
        api.handler = api.hang
        assert_waits(ask(run_dir, netns, authority, api), "did not answer within 3.0 s")


def test_nobody_listens(run_dir: Path, netns: str, authority: Authority, tls: Any) -> None:
    with ApiDouble(tls) as api:
        api.write_kubeconfig(run_dir, authority.pem)
    assert_waits(add(run_dir, netns), f"could not be asked: 127.0.0.1:{api.port}: Connection refused")


# --- the kubeconfig ---------------------------------------------------------------------------------------------------

GOOD = (
    "clusters:\n- cluster:\n    certificate-authority-data: Q0E=\n    server: https://127.0.0.1:1\nuser:\n  token: t\n"
)
KUBECONFIGS = {
    "empty": ("", "has no 'server'"),
    "binary": ("\0\1\2" * 100, "has no 'server'"),
    "no token": (GOOD.replace("  token: t", ""), "has no 'token'"),
    "an empty token": (GOOD.replace("token: t", "token: "), "has no 'token'"),
    "a token that would be a header": (GOOD.replace("token: t", 'token: "a\\r\\nb: c"'), "that no token has"),
    "verification switched off": (
        GOOD.replace("certificate-authority-data: Q0E=", "insecure-skip-tls-verify: true"),
        "no 'certificate-authority-data' to know the server by",
    ),
    "http": (GOOD.replace("https:", "http:"), "not https"),
    "no port": (GOOD.replace(":1\n", ":\n"), "not https://HOST:PORT"),
    "port 0": (GOOD.replace(":1\n", ":0\n"), "not https://HOST:PORT"),
    "a path": (GOOD.replace(":1\n", ":1/k8s/clusters/c\n"), "not https://HOST:PORT"),
    "half a bracket": (GOOD.replace("127.0.0.1", "[::1"), "not https://HOST:PORT"),
    "too large": (GOOD + "x" * (2 << 20), "too large"),
}


@pytest.mark.parametrize(("text", "words"), KUBECONFIGS.values(), ids=KUBECONFIGS)
def test_a_kubeconfig_that_is_of_no_use(run_dir: Path, netns: str, text: str, words: str) -> None:
    (run_dir / "istio-cni-kubeconfig").write_text(text)
    assert_waits(add(run_dir, netns, agent_wait_seconds=0.1), words)


@pytest.mark.parametrize("data", ["Q0E=", "!!!!", "Q", "", "A" * 100_000])
def test_authorities_that_are_none(run_dir: Path, netns: str, tls: Any, data: str) -> None:
    with ApiDouble(tls, objects(pod())) as api:
        text = GOOD.replace("Q0E=", data).replace(":1\n", f":{api.port}\n")
        (run_dir / "istio-cni-kubeconfig").write_text(text)
        done = add(run_dir, netns, agent_wait_seconds=0.1)
    assert_waits(done, "the authorities are no certificates" if data else "to know the server by")


@pytest.mark.parametrize("kind", ["none", "directory", "fifo", "loop"])
def test_no_kubeconfig(run_dir: Path, netns: str, kind: str) -> None:
    path = run_dir / "istio-cni-kubeconfig"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    done = add(run_dir, netns, agent_wait_seconds=0.1)
    assert_waits(done, "istio-cni-kubeconfig")
