"""Puts binary, kubeconfig and conf entry on the host, keeps them there, and takes them away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from meshcni import istio
from meshcni.cni.conf import EntryConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class InstallConfig:
    """Every directory and value of the installer; agent/settings.py builds it, tests give their own."""

    entry: EntryConfig
    conf_dir: str = istio.HOST_CONF_DIR
    conf_name: str = ""  # the operator's; empty: the first valid file, or the default name when standalone
    chained: bool = True
    owned: bool = False
    owned_name: str = ""  # empty: istio.OWNED_CONF_NAME
    original_conversion: bool = False  # CNI_CONF_ORIGINAL_CONVERSION
    conf_group_read: bool = False
    binary_source_dir: str = istio.BINARY_SOURCE_DIR
    binary_target_dirs: tuple[str, ...] = (istio.HOST_BINARY_DIR,)
    run_dir: str = istio.RUN_DIR
    kubeconfig_mode: int = 0o600
    kube_ca_file: str = ""  # empty: ca.crt of the service account
    skip_tls_verify: bool = False
    service_account_dir: str = istio.SERVICE_ACCOUNT_DIR
    api_protocol: str = "https"  # KUBERNETES_SERVICE_PROTOCOL
    api_host: str = ""  # KUBERNETES_SERVICE_HOST
    api_port: str = ""  # KUBERNETES_SERVICE_PORT
    uninstall_removes_binary: bool = False  # UNINSTALL_REMOVES_BINARY
    resync_seconds: float = 60.0


@dataclass(frozen=True, slots=True)
class InstallStatus:
    """What `install-cni status`, `/readyz` and the gauges show.

    `reasons` say why it is not ready (empty exactly when `ready`); `notes` are troubles that do not stop readiness.
    """

    ready: bool = False
    reasons: tuple[str, ...] = ("installation has not finished",)
    notes: tuple[str, ...] = ()
    conf_path: str = ""  # the file that carries our entry, as the agent sees it; empty when none does
    installs: int = 0  # times something was written
    conf_fights: int = 0  # times our entry was put back because somebody else had removed or changed it


@dataclass(slots=True)
class Callbacks:
    """What the agent does when something happens; called on the event loop."""

    result: Callable[[str], None] = field(default=lambda result: None)  # label of istio_cni_installs_total
    changed: Callable[[InstallStatus], None] = field(default=lambda status: None)
    fight: Callable[[str, str], None] = field(default=lambda path, hint: None)


class Installer:
    """`run()` installs and watches until cancelled; `uninstall()` takes everything away again."""

    def __init__(self, config: InstallConfig, callbacks: Callbacks | None = None) -> None:
        self.config = config
        self.callbacks = callbacks or Callbacks()
        self.status = InstallStatus()
        self.installed = asyncio.Event()  # set once everything was in place for the first time

    @property
    def ready(self) -> bool:
        """Whether everything is in place."""
        return self.status.ready

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why not ready."""
        return self.status.reasons

    async def run(self) -> None:
        """Install, then keep installed; ends only by cancellation."""
        await asyncio.get_running_loop().create_future()

    async def uninstall(self) -> tuple[str, ...]:
        """Take conf entry, kubeconfig and (as configured) binary away; returns what was done, as sentences."""
        return ()
