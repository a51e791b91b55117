"""The parts of the question to the API server that need none: responses, kubeconfigs, names."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.cni.kubeconfig import kubeconfig, server_url
from meshcni.plugin.apicall import request, response
from meshcni.plugin.doubt import DoubtError
from meshcni.plugin.kubeconfig import Access, values
from meshcni.plugin.resolver import answers, query

TOKENS = st.text(string.ascii_letters + string.digits + "-_.=+/:", min_size=1)
HOSTS = st.sampled_from(["10.96.0.1", "fd00::1", "api.example.test", "true", "10.96.0.1:1"])


@given(TOKENS, HOSTS, st.integers(1, 65535), st.binary(min_size=1), st.sampled_from(["", "\n"]))
def test_what_the_agent_writes_is_read_back(token: str, host: str, port: int, ca: bytes, end: str) -> None:
    server = server_url("https", host, str(port))
    found = values(kubeconfig(server, token + end, ca))
    assert (found["server"], found["token"]) == (server, token)
    assert found["certificate-authority-data"]
    assert "certificate-authority-data" not in values(kubeconfig(server, token, None))


@given(st.text())
def test_any_text_is_read_or_nothing_is_found(text: str) -> None:
    found = values(text)
    assert all(isinstance(value, str) for value in found.values())


@given(st.text(), st.text())
def test_a_token_that_needs_quotes(token: str, rest: str) -> None:
    """What is read is the token, or what kubeconfig.read refuses; never another line of the file."""
    found = values(kubeconfig("https://10.96.0.1:443", token, b"ca"))
    assert found["server"] == "https://10.96.0.1:443"
    assert found["token"] in (token, token.strip(), "") or not found["token"].isprintable()


def test_a_request() -> None:
    access = Access("10.96.0.1:443", "10.96.0.1", 443, "Q0E=", "token")
    lines = request(access, "namespaces/shop/pods/web").decode().split("\r\n")
    assert lines[0] == "GET /api/v1/namespaces/shop/pods/web HTTP/1.1"
    assert "Host: 10.96.0.1:443" in lines
    assert "Authorization: Bearer token" in lines
    assert "Connection: close" in lines
    assert lines[-2:] == ["", ""]


@given(st.binary(), st.lists(st.integers(1, 50)))
def test_chunks_are_joined(body: bytes, sizes: list[int]) -> None:
    chunks, rest = b"", body
    for size in sizes:
        part, rest = rest[:size], rest[size:]
        if part:
            chunks += f"{len(part):X}\r\n".encode() + part + b"\r\n"
    if rest:
        chunks += f"{len(rest):x} \r\n".encode() + rest + b"\r\n"
    whole = b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n" + chunks + b"0\r\nTrailer: x\r\n\r\n"
    assert response(whole) == (200, body)


WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 12\r\nX: y\r\n\r\n" + b'{"a":"bcdef"}'[:12]
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n6\r\nabcdef\r\n6\r\nghijkl\r\n0\r\n"


@pytest.mark.parametrize("whole", [WHOLE, CHUNKED])
def test_a_part_of_a_response_is_none(whole: bytes) -> None:
    assert response(whole)[0] == 200
    for size in range(len(whole)):
        with pytest.raises(DoubtError):
            response(whole[:size])


@given(st.binary(max_size=60), st.integers(0, 50), st.integers(0, 50))
def test_any_bytes_are_a_response_or_a_doubt(junk: bytes, begin: int, end: int) -> None:
    for data in (junk, WHOLE[:begin] + junk + WHOLE[end:], CHUNKED[:begin] + junk + CHUNKED[end:]):
        try:
            status, body = response(data)
        except DoubtError:
            continue
        assert 0 <= status < 1000
        assert body in data or b"chunked" in data.lower()


def test_a_question_for_a_name() -> None:
    message = query(0x1234, "api.example.test.", 28)
    assert message == b"\x12\x34\x01\0\0\1\0\0\0\0\0\0\3api\7example\4test\0\0\x1c\0\1"


@pytest.mark.parametrize("name", ["", ".", "a..b", "x" * 64 + ".test", "é.test", ("a" * 63 + ".") * 5])
def test_what_is_no_name_is_not_asked_for(name: str) -> None:
    with pytest.raises(ValueError, match=r"no name|ordinal"):
        query(1, name, 1)


QUESTION = query(7, "a.test", 1)[12:]
RECORD = b"\xc0\x0c\0\1\0\1\0\0\0\5\0\4\x0a\0\0\1"


def message(*records: bytes, number: int = 7, flags: bytes = b"\x81\x80") -> bytes:
    count = len(records).to_bytes(2, "big")
    return number.to_bytes(2, "big") + flags + b"\0\1" + count + b"\0\0\0\0" + QUESTION + b"".join(records)


def test_answers_to_a_question() -> None:
    alias = b"\xc0\x0c\0\5\0\1\0\0\0\5\0\4\1b\xc0\x0e"
    assert answers(message(alias, RECORD), 7, 1) == ["10.0.0.1"]
    assert answers(message(RECORD), 8, 1) == []  # somebody else's
    assert answers(message(RECORD), 7, 28) == []
    assert answers(message(RECORD, flags=b"\x01\x80"), 7, 1) == []  # a question
    assert answers(message(RECORD, flags=b"\x81\x83"), 7, 1) == []  # NXDOMAIN
    assert answers(message(RECORD.replace(b"\0\4\x0a", b"\0\3\x0a")), 7, 1) == []


@given(st.binary(max_size=80), st.integers(0, 40), st.integers(0, 40))
def test_any_bytes_are_answers_or_an_error(junk: bytes, begin: int, end: int) -> None:
    good = message(RECORD)
    for data in (junk, good[:begin] + junk + good[end:]):
        try:
            found = answers(data, 7, 1)
        except ValueError:
            continue
        assert all(address.count(".") == 3 for address in found)
