"""Health, metrics, log lines and the two sockets of the original's plugin, seen from outside."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lab.namespaces import call_in_netns
from tests.agent.contract import BRIDGE, Node
from tests.agent.scene import Agent, wait_until
from tests.agent.test_sockets import send

from meshcni import istio

QUIET = {"REPAIR_ENABLED": "false"}
LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z\t(debug|info|warn|error|fatal)\t(\S+\t)?[^\t]+(\t[^\t]*)?", re.ASCII
)


def ask(
    node: Node, path: str, port: int = 8000, method: str = "GET", address: str = "127.0.0.1"
) -> tuple[int, str, bytes]:
    """Status, content type and body."""

    def call() -> tuple[int, str, bytes]:
        connection = http.client.HTTPConnection(address, port, timeout=10)
        connection.request(method, path)
        answer = connection.getresponse()
        found = answer.status, answer.getheader("content-type", ""), answer.read()
        connection.close()
        return found

    return call_in_netns(node.scene.netns, call)


# --- health -----------------------------------------------------------------------------------------------------------


def test_health_while_not_ready_and_ready(node: Node) -> None:
    agent = node.start(**QUIET)
    wait_until("health", lambda: agent.get("/healthz")[0] == 200)
    for method in ("GET", "POST", "PUT"):
        assert ask(node, "/healthz", method=method)[::2] == (200, b"")
        status, _, body = ask(node, "/readyz", method=method)
        assert status == 503
        assert b"Service Unavailable" in body
    node.write("10-a.conflist", BRIDGE)
    agent.wait_ready()
    for path in ("/healthz", "/readyz"):
        assert ask(node, path)[::2] == (200, b"")
    node.write("10-a.conflist", "{")
    wait_until("not ready", lambda: agent.get("/readyz")[0] == 503)
    assert ask(node, "/healthz")[::2] == (200, b"")


@pytest.mark.parametrize("settings", [{"REPAIR_ENABLED": "true"}, {"AMBIENT_ENABLED": "true"}])
def test_ready_only_once_the_cluster_is_read(node: Node, settings: dict[str, str]) -> None:
    node.write("10-a.conflist", BRIDGE)
    node.scene.api.crash()
    agent = node.start(**(QUIET | settings))
    wait_until("the installation", lambda: agent.metrics().get("istio_cni_install_ready") == 1)
    assert agent.get("/readyz")[0] == 503
    node.scene.api.restart()
    agent.wait_ready()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_every_address_answers(node: Node, address: str) -> None:
    node.write("10-a.conflist", BRIDGE)
    node.ready(**QUIET)
    assert ask(node, "/readyz", address=address)[0] == 200
    assert ask(node, "/metrics", 15014, address=address)[0] == 200


def test_a_name_that_is_no_utf8_breaks_neither_health_nor_log(node: Node) -> None:
    (node.conf / os.fsdecode(b"05-\xff.conflist")).write_text("{")
    agent = node.start(**QUIET)
    wait_until("its reason in the log", lambda: "05-\\udcff.conflist is not valid JSON" in agent.log)
    status, body = agent.get("/readyz")
    assert status == 503
    assert any("05-\udcff.conflist" in reason for reason in json.loads(body)["reasons"])


# --- metrics ----------------------------------------------------------------------------------------------------------

TYPES = {
    "istio_cni_installs_total": "counter",
    "istio_cni_install_ready": "gauge",
    "istio_cni_repair_pods_repaired_total": "counter",
    "istio_cni_plugin_requests_total": "counter",
    "nodeagent_reconcile_events_total": "counter",
    "ztunnel_connected": "gauge",
}
SAMPLE = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*(\{[a-z_]+=\"[^\"]*\"(,[a-z_]+=\"[^\"]*\")*\})? (\S+)")


def test_exposition(node: Node) -> None:
    node.write("10-a.conflist", BRIDGE)
    agent = node.ready(**QUIET)
    send(node.run / "pluginevent.sock", "/cmdadd", b"{")
    send(node.run / "pluginevent.sock", "/cmdadd", b"{}")
    status, content_type, body = ask(node, "/metrics", 15014)
    assert status == 200
    assert content_type.startswith("text/plain; version=0.0.4")
    lines = body.decode().splitlines()
    declared = dict(line.split()[2:4] for line in lines if line.startswith("# TYPE "))
    assert {name: declared.get(name) for name in TYPES} == TYPES
    assert all(SAMPLE.fullmatch(line) for line in lines if not line.startswith("#"))
    for line in (
        'istio_cni_installs_total{result="SUCCESS"} 1.0',
        "istio_cni_install_ready 1.0",
        'istio_cni_plugin_requests_total{response_code="400"} 1.0',
        'istio_cni_plugin_requests_total{response_code="500"} 1.0',
    ):
        assert line in lines
    assert "_created" not in body.decode()
    assert "target_info" not in body.decode()
    assert "process_resident_memory_bytes" in declared
    node.write("10-a.conflist", "{")
    wait_until("not ready", lambda: agent.metrics()["istio_cni_install_ready"] == 0)
    node.write("10-a.conflist", BRIDGE)
    agent.wait_ready()
    assert agent.metrics()['istio_cni_installs_total{result="SUCCESS"}'] == 2


# --- log lines --------------------------------------------------------------------------------------------------------


def own_lines(node: Node, *arguments: str) -> list[str]:
    """What an agent prints from start to end."""
    node.write("10-a.conflist", BRIDGE)
    agent = node.ready(*arguments, NATIVE_NFTABLES="true", EXCLUDE_NAMESPACES="evil\nname")
    agent.stop()
    return agent.log.splitlines()


def test_console_lines(node: Node) -> None:
    lines = own_lines(node, "--log_output_level=all:debug")
    assert len(lines) > 5
    assert [line for line in lines if not LINE.fullmatch(line)] == []
    assert any("\tinfo\tcni-agent\tExit signal received: SIGTERM" in line for line in lines)


def test_json_lines(node: Node) -> None:
    lines = own_lines(node, "--log_as_json", "--log_output_level=all:debug", "--log_caller=cni-agent")
    for line in lines:
        document = json.loads(line)
        known = [key for key in document if key in ("level", "time", "scope", "caller", "msg")]
        assert known == ["level", "time", "scope", "caller", "msg"] or document["scope"] != "cni-agent"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", document["time"])
        assert line == json.dumps(document, separators=(",", ":"))


def test_log_targets(node: Node) -> None:
    node.write("10-a.conflist", BRIDGE)
    one, two = node.scene.directory / "one.log", node.scene.directory / "two.log"
    agent = node.ready("--log_target", str(one), f"--log_target={two}", **QUIET)
    assert agent.log == ""
    assert one.read_text() == two.read_text() != ""


# --- /log -------------------------------------------------------------------------------------------------------------

TIME = "2024-05-06T07:08:09.123456Z"


def encoded(**fields: object) -> str:
    """A line as the original's plugin sends it, with its line end."""
    return json.dumps({"level": "info", "time": TIME, "msg": "hello"} | fields, separators=(",", ":")) + "\n"


