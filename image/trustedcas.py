"""The bundle of certificate authorities, which update-ca-certificates would make."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from image.model import ImageError

FOLDER = "usr/share/ca-certificates/"
BUNDLE = "etc/ssl/certs/ca-certificates.crt"
CONFIGURATION = "etc/ca-certificates.conf"
_BEGIN, _END = b"-----BEGIN CERTIFICATE-----", b"-----END CERTIFICATE-----"


def certificates(paths: Iterable[str]) -> list[str]:
    """The paths that are certificates of the package."""
    return sorted(path for path in paths if path.startswith(FOLDER) and path.endswith(".crt"))


def bundle(files: Mapping[str, bytes]) -> bytes:
    """Every certificate of `files` in the order of their names."""
    parts = []
    for path, data in sorted(files.items()):
        text = data.strip()
        if text.count(_BEGIN) != 1 or not text.startswith(_BEGIN) or not text.endswith(_END):
            raise ImageError(f"/{path}: expected one PEM certificate, found something else", "is the package damaged?")
        parts.append(text + b"\n")
    if not parts:
        raise ImageError(f"no certificate below /{FOLDER}", "is ca-certificates among the packages?")
    return b"".join(parts)


def configuration(paths: Iterable[str]) -> bytes:
    """The list of the certificates in use, for update-ca-certificates."""
    return "".join(f"{path.removeprefix(FOLDER)}\n" for path in certificates(paths)).encode()
