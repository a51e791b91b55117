"""What tests of verification share: layouts that somebody changed, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from image.checks import Locked
from image.referrers import Referrer, encode
from image.stored import StoredLayout
from tests.image import smallimage

from image import attestations, keys, signing, verify

KEY, OTHER_KEY = keys.generate(), keys.generate()
LOCKED = Locked(smallimage.LOCK, {"runtime": ["runtime"], "dev": ["runtime", "dev"]})
Change = Callable[[Referrer], Referrer | None]


def signed(path: Path) -> Path:
    smallimage.write(path)
    signing.sign(path, KEY)
    return path


def failures(layout: Path, key: keys.PublicKey | None = KEY.public, locked: Locked = LOCKED) -> list[str]:
    """Verify, and give the lines of what failed."""
    lines: list[str] = []
    report = verify.Report(lines.append)
    verify.verify(StoredLayout(layout), key, locked, report)
    failed = [line for line in lines if line.startswith("FAILED")]
    assert len(failed) == report.failures
    return failed


def changed(tmp_path: Path, change: Change, name: str = "changed") -> Path:
    """A layout whose maker changed attestations before signing it with the right key."""
    path = smallimage.write(tmp_path / name, change=change)
    signing.sign(path, KEY)
    return path


def edit_index(layout: Path, edit: Callable[[list[dict[str, object]]], list[dict[str, object]]]) -> None:
    content = smallimage.index_json(layout)
    content["manifests"] = edit(content["manifests"])
    (layout / "index.json").write_bytes(encode(content))


def edited(kind: str, edit: Callable[[dict[str, object]], object]) -> Change:
    """Change a predicate of the attestations of this type."""

    def change(one: Referrer) -> Referrer:
        if one.annotations[attestations.PREDICATE_TYPE] != kind:
            return one
        (layer,) = one.layers
        content = json.loads(layer.data)
        edit(content["predicate"])
        return replace(one, layers=[replace(layer, data=encode(content))])

    return change


def platform_of(layout: Path) -> str:
    return smallimage.platform_digest(layout, "1.30.3", "amd64")
