from __future__ import annotations

import asyncio
import os

from tests.agent.scene import new_netns

from meshcni.agent.programming import STUCK_SECONDS, BackendConfig, Programmer
from meshcni.host.backends import libnftables
from meshcni.host.redirection import FamilyPolicy
from meshcni.pods.interception import Interception
from meshcni.rules.model import Backend


def test_a_call_that_never_returns_is_a_reason_to_restart(tmp_path: os.PathLike[str]) -> None:
    config = BackendConfig(Backend.NFTABLES, "", FamilyPolicy.BY_ADDRESS, os.fspath(tmp_path), "/proc/self/ns/net")
    now = [0.0]

    async def scenario(fd: int) -> None:
        programmer = Programmer(config, clock=lambda: now[0])
        with libnftables._one_at_a_time:  # as a call that hangs would hold it
            work = asyncio.create_task(programmer.program(fd, Interception(), ()))
            await asyncio.sleep(0.05)
            assert programmer.stuck() == ()
            now[0] = STUCK_SECONDS + 1
            assert "1 pods have been waiting" in programmer.stuck()[0]
        assert (await work).changed
        assert programmer.stuck() == ()

    with new_netns("10.9.0.2/24") as path:
        fd = os.open(path, os.O_RDONLY)
        try:
            asyncio.run(scenario(fd))
        finally:
            os.close(fd)
