"""What the people's commands print."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from meshcni import istio
from meshcni.cli.show import (
    Explained,
    assessment_object,
    camel_case,
    explained_object,
    plain,
    removal_of,
    removal_script,
    script,
)
from meshcni.pods.ambient import AmbientParameters
from meshcni.pods.ambientsettings import AmbientNode
from meshcni.pods.assess import assess
from meshcni.pods.eligibility import Policy
from meshcni.pods.interception import EVERYTHING, Interception, InterceptionMode, NumberRange
from meshcni.pods.model import Container, Pod
from meshcni.pods.outlook import prospect_of
from meshcni.pods.selectors import EnablementSelector
from meshcni.rules.ambient import pod_ruleset
from meshcni.rules.model import Backend, Family
from meshcni.rules.sidecar import sidecar_ruleset

SIDECAR = Pod(
    "shop",
    "cart",
    annotations={istio.SIDECAR_STATUS: "", istio.EXCLUDE_OUTBOUND_PORTS: "25"},
    containers=(Container("istio-proxy"),),
)
TPROXY = replace(Interception(), mode=InterceptionMode.TPROXY)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (True, True),
        (15001, 15001),
        ("eth0", "eth0"),
        (EVERYTHING, "*"),
        (InterceptionMode.TPROXY, "TPROXY"),
        ((NumberRange(80, 80), NumberRange(90, 99)), [80, "90-99"]),
        ((), []),
        (Interception().loopback_cidr, "127.0.0.1/32"),
    ],
)
def test_plain(value: object, shown: object) -> None:
    assert plain(value) == shown
    assert type(plain(value)) is type(shown)


def test_a_sidecar_as_an_object() -> None:
    shown = json.loads(json.dumps(assessment_object(SIDECAR, assess(SIDECAR, None, Policy()))))
    assert shown["pod"] == {"namespace": "shop", "name": "cart"}
    assert (shown["verdict"], shown["reason"], shown["error"]) == ("sidecar", "sidecar-injected", None)
    assert shown["parameters"]["outboundExcludePorts"] == {
        "value": [25],
        "origin": "annotation traffic.sidecar.istio.io/excludeOutboundPorts",
    }
    assert shown["parameters"]["mode"] == {"value": "REDIRECT", "origin": "default"}
    assert set(shown["parameters"]) == {camel_case(one.name) for one in fields(Interception)}


def test_a_refused_pod_as_an_object() -> None:
    pod = replace(SIDECAR, annotations={istio.SIDECAR_STATUS: "", istio.INTERCEPTION_MODE: "x"})
    shown = assessment_object(pod, assess(pod, None, Policy()))
    assert (shown["verdict"], shown["reason"], shown["parameters"]) == ("error", "bad-parameters", None)
    assert "'x' is no interception mode" in shown["error"]["message"]
    assert shown["error"]["hint"]


def test_an_iptables_script_has_a_part_for_each_family() -> None:
    text = script(sidecar_ruleset(TPROXY, frozenset(Family), Backend.IPTABLES), Backend.IPTABLES)
    first, second = text.split("# IPv6: ip6tables-restore --noflush\n")
    assert first.startswith("# IPv4: iptables-restore --noflush\n*")
    assert "127.0.0.6/32" in first
    assert "127.0.0.6/32" not in second
    assert "::6/128" not in first
    assert "# ip -4 rule add fwmark 1337 lookup 133\n" in second
    assert "# ip -6 route add local ::/0 dev lo table 133\n" in second
    assert "# ip -6 address add ::6/128 dev lo\n" in second


def test_one_family_is_a_whole_restore_input() -> None:
    text = script(sidecar_ruleset(Interception(), frozenset({Family.V4}), Backend.IPTABLES), Backend.IPTABLES)
    assert text.endswith("COMMIT\n")
    assert text.count("# ") == 1


def test_an_nftables_script_is_one_transaction() -> None:
    text = script(sidecar_ruleset(Interception(), frozenset(Family), Backend.NFTABLES), Backend.NFTABLES)
    assert text.startswith("# nft -f -\nadd table inet istio-proxy-nat\ndelete table inet istio-proxy-nat\n")
    assert "ISTIO_" not in text


def test_removal() -> None:
    assert "delete table inet istio-proxy-raw" in removal_script(Backend.NFTABLES)
    assert all(line.startswith("#") for line in removal_script(Backend.IPTABLES).splitlines())


# --- ambient mode -----------------------------------------------------------------------------------------------------

EVERY_POD = Policy(ambient_enabled=True, enablement_selectors=(EnablementSelector(),))
NODE = AmbientNode(AmbientParameters(dns_capture=True), enabled=True)


def explained(pod: Pod, policy: Policy = EVERY_POD) -> Explained:
    assessment = assess(pod, None, policy)
    origins = {"dns_capture": "env AMBIENT_DNS_CAPTURE"}
    return Explained(pod, assessment, prospect_of(pod, assessment.decision, NODE), origins)


def test_an_ambient_pod_as_an_object() -> None:
    pod = Pod("shop", "cart", annotations={istio.AMBIENT_BYPASS_INBOUND: "true"}, ips=("10.0.0.1",))
    shown = json.loads(json.dumps(explained_object(explained(pod))))
    assert (shown["verdict"], shown["reason"], shown["error"]) == ("ambient", "ambient-enabled", None)
    assert shown["parameters"]["dnsCapture"] == {"value": True, "origin": "env AMBIENT_DNS_CAPTURE"}
    assert shown["parameters"]["ingress"] == {"value": True, "origin": f"annotation {istio.AMBIENT_BYPASS_INBOUND}"}
    assert shown["parameters"]["virtualInterfaces"] == {"value": [], "origin": "default"}
    assert set(shown["parameters"]) == {camel_case(one.name) for one in fields(AmbientParameters)}
    assert shown["redirection"] == ""
    assert shown["next"]["steps"][0]["step"] == "find-netns"
    assert shown["next"]["steps"][-1]["step"] == "annotate-enabled"
    assert shown["next"]["steps"][0]["words"] in shown["next"]["text"]


def test_a_refused_ambient_pod_as_an_object() -> None:
    pod = Pod("shop", "cart", annotations={istio.REROUTE_VIRTUAL_INTERFACES: "a/b"})
    shown = explained_object(explained(pod))
    assert (shown["verdict"], shown["reason"], shown["parameters"]) == ("error", "bad-parameters", None)
    assert "'a/b', which names no interface" in shown["error"]["message"]
    assert "Its ADD fails" in shown["next"]["text"]


def test_a_sidecar_has_the_same_object_as_ever() -> None:
    assessment = assess(SIDECAR, None, Policy())
    shown = explained_object(explained(SIDECAR, Policy()))
    assert shown == {**assessment_object(SIDECAR, assessment), "redirection": "", "next": None}


@pytest.mark.parametrize("backend", Backend)
def test_a_pods_script_begins_with_rule_and_route(backend: Backend) -> None:
    text = script(pod_ruleset(AmbientParameters(), frozenset(Family), backend), backend)
    commands = [line for line in text.splitlines() if line.startswith("# ip ")]
    assert commands == [
        "# ip -4 rule add fwmark 0x111/0xfff pref 32764 lookup 100",
        "# ip -6 rule add fwmark 0x111/0xfff pref 32764 lookup 100",
        "# ip -4 route add local 0.0.0.0/0 dev lo table 100",
        "# ip -6 route add local ::/0 dev lo table 100",
    ]
    assert text.startswith("\n".join(commands))


def test_a_pods_removal_ends_with_rule_and_route() -> None:
    for backend, first in (
        (Backend.IPTABLES, "# IPv4: iptables-restore --noflush\n*mangle\n-D "),
        (Backend.NFTABLES, "#"),
    ):
        ruleset = pod_ruleset(AmbientParameters(), frozenset({Family.V4}), backend)
        text = removal_of(ruleset, backend)
        assert text.startswith(first)
        assert text.endswith(
            "# ip -4 rule del fwmark 0x111/0xfff pref 32764 lookup 100\n"
            "# ip -4 route del local 0.0.0.0/0 dev lo table 100\n"
        )
        assert "-A " not in text


def test_an_nft_removal_takes_every_table_out_whatever_the_parameters_are() -> None:
    ruleset = pod_ruleset(AmbientParameters(), frozenset({Family.V4}), Backend.NFTABLES)
    assert "delete table inet istio-ambient-raw" in removal_of(ruleset, Backend.NFTABLES)
