"""ZDS's bytes: the examples of the contract, both directions, limits, and everything that must be refused."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.errors import ProtocolError
from meshcni.protocols import zds_pb2
from meshcni.protocols.zds import (
    MAX_READ_BYTES,
    MAX_SENT_BYTES,
    Ack,
    Add,
    Delete,
    Hello,
    Keep,
    Request,
    SnapshotSent,
    decode_answer,
    decode_hello,
    decode_request,
    encode_ack,
    encode_hello,
    encode_request,
)

UID = "4a8b9f6e-6e0f-4a3a-8a53-5f1d0b9f6c2d"
ALPHABET = "aZ09-.é\u2028😀\0"
TEXTS = st.text(ALPHABET, max_size=40)
REQUESTS = st.one_of(
    st.builds(Add, TEXTS, TEXTS, TEXTS, TEXTS),
    st.builds(Keep, TEXTS),
    st.builds(Delete, TEXTS),
    st.just(SnapshotSent()),
)
REQUESTS.validate()  # reads hypothesis's character tables now, because no file may be read during a pure test


def prefixed(tag: str, *parts: bytes) -> bytes:
    """A length-delimited field, for lengths below 128."""
    value = b"".join(parts)
    return bytes.fromhex(tag) + bytes([len(value)]) + value


# Written by hand from the contract's field numbers, not by the code under test.
REQUEST_BYTES: dict[str, tuple[Request, bytes]] = {
    "snapshot sent": (SnapshotSent(), bytes.fromhex("1a00")),
    "keep": (Keep(UID), prefixed("2a", prefixed("0a", UID.encode()))),
    "del, whose uid has number 2": (Delete(UID), prefixed("12", prefixed("12", UID.encode()))),
    "add": (
        Add(UID, "web", "shop", "web-account"),
        prefixed(
            "0a",
            prefixed("0a", UID.encode()),
            prefixed("12", prefixed("0a", b"web"), prefixed("12", b"shop"), prefixed("1a", b"web-account")),
        ),
    ),
    "add of nobody has its info": (Add("u", "", "", ""), bytes.fromhex("0a05 0a0175 1200")),
}


@pytest.mark.parametrize(("request_", "data"), REQUEST_BYTES.values(), ids=REQUEST_BYTES)
def test_bytes_of_requests(request_: Request, data: bytes) -> None:
    assert encode_request(request_) == data
    assert decode_request(data) == request_


def test_bytes_of_ztunnels_messages() -> None:
    assert encode_hello(Hello(1)) == bytes.fromhex("0801")
    assert encode_ack(Ack()) == bytes.fromhex("0a00")
    assert encode_ack(Ack("no")) == bytes.fromhex("0a04 0a02") + b"no"
    assert decode_hello(bytes.fromhex("0801")) == Hello(1)
    assert decode_answer(bytes.fromhex("0a00")) == Ack()
    assert decode_answer(bytes.fromhex("0a04 0a02") + b"no") == Ack("no")


@given(REQUESTS)
def test_requests_survive_the_way(request_: Request) -> None:
    assert decode_request(encode_request(request_)) == request_


@given(TEXTS)
def test_acks_survive_the_way(error: str) -> None:
    assert decode_answer(encode_ack(Ack(error))) == Ack(error)


@pytest.mark.parametrize("version", [0, 1, 2, 77, 2**31 - 1])
def test_any_version_is_taken(version: int) -> None:
    assert decode_hello(encode_hello(Hello(version)) or b"\x08\x00") == Hello(version)


def test_unknown_fields_are_ignored() -> None:
    extra = bytes.fromhex("7a0168")
    assert decode_hello(bytes.fromhex("0801") + extra) == Hello(1)
    assert decode_answer(bytes.fromhex("0a00") + extra) == Ack()
    assert decode_request(bytes.fromhex("1a00") + extra) == SnapshotSent()
    assert decode_answer(bytes.fromhex("0a03") + extra) == Ack()


def test_second_hello_is_told_from_an_ack() -> None:
    assert decode_answer(bytes.fromhex("0801")) == Hello(1)


# --- limits -----------------------------------------------------------------------------------------------------------


def long_add(size: int) -> Add:
    """An Add of exactly `size` bytes."""
    fill = size - len(encode_request(Add(UID, "n" * 200, "s", "a" * 200)))
    return Add(UID, "n" * 200, "s", "a" * (200 + fill))


def test_a_message_may_have_1024_bytes() -> None:
    assert len(encode_request(long_add(MAX_SENT_BYTES))) == MAX_SENT_BYTES


def test_one_byte_more_is_refused_with_the_pod_and_the_sizes() -> None:
    with pytest.raises(ProtocolError, match=rf"Add of pod {UID} has 1025 bytes, ztunnel takes at most 1024") as refusal:
        encode_request(long_add(MAX_SENT_BYTES + 1))
    assert refusal.value.cause == "oversized"
    assert "shorten" in refusal.value.hint


def test_the_longest_names_of_kubernetes_fit() -> None:
    assert len(encode_request(Add(UID, "n" * 253, "s" * 63, "a" * 253))) < MAX_SENT_BYTES


def test_a_reason_of_64_kib_is_read() -> None:
    text = "x" * (MAX_READ_BYTES - 8)
    data = encode_ack(Ack(text))
    assert len(data) == MAX_READ_BYTES
    assert decode_answer(data) == Ack(text)
    for decode in (decode_answer, decode_hello):
        with pytest.raises(ProtocolError) as refusal:
            decode(data + b"x")
        assert refusal.value.cause == "oversized"
    with pytest.raises(ProtocolError):
        decode_request(b"\x1a\x00" + bytes(MAX_SENT_BYTES))


# --- what must be refused ---------------------------------------------------------------------------------------------

MALFORMED = {
    "one byte": "ff",
    "cut length": "0a05 0a",
    "text that is no UTF-8": "0a03 0a01ff",
    "group without end": "0b",
    "end of a group that never began": "0c",
    "field number 0": "0000",
    "varint without end": "08ffffffffffffffffffff",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_packets(data: str) -> None:
    for decode in (decode_answer, decode_hello, decode_request):
        with pytest.raises(ProtocolError) as refusal:
            decode(bytes.fromhex(data))
        assert refusal.value.cause == "malformed"


NO_ANSWERS = {"nothing": "", "only unknown fields": "7a0168", "hello of version 0": "0800", "payload 2": "1200"}


@pytest.mark.parametrize("data", NO_ANSWERS.values(), ids=NO_ANSWERS)
def test_what_is_no_answer(data: str) -> None:
    with pytest.raises(ProtocolError, match="neither ack nor hello"):
        decode_answer(bytes.fromhex(data))


NO_REQUESTS = {"nothing": "", "payload 4": "2200", "an add without the pod's identity": "0a03 0a0175"}


@pytest.mark.parametrize("data", NO_REQUESTS.values(), ids=NO_REQUESTS)
def test_what_is_no_request(data: str) -> None:
    with pytest.raises(ProtocolError) as refusal:
        decode_request(bytes.fromhex(data))
    assert refusal.value.cause == "malformed"


def test_an_ack_is_no_hello() -> None:
    with pytest.raises(ProtocolError, match="an ack before its hello"):
        decode_hello(bytes.fromhex("0a00"))


def test_text_that_is_no_unicode_is_not_sent() -> None:
    with pytest.raises(ProtocolError) as refusal:
        encode_request(Keep("\ud800"))
    assert refusal.value.cause == "malformed"


@given(st.binary(max_size=60))
def test_random_packets_raise_nothing_but_our_error(data: bytes) -> None:
    for decode in (decode_answer, decode_hello, decode_request):
        with suppress(ProtocolError):
            decode(data)


@given(REQUESTS, st.data())
def test_damaged_packets_raise_nothing_but_our_error(request_: Request, data: st.DataObject) -> None:
    packet = bytearray(encode_request(request_))
    position = data.draw(st.integers(0, max(len(packet) - 1, 0)))
    packet[position : position + 1] = data.draw(st.binary(max_size=3))
    with suppress(ProtocolError):
        decode_request(bytes(packet))


# --- the contract's numbers -------------------------------------------------------------------------------------------

NUMBERS = {
    "ZdsHello": {"version": 1},
    "WorkloadInfo": {"name": 1, "namespace": 2, "service_account": 3},
    "AddWorkload": {"uid": 1, "workload_info": 2},
    "KeepWorkload": {"uid": 1},
    "DelWorkload": {"uid": 2},
    "SnapshotSent": {},
    "Ack": {"error": 1},
    "WorkloadRequest": {"add": 1, "del": 2, "snapshot_sent": 3, "keep": 5},
    "WorkloadResponse": {"ack": 1},
}


def test_names_and_numbers() -> None:
    messages = zds_pb2.DESCRIPTOR.message_types_by_name
    found = {name: {field.name: field.number for field in message.fields} for name, message in messages.items()}
    assert found == NUMBERS
    assert zds_pb2.DESCRIPTOR.package == "istio.workload.zds"
    assert dict(zds_pb2.Version.items()) == {"NOT_USED": 0, "V1": 1}


def test_there_is_no_add_without_the_pods_identity() -> None:
    assert [field.name for field in fields(Add)] == ["uid", "name", "namespace", "service_account"]
    with pytest.raises(TypeError):
        Add("uid")  # type: ignore[call-arg]
