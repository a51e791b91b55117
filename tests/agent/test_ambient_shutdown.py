"""What an agent in ambient mode leaves on its node when it ends, and what an uninstall takes away, from outside."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from lab.objects import daemonset_object
from lab.ztunnel.client import Program
from tests.agent.ambientscene import (
    VARIANTS,
    ZTUNNEL_WAIT,
    AmbientPod,
    AmbientScene,
    add,
    everything_in,
    is_captured,
    push,
    wait_state,
)
from tests.agent.scene import NODE, Agent, request_for, wait_until

from meshcni import istio
from meshcni.protocols.podadd import decode_reply, encode_request

BACKENDS = {name: VARIANTS[name] for name in ("nftables", "nft")}
UNENROLL = {"AMBIENT_UNENROLL_ON_UNINSTALL": "true"}


def with_daemonset(ambient: AmbientScene, **metadata: Any) -> None:
    """The DaemonSet and the node that the agent asks for when it ends."""
    daemonset = daemonset_object("istio-system")
    daemonset["metadata"] |= metadata
    worker = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE, "labels": {}}}
    ambient.api.do(lambda server: (server.add("daemonsets", daemonset), server.add("nodes", worker)))


def enrolled(ambient: AmbientScene, agent: Agent, name: str = "cart") -> AmbientPod:
    pod = ambient.running_pod(name)
    wait_state(agent, pod, "enrolled")
    ambient.wait_annotation(pod, "enabled")
    return pod


def host_of(ambient: AmbientScene) -> str:
    """Everything of ambient mode in the node's netns, of every backend."""
    netns = ambient.open_netns(ambient.scene.netns)
    parts = [ambient.host_rules(), netns.shell("ipset", "save")]
    parts += [netns.shell(f"{tool}-nft-save", "-t", "nat") for tool in ("iptables", "ip6tables")]
    return "".join(line for line in "".join(parts).splitlines(keepends=True) if not line.startswith("#"))


def is_clean(ambient: AmbientScene) -> bool:
    text = host_of(ambient)
    return not any(part in text for part in ("istio-inpod-probes", "istio-ambient", "ISTIO_POSTRT"))


def left_the_mesh(ambient: AmbientScene, pod: AmbientPod) -> None:
    assert not is_captured(pod)
    for part in ("istio", "ISTIO", "lookup 100", "table 100"):
        assert part not in everything_in(pod)
    assert ambient.annotation(pod) is None


def has_conf(ambient: AmbientScene) -> bool:
    return istio.PLUGIN_NAME in ambient.scene.conf.read_text()


# --- a restart, an upgrade --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_stays_while_the_daemonset_is_there(
    ambient: AmbientScene, backend: str, number: signal.Signals
) -> None:
    with_daemonset(ambient)
    ztunnel = ambient.ztunnel()
    agent = ambient.serving(ztunnel, **BACKENDS[backend], **UNENROLL)
    pod = enrolled(ambient, agent)
    in_pod, on_host = everything_in(pod), host_of(ambient)
    assert agent.stop(number) == 0
    assert everything_in(pod) == in_pod
    assert host_of(ambient) == on_host
    assert ambient.annotation(pod) == "enabled"
    assert has_conf(ambient)
    assert ztunnel.records("del") == []
    assert not ambient.scene.ztunnel_socket.exists()


def test_killed_agent_leaves_everything_too(ambient: AmbientScene) -> None:
    agent = ambient.serving(ambient.ztunnel())
    pod = enrolled(ambient, agent)
    in_pod, on_host = everything_in(pod), host_of(ambient)
    agent.kill()
    assert (everything_in(pod), host_of(ambient), ambient.annotation(pod)) == (in_pod, on_host, "enabled")


def test_cluster_that_does_not_answer_keeps_everything(ambient: AmbientScene) -> None:
    agent = ambient.serving(ambient.ztunnel(), **UNENROLL)
    pod = enrolled(ambient, agent)
    on_host = host_of(ambient)
    ambient.api.crash()
    assert agent.stop() == 0
    assert is_captured(pod)
    assert host_of(ambient) == on_host
    assert has_conf(ambient)


