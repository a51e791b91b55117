"""What /proc says about this thread's network namespace, this boot and this process."""

from __future__ import annotations

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
    for line in (read_text("/proc/thread-self/status") or "").splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0
