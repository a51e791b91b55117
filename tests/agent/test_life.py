"""Start, readiness, signals, sub-commands: the agent as a process."""

from __future__ import annotations

import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from lab.namespaces import call_in_netns
from lab.objects import sidecar_pod
from tests.agent.scene import Scene, wait_until

from meshcni import __version__, istio
from meshcni.agent.web import MAX_CONNECTIONS


def test_ready_with_everything_in_place(scene: Scene) -> None:
    began = time.monotonic()
    agent = scene.start()
    agent.wait_ready()
    took = time.monotonic() - began
    assert (scene.directory / "bin" / istio.PLUGIN_NAME).exists()
    assert istio.PLUGIN_NAME in scene.conf.read_text()
    metrics = agent.metrics()
    assert metrics["istio_cni_install_ready"] == 1
    assert metrics['istio_cni_installs_total{result="SUCCESS"}'] >= 1
    assert metrics['istio_cni_watch_synced{resource="pods"}'] == 1
    done = scene.run("status", "-o", "json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["install"]["conf_path"] == str(scene.conf)
    print(f"start to Ready {took * 1000:.0f} ms, RSS {agent.rss_mib():.1f} MiB, {agent.threads()} threads")


def test_installs_without_an_api_server_and_says_what_is_missing(scene: Scene) -> None:
    scene.api.crash()
    agent = scene.start()
    wait_until("the conf entry", lambda: istio.PLUGIN_NAME in scene.conf.read_text())
    wait_until("install ready", lambda: agent.metrics().get("istio_cni_install_ready") == 1)
    status, body = agent.get(istio.READY_PATH)
    document = json.loads(body)
    assert (status, document["status"]) == (503, "Service Unavailable")
    assert any("pods" in reason for reason in document["reasons"])
    assert agent.get(istio.LIVE_PATH) == (200, "")
    scene.api.restart()
    agent.wait_ready()


def test_without_repair_and_ambient_it_is_ready_before_the_api_server_answers(scene: Scene) -> None:
    scene.api.crash()
    agent = scene.start(REPAIR_ENABLED="false")
    agent.wait_ready()
    assert agent.metrics()['istio_cni_watch_synced{resource="pods"}'] == 0


def test_rotated_token_does_not_shake_readiness(scene: Scene) -> None:
    agent = scene.start()
    agent.wait_ready()
    token, new = scene.directory / "account" / "token", scene.directory / "account" / "new"
    answers = set()
    for number in range(30):
        new.write_text(f"token-{number}")
        new.rename(token)
        answers |= {agent.get(istio.READY_PATH)[0] for _ in range(5)}
    assert answers == {200}
    kubeconfig = scene.run_dir / istio.KUBECONFIG_NAME
    wait_until("the last token in the kubeconfig", lambda: "token-29" in kubeconfig.read_text())
    assert "token-" not in agent.log


def test_lost_conf_entry_is_a_reason_until_it_is_back(scene: Scene) -> None:
    agent = scene.start()
    agent.wait_ready()
    scene.conf.write_text("{ broken")
    wait_until("not ready", lambda: agent.get(istio.READY_PATH)[0] == 503)
    assert scene.conf.name in agent.get(istio.READY_PATH)[1]
    assert scene.conf.read_text() == "{ broken"
    assert agent.metrics()['istio_cni_install_troubles{kind="blocking"}'] >= 1
    scene.conf.write_text('{"cniVersion": "1.0.0", "name": "lab", "plugins": [{"type": "ptp"}]}')
    agent.wait_ready()
    assert istio.PLUGIN_NAME in scene.conf.read_text()


def test_stopped_event_loop_is_not_alive(scene: Scene) -> None:
    agent = scene.start(LIVENESS_STALE_SECONDS="1")
    wait_until("health", lambda: agent.get(istio.LIVE_PATH)[0] == 200)
    agent.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(TimeoutError):
            call_in_netns(scene.netns, lambda: stuck_answer())
    finally:
        agent.process.send_signal(signal.SIGCONT)
    wait_until("health", lambda: agent.get(istio.LIVE_PATH)[0] == 200)


@pytest.mark.parametrize("said", [b"", b"GET /healthz HTTP/1.1\r\n"], ids=["silent", "half a request"])
def test_connections_that_say_nothing_keep_no_probe_out(scene: Scene, said: bytes) -> None:
    agent = scene.start(KUBERNETES_SERVICE_HOST="")
    wait_until("health", lambda: agent.get(istio.LIVE_PATH)[0] == 200)

    def connect() -> list[socket.socket]:
        return [socket.create_connection(("127.0.0.1", istio.HEALTH_PORT)) for _ in range(MAX_CONNECTIONS + 10)]

    idle = call_in_netns(scene.netns, connect)
    try:
        for connection in idle[-MAX_CONNECTIONS:]:
            connection.sendall(said)
        assert [agent.get(istio.LIVE_PATH)[0] for _ in range(3)] == [200] * 3
    finally:
        for connection in idle:
            connection.close()
    assert agent.metrics()['istio_cni_requests_refused_total{cause="busy",socket="health"}'] >= 10


def stuck_answer() -> bytes:
    with socket.create_connection(("127.0.0.1", istio.HEALTH_PORT), timeout=1) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        return connection.recv(100)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it_gracefully(scene: Scene, number: signal.Signals) -> None:
    agent = scene.start(KUBERNETES_SERVICE_HOST="")
    wait_until("the conf entry", lambda: istio.PLUGIN_NAME in scene.conf.read_text())
    assert agent.stop(number) == 0
    assert f"Exit signal received: {number.name}" in agent.log
    assert istio.PLUGIN_NAME in scene.conf.read_text(), "an unknown cause must leave the conf entry in place"


def test_second_signal_ends_it_at_once(scene: Scene) -> None:
    agent = scene.start()
    agent.wait_watching()
    scene.api.do(lambda server: server.fault("hang", count=-1, prefix="/apis/apps/v1"))
    agent.process.send_signal(signal.SIGTERM)
    wait_until("the first signal", lambda: "Exit signal received" in agent.log)
    assert agent.stop() == 128 + signal.SIGTERM


def test_always_cleaning_up(scene: Scene) -> None:
    agent = scene.start(DISABLE_SAFE_UPGRADE="true")
    wait_until("the conf entry", lambda: istio.PLUGIN_NAME in scene.conf.read_text())
    assert agent.stop() == 0
    assert istio.PLUGIN_NAME not in scene.conf.read_text(), agent.log


def test_add_under_way_is_finished(scene: Scene) -> None:
    agent = scene.start(API_TIMEOUT_SECONDS="3")
    agent.wait_watching()
    scene.api.do(lambda server: server.fault("hang", count=-1, prefix="/api/v1/namespaces/shop/pods/cart"))
    netns = scene.pod_netns("10.1.0.5/24")
    with ThreadPoolExecutor(1) as threads:
        reply = threads.submit(agent.add, sidecar_pod("shop", "cart"), netns)
        wait_until("the ADD to begin", lambda: agent.metrics()["istio_cni_adds_in_progress"] == 1)
        agent.process.send_signal(signal.SIGTERM)
        assert reply.result().code == 11
    assert agent.process.wait(30) == 0


# --- start-up errors --------------------------------------------------------------------------------------------------


def test_unreadable_setting_ends_the_start(scene: Scene) -> None:
    done = scene.run(AMBIENT_ENABLED="yes")
    assert done.returncode == 1
    for part in ("ambient_enabled", "'yes'", "environment variable AMBIENT_ENABLED", "true or false"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("--nonsense",), ("serve",)])
