"""Whether a pod has to wait for the node agent that is down: asked of the API server, and decided as the agent does.

Only one answer counts: this very pod has nothing to do with the mesh. Every other one, and every doubt, leaves the pod
waiting, and then failing, as if nobody had been asked.
"""

import time

from meshcni import istio
from meshcni.cni.spec import Conf, Request
from meshcni.errors import MeshCniError
from meshcni.plugin.agentcall import Agent
from meshcni.plugin.apicall import AgentIsBackError, ApiCall
from meshcni.plugin.doubt import DoubtError
from meshcni.pods.eligibility import NAMESPACE_UNKNOWN, Decision, Policy, Verdict, decide
from meshcni.pods.model import Pod, namespace_from_object, pod_from_object
from meshcni.pods.podidentity import is_meant
from meshcni.pods.selectors import parse_enablement_selectors

REQUEST_SECONDS = 3.0
MIN_REQUEST_SECONDS = 0.2  # a repetition that had less time is not worth its connection
TOTAL_SECONDS = 10.0  # no further attempt later than this after the first
FIRST_PAUSE_SECONDS = 0.5  # an API server that has just started refuses everybody for about a second

_MESH_HINT = "this pod must not run outside of the mesh, so it waits for the agent; "


class Inquiry:
    """Asks until there is an answer that counts, a few times and with growing pauses; `finding` is what came of it.

    `deadline`, on the monotonic clock, ends it, and so does `agent` when it is back.
    """

    def __init__(self, request: Request, deadline: float, agent: Agent) -> None:
        self._request = request
        self._agent = agent
        self._deadline = deadline
        self._is_decided = False
        self._attempts = 0
        self._next = self._begin = time.monotonic()
        self.finding = "was not heard in time"
        self.hint = ""

    def reason_to_pass(self) -> str:
        """Why the pod may start now; empty when it may not, or when it is not yet time to ask again."""
        seconds = self._seconds()
        if seconds <= 0:
            return ""
        try:
            decision = self._decision(seconds)
        except AgentIsBackError:
            return ""
        except DoubtError as doubt:
            self.finding, self.hint = doubt.message, f"{doubt.hint}; " if doubt.hint else ""
        except MeshCniError as error:  # a pod or a selector that cannot be read
            self.finding, self.hint = f"told what cannot be read: {error}", ""
        else:
            if decision.verdict is Verdict.SKIP:
                return f"the API server says that the pod is not for the mesh: {_said(decision)}"
            self._is_decided = True
            self.finding, self.hint = f"says that the pod is for the mesh: {_said(decision)}", _MESH_HINT
        self._attempts += 1
        self._next = time.monotonic() + FIRST_PAUSE_SECONDS * 2.0 ** (self._attempts - 1)
        return ""

    def _seconds(self) -> float:
        """How long a request may take that begins now, 0 for none; the first has its time in any case."""
        if self._attempts == 0:
            return REQUEST_SECONDS
        now = time.monotonic()
        left = min(self._deadline - now, REQUEST_SECONDS)
        is_due = self._next <= now < self._begin + TOTAL_SECONDS
        return left if is_due and not self._is_decided and left >= MIN_REQUEST_SECONDS else 0.0

    def _decision(self, seconds: float) -> Decision:
        """What the API server's pod is. Raises DoubtError, MeshCniError and AgentIsBackError."""
        request = self._request
        policy = _policy(request.conf)
        if not request.pod_uid:
            raise DoubtError("was not asked: the runtime does not say the pod's UID", "K8S_POD_UID is not in CNI_ARGS")
        call = ApiCall(f"{request.conf.run_dir}/{istio.KUBECONFIG_NAME}", seconds, self._agent)
        name, namespace = request.pod_name, request.pod_namespace
        pod = pod_from_object(call.pod(namespace, name))
        if pod.namespace != namespace or not is_meant(pod, request.pod_uid):
            raise _other_pod(pod, request.pod_uid)
        decision = decide(pod, None, policy)
        if decision.reason is NAMESPACE_UNKNOWN:
            labels = namespace_from_object(call.namespace(namespace))
            decision = decide(pod, labels, policy)
        return decision


def _policy(conf: Conf) -> Policy:
    """The settings of the agent that wrote the conf. Raises DoubtError where the conf does not say all."""
    if conf.ambient_enabled is None or (conf.ambient_enabled and conf.enablement_selectors is None):
        text = "was not asked: the conf does not say which pods are for ambient mode"
        raise DoubtError(
            text, f"'ambient_enabled' or 'enablement_selectors' is not in the entry of {istio.PLUGIN_NAME}"
        )
    return Policy(
        exclude_namespaces=frozenset(conf.exclude_namespaces),
        agent_namespace=conf.pod_namespace,
        ambient_enabled=conf.ambient_enabled,
        enablement_selectors=parse_enablement_selectors(conf.enablement_selectors, "enablement_selectors of the conf"),
        system_namespace=conf.system_namespace or istio.SYSTEM_NAMESPACE,
    )


def _other_pod(pod: Pod, uid: str) -> DoubtError:
    return DoubtError(
        f"knows another pod {pod.namespace}/{pod.name}: its UID is {pod.uid}, the runtime's is {uid}",
        "the sandbox of a deleted pod needs nothing, the kubelet gives it up by itself",
    )


def _said(decision: Decision) -> str:
    return f"{decision.reason.text} ({decision.evidence})"
