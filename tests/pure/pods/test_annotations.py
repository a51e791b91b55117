"""Interception parameters from annotations and the proxy container: every source, default, origin and wrong value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from ipaddress import IPv4Network, ip_network
from typing import Any

import pytest

from meshcni.errors import PodSpecError
from meshcni.pods.annotations import MAX_ITEMS, derive_interception
from meshcni.pods.interception import EVERYTHING, Interception, InterceptionMode, NumberRange
from meshcni.pods.model import Container, Pod

IN = "traffic.sidecar.istio.io/"
MODE = "sidecar.istio.io/interceptionMode"
REROUTE = "istio.io/reroute-virtual-interfaces"
KUBEVIRT = IN + "kubevirtInterfaces"
DNS, DUAL, DROP = "ISTIO_META_DNS_CAPTURE", "ISTIO_DUAL_STACK", "INVALID_DROP"
LOOPBACK, GROUPS = "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR", "ISTIO_OUTBOUND_OWNER_GROUPS"
GROUPS_EXCLUDE = "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE"


def pod(annotations: Mapping[str, str] | None = None, env: Mapping[str, str] | None = None) -> Pod:
    proxy = Container("istio-proxy", env=env or {})
    return Pod("shop", "cart", annotations=annotations or {}, containers=(Container("app"), proxy))


def ports(*numbers: int) -> tuple[NumberRange, ...]:
    return tuple(map(NumberRange.single, numbers))


def test_the_defaults() -> None:
    derived = derive_interception(pod())
    assert derived.interception == Interception(
        mode=InterceptionMode.REDIRECT,
        proxy_port=15001,
        inbound_capture_port=15006,
        inbound_tunnel_port=15008,
        proxy_uids=ports(1337),
        proxy_gids=ports(1337),
        inbound_ports=EVERYTHING,
        inbound_exclude_ports=ports(15020, 15021, 15090),
        outbound_ports=(),
        outbound_exclude_ports=ports(15020),
        outbound_cidrs=EVERYTHING,
        outbound_exclude_cidrs=(),
        exclude_interfaces=(),
        virtual_interfaces=(),
        redirect_dns=False,
        capture_all_dns=False,
        dns_servers=(),
        drop_invalid=False,
        dual_stack=False,
        owner_groups=EVERYTHING,
        owner_groups_exclude=(),
        tproxy_mark=1337,
        tproxy_table=133,
        loopback_cidr=IPv4Network("127.0.0.1/32"),
    )
    assert dict(derived.origins) == {one.name: "default" for one in fields(Interception)}
    assert derived.warnings == ()


ALWAYS = (15020, 15021, 15090)
ANNOTATED: dict[str, tuple[str, str, str, object]] = {  # annotation, its text, the field it decides, the value
    "redirect": (MODE, "REDIRECT", "mode", InterceptionMode.REDIRECT),
    "tproxy": (MODE, "TPROXY", "mode", InterceptionMode.TPROXY),
    "out prefixes": (IN + "includeOutboundIPRanges", "10.1.2.3/8", "outbound_cidrs", (ip_network("10.0.0.0/8"),)),
    "all out prefixes": (IN + "includeOutboundIPRanges", "*", "outbound_cidrs", EVERYTHING),
    "no out prefixes": (IN + "includeOutboundIPRanges", "", "outbound_cidrs", ()),
    "excluded prefixes": (
        IN + "excludeOutboundIPRanges",
        "1.1.1.1/32, fd00::/8,",
        "outbound_exclude_cidrs",
        (ip_network("1.1.1.1/32"), ip_network("fd00::/8")),
    ),
    "no excluded prefixes": (IN + "excludeOutboundIPRanges", "", "outbound_exclude_cidrs", ()),
    "in ports": (IN + "includeInboundPorts", "80, 80,443", "inbound_ports", ports(80, 443)),
    "all in ports": (IN + "includeInboundPorts", "*", "inbound_ports", EVERYTHING),
    "no in ports": (IN + "includeInboundPorts", "", "inbound_ports", ()),
    "excluded in ports": (IN + "excludeInboundPorts", "3306", "inbound_exclude_ports", ports(3306, *ALWAYS)),
    "excluded in ports, one of ours": (
        IN + "excludeInboundPorts",
        " 15021, 22, ",
        "inbound_exclude_ports",
        ports(15021, 22, 15020, 15090),
    ),
    "no excluded in ports": (IN + "excludeInboundPorts", "", "inbound_exclude_ports", ports(*ALWAYS)),
    "out ports": (IN + "includeOutboundPorts", "8080", "outbound_ports", ports(8080)),
    "all out ports": (IN + "includeOutboundPorts", "*", "outbound_ports", EVERYTHING),
    "excluded out ports": (IN + "excludeOutboundPorts", "25,465", "outbound_exclude_ports", ports(25, 465)),
    "no excluded out ports": (IN + "excludeOutboundPorts", "", "outbound_exclude_ports", ()),
    "interfaces": (IN + "excludeInterfaces", "net1, net2", "exclude_interfaces", ("net1", "net2")),
    "no interfaces": (IN + "excludeInterfaces", "", "exclude_interfaces", ()),
    "virtual interfaces": (REROUTE, "vnet0", "virtual_interfaces", ("vnet0",)),
    "virtual interfaces, old name": (KUBEVIRT, "k6t-eth0", "virtual_interfaces", ("k6t-eth0",)),
}


@pytest.mark.parametrize(("annotation", "text", "field", "value"), ANNOTATED.values(), ids=ANNOTATED)
def test_annotation(annotation: str, text: str, field: str, value: Any) -> None:
    derived = derive_interception(pod({annotation: text}))
    assert derived.interception == replace(Interception(), **{field: value})
    assert {name for name, origin in derived.origins.items() if origin != "default"} == {field}
    assert derived.origins[field] == f"annotation {annotation}"


@pytest.mark.parametrize("new", ["vnet0", ""])
def test_the_old_name_counts_only_without_the_new_one(new: str) -> None:
    derived = derive_interception(pod({REROUTE: new, KUBEVIRT: "not looked at!"}))
    assert derived.interception.virtual_interfaces == ((new,) if new else ())


@pytest.mark.parametrize("name", ["status.sidecar.istio.io/port", "traffic.sidecar.istio.io/unknown", "a"])
def test_other_annotations_decide_nothing(name: str) -> None:
    assert derive_interception(pod({name: "no port at all"})).interception == Interception()


REFUSED: dict[str, tuple[str, str, str]] = {  # annotation, its text, what the message says is accepted
    "mode in small letters": (MODE, "tproxy", "write REDIRECT, TPROXY or NONE"),
    "empty mode": (MODE, "", "write REDIRECT, TPROXY or NONE"),
    "mode NONE has no parameters": (MODE, "NONE", "write REDIRECT, TPROXY or NONE"),
    "mode with a blank": (MODE, "TPROXY ", "write REDIRECT, TPROXY or NONE"),
    "out prefix": (IN + "includeOutboundIPRanges", "10.0.0.1", "write ADDRESS/LENGTH"),
    "excluded prefix": (IN + "excludeOutboundIPRanges", "10.0.0.0/33", "write ADDRESS/LENGTH"),
    "excluded star": (IN + "excludeOutboundIPRanges", "*", "'*' cannot be excluded"),
    "in port": (IN + "includeInboundPorts", "http", "write a decimal number from 0 to 65535"),
    "excluded in port": (IN + "excludeInboundPorts", "70000", "write a decimal number from 0 to 65535"),
    "excluded in star": (IN + "excludeInboundPorts", "*", "'*' cannot be excluded"),
    "out port": (IN + "includeOutboundPorts", "80;81", "write a decimal number from 0 to 65535"),
    "excluded out port": (IN + "excludeOutboundPorts", "80,,81", "write ports like 80,443"),
    "excluded out star": (IN + "excludeOutboundPorts", "*", "'*' cannot be excluded"),
    "interface": (IN + "excludeInterfaces", "eth0 eth1", "write at most 15 letters"),
    "virtual interface": (REROUTE, "a-very-long-interface", "write at most 15 letters"),
    "virtual interface, old name": (KUBEVIRT, "1st", "write at most 15 letters"),
}


@pytest.mark.parametrize(("annotation", "text", "form"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_annotation_is_named_with_value_and_form(annotation: str, text: str, form: str) -> None:
    with pytest.raises(PodSpecError) as caught:
        derive_interception(pod({annotation: text}))
    assert caught.value.message.startswith(f"pod shop/cart: annotation {annotation} is {text!r}: ")
    assert form in caught.value.message
    assert caught.value.hint


# --- who the proxy runs as --------------------------------------------------------------------------------------------

OF_CONTAINER, OF_POD = "of container istio-proxy", "of the pod"
IDS: dict[str, tuple[int | None, int | None, int, str, bool]] = {  # container's, pod's, taken, origin, warned
    "unset": (None, None, 1337, "default", False),
    "container": (5, None, 5, OF_CONTAINER, False),
    "container beats pod": (5, 6, 5, OF_CONTAINER, False),
    "pod": (None, 6, 6, OF_POD, False),
    "container root": (0, None, 1337, "default", True),
    "container root, pod not": (0, 6, 1337, "default", True),
    "pod root": (None, 0, 1337, "default", True),
}


@pytest.mark.parametrize(("own", "of_pod", "taken", "origin", "warned"), IDS.values(), ids=IDS)
def test_user_and_group_of_the_proxy(
    own: int | None, of_pod: int | None, taken: int, origin: str, warned: bool
) -> None:
    proxy = Container("istio-proxy", run_as_user=own, run_as_group=own)
    derived = derive_interception(Pod("a", "b", containers=(proxy,), run_as_user=of_pod, run_as_group=of_pod))
    assert (derived.interception.proxy_uids, derived.interception.proxy_gids) == (ports(taken), ports(taken))
    assert derived.origins["proxy_uids"].removeprefix("securityContext.runAsUser ") == origin
    assert derived.origins["proxy_gids"].removeprefix("securityContext.runAsGroup ") == origin
    assert [warning.startswith("the proxy runs as root") for warning in derived.warnings] == [True] * warned


def test_a_transparent_proxy_is_root_with_a_group_and_no_warning() -> None:
    proxy = Container("istio-proxy", run_as_user=0, run_as_group=1337)
    derived = derive_interception(Pod("a", "b", annotations={MODE: "TPROXY"}, containers=(proxy,)))
    assert (derived.interception.proxy_uids, derived.interception.proxy_gids) == (ports(1337), ports(1337))
    assert derived.warnings == ()


def test_user_and_group_are_independent() -> None:
    proxy = Container("istio-proxy", run_as_user=5)
    derived = derive_interception(Pod("a", "b", containers=(proxy,), run_as_group=7))
    assert (derived.interception.proxy_uids, derived.interception.proxy_gids) == (ports(5), ports(7))


def test_other_containers_do_not_count() -> None:
    app = Container("app", env={DNS: "true"}, run_as_user=5)
    assert derive_interception(Pod("a", "b", containers=(app, Container("istio-proxy")))).interception == Interception()


# --- switches and variables -------------------------------------------------------------------------------------------

SWITCHES: dict[str, tuple[str, str, dict[str, bool], bool]] = {  # variable, text, fields it sets, warned
    "DNS on": (DNS, "true", {"redirect_dns": True, "capture_all_dns": True}, False),
    "DNS on, T": (DNS, "T", {"redirect_dns": True, "capture_all_dns": True}, False),
    "DNS off": (DNS, "0", {"redirect_dns": False, "capture_all_dns": False}, False),
    "DNS wrong": (DNS, "yes", {"redirect_dns": False, "capture_all_dns": False}, True),
    "DNS empty": (DNS, "", {}, False),
    "dual stack on": (DUAL, "1", {"dual_stack": True}, False),
    "dual stack wrong": (DUAL, "on", {"dual_stack": False}, True),
    "drop invalid on": (DROP, "TRUE", {"drop_invalid": True}, False),
    "drop invalid wrong": (DROP, " true", {"drop_invalid": False}, True),
}


@pytest.mark.parametrize(("name", "text", "values", "warned"), SWITCHES.values(), ids=SWITCHES)
def test_switch(name: str, text: str, values: dict[str, Any], warned: bool) -> None:
    derived = derive_interception(pod(env={name: text}))
    assert derived.interception == replace(Interception(), **values)
    assert all(derived.origins[field] == f"env {name} of container istio-proxy" for field in values)
    assert len(derived.warnings) == int(warned)
    assert all(name in warning and repr(text) in warning for warning in derived.warnings)


VARIABLES: dict[str, tuple[dict[str, str], dict[str, str], dict[str, object], str]] = {
    # of the container, of the agent, fields they set, origin
    "groups": ({GROUPS: "202,300-400"}, {}, {"owner_groups": (NumberRange(202, 202), NumberRange(300, 400))}, "own"),
    "every group": ({GROUPS: "*"}, {}, {"owner_groups": EVERYTHING}, "own"),
    "an empty variable is unset": ({GROUPS: "", LOOPBACK: ""}, {}, {}, ""),
    "an empty variable leaves it to the agent": ({GROUPS: ""}, {GROUPS: "2"}, {"owner_groups": ports(2)}, "agent"),
    "groups of the agent": ({}, {GROUPS: "202"}, {"owner_groups": ports(202)}, "agent"),
    "an empty variable of the agent is unset": ({}, {GROUPS: ""}, {}, ""),
    "the container's come first": ({GROUPS: "1"}, {GROUPS: "2"}, {"owner_groups": ports(1)}, "own"),
    "the agent's are not even looked at then": ({GROUPS: "1"}, {GROUPS: "x"}, {"owner_groups": ports(1)}, "own"),
    "excluded groups": ({GROUPS_EXCLUDE: "5, 6"}, {}, {"owner_groups_exclude": ports(5, 6)}, "own"),
    "excluded groups of the agent": ({}, {GROUPS_EXCLUDE: "5"}, {"owner_groups_exclude": ports(5)}, "agent"),
    "loopback": ({LOOPBACK: "127.1.2.3/16"}, {}, {"loopback_cidr": ip_network("127.1.0.0/16")}, "own"),
    "loopback of the agent": ({}, {LOOPBACK: "127.0.0.0/8"}, {"loopback_cidr": ip_network("127.0.0.0/8")}, "agent"),
    "switches of the agent do not count": ({}, {DNS: "true", DUAL: "true", DROP: "true"}, {}, ""),
}


@pytest.mark.parametrize(("own", "agents", "values", "whose"), VARIABLES.values(), ids=VARIABLES)
def test_variable(own: dict[str, str], agents: dict[str, str], values: dict[str, Any], whose: str) -> None:
    derived = derive_interception(pod(env=own), agents)
    assert derived.interception == replace(Interception(), **values)
    name = next(iter(own or agents))
    origin = {"own": f"env {name} of container istio-proxy", "agent": f"env {name} of the agent", "": "default"}[whose]
    assert all(derived.origins[field] == origin for field in values)


@pytest.mark.parametrize(
    ("own", "agents", "message"),
    [
        ({GROUPS: "java"}, {}, f"pod shop/cart: env {GROUPS} of container istio-proxy is 'java': "),
        ({GROUPS: ",".join(map(str, range(65)))}, {}, "65 groups: at most 64 may be listed"),
        ({GROUPS_EXCLUDE: "-"}, {}, f"env {GROUPS_EXCLUDE} of container istio-proxy is '-'"),
        ({LOOPBACK: "::1/128"}, {}, f"env {LOOPBACK} of container istio-proxy is '::1/128'"),
        ({}, {LOOPBACK: "10.0.0.0/8"}, f"env {LOOPBACK} of the agent is '10.0.0.0/8'"),
    ],
)
def test_a_wrong_variable_is_named(own: dict[str, str], agents: dict[str, str], message: str) -> None:
    with pytest.raises(PodSpecError) as caught:
        derive_interception(pod(env=own), agents)
    assert message in caught.value.message


def test_lists_have_a_limit_together() -> None:
    def listing(count: int) -> Mapping[str, str]:
        return {
            "traffic.sidecar.istio.io/excludeOutboundPorts": ",".join(map(str, range(count))),
            "traffic.sidecar.istio.io/excludeOutboundIPRanges": "10.0.0.0/8",
        }

    fixed = Interception().size - 1  # of the default, less the excluded outbound port
    count = MAX_ITEMS - fixed - 1
    assert derive_interception(pod(listing(count))).interception.size == MAX_ITEMS
    with pytest.raises(PodSpecError, match=f"pod shop/cart: .* list {MAX_ITEMS + 1} ports, .* at most {MAX_ITEMS}"):
        derive_interception(pod(listing(count + 1)))


@pytest.mark.parametrize("name", [DNS, DUAL, DROP, LOOPBACK, GROUPS, GROUPS_EXCLUDE])
def test_a_value_from_elsewhere_is_warned_about(name: str) -> None:
    proxy = Container("istio-proxy", env_from_elsewhere=frozenset({name, "OTHER"}))
    derived = derive_interception(Pod("a", "b", containers=(proxy,)))
    assert derived.interception == Interception()
    (warning,) = derived.warnings
    assert warning.startswith(f"env {name} of container istio-proxy comes from elsewhere (valueFrom)")
