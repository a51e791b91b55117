"""The operators' pages name only what exists: commands, flags, chart values, settings, metrics, reasons, links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.docs import names, programs
from tests.docs.pages import Page, Section, anchor, pages

from meshcni.cli.statustext import POD_HEADER, SIDECAR_HEADER, as_text

EXPECTED = {"install", "upgrade", "uninstall", "rbac", "capacity", "troubleshooting"}
TROUBLESHOOTING = next(page for page in pages() if page.path.stem == "troubleshooting")
SETTING = re.compile(r"^([A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+)(?:=.*)?$")
CHART_VALUE = re.compile(r"^([a-z]+[A-Za-z]*(?:\.[a-zA-Z]+)*)(?:=.*)?$")
REASON = re.compile(r"^(?:[A-Z][a-z]+|CNI)(?:[A-Z][A-Za-z]+)+$")
# Words in code spans that are no settings, chart values or reasons of ours.
NOT_SETTINGS = {"COPY_BINARIES_FAILURE"}
OTHER_VALUES = {"cni.exclusive", "bpf.hostLegacyRouting", "seLinuxOptions.type", "spec.nodeName", "metadata.namespace",
                "pilot.cni.enabled"}  # fmt: skip
OTHER_REASONS = {"ContainerCreating", "ClusterRole", "CrashLoopBackOff"}
ADD_HEADER = ("TIME", "POD", "VERDICT", "REASON", "BACKEND", "MS", "MESSAGE")
WATCH = {"resource": "pods", "synced": True, "connected": True, "objects": 1, "lastError": ""}
FULL = {  # a status document with everything in it that can be
    "version": "1", "node": "n", "uptimeSeconds": 1, "ready": True, "notReady": [], "notLive": [],
    "install": {"conf_path": "/c", "installs": 1, "conf_fights": 0, "notes": ["a note"], "contested": "a fight"},
    "backend": {"backend": "iptables", "variant": "nft", "why": "so"}, "watches": [WATCH], "errors": {"KubeError": 1.0},
    "kernel": ["lacks something"], "missingCapabilities": "some",
    "missing": {
        "degrades": ["this"], "yaml": "",
        "rights": [{"right": "get nodes", "weight": "helps", "without": "that", "chart": "always"}],
    },
    "ambient": {"ztunnel": [], "hostRules": "in place", "setEntries": 0, "pods": []},
    "sidecars": {"trouble": "", "mode": "heal", "pods": []},
    "repair": {"broken": 1, "mode": "label", "pods": []}, "adds": [],
}  # fmt: skip
LABELS = {line[:10].strip() for line in as_text(FULL).splitlines() if line[:10].strip() and line[10:11] == " "}


def each(attribute: str) -> list[object]:
    """Parameters: every item of every page, with the page's name."""
    return [
        pytest.param(page, item, id=f"{page.path.stem}-{number}")
        for page in pages()
        for number, item in enumerate(getattr(page, attribute)())
    ]


def test_there_is_every_page() -> None:
    assert {page.path.stem for page in pages()} >= EXPECTED


@pytest.mark.parametrize(("page", "line"), each("commands"))
def test_every_command_exists(page: Page, line: str) -> None:
    programs.check(line)


@pytest.mark.parametrize(
    "line",
    [
        "install-cni repair",
        "install-cni status --verbose",
        "meshcni rules sidecar --verify",
        "kubectl exec POD -- install-cni look",
        "helm upgrade a b --set ambient.enable=true",
        "helm upgrade a b --atomic",
        "kubectl drain NODE",
        "scripts/no-such-script",
        "istioctl version",
        "make nothing",
    ],
)
def test_a_command_that_does_not_exist_is_noticed(line: str) -> None:
    with pytest.raises(programs.WrongCommandError):
        programs.check(line)


@pytest.mark.parametrize(("page", "link"), each("links"))
def test_every_link_resolves(page: Page, link: str) -> None:
    path, _, fragment = link.partition("#")
    target = (page.path.parent / path).resolve() if path else page.path
    assert target.exists(), link
    assert not fragment or fragment in Page(target).anchors(), link


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.path.stem)
def test_every_name_exists(page: Page) -> None:
    wrong = []
    for span in page.spans():
        if (setting := SETTING.match(span)) and setting[1] not in names.VARIABLES | NOT_SETTINGS | _labels_of_results():
            wrong.append(f"setting {span}")
        if REASON.match(span) and span not in names.REASONS | OTHER_REASONS:
            wrong.append(f"reason {span}")
        if (value := CHART_VALUE.match(span)) and _is_meant_as_value(span) and not programs.is_chart_value(value[1]):
            wrong.append(f"chart value {span}")
        wrong += names.wrong_names(span)
    assert not wrong


def _labels_of_results() -> set[str]:
    return {word for metric in names.BY_NAME.values() for word in re.findall(r"[A-Z_]{5,}", metric.values)}


def _is_meant_as_value(span: str) -> bool:
    """Chart values are camelCase, or have dots or `=`; files, other charts' values and verbs do not count."""
    name = span.partition("=")[0]
    looks = bool(re.search(r"[a-z][A-Z]", name)) or ("." in name and "=" in span) or "=" in span
    is_file = Path(name).suffix in (".md", ".yaml", ".json")
    return looks and not is_file and name not in OTHER_VALUES


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.path.stem)
def test_blocks_are_of_known_kinds(page: Page) -> None:
    assert page.kinds() <= {"", "status", "output", "log", "yaml", "promql"}


@pytest.mark.parametrize(
    ("page", "block"),
    [
        pytest.param(page, block, id=f"{page.path.stem}-{number}")
        for page in pages()
        for number, block in enumerate(page.blocks("status"))
    ],
)
def test_examples_of_the_status_have_only_what_it_prints(page: Page, block: str) -> None:
    in_table = False
    for line in block.splitlines():
        words = tuple(re.split(r" {2,}", line.strip()))
        if words in {tuple(POD_HEADER), tuple(SIDECAR_HEADER), ADD_HEADER}:
            in_table = True
        elif not line:
            in_table = False
        elif not in_table and not line.startswith(" "):
            assert line[:10].strip() in LABELS, line


def test_the_labels_of_the_status_are_known() -> None:
    assert {"agent", "ready", "host rules", "sidecars", "repair", "contested", "kernel", "ztunnel"} <= LABELS


# --- by symptom -------------------------------------------------------------------------------------------------------

PAINS = [section for section in TROUBLESHOOTING.sections() if re.match(r"P\d+ ", section.title)]


def test_there_is_a_section_for_every_pain_in_order() -> None:
    assert [int(section.title.split()[0][1:]) for section in PAINS] == list(range(1, 31))


@pytest.mark.parametrize("section", PAINS, ids=lambda section: section.title.split()[0])
def test_a_section_has_symptom_command_output_and_remedy(section: Section) -> None:
    symptom, remedy = section.text.find("**Symptom.**"), section.text.find("**Remedy.**")
    assert 0 <= symptom < remedy
    shown = section.text[symptom:remedy]
    assert "\n```\n" in shown, "a command"
    assert re.search(r"^```(status|output|log)$", shown, re.MULTILINE) or section.title.startswith("P30 "), (
        "what it prints"
    )
    assert len(section.text[remedy:].split()) > 10


def test_anchors_are_made_as_repository_hosts_make_them() -> None:
    assert anchor("P12 Pods start slowly, or the error speaks of the xtables lock") == (
        "p12-pods-start-slowly-or-the-error-speaks-of-the-xtables-lock"
    )
    assert anchor("ClusterRole `istio-cni`") == "clusterrole-istio-cni"
