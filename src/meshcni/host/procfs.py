"""What /proc says about this thread's network namespace, this boot and this process."""

from __future__ import annotations

from dataclasses import dataclass

from meshcni.rules.model import Family

# Listed here are the legacy tables that exist; reading the file makes none, unlike every legacy command.
_LEGACY_NAMES = {
    Family.V4: "/proc/thread-self/net/ip_tables_names",
    Family.V6: "/proc/thread-self/net/ip6_tables_names",
}


def read_text(path: str) -> str | None:
    """Return the text of a /proc file, None when there is none or it may not be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return None


def legacy_table_names(family: Family) -> frozenset[str]:
    """Return the names of the legacy iptables tables of `family` that exist in this thread's network namespace."""
    return frozenset((read_text(_LEGACY_NAMES[family]) or "").split())


def boot_id() -> str:
    """Return the identifier of this boot of the machine, empty when /proc does not tell."""
    return (read_text("/proc/sys/kernel/random/boot_id") or "").strip()


def effective_capabilities() -> int:
    """Return the effective capabilities of this process, bit N standing for capability number N."""
    return privileges().effective


@dataclass(frozen=True, slots=True)
class Privileges:
    """The capabilities that this process has and may ever have, as bit sets, and whether programs may give it more."""

    effective: int
    bounding: int
    no_new_privileges: bool
    uid: int


def privileges(text: str | None = None) -> Privileges:
    """Return this thread's privileges, or those in `text`, a status file of /proc; none where it does not say."""
    text = read_text("/proc/thread-self/status") or "" if text is None else text
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)

    def value(name: str, base: int = 10) -> int:
        return int((fields.get(name, "").split() or ["0"])[0], base)

    return Privileges(value("CapEff", 16), value("CapBnd", 16), bool(value("NoNewPrivs")), value("Uid"))
