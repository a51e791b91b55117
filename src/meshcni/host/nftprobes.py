"""The host's address sets in its own nft table: made by messages of our own, changed and listed through libnftables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from errno import EAFNOSUPPORT, EOPNOTSUPP, EPERM, EPROTONOSUPPORT

from meshcni import istio
from meshcni.errors import ApplyError
from meshcni.host import nftmessages, nftset
from meshcni.host.backends.libnftables import Nft, NftUnavailableError
from meshcni.host.probeentries import SET_NAMES, IpAddress, by_family, checked, ordered, reachable
from meshcni.rules.model import Family

NFT_TABLE = istio.AMBIENT_NFT_TABLE_PREFIX + "nat"  # shared with the host's rules
_NO_NF_TABLES = (EAFNOSUPPORT, EOPNOTSUPP, EPROTONOSUPPORT)


class _NoSuchSetError(ApplyError):
    """nft found no table or no set of the name."""


class _ExistsError(ApplyError):
    """There is an element that was to be created, or a set of the name that is of another type."""


class NftProbeSet:
    """Sets in the host's own nft table, the entries through libnftables in this process."""

    variant = "nft"
    warning = ""

    def __init__(self, families: frozenset[Family], nft_here: Nft | None = None) -> None:
        self._families = families
        self._nft_here = nft_here

    def ensure(self) -> None:
        """See ProbeSet."""
        self._make(self._families)

    def entries(self) -> dict[IpAddress, str]:
        """See ProbeSet."""
        found: dict[IpAddress, str] = {}
        for family in ordered(self._families):
            found |= self._elements(family)
        return reachable(found)

    def put(self, owners: Mapping[IpAddress, str], there: Mapping[IpAddress, str] | None = None) -> None:
        """See ProbeSet; all in one transaction."""
        sets = by_family(checked(owners), self._families)
        changes = {
            family: nftset.put(NFT_TABLE, SET_NAMES[family], own, self._elements(family) if there is None else there)
            for family, own in sets.items()
        }
        try:
            self._put(changes)
        except _ExistsError:  # something of it has come since we looked
            self._put({family: nftset.replace(NFT_TABLE, SET_NAMES[family], own) for family, own in sets.items()})

    def delete(self, addresses: Iterable[IpAddress]) -> None:
        """See ProbeSet; all in one transaction."""
        sets = by_family(dict.fromkeys(addresses, ""), self._families)
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
        """Make changes, and the sets they are for if somebody has flushed them since they were made."""
        what, commands = "put addresses into the sets", "".join(changes.values())
        try:
            self._change(what, commands)
        except _NoSuchSetError:
            self._make(changes)
            self._change(what, commands)

    def _make(self, families: Iterable[Family]) -> None:
        try:
            nftmessages.make_sets(NFT_TABLE, {SET_NAMES[family]: family.value for family in ordered(families)})
        except OSError as error:
            raise _kernel_failure(error) from None

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


def _is_absence(error: ApplyError) -> bool:
    return "No such file or directory" in error.message


def _nft_failure(what: str, error: ApplyError) -> ApplyError:
    """Say what could not be done and nft's first reason, without the command that nft repeats below it."""
    kind = _ExistsError if "File exists" in error.message else ApplyError
    if _is_absence(error):
        kind = _NoSuchSetError
    reason = error.message.splitlines()[0].removeprefix("nft refused the rules: ")
    return kind(_message(what, reason), _hint(is_permitted="Operation not permitted" not in reason))


def _kernel_failure(error: OSError) -> ApplyError:
    """Say that the kernel refused to make the sets, and its reason."""
    reason = error.strerror or str(error)
    if error.errno in _NO_NF_TABLES:
        return NftUnavailableError(f"the kernel has no nf_tables: {reason}", "load nf_tables or use iptables (legacy)")
    return ApplyError(_message("make the sets", reason), _hint(is_permitted=error.errno != EPERM))


def _message(what: str, reason: str) -> str:
    return f"cannot {what} of nft table inet {NFT_TABLE}: {reason}"


def _hint(*, is_permitted: bool) -> str:
    if is_permitted:
        return f"somebody else may have changed it: nft list table inet {NFT_TABLE}"
    return "CAP_NET_ADMIN is needed in the host's network namespace"
