"""prevResult: every version in, every version out, and every field that can be wrong."""

# ruff: noqa: RUF005

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.cni.results import LAYOUTS, ip_family, parse_result, result_text
from meshcni.cni.versions import SUPPORTED_VERSIONS
from meshcni.errors import CniInputError

FLAT = {
    "ip4": {"ip": "10.0.0.2/24", "gateway": "10.0.0.1", "routes": [{"dst": "0.0.0.0/0"}]},
    "ip6": {"ip": "fd00::2/64", "routes": [{"dst": "::/0", "gw": "fd00::1"}]},
    "dns": {"nameservers": ["10.96.0.10"], "search": ["svc.cluster.local"]},
}
LISTED = {
    "interfaces": [{"name": "cni0", "mac": "0a:00:00:00:00:01"}, {"name": "eth0", "sandbox": "/run/netns/x"}],
    "ips": [
        {"version": "4", "interface": 1, "address": "10.0.0.2/24", "gateway": "10.0.0.1"},
        {"version": "6", "interface": 0, "address": "fd00::2/64"},
    ],
    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0", "gw": "fd00::1"}],
    "dns": {"nameservers": ["10.96.0.10"], "search": ["svc.cluster.local"]},
}
CURRENT = {
    **LISTED,
    "interfaces": [
        {"name": "cni0", "mac": "0a:00:00:00:00:01"},
        {"name": "eth0", "sandbox": "/run/netns/x", "mtu": 1450, "socketPath": "/s", "pciID": "0000:00:1f.6"},
    ],
    "ips": [
        {"interface": 1, "address": "10.0.0.2/24", "gateway": "10.0.0.1"},
        {"interface": 0, "address": "fd00::2/64"},
    ],
    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0", "gw": "fd00::1", "mtu": 1400, "priority": 7, "table": 0}],
}
SAMPLES = {"0.2.0": FLAT, "0.4.0": LISTED, "1.0.0": CURRENT}


def converted(document: object, conf_version: str) -> dict[str, object]:
    text = result_text(parse_result(document, conf_version), conf_version)
    value = json.loads(text)
    assert isinstance(value, dict)
    return value


@pytest.mark.parametrize("version", SUPPORTED_VERSIONS)
def test_the_same_version_gives_the_same_result(version: str) -> None:
    document = {"cniVersion": version, **SAMPLES[LAYOUTS[version]]}
    assert converted(document, version) == document


@pytest.mark.parametrize("version", SUPPORTED_VERSIONS)
@pytest.mark.parametrize("source", SUPPORTED_VERSIONS)
def test_every_version_into_every_other(source: str, version: str) -> None:
    before = parse_result({"cniVersion": source, **SAMPLES[LAYOUTS[source]]}, version)
    text = result_text(before, version)
    assert json.loads(text)["cniVersion"] == version
    after = parse_result(json.loads(text), version)
    assert after.addresses() == before.addresses() == ("10.0.0.2/24", "fd00::2/64")
    assert [route["dst"] for route in after.routes] == ["0.0.0.0/0", "::/0"]
    assert after.dns == before.dns
    assert result_text(after, version) == text


def test_down_from_the_newest_to_the_list_layout() -> None:
    down = converted({"cniVersion": "1.0.0", **CURRENT}, "0.3.1")
    assert down["interfaces"] == LISTED["interfaces"]
    assert down["ips"] == LISTED["ips"]


def test_up_from_the_flat_layout() -> None:
    assert converted({"cniVersion": "0.2.0", **FLAT}, "1.1.0") == {
        "cniVersion": "1.1.0",
        "ips": [{"address": "10.0.0.2/24", "gateway": "10.0.0.1"}, {"address": "fd00::2/64"}],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0", "gw": "fd00::1"}],
        "dns": FLAT["dns"],
    }


def test_the_flat_layout_holds_the_first_address_of_each_family() -> None:
    ips = [{"address": f"10.0.0.{number}/24"} for number in (2, 3)]
    assert converted({"cniVersion": "1.0.0", "ips": ips}, "0.2.0")["ip4"] == {"ip": "10.0.0.2/24"}


@pytest.mark.parametrize(
    ("version", "text"),
    [
        ("0.3.1", '{\n    "cniVersion": "0.3.1",\n    "dns": {}\n}'),
        ("0.4.0", '{\n    "cniVersion": "0.4.0",\n    "dns": {}\n}'),
        ("1.0.0", '{\n    "cniVersion": "1.0.0"\n}'),
        ("1.1.0", '{\n    "cniVersion": "1.1.0"\n}'),
    ],
)
def test_without_prev_result(version: str, text: str) -> None:
    assert result_text(None, version) == text


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0"])
@pytest.mark.parametrize("document", [None, {}, {"dns": {"domain": "x"}}, {"cniVersion": "1.0.0", "interfaces": []}])
def test_the_flat_layout_needs_an_address(version: str, document: object) -> None:
    result = None if document is None else parse_result(document, version)
    with pytest.raises(CniInputError, match="prevResult has no IP address") as caught:
        result_text(result, version)
    assert caught.value.cni_code == 7


def test_key_order() -> None:
    document = {"ips": [{"gateway": "10.0.0.1", "address": "10.0.0.2/24"}], "interfaces": [{"mac": "m", "name": "n"}]}
    listed = result_text(parse_result(document, "0.4.0"), "0.4.0")
    assert [line.strip().split(":")[0] for line in listed.splitlines() if ":" in line] == [
        '"cniVersion"',
        '"interfaces"',
        '"name"',
        '"mac"',
        '"ips"',
        '"version"',
        '"address"',
        '"gateway"',
        '"dns"',
    ]
    current = result_text(parse_result(document, "1.0.0"), "1.0.0")
    assert list(json.loads(current)) == ["cniVersion", "interfaces", "ips"]
    assert list(json.loads(current)["interfaces"][0]) == ["mac", "name"]


