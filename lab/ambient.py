"""What makes an agent of the lab one for ambient mode: what Istio's chart sets, and which labels pods carry."""

from __future__ import annotations

import json
from pathlib import Path

from meshcni import istio

AMBIENT_LABELS = {istio.DATAPLANE_MODE: "ambient"}
ENABLEMENT_SELECTORS = (
    json.dumps(  # the chart's default: pods by their label, then all but opted-out ones of a namespace
        [
            {"podSelector": {"matchLabels": AMBIENT_LABELS}},
            {
                "podSelector": {
                    "matchExpressions": [{"key": istio.DATAPLANE_MODE, "operator": "NotIn", "values": ["none"]}]
                },
                "namespaceSelector": {"matchLabels": AMBIENT_LABELS},
            },
        ]
    )
)


AMBIENT_SETTINGS = {  # on a lab node the kubelet is root
    "AMBIENT_ENABLED": "true",
    "AMBIENT_ENABLEMENT_SELECTOR": ENABLEMENT_SELECTORS,
    "AMBIENT_DNS_CAPTURE": "true",
    "AMBIENT_IPV6": "true",
    "AMBIENT_RECONCILE_POD_RULES_ON_STARTUP": "true",
    "KUBELET_UID": "0",
}


def ambient_environment(ztunnel_socket: Path) -> dict[str, str]:
    """Return the settings of an agent that is a process of the node: procfs is the node's own."""
    return {**AMBIENT_SETTINGS, "ZTUNNEL_UDS_ADDRESS": str(ztunnel_socket), "HOST_PROC_DIR": "/proc"}
