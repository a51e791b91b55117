"""What a runtime may say, and the CNI error code for each way to say it wrongly."""

from __future__ import annotations

import json
from typing import Any

import pytest

from meshcni.cni.spec import (
    MAX_STDIN_BYTES,
    Request,
    check_environment,
    error_text,
    parse_add,
    parse_args,
    parse_conf,
)
from meshcni.cni.versions import SUPPORTED_VERSIONS, version_text
from meshcni.errors import CniInputError, MeshCniError

ENVIRON = {
    "CNI_COMMAND": "ADD",
    "CNI_CONTAINERID": "abc",
    "CNI_NETNS": "/run/netns/x",
    "CNI_IFNAME": "eth0",
    "CNI_PATH": "/opt/cni/bin",
    "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u-1",
}


def conf(**changes: Any) -> bytes:
    document = {"cniVersion": "1.0.0", "name": "pods", "type": "istio-cni", **changes}
    return json.dumps({key: value for key, value in document.items() if value is not ...}).encode()


def add(stdin: bytes, environ: dict[str, str] = ENVIRON) -> Request:
    command = check_environment(environ)
    version, members = parse_conf(command, stdin)
    return parse_add(environ, version, members)


def test_a_complete_add() -> None:
    request = add(
        conf(
            cni_agent_run_dir="/run/other",
            plugin_log_level="debug",
            exclude_namespaces=["kube-system"],
            pod_namespace="istio-system",
            agent_wait_seconds=3,
            prevResult={"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.2/24"}]},
        )
    )
    assert (request.container_id, request.netns, request.ifname) == ("abc", "/run/netns/x", "eth0")
    assert (request.pod_namespace, request.pod_name, request.pod_uid) == ("shop", "web-0", "u-1")
    assert request.cni_version == "1.0.0"
    assert request.prev_result is not None
    assert request.prev_result.addresses() == ("10.0.0.2/24",)
    assert (request.conf.run_dir, request.conf.log_level) == ("/run/other", "debug")
    assert (request.conf.exclude_namespaces, request.conf.pod_namespace) == (["kube-system"], "istio-system")
    assert request.conf.agent_wait_seconds == 3.0


def test_a_minimal_add() -> None:
    request = add(conf(cniVersion="0.3.1"), {**ENVIRON, "CNI_ARGS": ""})
    assert (request.pod_namespace, request.pod_name, request.pod_uid) == ("", "", "")
    assert request.prev_result is None
    assert (request.conf.run_dir, request.conf.agent_wait_seconds) == ("/var/run/istio-cni", 20.0)
    assert request.conf.exclude_namespaces == []
    assert not request.may_be_own_netns


def test_the_entry_of_the_original_is_understood() -> None:
    original = conf(
        cniVersion="0.3.1",
        name="istio-cni",
        ipam={},
        dns={},
        plugin_log_level="info",
        cni_agent_run_dir="/var/run/istio-cni",
        ambient_enabled=True,
        enablement_selectors=[{"podSelector": {}, "namespaceSelector": {}}],
        exclude_namespaces=None,
        pod_namespace="istio-system",
        native_nftables=False,
        enable_ambient_detection_retry=False,
    )
    assert add(original).conf.exclude_namespaces == []


def test_keys_in_any_case_and_unknown_keys() -> None:
    request = add(b'{"CNIVERSION":"1.0.0","Name":"pods","Exclude_Namespaces":["a"],"future":1,"POD_NAMESPACE":"p"}')
    assert (request.conf.exclude_namespaces, request.conf.pod_namespace) == (["a"], "p")


@pytest.mark.parametrize(
    ("value", "lifted"), [("1", True), ("TRUE", True), ("true", True), ("0", False), ("yes", False)]
)
def test_netns_override(value: str, lifted: bool) -> None:
    assert add(conf(), {**ENVIRON, "CNI_NETNS_OVERRIDE": value}).may_be_own_netns is lifted


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("ADD", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"]),
        ("CHECK", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"]),
        ("GC", ["CNI_PATH"]),
        ("STATUS", ["CNI_PATH"]),
    ],
)
def test_missing_variables_are_named_all(command: str, missing: list[str]) -> None:
    for environ in ({"CNI_COMMAND": command}, {"CNI_COMMAND": command, **dict.fromkeys(missing, "")}):
        with pytest.raises(CniInputError) as caught:
            check_environment(environ)
        assert caught.value.message == f"required env variables [{','.join(missing)}] missing"
        assert caught.value.cni_code == 4


