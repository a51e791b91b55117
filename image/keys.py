"""The signing key: ECDSA on P-256, as cosign's are, from a file or the environment."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from image.model import ImageError

KEY_VARIABLE = "MESHCNI_SIGNING_KEY"  # a PEM text, or the path of one
PASSWORD_VARIABLE = "MESHCNI_SIGNING_PASSWORD"
PRIVATE_NAME, PUBLIC_NAME = "meshcni.key", "meshcni.pub"
MAKE_ONE = "make a pair with `python -m image keygen DIRECTORY`"


@dataclass(frozen=True, slots=True)
class PublicKey:
    """Checks signatures."""

    key: ec.EllipticCurvePublicKey

    def verifies(self, signature: bytes, data: bytes) -> bool:
        """Say whether `signature` (DER) is this key's, of `data`."""
        try:
            self.key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            return False
        return True

    @property
    def identifier(self) -> str:
        """SHA-256 of the key itself, which names it in an envelope."""
        encoded = self.key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        digest = hashes.Hash(hashes.SHA256())
        digest.update(encoded)
        return digest.finalize().hex()

    def pem(self) -> bytes:
        """Spell the key as PEM."""
        return self.key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


@dataclass(frozen=True, slots=True)
class PrivateKey:
    """Signs. `repr` shows nothing of it."""

    key: ec.EllipticCurvePrivateKey

    def sign(self, data: bytes) -> bytes:
        """Sign `data` (DER). The nonce is made from key and data (RFC 6979): signing again gives the same bytes."""
        return self.key.sign(data, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))

    @property
    def public(self) -> PublicKey:
        """The half that others check with."""
        return PublicKey(self.key.public_key())

    def pem(self, password: str = "") -> bytes:
        """Spell the key as PKCS 8, encrypted where there is a password."""
        encryption = (
            serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
        )
        return self.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def generate() -> PrivateKey:
    """Make a new key."""
    return PrivateKey(ec.generate_private_key(ec.SECP256R1()))


def parse_private(pem: bytes, origin: str, password: str = "") -> PrivateKey:
    """Read a private key's PEM; `origin` says in an error where it came from, never what it is."""
    if b"ENCRYPTED SIGSTORE PRIVATE KEY" in pem or b"ENCRYPTED COSIGN PRIVATE KEY" in pem:
        raise ImageError(f"{origin}: cosign's own encrypted form of a key; expected PKCS 8 in PEM", MAKE_ONE)
    try:
        key = serialization.load_pem_private_key(pem, password.encode() if password else None)
    except TypeError as error:  # a password that is needed and missing, or given and not needed
        raise ImageError(f"{origin}: {error}", f"the password is read from {PASSWORD_VARIABLE}") from None
    except ValueError:
        if password:
            raise ImageError(f"{origin}: no private key opens with the password of {PASSWORD_VARIABLE}") from None
        raise ImageError(f"{origin}: found no private key in PEM; expected ECDSA on P-256", MAKE_ONE) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ImageError(f"{origin}: found another kind of key; expected ECDSA on P-256", MAKE_ONE)
    return PrivateKey(key)


def parse_public(pem: bytes, origin: str) -> PublicKey:
    """Read a public key's PEM."""
    if b"PRIVATE KEY" in pem:
        raise ImageError(
            f"{origin}: found a private key; expected the public one", "keep the private key where it is made"
        )
    try:
        key = serialization.load_pem_public_key(pem)
    except ValueError:
        raise ImageError(f"{origin}: found no public key in PEM; expected ECDSA on P-256") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ImageError(f"{origin}: found another kind of key; expected ECDSA on P-256")
    return PublicKey(key)


def read_private(path: str | None, environment: Mapping[str, str]) -> PrivateKey:
    """Find the signing key: the file `path`, or what the environment holds or names."""
    given = path or environment.get(KEY_VARIABLE, "")
    if not given:
        raise ImageError("no signing key", f"give --key PATH or set {KEY_VARIABLE} to a PEM or its path; {MAKE_ONE}")
    password = environment.get(PASSWORD_VARIABLE, "")
    if given.lstrip().startswith("-----BEGIN"):
        return parse_private(given.encode(), KEY_VARIABLE, password)
    return parse_private(_read(Path(given)), given, password)


def read_public(path: str) -> PublicKey:
    """Read the public key of a file."""
    return parse_public(_read(Path(path)), path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror}") from None


def write_pair(directory: Path, key: PrivateKey, password: str = "") -> tuple[Path, Path]:
    """Write both halves into `directory`, over no file: a lost key cannot be made again."""
    directory.mkdir(parents=True, exist_ok=True)
    private, public = directory / PRIVATE_NAME, directory / PUBLIC_NAME
    for path, content, mode in ((private, key.pem(password), 0o600), (public, key.public.pem(), 0o644)):
        try:
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                file.write(content)
        except FileExistsError:
            raise ImageError(f"{path}: exists already", "name another directory, or move the old pair away") from None
    return private, public


def main(argv: Sequence[str]) -> int:
    """`keygen DIRECTORY`."""
    parser = argparse.ArgumentParser(prog="python -m image keygen", description="Make a key pair to sign images with.")
    parser.add_argument("directory", type=Path, help=f"gets {PRIVATE_NAME} and {PUBLIC_NAME}")
    arguments = parser.parse_args(argv)
    private, public = write_pair(arguments.directory, generate(), os.environ.get(PASSWORD_VARIABLE, ""))
    print(f"private key: {private}\npublic key:  {public}")  # noqa: T201
    return 0
