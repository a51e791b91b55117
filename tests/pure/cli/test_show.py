"""What the people's commands print."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from meshcni import istio
from meshcni.cli.show import assessment_object, camel_case, plain, removal_script, script
from meshcni.pods.assess import assess
from meshcni.pods.eligibility import Policy
from meshcni.pods.interception import EVERYTHING, Interception, InterceptionMode, NumberRange
from meshcni.pods.model import Container, Pod
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
