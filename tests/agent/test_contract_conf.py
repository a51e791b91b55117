"""The conf directory, seen from outside: which file gets our entry, its bytes, and how it comes back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from tests.agent.contract import BRIDGE, BRIDGE_WITH_ENTRY, ENTRY, SINGLE, Node, healed, replaced
from tests.agent.scene import wait_until

from meshcni import istio

OWNED = "02-istio-cni.conflist"
STANDALONE = "YYY-istio-cni.conf"
NO_API = {"KUBERNETES_SERVICE_PORT": "1", "REPAIR_ENABLED": "false"}  # installing must not depend on it


@dataclass(frozen=True)
class Case:
    """Files before, settings, and the directory when ready; `late` files come while the agent waits."""

    before: Mapping[str, str]
    after: Mapping[str, str]
    settings: Mapping[str, str] = field(default_factory=dict)
    late: Mapping[str, str] = field(default_factory=dict)


CASES = {
    "no name: the first list": Case(
        {"10-a.conflist": BRIDGE, "20-b.conflist": BRIDGE},
        {"10-a.conflist": BRIDGE_WITH_ENTRY, "20-b.conflist": BRIDGE},
        {"CNI_CONF_NAME": ""},
    ),
    "no name: broken and foreign files are passed over": Case(
        {"00-broken.conflist": "{", "01-list-in.conf": BRIDGE, "02-x.txt": BRIDGE, "20-b.conflist": BRIDGE},
        {
            "00-broken.conflist": "{",
            "01-list-in.conf": BRIDGE,
            "02-x.txt": BRIDGE,
            "20-b.conflist": BRIDGE_WITH_ENTRY,
        },
    ),
    "name": Case(
        {"10-a.conflist": BRIDGE, "20-b.conflist": BRIDGE},
        {"10-a.conflist": BRIDGE, "20-b.conflist": BRIDGE_WITH_ENTRY},
        {"CNI_CONF_NAME": "20-b.conflist"},
    ),
    "name.conf, there as .conflist": Case(
        {"10-a.conflist": BRIDGE}, {"10-a.conflist": BRIDGE_WITH_ENTRY}, {"CNI_CONF_NAME": "10-a.conf"}
    ),
    "name.conf holds a list": Case(
        {"list.conf": BRIDGE}, {"list.conflist": BRIDGE_WITH_ENTRY}, {"CNI_CONF_NAME": "list.conf"}
    ),
    "name.conflist, there as .conf that holds a list": Case(
        {"list.conf": BRIDGE}, {"list.conflist": BRIDGE_WITH_ENTRY}, {"CNI_CONF_NAME": "list.conflist"}
    ),
    "undetectable.file": Case(
        {"undetectable.file": BRIDGE},
        {"undetectable.file": BRIDGE_WITH_ENTRY},
        {"CNI_CONF_NAME": "undetectable.file"},
    ),
    "late": Case({}, {"10-a.conflist": BRIDGE_WITH_ENTRY}, late={"10-a.conflist": BRIDGE}),
    "name, late": Case(
        {"10-a.conflist": BRIDGE},
        {"10-a.conflist": BRIDGE, "30-c.conflist": BRIDGE_WITH_ENTRY},
        {"CNI_CONF_NAME": "30-c.conflist"},
        {"30-c.conflist": BRIDGE},
    ),
    "name with another ending, late": Case(
        {},
        {"undetectable.file": BRIDGE_WITH_ENTRY},
        {"CNI_CONF_NAME": "undetectable.file"},
        {"undetectable.file": BRIDGE},
    ),
    "entries of an earlier installation, twice": Case(
        {"10-a.conflist": BRIDGE_WITH_ENTRY.replace(f"{ENTRY}\n", f"{ENTRY.replace('RUN', '/old')},\n{ENTRY}\n")},
        {"10-a.conflist": BRIDGE_WITH_ENTRY},
    ),
    "owned, entered into the primary before": Case(
        {"10-a.conflist": BRIDGE_WITH_ENTRY},
        {OWNED: BRIDGE_WITH_ENTRY, "10-a.conflist": BRIDGE},
        {"ISTIO_OWNED_CNI_CONFIG": "true"},
    ),
    "owned before, no longer": Case(
        {OWNED: BRIDGE_WITH_ENTRY, "10-a.conflist": BRIDGE}, {"10-a.conflist": BRIDGE_WITH_ENTRY}
    ),
    "name.conflist, late as .conf": Case(
        {},
        {"list.conflist": BRIDGE_WITH_ENTRY},
        {"CNI_CONF_NAME": "list.conflist"},
        {"list.conf": BRIDGE},
    ),
    "owned without ambient": Case(
        {"10-a.conflist": BRIDGE},
        {OWNED: BRIDGE_WITH_ENTRY, "10-a.conflist": BRIDGE},
        {"ISTIO_OWNED_CNI_CONFIG": "true"},
    ),
    "owned with ambient": Case(
        {"10-a.conflist": BRIDGE},
        {
            OWNED: BRIDGE_WITH_ENTRY.replace('"ambient_enabled": false', '"ambient_enabled": true'),
            "10-a.conflist": BRIDGE,
        },
        {"ISTIO_OWNED_CNI_CONFIG": "true", "AMBIENT_ENABLED": "true"},
    ),
    "owned, the agent's variable": Case(
        {"10-a.conflist": BRIDGE},
        {"00-own.conflist": BRIDGE_WITH_ENTRY, "10-a.conflist": BRIDGE},
        {"ISTIO_OWNED_CNI_CONFIG": "true", "ISTIO_OWNED_CNI_CONFIG_FILENAME": "00-own.conflist"},
    ),
    "owned, the chart's variable": Case(
        {"10-a.conflist": BRIDGE},
        {"00-own.conflist": BRIDGE_WITH_ENTRY, "10-a.conflist": BRIDGE},
        {"ISTIO_OWNED_CNI_CONFIG": "true", "ISTIO_OWNED_CNI_CONF_FILENAME": "00-own.conflist"},
    ),
    "owned, both variables empty": Case(
        {"10-a.conflist": BRIDGE},
        {OWNED: BRIDGE_WITH_ENTRY, "10-a.conflist": BRIDGE},
        {
            "ISTIO_OWNED_CNI_CONFIG": "true",
            "ISTIO_OWNED_CNI_CONFIG_FILENAME": "",
            "ISTIO_OWNED_CNI_CONF_FILENAME": "",
        },
    ),
    "owned, the primary comes late": Case(
        {},
        {OWNED: BRIDGE_WITH_ENTRY, "10-a.conflist": BRIDGE},
        {"ISTIO_OWNED_CNI_CONFIG": "true"},
        {"10-a.conflist": BRIDGE},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_which_file_and_its_bytes(node: Node, name: str) -> None:
    case = CASES[name]
    for file, text in case.before.items():
        node.write(file, text.replace("RUN", str(node.run)))
    settings = dict(case.settings)
    agent = node.start(**({} if "AMBIENT_ENABLED" in settings else NO_API), **settings)
    if case.late:
        wait_until("it to wait", lambda: agent.get(istio.READY_PATH)[0] == 503 and "waiting" in agent.log)
        for file, text in case.late.items():
            node.write(file, text)
    agent.wait_ready()
    assert {file: node.text(file) for file in node.listing()} == case.after
    assert node.leftovers() == []


# --- a single network becomes a list ----------------------------------------------------------------------------------

OWN_CONVERSION = f"""\
{{
  "cniVersion": "0.4.0",
  "name": "mynet",
  "plugins": [
    {{
      "name": "mynet",
      "type": "bridge",
      "bridge": "cni0",
      "mtu": 1500,
      "big": 9007199254740993,
      "note": "a<b>&c"
    }},
{ENTRY}
  ]
}}
"""
ORIGINAL_CONVERSION = f"""\
{{
  "cniVersion": "0.3.1",
  "name": "k8s-pod-network",
  "plugins": [
    {{
      "big": 9007199254740992,
      "bridge": "cni0",
      "mtu": 1500,
      "name": "mynet",
      "note": "a\\u003cb\\u003e\\u0026c",
      "type": "bridge"
    }},
{ENTRY}
  ]
}}
"""


@pytest.mark.parametrize("settings", [{}, {"CNI_CONF_NAME": "10-a.conf"}, {"CNI_CONF_NAME": "10-a.conflist"}])
@pytest.mark.parametrize(
    ("original", "expected"), [("false", OWN_CONVERSION), ("true", ORIGINAL_CONVERSION)], ids=["ours", "original"]
)
def test_conversion(node: Node, settings: dict[str, str], original: str, expected: str) -> None:
    node.write("10-a.conf", SINGLE, 0o640)
    node.ready(CNI_CONF_ORIGINAL_CONVERSION=original, **settings)
    assert {file: node.text(file) for file in node.listing()} == {"10-a.conflist": expected}
    assert node.mode("10-a.conflist") == 0o640


@pytest.mark.parametrize(
    ("changes", "name", "version"),
    [({'"name": "mynet",': '"name": "",', '"cniVersion": "0.4.0",\n  ': ""}, "k8s-pod-network", "0.3.1")],
)
def test_conversion_of_a_network_without_name_and_version(
    node: Node, changes: dict[str, str], name: str, version: str
) -> None:
    node.write("10-a.conf", replaced(SINGLE, changes))
    node.ready()
    document = json.loads(node.text("10-a.conflist"))
    assert (document["name"], document["cniVersion"]) == (name, version)


def test_a_json_file_is_a_single_network(node: Node) -> None:
    node.write("00-x.json", SINGLE)
    node.write("10-a.conflist", BRIDGE)
    node.ready()
    assert {file: node.text(file) for file in node.listing()} == {
        "00-x.conflist": OWN_CONVERSION,
        "10-a.conflist": BRIDGE,
    }


def test_there_is_never_a_list_in_the_conf_nor_a_gap(node: Node) -> None:
    """W-09: at each moment a reader of the directory finds the network, and a .conf is never a list."""
    seen: set[str] = set()
    end = threading.Event()

    def look() -> None:
        while not end.is_set():
            single, several = node.text("10-a.conf"), node.text("10-a.conflist")
            if '"plugins"' in single:
                seen.add("a list in .conf")
            if not single and not several and not node.text("10-a.conflist"):
                seen.add("neither file")

    node.write("10-a.conf", SINGLE)
    reader = threading.Thread(target=look)
    reader.start()
    try:
        node.ready()
    finally:
        end.set()
        reader.join()
    assert node.types("10-a.conflist") == ["bridge", "istio-cni"]
    assert seen == set()


# --- our entry --------------------------------------------------------------------------------------------------------

SELECTORS = """
- podSelector:
    matchLabels:
      istio.io/dataplane-mode: ambient
