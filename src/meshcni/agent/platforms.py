"""Kubernetes distributions that keep CNI files elsewhere, and which of them this node looks like.

Source: files/platform-*.yaml of Istio's chart, whose value `global.platform` (or `platform`) sets both directories.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from meshcni.cni import conf
from meshcni.pods.model import Pod


@dataclass(frozen=True, slots=True)
class Platform:
    """A value of `global.platform`; the directories are the host's, and the chart's defaults where it leaves them."""

    name: str
    conf_dir: str = "/etc/cni/net.d"
    bin_dir: str = "/opt/cni/bin"

    @property
    def value(self) -> str:
        """What to set, and what that does."""
        return f"global.platform={self.name} (cniConfDir={self.conf_dir}, cniBinDir={self.bin_dir})"


_RANCHER_CONF_DIR = "/var/lib/rancher/k3s/agent/etc/cni/net.d"
PLATFORMS = (
    Platform("k3s", _RANCHER_CONF_DIR, "/var/lib/rancher/k3s/data/cni"),
    Platform("k3d", _RANCHER_CONF_DIR, "/bin"),
    Platform("microk8s", "/var/snap/microk8s/current/args/cni-network", "/var/snap/microk8s/current/opt/cni/bin"),
    Platform("gke", bin_dir="/home/kubernetes/bin"),
    Platform("openshift", "/etc/cni/multus/net.d", "/var/lib/cni/bin"),
    Platform("minikube"),  # its containers' namespaces are elsewhere: cniNetnsDir=/var/run/docker/netns
)


SHARED_BIN_DIRS = ("/bin",)  # where programs of other kinds are too: a `bridge` there may be the tool
DEFAULTS = Platform("")  # what the chart has without any platform; a value that was set by mistake may be the trouble


def hint_for_plugins(host_root: str, types: Collection[str]) -> str:
    """Which platform has the plugins of `types` where ours should be; all that differ where the host cannot be seen.

    `host_root`: where the host's file system is seen, such as /host/proc/1/root; empty: nowhere.
    """
    differ = [one for one in PLATFORMS if one.bin_dir != DEFAULTS.bin_dir]
    fits = [
        one for one in (DEFAULTS, *differ) if types and all(_exists(host_root, one.bin_dir, name) for name in types)
    ]
    return _advice(fits, f"cniBinDir={DEFAULTS.bin_dir}", differ)


def directory_of_plugins(host_root: str, types: Collection[str]) -> str:
    """The host's directory where all plugins of `types` are, of those that platforms use; empty: none is known."""
    known = dict.fromkeys(one.bin_dir for one in (DEFAULTS, *PLATFORMS) if one.bin_dir not in SHARED_BIN_DIRS)
    fits = [directory for directory in known if types and all(_exists(host_root, directory, name) for name in types)]
    return next(iter(fits), "")


def hint_for_confs(host_root: str) -> str:
    """Which platform has confs where ours should be; all that differ where the host cannot be seen."""
    differ = [one for one in PLATFORMS if one.conf_dir != DEFAULTS.conf_dir]
    fits = [one for one in (DEFAULTS, *differ) if _has_confs(host_root, one.conf_dir)]
    return _advice(fits, f"cniConfDir={DEFAULTS.conf_dir}", differ)


def networked(pods: Iterable[Pod]) -> int:
    """How many of `pods` have got a network from some conf."""
    return sum(bool(pod.ips) and not pod.host_network and not pod.has_terminated for pod in pods)


def hint_for_read_only(directory: str) -> str:
    """What to do about a directory of the host that nothing can be written into."""
    others = ", ".join(one.name for one in PLATFORMS)
    return (
        f"if {directory} of the host is read-only by design, the runtime uses another one: "
        f"set global.platform ({others}), or cniBinDir and cniConfDir"
    )


def _advice(fits: Iterable[Platform], default: str, others: Iterable[Platform]) -> str:
    """`default` is the chart's own value and its name, which is what fits when DEFAULTS do."""
    found = [one.value if one.name else f"{default}, its default" for one in fits]
    if found:
        return f"set the chart's {' or '.join(found)}"
    return f"set the chart's {default.partition('=')[0]}, or one of {'; '.join(one.value for one in others)}"


def _exists(host_root: str, directory: str, name: str) -> bool:
    return bool(host_root) and os.path.exists(f"{host_root}{directory}/{os.path.basename(name)}")


def _has_confs(host_root: str, directory: str) -> bool:
    if not host_root:
        return False
    try:
        return bool(conf.candidates(os.listdir(f"{host_root}{directory}")))
    except OSError:
        return False
