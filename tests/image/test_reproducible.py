"""A build elsewhere, by somebody else, at another time gives the same bytes."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import sys
from pathlib import Path

from image.toolchain import Toolchain
from tests.image.layers import Layout

from image import lockfile

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "image"
TREES = ("image", "native", "src")
WITHOUT_PACKAGES = "import elftools, securesystemslib, cryptography"


def checkout(folder: Path) -> Path:
    """What a build needs of the repository, with other times and modes than the original."""
    ignored = shutil.ignore_patterns("__pycache__")
    for tree in TREES:
        shutil.copytree(ROOT / tree, folder / tree, ignore=ignored, copy_function=shutil.copyfile)
    shutil.copyfile(ROOT / "LICENSE", folder / "LICENSE")
    shutil.copyfile(ROOT / "requirements.lock", folder / "requirements.lock")
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o700 if path.is_dir() else 0o600)
    return folder


def other_python() -> str:
    """Python of another version when there is one that has what the builder imports."""
    found = ROOT / ".venv-3.13" / "bin" / "python"
    works = found.exists() and subprocess.run([found, "-c", WITHOUT_PACKAGES], capture_output=True).returncode == 0
    return str(found) if works else sys.executable


def test_a_build_in_another_folder_without_cache_is_the_same(built_image: Path, tmp_path: Path) -> None:
    folder = checkout(tmp_path / "some where" / "else")
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in ("debs", "wheels"):  # checked by hash whenever they are used
        (cache / name).symlink_to(CACHE / name)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "TZ": "Pacific/Kiritimati",
        "LC_ALL": "C",
        "PYTHONHASHSEED": "4711",
        "SOURCE_DATE_EPOCH": "1",
    }
    output = tmp_path / "layout"
    words = [
        other_python(),
        "-m",
        "image",
        "build",
        "--variant",
        "runtime",
        "--cache",
        str(cache),
        "--output",
        str(output),
    ]
    done = subprocess.run(
        words, cwd=folder, env=environment, umask=0o077, capture_output=True, text=True, errors="replace"
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = Layout(built_image), Layout(output)
    assert theirs.tags
    for tag, index in theirs.tags.items():
        assert index.digest == ours.tags[tag].digest, tag
    referrers = {one.digest for one in theirs.stored.entries}
    assert referrers <= {one.digest for one in ours.stored.entries}, "an attestation differs"


def test_compression_is_that_of_the_locked_gzip(built_image: Path) -> None:
    """No bit depends on the zlib of this machine."""
    layout = Layout(built_image)
    toolchain = Toolchain(lockfile.read(ROOT / "image" / "lock.json"), CACHE)
    tag = min(layout.tags, key=len)
    blob = layout.blob(layout.manifest(tag, "arm64").children[2])
    assert toolchain.gzip(gzip.decompress(blob)) == blob
    assert blob[4:8] == bytes(4), "a time stamp"
