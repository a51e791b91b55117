"""The image that the tests look at: `build/image`, built when it is not that of this checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from image import evidence

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def built_image() -> Path:
    """The layout with every variant. MESHCNI_TEST_IMAGE names another one, taken as it is."""
    given = os.environ.get("MESHCNI_TEST_IMAGE")
    if given:
        return Path(given)
    output, stamp = ROOT / "build" / "image", ROOT / "build" / "image.built-from"
    inputs = json.dumps(dict(evidence.source(ROOT).digest))
    if not (output / "oci-layout").exists() or not stamp.exists() or stamp.read_text() != inputs:
        done = subprocess.run([sys.executable, "-m", "image", "build"], cwd=ROOT, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.fail(f"`python -m image build` failed:\n{done.stdout}{done.stderr}")
        stamp.write_text(inputs)
    return output
