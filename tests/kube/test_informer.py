"""The informer against the double: what it holds, what it tells, what it asks for, through every fault."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from lab.apiserver import ApiServer, Cluster
from tests.kube.worlds import NODE, TOKEN, double_and_api, open_descriptors, pod_object, rotate_token, until

from meshcni.kube.client import NAMESPACES, PODS, KubeApi, Object
from meshcni.kube.informer import Informer, Timing
from meshcni.kube.reducer import Change, ChangeKind
from meshcni.pods.model import Pod, namespace_from_object, pod_from_object

QUICK = Timing(open_seconds=0.1, silence_seconds=60.0, list_seconds=0.1)


@dataclass
class World:
    """A double, a client, a running informer on this node's pods, and what it told and how long it would have slept."""

    server: ApiServer
    api: KubeApi
    informer: Informer[Pod]
    told: list[tuple[ChangeKind, str]] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)

    def names(self) -> set[str]:
        return {pod.name for pod in self.informer.items()}

    def asked(self, *, watch: bool) -> list[str | None]:
        """The resourceVersion of every list, or of every watch, so far."""
        return [r.request.query.get("resourceVersion") for r in self.server.requests if r.is_watch is watch]

    async def watching(self) -> None:
        """Wait until a watch is open at server and client."""
        await until(lambda: self.server.watches and self.informer.state.connected)


@asynccontextmanager
async def running(
    account: Path,
    *,
    prepare: Callable[[ApiServer], object] = lambda server: None,
    cluster: Cluster | None = None,
    project: Callable[[Object], Pod] = pod_from_object,
    timing: Timing = QUICK,
    tls: Any = None,
) -> AsyncIterator[World]:
    async with double_and_api(account, cluster=cluster, certificates=tls) as (server, api):
        slept: list[float] = []

        async def sleep(seconds: float) -> None:
            slept.append(seconds)
            await asyncio.sleep(0.001)

        informer = Informer(
            api,
            PODS,
            project,
            field_selector=f"spec.nodeName={NODE}",
            timing=timing,
            sleep=sleep,
            chance=random.Random(7),
        )
        world = World(server, api, informer, slept=slept)

        def hear(change: Change[Pod]) -> None:
            world.told.append((change.kind, change.value.name))

        informer.subscribe(hear)
        prepare(server)
        task = asyncio.create_task(informer.run())
        try:
            yield world
            assert not task.done(), "the informer ended by itself"
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def some_pods(server: ApiServer) -> None:
    for name in ("a", "b"):
        server.add_pod(pod_object(name))
    server.add_pod(pod_object("elsewhere", node="n2"))


async def test_it_lists_then_watches(account: Path) -> None:
    async with running(account, prepare=some_pods) as world:
        await world.informer.synced.wait()
        assert world.names() == {"a", "b"}
        await world.watching()

        world.server.add_pod(pod_object("c"))
        world.server.add_pod(pod_object("elsewhere-2", node="n2"))
        world.server.patch("pods", "apps", "a", {"metadata": {"labels": {"x": "1"}}})
        world.server.delete_pod("apps", "b")
        await until(lambda: len(world.told) == 5)

        assert world.told == [
            (ChangeKind.ADDED, "a"),
            (ChangeKind.ADDED, "b"),
            (ChangeKind.ADDED, "c"),
            (ChangeKind.MODIFIED, "a"),
            (ChangeKind.DELETED, "b"),
        ]
        pod = world.informer.get("apps", "a")
        assert pod is not None
        assert pod.labels == {"x": "1"}
        assert world.informer.get("apps", "b") is None
        assert (world.asked(watch=False), len(world.asked(watch=True))) == (["0"], 1)
        assert world.slept == []


async def test_a_pod_that_is_bound_to_the_node_later_is_added(account: Path) -> None:
    async with running(account) as world:
        await world.watching()
        world.server.add_pod(pod_object("late", node=""))
        world.server.patch("pods", "apps", "late", {"spec": {"nodeName": NODE}})
        await until(lambda: world.told)

        assert world.told == [(ChangeKind.ADDED, "late")]


async def test_a_same_named_successor_is_another_pod(account: Path) -> None:
    async with running(account, prepare=lambda server: server.add_pod(pod_object("web-0", uid="u1"))) as world:
        await world.watching()
        world.server.cut_watches()
        world.server.delete_pod("apps", "web-0")
        world.server.compact()  # so that only the list tells
        world.server.add_pod(pod_object("web-0", uid="u2"))
        await until(lambda: len(world.told) == 3)

        assert [kind for kind, _ in world.told] == [ChangeKind.ADDED, ChangeKind.DELETED, ChangeKind.ADDED]
        pod = world.informer.get("apps", "web-0")
        assert pod is not None
        assert pod.uid == "u2"


