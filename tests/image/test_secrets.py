"""No secret is in the image: gitleaks finds none in its files, and finds those that are planted there."""

from __future__ import annotations

import json
import secrets
import string
from pathlib import Path

import pytest
from image.stored import StoredLayout
from tests.image import smallimage
from tests.image.programs import run

from image import keys, layercontents

TAG = "0"  # of the runtime variant


def unpack(layout: Path, tag: str, architecture: str, root: Path) -> Path:
    """Write an image's regular files below `root`."""
    stored = StoredLayout(layout)
    digest = smallimage.platform_digest(layout, tag, architecture)
    manifest = stored.manifest(next(one for one in stored.below(stored.tags[tag]) if one.digest == digest))
    for blob, diff_id in layercontents.layers(stored, manifest):
        for member, content in layercontents.members(stored.blob_path(blob.digest), blob.media_type, diff_id):
            if member.isreg():
                path = root / member.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    return root


def leaks(root: Path, home: Path) -> list[str]:
    """Let gitleaks look, and give the files in which it finds something."""
    report = home / "leaks.json"
    arguments = [
        "detect",
        "--no-git",
        "--no-banner",
        "--source",
        root,
        "--report-format",
        "json",
        "--report-path",
        report,
    ]
    done = run("gitleaks", *arguments, home=home)
    assert done.returncode in (0, 1), done.stderr
    found = [str(Path(one["File"]).relative_to(root)) for one in json.loads(report.read_text())]
    assert bool(found) == (done.returncode == 1)
    return found


@pytest.fixture(scope="module", params=["amd64", "arm64"])
def root(request: pytest.FixtureRequest, built_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(built_image, TAG, request.param, tmp_path_factory.mktemp("secrets") / "root")


def test_no_secret_is_in_the_image(root: Path, tmp_path: Path) -> None:
    assert sum(1 for path in root.rglob("*") if path.is_file()) > 500
    assert leaks(root, tmp_path) == []


def test_planted_secrets_are_found(root: Path, tmp_path: Path) -> None:
    planted = {
        "usr/lib/meshcni/meshcni.key": keys.generate().pem().decode(),
        "etc/token": "ghp_" + "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(36)),
    }
    for name, text in planted.items():
        (root / name).write_text(text)
    try:
        assert set(leaks(root, tmp_path)) == set(planted)
    finally:
        for name in planted:
            (root / name).unlink()