def test_pods_under_way_are_answered_before_the_end(ambient: AmbientScene, ztunnel: Program) -> None:
    with_daemonset(ambient)
    agent = ambient.ready()
    ztunnel.wait("its snapshot", lambda state: bool(state["snapshot"]))
    ztunnel.order(do="set", faults=["delay:add=1"])
    pod, other = ambient.new_pod(), ambient.new_pod("other")
    with ThreadPoolExecutor(2) as threads:
        replies = threads.submit(add, agent, pod), threads.submit(push, ambient.scene, other)
        wait_until("their rules", lambda: is_captured(pod) and is_captured(other))
        agent.process.send_signal(signal.SIGTERM)
        assert replies[0].result().ok
        assert replies[1].result().status == 200
    assert agent.process.wait(30) == 0
    assert is_captured(pod)
    assert is_captured(other)


def test_pod_that_waits_for_ztunnel_does_not_keep_the_agent(ambient: AmbientScene) -> None:
    with_daemonset(ambient)
    agent = ambient.ready(AMBIENT_ZTUNNEL_WAIT_SECONDS="300")
    pod = ambient.new_pod()
    request = encode_request(request_for(pod.obj, pod.path, ips=(f"{pod.address}/24",)))
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(agent.exchange, request, (pod.netns.fd,))
        wait_until("its rules", lambda: is_captured(pod))
        agent.process.send_signal(signal.SIGTERM)
        assert agent.process.wait(30) == 0
        data = answer.result()
    assert data is None or not decode_reply(data).ok
    assert ambient.annotation(pod) in (None, "pending")


# --- the DaemonSet is gone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_uninstall_takes_the_hosts_part_and_leaves_the_pods(ambient: AmbientScene, backend: str) -> None:
    """As the original: whoever uninstalls un-labels first, or sets AMBIENT_UNENROLL_ON_UNINSTALL."""
    ztunnel = ambient.ztunnel()
    agent = ambient.serving(ztunnel, **BACKENDS[backend])
    pod = enrolled(ambient, agent)
    in_pod = everything_in(pod)
    assert agent.stop() == 0, agent.log
    assert is_clean(ambient)
    assert not has_conf(ambient)
    assert everything_in(pod) == in_pod
    assert ambient.annotation(pod) == "enabled"
    assert ztunnel.records("del") == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_uninstall_can_take_the_pods_out(ambient: AmbientScene, backend: str) -> None:
    ztunnel = ambient.ztunnel()
    agent = ambient.serving(ztunnel, **BACKENDS[backend], **UNENROLL)
    pods = [enrolled(ambient, agent, f"cart-{number}") for number in range(3)]
    assert agent.stop() == 0, agent.log
    for pod in pods:
        left_the_mesh(ambient, pod)
    assert {one["uid"] for one in ztunnel.records("del")} == {pod.uid for pod in pods}
    assert is_clean(ambient)
    assert not has_conf(ambient)


def test_switch_of_ambient_mode_cleans_up_always(ambient: AmbientScene) -> None:
    with_daemonset(ambient)
    agent = ambient.ready(AMBIENT_DISABLE_SAFE_UPGRADE="true")
    assert agent.stop() == 0
    assert is_clean(ambient)
    assert not has_conf(ambient)


def test_pod_that_cannot_leave_keeps_no_conf_on_the_node(ambient: AmbientScene, ztunnel: Program) -> None:
    """Or no pod of the node would start any more, which is worse."""
    agent = ambient.ready(**UNENROLL, SHUTDOWN_GRACE_SECONDS="6")
    pod = enrolled(ambient, agent)
    ambient.api.do(lambda server: server.fault("status", method="PATCH", status=500, count=-1))
    agent.stop()
    assert not has_conf(ambient)
    assert is_clean(ambient)
    assert "shop/cart" in [line for line in agent.log.splitlines() if "\terror\t" in line][-1]
    assert not is_captured(pod), "its rules are out all the same"


