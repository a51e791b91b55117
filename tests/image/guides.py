"""Commands of the guides in docs/, run as a reader would run them: every block of a guide, one after the other."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from lab.namespaces import call_in_netns

from image import tools

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("cosign", "oras")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TIMEOUT_SECONDS = 240


def blocks(guide: str, language: str) -> list[str]:
    """The blocks of docs/GUIDE that are marked with `language`, in their order."""
    return [text for kind, text in BLOCK.findall((ROOT / "docs" / guide).read_text()) if kind == language]


def run(guide: str, folder: Path, variables: Mapping[str, str], netns: str) -> subprocess.CompletedProcess[str]:
    """Run all shell blocks of a guide in one shell that ends at the first failure; says which command that was."""
    found = blocks(guide, "sh")
    assert found, f"no commands in docs/{guide}"
    paths = [*(str(tools.find(name).parent) for name in PROGRAMS), str(Path(sys.executable).parent)]
    environment = {
        "PATH": ":".join([*paths, "/usr/local/bin", "/usr/bin", "/bin"]),
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        **variables,
    }
    script = "\n".join(["set -euo pipefail; trap 'echo \"failed: $BASH_COMMAND\" >&2' ERR", *found])

    def work() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", script],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )

    return call_in_netns(netns, work)
