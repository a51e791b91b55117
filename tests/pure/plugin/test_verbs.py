"""Verbs, answers and the order of effects, without a process."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.pure.plugin.doubles import RecordedEffects

from meshcni.errors import AgentUnavailableError
from meshcni.plugin.verbs import run
from meshcni.protocols.podadd import accepted, decode_request, encode_reply, refused

PREV_RESULT = {"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.2/24"}]}
RESULT = {"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.2/24"}]}


def environ(command: str = "ADD", namespace: str = "shop", name: str = "web", **changes: str) -> dict[str, str]:
    variables = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": "abc",
        "CNI_NETNS": "/run/netns/pod",
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin",
        "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_UID=u",
    }
    return {**variables, **changes}


def conf(**changes: Any) -> bytes:
    document = {
        "cniVersion": "1.0.0",
        "name": "pods",
        "type": "istio-cni",
        "exclude_namespaces": ["kube-system"],
        "pod_namespace": "istio-system",
        "prevResult": PREV_RESULT,
        **changes,
    }
    return json.dumps(document).encode()


def error(answer: tuple[int, str]) -> dict[str, Any]:
    assert answer[0] == 1
    value = json.loads(answer[1])
    assert isinstance(value, dict)
    assert {"cniVersion", "code", "msg"} <= set(value) <= {"cniVersion", "code", "msg", "details"}
    return value


@pytest.mark.parametrize("variables", [{}, {"CNI_NETNS": "/gone"}, {"CNI_ARGS": "broken"}])
def test_del_looks_at_nothing(variables: dict[str, str]) -> None:
    effects = RecordedEffects(stdin=b"broken")
    assert run({"CNI_COMMAND": "DEL", **variables}, effects) == (0, "")
    assert effects.done == []


def test_version_looks_at_nothing() -> None:
    effects = RecordedEffects()
    status, text = run({"CNI_COMMAND": "VERSION"}, effects)
    assert status == 0
    assert json.loads(text)["cniVersion"] == "1.1.0"
    assert effects.done == []


@pytest.mark.parametrize("variables", [{}, {"CNI_COMMAND": ""}])
def test_without_a_command_a_person_is_answered(variables: dict[str, str]) -> None:
    effects = RecordedEffects()
    assert run(variables, effects) == (0, "")
    assert effects.done == ["say"]


@pytest.mark.parametrize("command", ["CHECK", "GC", "STATUS"])
def test_the_other_verbs_need_no_agent(command: str) -> None:
    effects = RecordedEffects(stdin=conf(cniVersion="1.1.0"))
    assert run(environ(command), effects) == (0, "")
    assert effects.done == ["stdin"]


def test_a_pod_is_handed_to_the_agent() -> None:
    effects = RecordedEffects(stdin=conf())
    status, text = run(environ(), effects)
    assert (status, json.loads(text)) == (0, RESULT)
    assert effects.done == ["stdin", "netns", "agent"]
    request = decode_request(effects.messages[0])
    assert (request.pod_namespace, request.pod_name, request.pod_uid) == ("shop", "web", "u")
    assert (request.cni_version, request.container_id, request.ifname) == ("1.0.0", "abc", "eth0")
    assert (request.netns, request.ips) == ("/run/netns/pod", ("10.0.0.2/24",))
    assert effects.logged == [("info", "sidecar (injected): ")]


@pytest.mark.parametrize(
    ("namespace", "name"), [("kube-system", "dns"), ("istio-system", "istio-cni-node-x"), ("", ""), ("shop", "")]
)
def test_what_is_decided_alone_touches_neither_netns_nor_agent(namespace: str, name: str) -> None:
    effects = RecordedEffects(stdin=conf(), netns_paths=())
    status, text = run(environ(namespace=namespace, name=name), effects)
    assert (status, json.loads(text)) == (0, RESULT)
    assert effects.done == ["stdin"]


def test_without_prev_result() -> None:
    effects = RecordedEffects(stdin=conf(cniVersion="0.3.1", prevResult=None))
    status, text = run(environ(), effects)
    assert (status, json.loads(text)) == (0, {"cniVersion": "0.3.1", "dns": {}})
    assert decode_request(effects.messages[0]).ips == ()


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0"])
def test_a_result_that_cannot_be_expressed_changes_no_pod(version: str) -> None:
    effects = RecordedEffects(stdin=conf(cniVersion=version, prevResult=None))
    answer = error(run(environ(), effects))
    assert answer["code"] == 7
    assert "prevResult" in answer["msg"]
    assert effects.done == ["stdin"]


@pytest.mark.parametrize("verdict", ["sidecar", "ambient", "skip"])
def test_every_verdict_lets_the_pod_start(verdict: str) -> None:
    effects = RecordedEffects(stdin=conf(), reply=encode_reply(accepted(verdict, "r", "m")))
    assert run(environ(), effects)[0] == 0


@pytest.mark.parametrize("code", [4, 7, 11, 100])
def test_a_refusal_is_the_answer(code: int) -> None:
    effects = RecordedEffects(stdin=conf(cniVersion="0.4.0"), reply=encode_reply(refused(code, "what", "next")))
    assert error(run(environ(), effects)) == {"cniVersion": "0.4.0", "code": code, "msg": "what", "details": "next"}
    assert effects.logged == [("error", f"code {code}: what (next)")]


def test_no_agent_is_code_11_with_a_hint() -> None:
    effects = RecordedEffects(stdin=conf(), reply=AgentUnavailableError("nobody", "do this"))
    answer = error(run(environ(), effects))
    assert (answer["code"], answer["details"]) == (11, "do this")


def test_an_uninstalled_agent_lets_pods_start_with_a_warning() -> None:
    effects = RecordedEffects(stdin=conf(), reply="the node agent was uninstalled")
    assert run(environ(), effects)[0] == 0
    assert [level for level, _ in effects.logged] == ["warn"]


@pytest.mark.parametrize("reply", [b"{", b"[]", b'{"version":2,"ok":true}', b'{"version":1,"ok":true}', b"x" * 70000])
def test_a_reply_that_is_none_never_lets_a_pod_start(reply: bytes) -> None:
    answer = error(run(environ(), RecordedEffects(stdin=conf(), reply=reply)))
    assert answer["code"] == 5
    assert answer["details"]


def test_a_missing_netns_is_code_4_and_names_the_path() -> None:
    effects = RecordedEffects(stdin=conf())
    answer = error(run(environ(CNI_NETNS="/run/netns/gone"), effects))
    assert answer["code"] == 4
    assert "/run/netns/gone" in answer["msg"]
    assert "agent" not in effects.done


def test_the_own_netns_is_refused_unless_overridden() -> None:
    effects = RecordedEffects(stdin=conf(), own_netns=True)
    answer = error(run(environ(), effects))
    assert answer["code"] == 4
    assert effects.done == ["stdin", "netns"]
    assert run(environ(CNI_NETNS_OVERRIDE="1"), RecordedEffects(stdin=conf(), own_netns=True))[0] == 0


@pytest.mark.parametrize("fault", [KeyError("x"), RecursionError("deep"), MemoryError(), ValueError("embedded null")])
def test_a_fault_of_ours_is_an_answer_with_code_999(fault: Exception) -> None:
    answer = error(run(environ(), RecordedEffects(stdin=conf(), reply=fault)))
    assert answer["code"] == 999
    assert type(fault).__name__ in answer["msg"]
