"""Installs in ways that a test cannot do in its own process; prints what came of it as one JSON object.

kills DIR ROUNDS    kill -9 an installing process at a random moment, look at the files, again and again
full DIR            on a file system without space, and again with space
readonly DIR        with a conf directory that is mounted read-only
polling DIR         where no inotify instance can be had
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.install.hosts import BRIDGE, Host, Record, running, until

from meshcni.agent.installation import Installation
from meshcni.agent.installconfig import InstallConfig

WRITERS = 7  # different entries, so that each look at the host writes


def config(host: Host, number: int) -> InstallConfig:
    return host.config(entry={"exclude_namespaces": tuple(f"namespace-{i}" for i in range(number))})


def install_for_ever(host: Host, seed: int) -> None:
    """A child's life: binary, kubeconfig and conf are written anew in each turn."""
    while True:
        seed += 1
        (host.account / "token").write_text(f"token.{seed % WRITERS}")
        Installation(config(host, seed % WRITERS)).look_and_repair()
        host.plugin.unlink()


def killed_at_random(host: Host, seed: int) -> None:
    child = os.fork()
    if child == 0:
        try:
            install_for_ever(host, seed)
        finally:
            os._exit(1)
    time.sleep(random.uniform(0, 0.02))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the child ended by itself: {status}"


def kills(host: Host, rounds: int) -> dict[str, Any]:
    path = host.write("10-a.conflist", BRIDGE)
    (host.account / "token").write_text("token.0")
    whole_confs = {BRIDGE}
    for number in range(WRITERS):
        Installation(config(host, number)).look_and_repair()
        whole_confs.add(path.read_text())
    binary = (host.source / "istio-cni").read_bytes()
    partial, interrupted = [], 0
    for turn in range(rounds):
        killed_at_random(host, turn)
        interrupted += bool(host.leftovers())
        if path.read_text() not in whole_confs:
            partial.append(path.read_text())
        if host.plugin.exists() and host.plugin.read_bytes() != binary:
            partial.append("binary")
        kubeconfig = host.run / "istio-cni-kubeconfig"
        if kubeconfig.exists() and not kubeconfig.read_text().endswith(tuple(f"token.{i}\n" for i in range(WRITERS))):
            partial.append("kubeconfig")
    last = Installation(config(host, 1)).look_and_repair()
    return {
        "partial": partial,
        "interrupted": interrupted,
        "leftovers": host.leftovers(),
        "reasons": last.reasons,
        "types": host.types("10-a.conflist"),
    }


def full(root: Path) -> dict[str, Any]:
    """All directories on a small tmpfs; the source of the binary too, so it is written before the space is gone."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(root)], check=True)
    host = Host(root)
    path = host.write("10-a.conflist", BRIDGE)
    installation = Installation(host.config())
    filler = root / "filler"
    with filler.open("wb") as file:
        while True:
            try:
                os.write(file.fileno(), b"x" * 4096)
            except OSError:
                break
    during = installation.look_and_repair()
    facts = {
        "failures": [[failure.result, str(failure)] for failure in during.failures],
        "unchanged": path.read_text() == BRIDGE,
        "leftovers": host.leftovers(),
        "binary": host.plugin.exists(),
    }
    host.plugin.write_bytes(b"")  # as if it had been there: the conf is tried then too
    host.plugin.chmod(0o755)
    conf = installation.look_and_repair()
    facts["conf_failures"] = [[failure.result, str(failure)] for failure in conf.failures]
    facts["conf_unchanged"] = path.read_text() == BRIDGE
    facts["conf_leftovers"] = host.leftovers()
    filler.unlink()
    facts["after"] = installation.look_and_repair().reasons
    facts["types"] = host.types("10-a.conflist")
    return facts


def readonly(host: Host) -> dict[str, Any]:
    path = host.write("10-a.conflist", BRIDGE)
    subprocess.run(["mount", "--bind", str(host.conf), str(host.conf)], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(host.conf)], check=True)
    installation = Installation(host.config())
    during = installation.look_and_repair()
    facts = {
        "failures": [[failure.result, str(failure)] for failure in during.failures],
        "unchanged": path.read_text() == BRIDGE,
        "leftovers": host.leftovers(),
    }
    subprocess.run(["mount", "-o", "remount,bind,rw", str(host.conf)], check=True)
    facts["after"] = installation.look_and_repair().reasons
    facts["types"] = host.types("10-a.conflist")
    return facts


async def polling(host: Host) -> dict[str, Any]:
    Path("/proc/sys/user/max_inotify_instances").write_text("0")  # of our own user namespace
    path = host.write("10-a.conflist", BRIDGE)
    async with running(host.config(), Record()) as installer:
        await until(lambda: installer.ready)
        path.write_text(BRIDGE)
        await until(lambda: host.types("10-a.conflist") == ["bridge", "istio-cni"])
        return {"ready": installer.ready}


def main() -> None:
    command, root = sys.argv[1], Path(sys.argv[2])
    if command == "kills":
        facts = kills(Host(root), int(sys.argv[3]))
    elif command == "full":
        facts = full(root)
    elif command == "readonly":
        facts = readonly(Host(root))
    else:
        facts = asyncio.run(polling(Host(root)))
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
