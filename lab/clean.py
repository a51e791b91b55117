"""`python -m lab.clean`: removes what a killed run left behind: folders and cgroups with the lab's prefix, no others.

Processes, mounts, netns and interfaces of a node end with the process that made it, whatever ended that one. Control
plane and nodes of a cluster are such nodes; the file that says where a cluster is goes when there is none.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from lab.node import CGROUP_ROOT, PREFIX, remove_leftovers, start_ticks


def leftovers() -> set[str]:
    """Return the names of nodes of which a folder or a cgroup exists."""
    found = {entry.name for entry in Path(tempfile.gettempdir()).glob(f"{PREFIX}*")}
    found |= {entry.name for entry in CGROUP_ROOT.glob(f"{PREFIX}*")}
    return found | {entry.name for entry in CGROUP_ROOT.glob(f"*/{PREFIX}*")}


def is_in_use(folder: Path) -> bool:
    """Tell whether the process that made the node is still running."""
    try:
        pid, ticks = (folder / "owner").read_text().split()
    except (FileNotFoundError, ValueError):
        return False
    return start_ticks(int(pid)) == int(ticks)


def main() -> None:
    """Remove the leftovers and say which."""
    for name in sorted(leftovers()):
        folder = Path(tempfile.gettempdir()) / name
        if is_in_use(folder):
            print(f"lab.clean: {name} is in use, left alone")
            continue
        remove_leftovers(name, folder)
        print(f"lab.clean: {name} removed")
    from lab.cluster import running  # heavy, and not needed by those who only look for leftovers

    if running.STATE.exists() and running.find() is None:
        print(f"lab.clean: {running.STATE} removed")


if __name__ == "__main__":
    main()
