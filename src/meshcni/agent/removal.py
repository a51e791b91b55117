"""Taking everything off a node that has no agent any more, so that nothing blocks its pods or captures them for nobody.

Files first: a conf without an agent lets no mesh pod start. Then the pods, which needs the API server: a pod without
rules that is still annotated would be sent tunnelled traffic by its peers. Then what is the host's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from meshcni.agent import hostmounts, manifest, wiring
from meshcni.agent.ambient import STAYS_HINT, Ambient
from meshcni.agent.ambientwiring import make_ambient
from meshcni.agent.installation import CONF_FAILURE
from meshcni.agent.installer import Installer
from meshcni.agent.metrics import Metrics
from meshcni.agent.programming import Programmer
from meshcni.agent.reconciler import EnrollmentError
from meshcni.agent.settings import Settings
from meshcni.errors import InstallError, KubeError, MeshCniError, PodSpecError
from meshcni.kube.client import PODS, KubeApi
from meshcni.pods.model import Namespace, Pod, pod_from_object

LIST_SECONDS = 10.0  # for each page of the pods of the node
LEAVE_SECONDS = 15.0  # for all pods: nothing is slow here, what fails longer will not work at all
MAX_NAMED = 20  # of pods in a message


@dataclass(frozen=True, slots=True)
class Removal:
    """What was done, in sentences, and why that is not all; None when it is."""

    done: tuple[str, ...]
    rest: MeshCniError | None = None


class OneReading:
    """The pods as they were read once, where Ambient expects informers; nothing is known of their namespaces."""

    def __init__(self, pods: tuple[Pod, ...]) -> None:
        self.synced = asyncio.Event()
        self.synced.set()
        self._pods = pods

    def items(self) -> tuple[Pod, ...]:
        """All pods of this node."""
        return self._pods

    def get(self, namespace: str, name: str) -> Namespace | None:
        """No namespace: whatever its labels are, its pods leave."""
        return None


async def remove_from_node(settings: Settings, node: str, *, purge: bool) -> Removal:
    """Remove files, pods' redirection and the host's rules and sets. Raises MeshCniError for what stops it at once."""
    unseen = [mount for mount in hostmounts.missing(settings) if mount.volume in (hostmounts.CONF, hostmounts.RUN)]
    if unseen:
        patch = manifest.daemonset_patch(unseen, namespace=settings.pod_namespace or settings.system_namespace)
        places = "; ".join(mount.why for mount in unseen)
        raise InstallError(CONF_FAILURE, f"nothing can be removed: {places}", f"\n{patch}")
    done = list(await Installer(wiring.install_config(settings, "info")).uninstall(purge=purge))
    if not settings.ambient_enabled:
        return Removal(tuple(done))
    async with KubeApi(wiring.api_access(settings)) as api:
        rest: MeshCniError | None = None
        try:
            pods, unread = await _read_pods(api, node)
        except KubeError as error:
            pods, unread, rest = (), (), error
        ambient = _ambient(settings, pods, api)
        try:
            in_sets = ambient.host.owners = await ambient.host.entries()
            if rest is None:
                left, rest = await _take_pods_out(ambient)
                done += left
            elif in_sets:
                rest = _nobody_to_ask(rest, in_sets)
            else:
                done.append(f"no pod is in the host's sets, and nobody to ask for others: {rest.message}")
                rest = None
            await ambient.host.remove_all()
            done.append("removed the host's probe rules and sets")
        finally:
            await ambient.close()
    return Removal(tuple(done), rest or (EnrollmentError("; ".join(unread), STAYS_HINT) if unread else None))


async def _read_pods(api: KubeApi, node: str) -> tuple[tuple[Pod, ...], tuple[str, ...]]:
    """The node's pods, and sentences about those that cannot be read."""
    pods, unread = [], []
    for item in await api.list_objects(*PODS, field_selector=f"spec.nodeName={node}", timeout=LIST_SECONDS):
        try:
            pods.append(pod_from_object(item))
        except PodSpecError as error:
            unread.append(f"a pod cannot be read: {error.message}")
    return tuple(pods), tuple(unread)


def _ambient(settings: Settings, pods: tuple[Pod, ...], api: KubeApi) -> Ambient:
    """Ambient mode without sockets: ztunnel is not told, and lets go of the pods with its next snapshot."""
    reading = OneReading(pods)
    programmer = Programmer(wiring.backend_config(settings))
    return make_ambient(settings, reading, reading, programmer, api, _say_nothing, Metrics(of_process=False))


async def _say_nothing(pod: Pod, reason: str, message: str) -> None:
    """Post no Event: whoever asked for this reads the answer."""


async def _take_pods_out(ambient: Ambient) -> tuple[tuple[str, ...], MeshCniError | None]:
    ambient.begin_to_leave()
    await ambient.adopt()
    names = {record.uid: record.name for record in ambient.records}
    try:
        return await ambient.unenroll_all(LEAVE_SECONDS), None
    except MeshCniError as error:
        staying = {record.uid for record in ambient.records}
        return tuple(f"un-enrolled pod {name}" for uid, name in names.items() if uid not in staying), error


def _nobody_to_ask(error: MeshCniError, in_sets: Mapping[IPv4Address | IPv6Address, str]) -> EnrollmentError:
    named = [f"{address} (UID {uid or 'unknown'})" for address, uid in in_sets.items()]
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    return EnrollmentError(
        f"the pods of these addresses stay captured: {', '.join(named[:MAX_NAMED])}{more}; "
        f"they can only be un-enrolled with the API server: {error.message}",
        "delete them, or start the agent and uninstall again when the API server answers",
    )