def test_cluster_that_was_never_read_keeps_no_conf_on_the_node(ambient: AmbientScene) -> None:
    for watch in (False, True):
        ambient.api.do(
            lambda server, watch=watch: server.fault("status", prefix="/api/v1/pods", watch=watch, status=403, count=-1)
        )
    agent = ambient.start(**UNENROLL)
    wait_until("the conf entry", lambda: has_conf(ambient))
    wait_until("the host's rules", lambda: not is_clean(ambient))
    agent.stop()
    assert not has_conf(ambient), agent.log
    assert is_clean(ambient)


# --- install-cni uninstall, by the agent ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_uninstall_by_the_agent_takes_everything(ambient: AmbientScene, ztunnel: Program, backend: str) -> None:
    agent = ambient.ready(**BACKENDS[backend])
    pods = [enrolled(ambient, agent, f"cart-{number}") for number in range(3)]
    done = ambient.scene.run("uninstall", ambient=True)
    assert done.returncode == 0, done.stderr
    for pod in pods:
        left_the_mesh(ambient, pod)
        assert f"un-enrolled pod {pod.namespace}/{pod.name}" in done.stdout
    assert "removed the host's probe rules and sets" in done.stdout
    assert ztunnel.state()["workloads"] == {}
    assert is_clean(ambient)
    assert not has_conf(ambient)
    assert "uninstalled" in agent.get(istio.READY_PATH)[1]
    reply = add(agent, ambient.new_pod("late"))
    assert (reply.ok, reply.code) == (False, 11)
    assert "removed" in reply.message
    ambient.label(pods[0], other="label")  # nothing brings it back
    wait_until("the agent to hear of it", lambda: agent.metrics()['nodeagent_reconcile_events_total{type="update"}'])
    assert agent.status()["ambient"]["pods"] == []
    assert agent.stop() == 0
    assert is_clean(ambient)


def test_uninstall_twice_is_as_once(ambient: AmbientScene, ztunnel: Program) -> None:
    agent = ambient.ready()
    enrolled(ambient, agent)
    for _ in range(2):
        done = ambient.scene.run("uninstall", ambient=True)
        assert done.returncode == 0, done.stderr
    assert is_clean(ambient)


def test_uninstall_before_the_cluster_was_read_says_so_and_changes_nothing(ambient: AmbientScene) -> None:
    ambient.api.crash()
    agent = ambient.start(**ZTUNNEL_WAIT)
    wait_until("the conf entry", lambda: has_conf(ambient))
    done = ambient.scene.run("uninstall", ambient=True)
    assert done.returncode == 1
    assert "not looked at yet" in done.stderr
    assert has_conf(ambient)
    ambient.api.restart()
    agent.wait_ready()
    assert add(agent, ambient.new_pod()).code == 11  # no ztunnel here; but it is taken up
    assert "removed" not in agent.log


def test_host_without_a_kubelet_is_not_set_up_after_an_uninstall(ambient: AmbientScene) -> None:
    agent = ambient.start(KUBELET_UID="")
    wait_until("the reason", lambda: "kubelet" in agent.get(istio.READY_PATH)[1])
    assert ambient.scene.run("uninstall", ambient=True).returncode == 0
    ambient.procfs.start("/system.slice/kubelet.service", comm="kubelet", arguments="kubelet --config x")
    wait_until("three tries", lambda: agent.status()["uptimeSeconds"] > 5)
    assert is_clean(ambient)


# --- install-cni uninstall, without an agent --------------------------------------------------------------------------


def abandoned(ambient: AmbientScene, **environment: str) -> list[AmbientPod]:
    """Pods of an agent that was killed and does not come back."""
    agent = ambient.ready(**environment)
    pods = [enrolled(ambient, agent, f"cart-{number}") for number in range(2)]
    agent.kill()
    return pods


