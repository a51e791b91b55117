"""Which pods repair is to look at: selectors as text, evaluated here where that can be done."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.pods.model import Pod
from meshcni.pods.selectorsyntax import parse_field_text, parse_label_text, parse_selection

POD = Pod(
    namespace="shop",
    name="cart",
    labels={"app": "web", "tier": "front", "example.org/team": "a", "empty": ""},
    node_name="n1",
    phase="Pending",
    ips=("10.0.0.7", "fd00::7"),
    service_account="default",
    restart_policy="Always",
)

LABELS = [
    ("", True),
    (" , ,", True),
    ("app", True),
    ("!app", False),
    ("! missing", True),
    ("missing", False),
    ("app=web", True),
    ("app == web", True),
    ("app!=web", False),
    ("missing != web", True),
    ("empty=", True),
    ("app=", False),
    ("app in (web, db)", True),
    ("app in(web)", True),
    ("app notin (web, db)", False),
    ("missing notin (web)", True),
    ("empty in (,a)", True),
    ("example.org/team=a,tier=front,!x", True),
    ("example.org/team=a,tier=back", False),
    ("app in (a,b),tier=front", False),
    ("in", False),
    ("notin=1", False),
]


@pytest.mark.parametrize(("text", "matches"), LABELS)
def test_label_selectors(text: str, matches: bool) -> None:
    selection = parse_selection(text, "")
    assert selection.matches(POD) is matches
    assert selection.needs_server == ()


@pytest.mark.parametrize(
    "text", ["a b", "a=b=c", "a in web", "a in (b", "=b", "-a", "a=-b", "a in ()b", "(a)", "a>x", "x//y=1", "a=(b)"]
)
def test_label_selectors_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        parse_label_text(text)


def test_a_comparison_is_left_to_the_server() -> None:
    selection = parse_selection("priority>3, app=web, weight < -2", "")
    assert selection.needs_server == ("priority>3", "weight < -2")
    assert selection.matches(POD)


FIELDS = [
    ("", True),
    ("metadata.name=cart", True),
    ("metadata.name==cart", True),
    ("metadata.name!=cart", False),
    ("metadata.namespace!=kube-system, metadata.namespace != istio-system", True),
    ("metadata.namespace=kube-system", False),
    ("spec.nodeName=n1", True),
    ("status.phase=Pending", True),
    ("status.phase!=Pending", False),
    ("status.podIP=10.0.0.7", True),
    ("status.podIP=", False),
    ("spec.serviceAccountName=default", True),
    ("spec.restartPolicy=Never", False),
    ("spec.hostNetwork=false", True),
]


@pytest.mark.parametrize(("text", "matches"), FIELDS)
def test_field_selectors(text: str, matches: bool) -> None:
    selection = parse_selection("", text)
    assert selection.matches(POD) is matches
    assert selection.needs_server == ()


def test_a_field_that_is_not_in_our_projection_is_left_to_the_server() -> None:
    selection = parse_selection("", "spec.schedulerName=x,metadata.name=cart,status.nominatedNodeName!=n2")
    assert selection.needs_server == ("spec.schedulerName", "status.nominatedNodeName")
    assert selection.matches(POD)


@pytest.mark.parametrize(("text", "named"), [("spec.nodename=n1", "spec.nodename"), ("metadata.name", "is no cond")])
def test_field_selectors_that_are_none(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse_field_text(text)


@given(st.text(max_size=30), st.text(max_size=30))
def test_whatever_is_written_is_read_or_refused(labels: str, fields: str) -> None:
    try:
        selection = parse_selection(labels, fields)
    except ValueError:
        return
    selection.matches(POD)


NAMES = st.from_regex(r"[a-z]([a-z0-9-]{0,8}[a-z0-9])?", fullmatch=True)


@given(st.dictionaries(NAMES, NAMES, min_size=1, max_size=4), st.data())
def test_a_pod_is_selected_by_each_of_its_own_labels(labels: dict[str, str], data: st.DataObject) -> None:
    pod = Pod("a", "b", labels=labels)
    key = data.draw(st.sampled_from(sorted(labels)))
    others = data.draw(st.lists(NAMES, max_size=2))
    among = ",".join([*others, labels[key]])
    for text in (key, f"{key}={labels[key]}", f"{key} in ({among})"):
        assert parse_selection(text, "").matches(pod)
    for text in (f"!{key}", f"{key}!={labels[key]}", f"{key} notin ({among})"):
        assert not parse_selection(text, "").matches(pod)
