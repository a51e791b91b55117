"""What the plugin decides without asking anybody: which sandboxes can never be mesh pods."""

from meshcni.cni.spec import Request
from meshcni.istio import AGENT_POD_PREFIX


class Decision:
    """Either the agent must be asked, or the ADD passes through unchanged; with the reason in words."""

    __slots__ = ("asks_agent", "reason", "text")

    def __init__(self, asks_agent: bool, reason: str, text: str) -> None:
        self.asks_agent = asks_agent
        self.reason = reason
        self.text = text


def decide(request: Request) -> Decision:
    """Order as cni/pkg/plugin/plugin.go, but before anything that needs credentials or the agent.

    Our own agent's pod must start while there is no agent; a pod elsewhere that only has such a name is no exception.
    """
    namespace, name, conf = request.pod_namespace, request.pod_name, request.conf
    if not namespace or not name:
        return Decision(False, "not-kubernetes", "the sandbox belongs to no Kubernetes pod")
    if namespace == conf.pod_namespace and name.startswith(AGENT_POD_PREFIX):
        return Decision(False, "agent-pod", "this is the node agent's own pod")
    if namespace in conf.exclude_namespaces:
        return Decision(False, "namespace-excluded", f"namespace {namespace} is in exclude_namespaces of the conf")
    return Decision(True, "ask-agent", "the agent decides")