def test_unknown_command_line(scene: Scene, arguments: tuple[str, ...]) -> None:
    done = scene.run(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_taken_health_port_ends_the_start(scene: Scene) -> None:
    taken = call_in_netns(scene.netns, lambda: socket.create_server(("127.0.0.1", istio.HEALTH_PORT)))
    with taken:
        done = scene.run(HEALTH_ADDRESS="127.0.0.1")
    assert done.returncode == 1
    assert "HEALTH_PORT" in done.stderr
    assert "Traceback" not in done.stderr


def test_taken_metrics_port_is_said_and_survived(scene: Scene) -> None:
    taken = call_in_netns(scene.netns, lambda: socket.create_server(("127.0.0.1", istio.METRICS_PORT)))
    with taken:
        agent = scene.start(MONITORING_ADDRESS="127.0.0.1")
        wait_until("health", lambda: agent.get(istio.LIVE_PATH)[0] == 200)
        assert "no metrics" in agent.log


def test_metrics_can_be_turned_off(scene: Scene) -> None:
    agent = scene.start("--monitoring-port=0")
    wait_until("health", lambda: agent.get(istio.LIVE_PATH)[0] == 200)
    assert agent.get("/metrics", istio.METRICS_PORT)[0] == 0


def test_ports_can_be_chosen(scene: Scene) -> None:
    agent = scene.start("--monitoring-port=19014", HEALTH_PORT="18000")
    wait_until("health", lambda: agent.get(istio.LIVE_PATH, 18000)[0] == 200)
    assert agent.get("/metrics", 19014)[0] == 200
    assert agent.get("/nothing", 18000)[0] == 404


# --- logging ----------------------------------------------------------------------------------------------------------


def test_json_logs(scene: Scene) -> None:
    agent = scene.start(
        "--log_as_json", "--log_output_level=cni-plugin:debug", "--log_caller=cni-agent", KUBERNETES_SERVICE_HOST=""
    )
    wait_until("the conf entry", lambda: istio.PLUGIN_NAME in scene.conf.read_text())
    agent.stop()
    lines = [json.loads(line) for line in agent.log.splitlines()]
    assert {"level", "time", "scope", "msg", "caller"} <= set(lines[0])
    assert '"plugin_log_level": "debug"' in scene.conf.read_text()


def test_log_target_and_stack_traces(scene: Scene) -> None:
    target = scene.directory / "own.log"
    agent = scene.start(f"--log_target={target}", "--log_stacktrace_level=cni-agent:info")
    wait_until("health", lambda: agent.get(istio.LIVE_PATH)[0] == 200)
    agent.stop()
    assert agent.log == ""
    assert 'File "' in target.read_text()


# --- sub-commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("version",), f"install-cni {__version__}"),
        (("version", "-s"), __version__),
        (("version", "--output=yaml"), f'version: "{__version__}"'),
        (("version", "-o", "json"), f'"version": "{__version__}"'),
        (("help",), "--cni-conf-name"),
        (("--help",), "Commands:"),
    ],
)
def test_words_of_the_program(scene: Scene, arguments: tuple[str, ...], part: str) -> None:
    done = scene.run(*arguments)
    assert done.returncode == 0
    assert part in done.stdout


