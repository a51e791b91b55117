"""The host's address sets: which pod addresses are exempt when the kubelet probes them, each with its pod's UID.

Two ways to keep them, as the node's rules are iptables' or nft's. Every call looks at the network namespace of the
calling thread and remembers nothing of it, so one object serves any number of threads and survives whatever others do
to the sets between two calls.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterable, Mapping
from errno import EEXIST, EINVAL, ENOENT, EPERM, EPROTONOSUPPORT
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

from meshcni import istio
from meshcni.errors import ApplyError, RulesError
from meshcni.host import ipset, nftset
from meshcni.host.backends.libnftables import Nft, NftUnavailableError
from meshcni.host.ipset import Ipset, SetHeader
from meshcni.rules.model import Family

IpAddress = IPv4Address | IPv6Address

NFT_TABLE = istio.AMBIENT_NFT_TABLE_PREFIX + "nat"  # shared with the host's rules
SET_NAMES = {Family.V4: istio.PROBE_SET_V4, Family.V6: istio.PROBE_SET_V6}
NO_COMMENTS = "the set keeps no comments, so the owners of its entries are known to this agent's memory only"

_ADDRESS_FAMILY = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_FAMILY_WORD: dict[int, str] = {socket.AF_INET: "inet", socket.AF_INET6: "inet6"}
_UID = re.compile(r"[A-Za-z0-9._-]{1,127}")  # 127 bytes is what nft has room for; a UID has 36 or 32
_HINTS = {
    EPERM: "CAP_NET_ADMIN is needed in the host's network namespace",
    EINVAL: "is the kernel module ip_set missing?",
    EPROTONOSUPPORT: "is the kernel module ip_set missing?",
    ipset.ERROR_FIND_TYPE: "is the kernel module ip_set_hash_ip missing?",
    ipset.ERROR_FULL: "somebody made it with a smaller maxelem than usual; destroy it and start the agent again",
}


class ProbeSet(Protocol):
    """The address sets of one node: an IPv4 one and, when IPv6 is among the families, an IPv6 one.

    An IPv4-mapped address is the IPv4 address in it. An address of a family that is off is skipped without a word, as
    there is no rule that would look for it. Failures are ApplyErrors.
    """

    variant: str

    @property
    def warning(self) -> str:
        """What is not as it should be but works, in words; empty when all is well. `ensure` finds it out."""

    def ensure(self) -> None:
        """Make the sets unless they are there; entries of an earlier agent, also of the original, stay."""

    def entries(self) -> dict[IpAddress, str]:
        """Return every address with its comment as it is: a pod's UID, or whatever somebody else wrote, or nothing."""

    def put(self, owners: Mapping[IpAddress, str]) -> None:
        """Put addresses in, or give those that are there their new owner's UID; makes missing sets.

        Raises RulesError for what is no UID.
        """

    def delete(self, addresses: Iterable[IpAddress]) -> None:
        """Take addresses out, whoever owns them; what is not there is fine."""

    def destroy(self) -> None:
        """Remove the sets of both families. One that a rule still looks into makes an ApplyError that says so."""


