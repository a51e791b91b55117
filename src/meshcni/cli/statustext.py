"""The agent's status document as `install-cni status` prints it. Imports nothing of the agent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from meshcni.cli.control import AgentFailedError

GOOD_STATE: Final = "enrolled"  # of an ambient pod: nothing is left to do
POD_HEADER: Final = (
    "POD",
    "STATE",
    "ANNOTATION",
    "NETNS",
    "RULES",
    "ZTUNNEL",
    "IN THE HOST'S SET",
    "TRIES",
    "LAST ERROR, OR WHAT WAS MENDED",
)


SIDECAR_HEADER: Final = ("SIDECAR POD", "STATE", "NETNS", "RULES", "LAST SEEN CAPTURED", "REASON, OR WHAT WAS MENDED")
SIDECAR_WORDS: Final = {"otherwise": "captured by other rules than it asks for", "unknown": "not looked at"}


def as_text(document: Mapping[str, Any]) -> str:
    """The document for people. Raises AgentFailedError for one that has not what this version knows."""
    try:
        return _as_text(document)
    except (KeyError, TypeError, AttributeError) as error:
        raise AgentFailedError(
            f"the agent's status is of another form: {type(error).__name__} {error}",
            "it is of another release; ask for JSON, which is shown as it comes",
        ) from None


def _as_text(document: Mapping[str, Any]) -> str:
    install, backend = document["install"], document["backend"]
    rows = [
        ("agent", f"{document['version']} on node {document['node'] or '(unnamed)'}, up {document['uptimeSeconds']} s"),
        ("ready", "yes" if document["ready"] else "no: " + "; ".join(document["notReady"])),
        ("alive", "yes" if not document["notLive"] else "no: " + "; ".join(document["notLive"])),
        ("conf", install["conf_path"] or "our entry is in none"),
        ("installs", f"{install['installs']} (put back after others' changes: {install['conf_fights']})"),
        *(("note", note) for note in install["notes"]),
        *(("contested", text) for text in [install.get("contested")] if text),
        *(("kernel", text) for text in document.get("kernel", ())),
        ("backend", f"{backend['backend']}, variant {backend['variant'] or '?'}: {backend['why']}"),
        *(("watch", _watch_text(watch)) for watch in document["watches"]),
        *(("errors", f"{name}: {count:.0f}") for name, count in document["errors"].items()),
    ]
    if document["missingCapabilities"]:
        rows.append(("privileges", document["missingCapabilities"]))
    missing = document.get("missing")
    if missing:
        rows += [("degraded", text) for text in missing["degrades"]]
        rows += [("without", _right_text(right)) for right in missing.get("rights", ()) if right["weight"] == "helps"]
    lines = [f"{name:<10} {text}" for name, text in rows]
    mesh = [*_ambient(document.get("ambient")), *_sidecars(document.get("sidecars")), *_repair(document.get("repair"))]
    return "\n".join([*lines, "", *_remedy(missing), *mesh, *_adds(document["adds"])])


def _remedy(missing: Mapping[str, Any] | None) -> list[str]:
    """What to put into the agent's manifest."""
    return ["to be put into the manifest:", *missing["yaml"].splitlines(), ""] if missing and missing["yaml"] else []


def _right_text(right: Mapping[str, str]) -> str:
    return f"{right['right']}: {right['without']} (granted by the chart: {right['chart']})"


def _ambient(ambient: Mapping[str, Any] | None) -> list[str]:
    """Ambient mode: ztunnel's connections, the host's rules, and each pod with what is wrong with it."""
    if ambient is None:
        return []
    rows = [("ztunnel", _link_text(link)) for link in ambient["ztunnel"]]
    rows = rows or [("ztunnel", "none is connected: new ambient pods wait, running ones keep their proxies")]
    rows.append(("host rules", f"{ambient['hostRules']}; {_count(ambient['setEntries'], 'address')} in the set"))
    pods = sorted(ambient["pods"], key=lambda pod: bool(pod["state"] == GOOD_STATE))  # what needs a look comes first
    states = Counter(pod["state"] for pod in pods)
    counts = ", ".join(f"{states[state]} {state}" for state in sorted(states, key=_good_first))
    rows.append(("ambient", f"{_count(len(pods), 'pod')}{': ' + counts if counts else ' on this node'}"))
    lines = [f"{name:<10} {text}" for name, text in rows]
    table = ["", *_columns(POD_HEADER, [_ambient_row(pod) for pod in pods])] if pods else []
    return [*lines, *table, ""]