@pytest.mark.parametrize("command", ["completion", "collateral"])
def test_what_is_not_provided_says_so(scene: Scene, command: str) -> None:
    done = scene.run(command)
    assert done.returncode == 1
    assert "not provided" in done.stderr


def test_settings_with_value_and_origin(scene: Scene) -> None:
    done = scene.run("settings", "-o", "json", "--ambient-enabled", KUBECONFIG_MODE="0640")
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert (rows["kubeconfig_mode"]["value"], rows["kubeconfig_mode"]["origin"]) == (
        "0640",
        "environment variable KUBECONFIG_MODE",
    )
    assert rows["ambient_enabled"]["origin"] == "flag --ambient-enabled"
    assert rows["cni_conf_name"]["origin"] == "default"
    assert "kubeconfig_mode" in scene.run("settings").stdout


def test_status_without_an_agent(scene: Scene) -> None:
    done = scene.run("status")
    assert done.returncode == 1
    assert "no agent answers" in done.stderr


def test_uninstall_by_the_running_agent(scene: Scene) -> None:
    agent = scene.start()
    agent.wait_ready()
    done = scene.run("uninstall")
    assert done.returncode == 0, done.stderr
    assert istio.PLUGIN_NAME not in scene.conf.read_text()
    assert "uninstalled" in agent.get(istio.READY_PATH)[1]
    assert agent.stop() == 0
    assert istio.PLUGIN_NAME not in scene.conf.read_text()


def test_uninstall_without_an_agent(scene: Scene) -> None:
    agent = scene.start()
    wait_until("the conf entry", lambda: istio.PLUGIN_NAME in scene.conf.read_text())
    agent.process.kill()
    agent.process.wait()
    done = scene.run("uninstall", "--purge")
    assert done.returncode == 0, done.stderr
    assert istio.PLUGIN_NAME not in scene.conf.read_text()
    assert not (scene.directory / "bin" / istio.PLUGIN_NAME).exists()