class IpsetProbeSet:
    """Sets of the kernel's ipset, for rules of iptables; no process is started."""

    variant = "ipset"

    def __init__(self, families: frozenset[Family], connect: Callable[[], Ipset] = Ipset) -> None:
        self._families = families
        self._connect = connect
        self._without_comments: set[Family] = set()

    @property
    def warning(self) -> str:
        """Whether owners are kept; see ProbeSet."""
        return NO_COMMENTS if self._without_comments else ""

    def ensure(self) -> None:
        """See ProbeSet; a set without comments is used as it is, also made so where the kernel has no better."""
        with self._kernel() as kernel:
            for family in _ordered(self._families):
                self._ensure(kernel, family)

    def entries(self) -> dict[IpAddress, str]:
        """See ProbeSet."""
        found: dict[IpAddress, str] = {}
        with self._kernel() as kernel:
            for family in _ordered(self._families):
                try:
                    entries = kernel.entries(SET_NAMES[family])
                except OSError as error:
                    if error.errno != ENOENT:
                        raise _refusal(f"list the ipset {SET_NAMES[family]}", error) from None
                    continue
                found |= {entry.address: entry.comment for entry in entries if entry.address is not None}
        return _reachable(found)

    def put(self, owners: Mapping[IpAddress, str]) -> None:
        """See ProbeSet."""
        with self._kernel() as kernel:
            for family, own in _by_family(_checked(owners), self._families).items():
                for address, uid in own.items():
                    self._put(kernel, family, address, uid)

    def delete(self, addresses: Iterable[IpAddress]) -> None:
        """See ProbeSet."""
        with self._kernel() as kernel:
            for family, own in _by_family(dict.fromkeys(addresses, ""), self._families).items():
                for address in own:
                    try:
                        kernel.delete(SET_NAMES[family], address)
                    except OSError as error:
                        if error.errno != ENOENT:
                            raise _refusal(f"delete {address} from the ipset {SET_NAMES[family]}", error) from None

    def destroy(self) -> None:
        """See ProbeSet."""
        used = []
        with self._kernel() as kernel:
            for name in SET_NAMES.values():
                try:
                    kernel.destroy(name)
                except OSError as error:
                    if error.errno == ipset.ERROR_BUSY:
                        used.append(_users(kernel, name))
                    elif error.errno != ENOENT:
                        raise _refusal(f"destroy the ipset {name}", error) from None
        if used:
            raise ApplyError("; ".join(used), "iptables-save and iptables-legacy-save show rules by --match-set")

    def _kernel(self) -> Ipset:
        try:
            return self._connect()
        except OSError as error:
            raise _refusal("talk to ipset", error) from None

    def _ensure(self, kernel: Ipset, family: Family) -> None:
        name = SET_NAMES[family]
        try:
            _create(kernel, name, _ADDRESS_FAMILY[family])
            header = kernel.header(name)
        except OSError as error:
            raise _refusal(f"make the ipset {name}", error) from None
        _check_usable(header, _ADDRESS_FAMILY[family])
        (self._without_comments.discard if header.comments else self._without_comments.add)(family)

    def _put(self, kernel: Ipset, family: Family, address: IpAddress, uid: str) -> None:
        for attempt in (1, 2):
            try:
                kernel.add(SET_NAMES[family], address, None if family in self._without_comments else uid)
                return
            except OSError as error:
                # The set is not what it was, or has not been looked at yet: look, and try once more.
                if attempt == 2 or error.errno not in (ENOENT, ipset.ERROR_COMMENT):
                    raise _refusal(f"add {address} to the ipset {SET_NAMES[family]}", error) from None
                self._ensure(kernel, family)


