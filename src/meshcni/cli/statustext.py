"""The agent's status document as `install-cni status` prints it. Imports nothing of the agent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def as_text(document: Mapping[str, Any]) -> str:
    """The document for people."""
    install, backend = document["install"], document["backend"]
    rows = [
        ("agent", f"{document['version']} on node {document['node'] or '(unnamed)'}, up {document['uptimeSeconds']} s"),
        ("ready", "yes" if document["ready"] else "no: " + "; ".join(document["notReady"])),
        ("alive", "yes" if not document["notLive"] else "no: " + "; ".join(document["notLive"])),
        ("conf", install["conf_path"] or "our entry is in none"),
        ("installs", f"{install['installs']} (put back after others' changes: {install['conf_fights']})"),
        *(("note", note) for note in install["notes"]),
        ("backend", f"{backend['backend']}, variant {backend['variant'] or '?'}: {backend['why']}"),
        *(("watch", _watch_text(watch)) for watch in document["watches"]),
        *(("errors", f"{name}: {count:.0f}") for name, count in document["errors"].items()),
    ]
    if document["missingCapabilities"]:
        rows.append(("privileges", document["missingCapabilities"]))
    lines = [f"{name:<10} {text}" for name, text in rows]
    ambient = _ambient(document.get("ambient"))
    return "\n".join([*lines, "", *ambient, *_adds(document["adds"])])


def _ambient(ambient: Mapping[str, Any] | None) -> list[str]:
    """Ambient mode: ztunnel's connections, the host's rules, and each pod with what is wrong with it."""
    if ambient is None:
        return []
    links = [
        f"ztunnel    {link['state']}{', newest' if link['newest'] else ''}: pid {link['pid']} since {link['since']}, "
        f"{link['acked']} pods acknowledged, {link['pending']} waiting"
        + (f"; last error: {link['last_error']}" if link["last_error"] else "")
        for link in ambient["ztunnel"]
    ]
    lines = links or ["ztunnel    none is connected: new ambient pods wait, running ones keep their proxies"]
    lines.append(f"host rules {ambient['hostRules']}; {ambient['setEntries']} addresses in the set")
    if not ambient["pods"]:
        return [*lines, "no ambient pod on this node", ""]
    header = ("POD", "STATE", "ANNOTATION", "NETNS", "RULES", "ZTUNNEL", "TRIES", "LAST ERROR, OR WHAT WAS MENDED")
    return [*lines, "", *_columns(header, [_ambient_row(pod) for pod in ambient["pods"]]), ""]


def _ambient_row(pod: Mapping[str, Any]) -> tuple[str, ...]:
    rules = pod["rules"] or "-"
    return (
        pod["pod"],
        pod["state"],
        pod["annotation"] or "-",
        str(pod["netnsInode"] or "-"),
        rules if rules == pod["wantedRules"] else f"{rules} (wanted {pod['wantedRules'] or '-'})",
        "acked" if pod["ztunnelAcked"] else "-",
        str(pod["attempts"]),
        pod["lastError"] or (f"mended: {pod['lastMended']}" if pod["lastMended"] else ""),
    )


def _watch_text(watch: Mapping[str, Any]) -> str:
    state = "synced" if watch["synced"] else "not synced"
    link = "connected" if watch["connected"] else f"disconnected: {watch['lastError'] or 'not asked yet'}"
    return f"{watch['resource']}: {state}, {watch['objects']} objects, {link}"


def _adds(adds: Sequence[Mapping[str, Any]]) -> list[str]:
    """The last ADDs as columns, newest first."""
    if not adds:
        return ["no ADD since the start"]
    header = ("TIME", "POD", "VERDICT", "REASON", "BACKEND", "MS", "MESSAGE")
    rows = [
        (
            add["at"][11:19],
            add["pod"],
            add["verdict"],
            add["reason"],
            add["variant"],
            f"{add['milliseconds'].get('total', 0):.1f}",
            add["message"],
        )
        for add in reversed(adds)
    ]
    return _columns(header, rows)


def _columns(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """A table: all columns but the last are padded."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header) - 1)]
    return ["  ".join([*map(str.ljust, row, widths), row[-1]]).rstrip() for row in (header, *rows)]
