"""Runs the programs that check images independently of us, as a user would."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from lab.namespaces import call_in_netns

from image import tools

Result = subprocess.CompletedProcess[str]


def run(name: str, *arguments: str | Path, home: Path, netns: str = "") -> Result:
    """Run a program of the lock's tools; no configuration but that in `home`, and no network but `netns`'s."""
    command = [str(tools.find(name)), *map(str, arguments)]
    environment = {"HOME": str(home), "PATH": os.environ["PATH"]}

    def work() -> Result:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)

    return call_in_netns(netns, work) if netns else work()


def cosign_verify(folder: Path, public: Path, home: Path) -> Result:
    """Let cosign verify the signature of an exported folder."""
    return run("cosign", "verify", "--local-image", *cosign_key(public), folder, home=home)


def cosign_key(public: Path) -> list[str | Path]:
    """The options by which cosign needs nothing but a key."""
    return ["--insecure-ignore-tlog=true", "--key", public]
