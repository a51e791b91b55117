"""The text form of `explain pod`, for people: verdict, parameters with their origin, rules in words."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from meshcni import istio
from meshcni.cli.given import DEFAULT_ORIGIN
from meshcni.cli.show import Explained
from meshcni.pods.eligibility import Verdict

STYLES: Final = {Verdict.SIDECAR: "green", Verdict.AMBIENT: "cyan", Verdict.SKIP: "yellow", Verdict.ERROR: "bold red"}
MEANINGS: Final = {
    Verdict.SIDECAR: "its traffic goes through its sidecar",
    Verdict.AMBIENT: "its traffic goes through ztunnel",
    Verdict.SKIP: "its traffic is left alone",
    Verdict.ERROR: "it is not started",
}
PIPE_COLUMNS: Final = 160  # where nobody looks at a terminal, lines are not broken at 80


def print_explained(explained: Explained, words: list[str]) -> None:
    """Print everything known about a pod to standard output."""
    console = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS, highlight=False)
    decision, outlook = explained.prospect.decision, explained.prospect.outlook
    console.print(
        Text.assemble(
            (explained.pod.full_name, "bold"),
            ": ",
            (decision.verdict.value, STYLES[decision.verdict]),
            f", {MEANINGS[decision.verdict]}",
        )
    )
    lines = [("why", decision.reason.text), ("evidence", decision.evidence), ("reason", decision.reason.code)]
    if annotation := explained.prospect.annotation.value:
        lines.append(("state", f"annotation {istio.AMBIENT_REDIRECTION}={annotation}"))
    if outlook is not None:
        lines.append(("next", outlook.text))
    if explained.error is not None and explained.error.hint:
        lines.append(("to do" if outlook else "next", explained.error.hint))
    for label, text in lines:
        # On a terminal it breaks lines, elsewhere nobody does: a sentence stays one line to search in.
        console.print(Text.assemble((f"  {label:<9}", "dim"), text), soft_wrap=True)
    for warning in explained.warnings:
        console.print(Text.assemble(("  warning  ", "yellow"), warning), soft_wrap=True)
    if explained.parameters is not None:
        console.print()
        console.print(_parameters(explained.parameters))
    if words:
        console.print()
        console.print(Text("Rules", style="bold"))
        console.print(_rules(words))


def _parameters(objects: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("parameter", "value", "from", box=None, header_style="bold", pad_edge=False)
    for name, shown in objects.items():
        style = "dim" if shown["origin"] == DEFAULT_ORIGIN else ""
        table.add_row(name, Text(_value(shown["value"])), Text(shown["origin"]), style=style)
    return table


def _value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _rules(words: list[str]) -> Text:
    """Join the lines: headings (not indented) stand out, what a rule does in detail steps back behind its why."""
    lines = []
    for line in words:
        why, bracket, detail = line.partition(" (")
        is_heading = not line.startswith(" ")
        lines.append(Text.assemble((why, "cyan" if is_heading else ""), (bracket + detail, "dim")))
    return Text("\n").join(lines)