def logged(node: Node, agent: Agent, *lines: str) -> list[str]:
    """Send lines in one request; what the agent printed of scope cni-plugin."""
    before = len(agent.log)
    assert send(node.run / "log.sock", "/log", json.dumps(list(lines)).encode()) == (200, "")
    return [line for line in agent.log[before:].splitlines() if "cni-plugin" in line]


CONSOLE = [
    (encoded(), f"{TIME}\tinfo\tcni-plugin\thello"),
    (encoded(level="debug"), None),
    (encoded(level="warn", msg="  trimmed \n"), f"{TIME}\twarn\tcni-plugin\ttrimmed"),
    (encoded(level="error", pod="shop/cart", netns="/x"), f"{TIME}\terror\tcni-plugin\thello\tpod=shop/cart netns=/x"),
    (encoded(level="fatal"), None),
    (encoded(level="INFO"), None),
    (encoded(level=3), None),
    (encoded(msg=None), None),
    (encoded(msg=["x"]), None),
    (encoded(time="yesterday"), None),
    (encoded(time=1714979289), None),
    ('{"level":"info","msg":"no time"}\n', None),
    ('{"time":"2024-05-06T07:08:09Z","msg":"no level"}\n', None),
    (encoded(msg="a\ud800b"), f"{TIME}\tinfo\tcni-plugin\ta\\ud800b"),
    ("no json", None),
    ("[]", None),
    (encoded(time="2024-05-06T09:08:09+02:00"), "2024-05-06T07:08:09.000000Z\tinfo\tcni-plugin\thello"),
    (encoded(time="2024-05-06T07:08:09.123456789Z"), f"{TIME}\tinfo\tcni-plugin\thello"),
    (encoded(n=3, ok=True, no=None, l=[1]), f"{TIME}\tinfo\tcni-plugin\thello\tn=3 ok=true no=null l=[1]"),
    ('{"level":"info","time":"' + TIME + '","msg":"x","n":NaN}', None),
]


def test_plugin_lines_on_the_console(node: Node) -> None:
    agent = node.start(**QUIET)
    wait_until("health", lambda: agent.get(istio.LIVE_PATH)[0] == 200)
    expected = [line for _, line in CONSOLE if line]
    assert logged(node, agent, *(line for line, _ in CONSOLE)) == expected


def test_plugin_lines_as_json_keep_the_type_of_each_label(node: Node) -> None:
    agent = node.start("--log_as_json", **QUIET)
    wait_until("health", lambda: agent.get(istio.LIVE_PATH)[0] == 200)
    labels = {
        "pod": "shop/cart",
        "count": 3,
        "big": 9007199254740993,
        "ok": True,
        "none": None,
        "list": [1, {"a": "b"}],
    }
    assert logged(node, agent, encoded(level="warn", msg=" hello ", **labels)) == [
        f'{{"level":"warn","time":"{TIME}","scope":"cni-plugin","msg":"hello","pod":"shop/cart","count":3,'
        '"big":9007199254740993,"ok":true,"none":null,"list":[1,{"a":"b"}]}'
    ]


