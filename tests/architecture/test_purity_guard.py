"""The guard of the pure tier must be able to fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EFFECTS = {
    "file": "open('/etc/hostname')",
    "socket": "__import__('socket').socket()",
    "process": "__import__('subprocess').run(['true'])",
    "thread": "__import__('threading').Thread(target=print).start()",
    "folder": "__import__('os').listdir('/')",
}


@pytest.mark.parametrize("effect", EFFECTS.values(), ids=EFFECTS)
def test_an_effect_fails_a_pure_test(tmp_path: Path, effect: str) -> None:
    folder = tmp_path / "tests" / "pure"
    folder.mkdir(parents=True)
    (tmp_path / "tests" / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "conftest.py").write_text((ROOT / "tests" / "pure" / "conftest.py").read_text())
    (folder / "test_it.py").write_text(f"def test_it():\n    {effect}\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    pure: x\n    kernel: x\n    node: x\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode != 0
    assert "a pure test" in run.stdout + run.stderr
