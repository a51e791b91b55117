"""The verbs that read the conf. Only ADD does something; the others say whether the conf is one that we can serve."""

from meshcni.cni.results import result_text
from meshcni.cni.spec import MAX_STDIN_BYTES, Request, check_environment, error_text, parse_add, parse_conf
from meshcni.cni.versions import CURRENT_VERSION
from meshcni.errors import MeshCniError, NetnsError
from meshcni.istio import PLUGIN_NAME
from meshcni.plugin.decide import decide
from meshcni.plugin.effects import Effects


def answer_with_conf(environ: dict[str, str], effects: Effects) -> tuple[int, str]:
    """Exit status and stdout of ADD, CHECK, GC, STATUS, and of a verb that does not exist. Never raises."""
    version = CURRENT_VERSION
    request: Request | None = None
    try:
        command = check_environment(environ)
        version, members = parse_conf(command, effects.read_stdin(MAX_STDIN_BYTES + 1))
        if command != "ADD":
            # CHECK: the agent verifies the rules of all pods by itself, continuously. GC: nothing of ours outlives a
            # sandbox. STATUS: must not depend on the agent, because a runtime that gets an error here starts no pod,
            # and so never the agent's.
            return 0, ""
        request = parse_add(environ, version, members)
        return 0, _add(request, effects)
    except MeshCniError as error:
        problem = error
    except Exception as error:  # a fault of ours: still an answer that a runtime can read
        problem = MeshCniError(f"{PLUGIN_NAME} failed: {type(error).__name__}: {error}"[:400], "please report this")
    _log(effects, request, "error", f"code {problem.cni_code}: {problem}")
    return 1, error_text(problem, version)


def _add(request: Request, effects: Effects) -> str:
    # The answer is made first: where it cannot be expressed, the pod must not be changed either.
    text = result_text(request.prev_result, request.cni_version)
    decision = decide(request)
    if decision.asks_agent:
        _hand_over(request, effects)
    else:
        _log(effects, request, "info", f"passes through: {decision.text}")
    return text


def _hand_over(request: Request, effects: Effects) -> None:
    from meshcni.protocols.podadd import AddRequest, decode_reply, encode_request  # not loaded by ADDs decided here

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
    answer = effects.ask_agent(request, message, netns)
    if isinstance(answer, str):
        _log(effects, request, "warn", f"passes through: {answer}")
        return
    reply = decode_reply(answer)
    if not reply.ok:
        error = MeshCniError(reply.message, reply.details)
        error.cni_code = reply.code
        raise error
    _log(effects, request, "info", f"{reply.verdict} ({reply.reason}): {reply.message}")


def _log(effects: Effects, request: Request | None, level: str, message: str) -> None:
    if request is None:  # the conf is not known, so there is no file
        effects.log("", "", level, message, "")
    else:
        pod = f"{request.pod_namespace}/{request.pod_name}" if request.pod_name else ""
        effects.log(request.conf.run_dir, request.conf.log_level, level, message, pod)
