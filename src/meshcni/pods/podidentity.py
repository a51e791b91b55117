"""The UIDs by which a pod is known: the API's, and for a static pod the kubelet's own.

A static pod's UID is a hash that the kubelet computes; its mirror in the API has another, and carries the hash in an
annotation (kubernetes/pkg/kubelet/types: ConfigHashAnnotationKey, ConfigMirrorAnnotationKey).
"""

from __future__ import annotations

from typing import Final

from meshcni.pods.model import Pod

STATIC_POD_KEYS: Final = ("kubernetes.io/config.hash", "kubernetes.io/config.mirror")


def uids_of(pod: Pod) -> tuple[str, ...]:
    """All UIDs of `pod`, the API's first."""
    found = (pod.annotations.get(key, "") for key in STATIC_POD_KEYS)
    return tuple(dict.fromkeys([pod.uid, *filter(None, found)]))


def is_meant(pod: Pod, uid: str) -> bool:
    """Whether `pod` is the one that the runtime calls `uid` (empty: the runtime does not say)."""
    return not uid or uid in uids_of(pod)
