"""What the demo shows at its end: the pods in tables, rules in words, what the agent says, where to look next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lab.demoambient import GUEST, AmbientPart, Visit, ambient_status
from lab.envoy import Captured
from meshcni.pods.ambient import AmbientParameters
from meshcni.pods.assess import Assessment
from meshcni.pods.eligibility import Verdict
from meshcni.rules import narrate
from meshcni.rules.ambient import pod_ruleset
from meshcni.rules.model import Backend, Family, Ruleset
from meshcni.rules.sidecar import sidecar_ruleset

COLOURS = {Verdict.SIDECAR: "green", Verdict.AMBIENT: "green", Verdict.SKIP: "yellow", Verdict.ERROR: "red"}
NEXT = (
    ("meshcni explain pod --file POD.yaml", "verdict, reason, parameters and rules of any pod"),
    ("meshcni rules sidecar --format words", "the rules for any set of parameters; also as script or JSON"),
    ("meshcni rules ambient-pod", "those of ambient mode; ambient-host for the node's own"),
    ("make test", "the same with both backends, both families, faults and restarts"),
    ("make bench", "what a pod start costs"),
    ("ARCHITECTURE.md", "where each of these things is decided and done"),
)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What came of one connection to the pod and one from it.

    `captured` is Envoy's own count, None without an Envoy; the others are the client addresses that the application
    and the server outside saw, and how long the sandbox took to start.
    """

    captured: Captured | None
    seen_inside: str
    seen_outside: str
    start_milliseconds: float


class PodCase(Protocol):
    """A pod of the demo, as far as the page is concerned."""

    @property
    def name(self) -> str:
        """The pod's name."""

    @property
    def description(self) -> str:
        """What kind of pod it is."""

    @property
    def assessment(self) -> Assessment:
        """What was decided about it."""


def show_sidecars(
    console: Console,
    cases: Sequence[PodCase],
    before: Mapping[str, Traffic],
    after: Mapping[str, Traffic],
    backend: Backend,
) -> None:
    """Print what became of the pods that an injector has seen, and the rules of the first."""
    console.print()
    console.print(pod_table(cases, before, after))
    console.print("Each pod got one connection and made one, both times; the counts are Envoy's own.", style="dim")
    console.print()
    derived = cases[0].assessment.derived
    assert derived is not None, f"{cases[0].name} is a sidecar pod"
    ruleset = sidecar_ruleset(derived.interception, frozenset(Family), backend)
    console.print(rules_panel(f"The rules of pod {cases[0].name} ({backend.value})", ruleset))


def show_ambient(console: Console, part: AmbientPart) -> None:
    """Print what became of the ambient pods, what the agent says of them, and the rules that each has."""
    console.print()
    console.print(ambient_table(part))
    console.print(visit_text(part.visit), style="dim")
    console.print()
    status = Text("\n".join(ambient_status(part.status)), no_wrap=True, overflow="ellipsis")
    console.print(Panel(status, title="install-cni status, its ambient part", title_align="left", box=box.ROUNDED))
    console.print()
    parameters = AmbientParameters(dns_capture=True)  # as the agent was told
    ruleset = pod_ruleset(parameters, frozenset(Family), part.backend)
    console.print(rules_panel(f"The rules of every ambient pod ({part.backend.value})", ruleset))


def show_next(console: Console) -> None:
    """Say where to look next."""
    console.print(next_table())


def ambient_table(part: AmbientPart) -> Table:
    """Return the table of ambient pods, each with the connection that it made to the next one."""
    table = Table(box=box.ROUNDED, title="Ambient pods", title_justify="left", expand=False, show_lines=True)
    for heading in ("pod", "verdict and reason", "annotation", "its connection", "ztunnel took", "the next app saw"):
        table.add_column(heading)
    for call in part.calls:
        decision = part.assessment(call.client).decision
        verdict = Text(decision.verdict.value, style=f"bold {COLOURS[decision.verdict]}")
        reason = Text(f"{decision.reason.text}\n{decision.reason.code}", style="dim")
        style = "bold green" if call.is_right else "red"
        table.add_row(
            Text.assemble((call.client, "bold"), "\n", (call.own_address, "dim")),
            Text.assemble(verdict, "\n", reason),
            part.annotations[call.client],
            f"to {call.server}\nIPv{call.version}",
            Text(f"{call.taken_out} out\n{call.taken_in} in", style=style),
            Text(f"{call.seen}\n") + Text("its own address" if call.seen == call.own_address else "", style="dim"),
        )
    return table


def visit_text(visit: Visit) -> str:
    """Say in a sentence what the guest's connections met."""
    bad = f"{len(visit.failed)} failed" if visit.failed else "none failed"
    cut = f", {visit.cut} was open in the moment its rules came and was ended" if visit.cut else ""
    past = f"{len(visit.past)} of them past ztunnel" if visit.past else "all through ztunnel"
    return (
        f"Pod {GUEST} joined and left while it ran: {visit.total} connections, {bad}{cut}; "
        f"{visit.inside} while it was in the mesh, {past}."
    )


def pod_table(cases: Sequence[PodCase], before: Mapping[str, Traffic], after: Mapping[str, Traffic]) -> Table:
    """Return the table of pods."""
    table = Table(box=box.ROUNDED, title="Pods", title_justify="left", expand=False, show_lines=True)
    for heading in ("pod", "verdict and reason", "without the agent", "with the agent", "start"):
        table.add_column(heading)
    for case in cases:
        decision = case.assessment.decision
        verdict = Text(decision.verdict.value, style=f"bold {COLOURS[decision.verdict]}")
        reason = Text(f"{decision.reason.text}\n{decision.reason.code}", style="dim")
        table.add_row(
            Text.assemble((case.name, "bold"), "\n", (case.description, "dim")),
            Text.assemble(verdict, "\n", reason),
            traffic_cell(before[case.name]),
            traffic_cell(after[case.name]),
            f"{before[case.name].start_milliseconds:.0f} ms\n{after[case.name].start_milliseconds:.0f} ms",
        )
    return table


def traffic_cell(traffic: Traffic) -> Text:
    """Say what Envoy got and which address the application saw."""
    if traffic.captured is None:
        head = Text("straight through\n")
    else:
        taken = traffic.captured.inbound + traffic.captured.outbound
        style = "bold green" if taken else "red"
        head = Text(f"Envoy: {traffic.captured.inbound} in, {traffic.captured.outbound} out\n", style=style)
    return head + Text(f"app saw {traffic.seen_inside}", style="dim")


def rules_panel(title: str, ruleset: Ruleset) -> Panel:
    """Return a rule set in words."""
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", style="dim", width=3)
    table.add_column(ratio=1)
    for line in narrate.words(ruleset):
        number, dot, words = line.strip().partition(". ")
        if dot and number.isdigit():
            table.add_row(number, Text(words))
        else:
            table.add_row("", Text(line, style="" if line.startswith(" ") else "bold"))
    return Panel(table, title=title, title_align="left", box=box.ROUNDED)


def next_table() -> Padding:
    """Say where to look next."""
    table = Table.grid(padding=(0, 3))
    for command, meaning in NEXT:
        table.add_row(Text(command, style="bold"), Text(meaning, style="dim"))
    heading = Table.grid()
    heading.add_row("Where to look next")
    heading.add_row(Padding(table, (0, 2)))
    return Padding(heading, (1, 0, 0, 0))
