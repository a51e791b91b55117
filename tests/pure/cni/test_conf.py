"""Which files a runtime accepts, what our entry looks like, and how it gets into a list and into a single network."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.cni import conf
from meshcni.cni.conftext import go_json, parse
from meshcni.errors import ConfError

OWN = conf.entry(conf.EntryConfig(run_dir="/run/x", exclude_namespaces=("kube-system",)))

VALID = {
    "a.conflist": '{"name": "n", "plugins": [{"type": "b"}]}',
    "b.conflist": '{"name": "", "cniVersion": "1.1.0", "cniVersions": ["0.4.0", ""], "plugins": [{"type": "b"}]}',
    "c.conflist": '{"name": "n", "disableCheck": "TRUE", "disableGC": false, "plugins": [{"type": "b"}]}',
    "d.conflist": '{"name": "folder"}',
    "e.conf": '{"type": "b"}',
    "f.conf": '{"TYPE": "b", "name": null, "ipam": {"type": "host-local"}, "capabilities": {"p": true}}',
    "g.json": '{"type": "b", "name": "n", "dns": {"nameservers": []}}',
    "h.conf": '{"type": "b", "plugins": [{"type": "c"}]}',
}
INVALID = {
    "a.conflist": ('{"plugins": [{"type": "b"}]}', "'name' is missing"),
    "b.conflist": ('{"name": null, "plugins": [{"type": "b"}]}', "'name' is missing or no string"),
    "c.conflist": ('{"name": "n", "cniVersion": null, "plugins": [{"type": "b"}]}', "'cniVersion' is no string"),
    "d.conflist": ('{"name": "n", "cniVersions": ["1.x"], "plugins": [{"type": "b"}]}', "'cniVersions'"),
    "e.conflist": ('{"name": "n", "cniVersions": ["1.0.0.0"], "plugins": [{"type": "b"}]}', "'cniVersions'"),
    "f.conflist": ('{"name": "n", "disableGC": 1, "plugins": [{"type": "b"}]}', "'disableGC' is neither"),
    "g.conflist": ('{"name": "n", "plugins": []}', "'plugins' is missing, empty"),
    "h.conflist": ('{"name": "n"}', "'plugins' is missing"),
    "i.conflist": ('{"name": "folder", "loadOnlyInlinedPlugins": "true"}', "'plugins' is missing"),
    "j.conflist": ('{"name": "n", "plugins": [1]}', r"plugins\[0\]: expected an object"),
    "k.conflist": ('{"name": "n", "plugins": [{"type": "b"}, {"type": ""}]}', r"plugins\[1\]: 'type' is missing"),
    "l.conflist": ('{"type": "b", "name": "n"}', "'plugins' is missing"),
    "m.conf": ('{"name": "n"}', "'type' is missing"),
    "n.conf": ('{"name": 1, "type": "b"}', "'name' is no string"),
    "o.conf": ('{"type": "b", "ipam": {"type": 1}}', "'ipam'"),
    "p.conf": ('{"type": "b", "capabilities": {"p": 1}}', "'capabilities'"),
    "q.conf": ('{"type": "b", "dns": []}', "'dns'"),
    "r.json": ('{"name": "n", "plugins": [{"type": "b"}]}', "'type' is missing"),
}


@pytest.mark.parametrize("name", VALID)
def test_what_a_runtime_accepts(name: str) -> None:
    assert conf.read(name, VALID[name].encode(), frozenset({"folder"})).value


@pytest.mark.parametrize("name", INVALID)
def test_what_a_runtime_refuses(name: str) -> None:
    text, part = INVALID[name]
    with pytest.raises(ConfError, match=part) as raised:
        conf.read(name, text.encode(), frozenset({"folder"}))
    assert name in raised.value.message


def test_candidates_are_those_of_the_runtimes_in_their_order() -> None:
    names = ["b.conflist", "b.conf", "a.json", ".conf", "c.cilium_bak", "a.conflist.tmp.123", "README", "B.CONF"]
    assert conf.candidates(names) == [".conf", "a.json", "b.conf", "b.conflist"]


def test_entry_has_the_keys_of_the_original_in_its_order() -> None:
    text = conf.standalone_file(conf.entry(conf.EntryConfig())).decode()
    assert text == (
        '{\n  "cniVersion": "0.3.1",\n  "name": "istio-cni",\n  "type": "istio-cni",\n  "ipam": {},\n  "dns": {},\n'
        '  "plugin_log_level": "info",\n  "cni_agent_run_dir": "/var/run/istio-cni",\n  "ambient_enabled": false,\n'
        '  "enablement_selectors": [],\n  "exclude_namespaces": null,\n  "pod_namespace": "",\n'
        '  "native_nftables": false,\n  "enable_ambient_detection_retry": false\n}\n'
    )


def test_entry_carries_what_is_configured() -> None:
    selector = {"podSelector": {"matchLabels": {"a": "b"}}, "namespaceSelector": {}}
    own = conf.entry(
        conf.EntryConfig(
            run_dir="/r",
            plugin_log_level="debug",
            ambient_enabled=True,
            enablement_selectors=(selector,),
            exclude_namespaces=("a", "b"),
            pod_namespace="istio-system",
            native_nftables=True,
            ambient_detection_retry=True,
            extra={"agent_wait_seconds": 5.0},
        )
    )
    assert json.loads(conf.standalone_file(own)) == {
        "cniVersion": "0.3.1",
        "name": "istio-cni",
        "type": "istio-cni",
        "ipam": {},
        "dns": {},
        "plugin_log_level": "debug",
        "cni_agent_run_dir": "/r",
        "ambient_enabled": True,
        "enablement_selectors": [selector],
        "exclude_namespaces": ["a", "b"],
        "pod_namespace": "istio-system",
        "native_nftables": True,
        "enable_ambient_detection_retry": True,
        "agent_wait_seconds": 5,
    }


def insert(name: str, text: str, **options: bool) -> str:
    return conf.with_entry(name, text.encode(), OWN, **options).decode()


def test_a_list_gets_our_entry_last_and_only_once() -> None:
    stale = '{"type":"istio-cni","exclude_namespaces":["old"]}'
    before = f'{{"name":"n","plugins":[{stale},{{"type":"b","n":1.50}},{stale}],"x":1}}'
    after = insert("a.conflist", before)
    assert [plugin["type"] for plugin in json.loads(after)["plugins"]] == ["b", "istio-cni"]
    assert json.loads(after)["plugins"][1] == conf.list_entry(OWN)
    assert '{"type":"b","n":1.50}' in after
    assert conf.without_entry("a.conflist", after.encode()) == b'{"name":"n","plugins":[{"type":"b","n":1.50}],"x":1}'
    assert insert("a.conflist", after) == after


def test_our_entry_may_stand_anywhere_but_before_the_interface_is_made() -> None:
    own = go_json(conf.list_entry(OWN), newline="")
    kept = f'{{"name":"n","plugins":[{{"type":"b"}},{own},{{"type":"other"}}]}}'
    assert insert("a.conflist", kept) == kept
    moved = insert("a.conflist", f'{{"name":"n","plugins":[{own},{{"type":"b"}}]}}')
    assert [plugin["type"] for plugin in json.loads(moved)["plugins"]] == ["b", "istio-cni"]
    alone = f'{{"name":"n","plugins":[{own}]}}'
    assert insert("a.conflist", alone) == alone


@pytest.mark.parametrize(
    "text",
    ['{"name":"n"}', '{"name":"n","plugins":{}}', '{"name":"n","plugins":[1]}', "[]", "{", '{"type":""}'],
)
def test_what_is_neither_list_nor_network_is_not_edited(text: str) -> None:
    with pytest.raises(ConfError):
        insert("a.conflist", text)


CONVERSIONS = {  # a single network: name and version of the list
    '{"type":"b","name":"n","cniVersion":"1.0.0","big":9007199254740993}': ("n", "1.0.0"),
    '{"cniVersion":"","name":"","type":"b"}': ("k8s-pod-network", "0.3.1"),
    '{"type":"b"}': ("k8s-pod-network", "0.3.1"),
    '{"cniVersion":"0.4.0","type":"b","cniVersion":"1.1.0","Name":"<n>"}': ("<n>", "1.1.0"),
    '{\n\t"type": "b",\n\t"cniVersion": "0.4.0",\n\t"ipam": {\n\t\t"x": 1.0\n\t}\n}\n': ("k8s-pod-network", "0.4.0"),
}


@pytest.mark.parametrize("text", CONVERSIONS)
def test_a_single_network_keeps_its_name_and_version(text: str) -> None:
    after = insert("10-a.conf", text)
    name, version = CONVERSIONS[text]
    value = json.loads(after)
    assert list(value) == ["cniVersion", "name", "plugins"]
    assert (value["name"], value["cniVersion"]) == (name, version)
    network = {key: inner for key, inner in json.loads(text).items() if key != "cniVersion"}
    assert value["plugins"] == [network, conf.list_entry(OWN)]
    assert after.endswith("\n") == text.endswith("\n")
    for token in ("9007199254740993", '"x": 1.0'):
        assert (token in after) == (token in text)


def test_a_canonical_network_becomes_a_canonical_list() -> None:
    network = {
        "cniVersion": "0.4.0",
        "name": "n",
        "type": "b",
        "ipam": {"type": "host-local", "ranges": [[{"s": "x"}]]},
    }
    after = insert("a.conf", go_json(network) + "\n")
    del network["cniVersion"]
    assert after == go_json({"cniVersion": "0.4.0", "name": "n", "plugins": [network, conf.list_entry(OWN)]}) + "\n"


def test_the_switch_converts_like_the_original() -> None:
    after = insert(
        "a.conf", '{"type":"b","name":"n","cniVersion":"1.0.0","big":9007199254740993}', original_conversion=True
    )
    network = {"type": "b", "name": "n", "big": 9007199254740992}
    plugins = [network, conf.list_entry(OWN)]
    assert after == go_json({"cniVersion": "0.3.1", "name": "k8s-pod-network", "plugins": plugins}) + "\n"


def test_a_list_in_a_single_networks_file_is_edited_as_a_list() -> None:
    text = '{"name":"n","plugins":[{"type":"b"}]}'
    assert json.loads(insert("a.conf", text))["name"] == "n"
    assert conf.list_name("a.conf") == conf.list_name("a.json") == "a.conflist"
    assert conf.list_name("undetectable.file") == "undetectable.file"


PLUGINS = st.lists(
    st.dictionaries(
        st.sampled_from(["type", "ipam", "x"]), st.sampled_from(["b", "istio-cni", 1, None, {"a": [1.5]}]), max_size=3
    ),
    max_size=4,
)


@given(PLUGINS, st.sampled_from([None, 0, 1, 2, "\t"]))
def test_others_plugins_come_out_as_they_went_in(plugins: list[dict[str, object]], indent: int | str | None) -> None:
    before = json.dumps({"name": "n", "plugins": plugins}, indent=indent)
    others = [plugin for plugin in plugins if plugin.get("type") != "istio-cni"]
    after = insert("a.conflist", before)
    assert json.loads(after)["plugins"] in ([*others, conf.list_entry(OWN)], plugins)
    assert insert("a.conflist", after) == after
    taken_out = conf.without_entry("a.conflist", after.encode()).decode()
    assert json.loads(taken_out)["plugins"] == others
    if others == plugins:
        assert taken_out == before


def test_ours_is_told_from_another_agents_by_the_run_dir() -> None:
    mine, other = {"type": "istio-cni", "cni_agent_run_dir": "/a"}, {"type": "istio-cni", "cni_agent_run_dir": "/b"}
    assert [conf.is_ours(one, "/a") for one in (mine, other, {"type": "istio-cni"}, {"type": "b"}, 1)] == [
        True,
        False,
        True,
        False,
        False,
    ]
    document = parse(json.dumps({"name": "n", "plugins": [other]}).encode(), "x")
    assert conf.has_entry(document)
    assert not conf.has_entry(document, "/a")
