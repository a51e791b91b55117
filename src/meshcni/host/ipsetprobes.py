"""The host's address sets in the kernel's ipset, for rules of iptables."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping
from errno import EEXIST, EINVAL, ENOENT, EPERM, EPROTONOSUPPORT

from meshcni.errors import ApplyError
from meshcni.host import ipset
from meshcni.host.ipset import Ipset, SetHeader
from meshcni.host.probeentries import SET_NAMES, IpAddress, by_family, checked, ordered, reachable
from meshcni.rules.model import Family

NO_COMMENTS = "the set keeps no comments, so the owners of its entries are known to this agent's memory only"

_ADDRESS_FAMILY = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_FAMILY_WORD: dict[int, str] = {socket.AF_INET: "inet", socket.AF_INET6: "inet6"}
_HINTS = {
    EPERM: "CAP_NET_ADMIN is needed in the host's network namespace",
    EINVAL: "is the kernel module ip_set missing?",
    EPROTONOSUPPORT: "is the kernel module ip_set missing?",
    ipset.ERROR_FIND_TYPE: "is the kernel module ip_set_hash_ip missing?",
    ipset.ERROR_FULL: "somebody made it with a smaller maxelem than usual; destroy it and start the agent again",
}


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
            for family in ordered(self._families):
                self._ensure(kernel, family)

    def entries(self) -> dict[IpAddress, str]:
        """See ProbeSet."""
        found: dict[IpAddress, str] = {}
        with self._kernel() as kernel:
            for family in ordered(self._families):
                try:
                    entries = kernel.entries(SET_NAMES[family])
                except OSError as error:
                    if error.errno != ENOENT:
                        raise _refusal(f"list the ipset {SET_NAMES[family]}", error) from None
                    continue
                found |= {entry.address: entry.comment for entry in entries if entry.address is not None}
        return reachable(found)

    def put(self, owners: Mapping[IpAddress, str], there: Mapping[IpAddress, str] | None = None) -> None:
        """See ProbeSet."""
        with self._kernel() as kernel:
            for family, own in by_family(checked(owners), self._families).items():
                for address, uid in own.items():
                    self._put(kernel, family, address, uid)

    def delete(self, addresses: Iterable[IpAddress]) -> None:
        """See ProbeSet."""
        with self._kernel() as kernel:
            for family, own in by_family(dict.fromkeys(addresses, ""), self._families).items():
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
