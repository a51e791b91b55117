"""Hosts full of pods' processes: one made of files, one of processes; a contract test takes either.

Both have process 1, which is on the host's network, and give each process a cgroup as the kubelet and a runtime do.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.kernel.world import Netns

_HEADLESS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(1e6,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""
HOST_CGROUP = "/system.slice/containerd.service"


class ProcessWorld(Protocol):
    """A host: `root` is its procfs, `host` its netns."""

    root: str
    host: Netns

    def start(self, cgroup: str, netns: Netns | None = None, comm: str = "app", arguments: str = "") -> int:
        """Start a process, younger than all before, in `netns` (the host's by default); return its number."""

    def start_headless(self, cgroup: str, netns: Netns) -> int:
        """Start a process whose first thread ends while another goes on."""

    def end(self, pid: int) -> None:
        """End a process and wait until it is gone."""

    def become_zombie(self, pid: int) -> None:
        """End a process that nobody waits for."""

    def close(self) -> None:
        """Leave nothing."""


class FileWorld:
    """A procfs of plain files, whose namespaces are links to descriptors of this process."""

    def __init__(self, folder: Path) -> None:
        self.root = str(folder)
        self.host = Netns()
        self._last_pid, self._last_start = 0, 70_298_900
        (folder / "self").mkdir()  # as in a real one, these are no processes
        (folder / "meminfo").touch()
        self.start("/init.scope", comm="systemd")

    def start(
        self,
        cgroup: str,
        netns: Netns | None = None,
        comm: str = "app",
        arguments: str = "",
        *,
        pid: int = 0,
        start: int = 0,
        uid: int = 0,
        pid_namespace: int = 4026531836,  # PROC_PID_INIT_INO: the host's own, in no container
    ) -> int:
        self._last_pid = pid or self._last_pid + 1
        self._last_start = start or self._last_start + 11
        process = Path(self.root, str(self._last_pid))
        (process / "ns").mkdir(parents=True)
        (process / "ns" / "net").symlink_to(f"/proc/{os.getpid()}/fd/{(netns or self.host).fd}")
        (process / "ns" / "pid").symlink_to(_folder(Path(self.root) / "pidns" / str(pid_namespace)))
        self.write(self._last_pid, "comm", comm[:15] + "\n")
        self.write(self._last_pid, "cmdline", (arguments or comm).replace(" ", "\0") + "\0")
        self.write(self._last_pid, "cgroup", cgroup if ":" in cgroup.split("/")[0] else f"0::{cgroup}\n")
        self.write(
            self._last_pid, "status", f"Name:\t{comm}\nPid:\t{self._last_pid}\nUid:\t{uid}\t1{uid}\t2{uid}\t3{uid}\n"
        )
        self._write_stat(self._last_pid, comm, "S", self._last_start)
        return self._last_pid

    def start_headless(self, cgroup: str, netns: Netns) -> int:
        pid = self.start(cgroup, netns)
        process = Path(self.root, str(pid))
        shutil.copytree(process, process / "task" / str(pid + 1), symlinks=True)
        shutil.copytree(process, process / "task" / str(pid), symlinks=True, ignore=shutil.ignore_patterns("task"))
        for folder in (process, process / "task" / str(pid)):
            (folder / "ns" / "net").unlink()
            (folder / "cgroup").write_text("0::/\n")  # where the kernel puts what has ended
        return pid

    def write(self, pid: int, name: str, text: str) -> None:
        Path(self.root, str(pid), name).write_text(text)

    def _write_stat(self, pid: int, comm: str, state: str, start: int) -> None:
        before = "0 " * 18
        self.write(pid, "stat", f"{pid} ({comm[:15]}) {state} {before}{start} 2678784 178 18446744073709551615 1 2 3\n")

    def end(self, pid: int) -> None:
        shutil.rmtree(Path(self.root, str(pid)))

    def become_zombie(self, pid: int) -> None:
        Path(self.root, str(pid), "ns", "net").unlink()
        self.write(pid, "cmdline", "")

    def close(self) -> None:
        self.host.close()


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


class RealWorld:
    """Processes in a PID namespace of their own, with its procfs, in cgroups of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.host = Netns()
        self._folder = folder
        self._cgroups = cgroup2_mount() / f"mc-k-{os.getpid()}"
        self._cgroups.mkdir()
        self._last_start = -1
        unshare = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sleep", "infinity")
        self._children = [self.host.call(lambda: subprocess.Popen(unshare))]
        children = Path(f"/proc/{self._children[0].pid}/task/{self._children[0].pid}/children")
        while not (numbers := children.read_text().split()):
            assert self._children[0].poll() is None, "unshare failed"
        self._init = int(numbers[0])
        self.root = f"/proc/{self._init}/root/proc"
        while Path(f"/proc/{self._init}/comm").read_text() != "sleep\n":  # before, its /proc is that of the machine
            assert self._children[0].poll() is None, "unshare failed"

    def start(self, cgroup: str, netns: Netns | None = None, comm: str = "app", arguments: str = "") -> int:
        program = self._folder / comm
        if not program.exists():
            shutil.copy(shutil.which("sleep") or "", program)
        while True:
            pid = self._launch(cgroup, netns or self.host, arguments or comm, str(program), "infinity")
            stat = Path(self.root, str(pid), "stat")
            while f"({comm[:15]})" not in stat.read_text():
                pass
            start = int(stat.read_text().rpartition(")")[2].split()[19])
            if start > self._last_start:
                self._last_start = start
                return pid
            self.end(pid)  # in the same clock tick as the one before

    def start_headless(self, cgroup: str, netns: Netns) -> int:
        pid = self._launch(cgroup, netns, "headless", sys.executable, "-c", _HEADLESS)
        while ") Z " not in Path(self.root, str(pid), "stat").read_text():
            pass
        return pid

    def _launch(self, cgroup: str, netns: Netns, name: str, *command: str) -> int:
        """Start a program in a cgroup, with `name` as its first argument; return its number in the PID namespace."""
        here = self._cgroups / cgroup.lstrip("/")
        here.mkdir(parents=True, exist_ok=True)
        script = 'echo 0 >"$1" && echo $$ && name=$2 && shift 2 && exec -a "$name" "$@"'
        inside = ("nsenter", f"--pid=/proc/{self._init}/ns/pid", "bash", "-c", script, "-")
        line = (*inside, str(here / "cgroup.procs"), name, *command)
        child = netns.call(lambda: subprocess.Popen(line, stdout=subprocess.PIPE, text=True))
        self._children.append(child)
        assert child.stdout is not None
        with child.stdout:
            return int(child.stdout.readline())

    def end(self, pid: int) -> None:
        os.kill(self._outside(pid), signal.SIGKILL)
        while Path(self.root, str(pid)).exists():
            pass

    def become_zombie(self, pid: int) -> None:
        outside = self._outside(pid)
        parent = int(Path(f"/proc/{outside}/stat").read_text().rpartition(")")[2].split()[1])
        os.kill(parent, signal.SIGSTOP)  # nsenter: it does not wait for its child any more
        while ") T " not in Path(f"/proc/{parent}/stat").read_text():
            pass
        os.kill(outside, signal.SIGKILL)
        while ") Z " not in Path(self.root, str(pid), "stat").read_text():
            pass

    def _outside(self, pid: int) -> int:
        """Return the number that a process of the PID namespace has for us."""
        for child in self._children:
            for number in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split():
                status = Path(f"/proc/{number}/status").read_text()
                if next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1] == str(pid):
                    return int(number)
        raise AssertionError(f"no process {pid}")

    def close(self) -> None:
        os.kill(self._init, signal.SIGKILL)  # and with it every process of its PID namespace
        for child in self._children[1:]:
            child.send_signal(signal.SIGCONT)  # those that were to wait for nobody
            child.wait()
        self._children[0].wait()  # which waits until that PID namespace is empty
        for folder in sorted(self._cgroups.rglob("*/"), reverse=True):
            _remove_cgroup(folder)
        _remove_cgroup(self._cgroups)
        self.host.close()


def _remove_cgroup(folder: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            return folder.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)  # a process that was killed is still on its way out


def cgroup2_mount() -> Path:
    """Return where the unified hierarchy is mounted; the root may be all there is."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _device, place, kind, *_rest = line.split()
        if kind == "cgroup2":
            return Path(place)
    raise FileNotFoundError("no cgroup2 hierarchy is mounted")


@dataclass(frozen=True)
class PodPaths:
    """How a pod's containers are named in a cgroup path."""

    uid: str

    def cgroupfs(self, container: str) -> str:
        return f"/kubepods/besteffort/pod{self.uid}/{container}"

    def systemd(self, container: str) -> str:
        slices = "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort"
        return f"{slices}-pod{self.uid.replace('-', '_')}.slice/cri-containerd-{container}.scope"