def uninstall(ambient: AmbientScene, **environment: str) -> Any:
    return ambient.scene.run("uninstall", ambient=True, **{"HOST_PROC_DIR": ambient.procfs.root} | environment)


@pytest.mark.parametrize("backend", BACKENDS)
def test_uninstall_without_an_agent_takes_everything(ambient: AmbientScene, ztunnel: Program, backend: str) -> None:
    pods = abandoned(ambient, **BACKENDS[backend])
    done = uninstall(ambient, **BACKENDS[backend])
    assert done.returncode == 0, done.stderr
    for pod in pods:
        left_the_mesh(ambient, pod)
        assert f"un-enrolled pod {pod.namespace}/{pod.name}" in done.stdout
    assert is_clean(ambient)
    assert not has_conf(ambient)
    assert "Traceback" not in done.stderr


def test_uninstall_finds_pods_that_are_not_annotated_yet(ambient: AmbientScene, ztunnel: Program) -> None:
    """The agent died between rules and annotation: the host's set has the pod."""
    agent = ambient.ready()
    ambient.api.do(lambda server: server.fault("hang", method="PATCH", count=-1))
    pod = ambient.new_pod()
    assert add(agent, pod).ok
    agent.kill()
    ambient.api.do(lambda server: server.clear_faults())
    ambient.report_address(pod)
    ambient.run_process(pod)
    done = uninstall(ambient)
    assert done.returncode == 0, done.stderr
    left_the_mesh(ambient, pod)
    assert is_clean(ambient)


def test_uninstall_without_an_agent_and_without_pods(ambient: AmbientScene) -> None:
    done = uninstall(ambient)
    assert done.returncode == 0, done.stderr
    assert is_clean(ambient)


def test_pod_that_is_not_found_is_unannotated(ambient: AmbientScene, ztunnel: Program) -> None:
    """It has no process, so nothing of it is captured."""
    pods = abandoned(ambient)
    for number in (2, 3):
        ambient.procfs.end(number)
    done = uninstall(ambient)
    assert done.returncode == 0, done.stderr
    assert [ambient.annotation(pod) for pod in pods] == [None, None]


def test_pods_that_stay_are_named_when_nobody_can_be_asked(ambient: AmbientScene, ztunnel: Program) -> None:
    pods = abandoned(ambient)
    before = [everything_in(pod) for pod in pods]
    ambient.api.crash()
    done = uninstall(ambient)
    assert done.returncode == 1
    for pod in pods:
        assert pod.address in done.stderr
        assert pod.uid in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert [everything_in(pod) for pod in pods] == before, "without its annotation gone, a pod has to stay captured"
    assert is_clean(ambient)
    assert not has_conf(ambient)


def test_nobody_to_ask_and_nobody_to_ask_for(ambient: AmbientScene) -> None:
    agent = ambient.ready()
    agent.kill()
    ambient.api.crash()
    done = uninstall(ambient)
    assert done.returncode == 0, done.stderr
    assert "no pod is in the host's sets" in done.stdout
    assert is_clean(ambient)


def test_pod_whose_annotation_stays_is_named(ambient: AmbientScene, ztunnel: Program) -> None:
    pods = abandoned(ambient)
    refused = f"{pods[0].api_path}/status"
    ambient.api.do(lambda server: server.fault("status", prefix=refused, method="PATCH", status=403, count=-1))
    done = uninstall(ambient)
    assert done.returncode == 1
    assert f"{pods[0].namespace}/{pods[0].name}" in done.stderr
    assert f"un-enrolled pod {pods[1].namespace}/{pods[1].name}" in done.stdout
    left_the_mesh(ambient, pods[1])
    assert is_clean(ambient)


def test_sidecar_mode_leaves_what_is_not_its_own(ambient: AmbientScene, ztunnel: Program) -> None:
    """Without AMBIENT_ENABLED nothing of ambient mode is looked at."""
    pods = abandoned(ambient)
    done = ambient.scene.run("uninstall")
    assert done.returncode == 0, done.stderr
    assert is_captured(pods[0])
    assert not is_clean(ambient)
