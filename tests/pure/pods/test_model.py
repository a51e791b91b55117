"""Pods and namespaces, projected from the API's JSON."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.errors import PodSpecError
from meshcni.pods.model import (
    Address,
    Container,
    Namespace,
    Pod,
    namespace_from_object,
    pod_addresses,
    pod_from_object,
)

WHOLE: dict[str, Any] = {
    "kind": "Pod",
    "metadata": {
        "namespace": "shop",
        "name": "cart-0",
        "uid": "u-1",
        "labels": {"app": "cart"},
        "annotations": {"sidecar.istio.io/status": "{}"},
        "resourceVersion": "42",
        "deletionTimestamp": "2026-01-01T00:00:00Z",
    },
    "spec": {
        "nodeName": "node-1",
        "serviceAccountName": "cart",
        "runtimeClassName": "gvisor",
        "hostNetwork": True,
        "securityContext": {"runAsUser": 1000, "runAsGroup": 2000},
        "initContainers": [{"name": "first", "args": ["a"]}],
        "containers": [
            {
                "name": "istio-proxy",
                "args": ["proxy", "sidecar"],
                "env": [
                    {"name": "A", "value": "1"},
                    {"name": "B"},
                    {"name": "C", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                    {"name": "A", "value": "2"},
                ],
                "securityContext": {"runAsUser": 1337, "runAsGroup": 0},
            }
        ],
    },
    "status": {
        "phase": "Running",
        "podIP": "10.0.0.1",
        "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
        "initContainerStatuses": [{"name": "first", "containerID": "containerd://aa"}],
        "containerStatuses": [{"name": "istio-proxy", "containerID": "containerd://bb"}],
        "ephemeralContainerStatuses": [{"name": "debug", "containerID": "containerd://cc"}],
    },
}


def test_a_whole_pod() -> None:
    assert pod_from_object(WHOLE) == Pod(
        namespace="shop",
        name="cart-0",
        uid="u-1",
        node_name="node-1",
        labels={"app": "cart"},
        annotations={"sidecar.istio.io/status": "{}"},
        host_network=True,
        containers=(
            Container("first", is_init=True, args=("a",)),
            Container(
                "istio-proxy",
                args=("proxy", "sidecar"),
                env={"A": "2", "B": ""},
                env_from_elsewhere=frozenset({"C"}),
                run_as_user=1337,
                run_as_group=0,
            ),
        ),
        run_as_user=1000,
        run_as_group=2000,
        ips=("10.0.0.1", "fd00::1"),
        phase="Running",
        terminating=True,
        resource_version="42",
        service_account="cart",
        runtime_class="gvisor",
        container_ids=frozenset({"aa", "bb", "cc"}),
    )


NULLS = {
    "metadata": {"name": "a", "labels": None, "annotations": None, "deletionTimestamp": None, "namespace": None},
    "spec": {
        "hostNetwork": None,
        "serviceAccountName": None,
        "runtimeClassName": None,
        "securityContext": None,
        "initContainers": None,
        "containers": [{"name": "c", "args": None, "env": None, "securityContext": {"runAsUser": None}}],
    },
    "status": None,
}


@pytest.mark.parametrize("obj", [{}, {"metadata": None, "spec": None, "status": None}])
def test_an_empty_pod(obj: dict[str, Any]) -> None:
    assert pod_from_object(obj) == Pod("", "")


def test_null_is_absent() -> None:
    assert pod_from_object(NULLS) == Pod("", "a", containers=(Container("c"),))


@pytest.mark.parametrize(
    ("entries", "literal", "elsewhere"),
    [
        ([{"name": "A", "value": "1"}, {"name": "A", "valueFrom": {}}], {}, {"A"}),
        ([{"name": "A", "valueFrom": {}}, {"name": "A", "value": "1"}], {"A": "1"}, set()),
    ],
)
def test_of_a_variable_given_twice_the_last_one_counts(
    entries: list[Any], literal: dict[str, str], elsewhere: set[str]
) -> None:
    (container,) = pod_from_object({"spec": {"containers": [{"name": "c", "env": entries}]}}).containers
    assert dict(container.env) == literal
    assert container.env_from_elsewhere == elsewhere


@pytest.mark.parametrize(
    ("status", "ips"),
    [
        ({"podIP": "10.0.0.9"}, ("10.0.0.9",)),
        ({"podIP": "10.0.0.9", "podIPs": []}, ("10.0.0.9",)),
        ({"podIP": "10.0.0.9", "podIPs": [{"ip": ""}]}, ("10.0.0.9",)),
        ({"podIP": "10.0.0.9", "podIPs": [{"ip": "10.0.0.8"}]}, ("10.0.0.8",)),
        ({"podIP": "", "podIPs": [{}]}, ()),
    ],
)
def test_the_list_of_addresses_counts_before_the_single_one(status: dict[str, Any], ips: tuple[str, ...]) -> None:
    assert pod_from_object({"status": status}).ips == ips


V4, V6 = IPv4Address("10.0.0.1"), IPv6Address("fd00::1")
ADDRESSES: dict[str, tuple[tuple[str, ...], tuple[Address, ...], tuple[str, ...]]] = {
    "none": ((), (), ()),
    "both families": (("10.0.0.1", "fd00::1"), (V4, V6), ()),
    "IPv4-mapped": (("::ffff:10.0.0.1",), (V4,), ()),
    "one twice": (("10.0.0.1", "::ffff:10.0.0.1", "10.0.0.1"), (V4,), ()),
    "one that is none": (("10.0.0.1", "10.0.0.256", "fd00::1", "x"), (V4, V6), ("10.0.0.256", "x")),
    "with a zone": (("fe80::1%eth0",), (), ("fe80::1%eth0",)),
    "with a prefix": (("10.0.0.1/24",), (), ("10.0.0.1/24",)),
}


@pytest.mark.parametrize(("ips", "good", "bad"), ADDRESSES.values(), ids=ADDRESSES)
def test_addresses(ips: tuple[str, ...], good: tuple[Address, ...], bad: tuple[str, ...]) -> None:
    assert pod_addresses(Pod("a", "b", ips=ips)) == (good, bad)


@pytest.mark.parametrize(
    ("status", "ids"),
    [
        ({"containerID": "cri-o://ab12"}, {"ab12"}),
        ({"containerID": "docker://ab12"}, {"ab12"}),
        ({"containerID": ""}, set()),
        ({"containerID": None}, set()),
        ({}, set()),
        ({"containerID": "ab12"}, set()),
        ({"containerID": "containerd://"}, set()),
        ({"containerID": "containerd://a/b"}, set()),
        ({"containerID": "containerd://../x\n"}, set()),
        ({"containerID": 5}, set()),
        ("x", set()),
    ],
)
def test_ids_of_containers(status: Any, ids: set[str]) -> None:
    listed = [{"containerID": "containerd://good"}, status]
    assert pod_from_object({"status": {"containerStatuses": listed}}).container_ids == {"good"} | ids


@pytest.mark.parametrize("listed", [None, [], "x", {"containerID": "containerd://a"}])
def test_statuses_that_are_no_list_name_no_container(listed: Any) -> None:
    assert pod_from_object({"status": {"containerStatuses": listed}}).container_ids == frozenset()


@pytest.mark.parametrize(
    ("phase", "ended"),
    [("Succeeded", True), ("Failed", True), ("Running", False), ("Pending", False), ("Unknown", False), ("", False)],
)
def test_phases_that_are_the_end(phase: str, ended: bool) -> None:
    assert Pod("a", "b", phase=phase, terminating=True).has_terminated is ended


def test_the_last_proxy_container_counts() -> None:
    pod = pod_from_object(
        {"spec": {"containers": [{"name": "istio-proxy", "args": ["x"]}], "initContainers": [{"name": "istio-proxy"}]}}
    )
    assert pod.proxy == Container("istio-proxy", args=("x",))
    assert Pod("a", "b").proxy is None


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "metadata": ({"metadata": []}, "metadata is [], expected an object"),
    "name": ({"metadata": {"name": 1}}, "metadata.name is 1, expected a string"),
    "label": ({"metadata": {"labels": {"a": True}}}, "metadata.labels[a] is True, expected a string"),
    "annotations": ({"metadata": {"annotations": "x"}}, "metadata.annotations is 'x', expected an object"),
    "annotation": ({"metadata": {"annotations": {"p": 80}}}, "metadata.annotations[p] is 80, expected a string"),
    "host network": ({"spec": {"hostNetwork": "true"}}, "spec.hostNetwork is 'true', expected true or false"),
    "service account": ({"spec": {"serviceAccountName": 1}}, "spec.serviceAccountName is 1, expected a string"),
    "runtime class": ({"spec": {"runtimeClassName": []}}, "spec.runtimeClassName is [], expected a string"),
    "containers": ({"spec": {"containers": {}}}, "spec.containers is {}, expected a list"),
    "container": ({"spec": {"containers": ["x"]}}, "spec.containers[0] is 'x', expected an object"),
    "env": (
        {"spec": {"initContainers": [{}, {"env": [{}, {"value": 5}]}]}},
        "spec.initContainers[1].env[1].value is 5, expected a string",
    ),
    "argument": ({"spec": {"containers": [{"args": ["a", 1]}]}}, "spec.containers[0].args[1] is 1, expected a string"),
    "user": (
        {"spec": {"containers": [{"securityContext": {"runAsUser": "0"}}]}},
        "spec.containers[0].securityContext.runAsUser is '0', expected an integer",
    ),
    "user that is a boolean": (
        {"spec": {"securityContext": {"runAsUser": True}}},
        "spec.securityContext.runAsUser is True, expected an integer",
    ),
    "negative user": (
        {"spec": {"securityContext": {"runAsGroup": -1}}},
        "spec.securityContext.runAsGroup is -1, expected an id from 0 to 4294967294",
    ),
    "address": ({"status": {"podIPs": [{"ip": 1}]}}, "status.podIPs[0].ip is 1, expected a string"),
}


@pytest.mark.parametrize(("obj", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_type_names_the_field(obj: dict[str, Any], message: str) -> None:
    with pytest.raises(PodSpecError) as caught:
        pod_from_object(obj)
    assert caught.value.message == message


def test_an_unquoted_annotation_gets_a_hint() -> None:
    with pytest.raises(PodSpecError) as caught:
        pod_from_object({"metadata": {"annotations": {"p": 80}}})
    assert caught.value.hint == "quote the value"


TEXT = st.text(max_size=4)
TEXT.validate()  # hypothesis reads its table of characters now: a pure test may not
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["name", "env", "args", "value", "valueFrom", "securityContext", "runAsUser", "ip", "x", "containerID"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)
FIELDS = st.dictionaries(
    st.sampled_from(
        [
            "name",
            "labels",
            "annotations",
            "containers",
            "initContainers",
            "securityContext",
            "hostNetwork",
            "podIPs",
            "serviceAccountName",
            "runtimeClassName",
            "containerStatuses",
        ]
    ),
    JSON,
    max_size=4,
)


@given(st.dictionaries(st.sampled_from(["metadata", "spec", "status"]), FIELDS | JSON, max_size=3))
def test_any_object_is_a_pod_or_an_error_that_names_a_field(obj: dict[str, Any]) -> None:
    message = ""
    try:
        pod_from_object(obj)
    except PodSpecError as error:
        message = error.message
    assert not message or message.startswith(("metadata", "spec", "status"))


def test_a_namespace() -> None:
    obj = {"metadata": {"name": "shop", "labels": {"istio.io/dataplane-mode": "ambient"}}}
    assert namespace_from_object(obj) == Namespace("shop", {"istio.io/dataplane-mode": "ambient"})
    assert namespace_from_object({"metadata": {"name": "shop"}}) == Namespace("shop")
    with pytest.raises(PodSpecError, match=r"metadata\.labels is 1"):
        namespace_from_object({"metadata": {"labels": 1}})
