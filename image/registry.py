"""Images in registries: pushed with all their referrers by oras, and fetched the same way. No digest changes."""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from image import attestations, tools
from image.model import ImageError
from image.referrers import Descriptor
from image.signing import SIGNATURE, SignedImage, images
from image.stored import Manifest, StoredLayout

HOST = r"(?:localhost|[a-zA-Z0-9-]+(?:\.[a-zA-Z0-9-]+)+|[a-zA-Z0-9-]+(?=:)|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
REPOSITORY = re.compile(rf"{HOST}(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)+")
REFERENCE = re.compile(
    rf"(?P<repository>{REPOSITORY.pattern})(?::(?P<tag>\w[\w.-]{{0,127}}))?(?:@(?P<digest>sha256:[0-9a-f]{{64}}))?"
)
TIMEOUT_S = 1800  # of one copy; a registry that answers nothing ends earlier, by oras' own limits
SYMPTOMS = {  # words of oras' answer: what to do about it
    "connection refused": "no registry answers there: check host and port",
    "no such host": "the host's name is unknown: check it",
    "server gave HTTP response to HTTPS client": "the registry speaks plain HTTP: give --plain-http",
    "certificate signed by unknown authority": "the registry's certificate is not trusted: install its CA",
    "panic:": "oras met several errors at once, which it cannot report: try again",
    "401": "log in with `oras login` or give --authfile with credentials for this registry",
    "unauthorized": "log in with `oras login` or give --authfile with credentials for this registry",
    "basic credential not found": "log in with `oras login` or give --authfile with credentials for this registry",
    "403": "the account may not do this there",
    "denied": "the account may not do this there",
    "not found": "check the repository's name and the tag",
}


@dataclass(frozen=True, slots=True)
class Oras:
    """Runs oras against one registry. `authfile` has the format of `.dockerconfigjson` of a pull secret."""

    program: Path
    authfile: Path | None = None
    plain_http: bool = False

    def options(self, prefix: str = "") -> list[str]:
        """How to reach the registry; `prefix` is `from-` or `to-` for a copy."""
        found = [f"--{prefix}plain-http"] if self.plain_http else []
        return found + ([f"--{prefix}registry-config", str(self.authfile)] if self.authfile else [])

    def run(self, *arguments: str) -> str:
        """Run oras; what it complains about ends in an ImageError."""
        if self.authfile and not self.authfile.is_file():
            raise ImageError(f"{self.authfile}: missing; expected credentials as in .dockerconfigjson")
        command = [str(self.program), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise ImageError(f"oras {arguments[0]}: no end after {TIMEOUT_S} s") from None
        if done.returncode != 0:
            said = done.stderr.strip().removeprefix("Error: ").splitlines()
            message = next((line for line in said if line), f"exit status {done.returncode}")
            hints = (hint for symptom, hint in SYMPTOMS.items() if symptom in done.stderr)
            raise ImageError(f"oras {arguments[0]} {arguments[-1]}: {message}", next(hints, ""))
        return done.stdout

    def copy(self, *arguments: str) -> None:
        """Copy an image, then what refers to it.

        A recursive copy alone leaves an index out that nothing refers to, and oras 1.2 panics in it instead of saying
        why a registry cannot be used.
        """
        self.run("cp", "--no-tty", *arguments)
        self.run("cp", "--no-tty", "--recursive", *arguments)


def push(path: Path, repository: str, oras: Oras) -> list[str]:
    """Copy every image of a layout into a repository, under all its tags; give the tags."""
    if not REPOSITORY.fullmatch(repository):
        raise ImageError(f"{repository}: expected HOST[:PORT]/NAME without a tag, in lower case")
    layout = StoredLayout(path)
    layout.check_all()
    pushed: list[str] = []
    about = layout.referrers()
    for image in images(layout):
        if image.tags:
            oras.copy(*oras.options("to-"), "--from-oci-layout", f"{path}:{image.tags[0]}", repository)
            for tag, referrer in _cosign_tags(image, about):
                oras.run("tag", *oras.options(), f"{repository}@{referrer.digest}", tag)
            # Last, so that who pulls by tag finds the signatures too.
            oras.run("tag", *oras.options(), f"{repository}@{image.index.digest}", *image.tags)
            pushed += image.tags
    return pushed


def _cosign_tags(image: SignedImage, about: dict[str, list[Manifest]]) -> list[tuple[str, Descriptor]]:
    """Say under which tags a cosign that does not ask for referrers looks for signatures and attestations."""
    suffixes = {SIGNATURE: "sig", attestations.DSSE: "att"}
    return [
        (f"{subject.replace(':', '-')}.{suffixes[found.artifact_type]}", found.descriptor)
        for subject in (image.index.digest, *(platform.descriptor.digest for platform in image.platforms))
        for found in about.get(subject, ())
        if found.artifact_type in suffixes
    ]


def fetch(reference: str, folder: Path, oras: Oras) -> str:
    """Copy an image with its referrers into a new layout at `folder`; give the tag that was asked for, if any."""
    match = REFERENCE.fullmatch(reference)
    if not match or not (match["tag"] or match["digest"]):
        raise ImageError(f"{reference}: expected HOST[:PORT]/NAME:TAG or HOST[:PORT]/NAME@sha256:...")
    source = f"{match['repository']}@{match['digest']}" if match["digest"] else reference
    target = f"{folder}:{match['tag']}" if match["tag"] else str(folder)
    oras.copy(*oras.options("from-"), source, "--to-oci-layout", target)
    return match["tag"] or ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a command line say how to reach a registry."""
    parser.add_argument("--authfile", type=Path, help="credentials as in .dockerconfigjson; else those of `oras login`")
    parser.add_argument("--plain-http", action="store_true", help="the registry has no TLS")


def from_arguments(arguments: argparse.Namespace) -> Oras:
    """Make what `add_arguments` asked for."""
    return Oras(tools.find("oras"), arguments.authfile, arguments.plain_http)


def main(argv: Sequence[str]) -> int:
    """`push REGISTRY/REPOSITORY`."""
    parser = argparse.ArgumentParser(prog="python -m image push", description="Push an image with its referrers.")
    parser.add_argument("repository", help="HOST[:PORT]/NAME")
    parser.add_argument("--layout", type=Path, default=Path("build/image"))
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    tags = push(arguments.layout, arguments.repository, from_arguments(arguments))
    for tag in tags:
        print(f"{arguments.repository}:{tag}")  # noqa: T201
    return 0
