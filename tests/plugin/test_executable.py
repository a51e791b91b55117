"""The executable as a file: what is in it, what it opens, and that anybody builds the same."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from native.plugin import postpone
from tests.plugin.harness import PLUGIN, RESULT, ROOT, AgentDouble, conf, run, variables

MAX_RSS_KIB = 7 * 1024
# What would make the start slow, or would be a way in.
FORBIDDEN_MODULES = {
    "_ctypes",
    "_tls",
    "_frozen_importlib_external",
    "_pickle",
    "abc",
    "codecs",
    "collections",
    "ctypes",
    "dataclasses",
    "enum",
    "functools",
    "http",
    "importlib",
    "ipaddress",
    "json",
    "logging",
    "os",
    "re",
    "select",
    "site",
    "socket",
    "ssl",
    "struct",
    "subprocess",
    "threading",
    "types",
    "typing",
    "zipimport",
}


def copy_of_the_sources(folder: Path) -> Path:
    for part in ("native", "src", "scripts"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def build(folder: Path, **options: object) -> Path:
    subprocess.run([folder / "scripts" / "build-plugin"], check=True, **options)  # type: ignore[call-overload]
    return folder / "build" / "istio-cni"


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_same_bytes_from_different_folders(tmp_path: Path) -> None:
    odd = {"TZ": "Asia/Tokyo", "LC_ALL": "tr_TR.UTF-8", "PYTHONHASHSEED": "7", "PATH": os.environ["PATH"], "HOME": "/"}
    first = build(copy_of_the_sources(tmp_path / "one"))
    second = build(
        copy_of_the_sources(tmp_path / "a much longer name"),
        env=odd,
        cwd="/",
        preexec_fn=lambda: os.umask(0o077) and None,
    )
    assert checksum(first) == checksum(second) == checksum(PLUGIN)
    names = sorted(path.name for path in first.parent.iterdir())
    assert names == ["istio-cni", "istio-cni.json", "istio-cni.lock"]
    assert b"/one/" not in first.read_bytes()
    assert str(ROOT).encode() not in first.read_bytes()


def test_it_is_built_again_only_when_an_input_changed(tmp_path: Path) -> None:
    folder = copy_of_the_sources(tmp_path)
    built = build(folder)
    before = (checksum(built), built.stat().st_mtime_ns)
    assert (checksum(build(folder)), built.stat().st_mtime_ns) == before
    with (folder / "src/meshcni/istio.py").open("a") as file:
        file.write("\n# a comment\n")
    build(folder)
    assert checksum(built) == before[0]
    assert built.stat().st_mtime_ns > before[1]
    built.write_bytes(b"damaged")
    assert checksum(build(folder)) == before[0]


def test_the_record_names_the_components() -> None:
    record = json.loads(Path(f"{PLUGIN}.json").read_text())
    assert record["sha256"] == checksum(PLUGIN)
    assert {"python", "gcc", "libc", "libc6-dev", "libssl-dev"} <= set(record["components"])
    assert any(re.fullmatch(r"libpython3\.\d+-dev", name) for name in record["components"])
    assert "src/meshcni/plugin/__main__.py" in record["inputs"]
    assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in record["inputs"].values())


def test_it_is_one_static_position_independent_file() -> None:
    headers = subprocess.run(["readelf", "-hldW", PLUGIN], capture_output=True, text=True, check=True).stdout
    assert "Type:                              DYN" in headers
    assert "INTERP" not in headers
    assert "(NEEDED)" not in headers
    assert re.search(r"GNU_STACK .* RW ", headers)
    assert "GNU_RELRO" in headers
    assert "BIND_NOW" in headers or "NOW" in headers
    assert PLUGIN.stat().st_mode & 0o777 == 0o755


def test_openssl_costs_the_start_nothing() -> None:
    """Its pointers are left as they are, in data that no start touches: postpone.py."""
    elf = postpone.Elf(PLUGIN.read_bytes())
    size = elf.words(elf.dynamic(postpone.DT_RELRSZ), 1)[0]
    now = postpone.decoded(elf.words(elf.place(*elf.words(elf.dynamic(postpone.DT_RELR), 1)), size // postpone.WORD))
    at, _ = elf.section(postpone.SECTION)
    later = postpone.decoded(elf.words(at + postpone.WORD, elf.words(at, 1)[0]))
    assert set(now).isdisjoint(later)
    assert len(later) > len(now) > 1000
    pages = {address // 4096 for address in now}
    assert len({address // 4096 for address in later} - pages) > 50


def test_import_guard(tmp_path: Path, run_dir: Path, netns: str) -> None:
    """Every module that any path through the plugin loads; the probe only adds the last line of __main__."""
    folder = copy_of_the_sources(tmp_path)
    entry = folder / "src/meshcni/plugin/__main__.py"
    source = entry.read_text()
    assert source.rstrip().endswith("sys.exit(main())")
    tell = "posix.write(2, repr((sorted(sys.modules), sys.path, sys.meta_path)).encode())"
    entry.write_text(source.replace("    sys.exit(main())", f"    main()\n    {tell}\n    sys.exit(0)"))
    probe = build(folder)
    with AgentDouble(run_dir):
        done = run(variables(netns=netns), conf(run_dir), path=probe)
    assert done.json == RESULT
    modules, path, meta_path = eval(done.stderr)
    assert FORBIDDEN_MODULES.isdisjoint(modules)
    assert not [name for name in modules if name.startswith(("meshcni.pods", "meshcni.plugin.inquiry"))]
    assert (path, meta_path) == ([], [])
    others = {name for name in modules if not name.startswith("meshcni")}
    interpreter = {"__main__", "_codecs", "_frozen_importlib", "_imp", "builtins", "encodings", "io", "sys"}
    assert others - {"marshal", "_thread", "_warnings", "_weakref"} == {
        *interpreter,
        "posix",
        "time",
        "_socket",
        "fcntl",
    }


def test_every_frozen_module_can_be_imported(tmp_path: Path) -> None:
    folder = copy_of_the_sources(tmp_path)
    scope: dict[str, object] = {"__name__": "freeze"}
    exec((ROOT / "native/plugin/freeze.py").read_text(), scope)
    modules = scope["MODULES"]
    assert isinstance(modules, tuple)
    imports = "".join(f"import {name}\n" for name in modules)
    (folder / "src/meshcni/plugin/__main__.py").write_text(f"import sys\n{imports}sys.exit(0)\n")
    assert run({}, path=build(folder)).status == 0
    missing = "try:\n    __import__('json')\nexcept ModuleNotFoundError:\n    sys.exit(17)\n"
    (folder / "src/meshcni/plugin/__main__.py").write_text(f"import sys\n{missing}")
    assert run({}, path=build(folder)).status == 17


def test_nothing_is_frozen_that_could_not_be_imported(tmp_path: Path) -> None:
    """A module of the agent's that imports more of the library than there are stand-ins for stops the build."""
    folder = copy_of_the_sources(tmp_path)
    with (folder / "src/meshcni/pods/podidentity.py").open("a") as file:
        file.write("\n\nimport shutil\n\nif shutil.which('x'):\n    pass\n")
    command = [folder / "scripts" / "build-plugin"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "meshcni.pods.podidentity imports shutil, which is neither frozen nor built in" in done.stderr


def test_a_fault_before_any_handler_is_still_an_answer(tmp_path: Path) -> None:
    folder = copy_of_the_sources(tmp_path)
    (folder / "src/meshcni/plugin/__main__.py").write_text("__import__('nothing_like_that')\n")
    broken = build(folder)
    done = run(variables(), path=broken)
    assert (done.status, done.stderr) == (1, b"")
    assert done.json["code"] == 999
    assert run(variables("DEL"), path=broken).status == 0


@pytest.mark.parametrize(
    ("command", "namespace", "paths"),
    [
        ("VERSION", "shop", set()),
        ("DEL", "shop", set()),
        ("CHECK", "shop", set()),
        ("ADD", "kube-system", {"{run_dir}/istio-cni.log"}),
        ("ADD", "shop", {"{run_dir}/istio-cni.log", "{run_dir}/agent.sock", "{netns}", "/proc/self/ns/net"}),
    ],
)
def test_paths_touched(
    agent: AgentDouble, netns: str, tmp_path: Path, command: str, namespace: str, paths: set[str]
) -> None:
    trace = tmp_path / "trace"
    prefix = ["strace", "-f", "-e", "trace=%file,connect,bind,execve,clone,fork,vfork", "-o", str(trace)]
    done = run({**variables(command, netns, namespace), "PATH": "/usr/bin"}, conf(agent.run_dir), prefix=prefix)
    assert done.status == 0
    calls = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines()]
    touched = {name for call in calls for name in re.findall(r'"([^"]*)"', call) if name.startswith("/")}
    always = {str(PLUGIN), "/proc/self/exe", "/proc/sys/vm/overcommit_memory"}
    assert touched - always == {path.format(run_dir=agent.run_dir, netns=netns) for path in paths}
    assert not [call for call in calls if call.startswith(("clone", "fork", "vfork"))]
    assert len([call for call in calls if call.startswith("execve")]) == 1