def _sidecars(sidecars: Mapping[str, Any] | None) -> list[str]:
    """Running sidecar pods: how many are how, and each that needs a look or was mended."""
    if sidecars is None:
        return []
    if sidecars["trouble"]:
        return [f"{'sidecars':<10} are not looked at: {sidecars['trouble']}", ""]
    pods = sidecars["pods"]
    states = Counter(pod["state"] for pod in pods)
    counts = ", ".join(
        f"{states[state]} {SIDECAR_WORDS.get(state, state)}"
        for state in sorted(states, key=lambda state: (state != "captured", state))
    )
    told = [pod for pod in pods if pod["state"] != "captured" or pod["lastMended"]]
    told.sort(key=lambda pod: bool(pod["state"] == "captured"))
    line = f"{'sidecars':<10} {_count(len(pods), 'pod')}{': ' + counts if counts else ' on this node'}"
    line += f"; what is not captured: {sidecars['mode']}"
    table = ["", *_columns(SIDECAR_HEADER, [_sidecar_row(pod) for pod in told])] if told else []
    return [line, *table, ""]


def _sidecar_row(pod: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        pod["pod"],
        pod["state"],
        str(pod["netnsInode"] or "-"),
        pod["variant"] or "-",
        pod["seenCaptured"] or "-",
        pod["reason"] or (f"mended: {pod['lastMended']}" if pod["lastMended"] else ""),
    )


def _repair(repair: Mapping[str, Any] | None) -> list[str]:
    """The repair controller, where it has something to do."""
    if repair is None or not repair["broken"]:
        return []
    rows = [f"{'repair':<10} {repair['mode']}: {_count(repair['broken'], 'broken pod')}"]
    rows += [f"{'':<10} {one['pod']}: {one['cause']}; {one['last'] or 'not treated yet'}" for one in repair["pods"]]
    return [*rows, ""]


def _link_text(link: Mapping[str, Any]) -> str:
    newest = ", newest" if link["newest"] else ""
    error = f"; last error: {link['last_error']}" if link["last_error"] else ""
    who = f"pid {link['pid']}" if link["pid"] else "a process of another container"  # the kernel tells no more of it
    return (
        f"{link['state']}{newest}: {who} since {link['since']}, "
        f"{_count(link['acked'], 'pod')} acknowledged, {link['pending']} waiting{error}"
    )


def _ambient_row(pod: Mapping[str, Any]) -> tuple[str, ...]:
    rules = pod["rules"] or "-"
    return (
        pod["pod"],
        pod["state"],
        pod["annotation"] or "-",
        str(pod["netnsInode"] or "-"),
        rules if rules == pod["wantedRules"] else f"{rules} (wanted {pod['wantedRules'] or '-'})",
        "acked" if pod["ztunnelAcked"] else "-",
        _in_set(pod["addresses"], pod["inSet"]),
        str(pod["attempts"]),
        pod["lastError"] or (f"mended: {pod['lastMended']}" if pod["lastMended"] else ""),
    )


def _in_set(addresses: Sequence[str], in_set: Sequence[str]) -> str:
    """Whether the host's set has the pod's addresses, none beside them included."""
    if sorted(addresses) == sorted(in_set):
        return ", ".join(addresses) or "-"
    return f"{', '.join(in_set) or '-'} (wanted {', '.join(addresses) or '-'})"


def _good_first(state: str) -> tuple[bool, str]:
    return state != GOOD_STATE, state


def _count(number: int, noun: str) -> str:
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number} {noun if number == 1 else plural}"


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
