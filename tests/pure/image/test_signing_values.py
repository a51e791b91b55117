"""What is signed and attached, as values: payloads, statements, envelopes, the manifests that hold them."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image.model import ImageError, Subject
from image.rebuild import first_difference
from image.referrers import MANIFEST, Descriptor, Layer, Referrer, digest_of, encode
from image.registry import REFERENCE, REPOSITORY
from image.stored import descriptor

from image import attestations, keys, signing

KEY = keys.generate()
DIGEST = "sha256:" + "a" * 64
SUBJECT = Subject("meshcni/istio-install-cni", DIGEST, "amd64", "runtime", "1.30.3", datetime(2026, 1, 1, tzinfo=UTC))
NAMED = Descriptor(MANIFEST, DIGEST, 7)


def test_the_payload_is_cosigns() -> None:
    assert json.loads(signing.payload(DIGEST, ("1", "1.30"))) == {
        "critical": {
            "identity": {"docker-reference": ""},
            "image": {"docker-manifest-digest": DIGEST},
            "type": "cosign container image signature",
        },
        "optional": {"tags": "1,1.30"},
    }
    assert json.loads(signing.payload(DIGEST))["optional"] is None


def test_a_signature_is_a_referrer_as_cosign_writes_it() -> None:
    made = signing.signature(NAMED, KEY)
    manifest = json.loads(made.manifest)
    assert manifest["artifactType"] == manifest["config"]["mediaType"] == signing.SIGNATURE
    assert manifest["subject"] == {"mediaType": MANIFEST, "digest": DIGEST, "size": 7}
    (layer,) = manifest["layers"]
    assert layer["mediaType"] == "application/vnd.dev.cosign.simplesigning.v1+json"
    assert layer["digest"] == digest_of(signing.payload(DIGEST))
    signature = base64.b64decode(layer["annotations"]["dev.cosignproject.cosign/signature"])
    assert KEY.public.verifies(signature, signing.payload(DIGEST))


@given(st.binary(max_size=200))
def test_the_same_key_signs_the_same_bytes_the_same_way(data: bytes) -> None:
    assert KEY.sign(data) == KEY.sign(data)
    assert KEY.public.verifies(KEY.sign(data), data)
    assert not KEY.public.verifies(KEY.sign(data), data + b"x")
    assert not keys.generate().public.verifies(KEY.sign(data), data)


@pytest.mark.parametrize(
    "payload",
    [
        signing.payload("sha256:" + "b" * 64),
        signing.payload(DIGEST).replace(b"cosign container", b"other"),
        b"{}",
        b"[]",
        b"",
        b'{"critical": 3}',
    ],
)
def test_a_signed_payload_that_says_something_else_counts_for_nothing(payload: bytes) -> None:
    encoded = base64.b64encode(KEY.sign(payload)).decode()
    assert signing.open_payload(payload, encoded, KEY.public, DIGEST) is None


@given(st.text(max_size=40))
def test_a_signature_of_any_text_counts_for_nothing(encoded: str) -> None:
    assert signing.open_payload(signing.payload(DIGEST), encoded, KEY.public, DIGEST) is None


def test_a_statement_is_in_toto_about_the_image() -> None:
    assert json.loads(attestations.statement(SUBJECT, "urn:x", {"a": 1})) == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "meshcni/istio-install-cni", "digest": {"sha256": "a" * 64}}],
        "predicateType": "urn:x",
        "predicate": {"a": 1},
    }


def test_attestations_do_not_depend_on_the_order_of_documents() -> None:
    documents = {"urn:b": ("b", {"x": 1, "y": 2}), "urn:a": ("a", [])}
    reverse = {"urn:a": ("a", []), "urn:b": ("b", {"y": 2, "x": 1})}
    made = attestations.attestations(SUBJECT, NAMED, documents)
    assert [one.blobs for one in made] == [one.blobs for one in attestations.attestations(SUBJECT, NAMED, reverse)]
    assert [one.annotations for one in made] == [
        {"in-toto.io/predicate-type": "urn:a"},
        {"in-toto.io/predicate-type": "urn:b"},
    ]


def test_an_envelope_gives_back_the_statement() -> None:
    data = attestations.statement(SUBJECT, "urn:x", {"a": 1})
    envelope = attestations.envelope(data, KEY)
    assert envelope == attestations.envelope(data, KEY)
    assert attestations.open_envelope(envelope, KEY.public, "here") == data


def tampered(part: str, value: object) -> bytes:
    envelope = json.loads(attestations.envelope(b"{}", KEY))
    return encode({**envelope, part: value})


@pytest.mark.parametrize(
    ("envelope", "message"),
    [
        (tampered("payload", base64.b64encode(b"[]").decode()), "found none that it verifies"),
        (tampered("payloadType", "text/plain"), "expected a payload of type application/vnd.in-toto"),
        (tampered("signatures", []), "found none that it verifies"),
        (tampered("signatures", [{"keyid": "x", "sig": ""}]), "found none that it verifies"),
        (tampered("signatures", 3), "no DSSE envelope"),
        (tampered("signatures", [3]), "no DSSE envelope"),
        (tampered("payload", 3), "no DSSE envelope"),
        (b"", "no DSSE envelope"),
        (b"[]", "no DSSE envelope"),
        (b"{}", "no DSSE envelope"),
    ],
)
def test_a_tampered_envelope_is_refused(envelope: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=f"here: .*{message}"):
        attestations.open_envelope(envelope, KEY.public, "here")


def test_an_envelope_by_another_key_is_refused() -> None:
    with pytest.raises(ImageError, match="expected a signature by key"):
        attestations.open_envelope(attestations.envelope(b"{}", keys.generate()), KEY.public, "here")


def test_a_referrers_blobs_are_what_its_manifest_names() -> None:
    made = Referrer(NAMED, "urn:x", (Layer("text/plain", b"1"), Layer("text/plain", b"2")), {"a": "b"})
    manifest = json.loads(made.manifest)
    named = [manifest["config"]["digest"], *(layer["digest"] for layer in manifest["layers"])]
    assert [digest_of(blob) for blob in made.blobs] == [*named, made.descriptor.digest]
    assert made.descriptor.to_json() == {
        "mediaType": MANIFEST,
        "digest": digest_of(made.manifest),
        "size": len(made.manifest),
        "artifactType": "urn:x",
        "annotations": {"a": "b"},
    }


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"mediaType": "a", "digest": "sha256:" + "A" * 64, "size": 1},
        {"mediaType": "a", "digest": "sha512:" + "a" * 64, "size": 1},
        {"mediaType": "a", "digest": DIGEST + "\n", "size": 1},
        {"mediaType": "a", "digest": "sha256:" + "../" * 21 + "x", "size": 1},
        {"mediaType": "a", "digest": DIGEST, "size": "1"},
        {"mediaType": "a", "digest": DIGEST, "size": 1, "annotations": [1]},
    ],
)
def test_a_descriptor_is_read_strictly(value: object) -> None:
    with pytest.raises(ImageError, match="here: expected a descriptor"):
        descriptor(value, "here")


# --- keys -------------------------------------------------------------------------------------------------------------

COSIGN_FORM = b"-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\neyJ9\n-----END ENCRYPTED SIGSTORE PRIVATE KEY-----\n"
NO_KEY = b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
P384 = b"""-----BEGIN PUBLIC KEY-----
MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAEl9Yn3bK+WzH1t2iw
-----END PUBLIC KEY-----
"""


@pytest.mark.parametrize(
    ("pem", "password", "message"),
    [
        (b"", "", "found no private key"),
        (NO_KEY, "", "found no private key"),
        (KEY.public.pem(), "", "found no private key"),
        (COSIGN_FORM, "", "cosign's own encrypted form"),
        (KEY.pem("secret"), "", "Password was not given"),
        (KEY.pem("secret"), "wrong", "no private key opens with the password"),
        (KEY.pem(), "secret", "Password was given but private key is not encrypted"),
    ],
)
def test_a_private_key_that_cannot_be_used_says_why_and_shows_nothing(pem: bytes, password: str, message: str) -> None:
    with pytest.raises(ImageError, match=f"here: .*{message}") as caught:
        keys.parse_private(pem, "here", password)
    assert "BEGIN" not in caught.value.message + caught.value.hint
    assert "secret" not in caught.value.message + caught.value.hint


def test_a_public_key_is_not_taken_from_a_private_one() -> None:
    with pytest.raises(ImageError, match="here: found a private key"):
        keys.parse_public(KEY.pem(), "here")
    for pem in (b"", P384):
        with pytest.raises(ImageError, match="here: found no public key"):
            keys.parse_public(pem, "here")


def test_no_key_at_all_says_how_to_get_one() -> None:
    with pytest.raises(ImageError, match="no signing key") as caught:
        keys.read_private(None, {})
    assert "MESHCNI_SIGNING_KEY" in caught.value.hint
    assert "keygen" in caught.value.hint


# --- references -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "repository",
    ["localhost/x", "localhost:5000/x", "example.com/a/b-c/d__e", "127.0.0.1:5055/mesh/istio-install-cni", "[::1]:5/x"],
)
def test_repositories_are_recognised(repository: str) -> None:
    assert REPOSITORY.fullmatch(repository)
    for suffix, tag, digest in (
        (":1.30-dev", "1.30-dev", None),
        (f"@{DIGEST}", None, DIGEST),
        (f":1@{DIGEST}", "1", DIGEST),
    ):
        match = REFERENCE.fullmatch(repository + suffix)
        assert match
        assert (match["repository"], match["tag"], match["digest"]) == (repository, tag, digest)


@pytest.mark.parametrize(
    "text", ["", "x", "build/image", "./build", "/x", "../x", "example.com", "a.b/C", "a.b/c/", "a.b//c"]
)
def test_what_is_no_repository_is_not_taken_for_one(text: str) -> None:
    assert not REPOSITORY.fullmatch(text)


# --- differences ------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, JSON)
def test_the_first_difference_is_one(expected: object, found: object) -> None:
    _, mine, theirs = first_difference(expected, found)
    assert (mine == theirs) == (expected == found)


def test_the_first_difference_is_named_by_its_path() -> None:
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == ("a[1].b", 2, 3)
    assert first_difference({"a": [1]}, {"a": [1, 2]}) == ("a", [1], [1, 2])
    assert first_difference({}, {"z": 0}) == ("z", None, 0)
