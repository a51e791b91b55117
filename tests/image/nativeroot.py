"""The toolchain of the lock, what it builds, and a root of locked runtime packages in which the launcher can run."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from image.binaries import Binaries
from image.fetch import fetch
from image.lockfile import Lock
from image.toolchain import MERGED, Toolchain

from image import binaries, lockfile

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "image"
LAUNCHER = "/usr/local/lib/meshcni/install-cni"
TRAMPOLINE = "/usr/local/bin/install-cni"
ENTER_USERNS = "/usr/local/lib/meshcni/enter-userns"
PLUGIN = "/opt/cni/bin/istio-cni"
QEMU = shutil.which("qemu-aarch64-static")
FIVE = 1 << 1 | 1 << 12 | 1 << 13 | 1 << 19 | 1 << 21  # linux/capability.h
USER = 65532
EVERYTHING = (1 << 64) - 1
BOUNDING_DROP, NO_NEW_PRIVS = 24, 38  # linux/prctl.h
LAST_CAPABILITY = 40

# In place of the agent: runs what its argument says. `state()` is about the process's privileges.
PROBE = """
import ctypes, json, os, subprocess, sys

def state():
    libc = ctypes.CDLL(None)
    data = (ctypes.c_uint32 * 6)()
    assert libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), data) == 0
    low = dict(zip(("effective", "permitted", "inheritable"), data))
    high = dict(zip(low, data[3:]))
    return {name: value | high[name] << 32 for name, value in low.items()} | {
        "ambient": sum(1 << number for number in range(64) if libc.prctl(47, 1, number, 0, 0) == 1),
        "secure": libc.getauxval(23), "dumpable": libc.prctl(3),
    }

def child(code):
    return json.loads(subprocess.run([LAUNCHER, code], check=True, capture_output=True).stdout)

def say(value):
    print(json.dumps(value))

LAUNCHER = "/usr/local/lib/meshcni/install-cni"

def main():
    exec(sys.argv[1], globals())
"""


@functools.cache
def lock() -> Lock:
    return lockfile.read(ROOT / "image" / "lock.json")


@functools.cache
def toolchain() -> Toolchain:
    return Toolchain(lock(), CACHE)


@functools.cache
def built(architecture: str) -> Binaries:
    return binaries.build(toolchain(), architecture)


def runtime_root(folder: Path, architecture: str) -> Path:
    """Fill a folder with the locked runtime packages, bytecode instead of sources, and what is built of ours."""
    for name in MERGED:
        (folder / "usr" / name).mkdir(parents=True)
        (folder / name).symlink_to(f"usr/{name}")
    for deb in fetch(lock().group(f"runtime/{architecture}"), CACHE).values():
        subprocess.run(["dpkg-deb", "--extract", deb, folder], check=True)
    library = folder / "usr" / "lib" / f"python{binaries.PYTHON}"
    sources = {str(path.relative_to(folder)): path.read_bytes() for path in library.rglob("*.py") if path.is_file()}
    for name, code in binaries.compile_python(toolchain(), sources, positions=False).items():
        (folder / f"{name}c").write_bytes(code)
        (folder / name).unlink()
    agent = folder / "usr" / "lib" / "meshcni" / "meshcni" / "agent"
    agent.mkdir(parents=True)
    (agent / "__main__.py").write_text(PROBE)
    (agent / "__init__.py").touch()
    (agent.parent / "__init__.py").touch()
    executables = built(architecture)
    for path, executable in (
        (LAUNCHER, executables.launcher),
        (TRAMPOLINE, executables.trampoline),
        (ENTER_USERNS, executables.enter_userns),
        (PLUGIN, executables.plugin),
    ):
        place(folder, path, executable.data)
    give_capabilities(folder, FIVE)
    if architecture != "amd64" and QEMU:
        shutil.copy(QEMU, folder / "qemu")
    for path in (folder, *folder.parents[:1]):
        path.chmod(0o755)
    return folder


def place(root: Path, path: str, data: bytes, mode: int = 0o755) -> None:
    """Put a file at an absolute path of a root."""
    file = root / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    file.chmod(mode)


def give_capabilities(root: Path, permitted: int) -> None:
    """Set the trampoline's file capabilities to `permitted+p`."""
    value = struct.pack("<5I", 0x02000000, permitted, 0, 0, 0)  # struct vfs_cap_data, revision 2, not effective
    os.setxattr(root / TRAMPOLINE.lstrip("/"), "security.capability", value)


def entered(
    root: Path,
    user: int = 0,
    bounding: int = EVERYTHING,
    no_new_privs: bool = False,
    refused: Callable[[], None] | None = None,
) -> Callable[[], None]:
    """For a child before it executes: enter the root and take on what a container runtime would give it."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def enter() -> None:
        os.umask(0o022)
        os.chroot(root)
        os.chdir("/")
        for capability in range(LAST_CAPABILITY + 1):
            if not bounding >> capability & 1 and prctl(BOUNDING_DROP, capability, 0, 0, 0) != 0:
                raise OSError(ctypes.get_errno(), "PR_CAPBSET_DROP")
        if refused:
            refused()
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        if no_new_privs:
            prctl(NO_NEW_PRIVS, 1, 0, 0, 0)

    return enter


def execute(
    root: Path, argv: Sequence[str], environ: Mapping[str, str] | None = None, **identity: object
) -> subprocess.CompletedProcess[str]:
    """Run a program of a root."""
    return subprocess.run(
        argv,
        env=dict(environ or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=entered(root, **identity),  # type: ignore[arg-type]
    )


def ask(
    root: Path, code: str, environ: Mapping[str, str] | None = None, path: str = TRAMPOLINE, **identity: object
) -> object:
    """What the probe says when it runs `code`; it must say nothing else."""
    done = execute(root, [path, code], environ, **identity)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def open_folder() -> Path:
    """A new folder that every user may enter, as they may not those of pytest."""
    folder = Path(tempfile.mkdtemp(prefix="mc-image-"))
    folder.chmod(0o755)
    return folder
