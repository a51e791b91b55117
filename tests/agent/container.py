"""The agent as a container's process: a root of its own with chosen parts of the host, a user with capabilities."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab.checkout import opened_checkout
from tests.agent.scene import Scene

CHART = ("dac_override", "net_admin", "net_raw", "sys_ptrace", "sys_admin")
NONROOT = 65532
ROOT = Path(__file__).parents[2]
# The root is an overlay over the machine's, whose upper directory shows what the container has written into itself.
SCRIPT = """
set -e
base=$1 keep=$2; shift 2
mount --make-rprivate /
mount -t tmpfs tmpfs "$base"
mkdir "$base/upper" "$base/work" "$base/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$base/upper,workdir=$base/work" "$base/root"
for place in /proc /sys /dev "$keep"; do mount --rbind "$place" "$base/root$place"; done
while [ "$1" != -- ]; do
    mkdir -p "$base/root$2"
    mount --rbind "$1" "$base/root$2"
    shift 2
done
shift
exec chroot "$base/root" "$@"
"""


def user(uid: int, capabilities: Sequence[str] = CHART) -> tuple[str, ...]:
    """A command's prefix: run it as that user with exactly these capabilities, as ambient ones when not root."""
    sets = "".join(f",+{name}" for name in capabilities)
    prefix = ("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", f"--bounding-set=-all{sets}")
    if not uid:
        return (*prefix, "--inh-caps=-all")
    opened = () if "dac_override" in capabilities else opened_checkout()
    return (*opened, *prefix, f"--inh-caps=-all{sets}", f"--ambient-caps=-all{sets}")


def run_as(scene: Scene, prefix: Sequence[str]) -> None:
    """Let the agents that are started from now on run behind `prefix`."""
    scene.program = (*prefix, sys.executable, "-m", "meshcni.agent")


class Container:
    """Puts the agents of a scene into a root of their own; `mounts` are directories of the host by where they are seen.

    The scene's account is at its place, the rest of its directories are the node's. The environment is the container's.
    """

    def __init__(self, scene: Scene, mounts: Mapping[str, Path] | None = None, prefix: Sequence[str] = ()) -> None:
        self.scene = scene
        self.base = scene.directory / "container"
        self.base.mkdir(exist_ok=True)
        # Not by way of the absolute link /var/run, which leads out of the new root.
        pairs = [
            part
            for inside, outside in (mounts or {}).items()
            for part in (str(outside), inside.replace("/var/run/", "/run/"))
        ]
        command = ("unshare", "--mount", "sh", "-c", SCRIPT, "sh", str(self.base), str(ROOT), *pairs)
        account = (str(scene.directory / "account"), ACCOUNT_DIR)
        source = (str(scene.directory / "source"), SOURCE_DIR)
        run_as(scene, (*command, *account, *source, "--", *prefix))

    def environment(self) -> dict[str, str]:
        """What the manifest of the guide gives, which is nothing but where this agent's own things are."""
        defaults = {"MOUNTED_CNI_NET_DIR", "CNI_AGENT_RUN_DIR", "CNI_BINARY_TARGET_DIR", "NODE_NAME", "POD_NAME"}
        cleared = dict.fromkeys((*defaults, "POD_NAMESPACE"), "")
        return cleared | {
            "PYTHONPATH": str(ROOT / "src"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "SERVICE_ACCOUNT_DIR": ACCOUNT_DIR,
            "CNI_BINARY_SOURCE_DIR": SOURCE_DIR,
            "REPAIR_ENABLED": "false",
        }


def written(pid: int) -> list[str]:
    """What a running container has in the directories that should be the host's, and the machine below it has not."""
    root = Path(f"/proc/{pid}/root")
    found = (path for folder in LOOKED_AT for path in (root / folder).rglob("*") if not path.is_dir())
    names = {f"/{path.relative_to(root)}": path for path in found}
    return sorted(name for name, path in names.items() if not _same(Path(name), path))


def _same(one: Path, other: Path) -> bool:
    try:
        return one.lstat().st_mtime_ns == other.lstat().st_mtime_ns
    except FileNotFoundError:
        return False


LOOKED_AT = ("host", "opt/cni/bin", "etc/cni/net.d", "run/istio-cni")
ACCOUNT_DIR = "/srv/account"
SOURCE_DIR = "/srv/source"
