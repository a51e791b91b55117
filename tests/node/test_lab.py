"""The lab itself: what it isolates, and what it clears away."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from lab.clean import is_in_use, leftovers
from lab.mesh import Mesh
from lab.node import CGROUP_ROOT

from meshcni import istio

ROOT = Path(__file__).parents[2]


def clean() -> str:
    done = subprocess.run([sys.executable, "-m", "lab.clean"], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout


def test_clean_leaves_a_running_node_alone(mesh: Mesh) -> None:
    assert mesh.node.name in leftovers()
    assert is_in_use(mesh.node.folder)
    assert f"{mesh.node.name} is in use" in clean()
    assert mesh.node.folder.is_dir()
    assert mesh.node.run(["hostname"]).strip() == mesh.node.name


def test_clean_removes_what_a_killed_run_left(mesh: Mesh) -> None:
    name = "meshcni-lab-0badcafe"
    hierarchy = next(entry for entry in (CGROUP_ROOT / "pids", CGROUP_ROOT) if entry.is_dir())
    (hierarchy / name / "below").mkdir(parents=True, exist_ok=True)
    folder = mesh.node.folder.with_name(name)
    folder.mkdir(exist_ok=True)
    (folder / "owner").write_text("1 1")  # process 1 exists, but it started at another time
    assert f"{name} removed" in clean()
    assert not folder.exists()
    assert not (hierarchy / name).exists()


def test_a_node_has_no_way_out_and_shares_nothing(mesh: Mesh) -> None:
    assert mesh.node.run(["ip", "route", "show", "default"]) == ""
    assert mesh.node.run(["ip", "-6", "route", "show", "default"]) == ""
    own = {line.split()[1] for line in mesh.node.run(["ip", "-o", "link"]).splitlines()}
    assert own.isdisjoint({"eth0:"}), own
    inside = mesh.node.run(["sh", "-c", "ls /run /var/lib/cni 2>/dev/null; ps -e -o comm"])
    assert "containerd" in inside
    assert Path(sys.executable).name not in inside.split(), "processes of the host are not seen"


def test_the_runtime_uses_the_chain_of_the_lab(mesh: Mesh) -> None:
    mesh.agent.ensure(mesh.agent.options)
    assert mesh.runtime.cri.loaded_chain() == ["bridge", "portmap", istio.PLUGIN_NAME]