def test_unknown_keys_stay_inside_a_layout_and_go_between_layouts() -> None:
    document = {"cniVersion": "1.0.0", "vendor": {"z": 1, "a": [1.50]}, "ips": [{"address": "10.0.0.2/24", "x": "y"}]}
    same = converted(document, "1.1.0")
    assert same["vendor"] == {"z": 1, "a": [1.5]}
    assert same["ips"] == [{"address": "10.0.0.2/24", "x": "y"}]
    assert "vendor" not in converted(document, "0.4.0")


def test_keys_in_any_case_null_and_empty_values() -> None:
    document = {
        "CNIVersion": "0.3.1",
        "IPs": [{"Address": "10.0.0.2/24", "GATEWAY": "", "interface": None}],
        "Routes": None,
        "Interfaces": [{"name": "", "mac": ""}],
        "dns": None,
    }
    assert converted(document, "0.3.1") == {
        "cniVersion": "0.3.1",
        "interfaces": [{"name": ""}],
        "ips": [{"version": "4", "address": "10.0.0.2/24"}],
        "dns": {},
    }


def test_the_ip_version_is_what_the_address_is() -> None:
    ips = converted({"ips": [{"version": "6", "address": "10.0.0.2/24"}, {"address": "fd00::1/64"}]}, "0.3.0")["ips"]
    assert [ip["version"] for ip in ips] == ["4", "6"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ([], "prevResult is"),
        ("x", "prevResult is"),
        (True, "prevResult is"),
        ({"cniVersion": 1}, "prevResult.cniVersion"),
        ({"interfaces": {}}, "prevResult.interfaces"),
        ({"interfaces": ["eth0"]}, r"prevResult.interfaces\[0\]"),
        ({"interfaces": [{"name": 1}]}, r"prevResult.interfaces\[0\].name"),
        ({"interfaces": [{"name": "a", "mtu": 1.5}]}, r"prevResult.interfaces\[0\].mtu"),
        ({"ips": 1}, "prevResult.ips"),
        ({"ips": [{}]}, r"prevResult.ips\[0\].address is missing"),
        ({"ips": [{"address": "10.0.0.2"}]}, r"prevResult.ips\[0\].address"),
        ({"ips": [{"address": "10.0.0.2/33"}]}, r"prevResult.ips\[0\].address"),
        ({"ips": [{"address": "10.0.0.02/24"}]}, r"prevResult.ips\[0\].address"),
        ({"ips": [{"address": 1}]}, r"prevResult.ips\[0\].address"),
        ({"ips": [{"address": "10.0.0.2/24", "interface": "0"}]}, r"prevResult.ips\[0\].interface"),
        ({"ips": [{"address": "10.0.0.2/24", "interface": True}]}, r"prevResult.ips\[0\].interface"),
        ({"ips": [{"address": "10.0.0.2/24", "gateway": "gw"}]}, r"prevResult.ips\[0\].gateway"),
        ({"routes": [{"gw": "10.0.0.1"}]}, r"prevResult.routes\[0\].dst is missing"),
        ({"routes": [{"dst": "default"}]}, r"prevResult.routes\[0\].dst"),
        ({"dns": []}, "prevResult.dns"),
        ({"dns": {"nameservers": "10.0.0.1"}}, "prevResult.dns.nameservers"),
        ({"dns": {"search": [1]}}, "prevResult.dns.search"),
    ],
)
def test_wrong_fields_are_named(document: object, field: str) -> None:
    with pytest.raises(CniInputError, match=field) as caught:
        parse_result(document, "1.0.0")
    assert caught.value.cni_code == 7


@pytest.mark.parametrize(
    ("document", "field"),
    [
        ({"ip4": []}, "prevResult.ip4 is"),
        ({"ip4": {}}, "prevResult.ip4.ip is missing"),
        ({"ip6": {"ip": "fd00::/64", "routes": {}}}, "prevResult.ip6.routes"),
    ],
)
def test_wrong_fields_of_the_flat_layout_are_named(document: object, field: str) -> None:
    with pytest.raises(CniInputError, match=field):
        parse_result(document, "0.2.0")


def test_an_unknown_version_is_code_1() -> None:
    with pytest.raises(CniInputError, match=r"prevResult\.cniVersion '9\.9\.9'") as caught:
        parse_result({"cniVersion": "9.9.9"}, "1.0.0")
    assert caught.value.cni_code == 1


@pytest.mark.parametrize(
    ("text", "family"),
    [("0.0.0.0", 4), ("255.255.255.255", 4), ("256.0.0.1", 0), ("1.2.3", 0), ("1.2.3.4.5", 0), ("01.2.3.4", 0)]
    + [("1.2.3.٤", 0), ("", 0), (" 1.2.3.4", 0), ("-1.2.3.4", 0), ("::", 6), ("::1", 6), ("1::", 6), (":::", 0)]
    + [("fe80::1%eth0", 0), ("1:2:3:4:5:6:7:8", 6), ("1:2:3:4:5:6:7", 0), ("1:2:3:4:5:6:7::", 6), ("::ffff:1.2.3.4", 6)]
    + [("1:2:3:4:5:6:7:8::", 0), ("1::2::3", 0), ("12345::", 0), ("g::", 0), ("1.2.3.4::", 0), ("::1.2.3.4:5", 0)],
)
def test_ip_family(text: str, family: int) -> None:
    assert ip_family(text) == family


@given(st.ip_addresses())
def test_every_address_has_its_family(address: object) -> None:
    assert ip_family(str(address)) == address.version  # type: ignore[attr-defined]