ENDINGS: list[tuple[str, Callable[[ApiServer], None]]] = [
    ("ended", lambda server: server.end_watches()),
    ("cut", lambda server: server.cut_watches()),
    ("cut within a line", lambda server: server.cut_watches(mid_line=True)),
]


@pytest.mark.parametrize("end", [end for _, end in ENDINGS], ids=[name for name, _ in ENDINGS])
async def test_a_watch_that_ends_is_resumed_without_a_list(account: Path, end: Callable[[ApiServer], None]) -> None:
    async with running(account, prepare=some_pods) as world:
        await world.watching()
        world.server.add_pod(pod_object("c"))
        await until(lambda: len(world.told) == 3)

        end(world.server)
        world.server.add_pod(pod_object("d"))
        await until(lambda: len(world.told) == 4)

        assert world.names() == {"a", "b", "c", "d"}
        assert world.asked(watch=False) == ["0"]
        version = world.informer.get("apps", "c")
        assert version is not None
        assert world.asked(watch=True)[1] == version.resource_version


async def test_bookmarks_move_the_version_on(account: Path) -> None:
    async with running(account, prepare=some_pods) as world:
        await world.watching()
        for number in range(5):
            world.server.add_pod(pod_object(f"elsewhere-{number}", node="n2"))
        world.server.bookmark()
        await until(lambda: world.informer.state.bookmarks)
        version = str(world.server.cluster.version)

        world.server.cut_watches()
        await until(lambda: len(world.asked(watch=True)) == 2)

        assert world.asked(watch=True)[1] == version == world.informer.state.resource_version
        assert world.informer.state.events == 0


async def gone_by_event(world: World) -> None:
    world.server.compact()
    world.server.fail_watches(410)


async def gone_on_resume(world: World) -> None:
    world.server.compact()
    world.server.cut_watches()


async def gone_by_status(world: World) -> None:
    world.server.fault("status", status=410, watch=True)
    world.server.cut_watches()


@pytest.mark.parametrize("make_gone", [gone_by_event, gone_on_resume, gone_by_status])
async def test_gone_lists_again_and_tells_what_vanished(account: Path, make_gone: Callable[[World], Any]) -> None:
    async with running(account, prepare=some_pods) as world:
        await world.watching()
        for watch in world.server.watches:
            watch.frozen = True  # the informer does not hear of what follows
        world.server.delete_pod("apps", "a")
        world.server.add_pod(pod_object("c"))
        await make_gone(world)
        await until(lambda: world.informer.state.relists == 1)

        assert world.names() == {"b", "c"}
        assert world.told[2:] == [(ChangeKind.DELETED, "a"), (ChangeKind.ADDED, "c")]
        assert world.asked(watch=False) == ["0", None]
        await world.watching()
        world.server.add_pod(pod_object("d"))
        await until(lambda: "d" in world.names())
        assert world.informer.state.last_error == ""


async def test_a_server_behind_our_version_makes_it_list_again(account: Path) -> None:
    """As after a restore from a backup, or with an API server whose cache lags."""
    async with running(account, prepare=some_pods) as world:
        await world.watching()
        world.server.fault(
            "status", status=504, reason="Timeout", message="Too large resource version: 9, current: 3", watch=True
        )
        world.server.cut_watches()
        await until(lambda: world.informer.state.relists == 1)

        assert world.asked(watch=False) == ["0", None]


async def test_a_list_that_expires_between_pages_is_read_in_one_piece(account: Path) -> None:
    def many(server: ApiServer) -> None:
        for number in range(12):
            server.add_pod(pod_object(f"p{number}"))

    async with double_and_api(account) as (server, api):
        many(server)
        # "0" is answered in one piece, so begin as after a 410
        informer = Informer(api, PODS, pod_from_object, page_limit=5, sleep=lambda _: asyncio.sleep(0.001))
        server.fault("status", status=410, count=1)
        task = asyncio.create_task(informer.run())
        listed = server.cluster.list_page

        def expire(*arguments: Any, **keywords: Any) -> Any:
            if keywords["go_on"]:
                server.cluster.compact()
            return listed(*arguments, **keywords)

        server.cluster.list_page = expire  # type: ignore[method-assign]
        await informer.synced.wait()
        queries = [dict(r.request.query) for r in server.requests if not r.is_watch]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    assert len(informer.items()) == 12
    assert [q.get("limit") for q in queries] == ["5", "5", "5", None]
    assert [("continue" in q, q.get("resourceVersion")) for q in queries] == [
        (False, "0"),
        (False, None),
        (True, None),
        (False, None),
    ]


