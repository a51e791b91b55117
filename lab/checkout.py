"""This checkout for users other than root, wherever it is."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A mount namespace in which the checkout is below directories that everybody may search.
OPENED = """
set -e
checkout=$1 closed=$2; shift 2
mount --make-rprivate /
exec 9< "$checkout"
mount -t tmpfs -o mode=755 tmpfs "$closed"
mkdir -p "$checkout"
mount -c --rbind /proc/self/fd/9 "$checkout"  # -c: taken as it is, not as the path that it was opened by
exec 9<&-
exec "$@"
"""


def opened_checkout() -> tuple[str, ...]:
    """Return a command's prefix, by which others get to this checkout. Root's home, for one, is closed to them."""
    closed = next((str(path) for path in reversed(ROOT.parents) if not path.stat().st_mode & 0o001), "")
    return ("unshare", "--mount", "sh", "-c", OPENED, "sh", str(ROOT), closed) if closed else ()
