"""What the agent's path to the API server loads; how many megabytes that is, the benchmark prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from lab.apiserver import run_in_thread
from tests.kube.worlds import TOKEN, pod_object

HEAVY = ("lightkube", "httpx2", "anyio", "msgspec", "yaml", "hypothesis")
PROGRAM = """
import asyncio, json, sys
from meshcni.kube.client import PODS, KubeApi
from meshcni.kube.credentials import InCluster
from meshcni.kube.informer import Informer
from meshcni.pods.model import pod_from_object

async def main():
    async with KubeApi(InCluster(json.loads(sys.argv[1]), sys.argv[2])) as api:
        await api.get_pod("apps", "a")
        informer = Informer(api, PODS, pod_from_object)
        task = asyncio.create_task(informer.run())
        await informer.synced.wait()
        task.cancel()
    print(json.dumps(sorted(name for name in sys.modules if "." not in name)))

asyncio.run(main())
"""


def test_a_pod_and_an_informer_need_no_heavy_client(account: Path) -> None:
    with run_in_thread(tokens=[TOKEN]) as running:
        running.do(lambda server: server.write_service_account(account, TOKEN))
        running.do(lambda server: server.add_pod(pod_object("a")))
        arguments = [json.dumps(running.environment), str(account)]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, timeout=60, check=True
        )

    loaded = set(json.loads(done.stdout))
    assert "h11" in loaded
    assert not loaded & set(HEAVY)