class NftProbeSet:
    """Sets in the host's own nft table, through libnftables in this process."""

    variant = "nft"
    warning = ""

    def __init__(self, families: frozenset[Family], nft_here: Nft | None = None) -> None:
        self._families = families
        self._nft_here = nft_here

    def ensure(self) -> None:
        """See ProbeSet."""
        names = ((SET_NAMES[family], family.value) for family in _ordered(self._families))
        self._change("make the sets", "".join(nftset.ensure(NFT_TABLE, name, version) for name, version in names))

    def entries(self) -> dict[IpAddress, str]:
        """See ProbeSet."""
        found: dict[IpAddress, str] = {}
        for family in _ordered(self._families):
            found |= self._elements(family)
        return _reachable(found)

    def put(self, owners: Mapping[IpAddress, str]) -> None:
        """See ProbeSet; all in one transaction."""
        sets = _by_family(_checked(owners), self._families)
        changes = {
            family: nftset.put(NFT_TABLE, SET_NAMES[family], own, self._elements(family))
            for family, own in sets.items()
        }
        try:
            self._put(changes)
        except _ExistsError:  # something of it has come since we looked
            self._put({family: nftset.replace(NFT_TABLE, SET_NAMES[family], own) for family, own in sets.items()})

    def delete(self, addresses: Iterable[IpAddress]) -> None:
        """See ProbeSet; all in one transaction."""
        sets = _by_family(dict.fromkeys(addresses, ""), self._families)
        there = {family: own.keys() & self._elements(family).keys() for family, own in sets.items()}
        commands = [nftset.delete(NFT_TABLE, SET_NAMES[family], keys) for family, keys in there.items() if keys]
        try:
            self._change("delete addresses from the sets", "".join(commands))
        except _NoSuchSetError:
            return

    def destroy(self) -> None:
        """See ProbeSet; the table goes too when nothing else is left in it."""
        table = self._list(f"table inet {NFT_TABLE}")
        ours = [name for name in SET_NAMES.values() if ("set", name) in {(block.kind, block.name) for block in table}]
        others = [block for block in table if block.kind != "set" or block.name not in ours]
        users = [f"{block.kind} {block.name}" for block in others if any(map(block.mentions, ours))]
        if users:
            raise ApplyError(
                f"the sets of nft table inet {NFT_TABLE} are in use by {', '.join(users)}",
                "remove the host's rules first",
            )
        if others:
            self._change("delete the sets", "".join(f"delete set inet {NFT_TABLE} {name}\n" for name in ours))
        else:
            self._change("delete the table", f"add table inet {NFT_TABLE}\ndelete table inet {NFT_TABLE}\n")

    def _put(self, changes: Mapping[Family, str]) -> None:
        """Make changes, and the sets they are for, which somebody may have flushed since they were made."""
        parts = [
            nftset.ensure(NFT_TABLE, SET_NAMES[family], family.value) + change
            for family, change in changes.items()
            if change
        ]
        self._change("put addresses into the sets", "".join(parts))

    def _elements(self, family: Family) -> Mapping[IpAddress, str]:
        found: dict[IpAddress, str] = {}
        for block in self._list(f"set inet {NFT_TABLE} {SET_NAMES[family]}"):
            found |= block.elements
        return found

    def _list(self, what: str) -> tuple[nftset.Block, ...]:
        try:
            return nftset.blocks(self._nft().show(f"list {what}"))
        except NftUnavailableError:
            raise
        except ApplyError as error:
            if _is_absence(error):
                return ()
            raise _nft_failure(f"list the {what.split()[0]}", error) from None

    def _change(self, what: str, commands: str) -> None:
        if not commands:
            return
        try:
            self._nft().change(commands)
        except NftUnavailableError:
            raise
        except ApplyError as error:
            raise _nft_failure(what, error) from None

    def _nft(self) -> Nft:
        return self._nft_here or Nft()


class FakeProbeSet:
    """Sets without a kernel, for tests of what is above; passes the contract test of the real ones.

    `held` is what is in them, `refuse` the message of the ApplyError that every change raises, `used_by` names what
    looks into the sets; empty for none.
    """

    variant = "fake"
    warning = ""

    def __init__(self, families: frozenset[Family], refuse: str = "", used_by: str = "") -> None:
        self.held: dict[IpAddress, str] = {}
        self.refuse = refuse
        self.used_by = used_by
        self._families = families

    def ensure(self) -> None:
        """See ProbeSet."""
        self._perhaps_refuse()

    def entries(self) -> dict[IpAddress, str]:
        """See ProbeSet."""
        return {address: comment for address, comment in self.held.items() if Family(address.version) in self._families}

    def put(self, owners: Mapping[IpAddress, str]) -> None:
        """See ProbeSet."""
        self._perhaps_refuse()
        for own in _by_family(_checked(owners), self._families).values():
            self.held |= own

    def delete(self, addresses: Iterable[IpAddress]) -> None:
        """See ProbeSet."""
        self._perhaps_refuse()
        for own in _by_family(dict.fromkeys(addresses, ""), self._families).values():
            for address in own:
                self.held.pop(address, None)

    def destroy(self) -> None:
        """See ProbeSet."""
        self._perhaps_refuse()
        if self.used_by:
            raise ApplyError(f"the sets are in use by {self.used_by}")
        self.held = {}

    def _perhaps_refuse(self) -> None:
        if self.refuse:
            raise ApplyError(self.refuse)


class _NoSuchSetError(ApplyError):
    """nft found no table or no set of the name."""


