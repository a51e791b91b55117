"""CNI conf files as the runtimes read them, and what has to change in them so that our plugin is called.

Rules: containernetworking/cni v1.3.0 libcni/conf.go and cni/pkg/install/cniconfig.go; the better behaviour over the
original's is said at each function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from meshcni import istio

DEFAULT_AGENT_WAIT_SECONDS = 20
NO_EXTRA: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryConfig:
    """What the plugin's conf entry says; `extra` holds our own keys, only those whose setting differs from its default."""

    run_dir: str = istio.RUN_DIR
    plugin_log_level: str = "info"
    ambient_enabled: bool = False
    enablement_selectors: tuple[Mapping[str, object], ...] = ()
    exclude_namespaces: tuple[str, ...] = ()
    pod_namespace: str = ""
    native_nftables: bool = False
    ambient_detection_retry: bool = False
    extra: Mapping[str, object] = field(default=NO_EXTRA)
