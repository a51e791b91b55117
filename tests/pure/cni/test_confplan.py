"""Which file has to change and how, decided from what lies in the conf directory: one case per row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest

from meshcni.cni import conf
from meshcni.cni.confplan import Assessment, ConfDir, ConfPolicy, assess, removal
from meshcni.cni.conftext import go_json
from meshcni.errors import SettingError

OWN = conf.entry(conf.EntryConfig(run_dir="/run/x"))
ENTRY = go_json(conf.list_entry(OWN), newline="")
OTHERS_ENTRY = '{"type":"istio-cni","cni_agent_run_dir":"/run/other"}'


def listed(*plugins: str) -> str:
    return f'{{"name":"n","plugins":[{",".join(plugins)}]}}'


BRIDGE = '{"type":"bridge"}'
PLAIN = listed(BRIDGE)
MESHED = listed(BRIDGE, ENTRY)
STALE = listed(BRIDGE, '{"type":"istio-cni","cni_agent_run_dir":"/run/x","exclude_namespaces":["old"]}')
SINGLE = '{"name":"n","type":"bridge","cniVersion":"0.4.0"}'
CONVERTED = '{"cniVersion":"0.4.0","name":"n","plugins":[{"name":"n","type":"bridge"},' + ENTRY + "]}"
CONVERTED_REST = '{"cniVersion":"0.4.0","name":"n","plugins":[{"name":"n","type":"bridge"}]}'
ALONE = conf.standalone_file(OWN).decode()
BROKEN = '{"name":'


@dataclass(frozen=True)
class Case:
    """Files by name; then the files written (by value), removed, and a part of the reason and of the notes."""

    files: Mapping[str, str]
    writes: Mapping[str, str] = field(default_factory=dict)
    removes: tuple[str, ...] = ()
    target: str = ""
    reason: str = ""
    note: str = ""
    policy: Mapping[str, object] = field(default_factory=dict)
    backups: Mapping[str, str] = field(default_factory=dict)


NAMED = {"conf_name": "10-a.conflist"}
OWNED = {"owned": True}
ALONE_MODE = {"chained": False}

CASES = {
    # chained, the file found by ourselves
    "nothing there yet": Case({}, reason="no conf in /etc/cni yet"),
    "first list": Case(
        {"10-a.conflist": PLAIN, "20-b.conflist": PLAIN}, {"10-a.conflist": MESHED}, target="10-a.conflist"
    ),
    "in place": Case({"10-a.conflist": MESHED}, target="10-a.conflist"),
    "entry with old content": Case({"10-a.conflist": STALE}, {"10-a.conflist": MESHED}, target="10-a.conflist"),
    "entry twice": Case(
        {"10-a.conflist": listed(BRIDGE, ENTRY, ENTRY)}, {"10-a.conflist": MESHED}, target="10-a.conflist"
    ),
    "single network": Case({"10-a.conf": SINGLE}, {"10-a.conflist": CONVERTED}, ("10-a.conf",), target="10-a.conflist"),
    "json network": Case({"00-x.json": SINGLE}, {"00-x.conflist": CONVERTED}, ("00-x.json",), target="00-x.conflist"),
    "list in a json file is broken": Case(
        {"00-x.json": PLAIN, "10-a.conflist": MESHED}, target="10-a.conflist", note="00-x.json: 'type' is missing"
    ),
    "conversion interrupted": Case(
        {"10-a.conf": SINGLE, "10-a.conflist": CONVERTED},
        {"10-a.conflist": CONVERTED},
        ("10-a.conf",),
        target="10-a.conflist",
    ),
    "primary wrote its single network anew": Case(
        {"10-a.conf": SINGLE.replace("0.4.0", "1.0.0"), "10-a.conflist": CONVERTED},
        {"10-a.conflist": CONVERTED.replace("0.4.0", "1.0.0")},
        ("10-a.conf",),
        target="10-a.conflist",
    ),
    "conversion would hit another list": Case(
        {"10-a.conf": SINGLE, "10-a.conflist": listed('{"type":"ptp"}')}, reason="exists and holds another network"
    ),
    "pre-empted": Case(
        {"05-new.conflist": PLAIN, "10-a.conflist": MESHED},
        {"05-new.conflist": MESHED, "10-a.conflist": PLAIN},
        target="05-new.conflist",
    ),
    "entry of another agent elsewhere stays": Case(
        {"05-new.conflist": MESHED, "10-a.conflist": listed(BRIDGE, OTHERS_ENTRY)}, target="05-new.conflist"
    ),
    "the file of before is gone": Case({"20-b.conflist": PLAIN}, {"20-b.conflist": MESHED}, target="20-b.conflist"),
    "only a broken one": Case(
        {"10-a.conflist": BROKEN}, reason="no valid conf in /etc/cni: 10-a.conflist is not valid"
    ),
    "broken one before ours": Case(
        {"05-x.conflist": BROKEN, "10-a.conflist": MESHED},
        target="10-a.conflist",
        note="containerd loads no conf until it is repaired",
    ),
    "broken one after ours": Case(
        {"10-a.conflist": MESHED, "20-x.conf": BROKEN}, target="10-a.conflist", note="20-x.conf is not valid JSON"
    ),
    "copy left from the owned mode": Case(
        {"02-istio-cni.conflist": MESHED, "10-a.conflist": PLAIN},
        {"10-a.conflist": MESHED},
        ("02-istio-cni.conflist",),
        target="10-a.conflist",
    ),
    "copy left, primary not there yet": Case({"02-istio-cni.conflist": MESHED}, target="02-istio-cni.conflist"),
    # chained, the operator's name
    "named file": Case(
        {"05-x.conflist": PLAIN, "10-a.conflist": PLAIN},
        {"10-a.conflist": MESHED},
        target="10-a.conflist",
        note="05-x.conflist sorts before 10-a.conflist",
        policy=NAMED,
    ),
    "named file not there": Case({"05-x.conflist": PLAIN}, reason="10-a.conflist does not exist", policy=NAMED),
    "named list exists as single": Case(
        {"10-a.conf": SINGLE}, {"10-a.conflist": CONVERTED}, ("10-a.conf",), target="10-a.conflist", policy=NAMED
    ),
    "named single exists as list": Case(
        {"10-a.conflist": MESHED}, target="10-a.conflist", policy={"conf_name": "10-a.conf"}
    ),
    "named single that holds a list": Case(
        {"10-a.conf": PLAIN},
        {"10-a.conflist": MESHED},
        ("10-a.conf",),
        target="10-a.conflist",
        policy={"conf_name": "10-a.conf"},
    ),
    "named with another extension": Case(
        {"x.file": PLAIN}, {"x.file": MESHED}, target="x.file", policy={"conf_name": "x.file"}
    ),
    "named file is broken": Case({"10-a.conflist": BROKEN}, reason="left as it is", policy=NAMED),
    "named: an entry elsewhere stays": Case(
        {"05-x.conflist": MESHED, "10-a.conflist": MESHED}, target="10-a.conflist", policy=NAMED
    ),
    # owned
    "owned: no primary yet": Case({}, reason="no conf in /etc/cni yet", policy=OWNED),
    "owned: copy survived, primary not there yet": Case(
        {"02-istio-cni.conflist": MESHED}, reason="no conf in /etc/cni yet", policy=OWNED
    ),
    "owned: first copy": Case(
        {"10-a.conflist": PLAIN}, {"02-istio-cni.conflist": MESHED}, target="02-istio-cni.conflist", policy=OWNED
    ),
    "owned: in place": Case(
        {"02-istio-cni.conflist": MESHED, "10-a.conflist": PLAIN}, target="02-istio-cni.conflist", policy=OWNED
    ),
    "owned: body of a plugin changed": Case(
        {"02-istio-cni.conflist": MESHED, "10-a.conflist": listed('{"type":"bridge","mtu":9000}')},
        {"02-istio-cni.conflist": listed('{"type":"bridge","mtu":9000}', ENTRY)},
        target="02-istio-cni.conflist",
        policy=OWNED,
    ),
    "owned: top-level key changed": Case(
        {"02-istio-cni.conflist": MESHED, "10-a.conflist": PLAIN.replace('"n"', '"m"')},
        {"02-istio-cni.conflist": MESHED.replace('"n"', '"m"', 1)},
        target="02-istio-cni.conflist",
        policy=OWNED,
    ),
    "owned: other layout is no change": Case(
        {"02-istio-cni.conflist": json.dumps(json.loads(MESHED), indent=3), "10-a.conflist": PLAIN},
        target="02-istio-cni.conflist",
        policy=OWNED,
    ),
    "owned: copy of a single network": Case(
        {"10-a.conf": SINGLE}, {"02-istio-cni.conflist": CONVERTED}, target="02-istio-cni.conflist", policy=OWNED
    ),
    "owned: entry leaves the primary": Case(
        {"10-a.conflist": MESHED},
        {"02-istio-cni.conflist": MESHED, "10-a.conflist": PLAIN},
        target="02-istio-cni.conflist",
        policy=OWNED,
    ),
    "owned: named primary": Case(
        {"10-a.conflist": PLAIN, "20-b.conflist": listed('{"type":"ptp"}')},
        {"02-istio-cni.conflist": listed('{"type":"ptp"}', ENTRY)},
        target="02-istio-cni.conflist",
        policy={**OWNED, "conf_name": "20-b.conflist"},
    ),
    "owned: sorts after the primary": Case(
        {"01-a.conflist": PLAIN}, reason="02-istio-cni.conflist sorts after 01-a.conflist", policy=OWNED
    ),
    "owned: broken primary": Case({"10-a.conflist": BROKEN}, reason="no valid conf", policy=OWNED),
    "owned without chained is standalone": Case(
        {"10-a.conflist": PLAIN},
        {"YYY-istio-cni.conf": ALONE},
        target="YYY-istio-cni.conf",
        policy={**OWNED, **ALONE_MODE},
    ),
    # standalone
    "standalone": Case({}, {"YYY-istio-cni.conf": ALONE}, target="YYY-istio-cni.conf", policy=ALONE_MODE),
    "standalone in place": Case({"YYY-istio-cni.conf": ALONE}, target="YYY-istio-cni.conf", policy=ALONE_MODE),
    "standalone with old content": Case(
        {"x.conf": '{"type":"istio-cni"}'},
        {"x.conf": ALONE},
        target="x.conf",
        policy={**ALONE_MODE, "conf_name": "x.conf"},
    ),
    "standalone, half a file of ours": Case(
        {"YYY-istio-cni.conf": BROKEN}, {"YYY-istio-cni.conf": ALONE}, target="YYY-istio-cni.conf", policy=ALONE_MODE
    ),
    "standalone, another plugin's file": Case(
        {"x.conf": SINGLE}, reason="holds another plugin's network", policy={**ALONE_MODE, "conf_name": "x.conf"}
    ),
    "standalone, another's broken file": Case(
        {"x.conf": BROKEN}, reason="left as it is", policy={**ALONE_MODE, "conf_name": "x.conf"}
    ),
}


def policy_of(case: Case) -> ConfPolicy:
    return ConfPolicy(own=OWN, **case.policy)  # type: ignore[arg-type]


def directory_of(files: Mapping[str, str]) -> ConfDir:
    return ConfDir("/etc/cni", {name: text.encode() for name, text in files.items()})


def check(case: Case, found: Assessment) -> None:
    writes = {change.name: json.loads(change.data) for change in found.changes if change.data is not None}
    assert writes == {name: json.loads(text) for name, text in case.writes.items()}
    assert {change.name for change in found.changes if change.data is None} == set(case.removes)
    assert case.reason in found.reason
    assert bool(case.reason) == bool(found.reason)
    assert case.note in " ".join(found.notes)
    assert bool(case.note) == bool(found.notes)


def after(files: Mapping[str, str], found: Assessment) -> dict[str, str]:
    result = dict(files)
    for change in found.changes:
        if change.data is None:
            del result[change.name]
        else:
            result[change.name] = change.data.decode()
    return result


@pytest.mark.parametrize("name", CASES)
def test_what_has_to_change(name: str) -> None:
    case = CASES[name]
    found = assess(directory_of(case.files), policy_of(case))
    check(case, found)
    assert found.target == case.target


@pytest.mark.parametrize("name", CASES)
def test_once_changed_nothing_more_has_to_change(name: str) -> None:
    case = CASES[name]
    found = assess(directory_of(case.files), policy_of(case))
    again = assess(directory_of(after(case.files, found)), policy_of(case))
    assert again.changes == ()
    assert again.target == case.target


@pytest.mark.parametrize("name", CASES)
def test_our_entry_is_in_its_new_place_before_it_leaves_the_old(name: str) -> None:
    case = CASES[name]
    found = assess(directory_of(case.files), policy_of(case))
    if found.changes:
        assert found.changes[0].name == case.target
        assert found.changes[0].data is not None


REMOVALS = {
    "list": Case({"10-a.conflist": MESHED}, {"10-a.conflist": PLAIN}),
    "nothing of ours": Case({"10-a.conflist": PLAIN, "20-b.conf": SINGLE}),
    "two lists and a duplicate": Case(
        {"10-a.conflist": listed(ENTRY, BRIDGE, ENTRY), "20-b.conflist": MESHED},
        {"10-a.conflist": PLAIN, "20-b.conflist": PLAIN},
    ),
    "another agent's entry": Case({"10-a.conflist": listed(BRIDGE, OTHERS_ENTRY)}),
    "list that holds nothing else": Case({"10-a.conflist": listed(ENTRY)}, removes=("10-a.conflist",)),
    "converted, back as it was": Case(
        {"10-a.conflist": CONVERTED}, {"10-a.conf": SINGLE}, ("10-a.conflist",), backups={"10-a.conf": SINGLE}
    ),
    "converted json, back as it was": Case(
        {"10-a.conflist": CONVERTED}, {"10-a.json": SINGLE}, ("10-a.conflist",), backups={"10-a.json": SINGLE}
    ),
    "converted, changed since": Case(
        {"10-a.conflist": CONVERTED.replace("0.4.0", "1.0.0")},
        {"10-a.conflist": CONVERTED_REST.replace("0.4.0", "1.0.0")},
        backups={"10-a.conf": SINGLE},
    ),
    "converted, the original's way": Case(
        {"10-a.conflist": CONVERTED},
        {"10-a.conflist": CONVERTED_REST},
        backups={"10-a.conf": SINGLE},
        policy={"original_conversion": True},
    ),
    "converted, single network there again": Case(
        {"10-a.conf": SINGLE, "10-a.conflist": CONVERTED}, removes=("10-a.conflist",), backups={"10-a.conf": SINGLE}
    ),
    "converted, another single network there": Case(
        {"10-a.conf": SINGLE.replace("0.4.0", "1.0.0"), "10-a.conflist": CONVERTED},
        {"10-a.conflist": CONVERTED_REST},
        backups={"10-a.conf": SINGLE},
    ),
    "owned": Case(
        {"02-istio-cni.conflist": MESHED, "10-a.conflist": PLAIN}, removes=("02-istio-cni.conflist",), policy=OWNED
    ),
    "owned, without ambient or not: the primary stays": Case(
        {"10-a.conflist": MESHED}, {"10-a.conflist": PLAIN}, policy=OWNED
    ),
    "standalone": Case({"YYY-istio-cni.conf": ALONE, "10-a.conflist": PLAIN}, removes=("YYY-istio-cni.conf",)),
    "named, another plugin's file": Case({"x.conf": SINGLE}, policy={**ALONE_MODE, "conf_name": "x.conf"}),
    "broken": Case(
        {"10-a.conflist": MESHED, "20-b.conf": BROKEN}, {"10-a.conflist": PLAIN}, note="20-b.conf is not valid"
    ),
}


@pytest.mark.parametrize("name", REMOVALS)
def test_what_is_taken_out(name: str) -> None:
    case = REMOVALS[name]
    backups = {single: text.encode() for single, text in case.backups.items()}
    found = removal(directory_of(case.files), policy_of(case), backups)
    check(case, found)
    again = removal(directory_of(after(case.files, found)), policy_of(case), backups)
    assert again.changes == ()


def test_unreadable_files_are_named_and_left() -> None:
    directory = ConfDir("/etc/cni", {"10-a.conflist": PLAIN.encode()}, {"05-x.conf": "Permission denied"})
    found = assess(directory, ConfPolicy(own=OWN))
    assert found.target == "10-a.conflist"
    assert found.changes  # in case the runtime cannot read it either
    assert found.doubt.endswith("before 10-a.conflist: 05-x.conf cannot be read: Permission denied")
    assert found.notes == ()
    later = assess(replace(directory, unreadable={"20-x.conf": "Permission denied"}), ConfPolicy(own=OWN))
    assert later.doubt == ""
    assert "20-x.conf cannot be read: Permission denied" in later.notes[0]
    named = assess(directory, ConfPolicy(own=OWN, conf_name="05-x.conf"))
    assert "Permission denied" in named.reason
    assert "Permission denied" in removal(directory, ConfPolicy(own=OWN), {}).notes[0]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"owned": True, "owned_name": "x.conf"}, "does not end in .conflist"),
        ({"owned": True, "owned_name": "../x.conflist"}, "is no file name"),
        ({"conf_name": "a/b.conf"}, "CNI_CONF_NAME='a/b.conf' is no file name"),
        ({"conf_name": ".."}, "is no file name"),
    ],
)
def test_names_that_can_never_work_are_refused_at_once(options: dict[str, object], part: str) -> None:
    with pytest.raises(SettingError, match=part):
        ConfPolicy(own=OWN, **options)  # type: ignore[arg-type]