@pytest.mark.parametrize("name", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"])
def test_one_missing_variable_is_named(name: str) -> None:
    environ = {key: value for key, value in ENVIRON.items() if key != name}
    with pytest.raises(CniInputError, match=rf"\[{name}\]"):
        check_environment(environ)


@pytest.mark.parametrize("command", ["add", "RUN", " ADD", "ADD "])
def test_unknown_verbs(command: str) -> None:
    with pytest.raises(CniInputError, match="unknown CNI_COMMAND: ") as caught:
        check_environment({**ENVIRON, "CNI_COMMAND": command})
    assert caught.value.cni_code == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [("CNI_CONTAINERID", bad) for bad in ("-a", ".a", "a/b", "a b", "ä", "a\n", "a\udc80")]
    + [("CNI_IFNAME", bad) for bad in (".", "..", "a/b", "a:b", "a b", " eth0", "eth0\n", "x" * 16, "ä" * 8, "\u00a0")],
)
def test_bad_identifiers(name: str, value: str) -> None:
    with pytest.raises(CniInputError, match=name) as caught:
        check_environment({**ENVIRON, name: value})
    assert caught.value.cni_code == 4


@pytest.mark.parametrize(
    ("name", "value"), [("CNI_CONTAINERID", "A0_.-"), ("CNI_IFNAME", "x" * 15), ("CNI_IFNAME", "...")]
)
def test_good_identifiers(name: str, value: str) -> None:
    assert check_environment({**ENVIRON, name: value}) == "ADD"


@pytest.mark.parametrize(
    ("stdin", "code", "words"),
    [
        (b"", 6, "stdin is empty"),
        (b" \n", 6, "stdin is empty"),
        (b"{", 6, "stdin is not JSON"),
        (b"\xff\xfe", 6, "stdin is not JSON: byte 0 is not UTF-8"),
        (b"[]", 6, "no JSON object"),
        (b"null", 6, "no JSON object"),
        (b'"x"', 6, "no JSON object"),
        (b" " * (MAX_STDIN_BYTES + 1), 6, "more than 1048576 bytes"),
        (conf(name=...), 7, "name of the conf is missing"),
        (conf(name=""), 7, "name of the conf is missing"),
        (conf(name=None), 7, "name of the conf is missing"),
        (conf(name="a b"), 7, "name of the conf is 'a b'"),
        (conf(name="-a"), 7, "name of the conf is '-a'"),
        (conf(name=1), 7, "name of the conf is 1"),
        (conf(cniVersion=1), 7, "cniVersion of the conf is 1"),
        (conf(cniVersion="2.0.0"), 1, "incompatible CNI versions"),
        (conf(cniVersion="1.0"), 1, "incompatible CNI versions"),
        (conf(type=[]), 7, "type of the conf"),
        (conf(ipam="x"), 7, "ipam of the conf"),
        (conf(dns=[]), 7, "dns of the conf"),
        (conf(prevResult=[]), 7, "prevResult of the conf"),
        (conf(prevResult="x"), 7, "prevResult of the conf"),
        (conf(prevResult={"ips": 1}), 7, "prevResult.ips"),
        (conf(exclude_namespaces="kube-system"), 7, "exclude_namespaces of the conf"),
        (conf(exclude_namespaces=[1]), 7, "exclude_namespaces of the conf"),
        (conf(ambient_enabled="true"), 7, "ambient_enabled of the conf"),
        (conf(ambient_enabled=1), 7, "ambient_enabled of the conf"),
        (conf(plugin_log_level=True), 7, "plugin_log_level of the conf"),
        (conf(cni_agent_run_dir=5), 7, "cni_agent_run_dir of the conf"),
        (conf(cni_agent_run_dir="run"), 7, "cni_agent_run_dir of the conf"),
        (conf(cni_agent_run_dir="/a\0b"), 7, "cni_agent_run_dir of the conf"),
        (conf(cni_agent_run_dir="/" + "x" * 96), 7, "cni_agent_run_dir of the conf"),
        (conf(agent_wait_seconds="20"), 7, "agent_wait_seconds of the conf"),
        (conf(agent_wait_seconds=True), 7, "agent_wait_seconds of the conf"),
        (conf(agent_wait_seconds=-1), 7, "agent_wait_seconds of the conf"),
        (conf(agent_wait_seconds=601), 7, "agent_wait_seconds of the conf"),
        (b'{"cniVersion":"1.0.0","name":"a","agent_wait_seconds":1e999}', 7, "agent_wait_seconds of the conf is 1e999"),
    ],
)
def test_bad_confs(stdin: bytes, code: int, words: str) -> None:
    with pytest.raises(CniInputError) as caught:
        add(stdin)
    assert words in caught.value.message
    assert caught.value.cni_code == code
    assert caught.value.hint


