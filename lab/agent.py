"""Our agent as a process of a lab node, with the directories of its container given by environment variables."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab import namespaces
from lab.ambient import AMBIENT_SETTINGS
from lab.containerd import Containerd
from lab.node import LabError, Node, last_lines, wait_until
from lab.objects import NODE_NAME
from meshcni import istio
from meshcni.host.capabilities import CAPABILITIES

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "build" / "istio-cni"
AGENT = Path(sys.executable).parent / "install-cni"
START_SECONDS = 30.0
STOP_SECONDS = 30.0
AGENT_NAMESPACE = "istio-system"
POD_NAME = f"{istio.AGENT_POD_PREFIX}lab"
RUN_DIR = "/run/istio-cni"
EXCLUDED_NAMESPACE = "kube-system"


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """What a test varies; `environment` beats everything else."""

    nftables: bool = True
    force_iptables: str = ""
    wait_seconds: float = 20.0  # the plugin's patience with an absent agent
    ambient: bool = False
    user: int = 0  # another one than root gets the chart's capabilities as ambient ones, and nothing else
    environment: Mapping[str, str] = field(default_factory=dict)


class Agent:
    """Starts, stops, kills and asks the agent; `api_environment` says where the API server is."""

    def __init__(
        self, node: Node, runtime: Containerd, api_environment: Mapping[str, str], service_account: Path
    ) -> None:
        self.node, self.runtime = node, runtime
        self.options = AgentOptions()
        self._process: subprocess.Popen[bytes] | None = None
        self._api_environment = api_environment
        self._service_account = service_account
        self._image = node.folder / "image"

    def start(self, options: AgentOptions | None = None, *, wait: bool = True) -> None:
        """Start it, with the last options when none are given; with `wait` return when containerd uses its plugin."""
        self.options = options or self.options
        self._launch()
        if wait:
            self.wait_ready()

    @property
    def is_running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The pid of its process, as seen from outside the node; LabError when there is none."""
        if self._process is None:
            raise LabError("the agent does not run")
        return self._process.pid

    def ensure(self, options: AgentOptions) -> None:
        """Have it running with `options`, restarting it only when it runs with others or not at all."""
        if self.is_running:
            if self.options == options:
                return
            self.terminate()
        self.start(options)

    @property
    def netns(self) -> str:
        """The path of its netns from outside: the node's."""
        return self.node.netns

    def wait_ready(self) -> None:
        """Return when /readyz says 200 and containerd has loaded the chain with our plugin."""
        try:
            wait_until("the agent is ready", self.is_ready, START_SECONDS)
            self.wait_in_chain()
        except LabError as error:
            raise LabError(f"{error}; the agent's log ends with\n{last_lines(self.log_text(), 12)}") from None

    def wait_in_chain(self) -> None:
        """Return when containerd has loaded the chain with our plugin."""
        wait_until("containerd has loaded istio-cni", self.is_in_chain, START_SECONDS)

    def is_ready(self) -> bool:
        """Ask /readyz; LabError when the agent has ended."""
        if not self.is_running:
            raise LabError("the agent ended")
        try:
            return self.get(istio.HEALTH_PORT, istio.READY_PATH)[0] == 200
        except OSError:
            return False

    def is_in_chain(self) -> bool:
        """Tell whether the chain that containerd uses holds our plugin."""
        return istio.PLUGIN_NAME in self.runtime.cri.loaded_chain()

    def get(self, port: int, path: str) -> tuple[int, str]:
        """GET from the agent's own servers: status and body. OSError when nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.sock = namespaces.connect(self.netns, "127.0.0.1", port)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except http.client.HTTPException as error:
            raise ConnectionError(str(error)) from error
        finally:
            connection.close()

    def known_pods(self) -> int:
        """Return how many pods its informer holds, by its own metric; -1 before it says."""
        found = re.search(r'^istio_cni_watch_objects\{resource="pods"\} (\S+)$', self.metrics(), re.MULTILINE)
        return int(float(found.group(1))) if found else -1

    def metrics(self) -> str:
        """Return /metrics."""
        return self.get(istio.METRICS_PORT, "/metrics")[1]

    def status(self) -> dict[str, Any]:
        """Return what `install-cni status` says."""
        found: dict[str, Any] = json.loads(self.command("status", "-o", "json"))
        return found

    def command(self, *arguments: str) -> str:
        """Run a sub-command of `install-cni` as with `kubectl exec`; returns its output."""
        return self.node.run([str(AGENT), *arguments], environment=self.environment())

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the series of a metric that have these labels."""
        series = re.findall(rf"^{name}(?:\{{(.*?)\}})? (\S+)$", self.metrics(), re.MULTILINE)
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        return sum(float(value) for text, value in series if wanted <= set(text.split(",")))

    def terminate(self) -> int:
        """Send SIGTERM, as the kubelet does, and return the exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> int:
        """Send SIGKILL."""
        return self._end(signal.SIGKILL)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Let it do nothing for a while, without its end being noticed by anybody."""
        self._signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._signal(signal.SIGCONT)

    def log_text(self) -> str:
        """Return all it has logged."""
        return self.node.log_path("agent").read_text()

    @property
    def ztunnel_socket(self) -> Path:
        """The socket that a ztunnel of this node connects to, as the node sees it."""
        return self.node.folder / "ztunnel.sock"

    def environment(self) -> dict[str, str]:
        """Return the settings that make it an agent of this node."""
        return {**self._places(), **self._settings()}

    def _places(self) -> dict[str, str]:
        """Return where things are: the directories of its container, which here are the node's own."""
        return {
            "MOUNTED_CNI_NET_DIR": str(self.runtime.conf_dir),
            "CNI_BINARY_SOURCE_DIR": str(self._image),
            "CNI_BINARY_TARGET_DIR": str(self.runtime.bin_dir),
            "CNI_AGENT_RUN_DIR": RUN_DIR,
            "SERVICE_ACCOUNT_DIR": str(self._service_account),
            "ZTUNNEL_UDS_ADDRESS": str(self.ztunnel_socket),
            "HOST_PROC_DIR": "/proc",
            "NODE_NAME": NODE_NAME,
            "POD_NAME": POD_NAME,
            "POD_NAMESPACE": AGENT_NAMESPACE,
        }

    def _settings(self) -> dict[str, str]:
        options = self.options
        return {
            "EXCLUDE_NAMESPACES": EXCLUDED_NAMESPACE,
            "NATIVE_NFTABLES": "true" if options.nftables else "false",
            "FORCE_IPTABLES_BINARY": options.force_iptables,
            "AGENT_WAIT_SECONDS": f"{options.wait_seconds:g}",
            "REPAIR_ENABLED": "false",
            **(AMBIENT_SETTINGS if options.ambient else {}),
            **self._api_environment,
            **options.environment,
        }

    def _launch(self) -> None:
        self._image.mkdir(exist_ok=True)
        if not (self._image / istio.PLUGIN_NAME).exists():
            if not PLUGIN.exists():
                raise LabError(f"no plugin: {PLUGIN.relative_to(ROOT)} is not built (make plugin)")
            shutil.copy2(PLUGIN, self._image / istio.PLUGIN_NAME)
        if not AGENT.exists():
            raise LabError(f"no agent: {AGENT} is not installed (scripts/setup)")
        command = [*as_user(self.options.user), str(AGENT)]
        self._process = self.node.spawn(command, environment=self.environment(), log="agent")

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "an agent that runs"
        self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> int:
        if self._process is None:
            return 0
        self._signal(number)
        status = self._process.wait(STOP_SECONDS)
        self._process = None
        return status


def as_user(uid: int) -> list[str]:
    """Return the prefix of a command that runs as another user, as the image's launcher arranges it; none for root."""
    if not uid:
        return []
    sets = "".join(f",+{capability.short_name.lower()}" for capability in CAPABILITIES)
    kept = [f"--{kind}=-all{sets}" for kind in ("bounding-set", "inh-caps", "ambient-caps")]
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *kept]


def cpu_ticks(pid: int) -> int:
    """Return the CPU time of process `pid` and its reaped children, in clock ticks."""
    values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(value) for value in values[11:15])


def resident_mib(pid: int) -> float:
    """Return the resident memory of process `pid` in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def milliseconds_since(begin: float) -> float:
    """Return the time since `begin`, a reading of time.monotonic, in ms."""
    return (time.monotonic() - begin) * 1000
