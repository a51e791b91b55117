"""The host's part of ambient mode: the set of enrolled addresses and the rules that mark probes to them as the node's.

What is there is adopted, never flushed: the kubelet's probes go on while the agent is away or starts. Every address has
one owner, the pod that claimed it last: a finished pod's removal takes nothing from the pod that got its address.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from typing import TypeVar

from meshcni.errors import CNI_TRY_AGAIN_LATER, MeshCniError
from meshcni.host import brancheni, hostrules
from meshcni.host.backends.detection import VariantChoice
from meshcni.host.backends.libnftables import Nft
from meshcni.host.kubelet import kubelet_uid
from meshcni.host.netns import open_netns, run_in_netns
from meshcni.host.probeset import NO_COMMENTS, IpsetProbeSet, NftProbeSet, ProbeSet
from meshcni.rules.model import Backend, Family

T = TypeVar("T")
Address = IPv4Address | IPv6Address
log = logging.getLogger(__name__)

RETRY_SECONDS = 2.0  # as often as the original tries to make its host rules; it gives up after 11 attempts, we do not
READY_SECONDS = 5.0  # that a pod waits for them


@dataclass(frozen=True, slots=True)
class HostConfig:
    """What the settings say about the host's side. `kubelet_uid` None: that of the kubelet's process."""

    backend: Backend
    families: frozenset[Family]
    probe_v4: IPv4Address
    probe_v6: IPv6Address
    netns_path: str
    proc_root: str
    forced_variant: str = ""
    kubelet_uid: int | None = None
    branch_eni: bool = True


class HostSideError(MeshCniError):
    """The host's probe rules or address sets are not in place."""

    cni_code = CNI_TRY_AGAIN_LATER