@pytest.mark.parametrize(
    ("command", "namespace"), [("VERSION", ""), ("DEL", ""), ("ADD", "kube-system"), ("ADD", "shop")]
)
def test_memory(agent: AgentDouble, netns: str, tmp_path: Path, command: str, namespace: str) -> None:
    report = tmp_path / "rss"
    prefix = ["/usr/bin/python3", "-I", "-S", "-c", MEASURE, str(report)]
    run(variables(command, netns, namespace), conf(agent.run_dir), prefix=prefix)
    assert 0 < int(report.read_text()) <= MAX_RSS_KIB


# The peak of a child contains what it had before exec, so the child stops after exec and is measured from then on.
MEASURE = """
import ctypes, os, sys
pid = os.fork()
if pid == 0:
    ctypes.CDLL(None).ptrace(0, 0, 0, 0)  # PTRACE_TRACEME: stops at exec
    os.execv(sys.argv[2], sys.argv[2:])
ptrace = ctypes.CDLL(None).ptrace
os.waitpid(pid, 0)
ptrace(0x4200, pid, 0, ctypes.c_void_p(0x40))  # PTRACE_SETOPTIONS, PTRACE_O_TRACEEXIT: stops before it is gone
ptrace(7, pid, 0, 0)  # PTRACE_CONT
os.waitpid(pid, 0)
peak = [line.split()[1] for line in open(f"/proc/{pid}/status") if line.startswith("VmHWM")][0]
open(sys.argv[1], "w").write(peak)
ptrace(17, pid, 0, 0)  # PTRACE_DETACH
os.waitpid(pid, 0)
"""
