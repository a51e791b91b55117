"""`make demo-cluster`: on a real Kubernetes, the chart is installed and pods on two nodes join the mesh.

One pod has a real Envoy as its sidecar, two are in ambient mode behind a stand-in for ztunnel. Each calls the next one;
the counts are those of Envoy and of ztunnel. Everything is removed at the end, whatever ends the demo.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lab.clean import leftovers
from lab.cluster import hostpods, verdict, workloads
from lab.cluster.cluster import Cluster
from lab.demopage import COLOURS
from lab.demorun import run_demo
from lab.envoy import Captured, Envoy, Mode
from lab.node import LabError, wait_until
from lab.steps import Steps
from lab.ztunnel.client import order
from meshcni import istio

SHOP, MARKET = "shop", "market"
AMBIENT = {"ambient": {"enabled": True}}
PODS = {"cart": (SHOP, "n1"), "web": (MARKET, "n1"), "stock": (MARKET, "n2")}  # the namespace and the node of each
CALLS = (("cart", "stock", 4), ("stock", "web", 6), ("web", "cart", 4))
DESCRIPTIONS = {"cart": "Envoy sidecar", "web": "ambient mode", "stock": "ambient mode"}
ROLES = {SHOP: "Envoy", MARKET: "ztunnel"}
COUNT_SECONDS = 10.0
NEXT = (
    ("make cluster-up", "a cluster like this one that stays, with kubectl; make cluster-down ends it"),
    ("make kubectl ARGS='…'", "kubectl on it; python -m lab.cluster helm … for charts"),
    ("charts/istio-cni/README.md", "every value of the chart"),
    ("make demo", "the node alone: start times, both backends, pods that come and go"),
)

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """One connection: what the server saw as its client, what the proxies at either end took of it."""

    client: str
    server: str
    version: int
    seen: str
    taken_out: int
    taken_in: int

    @property
    def is_right(self) -> bool:
        """Whether it was captured at both ends."""
        return (self.taken_out, self.taken_in) == (1, 1)


class Demo:
    """The demonstration, step by step."""

    def __init__(self, cluster: Cluster, steps: Steps) -> None:
        self.cluster, self.steps = cluster, steps
        self.pods: dict[str, Object] = {}
        self.calls: list[Call] = []
        self.contradictions: list[str] = []
        self.explained = ""

    def run(self) -> None:
        """Do all of it."""
        with self.steps.step("helm upgrade --install istio-cni") as step:
            self.cluster.install_agent(AMBIENT)
            loaded = self.cluster.nodes["n1"].runtime.cri.loaded_chain()
            step.note = f"ready on both nodes; CNI chain: {' → '.join(loaded)}"
        with self.steps.step("Start ztunnel's stand-in on both nodes"):
            self.cluster.install_ztunnel()
        with self.steps.step("Start three pods on two nodes") as step:
            self.start_pods()
            step.note = ", ".join(f"{name} on {node}" for name, (_, node) in PODS.items())
        for client, server, version in CALLS:
            with self.steps.step(f"{client} calls {server} by IPv{version}") as step:
                self.calls.append(self.call(client, server, version))
                step.note = in_words(self.calls[-1])
        with self.steps.step("Ask whether kernel, API and agents agree") as step:
            self.contradictions = self.cluster.verdict()
            step.note = "they do, about every pod" if not self.contradictions else "they do not"
        self.explained = self.explain("cart")

    def start_pods(self) -> None:
        """Start the pods and wait until they and their proxies serve."""
        self.cluster.apply([workloads.namespace(SHOP), workloads.namespace(MARKET, ambient=True)])
        for name in (SHOP, MARKET):
            self.cluster.wait_service_account(name)
        pods = [
            hostpods.envoy_config(SHOP),
            *(
                (hostpods.envoy_pod if namespace == SHOP else workloads.plain_pod)(namespace, name, node=node)
                for name, (namespace, node) in PODS.items()
            ),
        ]
        self.cluster.apply(pods)
        for name, (namespace, _) in PODS.items():
            self.pods[name] = self.cluster.wait_pod(namespace, name)
        self.cluster.wait_agreed()

    def call(self, client: str, server: str, version: int) -> Call:
        """Connect once, and count what the proxies at both ends took."""
        address = address_of(self.pods[server], version)
        out, into = self.taken(client), self.taken(server)
        namespace = PODS[client][0]
        answer = self.cluster.exec(
            namespace, client, workloads.PROGRAM, "connect", address, str(workloads.APP_PORT), container=workloads.APP
        )
        if f"pod={server} " not in answer:
            raise LabError(f"{client} called {server} and got {answer!r}")
        wait_until("the proxies have counted", lambda: self.taken(client).outbound > out.outbound, COUNT_SECONDS)
        seen = answer.strip().rpartition("client=")[2]
        left, came = (self.taken(client) - out).outbound, (self.taken(server) - into).inbound
        return Call(client, server, version, seen, left, came)

    def taken(self, name: str) -> Captured:
        """Return how many connections the pod's proxy has taken, by its own count."""
        pod = self.pods[name]
        node = self.cluster.node_of(pod)
        if PODS[name][0] == SHOP:
            return Envoy(node, self.cluster.pod_netns(pod), name, Mode.REDIRECT).captured()
        state = order(node.path(f"{hostpods.ZTUNNEL_FOLDER}/control.sock"))
        counters = state["workloads"][pod["metadata"]["uid"]]["counters"]
        return Captured(counters["inbound"]["connections"], counters["outbound"]["connections"])

    def explain(self, name: str) -> str:
        """Return what the agent on the pod's node explains of it."""
        node = self.cluster.node_of(self.pods[name])
        return node.agent(istio.AGENT_NAME, "explain", "pod", f"{PODS[name][0]}/{name}")

    def failures(self) -> list[str]:
        """Return what is not as it should be."""
        wrong = [f"{call.client} to {call.server}: {in_words(call)}" for call in self.calls if not call.is_right]
        return wrong + self.contradictions


