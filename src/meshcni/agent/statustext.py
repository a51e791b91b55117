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
    return "\n".join([*lines, "", *_adds(document["adds"])])


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
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header) - 1)]
    return ["  ".join([*map(str.ljust, row, widths), row[-1]]) for row in (header, *rows)]
