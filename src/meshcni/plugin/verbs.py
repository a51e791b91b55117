"""CNI verbs: environment and effects in, an answer out. Whatever happens, there is an answer and never a traceback."""

from meshcni import __version__
from meshcni.cni.results import SUPPORTED_VERSIONS, result_text
from meshcni.cni.spec import (
    CURRENT_VERSION,
    Request,
    check_environment,
    error_text,
    parse_add,
    parse_conf,
    version_text,
)
from meshcni.errors import MeshCniError, NetnsError
from meshcni.istio import PLUGIN_NAME
from meshcni.plugin.decide import decide
from meshcni.plugin.effects import Effects
from meshcni.protocols.podadd import AddRequest, encode_request


class Answer:
    """What goes to stdout, and the exit status."""

    __slots__ = ("exit_status", "stdout")

    def __init__(self, exit_status: int, stdout: str) -> None:
        self.exit_status = exit_status
        self.stdout = stdout


def run(environ: dict[str, str], effects: Effects) -> Answer:
    """Answers the verb in CNI_COMMAND.

    DEL always succeeds and looks at nothing: rules live in the pod's netns and go with it, and a sandbox whose DEL
    fails stays forever. VERSION reads no stdin, as the CNI specification wants it.
    """
    command = environ.get("CNI_COMMAND", "")
    if command == "DEL":
        return Answer(0, "")
    if command == "VERSION":
        return Answer(0, version_text())
    if not command:
        versions = ", ".join(SUPPORTED_VERSIONS)
        effects.say(f"CNI plugin {PLUGIN_NAME} {__version__}\nCNI protocol versions supported: {versions}\n")
        return Answer(0, "")
    return _answer_with_conf(environ, effects)


def _answer_with_conf(environ: dict[str, str], effects: Effects) -> Answer:
    version = CURRENT_VERSION
    request: Request | None = None
    try:
        command = check_environment(environ)
        version, members = parse_conf(command, effects.read_stdin())
        if command != "ADD":
            # CHECK: the agent verifies the rules of all pods by itself, continuously. GC: nothing of ours outlives a
            # sandbox. STATUS: must not depend on the agent, because a runtime that gets an error here starts no pod,
            # and so never the agent's.
            return Answer(0, "")
        request = parse_add(environ, version, members)
        return Answer(0, _add(request, effects))
    except MeshCniError as error:
        problem = error
    except Exception as error:  # a fault of ours: still an answer that a runtime can read
        problem = MeshCniError(f"{PLUGIN_NAME} failed: {type(error).__name__}: {error}"[:400], "please report this")
    effects.log("error", f"code {problem.cni_code}: {problem}", request)
    return Answer(1, error_text(problem, version))


def _add(request: Request, effects: Effects) -> str:
    # The answer is made first: where it cannot be expressed, the pod must not be changed either.
    text = result_text(request.prev_result, request.cni_version)
    decision = decide(request)
    if decision.asks_agent:
        _hand_over(request, effects)
    else:
        effects.log("info", f"passes through: {decision.text}", request)
    return text


def _hand_over(request: Request, effects: Effects) -> None:
    message = encode_request(
        AddRequest(
            cni_version=request.cni_version,
            container_id=request.container_id,
            ifname=request.ifname,
            netns=request.netns,
            pod_namespace=request.pod_namespace,
            pod_name=request.pod_name,
            pod_uid=request.pod_uid,
            ips=request.prev_result.addresses() if request.prev_result else (),
        )
    )
    netns = effects.open_netns(request.netns)
    if not request.may_be_own_netns and effects.is_own_netns(netns):
        raise NetnsError(
            f"netns {request.netns!r} is the one {PLUGIN_NAME} itself runs in, not a pod's",
            "CNI_NETNS must be the path of the pod's network namespace; CNI_NETNS_OVERRIDE=1 lifts this check",
        )
    reply = effects.ask_agent(request, message, netns)
    if not reply.ok:
        error = MeshCniError(reply.message, reply.details)
        error.cni_code = reply.code
        raise error
    level = "warn" if reply.reason == "agent-uninstalled" else "info"
    effects.log(level, f"{reply.verdict} ({reply.reason}): {reply.message}", request)