- podSelector:
    matchExpressions:
    - key: istio.io/dataplane-mode
      operator: NotIn
      values:
      - none
  namespaceSelector:
    matchLabels:
      istio.io/dataplane-mode: ambient
- {}
"""
STANDALONE_TEXT = """\
{
  "cniVersion": "0.3.1",
  "name": "istio-cni",
  "type": "istio-cni",
  "ipam": {},
  "dns": {},
  "plugin_log_level": "debug",
  "cni_agent_run_dir": "RUN",
  "ambient_enabled": true,
  "enablement_selectors": [
    {
      "podSelector": {
        "matchLabels": {
          "istio.io/dataplane-mode": "ambient"
        }
      },
      "namespaceSelector": {}
    },
    {
      "podSelector": {
        "matchExpressions": [
          {
            "key": "istio.io/dataplane-mode",
            "operator": "NotIn",
            "values": [
              "none"
            ]
          }
        ]
      },
      "namespaceSelector": {
        "matchLabels": {
          "istio.io/dataplane-mode": "ambient"
        }
      }
    },
    {
      "podSelector": {},
      "namespaceSelector": {}
    }
  ],
  "exclude_namespaces": [
    "kube-system",
    "a\\u003cb\\u003e\\u0026c"
  ],
  "pod_namespace": "istio-system",
  "native_nftables": true,
  "enable_ambient_detection_retry": true
}
"""
EVERYTHING = {
    "AMBIENT_ENABLED": "true",
    "AMBIENT_ENABLEMENT_SELECTOR": SELECTORS,
    "EXCLUDE_NAMESPACES": " kube-system,, a<b>&c ,",
    "NATIVE_NFTABLES": "true",
    "ENABLE_AMBIENT_DETECTION_RETRY": "true",
}


@pytest.mark.parametrize("name", ["", "mesh.conf", "mesh.conflist"])
def test_standalone_bytes(node: Node, name: str) -> None:
    node.write("10-a.conflist", BRIDGE)
    node.ready("--log_output_level=cni-plugin:debug", CHAINED_CNI_PLUGIN="false", CNI_CONF_NAME=name, **EVERYTHING)
    assert {file: node.text(file) for file in node.listing()} == {
        "10-a.conflist": BRIDGE,
        name or STANDALONE: STANDALONE_TEXT,
    }


def test_standalone_comes_back(node: Node) -> None:
    agent = node.ready(CHAINED_CNI_PLUGIN="false", **NO_API)
    text = node.text(STANDALONE)
    assert '"enablement_selectors": [],\n  "exclude_namespaces": null,\n' in text
    (node.conf / STANDALONE).unlink()
    healed("the file", lambda: node.text(STANDALONE) == text)
    (node.conf / STANDALONE).write_text('{"type": "istio-cni"}')
    healed("its content", lambda: node.text(STANDALONE) == text)
    agent.wait_ready()


def test_every_setting_in_a_list(node: Node) -> None:
    node.write("10-a.conflist", BRIDGE)
    node.ready("--log_output_level=all:debug", **EVERYTHING)
    expected = {key: value for key, value in json.loads(STANDALONE_TEXT).items() if key != "cniVersion"}
    assert node.entry("10-a.conflist") == expected
    assert list(node.entry("10-a.conflist")) == sorted(expected)
    assert '"a\\u003cb\\u003e\\u0026c"' in node.text("10-a.conflist")


@pytest.mark.parametrize(
    ("flag", "level"),
    [
        ("debug", "info"),  # a bare level is that of scope `default`
        ("all:debug", "debug"),
        ("cni-plugin:none", "none"),
        ("cni-agent:debug", "info"),
        ("nobody:debug,cni-plugin:error", "error"),
    ],
)
def test_plugin_log_level(node: Node, flag: str, level: str) -> None:
    node.write("10-a.conflist", BRIDGE)
    node.ready(f"--log_output_level={flag}", **NO_API)
    assert node.entry("10-a.conflist")["plugin_log_level"] == level


def test_what_belongs_to_others_stays(node: Node) -> None:
    """Numbers above 2^53, floats, order of keys, unknown keys, escapes: the owner's business (W-11)."""
    foreign = (
        '{"plugins":[{"type":"x","n":12345678901234567890,"f":1.50,"e":1E3}],"zz":"<&>",'
        '"name":"n","cniVersion":"1.0.0","disableCheck":true}'
    )
    node.write("10-a.conflist", foreign)
    agent = node.ready(DISABLE_SAFE_UPGRADE="true")
    text = node.text("10-a.conflist")
    head, tail = foreign.split("]")
    assert text.startswith(head)
    assert text.endswith("]" + tail)
    agent.stop()
    assert node.text("10-a.conflist") == foreign