@pytest.mark.parametrize(
    ("level", "printed"),
    [
        ("cni-agent:debug", ["debug", "info", "warn", "error"]),
        ("cni-agent:error", ["error"]),
        ("cni-plugin:error", ["info", "warn", "error"]),  # the server takes the agent's level
        ("all:warn", ["warn", "error"]),
    ],
)
def test_level_of_forwarded_lines(node: Node, level: str, printed: list[str]) -> None:
    agent = node.start(f"--log_output_level={level}", **QUIET)
    wait_until("health", lambda: agent.get(istio.LIVE_PATH)[0] == 200)
    lines = logged(node, agent, *(encoded(level=name) for name in ("debug", "info", "warn", "error")))
    assert [line.split("\t")[1] for line in lines] == printed


def test_dropped_lines_and_bodies_are_told(node: Node) -> None:
    agent = node.start("--log_output_level=cni-agent:debug", **QUIET)
    wait_until("health", lambda: agent.get(istio.LIVE_PATH)[0] == 200)
    logged(node, agent, encoded(level="fatal"), encoded())
    assert "\tdebug\tcni-agent\tdropped a log line" in agent.log
    for method, body in (("POST", b"{}"), ("PUT", b"[1]"), ("GET", b""), ("POST", b"[null]")):
        assert send(node.run / "log.sock", "/log", body, method) == (200, "")
    assert agent.log.count("\terror\tcni-agent\tdropped a log request") == 4


def test_batches_are_not_mixed(node: Node) -> None:
    agent = node.start(**QUIET)
    wait_until("health", lambda: agent.get(istio.LIVE_PATH)[0] == 200)

    def batch(number: int) -> None:
        body = json.dumps([encoded(msg=f"{number} {index}") for index in range(20)]).encode()
        assert send(node.run / "log.sock", "/log", body) == (200, "")

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(batch, range(24)))
    numbers = [line.split("\t")[3] for line in agent.log.splitlines() if "\tcni-plugin\t" in line]
    batches = [numbers[at : at + 20] for at in range(0, len(numbers), 20)]
    assert sorted(batches, key=lambda lines: int(lines[0].split()[0])) == [
        [f"{number} {index}" for index in range(20)] for number in range(24)
    ]


# --- /cmdadd ----------------------------------------------------------------------------------------------------------

EVENT = (
    b'{"Netns":"/var/run/netns/cni-1","PodName":"p","PodNamespace":"n",'
    b'"IPs":[{"Interface":0,"Address":{"IP":"10.0.0.2","Mask":"////AA=="},"Gateway":"10.0.0.1"}]}'
)


@pytest.mark.parametrize("ambient", ["false", "true"])
def test_events(node: Node, ambient: str) -> None:
    agent = node.start(AMBIENT_ENABLED=ambient)
    path = node.run / "pluginevent.sock"
    wait_until("health", lambda: agent.get(istio.LIVE_PATH)[0] == 200)
    for body, expected in (
        (EVENT, 500),
        (EVENT.lower(), 500),
        (EVENT.replace(b'"Interface":0', b'"Interface":null').replace(b"10.0.0.1", b""), 500),
        (EVENT.replace(b"10.0.0.2", b"fd00::2").replace(b"////AA==", b"/////////////////////w=="), 500),
        (b'{"Netns":"","PodName":"p","PodNamespace":"n","IPs":null,"More":1}', 500),
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (EVENT.replace(b'"p"', b"1"), 400),
        (EVENT.replace(b'"10.0.0.2"', b'"x"'), 400),
    ):
        for method in ("POST", "GET"):
            status, text = send(path, "/cmdadd", body, method)
            assert (status, text.endswith("\n")) == (expected, True), (body, text)


# --- sockets ----------------------------------------------------------------------------------------------------------


def test_sockets_replace_what_was_there(node: Node) -> None:
    node.run.mkdir()
    for name in ("log.sock", "pluginevent.sock"):
        (node.run / name).write_text("left over")
    agent = node.start(**QUIET)
    wait_until("health", lambda: agent.get(istio.LIVE_PATH)[0] == 200)
    for name in ("log.sock", "pluginevent.sock"):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(node.run / name))


def test_run_directory_is_made_with_0750(node: Node) -> None:
    deep = node.scene.directory / "a" / "run"
    agent = node.start(CNI_AGENT_RUN_DIR=str(deep), **QUIET)
    wait_until("health", lambda: agent.get(istio.LIVE_PATH)[0] == 200)
    assert (Path(deep).stat().st_mode & 0o777) == 0o750
