"""A host made of temporary directories, and an installer that runs on it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from meshcni.agent.installconfig import InstallConfig
from meshcni.agent.installer import Callbacks, Installer, InstallStatus
from meshcni.cni.conf import EntryConfig

WAIT_SECONDS = 10.0  # for something that must happen; it happens much sooner
BRIDGE = """\
{
  "cniVersion": "1.0.0",
  "name": "net",
  "plugins": [
    {"type": "bridge", "big": 9007199254740993}
  ]
}
"""
SINGLE = """\
{
  "cniVersion": "0.4.0",
  "name": "net",
  "type": "bridge",
  "mtu": 1500
}
"""


class Host:
    """Directories of a node, as the agent sees them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.conf, self.source, self.bin, self.run, self.account = (
            root / name for name in ("conf", "source", "bin", "run", "account")
        )
        for folder in (self.conf, self.source, self.bin, self.run, self.account):
            folder.mkdir()
        self.plugin = self.bin / "istio-cni"
        (self.source / "istio-cni").write_bytes(b"#!plugin\n" * 50_000)
        (self.source / "istio-cni").chmod(0o755)
        (self.account / "token").write_text("first.token")
        (self.account / "ca.crt").write_text("PEM")

    def config(self, **options: Any) -> InstallConfig:
        entry = options.pop("entry", {})
        settings: dict[str, Any] = {
            "entry": EntryConfig(run_dir=str(self.run), **entry),
            "conf_dir": str(self.conf),
            "binary_source_dir": str(self.source),
            "binary_target_dirs": (str(self.bin),),
            "run_dir": str(self.run),
            "service_account_dir": str(self.account),
            "api_host": "10.96.0.1",
            "api_port": "443",
        }
        return InstallConfig(**{**settings, **options})

    def write(self, name: str, text: str, mode: int = 0o644) -> Path:
        """As a primary CNI plugin does it: a new file, renamed into place."""
        path = self.conf / name
        beside = self.root / f"{name}.new"
        beside.write_text(text)
        beside.chmod(mode)
        beside.rename(path)
        return path

    def types(self, name: str) -> list[str]:
        """The plugins of a list; empty while there is no such list."""
        try:
            return [plugin["type"] for plugin in json.loads((self.conf / name).read_text())["plugins"]]
        except FileNotFoundError:
            return []

    def listing(self) -> list[str]:
        return sorted(path.name for path in self.conf.iterdir())

    def leftovers(self) -> list[str]:
        """Temporary files anywhere."""
        return [str(path) for path in self.root.rglob("*.tmp.*")]


class Record:
    """What the installer told."""

    def __init__(self) -> None:
        self.results: list[str] = []
        self.statuses: list[InstallStatus] = []
        self.fights: list[tuple[str, str]] = []

    def callbacks(self) -> Callbacks:
        return Callbacks(
            result=self.results.append,
            changed=self.statuses.append,
            fight=lambda path, hint: self.fights.append((path, hint)),
        )


@asynccontextmanager
async def running(config: InstallConfig, record: Record | None = None) -> AsyncIterator[Installer]:
    """An installer at work; cancelled at the end."""
    installer = Installer(config, (record or Record()).callbacks())
    task = asyncio.create_task(installer.run())
    try:
        yield installer
    finally:
        task.cancel()
        ended = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(ended[0], asyncio.CancelledError), ended


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait until `condition()` holds; fails after ten seconds."""
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, f"did not happen: {what or condition}"
        await asyncio.sleep(0.005)