# --- file modes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group_read", "mode"), [("false", 0o600), ("true", 0o640)])
@pytest.mark.parametrize(
    ("settings", "file"),
    [({"CHAINED_CNI_PLUGIN": "false"}, STANDALONE), ({"ISTIO_OWNED_CNI_CONFIG": "true"}, OWNED)],
)
def test_mode_of_a_new_file(node: Node, settings: dict[str, str], file: str, group_read: str, mode: int) -> None:
    node.write("10-a.conflist", BRIDGE, 0o604)
    node.ready(CNI_CONF_GROUP_READ=group_read, **NO_API, **settings)
    assert node.mode(file) == mode
    assert node.mode("10-a.conflist") == 0o604


def test_mode_of_an_edited_file_is_kept(node: Node) -> None:
    node.write("10-a.conflist", BRIDGE, 0o604)
    node.ready(CNI_CONF_GROUP_READ="true", **NO_API)
    assert node.mode("10-a.conflist") == 0o604


# --- healing ----------------------------------------------------------------------------------------------------------


def test_entry_comes_back_whatever_is_done_to_the_file(node: Node) -> None:
    path = node.write("10-a.conflist", BRIDGE)
    agent = node.ready(**NO_API)

    def ours() -> bool:
        return node.text("10-a.conflist") == BRIDGE_WITH_ENTRY

    path.write_text(BRIDGE)
    healed("removed in place", ours)
    node.write("10-a.conflist", BRIDGE)
    healed("replaced by rename", ours)
    path.unlink()
    wait_until("not ready without a conf", lambda: agent.get(istio.READY_PATH)[0] == 503)
    path.write_text(BRIDGE)
    healed("deleted and made again", ours)
    path.write_text(BRIDGE_WITH_ENTRY.replace("RUN", str(node.run)).replace("null", '["all"]'))
    healed("our entry edited (W-48)", ours)
    doubled = json.loads(node.text("10-a.conflist").replace("RUN", str(node.run)))
    doubled["plugins"] += [doubled["plugins"][-1]] * 2
    path.write_text(json.dumps(doubled))
    healed("our entry three times (W-48)", lambda: node.types("10-a.conflist") == ["bridge", "istio-cni"])
    agent.wait_ready()


