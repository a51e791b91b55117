"""Bodies of `POST /cmdadd`."""

from __future__ import annotations

import json
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.errors import ProtocolError
from meshcni.protocols.cmdadd import PodAdded, decode_pod_added

EVENT: dict[str, Any] = {
    "Netns": "/var/run/netns/cni-1",
    "PodName": "p",
    "PodNamespace": "n",
    "IPs": [{"Interface": 0, "Address": {"IP": "10.0.0.2", "Mask": "////AA=="}, "Gateway": "10.0.0.1"}],
}


def decode(event: object) -> PodAdded:
    return decode_pod_added(json.dumps(event).encode())


def test_what_the_original_plugin_sends() -> None:
    assert decode(EVENT) == PodAdded("/var/run/netns/cni-1", "p", "n", (ip_address("10.0.0.2"),))


def test_keys_in_any_case_as_go_reads_them() -> None:
    assert decode({key.upper(): value for key, value in EVENT.items()}) == decode(EVENT)


@pytest.mark.parametrize("ips", [None, []])
def test_no_addresses(ips: object) -> None:
    assert decode(EVENT | {"IPs": ips}).ips == ()


@pytest.mark.parametrize(
    ("text", "address"), [("::ffff:10.0.0.2", "10.0.0.2"), ("fd00::2", "fd00::2"), ("10.0.0.2", "10.0.0.2")]
)
def test_addresses(text: str, address: str) -> None:
    entry = {"Interface": None, "Address": {"IP": text, "Mask": None}, "Gateway": ""}
    assert decode(EVENT | {"IPs": [entry]}).ips == (ip_address(address),)


def test_additional_keys_of_newer_plugins() -> None:
    event = decode(EVENT | {"PodUID": "u", "ContainerID": "c", "IfName": "eth0", "Future": {}})
    assert (event.uid, event.container_id, event.interface) == ("u", "c", "eth0")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"", "no body"),
        (b"[]", "not a JSON object"),
        (b"{", "not JSON"),
        (b'{"PodName": 5}', "PodName"),
        (b'{"IPs": {}}', "IPs"),
        (b'{"IPs": [5]}', "IPs"),
        (b'{"IPs": [{"Address": {"IP": "x"}}]}', "IPs"),
        (b'{"IPs": [{"Address": {"IP": "10.0.0.1", "Mask": "*"}}]}', "IPs"),
        (b'{"IPs": [{"Address": {"IP": "10.0.0.1", "Mask": 24}}]}', "IPs"),
    ],
)
def test_bad_body_names_the_field(body: bytes, field: str) -> None:
    with pytest.raises(ProtocolError, match=field):
        decode_pod_added(body)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet="10.:fe/é", max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["IP", "Address", "Mask"]), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["Netns", "podname", "IPs", "ips"]), json_values))
def test_any_json_is_an_event_or_a_protocol_error(event: dict[str, object]) -> None:
    try:
        decoded = decode(event)
    except ProtocolError:
        return
    assert isinstance(decoded.netns, str)
