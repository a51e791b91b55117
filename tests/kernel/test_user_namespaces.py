"""Pods with a user namespace of their own (`hostUsers: false`): owner matches have to be made from inside it."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fcntl import ioctl
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.agent.container import NONROOT, user
from tests.kernel.world import IPV4, IPV6, KIND, Netns, apply, node_choice, save

from meshcni import istio
from meshcni.errors import ApplyError
from meshcni.host.backends.iptables import (
    ENVIRONMENT,
    NS_GET_USERNS,
    SEARCH_PATH,
    IptablesBackend,
    find_tools,
    into_userns,
)
from meshcni.host.netns import check_pod_netns, open_netns
from meshcni.host.redirection import program, verify_sidecar
from meshcni.pods.interception import Interception, InterceptionMode
from meshcni.rules.model import Backend, Family
from meshcni.rules.sidecar import sidecar_ruleset

SOURCE = Path(__file__).resolve().parents[2] / "native" / "launcher" / "enter-userns.c"
TPROXY = Interception(mode=InterceptionMode.TPROXY, redirect_dns=True, capture_all_dns=True)


@pytest.fixture
def shifted_pod() -> Iterator[Netns]:
    """A namespace owned by a user namespace in which ids 0 to 65535 are the host's 100000 to 165535."""
    script = "echo ready; read -r line; exec sleep 300"
    command = ["unshare", "--user", "--net", "sh", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            for kind in ("uid", "gid"):
                with open(f"/proc/{process.pid}/{kind}_map", "w") as file:
                    file.write("0 100000 65536\n")
            pod = Netns(open_netns(f"/proc/{process.pid}/ns/net"))
            pod.ip(
                "link set lo up",
                "link add eth0 type veth peer name peer0",
                f"addr add {IPV4}/24 dev eth0",
                f"addr add {IPV6}/64 dev eth0 nodad",
            )
            yield pod
            pod.close()
        finally:
            process.kill()


def test_rules_are_applied_and_repeated(variant: str, shifted_pod: Netns) -> None:
    gc.collect()  # what earlier tests left must not go in between
    before = len(os.listdir("/proc/self/fd"))
    check_pod_netns(shifted_pod.fd)

    applied = apply(shifted_pod, TPROXY, variant)

    assert (applied.changed, applied.variant) == (True, variant)
    assert applied.processes == (0 if variant == "nftables" else 2)
    assert shifted_pod.call(lambda: verify_sidecar(TPROXY, KIND[variant], choice=node_choice(variant))) == ()
    assert not apply(shifted_pod, TPROXY, variant).changed
    assert len(os.listdir("/proc/self/fd")) == before


# --- the program that enters ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def compiled() -> Iterator[str]:
    """The image's program, compiled by this machine, where every user may execute it."""
    folder = Path(tempfile.mkdtemp(prefix="mc-userns-"))
    folder.chmod(0o755)
    flags = ("-O2", "-Wall", "-Wextra", "-Werror")
    subprocess.run(["gcc", *flags, "-o", folder / SOURCE.stem, SOURCE], check=True)
    yield str(folder / SOURCE.stem)
    shutil.rmtree(folder)


@pytest.fixture(params=["nsenter", "enter-userns"])
def way(compiled: str, request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Each of the two programs, as `Tools.into_userns` has it."""
    if request.param == "enter-userns":
        return compiled, "{fd}"
    found = into_userns(SEARCH_PATH, own="")
    assert found[0].endswith("/nsenter")
    return found


@pytest.fixture
def userns(shifted_pod: Netns) -> Iterator[int]:
    """A descriptor of the user namespace that owns the pod's network namespace."""
    fd = ioctl(shifted_pod.fd, NS_GET_USERNS)
    yield fd
    os.close(fd)


def enter(prefix: Sequence[str], fd: int, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command behind `prefix`, which has `{fd}` for the descriptor."""
    words = [*(word.format(fd=fd) for word in prefix), *command]
    options = {"pass_fds": [fd]} | options
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)


@pytest.mark.parametrize("flavour", ["nft", "legacy"])
def test_either_program_is_good_for_both_flavours(shifted_pod: Netns, way: tuple[str, ...], flavour: str) -> None:
    tools = find_tools(flavour)
    assert tools is not None
    tools = replace(tools, into_userns=way)
    rules = sidecar_ruleset(TPROXY, frozenset(Family), Backend.IPTABLES)
    for changed in (True, False):
        backend = IptablesBackend(tools)
        done = shifted_pod.call(partial(program, rules, Backend.IPTABLES, backend))
        assert done.changed == changed
    for family in Family:
        assert f"--gid-owner {istio.PROXY_GID}" in save(shifted_pod, flavour, family)


@pytest.mark.parametrize("flavour", ["nft", "legacy"])
@pytest.mark.parametrize("uid", [0, NONROOT])
def test_owner_matches_with_the_charts_capabilities(
    shifted_pod: Netns, userns: int, way: tuple[str, ...], uid: int, flavour: str
) -> None:
    text = "*filter\n-A OUTPUT -m owner --gid-owner 1337 -j ACCEPT\nCOMMIT\n"
    restore = (f"/usr/sbin/iptables-{flavour}-restore", "--noflush")

    def load(*prefix: str) -> subprocess.CompletedProcess[str]:
        command = (*user(uid), *prefix)
        return shifted_pod.call(lambda: enter(command, userns, *restore, input=text, env=ENVIRONMENT))

    assert load().returncode != 0, "the kernel of this machine needs no program that enters"
    done = load(*way)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--gid-owner 1337" in save(shifted_pod, flavour, Family.V4)


def test_what_the_command_has(shifted_pod: Netns, userns: int, compiled: str) -> None:
    """Root's ids and every capability in the namespace; the caller's mounts, network, folder, descriptors and words."""
    script = (
        "import json, os\n"
        "facts = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "space = {kind: os.stat(f'/proc/self/ns/{kind}').st_ino for kind in ('user', 'mnt', 'net', 'pid')}\n"
        "print(json.dumps([space, facts['Uid'].split(), facts['Gid'].split(), facts['Groups'].split(),"
        " facts['CapEff'].strip(), os.getcwd(), dict(os.environ), sorted(os.listdir('/proc/self/fd'))]))"
    )
    prefix, command = (*user(NONROOT), compiled, "{fd}"), ("/usr/bin/python3", "-c", script)
    environment = {"NAME": "a b", "LC_ALL": "C"}
    kept, other = os.pipe()
    options = {"env": environment, "cwd": "/usr", "pass_fds": [userns, kept]}
    done = shifted_pod.call(lambda: enter(prefix, userns, *command, **options))
    os.close(kept)
    os.close(other)
    assert (done.returncode, done.stderr) == (0, "")
    spaces, *ids, capabilities, folder, environ, descriptors = json.loads(done.stdout)
    own = {kind: os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("mnt", "pid")}
    assert spaces == {**own, "user": os.fstat(userns).st_ino, "net": os.fstat(shifted_pod.fd).st_ino}
    assert ids == [["0"] * 4, ["0"] * 4, []]
    everything = (1 << int(Path("/proc/sys/kernel/cap_last_cap").read_text()) + 1) - 1
    assert int(capabilities, 16) == everything
    assert (folder, environ) == ("/usr", environment)
    assert str(kept) in descriptors
    assert str(userns) not in descriptors, "the command cannot pass it on"


def test_a_namespace_in_which_groups_cannot_be_set(compiled: str) -> None:
    """As one has that an unprivileged user made."""
    with namespace("--map-root-user") as fd:
        assert enter((compiled, "{fd}"), fd, "/usr/bin/id", "-u").stdout == "0\n"


@contextmanager
def namespace(*options: str) -> Iterator[int]:
    """A descriptor of a new user namespace."""
    command = ["unshare", "--user", *options, "sh", "-c", "echo ready; exec sleep 300"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            fd = os.open(f"/proc/{process.pid}/ns/user", os.O_RDONLY)
            yield fd
            os.close(fd)
        finally:
            process.kill()


def test_failures_differ(userns: int, compiled: str, tmp_path: Path) -> None:
    (tmp_path / "data").touch(0o644)
    prefix = (compiled, "{fd}")
    usage = "usage: enter-userns FD COMMAND [ARGUMENT...]"
    other = f"cannot enter the user namespace of descriptor {userns}: "
    wrong = [
        ((compiled,), 125, usage),
        (prefix, 125, usage),
        *(((compiled, text, "true"), 125, usage) for text in ("", "-1", "3x", "x", "99999999999", "9" * 30)),
        ((compiled, "999", "true"), 122, "cannot enter the user namespace of descriptor 999: Bad file descriptor"),
        ((compiled, "0", "true"), 122, "cannot enter the user namespace of descriptor 0: Invalid argument"),
        ((*user(NONROOT, ()), *prefix, "/bin/true"), 122, other + "Operation not permitted"),
        ((*prefix, "/no/where"), 127, "cannot execute /no/where: No such file or directory"),
        ((*prefix, f"{tmp_path}/data"), 126, f"cannot execute {tmp_path}/data: Permission denied"),
        ((*prefix, "true"), 127, "cannot execute true: No such file or directory"),  # it looks nowhere
    ]
    for words, status, message in wrong:
        done = enter(words, userns, stdin=subprocess.DEVNULL)
        assert (done.returncode, done.stdout, done.stderr) == (status, "", f"enter-userns: {message}\n"), words
    with namespace() as unmapped:
        done = enter(prefix, unmapped, "/bin/true")
    message = "enter-userns: cannot become root of the user namespace: Invalid argument\n"
    assert (done.returncode, done.stderr) == (123, message)


def test_the_images_program_comes_first(compiled: str, tmp_path: Path) -> None:
    assert into_userns(SEARCH_PATH, own=compiled) == (compiled, "{fd}")
    assert into_userns((str(tmp_path),), own=str(tmp_path / "enter-userns")) == ()


def test_without_a_program_that_enters_the_way_out_is_named(shifted_pod: Netns) -> None:
    tools = find_tools("nft")
    assert tools is not None
    rules = sidecar_ruleset(TPROXY, frozenset(Family), Backend.IPTABLES)
    backend = IptablesBackend(replace(tools, into_userns=()))
    with pytest.raises(ApplyError, match=r"neither /usr/local/lib/meshcni/enter-userns nor nsenter \(use nftables"):
        shifted_pod.call(lambda: program(rules, Backend.IPTABLES, backend))
