"""From `Settings` to the healer and the repair controller."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from meshcni import istio
from meshcni.agent.healing import Healer
from meshcni.agent.metrics import Metrics
from meshcni.agent.programming import Programmer
from meshcni.agent.repairer import Repairer
from meshcni.agent.repairs import ChangesPods, Heals, PostsEvents, Repairs
from meshcni.agent.settings import Settings
from meshcni.agent.wiring import policy
from meshcni.host.boundnetns import BoundNetns
from meshcni.host.hostpaths import ProcRoot, find_proc_root
from meshcni.host.netns import OTHERS_NETNS
from meshcni.host.podnetns import NetnsFinder
from meshcni.kube.client import PODS
from meshcni.kube.informer import Informer, ListsAndWatches
from meshcni.kube.reducer import Change
from meshcni.pods.model import Pod, pod_from_object
from meshcni.pods.repair import RepairRules, choose_mode
from meshcni.pods.selectorsyntax import PodSelection, parse_selection

log = logging.getLogger("meshcni.agent.repair")


class Pods(Protocol):
    """What is needed of the informer of this node's pods."""

    def subscribe(self, callback: Callable[[Change[Pod]], None]) -> None:
        """Call for every change."""

    def items(self) -> tuple[Pod, ...]:
        """All pods of now."""


class Api(ChangesPods, ListsAndWatches, Protocol):
    """What is needed of the API client."""


def make_healer(settings: Settings, pods: Pods, programmer: Programmer) -> Healer:
    """The one healer of an agent, for repair and for the sweep over running pods."""
    proc = ProcRoot(settings.host_proc_dir) if settings.host_proc_dir else find_proc_root()
    return Healer(
        programmer,
        NetnsFinder(proc.path).find,
        policy(settings),
        find_bound=BoundNetns(proc.path, settings.host_netns_dir or istio.HOST_NETNS_DIR).find,
        environment=settings.rule_environment,
        everybody=pods.items,
        never=(*OTHERS_NETNS, f"{proc.path}/1/ns/net"),
        node=settings.node,
    )


def make_repairer(
    settings: Settings, pods: Pods, healer: Heals, api: Api, events: PostsEvents, metrics: Metrics
) -> Repairer | None:
    """The repair controller, subscribed to what it watches; None when repair is off. `run` it."""
    if not settings.repair_enabled:
        log.info("CNI repair is disabled (REPAIR_ENABLED)")
        return None
    choice = choose_mode(
        repair=settings.repair_repair_pods, delete=settings.repair_delete_pods, label=settings.repair_label_pods
    )
    rules = RepairRules(
        settings.repair_sidecar_annotation,
        settings.repair_init_container_name,
        settings.repair_init_container_termination_message,
        settings.repair_init_container_exit_code,
    )
    selection = parse_selection(settings.repair_label_selectors, settings.repair_field_selectors)
    label = (settings.repair_broken_pod_label_key, settings.repair_broken_pod_label_value)
    own = _own_informer(settings, selection, api)
    repairs = Repairs(choice.mode, label, healer, api, events, metrics)
    repairer = Repairer(choice, rules, selection, repairs, watch=own.run if own is not None else None)
    (own or pods).subscribe(repairer.pod_changed)
    return repairer


def _own_informer(settings: Settings, selection: PodSelection, api: ListsAndWatches) -> Informer[Pod] | None:
    """A watch of our own, where the one of this node's pods cannot answer what is asked."""
    node = settings.repair_node_name or settings.node
    elsewhere = settings.repair_node_name not in ("", settings.node)
    if not elsewhere and not selection.needs_server:
        return None
    if elsewhere:
        log.warning(
            "REPAIR_NODE_NAME is %s and this node is %s: pods of that node are deleted or labelled, but never repaired "
            "from here",
            node,
            settings.node,
        )
    else:
        log.info("pods are watched a second time for repair: %s", ", ".join(selection.needs_server))
    fields = ",".join(filter(None, (settings.repair_field_selectors, f"spec.nodeName={node}" if node else "")))
    return Informer(api, PODS, pod_from_object, label_selector=settings.repair_label_selectors, field_selector=fields)