def test_an_earlier_file_takes_over_and_gives_back(node: Node) -> None:
    node.write("10-a.conflist", BRIDGE)
    agent = node.ready(**NO_API)
    node.write("05-new.conflist", BRIDGE)
    healed("entry in the new first file (W-01)", lambda: node.text("05-new.conflist") == BRIDGE_WITH_ENTRY)
    healed("no entry in the old one", lambda: node.text("10-a.conflist") == BRIDGE)
    (node.conf / "05-new.conflist").unlink()
    healed("back in the other (W-16)", lambda: node.text("10-a.conflist") == BRIDGE_WITH_ENTRY)
    agent.wait_ready()


def test_an_earlier_file_does_not_move_a_name_that_was_given(node: Node) -> None:
    node.write("10-a.conflist", BRIDGE)
    agent = node.ready(CNI_CONF_NAME="10-a.conflist", **NO_API)
    node.write("05-new.conflist", BRIDGE)
    wait_until("a warning", lambda: "05-new.conflist sorts before" in agent.log)
    assert node.text("05-new.conflist") == BRIDGE
    assert node.text("10-a.conflist") == BRIDGE_WITH_ENTRY
    assert agent.get(istio.READY_PATH)[0] == 200


def test_found_file_that_vanishes_is_not_waited_for(node: Node) -> None:
    node.write("10-a.conflist", BRIDGE)
    agent = node.ready(**NO_API)
    (node.conf / "10-a.conflist").unlink()
    node.write("20-b.conflist", BRIDGE)
    healed("the other file (W-16)", lambda: node.text("20-b.conflist") == BRIDGE_WITH_ENTRY)
    agent.wait_ready()