@pytest.mark.parametrize("when", ["list", "watch"])
@pytest.mark.parametrize("status", [400, 403, 404, 429, 500, 503])
async def test_refusals_are_retried_with_growing_pauses(account: Path, status: int, when: str) -> None:
    def refuse(server: ApiServer) -> None:
        some_pods(server)
        server.fault("status", status=status, count=-1, watch=when == "watch")

    async with running(account, prepare=refuse) as world:
        await until(lambda: len(world.slept) >= 7)
        assert (world.informer.state.last_status, world.informer.state.connected) == (status, False)
        world.server.clear_faults()
        await world.watching()

        assert world.names() == {"a", "b"}
        assert (world.informer.state.last_status, world.informer.state.last_error) == (0, "")
        assert set(world.asked(watch=False)) == {"0"}
        assert (len(world.asked(watch=False)) == 1) is (when == "watch")
        for pause, highest in zip(world.slept, (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0), strict=False):
            assert highest / 2 <= pause <= highest


async def test_retry_after_is_waited_for(account: Path) -> None:
    def throttle(server: ApiServer) -> None:
        server.fault("status", status=429, retry_after_seconds=20, count=3)

    async with running(account, prepare=throttle) as world:
        await world.watching()

        assert len(world.slept) == 3
        assert all(20.0 <= pause <= 22.0 for pause in world.slept)


async def test_pauses_are_spread(account: Path) -> None:
    async with running(account, prepare=lambda server: server.fault("status", status=500, count=60)) as world:
        await world.watching()

        late = world.slept[8:]
        assert max(late) <= 30.0
        assert min(late) >= 15.0
        assert max(late) - min(late) > 5.0


# a watch has no whole body to truncate; see the endings within a line
NETWORK = [
    ("hang", "list"),
    ("drop", "list"),
    ("truncate", "list"),
    ("garbage", "list"),
    ("hang", "watch"),
    ("drop", "watch"),
]


@pytest.mark.parametrize(("kind", "when"), NETWORK)
async def test_network_faults_are_outlived(account: Path, kind: str, when: str) -> None:
    def break_it(server: ApiServer) -> None:
        some_pods(server)
        server.fault(kind, count=5, watch=when == "watch")

    async with running(account, prepare=break_it) as world:
        await world.watching()

        assert world.names() == {"a", "b"}


async def test_a_crashed_server_that_comes_back_is_resumed(account: Path) -> None:
    async with running(account, prepare=some_pods) as world:
        await world.watching()
        await world.server.stop()
        await until(lambda: len(world.slept) > 3)
        assert world.informer.state.connected is False
        assert "reaches the API server" in world.informer.state.last_error
        assert world.names() == {"a", "b"}
        world.server.add_pod(pod_object("c"))

        await world.server.start()
        await until(lambda: "c" in world.names())

        assert world.asked(watch=False) == ["0"]


async def test_silence_opens_the_watch_anew(account: Path) -> None:
    timing = Timing(silence_seconds=0.05)
    async with running(account, prepare=some_pods, timing=timing) as world:
        await world.watching()
        world.server.freeze_watches()
        world.server.add_pod(pod_object("c"))
        await until(lambda: "c" in world.names())

        assert world.asked(watch=False) == ["0"]
        assert world.slept == []
        assert world.informer.state.last_error == ""


async def test_a_rotated_token_is_taken_up(account: Path) -> None:
    async with running(account, prepare=some_pods) as world:
        await world.watching()
        world.server.tokens = {"token-2"}
        world.server.cut_watches()
        await until(lambda: world.informer.state.last_status == 401)

        rotate_token(account, "token-2")
        await world.watching()

        world.server.add_pod(pod_object("c"))
        await until(lambda: "c" in world.names())
        tokens = [record.token for record in world.server.requests]
        assert (tokens[0], tokens[-1]) == (TOKEN, "token-2")
        assert world.asked(watch=False) == ["0"]


async def test_a_token_overwritten_unnoticeably_is_taken_up_by_a_watch(account: Path) -> None:
    async with running(account, prepare=some_pods) as world:
        await world.watching()
        before = (account / "token").stat()
        (account / "token").write_text("token-2")
        os.utime(account / "token", ns=(before.st_atime_ns, before.st_mtime_ns))
        world.server.tokens = {"token-2"}
        world.server.cut_watches()
        await until(lambda: world.server.requests[-1].token == "token-2")
        await world.watching()


async def test_a_watch_that_told_something_begins_its_pauses_anew(account: Path) -> None:
    async with running(account) as world:
        for number in range(6):
            await world.watching()
            world.server.add_pod(pod_object(f"p{number}"))
            await until(lambda number=number: f"p{number}" in world.names())
            opened = len(world.asked(watch=True))
            world.server.cut_watches()
            await until(lambda opened=opened: len(world.asked(watch=True)) > opened)

        assert len(world.slept) == 6
        assert max(world.slept) <= 0.5


