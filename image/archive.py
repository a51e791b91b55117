"""Where Debian's archives are for this machine: the environment says it, else apt's own sources do.

No address of an archive stands in the repository, so a build uses the mirror (and proxy) that the machine uses anyway.
"""

from __future__ import annotations

import os
import subprocess
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from image.model import DebPackage, ImageError

VARIABLES = {"debian": "MESHCNI_DEBIAN_MIRROR", "debian-security": "MESHCNI_SECURITY_MIRROR"}
CODENAMES = ("bookworm", "trixie", "forky", "sid", "oldstable", "stable", "testing", "unstable")
SCHEMES = ("http", "https", "file")


@dataclass(frozen=True, slots=True)
class Archive:
    """Base addresses by archive name (`debian`, `debian-security`), and apt's proxies by scheme."""

    bases: Mapping[str, str]
    proxies: Mapping[str, str] = field(default_factory=dict)

    def url(self, package: DebPackage) -> str:
        """The address of a package's file."""
        return f"{self.bases[package.archive]}/{urllib.parse.quote(package.path)}"

    def name_of(self, url: str) -> str:
        """Which archive an address belongs to; the longest base wins, since one may be the beginning of another."""
        for name, base in sorted(self.bases.items(), key=lambda item: -len(item[1])):
            if _plain(url).startswith(_plain(base) + "/"):
                return name
        raise ImageError(f"apt names {url}, which is in none of the archives {', '.join(self.bases.values())}")


def _plain(url: str) -> str:
    # apt quotes other characters than we do, and writes the address of a folder with one slash.
    return urllib.parse.unquote(url).replace("file:///", "file:/")


def of_machine(environ: Mapping[str, str] = os.environ) -> Archive:
    """The archives of this machine."""
    bases = {name: environ[variable] for name, variable in VARIABLES.items() if environ.get(variable)}
    if len(bases) < len(VARIABLES):
        bases = choose(_apt_targets()) | bases
    for name, variable in VARIABLES.items():
        if name not in bases:
            raise ImageError(
                f"apt's sources on this machine name no archive of {name}",
                f"set {variable} to the address of a mirror",
            )
        bases[name] = _checked(bases[name].rstrip("/"), variable)
    return Archive(bases, _apt_proxies())


def choose(targets: str) -> dict[str, str]:
    """The archives among apt's index targets, lines of `BASE SUITE COMPONENT`.

    Other vendors use Debian's suites too, so an address that ends like Debian's own comes first. Whether it really is
    Debian's archive is not decided here: apt checks the signature.
    """
    likely: dict[str, str] = {}
    possible: dict[str, str] = {}
    for line in targets.splitlines():
        base, suite, component = ([*line.split(), "", "", ""])[:3]
        codename, _, pocket = suite.partition("-")
        if component != "main" or codename not in CODENAMES or pocket not in ("", "updates", "security"):
            continue
        name = "debian-security" if pocket == "security" else "debian"
        chosen = likely if base.rstrip("/").endswith("/" + name) else possible
        chosen.setdefault(name, base)
    return possible | likely


def _checked(base: str, variable: str) -> str:
    parts = urllib.parse.urlsplit(base)
    if parts.scheme == "mirror+file":
        return _checked(_first_mirror(Path(parts.path)), variable)
    if parts.scheme not in SCHEMES or (parts.scheme != "file" and not parts.hostname):
        raise ImageError(
            f"the archive {base!r} cannot be used: expected an address that begins with {', '.join(SCHEMES)}",
            f"set {variable} to the address of a mirror",
        )
    return base


def _first_mirror(path: Path) -> str:
    """The preferred one of a file with mirrors, as the images for clouds have it."""
    try:
        words = path.read_text(encoding="utf-8").split()
    except OSError as error:
        raise ImageError(f"{path}: the list of mirrors cannot be read: {error.strerror}") from error
    return words[0].rstrip("/") if words else ""


def _apt_targets() -> str:
    shape = "$(REPO_URI) $(RELEASE) $(COMPONENT)"
    return _output(["apt-get", "indextargets", "--no-release-info", "--format", shape, "Identifier: Packages"])


def _apt_proxies() -> dict[str, str]:
    """Proxies that only apt knows; those of the environment are found by the downloader itself."""
    proxies = {}
    for scheme in ("http", "https"):
        value = _output(["apt-config", "dump", "--format", "%v%n", f"Acquire::{scheme}::Proxy"]).strip()
        if value and value != "DIRECT":
            proxies[scheme] = value
    return proxies


def _output(argv: list[str]) -> str:
    try:
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError as error:
        raise ImageError(f"{argv[0]} is missing: the image is built on a Debian machine", "run `make setup`") from error
    except subprocess.CalledProcessError as error:
        raise ImageError(f"`{' '.join(argv)}` failed: {error.stderr.strip()}") from error