def test_only_one_of_two_files_keeps_our_entry(node: Node) -> None:
    for name in ("10-a.conflist", "20-b.conflist"):
        node.write(name, BRIDGE_WITH_ENTRY.replace("RUN", str(node.run)))
    node.ready(**NO_API)
    assert node.text("10-a.conflist") == BRIDGE_WITH_ENTRY
    assert node.text("20-b.conflist") == BRIDGE


def test_owned_file_follows_and_comes_back(node: Node) -> None:
    node.write("10-a.conflist", BRIDGE)
    agent = node.ready(ISTIO_OWNED_CNI_CONFIG="true", **NO_API)
    (node.conf / OWNED).unlink()
    healed("deleted", lambda: node.text(OWNED) == BRIDGE_WITH_ENTRY)
    node.write("10-a.conflist", BRIDGE.replace("cni0", "cni9"))
    healed("a changed body (W-02)", lambda: node.text(OWNED) == BRIDGE_WITH_ENTRY.replace("cni0", "cni9"))
    assert node.text("10-a.conflist") == BRIDGE.replace("cni0", "cni9")
    agent.wait_ready()


def test_owned_file_that_sorts_too_late_is_not_written(node: Node) -> None:
    node.write("01-a.conflist", BRIDGE)
    agent = node.start(ISTIO_OWNED_CNI_CONFIG="true", **NO_API)
    wait_until("a reason", lambda: "sorts after 01-a.conflist" in agent.get(istio.READY_PATH)[1])
    assert node.listing() == ["01-a.conflist"]
    assert agent.process.poll() is None
    assert node.text("01-a.conflist") == BRIDGE


