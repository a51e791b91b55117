"""The text form of `explain pod`, for people: verdict, parameters with their origin, rules in words."""

from __future__ import annotations

import sys
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from meshcni.cli.show import parameter_objects
from meshcni.pods.annotations import DEFAULT_ORIGIN
from meshcni.pods.assess import Assessment
from meshcni.pods.eligibility import Verdict
from meshcni.pods.model import Pod

STYLES: Final = {Verdict.SIDECAR: "green", Verdict.AMBIENT: "cyan", Verdict.SKIP: "yellow", Verdict.ERROR: "bold red"}
MEANINGS: Final = {
    Verdict.SIDECAR: "its traffic goes through its sidecar",
    Verdict.AMBIENT: "its traffic goes through ztunnel",
    Verdict.SKIP: "its traffic is left alone",
    Verdict.ERROR: "it is not started",
}
PIPE_COLUMNS: Final = 160  # where nobody looks at a terminal, lines are not broken at 80


def print_assessment(pod: Pod, assessment: Assessment, words: list[str]) -> None:
    """Print everything known about a pod to standard output."""
    console = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS, highlight=False)
    decision = assessment.decision
    console.print(
        Text.assemble(
            (pod.full_name, "bold"),
            ": ",
            (decision.verdict.value, STYLES[decision.verdict]),
            f", {MEANINGS[decision.verdict]}",
        )
    )
    for label, text in (
        ("why", decision.reason.text),
        ("evidence", decision.evidence),
        ("reason", decision.reason.code),
    ):
        console.print(Text.assemble((f"  {label:<9}", "dim"), text))
    if assessment.error is not None and assessment.error.hint:
        console.print(Text.assemble(("  next     ", "dim"), assessment.error.hint))
    for warning in assessment.warnings:
        console.print(Text.assemble(("  warning  ", "yellow"), warning))
    if assessment.derived is not None:
        console.print()
        console.print(_parameters(assessment))
    if words:
        console.print()
        console.print(Text("Rules", style="bold"))
        console.print(_rules(words))


def _parameters(assessment: Assessment) -> Table:
    assert assessment.derived is not None
    table = Table("parameter", "value", "from", box=None, header_style="bold", pad_edge=False)
    objects = parameter_objects(assessment.derived.interception, assessment.derived.origins)
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
