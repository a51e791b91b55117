"""`python -m image COMMAND`: everything that is done to the image."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

from image.model import ImageError

Command = Callable[[Sequence[str]], int]
ROOT = Path(__file__).resolve().parent.parent
USAGE_STATUS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        _print_commands()
        return 0 if given else USAGE_STATUS
    if given[0] not in COMMANDS:
        _complain(ImageError(f"unknown command {given[0]!r}", f"known: {', '.join(COMMANDS)}"))
        return USAGE_STATUS
    try:
        return COMMANDS[given[0]][0](given[1:])
    except ImageError as error:
        _complain(error)
        return 1
    except BrokenPipeError:  # the reader of our output went away
        return 1


def build(arguments: Sequence[str]) -> int:
    """Build the image into an OCI layout."""
    from image import build as building
    from image import definition, evidence

    defined = definition.read(ROOT / "image" / "image.toml", ROOT / "src")
    parser = argparse.ArgumentParser(prog="python -m image build", description="Build the image as an OCI layout.")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "image", help="the layout (build/image)")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "image", help="what is kept between builds")
    parser.add_argument("--no-cache", action="store_true", help="compile and compress everything anew")
    parser.add_argument("--variant", action="append", choices=tuple(defined.variants), help="only this one; repeatable")
    parser.add_argument("--builder-id", default=evidence.LOCAL_BUILDER, help="who builds, for the provenance: a URI")
    parser.add_argument("--commit", default="", help="the commit that this clean checkout is at, for the provenance")
    options = parser.parse_args(arguments)
    lock = building.lock_of(ROOT)

    def run(cache: Path) -> Sequence[building.BuiltImage]:
        builder = building.Builder(defined, lock, ROOT, cache)
        finish = evidence.attach(builder, options.builder_id, options.commit)
        return builder.build(options.output, options.variant or (), finish)

    if options.no_cache:
        with building.fresh_cache(options.cache) as cache:
            built = run(cache)
    else:
        built = run(options.cache)
    for one in built:
        size = sum(len(entry.data) for entry in one.contents.entries)
        platform = f"{one.subject.variant} {one.subject.architecture}"
        _say(f"image: {platform:<14} {one.subject.digest} {size / 2**20:6.1f} MiB  {' '.join(one.tags)}")
    return 0


def _from(module: str) -> Command:
    """The `main` of a module, loaded when it runs."""

    def run(arguments: Sequence[str]) -> int:
        command: Command = import_module(f"image.{module}").main
        return command(arguments)

    return run


COMMANDS: Mapping[str, tuple[Command, str]] = {
    "build": (build, "build every variant for every architecture into an OCI layout"),
    "lock": (_from("locking"), "lock the packages that the archive has now"),
    "keygen": (_from("keys"), "make a pair of keys to sign with"),
    "sign": (_from("signing"), "sign images and attestations of a layout"),
    "verify": (_from("verify"), "check an image offline"),
    "push": (_from("registry"), "copy a layout to a registry, referrers included"),
    "export-cosign": (_from("cosignfolder"), "write the folder that cosign reads without a registry"),
}


def _print_commands() -> None:
    _say("usage: python -m image COMMAND [--help]\n")
    for name, (_, meaning) in COMMANDS.items():
        _say(f"  {name:<14} {meaning}")


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _complain(error: ImageError) -> None:
    sys.stderr.write(f"error: {error.message}\n")
    if error.hint:
        sys.stderr.write(f"hint: {error.hint}\n")


if __name__ == "__main__":
    sys.exit(main())
