"""What an image says of its Debian packages: one file for each, as in distroless images, or dpkg's own database."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from image.definition import Alternative

STATUS_FOLDER = "var/lib/dpkg/status.d"
_INFO = "var/lib/dpkg/info"
_TRIGGERS = "var/lib/dpkg/triggers"
_ALTERNATIVES = "var/lib/dpkg/alternatives"
_FIRST = ("Package", "Status")


@dataclass(frozen=True, slots=True)
class Installed:
    """A package as the database knows it: its control fields and control files, and every path it shipped."""

    control: Mapping[str, str]
    control_files: Mapping[str, bytes]
    paths: Sequence[str]  # without a leading slash
    conffile_sums: Mapping[str, str]  # md5 of the configuration files, by path with a leading slash

    @property
    def name(self) -> str:
        """The package's name."""
        return self.control["Package"]

    @property
    def info_name(self) -> str:
        """Its name in the names of files: with the architecture where two may be installed side by side."""
        same = self.control.get("Multi-Arch") == "same"
        return f"{self.name}:{self.control['Architecture']}" if same else self.name


def status_files(
    packages: Iterable[Installed], md5sums: Mapping[str, Mapping[str, str]]
) -> dict[str, tuple[str, bytes]]:
    """For each package its control fields, and the MD5 sums of those of its files that are in the image.

    By path: the package's name and the data.
    """
    found: dict[str, tuple[str, bytes]] = {}
    for package in packages:
        stem = f"{STATUS_FOLDER}/{package.name}"
        found[stem] = (package.name, _paragraph(package.control).encode())
        sums = md5sums.get(package.name, {})
        lines = [f"{digest}  {path}\n" for path, digest in sorted(sums.items())]
        found[f"{stem}.md5sums"] = (package.name, "".join(lines).encode())
    return found


def database(packages: Sequence[Installed]) -> dict[str, bytes]:
    """dpkg's database as after an installation: every package `install ok installed`."""
    found: dict[str, bytes] = {
        "var/lib/dpkg/available": b"",
        "var/lib/dpkg/diversions": b"",
        "var/lib/dpkg/statoverride": b"",
        "var/lib/dpkg/info/format": b"1\n",
    }
    paragraphs = []
    for package in sorted(packages, key=lambda one: (one.name, one.control["Architecture"])):
        stem = f"{_INFO}/{package.info_name}"
        folders = {"/."}
        for path in package.paths:
            parts = path.split("/")
            folders.update("/" + "/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        found[f"{stem}.list"] = "".join(f"{path}\n" for path in sorted(folders)).encode()
        for name, data in package.control_files.items():
            if name != "control":
                found[f"{stem}.{name}"] = data
        paragraphs.append(_status(package))
    found["var/lib/dpkg/status"] = "\n".join(paragraphs).encode()
    return found | _triggers(packages)


def _triggers(packages: Sequence[Installed]) -> dict[str, bytes]:
    """Who wants to know when a file or a named trigger is touched (deb-triggers(5))."""
    lines: dict[str, list[str]] = {"File": [], "Unincorp": []}
    for package in packages:
        for line in package.control_files.get("triggers", b"").decode().splitlines():
            directive, _, trigger = line.partition(" ")
            if not directive.startswith("interest"):
                continue
            name = package.info_name + ("/noawait" if directive == "interest-noawait" else "")
            if trigger.startswith("/"):
                lines["File"].append(f"{trigger} {name}")
            else:
                lines.setdefault(trigger, []).append(name)
    return {
        f"{_TRIGGERS}/{name}": "".join(f"{line}\n" for line in sorted(found)).encode() for name, found in lines.items()
    }


def _status(package: Installed) -> str:
    fields = {"Package": package.name, "Status": "install ok installed", **package.control}
    conffiles = [f" {path} {package.conffile_sums[path]}" for path in sorted(package.conffile_sums)]
    if conffiles:
        fields["Conffiles"] = "\n" + "\n".join(conffiles)
    return _paragraph(fields)


def _paragraph(fields: Mapping[str, str]) -> str:
    order = [*(name for name in _FIRST if name in fields), *(name for name in fields if name not in _FIRST)]
    return "".join(f"{name}:{'' if fields[name].startswith(chr(10)) else ' '}{fields[name]}\n" for name in order)


def alternatives(rows: Iterable[Alternative]) -> tuple[dict[str, bytes], dict[str, str]]:
    """What update-alternatives records, and the links it makes: those of the choice with the highest priority."""
    files: dict[str, bytes] = {}
    links: dict[str, str] = {}
    for _, found in groupby(sorted(rows, key=lambda one: (one.name, one.priority)), key=lambda one: one.name):
        choices = list(found)
        best = choices[-1]
        places = {link.rsplit("/", 1)[1]: link for link in sorted(best.followers)}
        lines = ["auto", f"/{best.link}"]
        for name, link in places.items():
            lines += [name, f"/{link}"]
        lines.append("")
        for choice in sorted(choices, key=lambda one: one.target):
            lines += [f"/{choice.target}", str(choice.priority)]
            lines += [f"/{choice.followers[link]}" if link in choice.followers else "" for link in places.values()]
        files[f"{_ALTERNATIVES}/{best.name}"] = "\n".join([*lines, "", ""]).encode()
        for name, link in {best.name: best.link, **places}.items():
            links[link] = f"/etc/alternatives/{name}"
            links[f"etc/alternatives/{name}"] = f"/{best.followers.get(link, best.target)}"
    return files, links
