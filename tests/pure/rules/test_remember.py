"""Which results are remembered."""

from __future__ import annotations

from dataclasses import replace

from meshcni.pods.interception import Interception, NumberRange
from meshcni.rules import iptables, nft, plan
from meshcni.rules.model import Backend, Family, Ruleset
from meshcni.rules.remember import USUAL_SIZE, remembered
from meshcni.rules.sidecar import sidecar_ruleset


class Box:
    def __init__(self, size: int) -> None:
        self.size = size


def test_only_what_has_a_usual_size_is_remembered() -> None:
    made: list[int] = []

    @remembered
    def make(box: Box, *, twice: bool = False) -> int:
        made.append(box.size)
        return box.size * (2 if twice else 1)

    usual, large = Box(USUAL_SIZE), Box(USUAL_SIZE + 1)
    assert [make(usual), make(usual), make(usual, twice=True)] == [USUAL_SIZE, USUAL_SIZE, 2 * USUAL_SIZE]
    assert [make(large), make(large)] == [USUAL_SIZE + 1] * 2
    assert made == [USUAL_SIZE, USUAL_SIZE, USUAL_SIZE + 1, USUAL_SIZE + 1]


def ruleset(ports: int) -> Ruleset:
    listed = tuple(NumberRange.single(port) for port in range(1, ports + 1))
    return sidecar_ruleset(
        replace(Interception(), outbound_exclude_ports=listed), frozenset({Family.V4}), Backend.IPTABLES
    )


def test_nothing_of_a_large_rule_set_is_kept() -> None:
    usual, large = ruleset(3), ruleset(USUAL_SIZE)
    assert ruleset(3) is usual
    assert nft.render(usual) is nft.render(usual)
    assert ruleset(USUAL_SIZE) is not large
    for make in (nft.render, nft.expected, plan.digest):
        assert make(large) is not make(large), make
    for make_family in (iptables.render, iptables.expected):
        assert make_family(large, Family.V4) is not make_family(large, Family.V4), make_family
