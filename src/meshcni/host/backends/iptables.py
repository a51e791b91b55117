"""iptables in its nft and its legacy variant: one restore process for each family, and a save only where needed.

Whether a namespace is untouched, and whether our chains are in it, is read from the kernel without a process and
without making tables appear (`libnftables`, `xtables`). Only where tables exist already, `*-save` tells what is in
them, so that one restore transaction leads from there to the desired state.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fcntl import ioctl
from functools import lru_cache

from meshcni.errors import ApplyError
from meshcni.host.backends import families_of, xtables
from meshcni.host.backends.libnftables import Nft
from meshcni.host.capabilities import complaint, missing_capabilities
from meshcni.istio import AMBIENT_HOST_CHAIN
from meshcni.rules import iptables, plan
from meshcni.rules.iptables_observed import is_own_chain
from meshcni.rules.model import BUILT_IN_CHAINS, Backend, Family, Purpose, Ruleset, TableName

VARIANTS = ("nft", "legacy")
ENTER_USERNS = "/usr/local/lib/meshcni/enter-userns"  # of the image (native/launcher/enter-userns.c)
SEARCH_PATH = ("/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin", "/bin")
WAIT_SECONDS = 10  # for another iptables in the same pod
TIMEOUT_SECONDS = 30.0
MAX_COMPLAINT = 2000  # characters of a tool's standard error in our message
NS_GET_USERNS = 0xB701  # linux/nsfs.h
_COMMAND = {Family.V4: "iptables", Family.V6: "ip6tables"}
_NEEDED_CAPABILITIES = ("CAP_NET_ADMIN", "CAP_NET_RAW")
_MISSING_MODULE = (
    "does not exist",
    "No chain/target/match",
    "can't initialize",
    "unable to initialize",
    "_ADD failed (Operation not supported)",
)
_MISSING_SET = re.compile(r"Set \S+ doesn't exist")
_NFT_FAMILY = {Family.V4: "ip", Family.V6: "ip6"}

_IPV6_LOAD = (
    "the kernel's netfilter for IPv6 is missing, and IPv6 traffic would pass by the mesh: load ip6_tables with its "
    "tables nat, mangle and raw (legacy), or nf_tables with family ip6 (nft), on the node"
)
_IPV6_AMBIENT = f"{_IPV6_LOAD}, or set AMBIENT_IPV6=false, which leaves IPv6 outside of the mesh"
_IPV6_HINTS = {
    Purpose.SIDECAR: f"{_IPV6_LOAD}, give pods no IPv6 addresses, or set FAMILY_POLICY=original, which leaves IPv6 of "
    "dual-stack pods outside of the mesh",
    Purpose.AMBIENT_POD: _IPV6_AMBIENT,
    Purpose.AMBIENT_HOST: _IPV6_AMBIENT,
}

# Nothing else of our environment is passed on.
HOST_ENVIRONMENT = {"PATH": ":".join(SEARCH_PATH), "LC_ALL": "C"}
# A pod has its own tables, so its lock is its own too: the namespace file itself, the child's by the time it opens it.
# Nobody who holds the host's /run/xtables.lock makes a pod wait.
ENVIRONMENT = {**HOST_ENVIRONMENT, "XTABLES_LOCKFILE": "/proc/thread-self/ns/net"}
HOST_LOCK = "/run/xtables.lock"


@dataclass(frozen=True, slots=True)
class Tools:
    """Absolute paths of one variant's commands, by family.

    `into_userns` has a command run in the user namespace of descriptor `{fd}`; empty where no program does that.
    `chains` lists single chains, which only the host's rules need.
    """

    variant: str
    restore: Mapping[Family, str]
    save: Mapping[Family, str]
    into_userns: tuple[str, ...] = ()
    chains: Mapping[Family, str] = field(default_factory=dict)


@lru_cache(16)  # an image's tools stay where they are
def find_tools(variant: str, search_path: tuple[str, ...] = SEARCH_PATH) -> Tools | None:
    """Find the commands of `variant` (`nft` or `legacy`), None when the IPv4 ones are not all there.

    A command without variant in its name counts when it is a link to the variant's multi-call binary.
    """
    restore, save, chains = (
        {family: _find(command, variant, suffix, search_path) for family, command in _COMMAND.items()}
        for suffix in ("-restore", "-save", "")
    )
    if not restore[Family.V4] or not save[Family.V4]:
        return None
    return Tools(variant, restore, save, into_userns(search_path), chains)


def into_userns(search_path: tuple[str, ...], own: str = ENTER_USERNS) -> tuple[str, ...]:
    """Find a program for `Tools.into_userns`: the image's `own`, or else util-linux's; empty when there is neither."""
    if os.access(own, os.X_OK):
        return own, "{fd}"
    nsenter = _first_executable(("nsenter",), search_path)
    return (nsenter, "--user=/proc/self/fd/{fd}", "--") if nsenter else ()


def _find(command: str, variant: str, suffix: str, search_path: tuple[str, ...]) -> str:
    exact = _first_executable((f"{command}-{variant}{suffix}",), search_path)
    plain = "" if exact else _first_executable((f"{command}{suffix}",), search_path)
    if plain and f"xtables-{variant}-" in os.path.realpath(plain):
        return plain
    return exact


def _first_executable(names: tuple[str, ...], search_path: tuple[str, ...]) -> str:
    candidates = (os.path.join(folder, name) for folder in search_path for name in names)
    return next((path for path in candidates if os.access(path, os.X_OK)), "")


class IptablesBackend:
    """Programs our chains and our entries in the built-in chains of one iptables variant; see PacketBackend."""

    kind = Backend.IPTABLES

    def __init__(self, tools: Tools, nft_here: Nft | None = None, purpose: Purpose = Purpose.SIDECAR) -> None:
        self.variant = tools.variant
        self.processes = 0
        self._tools = tools
        self._nft = nft_here or Nft()
        self._purpose = purpose

    def holds_ours(self) -> bool:
        """Tell whether a chain of ours exists in either family."""
        return any(self._has_ours(self._chains(family)) for family in Family)

    def own_names(self) -> tuple[str, ...]:
        """Name our chains of both families, each once."""
        found = [name for family in Family for chains in self._chains(family).values() for name in chains]
        return tuple(name for name in dict.fromkeys(found) if is_own_chain(name, self._purpose))

    def apply(self, ruleset: Ruleset, *, keep_on_failure: bool = False) -> bool:
        """Lead each family from what it holds to `ruleset`; a family that `ruleset` leaves out loses what is ours."""
        try:
            texts = self._observe(ruleset)
            if texts and not _drift(ruleset, texts):
                return False
            observed = {family: iptables.parse(text) for family, text in texts.items()}
            self._restore({family: iptables.render(ruleset, family, observed.get(family)) for family in Family})
        except ApplyError:
            if not keep_on_failure:
                self._remove_after_failure(ruleset)
            raise
        return True

    def missing(self, ruleset: Ruleset) -> tuple[str, ...]:
        """Name the chains of `ruleset` that do not exist."""
        absent = []
        for family in families_of(ruleset):
            present = self._chains(family)
            for table in ruleset.for_family(family):
                names = {chain.name for chain in table.chains} - set(BUILT_IN_CHAINS)
                absent += [
                    f"{_COMMAND[family]} {table.name.value} {name}"
                    for name in sorted(names - set(present.get(table.name.value, ())))
                ]
        return tuple(absent)

    def drift(self, ruleset: Ruleset) -> tuple[plan.Drift, ...]:
        """Compare what is ours with `ruleset`; starts one process for each family that has tables."""
        return _drift(ruleset, self._observe(ruleset))

    def observed(self, ruleset: Ruleset) -> plan.Observation:
        """Return what is there by family; starts one process for each family that has tables."""
        return {family: iptables.parse(text) for family, text in self._observe(ruleset).items()}

    def listing(self) -> str:
        """Return what the save commands print for the families that have tables."""
        return "".join(self._save(family) for family in Family if self._chains(family))

    def release(self) -> None:
        """Empty our nat chains, those of each family in one transaction."""
        texts = {}
        for family in Family:
            chains = [chain for chain in self._chains(family).get("nat", ()) if is_own_chain(chain, self._purpose)]
            if chains:
                texts[family] = "\n".join(["*nat", *(f":{chain} - [0:0]" for chain in chains), "COMMIT", ""])
        self._restore(texts)

    def remove(self, known: Ruleset | None = None) -> None:
        """Take our chains and entries out of both families."""
        for family in Family:
            self._remove_family(family, known)

    def _remove_after_failure(self, known: Ruleset) -> None:
        """Remove what is there of each family; a second failure adds nothing to the first one's message."""
        for family in Family:
            try:
                self._remove_family(family, known)
            except ApplyError:
                continue

    def _remove_family(self, family: Family, known: Ruleset | None) -> None:
        if self._has_ours(self._chains(family)):
            applied = iptables.expected(known, family) if known else None
            observed = iptables.parse(self._save(family))
            self._restore({family: iptables.render_removal(observed, applied, self._purpose)})

    def _observe(self, ruleset: Ruleset) -> dict[Family, str]:
        """Return the listing of each family, without those that have no tables at all (the usual case for a new pod).

        A family that `ruleset` leaves out is looked at only when something of ours is in it. On the host that holds for
        both: without our chain there can be no jump to it, and listing all that a host has takes long.
        """
        texts = {}
        for family in Family:
            tables = self._chains(family)
            is_wanted = family in ruleset.families and self._purpose is not Purpose.AMBIENT_HOST
            if self._has_ours(tables) or (tables and is_wanted):
                texts[family] = self._save(family)
        return texts

    def _has_ours(self, tables: Mapping[str, tuple[str, ...]]) -> bool:
        return any(is_own_chain(name, self._purpose) for chains in tables.values() for name in chains)

    def _chains(self, family: Family) -> Mapping[str, tuple[str, ...]]:
        """Return the chains of each table of `family` that exists, asked without a process; on the host only of nat."""
        if self.variant == "legacy":
            tables = xtables.chains(family)
        else:
            listed = self._nft.chains().items()
            tables = {table: chains for (kind, table), chains in listed if kind == _NFT_FAMILY[family]}
        if self._purpose is Purpose.AMBIENT_HOST:
            return {table: chains for table, chains in tables.items() if table == TableName.NAT.value}
        return tables

    def _save(self, family: Family) -> str:
        # From outside: the list of legacy tables in /proc is not for the root of another user namespace.
        if self._purpose is Purpose.AMBIENT_HOST:
            return self._save_host_chains(family)
        return self._run([self._path(self._tools.save, family)])

    def _save_host_chains(self, family: Family) -> str:
        """Return what a save command would print of our chain and the one that leads to it.

        A host has ten thousands of rules, of which the nft variant's save command would fetch and print each one.
        """
        table, command = TableName.NAT.value, self._path(self._tools.chains, family)
        lines = [f"*{table}"]
        for chain in ("POSTROUTING", AMBIENT_HOST_CHAIN):
            text = self._run([command, f"--wait={WAIT_SECONDS}", "-t", table, "-S", chain])
            declaration, *rules = text.splitlines()
            policy = declaration.split()[2] if declaration.startswith("-P ") else "-"
            lines += [f":{chain} {policy} [0:0]", *rules]
        return "\n".join([*lines, "COMMIT", ""])

    def _restore(self, texts: Mapping[Family, str]) -> None:
        """Load each family's text, one after the other: the kernel lists tables in the order of their making."""
        self._nft.forget()
        commands = {family: self._path(self._tools.restore, family) for family, text in texts.items() if text}
        prefix, descriptors = self._into_user_namespace() if commands else ((), ())
        try:
            for family, path in commands.items():
                self._run([*prefix, path, "--noflush", f"--wait={WAIT_SECONDS}"], texts[family], descriptors)
        finally:
            for fd in descriptors:
                os.close(fd)

    def _path(self, paths: Mapping[Family, str], family: Family) -> str:
        if not paths[family]:
            raise ApplyError(
                f"there are no {_COMMAND[family]} commands of the {self.variant} variant", "install iptables"
            )
        return paths[family]

    def _run(self, command: Sequence[str], text: str = "", descriptors: tuple[int, ...] = ()) -> str:
        """Run a command to its end and return what it printed. Raises ApplyError when it fails or takes too long."""
        self.processes += 1
        words = " ".join(command)
        try:
            done = subprocess.run(
                command,
                input=text,
                capture_output=True,
                text=True,
                errors="replace",
                env=_environment(self._purpose),
                cwd="/",
                timeout=TIMEOUT_SECONDS,
                pass_fds=descriptors,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ApplyError(
                f"{words} took more than {TIMEOUT_SECONDS:.0f} s", "is its lock in the pod held?"
            ) from None
        except OSError as error:
            raise ApplyError(f"{words} cannot be started: {error}", "is the agent's image complete?") from None
        if done.returncode != 0:
            complaint = done.stderr.strip()[:MAX_COMPLAINT]
            raise ApplyError(
                f"{words} failed with status {done.returncode}: {complaint}",
                _hint(done.stderr, self._purpose, is_ipv6=_COMMAND[Family.V6] in words),
            )
        return done.stdout

    def _into_user_namespace(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return the command prefix, and the descriptor it needs, for a pod with a user namespace of its own.

        The kernel takes owner matches only from a process in the user namespace that owns the network namespace
        (net/netfilter/xt_owner.c).
        """
        net = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            owner = ioctl(net, NS_GET_USERNS)
        except OSError:
            return (), ()  # not ours to see: then it is a namespace above ours, or the kernel is older than 4.9
        finally:
            os.close(net)
        if os.fstat(owner).st_ino == os.stat("/proc/self/ns/user").st_ino:
            os.close(owner)
            return (), ()
        if not self._tools.into_userns:
            os.close(owner)
            raise ApplyError(
                f"the pod has a user namespace of its own and there is neither {ENTER_USERNS} nor nsenter",
                "use nftables",
            )
        return tuple(word.format(fd=owner) for word in self._tools.into_userns), (owner,)


def _environment(purpose: Purpose) -> Mapping[str, str]:
    """Return a command's environment: the host's lock for the host's tables where it can be had, else the netns' own.

    A container with a read-only root file system has it only when the host's file is mounted.
    """
    if purpose is not Purpose.AMBIENT_HOST:
        return ENVIRONMENT
    try:
        os.close(os.open(HOST_LOCK, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    except OSError:
        return ENVIRONMENT
    return HOST_ENVIRONMENT


def _drift(ruleset: Ruleset, texts: Mapping[Family, str]) -> tuple[plan.Drift, ...]:
    """Compare listings with `ruleset`; one that holds what is wanted and nothing else is not even taken apart."""
    if all(iptables.canonical(texts.get(family, "")) == iptables.listing(ruleset, family) for family in Family):
        return ()
    return plan.drift(ruleset, {family: iptables.parse(text) for family, text in texts.items()})


def _hint(stderr: str, purpose: Purpose, *, is_ipv6: bool) -> str:
    lacking = tuple(capability for capability in missing_capabilities() if capability.name in _NEEDED_CAPABILITIES)
    if lacking:
        return complaint(lacking)
    if _MISSING_SET.search(stderr):
        return "the address set of the probes has to be made before the rules"
    if any(phrase in stderr for phrase in _MISSING_MODULE):
        if is_ipv6:  # the rules for IPv4 are in already
            return _IPV6_HINTS[purpose]
        return "is a kernel module (xt_REDIRECT, xt_TPROXY, xt_owner, xt_CT, iptable_nat) missing?"
    return f"the rules in question are shown by `meshcni rules {purpose.value}`"
