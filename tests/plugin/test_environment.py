"""A hostile environment: whatever surrounds the plugin, it answers the same."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.plugin.harness import PLUGIN, RESULT, AgentDouble, conf, identity, run, variables

HOSTILE = {
    "PYTHONHOME": "/nonexistent",
    "PYTHONPATH": ".",
    "PYTHONSTARTUP": "evil.py",
    "PYTHONINSPECT": "1",
    "PYTHONVERBOSE": "3",
    "PYTHONDEBUG": "3",
    "PYTHONDUMPREFS": "1",
    "PYTHONMALLOC": "debug",
    "PYTHONMALLOCSTATS": "1",
    "PYTHONWARNINGS": "error",
    "PYTHONPLATLIBDIR": "evil",
    "PYTHONIOENCODING": "utf-16",
    "PYTHONHASHSEED": "nonsense",
    "PYTHONUTF8": "nonsense",
    "PYTHONCOERCECLOCALE": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONOPTIMIZE": "0",
    "PYTHONPROFILEIMPORTTIME": "1",
    "PYTHONTRACEMALLOC": "1",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONDEVMODE": "1",
    "PYTHONBREAKPOINT": "evil.main",
    "PYTHONEXECUTABLE": "/evil",
    "PYTHONNOUSERSITE": "",
    "PYTHONSAFEPATH": "",
    "PYTHONINTMAXSTRDIGITS": "1",
    "PYTHON_GIL": "1",
    "PYTHON_FROZEN_MODULES": "off",
    "LC_ALL": "tr_TR.ISO-8859-9",
    "LANG": "ja_JP.SJIS",
    "LANGUAGE": "xx",
    "LD_PRELOAD": "/nonexistent/evil.so",
    "LD_LIBRARY_PATH": ".",
    "LD_DEBUG": "all",
    "LD_AUDIT": "/nonexistent/evil.so",
    "GLIBC_TUNABLES": "glibc.malloc.check=3:glibc.malloc.perturb=165",
    "MALLOC_CHECK_": "3",
    "MALLOC_PERTURB_": "165",
    "MALLOC_TRACE": "trace",
    "MALLOC_ARENA_MAX": "1",
    "GODEBUG": "fips140=on",
    "TZ": ":/etc/evil",
    "TZDIR": ".",
    "TMPDIR": "/nonexistent",
    "HOME": "/nonexistent",
    "PATH": "",
    "NOT_UTF_8": "\udcff\udcfe",
    "CNI_UNKNOWN": "\udcff",
}


def check_all_verbs(agent: AgentDouble, netns: str, extra: dict[str, str] | None = None, **options: object) -> None:
    """VERSION, DEL, an ADD decided alone, and an ADD through the agent answer as always."""
    environ = extra or {}
    stdin = conf(options.pop("run_dir", agent.run_dir))  # type: ignore[arg-type]
    asked = len(agent.received)
    version = run({**environ, **variables("VERSION")}, **options)
    assert (version.status, version.json["cniVersion"]) == (0, "1.1.0")
    deleted = run({**environ, **variables("DEL")}, stdin, **options)
    assert (deleted.status, deleted.stdout) == (0, b"")
    excluded = run({**environ, **variables(namespace="kube-system")}, stdin, **options)
    assert (excluded.status, excluded.json) == (0, RESULT)
    meshed = run({**environ, **variables(netns=netns)}, stdin, **options)
    assert (meshed.status, meshed.json) == (0, RESULT)
    assert len(agent.received) == asked + 1
    assert {version.stderr, deleted.stderr, excluded.stderr, meshed.stderr} == {b""}


@pytest.mark.parametrize("name", HOSTILE)
def test_one_hostile_variable(agent: AgentDouble, shared_netns: str, hostile_folder: Path, name: str) -> None:
    check_all_verbs(agent, shared_netns, {name: HOSTILE[name]}, cwd=hostile_folder)


def test_all_hostile_variables(agent: AgentDouble, shared_netns: str, hostile_folder: Path) -> None:
    check_all_verbs(agent, shared_netns, HOSTILE, cwd=hostile_folder)
    assert sorted(path.name for path in hostile_folder.iterdir()) == sorted(["pyvenv.cfg", *EVIL])


EVIL = [
    f"{name}.py"
    for name in ("evil", "encodings", "io", "os", "site", "posix", "time", "_socket", "meshcni", "sitecustomize")
]


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    """A working directory with modules that would be imported, were it on a search path."""
    for name in EVIL:
        (tmp_path / name).write_text("raise SystemExit('evil was imported')\n")
    (tmp_path / "pyvenv.cfg").write_text("home = .\n")
    return tmp_path


def test_arguments_are_ignored(agent: AgentDouble) -> None:
    for argument in ("-c", "-m", "--help", "-i", "--version", "x" * 100_000):
        done = subprocess.run([PLUGIN, argument, "print(1)"], env=variables("VERSION"), capture_output=True, check=True)
        assert done.stdout.startswith(b'{"cniVersion":"1.1.0"')


def test_umask_and_a_deleted_working_directory(agent: AgentDouble, shared_netns: str, tmp_path: Path) -> None:
    def hostile() -> None:
        os.umask(0o777)
        gone = tmp_path / "gone"
        gone.mkdir(exist_ok=True)
        os.chdir(gone)
        gone.rmdir()

    check_all_verbs(agent, shared_netns, preexec_fn=hostile)
    assert (agent.run_dir / "istio-cni.log").stat().st_mode & 0o777 == 0o600


def test_few_descriptors_and_little_memory(agent: AgentDouble, shared_netns: str) -> None:
    def poor() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (8, 8))
        resource.setrlimit(resource.RLIMIT_AS, (48 << 20, 48 << 20))
        resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, 1 << 20))

    check_all_verbs(agent, shared_netns, preexec_fn=poor)


LIBC_CANNOT_START = 127  # of libc itself, before any code of ours: no memory for the thread's own data


@pytest.mark.parametrize("limit_mib", [4, 6, *range(8, 19)])
def test_too_little_memory_is_still_an_answer(run_dir: Path, limit_mib: int) -> None:
    def starve() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit_mib << 20, limit_mib << 20))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    done = run(variables(namespace="kube-system"), conf(run_dir, padding="x" * 900_000), preexec_fn=starve)
    if done.status == 0:
        assert done.json == RESULT
    elif done.status == 1:
        assert done.json["code"] == 999
    else:  # the kernel could not even map the executable, or libc not start
        assert done.status < 0 or done.status == LIBC_CANNOT_START
        assert done.stdout == b""
    deleted = run(variables("DEL"), preexec_fn=starve)
    assert deleted.stdout == b""
    assert deleted.status <= 0 or deleted.status == LIBC_CANNOT_START


def closing(descriptors: tuple[int, ...]) -> object:
    def close() -> None:
        for descriptor in descriptors:
            os.close(descriptor)

    return close


CLOSED = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]


@pytest.mark.parametrize("closed", CLOSED)
def test_closed_descriptors(agent: AgentDouble, netns: str, closed: tuple[int, ...]) -> None:
    """No file that is opened later takes the place of a closed one: what belongs to stdout goes nowhere else."""
    stdin = conf(agent.run_dir)
    options = {"preexec_fn": closing(closed)}
    version = run(variables("VERSION"), **options)
    assert (version.status, version.stdout[:1]) == ((1, b"") if 1 in closed else (0, b"{"))
    deleted = run(variables("DEL"), **options)
    assert (deleted.status, deleted.stdout) == (0, b"")
    added = run(variables(netns=netns), stdin, **options)
    if 0 in closed:
        assert added.status == 1
        assert 1 in closed or added.json["code"] == 5
        assert agent.received == []
    else:
        assert added.status == (1 if 1 in closed else 0)
        assert 1 in closed or added.json == RESULT
        assert [received.files for received in agent.received] == [[identity(netns)]]
    log = agent.run_dir / "istio-cni.log"
    lines = log.read_text().splitlines() if log.exists() else []
    assert all(line.startswith('{"level":') for line in lines)


def test_readers_that_went_away(agent: AgentDouble, netns: str) -> None:
    for descriptor in (1, 2):
        reading, writing = os.pipe()
        os.close(reading)
        streams = {"stdout" if descriptor == 1 else "stderr": writing}
        broken = variables(netns="/gone") if descriptor == 2 else variables(netns=netns)
        process = subprocess.Popen(
            [PLUGIN], env=broken, stdin=subprocess.PIPE, **{"stdout": subprocess.PIPE, **streams}
        )
        os.close(writing)
        stdout, _ = process.communicate(conf(agent.run_dir), timeout=60)
        assert process.returncode == 1
        assert descriptor == 1 or b'"code": 4' in stdout


def test_stdin_that_never_ends_is_cut() -> None:
    with Path("/dev/zero").open("rb") as endless:
        done = subprocess.run([PLUGIN], stdin=endless, env=variables(), capture_output=True, timeout=60)
    assert done.returncode == 1
    assert b"more than 1048576 bytes" in done.stdout


def test_verbs_without_a_conf_do_not_wait_for_stdin() -> None:
    reading, writing = os.pipe()
    for command in ("VERSION", "DEL"):
        done = subprocess.run([PLUGIN], stdin=reading, env=variables(command), capture_output=True, timeout=60)
        assert done.returncode == 0
    os.close(reading)
    os.close(writing)


@pytest.fixture
def empty_root(shared_netns: str, tmp_path: Path) -> Iterator[Path]:
    """A root with the executable, the run directory and a netns, and nothing else: no /proc, /dev, /tmp, /etc."""
    shutil.copy(PLUGIN, tmp_path / "istio-cni")
    (tmp_path / "r").mkdir()
    (tmp_path / "n").touch()
    subprocess.run(["mount", "--bind", shared_netns, tmp_path / "n"], check=True)
    yield tmp_path
    subprocess.run(["umount", tmp_path / "n"], check=True)


@pytest.mark.parametrize("read_only", [False, True])
def test_in_an_empty_root(empty_root: Path, run_dir: Path, shared_netns: str, read_only: bool) -> None:
    """Also read-only: `chroot` into the folder, remounted so in a mount namespace of its own."""
    mounts = f"mount --rbind {empty_root} {empty_root} && mount --bind {run_dir} {empty_root}/r"
    if read_only:
        mounts += f" && mount -o remount,ro,bind {empty_root} && mount -o remount,ro,bind {empty_root}/r"
    prefix = ["/usr/bin/unshare", "-m", "/bin/sh", "-c", f'{mounts} && exec /usr/sbin/chroot {empty_root} "$0"']
    with AgentDouble(run_dir) as agent:
        check_all_verbs(agent, "/n", prefix=prefix, path="/istio-cni", run_dir="/r", extra={"PATH": "/usr/bin:/bin"})
    assert [received.files for received in agent.received] == [[identity(shared_netns)]]
    assert (run_dir / "istio-cni.log").exists() is not read_only
