"""The contract of a packet backend: one set of tests for the three real ones and the fake."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from tests.kernel.world import KIND, VARIANTS, make_pod

from meshcni.errors import ApplyError
from meshcni.host.backends import PacketBackend
from meshcni.host.backends.fake import FakeBackend
from meshcni.host.backends.iptables import IptablesBackend, find_tools
from meshcni.host.backends.nftables import NftablesBackend
from meshcni.host.redirection import program
from meshcni.pods.interception import Interception, InterceptionMode
from meshcni.rules.model import Backend, Family, Jump, Rule, Ruleset
from meshcni.rules.sidecar import sidecar_ruleset

BOTH = frozenset(Family)


class Subject:
    """A backend in a namespace; a new object for each operation, as each ADD makes one."""

    def __init__(self, variant: str) -> None:
        self.kind = KIND.get(variant, Backend.NFTABLES)
        self.pod = make_pod()
        self._variant = variant
        self._fake = FakeBackend()

    def backend(self) -> PacketBackend:
        if self._variant == "fake":
            return self._fake
        if self._variant == "nftables":
            return NftablesBackend()
        tools = find_tools(self._variant)
        assert tools is not None
        return IptablesBackend(tools)

    def rules(self, parameters: Interception) -> Ruleset:
        return sidecar_ruleset(parameters, BOTH, self.kind)

    def apply(self, ruleset: Ruleset, *, keep_on_failure: bool = False) -> bool:
        return self.pod.call(lambda: self.backend().apply(ruleset, keep_on_failure=keep_on_failure))

    def drift(self, ruleset: Ruleset) -> int:
        return len(self.pod.call(lambda: self.backend().drift(ruleset)))

    def missing(self, ruleset: Ruleset) -> tuple[str, ...]:
        return self.pod.call(lambda: self.backend().missing(ruleset))

    def holds_ours(self) -> bool:
        return self.pod.call(lambda: self.backend().holds_ours())

    def own_names(self) -> tuple[str, ...]:
        return self.pod.call(lambda: self.backend().own_names())

    def release(self) -> None:
        self.pod.call(lambda: self.backend().release())

    def listing(self) -> str:
        return self.pod.call(lambda: self.backend().listing())

    def remove(self, known: Ruleset | None = None) -> None:
        self.pod.call(lambda: self.backend().remove(known))


@pytest.fixture(params=[*VARIANTS, "fake"])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    made = Subject(str(request.param))
    yield made
    made.pod.close()


def test_what_is_released_translates_nothing_and_keeps_its_chains(subject: Subject) -> None:
    rules = subject.rules(Interception())
    subject.apply(rules)
    names = subject.own_names()
    subject.release()
    assert subject.own_names() == names
    assert not subject.missing(rules)
    assert subject.drift(rules)
    assert "redirect" not in subject.listing().lower().replace("istio-redirect", "").replace(
        "istio_redirect", ""
    ).replace("istio-in-redirect", "").replace("istio_in_redirect", "")
    subject.release()  # again: there is nothing to do
    assert subject.apply(rules)
    assert not subject.drift(rules)


def test_life_of_a_rule_set(subject: Subject) -> None:
    first = subject.rules(Interception())
    second = subject.rules(Interception(mode=InterceptionMode.TPROXY, redirect_dns=True, capture_all_dns=True))
    assert not subject.holds_ours()
    assert subject.drift(first) > 0
    assert subject.missing(first) != ()

    assert subject.apply(first)
    assert subject.holds_ours()
    assert (subject.drift(first), subject.missing(first)) == (0, ())
    assert subject.drift(second) > 0
    assert subject.missing(second) != ()
    assert not subject.apply(first)

    assert subject.apply(second)
    assert (subject.drift(second), subject.missing(second)) == (0, ())
    assert subject.apply(first)
    assert (subject.drift(first), subject.missing(first)) == (0, ())
    listed = subject.listing().lower().replace("_", "-")
    assert "istio-output" in listed

    subject.remove()
    assert not subject.holds_ours()
    assert subject.drift(first) > 0
    subject.remove(first)
    assert "istio-" not in subject.listing().lower().replace("_", "-")


def test_name_and_processes(subject: Subject) -> None:
    backend = subject.backend()
    assert backend.variant in (*VARIANTS, "fake")
    assert backend.processes == 0


def test_program_reports(subject: Subject) -> None:
    rules = subject.rules(Interception())
    applied = subject.pod.call(lambda: program(rules, subject.kind, subject.backend()))
    assert (applied.changed, applied.families, applied.backend) == (True, BOTH, subject.kind)
    assert len(applied.digest) == 16
    again = subject.pod.call(lambda: program(rules, subject.kind, subject.backend()))
    assert (again.changed, again.digest) == (False, applied.digest)


def with_dangling_jump(rules: Ruleset) -> Ruleset:
    """Return `rules` with one more, which no kernel takes: a jump into a chain that does not exist."""
    table, *tables = rules.tables
    chain, *chains = table.chains
    jump = Rule((), Jump("ISTIO_NOWHERE"), "Into the blue.")
    broken = replace(table, chains=(replace(chain, rules=(*chain.rules, jump)), *chains))
    return replace(rules, tables=(broken, *tables))


@pytest.mark.parametrize("was_there", [False, True], ids=["fresh", "over an earlier state"])
def test_a_refusal_leaves_nothing(was_there: bool, subject: Subject) -> None:
    rules = subject.rules(Interception())
    if was_there:
        subject.apply(rules)

    with pytest.raises(ApplyError):
        subject.apply(with_dangling_jump(rules))

    assert not subject.holds_ours()
    assert subject.drift(rules) > 0


@pytest.mark.parametrize("was_there", [False, True], ids=["fresh", "over an earlier state"])
def test_a_refusal_can_leave_what_was_there(was_there: bool, subject: Subject) -> None:
    rules = subject.rules(Interception())
    if was_there:
        subject.apply(rules)
    names = subject.own_names()

    with pytest.raises(ApplyError):
        subject.apply(with_dangling_jump(rules), keep_on_failure=True)

    assert (subject.holds_ours(), subject.own_names()) == (was_there, names)
    assert (subject.drift(rules) == 0) is was_there


def test_what_is_ours_has_names(subject: Subject) -> None:
    assert subject.own_names() == ()
    subject.apply(subject.rules(Interception()))
    assert len(subject.own_names()) > 0
    subject.remove()
    assert subject.own_names() == ()
