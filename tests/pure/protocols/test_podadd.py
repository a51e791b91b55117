"""The agent protocol of an ADD: both directions, and everything that must be refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.errors import ProtocolError
from meshcni.protocols.podadd import (
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    VERDICTS,
    AddReply,
    AddRequest,
    accepted,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
    refused,
)

ALPHABET = "aZ09 _-./:;,<>&'\"\\{}[]\0\x1f\x7f\né\u2028\ufeff😀"
TEXTS = st.text(ALPHABET, max_size=40)
NAMES = st.text(ALPHABET, min_size=1, max_size=40)
REQUESTS = st.builds(
    AddRequest,
    cni_version=TEXTS,
    container_id=TEXTS,
    ifname=TEXTS,
    netns=TEXTS,
    pod_namespace=NAMES,
    pod_name=NAMES,
    pod_uid=TEXTS,
    ips=st.lists(TEXTS, max_size=4).map(tuple),
)
REPLIES = st.builds(accepted, st.sampled_from(VERDICTS), TEXTS, TEXTS) | st.builds(
    refused, st.integers(1, 2**31 - 1), NAMES, TEXTS
)
REQUESTS.validate()  # reads hypothesis's character tables now, because no file may be read during a pure test


def fields(message: AddRequest | AddReply) -> dict[str, object]:
    return {name: getattr(message, name) for name in message.__slots__}


def request(**changes: object) -> bytes:
    document = {
        "version": 1,
        "operation": "add",
        "cniVersion": "1.0.0",
        "containerID": "c",
        "ifName": "eth0",
        "netns": "/run/netns/x",
        "podNamespace": "shop",
        "podName": "web",
        "podUID": "u",
        "ips": ["10.0.0.2/24"],
    }
    document.update(changes)
    return json.dumps({key: value for key, value in document.items() if value is not ...}).encode()


def reply(**changes: object) -> bytes:
    document: dict[str, object] = {"version": 1, "ok": True, "verdict": "sidecar", "reason": "injected", "message": "m"}
    document.update(changes)
    return json.dumps({key: value for key, value in document.items() if value is not ...}).encode()


@given(REQUESTS)
def test_requests_survive_the_way(message: AddRequest) -> None:
    assert fields(decode_request(encode_request(message))) == fields(message)


@given(REPLIES)
def test_replies_survive_the_way(message: AddReply) -> None:
    assert fields(decode_reply(encode_reply(message))) == fields(message)


def test_the_request_on_the_wire() -> None:
    assert json.loads(encode_request(decode_request(request()))) == json.loads(request())


@pytest.mark.parametrize(
    ("message", "wire"),
    [
        (accepted("skip", "r", "m"), {"version": 1, "ok": True, "verdict": "skip", "reason": "r", "message": "m"}),
        (refused(11, "m", "d"), {"version": 1, "ok": False, "code": 11, "message": "m", "details": "d"}),
    ],
)
def test_replies_on_the_wire(message: AddReply, wire: dict[str, object]) -> None:
    assert json.loads(encode_reply(message)) == wire


def test_unknown_keys_are_ignored() -> None:
    assert decode_request(request(future={"a": 1})).pod_name == "web"
    assert decode_reply(reply(future=[])).verdict == "sidecar"


def test_optional_keys_may_be_absent() -> None:
    message = decode_request(request(podUID=..., ips=..., netns=..., containerID=..., ifName=..., cniVersion=...))
    assert (message.pod_uid, message.ips, message.netns) == ("", (), "")
    assert decode_reply(reply(message=..., reason=...)).verdict == "sidecar"


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "malformed"),
        (b"\xff", "malformed"),
        (b"{", "malformed"),
        (b"[]", "malformed"),
        (b"1", "malformed"),
        (request(version=2), "version"),
        (request(version="1"), "version"),
        (request(version=True), "version"),
        (request(version=None), "version"),
        (request(version=...), "version"),
        (request(operation="del"), "malformed"),
        (request(operation=...), "malformed"),
        (request(podName=""), "malformed"),
        (request(podName=...), "malformed"),
        (request(podNamespace=...), "malformed"),
        (request(podNamespace=5), "malformed"),
        (request(podUID=None), "malformed"),
        (request(ips="10.0.0.2/24"), "malformed"),
        (request(ips=[1]), "malformed"),
        (request(ips={}), "malformed"),
        (request(netns=[]), "malformed"),
        (request(padding="x" * MAX_REQUEST_BYTES), "oversized"),
    ],
)
def test_bad_requests(data: bytes, cause: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_request(data)
    assert caught.value.cause == cause
    assert caught.value.hint


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "malformed"),
        (b"HTTP/1.1 200 OK", "malformed"),
        (reply(version=3), "version"),
        (reply(ok=1), "malformed"),
        (reply(ok="true"), "malformed"),
        (reply(ok=...), "malformed"),
        (reply(verdict="quantum"), "malformed"),
        (reply(verdict=...), "malformed"),
        (reply(verdict=["sidecar"]), "malformed"),
        (reply(reason=1), "malformed"),
        (reply(ok=False), "malformed"),
        (reply(ok=False, code=0, message="m"), "malformed"),
        (reply(ok=False, code=-1, message="m"), "malformed"),
        (reply(ok=False, code=True, message="m"), "malformed"),
        (reply(ok=False, code="11", message="m"), "malformed"),
        (reply(ok=False, code=11.5, message="m"), "malformed"),
        (reply(ok=False, code=1 << 40, message="m"), "malformed"),
        (reply(ok=False, code=11, message=""), "malformed"),
        (reply(padding="x" * MAX_REPLY_BYTES), "oversized"),
    ],
)
def test_bad_replies(data: bytes, cause: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode_reply(data)
    assert caught.value.cause == cause


def test_nothing_oversized_is_sent() -> None:
    message = decode_request(request())
    message.ips = tuple(f"10.0.{index // 256}.{index % 256}/24" for index in range(5000))
    with pytest.raises(ProtocolError, match="65536"):
        encode_request(message)
    with pytest.raises(ProtocolError, match="65536"):
        encode_reply(refused(11, "x" * MAX_REPLY_BYTES))


@given(
    st.binary(max_size=80)
    | st.sampled_from([request(), reply()]).flatmap(lambda d: st.integers(0, len(d)).map(lambda n: d[:n]))
)
def test_any_bytes_give_a_message_or_a_protocol_error(data: bytes) -> None:
    for decode in (decode_request, decode_reply):
        try:
            decode(data)
        except ProtocolError:
            pass
