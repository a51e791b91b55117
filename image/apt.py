"""apt in a root of its own: no installed package, no source and no setting of this machine has a say.

It checks the archive's signature with the archive's keyring, needs no rights and installs nothing.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from image.archive import Archive
from image.debfile import fields
from image.model import ARCHITECTURES, DebPackage, ImageError

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
FOLDERS = (
    "etc/apt.conf.d",
    "etc/preferences.d",
    "etc/sources.list.d",
    "etc/trusted.gpg.d",
    "etc/auth.conf.d",
    "state/lists/partial",
    "cache/archives/partial",
    "tmp",
)


class Root:
    """An apt root under `folder`, with the given archives and nothing else."""

    def __init__(self, folder: Path, source: Archive, suites: Sequence[str], keyring: Path = KEYRING) -> None:
        self.folder = folder.resolve()
        self.source = source
        if not keyring.is_file():
            raise ImageError(f"{keyring} is missing: the archive's signature cannot be checked", "run `make setup`")
        for name in FOLDERS:
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._write("status", "")
        self._write("sources.list", self._sources(suites, keyring))
        self._write("apt.conf", self._configuration())

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def _sources(self, suites: Sequence[str], keyring: Path) -> str:
        lines = []
        for suite in suites:
            base = self.source.bases["debian-security" if suite.endswith("-security") else "debian"]
            lines.append(f"deb [signed-by={keyring} arch={','.join(ARCHITECTURES)}] {base} {suite} main\n")
        return "".join(lines)

    def _configuration(self) -> str:
        settings = {
            "Dir": str(self.folder),
            "Dir::State": "state",
            "Dir::State::status": str(self.folder / "status"),
            "Dir::Cache": "cache",
            "Dir::Cache::srcpkgcache": "",
            "Dir::Etc": "etc",
            "Dir::Etc::sourcelist": str(self.folder / "sources.list"),
            "APT::Install-Recommends": "false",
            "APT::Install-Suggests": "false",
            "Acquire::Languages": "none",
            "Acquire::ForceHash": "SHA256",
            "Acquire::Retries": "3",
            "Acquire::AllowReleaseInfoChange": "true",  # a suite that turns from stable to oldstable is the same suite
            "APT::Update::Error-Mode": "any",
            # apt's helpers keep our user: a folder that apt's own user cannot enter must do as well.
            "APT::Sandbox::User": "root",
        }
        settings |= {f"Acquire::{scheme}::Proxy": value for scheme, value in self.source.proxies.items()}
        return "".join(f'{name} "{value}";\n' for name, value in settings.items())

    def update(self) -> None:
        """Get the archives' indices for all architectures; a signature that is missing or wrong is an error."""
        self._run(ARCHITECTURES[0], "apt-get", "update", "-qq")

    def resolve(self, architecture: str, install: Sequence[str], alone: Sequence[str]) -> tuple[DebPackage, ...]:
        """The packages to `install` with what they depend on, and those `alone` without, sorted."""
        printed = ""
        if install:
            printed += self._run(architecture, "apt-get", "install", "-y", "-qq", "--print-uris", *install)
        if alone:
            printed += self._run(architecture, "apt-get", "download", "-qq", "--print-uris", *alone)
        urls = read_uris(printed)
        shown = self._run(architecture, "apt-cache", "show", *sorted(_spec(name) for _, name, _ in urls.values()))
        stanzas = {stanza.get("SHA256", ""): stanza for stanza in map(fields, shown.split("\n\n"))}
        found = []
        for sha256, (url, name, size) in urls.items():
            if sha256 not in stanzas:
                raise ImageError(f"apt wants {name} with SHA-256 {sha256}, but its index does not describe it")
            found.append(_package(stanzas[sha256], self.source.name_of(url), size))
        return tuple(sorted(found))

    def _run(self, architecture: str, *argv: str) -> str:
        settings = {
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            # apt would make its cache anew whenever the architecture is another.
            "Dir::Cache::pkgcache": f"pkgcache-{architecture}.bin",
        }
        options = [option for name, value in settings.items() for option in ("-o", f"{name}={value}")]
        own = {"APT_CONFIG": str(self.folder / "apt.conf"), "TMPDIR": str(self.folder / "tmp"), "LC_ALL": "C"}
        result = subprocess.run(
            [*argv, *options], env=os.environ | own, cwd=self.folder, capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise ImageError(
                f"`{' '.join(argv)}` failed for {architecture}: {(result.stderr or result.stdout).strip()}",
                "check the network, the archive that apt's sources name, and what [packages] asks for",
            )
        return result.stdout


def _package(stanza: Mapping[str, str], archive: str, size: int) -> DebPackage:
    # `Source` is left out where it is the package itself; its version stands in brackets where it differs.
    source, _, source_version = stanza.get("Source", stanza["Package"]).partition(" ")
    return DebPackage(
        name=stanza["Package"],
        version=stanza["Version"],
        architecture=stanza["Architecture"],
        archive=archive,
        path=stanza["Filename"].removeprefix("./"),
        sha256=stanza["SHA256"],
        size=size,
        source=source,
        source_version=source_version.strip("()") or stanza["Version"],
    )


def read_uris(printed: str) -> dict[str, tuple[str, str, int]]:
    """Address, file name and size by SHA-256, from lines of `'ADDRESS' NAME SIZE SHA256:HASH`."""
    found = {}
    for line in printed.splitlines():
        url, name, size, digest = line.split()
        kind, _, sha256 = digest.partition(":")
        if kind != "SHA256":
            raise ImageError(f"apt gives no SHA-256 for {name}: {line}")
        found[sha256] = (url.strip("'"), name, int(size))
    return found


def _spec(name: str) -> str:
    """What apt calls the package of a file name such as `libc6_2.41-12_arm64.deb`: `libc6:arm64=2.41-12`."""
    package, version, architecture = name.removesuffix(".deb").split("_")
    version = version.replace("%3a", ":")
    return f"{package}={version}" if architecture == "all" else f"{package}:{architecture}={version}"