def test_a_bad_version_says_what_is_supported() -> None:
    with pytest.raises(CniInputError) as caught:
        add(conf(cniVersion="2.0.0"))
    assert caught.value.hint == 'config is "2.0.0", plugin supports [0.1.0 0.2.0 0.3.0 0.3.1 0.4.0 1.0.0 1.1.0]'


@pytest.mark.parametrize("version", [..., None, "", *SUPPORTED_VERSIONS])
def test_versions_of_add(version: object) -> None:
    assert add(conf(cniVersion=version)).cni_version == (version if version in SUPPORTED_VERSIONS else "0.1.0")


@pytest.mark.parametrize(("command", "since"), [("CHECK", "0.4.0"), ("GC", "1.1.0"), ("STATUS", "1.1.0")])
@pytest.mark.parametrize("version", SUPPORTED_VERSIONS)
def test_versions_of_the_other_verbs(command: str, since: str, version: str) -> None:
    if SUPPORTED_VERSIONS.index(version) >= SUPPORTED_VERSIONS.index(since):
        assert parse_conf(command, conf(cniVersion=version))[0] == version
    else:
        with pytest.raises(CniInputError, match=f"config version does not allow {command}") as caught:
            parse_conf(command, conf(cniVersion=version))
        assert caught.value.cni_code == 1


@pytest.mark.parametrize(
    ("text", "args"),
    [
        ("", {}),
        ("K8S_POD_NAME=a", {"K8S_POD_NAME": "a"}),
        ("K8S_POD_NAME=;K8S_POD_UID=u", {"K8S_POD_NAME": "", "K8S_POD_UID": "u"}),
        ("IgnoreUnknown=TRUE;X=1", {"IgnoreUnknown": "TRUE", "X": "1"}),
        ("X=1;IgnoreUnknown=1", {"X": "1", "IgnoreUnknown": "1"}),
    ],
)
def test_args(text: str, args: dict[str, str]) -> None:
    assert parse_args(text) == args


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (";", 'invalid pair ""'),
        ("K8S_POD_NAME=a;", 'invalid pair ""'),
        ("K8S_POD_NAME", 'invalid pair "K8S_POD_NAME"'),
        ("K8S_POD_NAME=a=b", 'invalid pair "K8S_POD_NAME=a=b"'),
        ("X=1", "unknown args ['X']"),
        ("IgnoreUnknown=0;X=1", "unknown args ['X']"),
        ("k8s_pod_name=a", "unknown args ['k8s_pod_name']"),
        ("IgnoreUnknown=maybe", 'IgnoreUnknown is "maybe"'),
    ],
)
def test_bad_args(text: str, words: str) -> None:
    with pytest.raises(CniInputError) as caught:
        parse_args(text)
    assert words in caught.value.message
    assert caught.value.cni_code == 4


def test_version_text() -> None:
    assert json.loads(version_text()) == {"cniVersion": "1.1.0", "supportedVersions": list(SUPPORTED_VERSIONS)}
    assert version_text().endswith("}\n")


def test_error_text() -> None:
    assert error_text(CniInputError(7, "what", "next"), "0.4.0") == (
        '{\n    "cniVersion": "0.4.0",\n    "code": 7,\n    "msg": "what",\n    "details": "next"\n}'
    )
    assert "details" not in json.loads(error_text(MeshCniError("what")))