async def test_malformed_objects_are_left_out_and_logged_once(account: Path, caplog: pytest.LogCaptureFixture) -> None:
    def malformed(server: ApiServer) -> None:
        some_pods(server)
        server.add_pod({**pod_object("bad"), "spec": {"nodeName": NODE, "containers": "none"}})

    with caplog.at_level(logging.WARNING, "meshcni.kube"):
        async with running(account, prepare=malformed) as world:
            await world.watching()
            for number in range(5):
                world.server.patch("pods", "apps", "bad", {"metadata": {"labels": {"n": str(number)}}})
            world.server.add_pod(pod_object("c"))
            await until(lambda: "c" in world.names())

            assert world.names() == {"a", "b", "c"}
            assert world.informer.state.rejected == 6
            world.server.patch("pods", "apps", "bad", {"spec": {"containers": []}})
            await until(lambda: "bad" in world.names())

    about = [record.getMessage() for record in caplog.records if "bad" in record.getMessage()]
    assert len(about) == 1
    assert about[0].startswith("pods apps/bad cannot be read and is left out: spec.containers")


async def test_a_consumer_that_fails_harms_nobody(account: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(change: Change[Pod]) -> None:
        raise RuntimeError("consumer")

    async with running(account) as world:
        await world.watching()
        world.informer.subscribe(fail)
        world.server.add_pod(pod_object("a"))
        world.server.add_pod(pod_object("b"))
        await until(lambda: world.informer.state.callback_errors == 2)

        assert world.names() == {"a", "b"}
        assert len(world.told) == 2


async def test_a_failure_is_logged_when_it_begins_and_when_it_is_over(
    account: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "meshcni.kube"):
        async with running(account, prepare=lambda server: server.fault("status", status=403, count=20)) as world:
            await world.watching()

    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "allows list pods" in lines[0]
    assert lines[1] == "pods: the API server answers again"
    assert not any(TOKEN in line for line in lines)


async def test_namespaces_are_read_as_metadata_only(account: Path) -> None:
    async with double_and_api(account) as (server, api):
        server.add_namespace("apps", {"istio.io/dataplane-mode": "ambient"})
        seen: list[Object] = []

        def project(obj: Object) -> Any:
            seen.append(obj)
            return namespace_from_object(obj)

        informer = Informer(api, NAMESPACES, project, metadata_only=True)
        task = asyncio.create_task(informer.run())
        await informer.synced.wait()
        await until(lambda: server.watches)
        server.add_namespace("more")
        server.bookmark()
        await until(lambda: informer.get("", "more"))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    assert all(obj.keys() <= {"kind", "apiVersion", "metadata"} for obj in seen)
    found = informer.get("", "apps")
    assert found.labels["istio.io/dataplane-mode"] == "ambient"
    accepted = [record.request.headers["accept"].split(",")[0] for record in server.requests]
    assert accepted == [
        "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1",
        "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1",
    ]


async def test_of_5000_pods_only_those_of_the_node_come(account: Path) -> None:
    def many(server: ApiServer) -> None:
        for number in range(5000):
            server.add_pod(pod_object(f"p{number}", node=f"n{number % 20}"))

    async with running(account, prepare=many, timing=Timing()) as world:
        await world.informer.synced.wait()

        assert len(world.names()) == 250
        assert {pod.node_name for pod in world.informer.items()} == {NODE}


async def test_200_reconnects_leave_nothing_behind(account: Path) -> None:
    async with running(account, prepare=some_pods) as world:
        await world.watching()
        descriptors, tasks = open_descriptors(), len(asyncio.all_tasks())
        for number in range(200):
            before = len(world.asked(watch=True))
            if number % 4 == 0:
                world.server.fault("status", status=(500, 401, 410)[number % 3], watch=True)
            world.server.cut_watches(mid_line=number % 2 == 0)
            await until(lambda before=before: len(world.asked(watch=True)) > before and world.server.watches)
        await world.watching()
        await asyncio.sleep(0.05)  # the double closes its ends

        assert open_descriptors() <= descriptors + 4  # idle connections are kept for the next call
        assert len(asyncio.all_tasks()) <= tasks + 4
        assert world.names() == {"a", "b"}


async def test_watches_last_a_random_time(account: Path) -> None:
    async with running(account) as world:
        for number in range(1, 30):
            await until(lambda number=number: len(world.asked(watch=True)) >= number and world.server.watches)
            world.server.cut_watches()
        asked = [int(r.request.query["timeoutSeconds"]) for r in world.server.requests if r.is_watch]

    assert all(300 <= seconds <= 600 for seconds in asked)
    assert len(set(asked)) > 10


async def test_a_watch_that_ends_at_once_is_not_reopened_in_a_rush(account: Path) -> None:
    async with running(account) as world:
        for _ in range(4):
            await world.watching()
            opened = len(world.asked(watch=True))
            world.server.end_watches()
            await until(lambda opened=opened: len(world.asked(watch=True)) > opened)

        assert len(world.slept) >= 4
        assert sorted(world.slept) == world.slept