def in_words(call: Call) -> str:
    """Say who took a connection."""
    out, into = ROLES[PODS[call.client][0]], ROLES[PODS[call.server][0]]
    return f"{out} took {call.taken_out} out, {into} took {call.taken_in} in"


def address_of(pod: Object, version: int) -> str:
    """Return a pod's address of an IP version."""
    return str(next(each["ip"] for each in pod["status"]["podIPs"] if (":" in each["ip"]) == (version == 6)))


def show(console: Console, demo: Demo) -> None:
    """Print the pods, their calls, the rules in words, and where to look next."""
    console.print()
    console.print(pod_table(demo))
    console.print(call_table(demo))
    console.print("An app behind Envoy sees the address by which the rules know Envoy; ztunnel keeps it.", style="dim")
    console.print()
    text = Text(without_parameters(demo.explained))
    console.print(Panel(text, title="install-cni explain pod shop/cart", title_align="left", box=box.ROUNDED))
    console.print()
    console.print("Where to look next")
    table = Table.grid(padding=(0, 3))
    for command, meaning in NEXT:
        table.add_row(Text(f"  {command}", style="bold"), Text(meaning, style="dim"))
    console.print(table)


def without_parameters(explained: str) -> str:
    """Return an explanation without its table of parameters, which are all defaults here."""
    head, _, rest = explained.rstrip().partition("\n\n")
    _, heading, rules = rest.partition("\nRules\n")
    return f"{head}\n{heading}{rules}"


def pod_table(demo: Demo) -> Table:
    """Return the table of pods, with what the agent's own function decides."""
    table = Table(box=box.ROUNDED, title="Pods", title_justify="left", show_lines=True)
    for heading in ("pod", "node", "addresses", "verdict and reason"):
        table.add_column(heading)
    policy = verdict.policy_of(demo.cluster)
    for name, pod in demo.pods.items():
        namespace = demo.cluster.api.get(f"/api/v1/namespaces/{PODS[name][0]}")
        decision = verdict.assessed(pod, namespace, policy).decision
        table.add_row(
            Text.assemble((f"{PODS[name][0]}/{name}", "bold"), "\n", (DESCRIPTIONS[name], "dim")),
            PODS[name][1],
            "\n".join(each["ip"] for each in pod["status"]["podIPs"]),
            Text.assemble(
                (decision.verdict.value, f"bold {COLOURS[decision.verdict]}"), "\n", (decision.reason.text, "dim")
            ),
        )
    return table


def call_table(demo: Demo) -> Table:
    """Return the table of calls."""
    table = Table(box=box.ROUNDED, title="Calls", title_justify="left")
    for heading in ("from", "to", "by", "taken at the client", "taken at the server", "the app saw"):
        table.add_column(heading)
    for call in demo.calls:
        style = "bold green" if call.is_right else "red"
        table.add_row(
            f"{call.client} ({PODS[call.client][1]})",
            f"{call.server} ({PODS[call.server][1]})",
            f"IPv{call.version}",
            Text(f"{ROLES[PODS[call.client][0]]}: {call.taken_out}", style=style),
            Text(f"{ROLES[PODS[call.server][0]]}: {call.taken_in}", style=style),
            call.seen,
        )
    return table


def main() -> int:
    """Run the demo; 0 when all was as it should be, else see lab.demorun."""
    return run_demo(play)


def play(console: Console) -> list[str]:
    """Run it and show the page; returns what was wrong."""
    with Steps(console) as steps:
        demo, page = run(steps, console)
    console.print(page, end="")
    return demo.failures()


def run(steps: Steps, console: Console) -> tuple[Demo, Text]:
    """Run it on a cluster of its own, which is gone afterwards; the page is made before, while there is one."""
    with steps.step("Start Kubernetes: control plane, two nodes") as step:
        cluster = Cluster().__enter__()
        node = cluster.api.get("/api/v1/nodes/n1")
        step.note = f"{node['status']['nodeInfo']['kubeletVersion']}, dual stack, each node in namespaces of its own"
    try:
        demo = Demo(cluster, steps)
        demo.run()
        with console.capture() as captured:
            show(console, demo)
        return demo, Text.from_ansi(captured.get())
    finally:
        with steps.step("Clear everything away") as step:
            cluster.close()
            if any(name.startswith(cluster.name) for name in leftovers()):
                raise LabError(f"something of {cluster.name} is left; python -m lab.clean removes it")
            step.note = "its processes, netns, mounts, cgroups and files are gone"
