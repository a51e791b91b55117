"""`verify IMAGE`: everything about an image that can be checked without asking anybody, one line each."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from image import checks, definition, lockfile, registry, tools
from image.attestations import DECLARED, PROVENANCE
from image.checks import Locked
from image.keys import PublicKey, read_public
from image.model import ImageError
from image.signing import SignedImage, images
from image.stored import StoredLayout

ROOT = Path(__file__).resolve().parent.parent


class Report:
    """Runs checks and keeps what came out; a failed check does not keep others from being run."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write = write
        self.failures = 0

    def run(self, subject: str, check: Callable[[], str]) -> bool:
        """Run a check, write its line, and say whether it passed."""
        try:
            self.write(f"ok      {subject}: {check()}")
        except ImageError as error:
            self.failures += 1
            self.write(f"FAILED  {subject}: {error.message}")
            if error.hint:
                self.write(f"        {error.hint}")
            return False
        return True


def verify(layout: StoredLayout, key: PublicKey | None, locked: Locked | None, report: Report) -> None:
    """Check all images of a layout. What is built upon damaged blobs is not looked at."""
    if not report.run("blobs", lambda: checks.blobs(layout)):
        return
    found: list[SignedImage] = []

    def listed() -> str:
        found.extend(images(layout))
        return ", ".join(sorted(layout.tags)) or "without tags"

    if report.run("images", listed):
        for image in found:
            verify_image(layout, image, key, locked, report)


def verify_image(
    layout: StoredLayout, image: SignedImage, key: PublicKey | None, locked: Locked | None, report: Report
) -> None:
    """Check one image index and its platforms."""
    about = layout.referrers()
    name = max(image.tags, key=len, default=image.index.digest)
    if key:
        report.run(name, partial(checks.tags, layout, about, image, key))
    for platform in image.platforms:
        where = f"{name} {platform.architecture}"
        if key:
            report.run(where, partial(checks.platform, layout, about, platform, key))
        attested = [
            kind
            for kind in DECLARED
            if report.run(where, partial(checks.attestation, layout, about, platform, kind, key))
        ]
        for kind in filter(checks.BILLS_OF_MATERIALS.__contains__, attested):
            report.run(where, partial(checks.bill_of_materials, layout, about, platform, kind, key))
        if locked and PROVENANCE in attested:
            report.run(where, partial(checks.materials, layout, about, platform, key, locked))


def main(argv: Sequence[str]) -> int:
    """`verify IMAGE`; exit status 1 when anything is not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m image verify", description="Check an image, offline.")
    parser.add_argument("image", help="folder of an OCI layout, or HOST[:PORT]/NAME:TAG or @DIGEST in a registry")
    parser.add_argument("--key", help="public key (PEM); without one no signature is checked")
    parser.add_argument("--lock", type=Path, default=tools.LOCK, help="lock that the provenance is compared with")
    parser.add_argument("--rebuild", action="store_true", help="build the image again and compare all digests")
    registry.add_arguments(parser)
    arguments = parser.parse_args(argv)
    key = read_public(arguments.key) if arguments.key else None
    report = Report(print)
    with tempfile.TemporaryDirectory(prefix="meshcni-verify-") as temporary:
        path = _local(arguments, Path(temporary) / "image")
        layout = StoredLayout(path)
        verify(layout, key, Locked(lockfile.read(arguments.lock), defined_groups()), report)
        if not key:
            print("        signatures were not checked: give --key with the public key")  # noqa: T201
        if arguments.rebuild and not report.failures:
            from image import rebuild  # the builder is needed for nothing else

            report.run("rebuild", partial(rebuild.compare_with_new, layout, Path(temporary) / "rebuilt"))
    if report.failures:
        print(f"{arguments.image}: {report.failures} checks FAILED")  # noqa: T201
        return 1
    print(f"{arguments.image}: verified")  # noqa: T201
    return 0


def defined_groups() -> Mapping[str, Sequence[str]]:
    """Groups of the lock that each variant of this checkout's image is built from."""
    defined = definition.read(ROOT / "image" / "image.toml", ROOT / "src")
    return {name: variant.packages for name, variant in defined.variants.items()}


def _local(arguments: argparse.Namespace, folder: Path) -> Path:
    """Find the layout, or fetch it."""
    given = Path(arguments.image)
    if given.exists() or not registry.REFERENCE.fullmatch(arguments.image):
        return given
    registry.fetch(arguments.image, folder, registry.from_arguments(arguments))
    return folder