@pytest.mark.parametrize("name", ["own.conf", "../own.conflist"])
def test_owned_name_that_cannot_work_ends_the_start(node: Node, name: str) -> None:
    node.write("10-a.conflist", BRIDGE)
    done = node.scene.run(ISTIO_OWNED_CNI_CONFIG="true", ISTIO_OWNED_CNI_CONF_FILENAME=name)
    assert done.returncode == 1
    for part in (name, "istio_owned_cni_config_filename", "ISTIO_OWNED_CNI_CONF_FILENAME"):
        assert part in done.stderr
    assert node.listing() == ["10-a.conflist"]


def test_conf_directory_that_comes_late(node: Node) -> None:
    node.conf.rmdir()
    agent = node.start(**NO_API)
    wait_until("it to wait", lambda: agent.get(istio.READY_PATH)[0] == 503 and "waiting" in agent.log)
    node.conf.mkdir()
    node.write("10-a.conflist", BRIDGE)
    healed("the entry", lambda: node.text("10-a.conflist") == BRIDGE_WITH_ENTRY)
    agent.wait_ready()


@pytest.mark.parametrize(
    "text",
    ["[]", "{", "", "{}", '{"plugins": {}}', '{"plugins": [1]}', '{"name": "n", "cniVersion": "1.0.0"}'],
)
def test_named_conf_that_cannot_be_edited(node: Node, text: str) -> None:
    """It is left as it is, counted as a failure, and taken up as soon as its owner has put it right."""
    node.write("10-a.conflist", text)
    agent = node.start(CNI_CONF_NAME="10-a.conflist", **NO_API)
    failed = 'istio_cni_installs_total{result="CREATE_CNI_CONFIG_FAILURE"}'
    wait_until("the failure", lambda: agent.metrics().get(failed))
    assert agent.get(istio.READY_PATH)[0] == 503
    assert "10-a.conflist" in agent.get(istio.READY_PATH)[1]
    assert node.text("10-a.conflist") == text
    node.write("10-a.conflist", BRIDGE)
    healed("the entry", lambda: node.text("10-a.conflist") == BRIDGE_WITH_ENTRY)
    agent.wait_ready()


def test_somebody_who_keeps_removing_the_entry_is_named_and_not_raced(node: Node) -> None:
    path = node.write("05-cilium.conflist", BRIDGE)
    agent = node.ready(**NO_API)
    removed = 0
    end = time.monotonic() + 5
    while time.monotonic() < end and removed < 100:
        if node.text(path.name) != BRIDGE:
            node.write(path.name, BRIDGE)
            removed += 1
        time.sleep(0.01)
    assert 2 <= removed <= 10
    assert "cni.exclusive=false" in agent.log
    healed("the entry", lambda: node.text(path.name) == BRIDGE_WITH_ENTRY)
    agent.wait_ready()
