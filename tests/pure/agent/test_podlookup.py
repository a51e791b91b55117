"""Which pod an ADD is about: the informer's, the API's, or none."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from meshcni.agent.podlookup import PodLookup
from meshcni.errors import KubeError
from meshcni.pods.model import Namespace, Pod
from meshcni.pods.podidentity import is_meant

T = TypeVar("T")


def finish(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine whose awaits never wait."""
    with pytest.raises(StopIteration) as caught:
        work.send(None)
    return caught.value.value  # type: ignore[no-any-return]


class Store:
    def __init__(self, *objects: Any) -> None:
        self.objects = objects

    def get(self, namespace: str, name: str) -> Any:
        return next(
            (one for one in self.objects if (getattr(one, "namespace", ""), one.name) == (namespace, name)), None
        )


class Api:
    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str | None, str, float]] = []

    def _answer(self, namespace: str | None, name: str, timeout: float) -> Any:
        self.asked.append((namespace, name, timeout))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def get_pod(self, namespace: str, name: str, *, timeout: float) -> Pod:
        return self._answer(namespace, name, timeout)  # type: ignore[no-any-return]

    async def get_object(
        self, group: str, version: str, resource: str, namespace: str | None, name: str, *, timeout: float
    ) -> dict[str, Any]:
        return self._answer(namespace, name, timeout)  # type: ignore[no-any-return]


OLD, NEW = Pod("shop", "cart-0", uid="old"), Pod("shop", "cart-0", uid="new")


def test_informer_answers_without_the_api() -> None:
    found = finish(PodLookup(Api(), Store(NEW), None, 4).pod("shop", "cart-0", "new"))
    assert (found.pod, found.source) == (NEW, "informer")


def test_without_a_uid_the_api_says_who_has_the_name_now() -> None:
    found = finish(PodLookup(Api(NEW), Store(OLD), None, 4).pod("shop", "cart-0", ""))
    assert (found.pod, found.source) == (NEW, "api")


def test_pod_that_the_informer_does_not_have_is_asked_for() -> None:
    api = Api(NEW)
    found = finish(PodLookup(api, Store(), None, 4).pod("shop", "cart-0", "new"))
    assert (found.pod, found.source, api.asked) == (NEW, "api", [("shop", "cart-0", 4)])


def test_predecessor_in_the_informer_is_not_taken() -> None:
    assert finish(PodLookup(Api(NEW), Store(OLD), None, 4).pod("shop", "cart-0", "new")).pod is NEW


def test_successor_in_the_api_is_not_taken() -> None:
    lookup = PodLookup(Api(NEW), Store(), None, 4)
    with pytest.raises(KubeError, match="with UID old is gone: the API server knows one with UID new") as caught:
        finish_failing(lookup.pod("shop", "cart-0", "old"))
    assert caught.value.cni_code == 11


def finish_failing(work: Coroutine[Any, Any, Any]) -> None:
    work.send(None)


@pytest.mark.parametrize("status", [0, 401, 403, 404, 429, 500])
def test_api_failure_fails_the_look_up(status: int) -> None:
    lookup = PodLookup(Api(KubeError(status, "no", "try")), Store(), None, 4)
    with pytest.raises(KubeError, match="whether pod shop/cart-0 belongs to the mesh: no") as caught:
        finish_failing(lookup.pod("shop", "cart-0", ""))
    assert (caught.value.status, caught.value.hint, caught.value.cni_code) == (status, "try", 11)


@pytest.mark.parametrize(
    ("pod", "uid", "meant"),
    [
        (Pod("a", "b", uid="1"), "1", True),
        (Pod("a", "b", uid="1"), "2", False),
        (Pod("a", "b", uid="1"), "", True),
        (Pod("a", "b", uid="1", annotations={"kubernetes.io/config.hash": "2"}), "2", True),
        (Pod("a", "b", uid="1", annotations={"kubernetes.io/config.mirror": "2"}), "2", True),
        (Pod("a", "b", uid="1", annotations={"kubernetes.io/config.hash": "2"}), "3", False),
    ],
)
def test_static_pods_are_known_by_their_hash(pod: Pod, uid: str, meant: bool) -> None:
    assert is_meant(pod, uid) is meant


def test_namespace_from_informer_else_api() -> None:
    shop = Namespace("shop", {"a": "b"})
    assert finish(PodLookup(Api(), Store(), Store(shop), 4).namespace("shop")) is shop
    api = Api({"metadata": {"name": "shop", "labels": {"c": "d"}}})
    assert finish(PodLookup(api, Store(), None, 4).namespace("shop")).labels == {"c": "d"}
    with pytest.raises(KubeError, match="labels of namespace shop"):
        finish_failing(PodLookup(Api(KubeError(403, "no")), Store(), Store(), 4).namespace("shop"))
