"""The tables of enrolment: each row, the order, what a failure means, what a fresh agent and a new sandbox leave."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from meshcni.pods.eligibility import Verdict
from meshcni.pods.enrollment import (
    NOTHING,
    TABLES,
    UNDO,
    Actual,
    Annotation,
    Desired,
    Intent,
    Life,
    NetnsId,
    Row,
    Step,
    adopted,
    after,
    annotation_of,
    begun,
    in_new_sandbox,
    intent_of,
    is_captured,
    is_desired,
    is_named,
    next_row,
    seen,
    undoes,
)
from meshcni.pods.model import Pod

HERE, ELSEWHERE = NetnsId(4, 11), NetnsId(4, 12)
FIRST, SECOND = frozenset({IPv4Address("10.0.0.1")}), frozenset({IPv4Address("10.0.0.2")})

STARTING = Desired(Intent.ENROLL, Life.STARTING, HERE, "wanted", FIRST)
RUNNING = replace(STARTING, life=Life.RUNNING)
LOST = replace(RUNNING, netns=None)  # an agent has just started
LEAVING = replace(RUNNING, intent=Intent.LEAVE)
ENDED = replace(RUNNING, life=Life.ENDED)
IN_PLACE = Actual(
    routes=True,
    rules="wanted",
    touched=True,
    acked=HERE,
    announced=True,
    addresses=FIRST,
    annotation=Annotation.ENABLED,
    enrolled=True,
)


def play(
    desired: Desired, actual: Actual, *, undoing: bool = False, fails: frozenset[Step] = frozenset()
) -> list[Step]:
    """The steps of one pass."""
    steps: list[Step] = []
    while (row := next_row(desired, actual, undoing=undoing, failed=fails & set(steps))) is not None:
        steps.append(row.step)
        assert len(steps) <= len(Step), steps
        actual = begun(row.step, actual)
        if row.step in fails:
            continue
        if row.step is Step.FIND_NETNS:
            desired = replace(desired, netns=HERE)
        actual = after(row.step, desired, actual)
    return steps


ENROLS = [Step.PEND, Step.ROUTES, Step.ADD, Step.RULES, Step.ADDRESSES, Step.ENABLE]
LEAVES = [Step.RELEASE, Step.PEND, Step.DEL, Step.REMOVE_RULES, Step.WITHDRAW, Step.REMOVE_ADDRESSES]
ENDS = [Step.REMOVE_ADDRESSES, Step.DEL, Step.WITHDRAW]

ORDERS: dict[str, tuple[Desired, Actual, list[Step]]] = {
    "starting": (STARTING, NOTHING, [Step.RULES, Step.ADD, Step.ADDRESSES, Step.ENABLE]),
    "starting anew, annotated": (
        STARTING,
        in_new_sandbox(replace(IN_PLACE, acked=ELSEWHERE), by_add=True),
        [Step.RULES, Step.ADD],  # the address is the same, the annotation too
    ),
    "starting without an address": (
        replace(STARTING, addresses=frozenset()),
        NOTHING,
        [Step.RULES, Step.ADD, Step.ENABLE],
    ),
    "starting before the API has it": (
        replace(STARTING, in_api=False),
        NOTHING,
        [Step.RULES, Step.ADD, Step.ADDRESSES],
    ),
    "running, newly selected": (RUNNING, NOTHING, ENROLS),
    "running, netns unknown": (LOST, NOTHING, [Step.FIND_NETNS, *ENROLS]),
    "running, no address yet": (replace(LOST, addresses=frozenset()), NOTHING, []),
    "in place": (RUNNING, IN_PLACE, []),
    "adopted, enabled": (
        LOST,
        adopted(Annotation.ENABLED),
        [Step.FIND_NETNS, Step.ADD, Step.RULES, Step.ADDRESSES],
    ),
    "adopted, pending": (
        LOST,
        adopted(Annotation.PENDING),
        [Step.FIND_NETNS, Step.LOOK, Step.ROUTES, Step.ADD, Step.RULES, Step.ADDRESSES, Step.ENABLE],
    ),
    "adopted, selected": (LOST, adopted(Annotation.ABSENT, belongs=True), [Step.FIND_NETNS, Step.LOOK, *ENROLS]),
    "tampered": (RUNNING, replace(IN_PLACE, rules=""), [Step.RULES]),
    "parameters edited": (replace(RUNNING, rules="others"), IN_PLACE, [Step.RULES]),
    "ztunnel is another": (RUNNING, replace(IN_PLACE, acked=None), [Step.ADD]),
    "ztunnel has another netns": (RUNNING, replace(IN_PLACE, acked=ELSEWHERE), [Step.ADD]),
    "other address": (replace(RUNNING, addresses=SECOND), IN_PLACE, [Step.ADDRESSES]),
    "address gone from the API": (replace(RUNNING, addresses=frozenset()), IN_PLACE, []),
    "annotation taken away by others": (RUNNING, replace(IN_PLACE, annotation=Annotation.ABSENT), [Step.ENABLE]),
    "sandbox made anew without us": (
        RUNNING,
        in_new_sandbox(replace(IN_PLACE, acked=ELSEWHERE), by_add=False),
        [Step.ADD, Step.RULES],
    ),
    "leaving": (LEAVING, IN_PLACE, LEAVES),
    "leaving, netns unknown": (
        replace(LEAVING, netns=None),
        adopted(Annotation.ENABLED),
        [Step.FIND_NETNS, *LEAVES],
    ),
    "leaving, pending": (
        LEAVING,
        replace(adopted(Annotation.PENDING)),
        [one for one in LEAVES if one is not Step.PEND],
    ),
    "leaving without an address": (
        replace(LEAVING, netns=None, addresses=frozenset()),
        adopted(Annotation.ENABLED),
        [Step.PEND, Step.DEL, Step.WITHDRAW, Step.REMOVE_ADDRESSES],
    ),
    "leaving, let go of already": (
        LEAVING,
        replace(IN_PLACE, rules="", released=True, enrolled=False),
        LEAVES[1:],
    ),
    "leaving, never was in": (LEAVING, NOTHING, []),
    "left while it started": (
        replace(LEAVING, life=Life.STARTING),
        replace(NOTHING, rules="wanted", touched=True),
        [Step.RELEASE, Step.REMOVE_RULES],
    ),
    "ended": (ENDED, IN_PLACE, ENDS),
    "ended and not selected": (replace(ENDED, intent=Intent.LEAVE), IN_PLACE, ENDS),
    "ended, adopted": (replace(ENDED, netns=None), adopted(Annotation.PENDING), ENDS),
    "deleted": (replace(ENDED, in_api=False), IN_PLACE, ENDS[:2]),
}


@pytest.mark.parametrize(("desired", "actual", "steps"), ORDERS.values(), ids=ORDERS)
def test_order(desired: Desired, actual: Actual, steps: list[Step]) -> None:
    assert play(desired, actual) == steps
    assert is_desired(desired, actual) is (steps == [])


FAILURES: dict[str, tuple[Desired, Actual, set[Step], list[Step]]] = {
    # What is needed and cannot be had holds up the rest; a step that has failed is not tried again in the same pass.
    "enrolling, netns not found": (LOST, NOTHING, {Step.FIND_NETNS}, [Step.FIND_NETNS]),
    "enrolling, netns not readable": (
        LOST,
        adopted(Annotation.PENDING),
        {Step.LOOK},
        [Step.FIND_NETNS, Step.LOOK],
    ),
    "enrolling, API away": (RUNNING, NOTHING, {Step.PEND, Step.ENABLE}, ENROLS),
    "leaving, netns not found": (
        replace(LEAVING, netns=None),
        adopted(Annotation.ENABLED),
        {Step.FIND_NETNS},
        [Step.FIND_NETNS],
    ),
    "leaving, rules stay": (LEAVING, IN_PLACE, {Step.RELEASE}, LEAVES[:1]),
    "leaving, peers cannot be told": (LEAVING, IN_PLACE, {Step.PEND}, LEAVES[:2]),
    "leaving, ztunnel hangs": (LEAVING, IN_PLACE, {Step.DEL}, LEAVES),
    "leaving, the rest stays": (LEAVING, IN_PLACE, {Step.REMOVE_RULES}, LEAVES[:4]),
    "leaving, annotation stays": (LEAVING, IN_PLACE, {Step.WITHDRAW}, LEAVES),
    "ended, all of it fails": (ENDED, IN_PLACE, set(ENDS), ENDS),
    # An enrolled pod gets what can be had.
    "enrolled, ztunnel refuses": (
        LOST,
        adopted(Annotation.ENABLED),
        {Step.ADD},
        [Step.FIND_NETNS, Step.ADD, Step.RULES, Step.ADDRESSES],
    ),
    "enrolled, rules refused": (
        LOST,
        adopted(Annotation.ENABLED),
        {Step.RULES},
        [Step.FIND_NETNS, Step.ADD, Step.RULES, Step.ADDRESSES],
    ),
    "enrolled but not annotated, ztunnel refuses": (
        RUNNING,
        replace(IN_PLACE, acked=None, annotation=Annotation.PENDING),
        {Step.ADD},
        [Step.ADD],  # not enabled
    ),
    "enrolled but not annotated, set refuses": (
        replace(RUNNING, addresses=SECOND),
        replace(IN_PLACE, annotation=Annotation.PENDING),
        {Step.ADDRESSES},
        [Step.ADDRESSES, Step.ENABLE],
    ),
}


@pytest.mark.parametrize(("desired", "actual", "fails", "steps"), FAILURES.values(), ids=FAILURES)
def test_failures_of_a_pass(desired: Desired, actual: Actual, fails: set[Step], steps: list[Step]) -> None:
    assert play(desired, actual, fails=frozenset(fails)) == steps


def rows() -> list[Row]:
    return [row for table in (*TABLES.values(), *UNDO.values()) for row in table]


def test_what_is_undone() -> None:
    undone = {Step.ROUTES, Step.ADD, Step.RULES, Step.ADDRESSES}
    assert {row.step for row in rows() if undoes(row, NOTHING)} == undone
    assert not any(undoes(row, IN_PLACE) for row in rows()), "an enrolled pod is never opened"


@pytest.mark.parametrize("step", [Step.ADD, Step.RULES, Step.ADDRESSES])
def test_what_failed_for_an_enrolled_pod_holds_up_one_that_is_not_any_more(step: Step) -> None:
    """A label that goes and comes back in the middle of a pass."""
    let_go = replace(IN_PLACE, rules="", acked=None, addresses=frozenset(), enrolled=False)
    following = {Step.ADD: None, Step.RULES: Step.ADD, Step.ADDRESSES: Step.ADD}
    row = next_row(RUNNING, let_go, failed={step})
    assert (row and row.step) is following[step]


BEGUN = replace(IN_PLACE, enrolled=False)
UNDONE: dict[str, tuple[Desired, Actual, set[Step], list[Step]]] = {
    "starting": (
        STARTING,
        replace(BEGUN, annotation=Annotation.ABSENT),
        set(),
        [Step.REMOVE_RULES, Step.DEL, Step.REMOVE_ADDRESSES],
    ),
    "starting, rules only": (STARTING, begun(Step.RULES, NOTHING), set(), [Step.REMOVE_RULES]),
    "starting, rules stay": (
        STARTING,
        BEGUN,
        {Step.REMOVE_RULES},
        [Step.REMOVE_RULES, Step.DEL, Step.REMOVE_ADDRESSES],  # the runtime throws the sandbox away
    ),
    "running": (
        RUNNING,
        replace(BEGUN, annotation=Annotation.PENDING),
        set(),
        [Step.REMOVE_RULES, Step.DEL, Step.REMOVE_ADDRESSES],
    ),
    "running, enabled before": (
        RUNNING,
        BEGUN,
        set(),
        [Step.REMOVE_RULES, Step.PEND, Step.DEL, Step.REMOVE_ADDRESSES],
    ),
    "running, rules stay": (RUNNING, BEGUN, {Step.REMOVE_RULES}, [Step.REMOVE_RULES]),
    "running, routes only": (RUNNING, begun(Step.ROUTES, NOTHING), set(), [Step.REMOVE_RULES]),
    "running, add only": (RUNNING, begun(Step.ADD, NOTHING), set(), [Step.DEL]),
    "running, addresses in doubt": (RUNNING, begun(Step.ADDRESSES, NOTHING), set(), [Step.REMOVE_ADDRESSES]),
    "nothing done": (RUNNING, NOTHING, set(), []),
    "ended meanwhile": (ENDED, BEGUN, set(), ENDS),
}


@pytest.mark.parametrize(("desired", "actual", "fails", "steps"), UNDONE.values(), ids=UNDONE)
def test_undoing(desired: Desired, actual: Actual, fails: set[Step], steps: list[Step]) -> None:
    assert play(desired, actual, undoing=True, fails=frozenset(fails)) == steps


@pytest.mark.parametrize(("intent", "life"), TABLES)
def test_every_table_ends(intent: Intent, life: Life) -> None:
    for actual in (NOTHING, IN_PLACE, *(adopted(one, belongs=True) for one in Annotation)):
        desired = replace(RUNNING, intent=intent, life=life)
        assert play(desired, actual, fails=frozenset(Step)) is not None
        assert len(set(play(desired, actual))) == len(play(desired, actual)), "a step is repeated"


# --- ztunnel ----------------------------------------------------------------------------------------------------------


def test_an_enrolled_pod_waits_for_the_snapshot() -> None:
    lost = replace(IN_PLACE, acked=None)
    assert next_row(RUNNING, lost, settled=False) is None
    assert is_desired(RUNNING, lost, settled=False)
    assert play(RUNNING, lost) == [Step.ADD]


def test_a_pod_that_is_not_enrolled_does_not_wait_for_the_snapshot() -> None:
    row = next_row(RUNNING, replace(NOTHING, routes=True, annotation=Annotation.PENDING), settled=False)
    assert row is not None
    assert row.step is Step.ADD


NAMED: dict[str, tuple[Desired, Actual, bool, bool]] = {
    "enrolled": (RUNNING, IN_PLACE, False, True),
    "enrolled, netns unknown": (LOST, adopted(Annotation.ENABLED), False, True),
    "adopted, pending": (LOST, adopted(Annotation.PENDING), False, True),
    "adopted, selected": (LOST, adopted(Annotation.ABSENT, belongs=True), False, True),
    "never announced": (RUNNING, NOTHING, False, False),
    "an Add is under way": (RUNNING, begun(Step.ADD, NOTHING), False, True),
    "a sandbox without rules": (STARTING, in_new_sandbox(IN_PLACE, by_add=True), False, False),
    "a sandbox with rules": (STARTING, replace(IN_PLACE, acked=None, enrolled=False), False, True),
    "leaving, captured": (LEAVING, IN_PLACE, False, True),
    "leaving, peers still come": (LEAVING, after(Step.RELEASE, LEAVING, IN_PLACE), False, True),
    "leaving, a Del is next": (
        LEAVING,
        replace(after(Step.RELEASE, LEAVING, IN_PLACE), annotation=Annotation.PENDING),
        False,
        False,
    ),
    "undone, rules still there": (RUNNING, BEGUN, True, True),
    "undone, a Del is next": (RUNNING, replace(NOTHING, announced=True), True, False),
    "ended": (ENDED, IN_PLACE, False, False),
}


@pytest.mark.parametrize(("desired", "actual", "undoing", "named"), NAMED.values(), ids=NAMED)
def test_named_in_a_snapshot(desired: Desired, actual: Actual, undoing: bool, named: bool) -> None:
    """Who is not named loses its listeners; who is named and gets no Del afterwards keeps them for ever."""
    assert is_named(desired, actual, undoing=undoing) is named


# --- captured ---------------------------------------------------------------------------------------------------------

MISSING: dict[str, tuple[Desired, Actual]] = {
    "rules": (RUNNING, replace(IN_PLACE, rules="")),
    "the wanted rules": (RUNNING, replace(IN_PLACE, rules="others")),
    "any wanted rules": (replace(RUNNING, rules=""), replace(IN_PLACE, rules="")),
    "the acknowledgement": (RUNNING, replace(IN_PLACE, acked=None)),
    "the acknowledgement of this netns": (RUNNING, replace(IN_PLACE, acked=ELSEWHERE)),
    "a netns": (LOST, replace(IN_PLACE, acked=None)),
    "an address in the set": (RUNNING, replace(IN_PLACE, addresses=frozenset())),
    "one of two addresses": (replace(RUNNING, addresses=FIRST | SECOND), IN_PLACE),
}


def test_captured() -> None:
    assert is_captured(RUNNING, IN_PLACE)
    assert is_captured(replace(RUNNING, addresses=frozenset()), replace(IN_PLACE, addresses=frozenset()))


@pytest.mark.parametrize(("desired", "actual"), MISSING.values(), ids=MISSING)
def test_not_captured(desired: Desired, actual: Actual) -> None:
    assert not is_captured(desired, actual)
    assert not after(Step.ROUTES, desired, replace(actual, enrolled=False)).enrolled


@pytest.mark.parametrize("step", [Step.ADD, Step.RULES, Step.ADDRESSES])
def test_enrolled_after_the_last_of_three(step: Step) -> None:
    missing = {
        Step.ADD: replace(IN_PLACE, acked=None, enrolled=False),
        Step.RULES: replace(IN_PLACE, rules="", enrolled=False),
        Step.ADDRESSES: replace(IN_PLACE, addresses=frozenset(), enrolled=False),
    }
    assert after(step, RUNNING, missing[step]) == IN_PLACE


@pytest.mark.parametrize("annotation", [Annotation.ABSENT, Annotation.PENDING])
def test_enabled_when_what_was_missing_came_by_itself(annotation: Annotation) -> None:
    """An acknowledgement by a snapshot, or an address that came back, is no step."""
    assert play(RUNNING, replace(IN_PLACE, annotation=annotation, enrolled=False))[-1] is Step.ENABLE


@pytest.mark.parametrize(("desired", "actual"), list(MISSING.values())[:6], ids=list(MISSING)[:6])
def test_never_enabled_without(desired: Desired, actual: Actual) -> None:
    """An address that the set lacks is another matter: peers do not go by it."""
    pending = replace(actual, annotation=Annotation.PENDING)
    fails = frozenset({Step.RULES, Step.ADD, Step.FIND_NETNS})
    assert Step.ENABLE not in play(desired, pending, fails=fails)


def test_other_wishes_while_a_step_was_under_way() -> None:
    """What was done is what was wanted when it began."""
    done = after(Step.RULES, replace(RUNNING, rules="older"), begun(Step.RULES, IN_PLACE))
    assert done.rules == "older"
    assert play(RUNNING, done) == [Step.RULES]


# --- what is assumed --------------------------------------------------------------------------------------------------

ASSUMED: dict[str, tuple[Annotation, bool, Actual]] = {
    "not ours": (Annotation.ABSENT, False, NOTHING),
    "enabled": (
        Annotation.ENABLED,
        False,
        Actual(touched=True, announced=True, claimed=True, annotation=Annotation.ENABLED, enrolled=True),
    ),
    "pending": (
        Annotation.PENDING,
        False,
        Actual(touched=True, unseen=True, announced=True, claimed=True, annotation=Annotation.PENDING),
    ),
    "selected": (
        Annotation.ABSENT,
        True,
        Actual(touched=True, unseen=True, announced=True, claimed=True),
    ),
}


@pytest.mark.parametrize(("annotation", "belongs", "actual"), ASSUMED.values(), ids=ASSUMED)
def test_adopted(annotation: Annotation, belongs: bool, actual: Actual) -> None:
    assert adopted(annotation, belongs=belongs) == actual


def test_what_was_looked_at_and_is_right_is_never_opened() -> None:
    found = seen(RUNNING, adopted(Annotation.PENDING))
    assert found.enrolled
    assert play(RUNNING, after(Step.LOOK, RUNNING, found)) == [Step.ADD, Step.ADDRESSES, Step.ENABLE]


@pytest.mark.parametrize("step", list(Step))
def test_a_step_that_is_begun_may_have_happened(step: Step) -> None:
    """Whatever a step puts somewhere is taken away by those who leave, were it begun and no more."""
    actual = begun(step, NOTHING)
    leaving = play(LEAVING, actual)
    undoing = play(RUNNING, actual, undoing=True)
    puts = {
        Step.ROUTES: Step.REMOVE_RULES,
        Step.RULES: Step.REMOVE_RULES,
        Step.ADD: Step.DEL,
        Step.ADDRESSES: Step.REMOVE_ADDRESSES,
    }
    if step in puts:
        assert puts[step] in leaving
        assert puts[step] in undoing


@pytest.mark.parametrize("step", [Step.RULES, Step.RELEASE, Step.REMOVE_RULES])
def test_rules_that_are_being_changed_are_not_known(step: Step) -> None:
    """A label that comes back after half a removal has the rules put in again."""
    assert Step.RULES in play(RUNNING, begun(step, IN_PLACE))
    assert begun(step, IN_PLACE).enrolled


@pytest.mark.parametrize("step", [Step.ADDRESSES, Step.REMOVE_ADDRESSES])
def test_addresses_that_are_being_changed_are_not_known(step: Step) -> None:
    assert play(RUNNING, begun(step, IN_PLACE)) == [Step.ADDRESSES]


def test_what_was_let_go_of_may_be_opened_until_rules_are_in_again() -> None:
    let_go = after(Step.RELEASE, LEAVING, IN_PLACE)
    assert (let_go.released, let_go.enrolled) == (True, False)
    assert not begun(Step.RULES, let_go).released, "it may capture again, so leaving has to let go of it again"
    assert after(Step.RULES, RUNNING, let_go) == IN_PLACE


def test_addresses_that_are_in_are_all_there_is() -> None:
    assert after(Step.ADDRESSES, RUNNING, begun(Step.ADDRESSES, IN_PLACE)) == IN_PLACE


def test_a_sandbox_by_an_add_knows_nothing_of_the_one_before() -> None:
    fresh = in_new_sandbox(replace(IN_PLACE, released=True, unseen=True), by_add=True)
    kept = Actual(acked=HERE, announced=True, addresses=FIRST, annotation=Annotation.ENABLED)
    assert fresh == kept


@pytest.mark.parametrize("enrolled", [True, False])
def test_a_sandbox_that_was_found_keeps_the_pod_closed(enrolled: bool) -> None:
    found = in_new_sandbox(replace(IN_PLACE, enrolled=enrolled), by_add=False)
    assert (found.rules, found.routes, found.enrolled, found.touched) == ("", False, enrolled, enrolled)


# --- what the API says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "annotation"),
    [
        (None, Annotation.ABSENT),
        ("", Annotation.ABSENT),
        ("enabled", Annotation.ENABLED),
        ("pending", Annotation.PENDING),
        ("Enabled", Annotation.ABSENT),
        ("disabled", Annotation.ABSENT),
        (" enabled", Annotation.ABSENT),
    ],
)
def test_annotation(text: str | None, annotation: Annotation) -> None:
    annotations = {} if text is None else {"ambient.istio.io/redirection": text}
    assert annotation_of(Pod("shop", "cart", annotations=annotations)) is annotation


@pytest.mark.parametrize(
    ("verdict", "is_ours", "intent"),
    [
        (Verdict.AMBIENT, False, Intent.ENROLL),
        (Verdict.AMBIENT, True, Intent.ENROLL),
        (Verdict.SKIP, True, Intent.LEAVE),
        (Verdict.SIDECAR, True, Intent.LEAVE),
        (Verdict.ERROR, True, Intent.ENROLL),
        (Verdict.ERROR, False, Intent.LEAVE),
    ],
)
def test_intent(verdict: Verdict, is_ours: bool, intent: Intent) -> None:
    """What is not known changes nothing."""
    assert intent_of(verdict, is_ours) is intent
