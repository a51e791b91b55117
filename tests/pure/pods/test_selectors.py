"""Label selectors and the list that says which pods are ambient."""

from __future__ import annotations

from typing import Any

import pytest

from meshcni.errors import SettingError
from meshcni.pods.selectors import (
    EnablementSelector,
    LabelSelector,
    parse_enablement_selectors,
    parse_label_selector,
    to_objects,
)

CHART_DEFAULT: list[dict[str, Any]] = [
    {"podSelector": {"matchLabels": {"istio.io/dataplane-mode": "ambient"}}},
    {
        "podSelector": {
            "matchExpressions": [{"key": "istio.io/dataplane-mode", "operator": "NotIn", "values": ["none"]}]
        },
        "namespaceSelector": {"matchLabels": {"istio.io/dataplane-mode": "ambient"}},
    },
]

MATCHES: dict[str, tuple[dict[str, Any] | None, dict[str, str], bool]] = {
    "null takes all": (None, {"a": "b"}, True),
    "empty takes all": ({}, {}, True),
    "label equal": ({"matchLabels": {"a": "1"}}, {"a": "1", "b": "2"}, True),
    "label other": ({"matchLabels": {"a": "1"}}, {"a": "2"}, False),
    "label missing": ({"matchLabels": {"a": "1"}}, {}, False),
    "empty value is not a missing label": ({"matchLabels": {"a": ""}}, {}, False),
    "empty value": ({"matchLabels": {"a": ""}}, {"a": ""}, True),
    "both labels are needed": ({"matchLabels": {"a": "1", "b": "2"}}, {"a": "1"}, False),
    "In, among": ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1", "2"]}]}, {"a": "2"}, True),
    "In, not among": ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1"]}]}, {"a": "2"}, False),
    "In, missing": ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1"]}]}, {}, False),
    "NotIn, among": ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, {"a": "1"}, False),
    "NotIn, not among": ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, {"a": "2"}, True),
    "NotIn, missing": ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, {}, True),
    "Exists": ({"matchExpressions": [{"key": "a", "operator": "Exists"}]}, {"a": ""}, True),
    "Exists, missing": ({"matchExpressions": [{"key": "a", "operator": "Exists"}]}, {"b": ""}, False),
    "DoesNotExist": ({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, {"a": ""}, False),
    "DoesNotExist, missing": ({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, {}, True),
    "labels and expressions": (
        {"matchLabels": {"a": "1"}, "matchExpressions": [{"key": "b", "operator": "Exists"}]},
        {"a": "1"},
        False,
    ),
}


@pytest.mark.parametrize(("selector", "labels", "expected"), MATCHES.values(), ids=MATCHES)
def test_matches(selector: dict[str, Any] | None, labels: dict[str, str], expected: bool) -> None:
    assert parse_label_selector(selector, "s").matches(labels) is expected


@pytest.mark.parametrize("selector", [None, {}, {"matchLabels": None}, {"matchExpressions": []}])
def test_an_empty_selector_knows_that_it_is(selector: dict[str, Any] | None) -> None:
    assert parse_label_selector(selector, "s").is_empty


def expression(**fields: object) -> dict[str, Any]:
    return {"matchExpressions": [fields]}


REFUSED: dict[str, tuple[object, str]] = {
    "no object": ("a=b", "s is 'a=b', expected an object"),
    "unknown field": ({"matchLabel": {}}, "unknown field 'matchLabel'"),
    "labels no object": ({"matchLabels": ["a"]}, "s.matchLabels is ['a'], expected an object"),
    "expressions no list": ({"matchExpressions": {"a": 1}}, "s.matchExpressions is {'a': 1}, expected a list"),
    "expression no object": ({"matchExpressions": ["a"]}, "s.matchExpressions[0] is 'a', expected an object"),
    "operator missing": (expression(key="a"), "s.matchExpressions[0].operator is None"),
    "operator unknown": (expression(key="a", operator="in"), "operator is 'in'"),
    "In without values": (expression(key="a", operator="In"), "operator In with 0 values"),
    "NotIn without values": (expression(key="a", operator="NotIn", values=[]), "operator NotIn with 0 values"),
    "Exists with values": (expression(key="a", operator="Exists", values=["1"]), "operator Exists with 1 values"),
    "values no list": (expression(key="a", operator="In", values="b"), "values is 'b', expected a list"),
    "key missing": (expression(operator="Exists"), "'' is no label key"),
    "key wrong": ({"matchLabels": {"a b": "1"}}, "'a b' is no label key"),
    "key with a wrong domain": ({"matchLabels": {"Istio_io/x": "1"}}, "'Istio_io/x' is no label key"),
    "key with two slashes": ({"matchLabels": {"a/b/c": "1"}}, "is no label key"),
    "value wrong": ({"matchLabels": {"a": "b c"}}, "s.matchLabels[a]: 'b c' is no label value"),
    "value too long": ({"matchLabels": {"a": "b" * 64}}, "is no label value"),
    "value null": ({"matchLabels": {"a": None}}, "expected a string"),
}


@pytest.mark.parametrize(("selector", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses(selector: object, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        parse_label_selector(selector, "s")
    assert message in caught.value.message


def test_names_in_any_case_and_unquoted_scalars_are_read_as_go_reads_them() -> None:
    assert parse_label_selector({"MATCHLABELS": {"a": True, "b": 1}}, "s") == LabelSelector((("a", "true"), ("b", "1")))


@pytest.mark.parametrize("objects", [None, []])
def test_no_selector_at_all(objects: object) -> None:
    assert parse_enablement_selectors(objects) == ()


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"podSelector": {}}, "AMBIENT_ENABLEMENT_SELECTOR is {'podSelector': {}}, expected a list"),
        ("x", "AMBIENT_ENABLEMENT_SELECTOR is 'x', expected a list"),
        (["x"], "AMBIENT_ENABLEMENT_SELECTOR[0] is 'x', expected an object"),
        ([{}, {"podSelectors": {}}], "AMBIENT_ENABLEMENT_SELECTOR[1] has the unknown field 'podSelectors'"),
        ([{"podSelector": {"matchLabels": 1}}], "AMBIENT_ENABLEMENT_SELECTOR[0].podSelector.matchLabels is 1"),
    ],
)
def test_a_list_that_is_none(objects: object, message: str) -> None:
    with pytest.raises(SettingError) as caught:
        parse_enablement_selectors(objects)
    assert message in caught.value.message


def test_the_conf_carries_both_selectors_always() -> None:
    assert to_objects(parse_enablement_selectors(CHART_DEFAULT)) == [
        {"podSelector": CHART_DEFAULT[0]["podSelector"], "namespaceSelector": {}},
        CHART_DEFAULT[1],
    ]
    assert to_objects([EnablementSelector()]) == [{"podSelector": {}, "namespaceSelector": {}}]


def test_what_the_conf_carries_reads_back_the_same() -> None:
    selectors = parse_enablement_selectors(
        [
            *CHART_DEFAULT,
            {"namespaceSelector": {"matchExpressions": [{"key": "x", "operator": "Exists"}], "matchLabels": {"b": ""}}},
        ]
    )
    assert parse_enablement_selectors(to_objects(selectors)) == selectors
