"""Redirection for a sidecar pod that runs already: find its netns, look, mend, look again.

Repair and the sweep over running pods ask here. Nothing is programmed on the strength of a name or of one address: the
netns is that of a process in the pod's own cgroup, or (without a process) the only one that holds all the pod's
addresses, never the host's or ours, and the pod is a sidecar pod by the same decision as in an ADD.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from meshcni.agent.netnssearch import HINTS, Find
from meshcni.agent.podrecord import Netns
from meshcni.agent.programming import Programmer
from meshcni.errors import MeshCniError, NetnsError
from meshcni.host.backends.detection import VariantChoice
from meshcni.host.mending import Mended, Mending, WrongAddressError, look_at_sidecar, mend_sidecar
from meshcni.host.netns import OTHERS_NETNS, check_pod_netns
from meshcni.host.podnetns import (
    HOST_NETNS,
    NO_ADDRESS,
    NOT_FOUND,
    SANDBOXED,
    UNREADABLE,
    WRONG_ADDRESS,
    Found,
    Refused,
    Wanted,
)
from meshcni.pods.assess import Assessment, assess
from meshcni.pods.eligibility import Policy, Verdict
from meshcni.pods.enrollment import NetnsId
from meshcni.pods.model import NO_PAIRS, Pod, pod_addresses
from meshcni.pods.podidentity import uids_of

T = TypeVar("T")

NOT_A_SIDECAR = "not-a-sidecar"  # codes of NotHealed beside those of host.podnetns.Refused
BAD_PARAMETERS = "bad-parameters"
CLAIMED_TWICE = "claimed-twice"
OTHER_NODE = "other-node"
NOT_PROGRAMMED = "not-programmed"
LASTING = frozenset({NOT_A_SIDECAR, BAD_PARAMETERS, OTHER_NODE, SANDBOXED, HOST_NETNS})


@dataclass(frozen=True, slots=True)
class Healed:
    """The pod's rules are in place, looked at just now. `drift` is what was wrong before, empty: nothing was touched.

    `variant` names what programmed it (`nft`, `legacy`, `nftables`), empty when nothing was touched.
    """

    netns: NetnsId
    drift: tuple[str, ...] = ()
    variant: str = ""

    @property
    def changed(self) -> bool:
        """Whether anything was programmed."""
        return bool(self.drift)


@dataclass(frozen=True, slots=True)
class Drifted:
    """Looked at only: `drift` says in words what is wrong."""

    netns: NetnsId
    drift: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NotHealed:
    """Why the pod's netns was not mended: `code` for machines, `text` and `hint` for people.

    Codes: those of `host.podnetns.Refused`; not-a-sidecar: it is to be left alone; bad-parameters: an annotation is
    invalid; claimed-twice: another pod has the same address; other-node: it is not on this node; not-programmed: the
    kernel or a tool refused.
    """

    code: str
    text: str
    hint: str = ""

    @property
    def lasting(self) -> bool:
        """Whether only a change of the pod can help, and trying again soon cannot."""
        return self.code in LASTING

    def __str__(self) -> str:
        return f"{self.text} ({self.hint})" if self.hint else self.text


class _RefusedError(Exception):
    """Carries a NotHealed through the steps."""

    def __init__(self, refusal: NotHealed) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class Healer:
    """Heals running sidecar pods; nothing of it blocks the event loop, and an ADD never waits behind it.

    `find` looks pods up by their processes (NetnsFinder), `find_bound` those without one by the runtime's netns files
    (BoundNetns); both block. `never` are paths of namespaces that are no pod's. `everybody` gives all pods that the
    agent knows, to tell whether two claim one address. `node` is this one's name, empty when it is not known.
    """

    def __init__(
        self,
        programmer: Programmer,
        find: Find,
        policy: Policy,
        *,
        find_bound: Find | None = None,
        environment: Mapping[str, str] = NO_PAIRS,
        everybody: Callable[[], Iterable[Pod]] = tuple,
        never: tuple[str, ...] = OTHERS_NETNS,
        node: str = "",
    ) -> None:
        self._programmer = programmer
        self._find = find
        self._find_bound = find_bound
        self._policy = policy
        self._environment = environment
        self._everybody = everybody
        self._never = never
        self._node = node

    async def heal(self, pod: Pod, netns: Netns | None = None) -> Healed | NotHealed:
        """Put the pod's rules in place. Never raises for anything about the pod.

        `netns` is what `locate` found, and stays the caller's; without one it is looked for, in one walk for this pod
        alone.
        """
        return _healed(await self.visit(pod, netns, mend_sidecar))

    async def look(self, pod: Pod, netns: Netns | None = None) -> Healed | Drifted | NotHealed:
        """Tell whether the pod's rules are in place, and change nothing; otherwise as `heal`."""
        outcome = _healed(await self.visit(pod, netns, look_at_sidecar))
        if isinstance(outcome, Healed) and outcome.drift:
            return Drifted(outcome.netns, outcome.drift)
        return outcome

    async def locate(self, pods: Sequence[Pod]) -> dict[str, Netns | NotHealed]:
        """The network namespaces of `pods`, by UID, in one walk; each Netns is the caller's to close. Never raises."""
        refusals: dict[str, Netns | NotHealed] = {}
        wanted: dict[str, Wanted] = {}
        for pod in pods:
            try:
                wanted[pod.uid] = _wanted(pod)
            except _RefusedError as error:
                refusals[pod.uid] = error.refusal
        results = await self._search(self._find, wanted)
        absent = {uid: wanted[uid] for uid, one in results.items() if _is_absent(one)}
        if absent and self._find_bound is not None:
            try:
                results |= await self._search_bound(self._find_bound, absent, results)
            except BaseException:
                _close(results)
                raise
        return refusals | {uid: _netns_of(result) for uid, result in results.items()}

    def assess(self, pod: Pod) -> Assessment:
        """What is to be done with the pod; as in an ADD, apart from ambient pods, which are not ours to heal."""
        return assess(pod, None, self._policy, self._environment)

    async def visit(
        self, pod: Pod, netns: Netns | None, work: Callable[[Mending, VariantChoice | None], T]
    ) -> tuple[NetnsId, T] | NotHealed:
        """Do `work` in the pod's netns, which it must not trust before it has seen all the pod's addresses there.

        It gets what belongs there and the iptables variant of this boot. Its MeshCniError becomes a NotHealed.
        """
        try:
            wanted = self._mending(pod)
            if netns is not None:
                return await self._work(netns, wanted, work)
            found = (await self.locate([pod]))[pod.uid]
            if isinstance(found, NotHealed):
                return found
            try:
                return await self._work(found, wanted, work)
            finally:
                found.close()
        except _RefusedError as error:
            return error.refusal
        except WrongAddressError as error:
            return NotHealed(WRONG_ADDRESS, error.message, error.hint)
        except NetnsError as error:
            return NotHealed(UNREADABLE, error.message, error.hint)
        except MeshCniError as error:
            notes = getattr(error, "__notes__", ())
            return NotHealed(NOT_PROGRAMMED, "; ".join([error.message, *notes]), error.hint)
        except OSError as error:
            return NotHealed(NOT_PROGRAMMED, f"the network namespace cannot be programmed: {error}")

    async def _work(
        self, netns: Netns, wanted: Mending, work: Callable[[Mending, VariantChoice | None], T]
    ) -> tuple[NetnsId, T]:
        try:
            check_pod_netns(netns.descriptor, self._never)
        except NetnsError as error:
            raise _RefusedError(NotHealed(HOST_NETNS, error.message, error.hint)) from None
        done = await self._programmer.run(netns.descriptor, lambda choice: work(wanted, choice), urgent=False)
        return netns.id, done

    def _mending(self, pod: Pod) -> Mending:
        if self._node and pod.node_name not in ("", self._node):
            text = f"it runs on node {pod.node_name}, and this is {self._node}"
            raise _RefusedError(NotHealed(OTHER_NODE, text))
        assessment = self.assess(pod)
        decision = assessment.decision
        if assessment.error is not None:
            raise _RefusedError(NotHealed(BAD_PARAMETERS, assessment.error.message, assessment.error.hint))
        if decision.verdict is not Verdict.SIDECAR or assessment.derived is None:
            raise _RefusedError(NotHealed(NOT_A_SIDECAR, f"{decision.reason.text} ({decision.evidence})"))
        config = self._programmer.config
        return Mending(
            assessment.derived.interception,
            _wanted(pod).addresses,
            config.backend,
            config.forced_variant,
            config.family_policy,
        )

    async def _search(self, find: Find, wanted: Mapping[str, Wanted]) -> dict[str, Found | Refused]:
        if not wanted:
            return {}
        walk = asyncio.get_running_loop().run_in_executor(None, find, wanted)
        try:
            return await asyncio.shield(walk)
        except asyncio.CancelledError:
            walk.add_done_callback(_close_found)  # the thread goes on, and what it finds is nobody's
            raise
        except (MeshCniError, OSError) as error:
            return dict.fromkeys(wanted, Refused(UNREADABLE, f"the host's processes cannot be walked: {error}"))

    async def _search_bound(
        self, find: Find, absent: Mapping[str, Wanted], before: Mapping[str, Found | Refused]
    ) -> dict[str, Found | Refused]:
        """Without a process only addresses tell a netns, so a pod whose address another one claims has none."""
        claims = _claims(self._everybody())
        results: dict[str, Found | Refused] = {}
        alone: dict[str, Wanted] = {}
        for uid, pod in absent.items():
            rivals = {name for address in pod.addresses for other, name in claims.get(address, ()) if other != uid}
            if rivals:
                text = f"no process of it runs, and {', '.join(sorted(rivals)[:3])} has the same address"
                results[uid] = Refused(CLAIMED_TWICE, text)
            else:
                alone[uid] = pod
        for uid, found in (await self._search(find, alone)).items():
            first = before[uid]
            if isinstance(found, Refused) and isinstance(first, Refused):
                found = Refused(found.code, f"{first.text}; {found.text}")
            results[uid] = found
        return results


