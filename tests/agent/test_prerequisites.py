"""When a missing right or mount is believed, what it stops, and how often the API server is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from meshcni.agent import hostmounts, prerequisites, rights
from meshcni.agent.hostmounts import Mount
from meshcni.agent.needs import Weight
from meshcni.agent.prerequisites import Prerequisites
from meshcni.agent.settings import Settings
from meshcni.kube.client import Resource
from meshcni.kube.failures import ApiError
from meshcni.pods.repair import Mode

SIDECAR = Settings(
    node_name="node", pod_name="pod", pod_namespace="mesh", kubernetes_service_host="10.0.0.1", service_account_dir="/"
)


class Api:
    """Answers reviews as a cluster whose role denies `denied`; `failure` is raised instead.

    With `patience` it answers as many questions in a row, and then one with `failure`.
    """

    def __init__(self, *denied: str) -> None:
        self.denied = set(denied)
        self.failure: Exception | None = None
        self.patience = 0
        self.questions: list[str] = []
        self._answered = 0

    @property
    def asked(self) -> int:
        return len(self.questions)

    async def may(
        self, verb: str, resource: Resource, *, subresource: str, name: str, namespace: str, timeout: float
    ) -> bool:
        target = "/".join(filter(None, (resource.plural, subresource)))
        self.questions.append(f"{verb} {target}")
        if self.failure is not None and self._answered >= self.patience:
            self._answered = 0
            raise self.failure
        self._answered += 1
        assert bool(namespace) == bool(name), "only what is named is asked for in one namespace"
        return not self.denied & {f"{verb} {target}", "*"}


class World:
    """Prerequisites on a clock that a test turns: each pause ends with the next step of the story."""

    def __init__(self, api: Api, *story: Callable[[], object], settings: Settings = SIDECAR, **given: Any) -> None:
        self.api = api
        self.story = list(story)
        self.informer: Any = SimpleNamespace(name="pods", state=SimpleNamespace(last_status=0))
        self.pauses: list[float] = []
        self.now = 0.0
        self.found = Prerequisites(
            settings,
            api,
            [self.informer],
            mounts=given.pop("mounts", ()),
            sleep=self._sleep,
            clock=lambda: self.now,
            **given,
        )

    async def _sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds
        if not self.story:
            raise EndOfStory
        self.story.pop(0)()

    def run(self) -> Prerequisites:
        async def play() -> None:
            with pytest.raises(EndOfStory):
                await self.found.run()

        asyncio.run(play())
        return self.found


class EndOfStory(Exception):
    """Nothing more happens."""


def mount(volume: str, settings: Settings = SIDECAR) -> Mount:
    found = next(one for one in hostmounts.wanted(settings) if one.volume == volume)
    return replace(found, why=f"{found.path} does not exist")


def test_all_is_there() -> None:
    world = World(Api())
    found = world.run()
    assert found.released.is_set()
    assert (found.reasons(), found.notes(), found.yaml(), found.as_object()) == ((), (), "", None)
    assert world.api.asked == len(found.rights)


def test_nobody_is_asked_again_while_all_is_well() -> None:
    world = World(Api(), *[lambda: None] * 500)
    world.run()
    assert world.api.asked == len(world.found.rights)


def test_refusals_at_the_start_are_believed_at_once_and_asked_for_until_granted() -> None:
    api = Api("*")
    world = World(api, lambda: None, lambda: None, lambda: api.denied.clear())
    states: list[bool] = []
    world.story.insert(1, lambda: states.append(world.found.released.is_set()))
    found = world.run()
    assert states == [False]
    assert found.released.is_set()
    assert found.reasons() == ()
    assert max(world.pauses) <= prerequisites.MAX_RETRY_SECONDS


def test_a_refusal_at_work_is_believed_the_second_time() -> None:
    """An API server that has just started refuses everybody for a second."""
    api = Api()

    def refuse() -> None:
        world.informer.state.last_status = 403
        api.denied.add("*")

    def answer() -> None:
        world.informer.state.last_status = 0
        api.denied.clear()

    world = World(api, refuse, answer, lambda: None)
    assert world.run().reasons() == ()
    seen: list[tuple[str, ...]] = []
    world = World(api, refuse, lambda: seen.append(world.found.reasons()), lambda: seen.append(world.found.reasons()))
    assert world.run().reasons()
    assert world.found.released.is_set(), "what was begun is not taken back"
    assert seen[0] == ()
    assert seen[1] != ()


def test_an_api_that_does_not_answer_is_no_reason() -> None:
    api = Api()
    api.failure = ApiError(0, "no connection")
    found = World(api).run()
    assert found.released.is_set()
    assert found.reasons() == ()


def test_an_api_that_goes_away_after_a_refusal_releases_nothing() -> None:
    api = Api("*")
    world = World(api, lambda: setattr(api, "failure", ApiError(0, "no connection")), lambda: None)
    found = world.run()
    assert not found.released.is_set()
    assert found.reasons()


# --- a review that does not come to its end ---------------------------------------------------------------------------

LATE = [TimeoutError(), ApiError(429, "too many requests"), ApiError(0, "no connection")]


def slow(failure: Exception, patience: int, *denied: str) -> Api:
    """One that answers `patience` questions of each review."""
    api = Api(*denied)
    api.failure, api.patience = failure, patience
    return api


@pytest.mark.parametrize("failure", LATE, ids=lambda failure: repr(failure))
def test_a_review_goes_on_where_it_ran_out_of_time(failure: Exception) -> None:
    api = slow(failure, 2)
    world = World(api, *[lambda: None] * 5)
    found = world.run()
    assert found.review == rights.Review()
    lost = (len(found.rights) - 1) // 2  # questions without an answer, one in each review but the last
    assert api.asked == len(found.rights) + lost
    assert len(dict.fromkeys(api.questions)) == len(found.rights)


def test_the_first_retry_comes_soon_and_later_ones_are_spread() -> None:
    pauses = []
    for _ in range(20):
        world = World(slow(TimeoutError(), 0), *[lambda: None] * 8)
        world.run()
        pauses.append(world.pauses)
    first, last = [one[0] for one in pauses], [one[-1] for one in pauses]
    least, longest = prerequisites.LEAST_OF_A_PAUSE, prerequisites.MAX_RETRY_SECONDS
    assert all(
        least * prerequisites.FIRST_RETRY_SECONDS <= pause <= prerequisites.FIRST_RETRY_SECONDS for pause in first
    )
    assert all(least * longest <= pause <= longest for pause in last)
    assert len(set(first)) > 1


def test_half_a_review_that_refuses_what_is_indispensable_releases_nothing() -> None:
    api = slow(TimeoutError(), 2, "list pods")
    world = World(api)
    found = world.run()
    assert not found.released.is_set()
    assert "list pods" in found.reasons()[0]
    assert not found.review.known


def test_half_a_review_says_nothing_of_what_only_degrades() -> None:
    api = slow(TimeoutError(), 4, "create events")
    found = World(api, settings=replace(SIDECAR, repair_enabled=False)).run()
    assert found.released.is_set()
    assert (found.notes(), found.review.known) == ((), False)


def test_half_a_review_at_work_takes_nothing_back() -> None:
    api = Api()

    def doubt() -> None:
        world.informer.state.last_status = 403
        api.denied.add("*")
        api.failure, api.patience = TimeoutError(), 2

    world = World(api, doubt, lambda: None)
    found = world.run()
    assert found.released.is_set()
    assert found.reasons() == ()


def test_only_what_is_refused_is_asked_for_until_it_is_granted() -> None:
    api = Api("watch pods")
    world = World(api, lambda: None, api.denied.clear, lambda: None)
    found = world.run()
    assert found.released.is_set()
    assert api.questions[len(found.rights) :] == ["watch pods"] * 2


def test_a_doubt_asks_for_everything_again() -> None:
    api = Api()
    world = World(api, lambda: setattr(world.informer.state, "last_status", 403))
    found = world.run()
    assert api.asked == 2 * len(found.rights)


def test_no_answer_counts_for_ever() -> None:
    """What was allowed before the API server went away may be withdrawn by the time it is back."""
    api = slow(ApiError(0, "no connection"), 2)

    def away() -> None:
        api.patience = 0

    def back() -> None:
        world.now += rights.KEEP_SECONDS
        api.failure = None
        api.denied.add("get pods")

    world = World(api, away, back, lambda: None)
    found = world.run()
    assert "get pods" in found.reasons()[0]


@pytest.mark.parametrize("status", [401, 403])
def test_refused_reviews(status: int) -> None:
    api = Api()
    api.failure = ApiError(status, f"HTTP {status}")
    world = World(api)
    world.informer.state.last_status = 403
    found = world.run()
    assert not found.released.is_set()
    (reason,) = found.reasons()
    assert ("access to the API server: HTTP 401" if status == 401 else "get, list, watch pods") in reason


def test_outside_of_a_pod_nobody_is_asked() -> None:
    world = World(Api("*"), settings=replace(SIDECAR, kubernetes_service_host=""))
    assert world.run().released.is_set()
    assert world.api.asked == 0


def test_a_missing_mount_is_never_got_over() -> None:
    world = World(Api(), *[lambda: None] * 3, mounts=[mount("cni-bin-dir")])
    found = world.run()
    assert not found.released.is_set()
    assert found.lacks("cni-bin-dir", "other")
    assert not found.lacks("cni-net-dir")
    assert "cni-bin-dir, /host/opt/cni/bin does not exist" in found.reasons()[0]


def test_what_degrades_does_not_stop_and_what_helps_is_no_trouble() -> None:
    found = World(Api("get nodes", "get daemonsets"), mounts=[mount("cni-host-procfs")]).run()
    assert found.released.is_set()
    assert found.reasons() == ()
    assert "cni-host-procfs" in found.notes()[0]
    assert "ClusterRole" not in found.yaml()
    shown = World(Api("get nodes", "get daemonsets")).run().as_object()
    assert shown is not None
    assert (shown["stops"], shown["degrades"], shown["yaml"]) == ([], [], "")
    assert [right["right"] for right in shown["rights"]] == ["get nodes", "get daemonsets"]


# --- each right in turn -----------------------------------------------------------------------------------------------

REPAIRS = {"delete": {"repair_delete_pods": True}, "label": {"repair_label_pods": True}}
ROLES: dict[str, tuple[Settings, tuple[rights.Right, ...]]] = {
    "sidecar": (replace(SIDECAR, repair_enabled=False), rights.wanted(ambient=False)),
    "ambient": (replace(SIDECAR, ambient_enabled=True), rights.wanted(ambient=True)),
    **{
        name: (
            replace(SIDECAR, repair_enabled=True, repair_repair_pods=False, **changes),
            rights.wanted(ambient=False, repair=Mode(name)),
        )
        for name, changes in REPAIRS.items()
    },
}
EACH = [(role, right) for role, (_settings, wanted) in ROLES.items() for right in wanted]


@pytest.mark.parametrize(("role", "right"), EACH, ids=[f"{role}-{right}" for role, right in EACH])
def test_each_right_removed_in_turn(role: str, right: rights.Right, caplog: pytest.LogCaptureFixture) -> None:
    """What is not done without it is said in the log, at our own pod and in the status, with what grants it."""
    caplog.set_level("INFO")
    settings, wanted = ROLES[role]
    told: list[tuple[str, str]] = []
    found = World(
        Api(str(right)), settings=settings, mounts=(), tell=lambda reason, message: told.append((reason, message))
    ).run()
    assert found.rights == wanted
    assert found.review.refused == (right,)
    assert found.released.is_set() is (right.weight is not Weight.STOPS)
    said = {Weight.STOPS: found.reasons(), Weight.DEGRADES: found.notes(), Weight.HELPS: ()}[right.weight]
    assert right.without in caplog.text
    shown = found.as_object()
    assert shown is not None
    assert shown["rights"] == [right.as_object()]
    if right.weight is Weight.HELPS:
        assert (found.reasons(), found.notes(), told) == ((), (), [])
        return
    for text in (*said, told[0][1], caplog.text):
        assert str(right) in text
        assert right.without in text
        assert right.chart in text
    assert [reason for reason, _ in told] == [prerequisites.EVENT_REASON]
    assert f"# missing: {right.verb}" in found.yaml()


@pytest.mark.parametrize("unused", rights.UNUSED)
@pytest.mark.parametrize("role", ROLES)
def test_what_only_the_original_asks_for_is_not_missed(role: str, unused: str) -> None:
    settings, wanted = ROLES[role]
    assert unused not in map(str, wanted)
    found = World(Api(unused), settings=settings).run()
    assert (found.reasons(), found.notes(), found.as_object()) == ((), (), None)


def test_the_table_has_every_rule_of_the_originals_chart() -> None:
    """Roles istio-cni, istio-cni-repair-role and istio-cni-ambient of the original's chart, verb by verb."""
    original = {f"{verb} {target}" for target in ("pods", "nodes", "namespaces") for verb in ("get", "list", "watch")}
    original |= {"create events", "patch events", "delete pods", "patch pods/status", "update pods/status"}
    original |= {"get daemonsets"}
    asked = {str(right) for _settings, wanted in ROLES.values() for right in wanted}
    assert asked <= original, "more than the original's chart grants"
    assert original == asked | set(rights.UNUSED)
