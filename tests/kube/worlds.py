"""Pods as the API gives them, and small things that every test of this folder needs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from lab.apiserver import ApiServer

from meshcni.kube.client import KubeApi
from meshcni.kube.credentials import InCluster

TOKEN = "token-1"
NODE = "n1"


def pod_object(name: str, *, namespace: str = "apps", node: str = NODE, **metadata: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": namespace, **metadata},
        "spec": {"nodeName": node, "containers": [{"name": "app", "image": "example/app:1"}]},
        "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.7"}]},
    }


@asynccontextmanager
async def double_and_api(account: Path, **arguments: Any) -> AsyncIterator[tuple[ApiServer, KubeApi]]:
    """A double that wants TOKEN, and a client that finds it as a pod would."""
    async with ApiServer(tokens=[TOKEN], **arguments) as server:
        server.write_service_account(account, TOKEN)
        async with KubeApi(InCluster(server.environment(), str(account))) as api:
            yield server, api


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that another task is about to do; the test's own time limit ends it."""
    while not condition():  # noqa: ASYNC110 - conditions of many kinds
        await asyncio.sleep(0.002)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def rotate_token(account: Path, token: str) -> None:
    """Swap the token as the kubelet does: a new directory behind the symlink `..data`."""
    fresh = account / f"..{token}"
    fresh.mkdir()
    (fresh / "token").write_text(token)
    (account / "..new").symlink_to(fresh.name)
    (account / "..new").rename(account / "..data")
    link = account / "..token"
    if not (account / "token").is_symlink():
        link.symlink_to("..data/token")
        link.rename(account / "token")