def _healed(outcome: tuple[NetnsId, Mended] | NotHealed) -> Healed | NotHealed:
    if isinstance(outcome, NotHealed):
        return outcome
    netns, mended = outcome
    return Healed(netns, mended.drift, mended.variant)


def _claims(pods: Iterable[Pod]) -> dict[object, list[tuple[str, str]]]:
    """UIDs and names of the pods that have each address; those that share the host's, or have ended, claim none."""
    found: dict[object, list[tuple[str, str]]] = {}
    for pod in pods:
        if not pod.host_network and not pod.has_terminated:
            for address in pod_addresses(pod)[0]:
                found.setdefault(address, []).append((pod.uid, pod.full_name))
    return found


def _wanted(pod: Pod) -> Wanted:
    good, bad = pod_addresses(pod)
    if bad:
        text = f"its address {', '.join(bad)} cannot be read, so its network namespace cannot be told from others"
        raise _RefusedError(NotHealed(WRONG_ADDRESS, text))
    if not good:
        text = "it has no address yet, by which its network namespace could be recognised"
        raise _RefusedError(NotHealed(NO_ADDRESS, text, "the kubelet tells the address once the sandbox runs"))
    return Wanted(uids_of(pod), good, pod.container_ids)


def _close_found(walk: asyncio.Future[dict[str, Found | Refused]]) -> None:
    if not walk.cancelled() and walk.exception() is None:
        _close(walk.result())


def _close(results: Mapping[str, Found | Refused]) -> None:
    for result in results.values():
        if isinstance(result, Found):
            os.close(result.descriptor)


def _is_absent(result: Found | Refused) -> bool:
    return isinstance(result, Refused) and result.code == NOT_FOUND


def _netns_of(result: Found | Refused) -> Netns | NotHealed:
    if isinstance(result, Found):
        return Netns(result.descriptor)
    return NotHealed(result.code, result.text, HINTS.get(result.code, ""))