class HostSide:
    """Keeps rules and sets in the host's netns; `choose` gives the iptables variant of this boot."""

    def __init__(self, config: HostConfig, choose: Callable[[], Awaitable[VariantChoice | None]]) -> None:
        self.config = config
        self.owners: dict[Address, str] = {}  # what the set should hold: address, UID of its pod
        self.trouble = "the host's probe rules are not in place yet"
        self.ready = asyncio.Event()
        self._choose = choose
        self._alone = asyncio.Lock()
        self._netns: int | None = None
        self._nft = Nft()  # its socket is opened, and stays, in the host's netns: a deletion is dear when it is closed
        self._branches: dict[Address, brancheni.BranchRules] = {}
        self._branch_eni = False
        self._without_owners = False  # the kernel keeps no comments
        self._removed = False

    async def start(self) -> None:
        """Adopt the set, put the rules in place; tries until it works. `trouble` says why not meanwhile."""
        while not self.ready.is_set():
            try:
                async with self._alone:
                    if self._removed:
                        return
                    await self._set_up()
            except (MeshCniError, OSError) as error:
                if str(error) != self.trouble:
                    log.error("host probe rules: %s", error)
                self.trouble = f"the host's probe rules are not in place: {error}"
                await asyncio.sleep(RETRY_SECONDS)
            else:
                self.trouble = ""
                self.ready.set()

    async def put(self, uid: str, addresses: Collection[Address]) -> None:
        """Make `addresses` the pod's, and drop what else it had. Raises MeshCniError."""
        await self._until_ready()
        versions = {family.value for family in self.config.families}
        addresses = [address for address in addresses if address.version in versions]
        stale = [address for address, owner in self.owners.items() if owner == uid and address not in addresses]
        async with self._alone:
            new = dict.fromkeys(addresses, uid)
            there = {address: self.owners[address] for address in new if address in self.owners}
            await self._in_host(lambda: self._set().put(new, there))
            self.owners.update(new)
        await self._delete(uid, stale)
        if self._branch_eni:
            await self._follow_branches(addresses)

    async def adopt(self, claims: dict[Address, str], known_uids: Collection[str], *, complete: bool) -> None:
        """At the start: claim what pods have, and drop entries of pods that are no more. Raises MeshCniError.

        An entry of a pod that is known, but whose address is not, stays; without owners in the set, every entry stays
        unless the addresses of all pods are known (`complete`).
        """
        await self._until_ready()
        async with self._alone:
            stale = [address for address, uid in self.owners.items() if address not in claims and uid not in known_uids]
            if self._without_owners and not complete:
                stale = []
            new = {address: uid for address, uid in claims.items() if self.owners.get(address) != uid}
            if new:
                there = {address: self.owners[address] for address in new if address in self.owners}
                await self._in_host(lambda: self._set().put(new, there))
            if stale:
                await self._in_host(lambda: self._set().delete(stale))
            self.owners.update(new)
            for address in stale:
                del self.owners[address]

    async def remove(self, uid: str) -> None:
        """Take out every address that is the pod's. Raises MeshCniError."""
        if not self.ready.is_set():
            return  # the set is adopted later, without what no pod claims
        await self._delete(uid, [address for address, owner in self.owners.items() if owner == uid])

    def lacks(self, addresses: Collection[Address]) -> bool:
        """Whether one of them that belongs into the set is nobody's: its last owner has left, and was not the only."""
        versions = {family.value for family in self.config.families}
        return any(address.version in versions and address not in self.owners for address in addresses)

    def addresses_of(self, uid: str) -> frozenset[Address]:
        """The addresses that are the pod's."""
        return frozenset(address for address, owner in self.owners.items() if owner == uid)

    async def verify(self) -> tuple[str, ...]:
        """Compare rules and set with what they should be, mend what is not, say it in words. Raises MeshCniError."""
        if not self.ready.is_set():
            return ()
        choice = await self._choose()
        async with self._alone:
            uid = self._kubelet_uid()
            drift = await self._in_host(lambda: self._mend_rules(uid, choice))
            return (*drift, *await self._in_host(self._mend_set))

    async def entries(self) -> dict[Address, str]:
        """What the sets of both backends hold, whoever put it there. Raises MeshCniError."""
        async with self._alone:
            return await self._in_host(lambda: {**self._other_set().entries(), **self._set().entries()})

    async def remove_all(self) -> None:
        """Take rules, sets and branch ENI rules away: the agent leaves this node. Raises MeshCniError."""
        async with self._alone:
            self._removed = True
            self.ready.clear()
            self.trouble = "the host's probe rules were removed on purpose"
            await self._in_host(self._take_away)
            self.owners.clear()

    def close(self) -> None:
        """Give the descriptor back; what is in the host stays."""
        if self._netns is not None:
            os.close(self._netns)
            self._netns = None

    # --- in the host's netns ------------------------------------------------------------------------------------------

    async def _until_ready(self) -> None:
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self.ready.wait()
        except TimeoutError:
            raise HostSideError(self.trouble, "the agent tries again every 2 s; see install-cni status") from None

    async def _in_host(self, work: Callable[[], T]) -> T:
        if self._netns is None:
            self._netns = open_netns(self.config.netns_path)
        return await run_in_netns(self._netns, work)

    def _set(self) -> ProbeSet:
        config = self.config
        if config.backend is Backend.NFTABLES:
            return NftProbeSet(config.families, self._nft)
        return IpsetProbeSet(config.families)

    def _other_set(self) -> ProbeSet:
        """The set of the other backend; of both families, because the earlier agent's settings are not known."""
        both = frozenset(Family)
        return IpsetProbeSet(both) if self.config.backend is Backend.NFTABLES else NftProbeSet(both)

    def _kubelet_uid(self) -> int | None:
        """The UID that nftables rules need; iptables knows a socket when it sees one."""
        if self.config.backend is Backend.IPTABLES:
            return None
        if self.config.kubelet_uid is not None:
            return self.config.kubelet_uid
        return kubelet_uid(self.config.proc_root)

    async def _set_up(self) -> None:
        choice = await self._choose()
        uid = await asyncio.to_thread(self._kubelet_uid)
        self.owners = await self._in_host(lambda: self._make(uid, choice))
        if self.config.branch_eni:
            self._branch_eni, branches = await self._in_host(self._look_at_branches)
            self._branches = {rules.address: rules for rules in branches if rules.address is not None}
            if branches:
                log.info("adopted the policy rules of %d branch interfaces", len(branches))

    def _make(self, uid: int | None, choice: VariantChoice | None) -> dict[Address, str]:
        """Sets, then the rules that look into them, then the other backend's go. Returns the set's entries."""
        ours, other = self._set(), self._other_set()
        ours.ensure()
        self._without_owners = ours.warning == NO_COMMENTS
        if ours.warning:
            log.warning("the set of probed addresses: %s", ours.warning)
        missing = {address: owner for address, owner in _entries(other).items() if owner}
        entries = ours.entries()
        missing = {address: owner for address, owner in missing.items() if address not in entries}
        if missing:
            log.info("taking %d addresses over from the %s set", len(missing), other.variant)
            ours.put(missing, {})
        self._rules(uid, choice)
        _destroy(other)
        return ours.entries()

    def _rules(self, uid: int | None, choice: VariantChoice | None) -> None:
        config = self.config
        hostrules.apply_host(
            config.probe_v4,
            config.probe_v6,
            config.families,
            config.backend,
            kubelet_uid=uid,
            force_iptables=config.forced_variant,
            choice=choice,
        )

    def _mend_rules(self, uid: int | None, choice: VariantChoice | None) -> tuple[str, ...]:
        config = self.config
        drift = hostrules.verify_host(
            config.probe_v4,
            config.probe_v6,
            config.families,
            config.backend,
            kubelet_uid=uid,
            force_iptables=config.forced_variant,
            choice=choice,
        )
        if drift:
            self._set().ensure()
            self._rules(uid, choice)
        return drift

    def _mend_set(self) -> tuple[str, ...]:
        kept, probes = self._kept(), self._set()
        probes.ensure()
        there = probes.entries()
        wrong = {
            address: uid
            for address, uid in kept.items()
            if address not in there or (there[address] != uid and not self._without_owners)
        }
        extra = [address for address in there if address not in kept]
        if wrong:
            probes.put(wrong, there)
        if extra:
            probes.delete(extra)
        said = [f"the set of probed addresses lacked {address}" for address in wrong if address not in there]
        said += [f"{address} in the set belonged to {there[address]!r}" for address in wrong if address in there]
        return (*said, *(f"{address} in the set is no pod's" for address in extra))

    def _kept(self) -> dict[Address, str]:
        """What of `owners` the set takes: a family that is off has none."""
        versions = {family.value for family in self.config.families}
        return {address: uid for address, uid in self.owners.items() if address.version in versions}

    async def _delete(self, uid: str, addresses: list[Address]) -> None:
        if not addresses:
            return
        async with self._alone:
            mine = [address for address in addresses if self.owners.get(address) == uid]
            await self._in_host(lambda: self._set().delete(mine))
            for address in mine:
                del self.owners[address]
            branches = [rules for address in mine if (rules := self._branches.pop(address, None)) is not None]
            if branches:
                await self._in_host(lambda: self._remove_branches(branches))

    async def _follow_branches(self, addresses: Collection[Address]) -> None:
        """Lead probes of pods behind an AWS branch interface back by it; a failure is said and stops nothing."""
        for address in addresses:
            try:
                rules = await self._in_host(partial(brancheni.ensure, address))
            except (MeshCniError, OSError) as error:
                log.warning("no policy rules for the branch interface of %s: %s", address, error)
                continue
            before = self._branches.pop(address, None)
            if rules is not None:
                self._branches[address] = rules
            if before is not None and before != rules:
                await self._in_host(partial(self._remove_branches, [before]))

    def _look_at_branches(self) -> tuple[bool, tuple[brancheni.BranchRules, ...]]:
        """Whether the node has branch interfaces (its own sysctl tells), and the rules that an earlier agent left."""
        return brancheni.is_enabled(self.config.proc_root), brancheni.observe()

    def _take_away(self) -> None:
        hostrules.remove_host()
        self._set().destroy()
        _destroy(self._other_set())
        self._branches.clear()
        self._remove_branches(list(brancheni.observe()))

    def _remove_branches(self, branches: list[brancheni.BranchRules]) -> None:
        """Remove rules, but none that another pod's need."""
        for rules in branches:
            try:
                brancheni.remove(rules, keep=tuple(self._branches.values()))
            except (MeshCniError, OSError) as error:
                log.warning("policy rules of a branch interface stay: %s", error)


def _entries(probes: ProbeSet) -> dict[Address, str]:
    """The entries of the other backend's set; none where the kernel does not have that kind of set at all."""
    try:
        return probes.entries()
    except MeshCniError as error:
        log.debug("no sets of the %s variant here: %s", probes.variant, error)
        return {}


def _destroy(probes: ProbeSet) -> None:
    """Destroy the other backend's sets, where the kernel has that kind."""
    try:
        probes.destroy()
    except MeshCniError as error:
        log.info("sets of the %s variant may stay: %s", probes.variant, error)
