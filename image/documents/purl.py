"""Package URLs of what an image holds, in their canonical form (https://github.com/package-url/purl-spec)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import quote

from image.model import ANY_ARCHITECTURE, DebPackage, Subject, Wheel

DISTRO = "debian-13"
OWN_NAMESPACE = "meshcni"


def deb(package: DebPackage) -> str:
    """A Debian package; `upstream` names the source package where that has another name or version.

    Scanners match Debian's advisories by source package, and read it from this qualifier.
    """
    upstream = package.source
    if package.source_version != package.version:
        upstream += f"@{package.source_version}"
    qualifiers = {"arch": package.architecture, "distro": DISTRO}
    if upstream != package.name:
        qualifiers["upstream"] = upstream
    return _purl("deb", "debian", package.name, package.version, qualifiers)


def pypi(wheel: Wheel) -> str:
    """A Python package. PyPI's names are compared in lower case with dashes."""
    return _purl("pypi", "", re.sub(r"[-_.]+", "-", wheel.name).lower(), wheel.version, {})


def own(name: str, version: str, architecture: str) -> str:
    """Something of this project: there is no registry that it comes from."""
    qualifiers = {} if architecture in ("", ANY_ARCHITECTURE) else {"arch": architecture}
    return _purl("generic", OWN_NAMESPACE, name, version, qualifiers)


def oci(subject: Subject) -> str:
    """The image itself, by its manifest's digest; no registry is named, for a mirror changes nothing."""
    return _purl("oci", "", subject.name.rsplit("/", 1)[-1].lower(), subject.digest, {"arch": subject.architecture})


def _purl(kind: str, namespace: str, name: str, version: str, qualifiers: Mapping[str, str]) -> str:
    path = "/".join(_quoted(part) for part in (kind, namespace, name) if part)
    query = "&".join(f"{key}={_quoted(value)}" for key, value in sorted(qualifiers.items()))
    return f"pkg:{path}@{_quoted(version)}" + (f"?{query}" if query else "")


def _quoted(text: str) -> str:
    return quote(text, safe=":")  # everything but unreserved characters and the colon
