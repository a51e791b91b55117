"""What the installer keeps on the host, and where."""

from __future__ import annotations

import os
from dataclasses import dataclass

from meshcni import istio
from meshcni.cni import conf
from meshcni.cni.confplan import ConfPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class InstallConfig:
    """Every directory and value of the installer; agent/wiring.py builds it, tests give their own."""

    entry: conf.EntryConfig
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
    host_root: str = ""  # where the host's file system is seen, for hints; empty: nowhere

    @property
    def kubeconfig_path(self) -> str:
        """Where the kubeconfig is."""
        return os.path.join(self.run_dir, istio.KUBECONFIG_NAME)

    @property
    def marker_path(self) -> str:
        """The file that lets ADDs pass when no agent answers."""
        return os.path.join(self.run_dir, istio.UNINSTALLED_MARKER_NAME)

    @property
    def ca_path(self) -> str:
        """The CA that goes into the kubeconfig."""
        return self.kube_ca_file or os.path.join(self.service_account_dir, "ca.crt")

    def policy(self) -> ConfPolicy:
        """What is wanted of the conf directory. Raises SettingError for a name that can never work."""
        return ConfPolicy(
            own=conf.entry(self.entry),
            conf_name=self.conf_name,
            chained=self.chained,
            owned=self.owned,
            owned_name=self.owned_name or istio.OWNED_CONF_NAME,
            original_conversion=self.original_conversion,
        )