class _ExistsError(ApplyError):
    """There is an element that was to be created, or a set of the name that is of another type."""


# --- addresses and owners ---------------------------------------------------------------------------------------------


def _ordered(families: frozenset[Family]) -> list[Family]:
    return sorted(families, key=lambda family: family.value)


def _checked(owners: Mapping[IpAddress, str]) -> Mapping[IpAddress, str]:
    """Refuse comments that are no UIDs: they become part of nft commands."""
    for address, uid in owners.items():
        if not _UID.fullmatch(uid):
            raise RulesError(
                f"{uid!r}, given as the UID of the pod with address {address}, is none",
                "a UID has 1 to 127 letters, digits, hyphens, dots and underscores",
            )
    return owners


def _by_family(comments: Mapping[IpAddress, str], families: frozenset[Family]) -> dict[Family, dict[IpAddress, str]]:
    """Sort addresses into the sets they belong to; those of families that are off belong nowhere."""
    sorted_out: dict[Family, dict[IpAddress, str]] = {}
    for address, comment in comments.items():
        plain = _plain(address)
        family = Family(plain.version)
        if family in families:
            sorted_out.setdefault(family, {})[plain] = comment
    return sorted_out


def _plain(address: IpAddress) -> IpAddress:
    if isinstance(address, IPv4Address):
        return address
    # Made anew from its bytes, because an address may carry a scope, which is text from elsewhere.
    return address.ipv4_mapped or IPv6Address(address.packed)


def _reachable(entries: dict[IpAddress, str]) -> dict[IpAddress, str]:
    """Leave out IPv4-mapped entries: no packet has such an address, and deleting one would hit its IPv4 namesake."""
    return {address: comment for address, comment in entries.items() if _plain(address) == address}


# --- what ipset and nft say when they refuse --------------------------------------------------------------------------


def _create(kernel: Ipset, name: str, family: int) -> None:
    try:
        kernel.create(name, family)
    except OSError as error:
        if error.errno == EEXIST:
            return  # made by somebody else, in another way: its header tells whether it will do
        if error.errno not in (ipset.ERROR_FIND_TYPE, ipset.ERROR_COMMENT):
            raise
        kernel.create(name, family, comments=False)


def _check_usable(header: SetHeader, family: int) -> None:
    kind = f"{header.type} family {_FAMILY_WORD.get(header.family, header.family)} {header.narrowed}".strip()
    if header.type != ipset.SET_TYPE or header.family != family or header.narrowed:
        raise ApplyError(
            f"the ipset {header.name} is a {kind}, not a {ipset.SET_TYPE} family {_FAMILY_WORD[family]}",
            f"somebody else made it: ipset destroy {header.name}",
        )


def _users(kernel: Ipset, name: str) -> str:
    try:
        lists, references = kernel.lists_with(name), kernel.header(name).references
    except OSError:
        return f"the ipset {name} is in use"
    parts = [f"the list of sets {holder}" for holder in lists]
    if rules := references - len(lists):
        parts.append(f"{rules} packet rule{'s' if rules > 1 else ''}")
    return f"the ipset {name} is in use by {' and '.join(parts) or 'what has just gone'}"


def _refusal(what: str, error: OSError) -> ApplyError:
    return ApplyError(f"cannot {what}: {error.strerror or error}", _HINTS.get(error.errno or 0, ""))


def _is_absence(error: ApplyError) -> bool:
    return "No such file or directory" in error.message


def _nft_failure(what: str, error: ApplyError) -> ApplyError:
    """Say what could not be done and nft's first reason, without the command that nft repeats below it."""
    kind = _ExistsError if "File exists" in error.message else ApplyError
    if _is_absence(error):
        kind = _NoSuchSetError
    reason = error.message.splitlines()[0].removeprefix("nft refused the rules: ")
    hint = f"somebody else may have changed it: nft list table inet {NFT_TABLE}"
    if "Operation not permitted" in reason:
        hint = _HINTS[EPERM]
    return kind(f"cannot {what} of nft table inet {NFT_TABLE}: {reason}", hint)
