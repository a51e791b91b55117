"""The generated module of ZDS's messages is what scripts/proto makes of zds.proto today."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path("meshcni/protocols")


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("proto")
    done = subprocess.run(
        [ROOT / "scripts" / "proto", str(folder)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return folder / FOLDER


@pytest.mark.parametrize("name", ["zds_pb2.py", "zds_pb2.pyi"])
def test_generated_files_are_up_to_date(generated: Path, name: str) -> None:
    assert (ROOT / "src" / FOLDER / name).read_text() == (generated / name).read_text(), "run scripts/proto"


def test_the_module_loads_with_old_runtimes(generated: Path) -> None:
    assert "runtime_version" not in (generated / "zds_pb2.py").read_text()  # absent from Debian 13's 3.21.12
