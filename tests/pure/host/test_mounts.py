"""Which directories are the host's, by what mountinfo says in containers of several kinds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.host.mounts import MountPoint, mount_points, why_not_of_host

OVERLAY = "27 1 0:25 / / rw,relatime master:1 - overlay overlay rw,lowerdir=/a:/b,upperdir=/c"
PLAIN = "27 1 254:0 /var/lib/containers/storage/vfs/dir/ab / rw,relatime - ext4 /dev/vda rw"
PROC = "28 27 0:30 / /proc rw,nosuid - proc proc rw"
HOST_BIN = "40 27 254:0 /opt/cni/bin /host/opt/cni/bin rw - ext4 /dev/vda rw"
HOST_RUN = "41 27 0:22 /istio-cni /srv/run/istio-cni rw - tmpfs tmpfs rw,mode=755"
PODMAN_RUN = "42 27 0:70 / /srv/run rw,nosuid,nodev - tmpfs tmpfs rw"
WHOLE_HOST = "43 27 254:0 / /host rw - ext4 /dev/vda rw"
HOST_IN_MEMORY = "46 27 0:71 / /host rw - tmpfs rootfs rw"
EMPTY_DIR = (
    "44 27 254:0 /var/lib/kubelet/pods/a-b/volumes/kubernetes.io~empty-dir/run /srv/run/istio-cni rw - ext4 /dev/vda rw"
)


@pytest.mark.parametrize("root", [OVERLAY, PLAIN], ids=["overlay", "plain"])
@pytest.mark.parametrize(
    ("lines", "directory", "words"),
    [
        ((), "/host/opt/cni/bin", "does not exist"),
        ((), "/usr", "is part of the container's own file system"),
        ((HOST_BIN,), "/host/opt/cni/bin", ""),
        ((HOST_BIN,), "/host/opt/cni/bin/deeper", ""),
        ((HOST_BIN,), "/host/opt/cni/binary", "does not exist"),
        ((HOST_BIN,), "/host/etc/cni/net.d", "does not exist"),
        ((WHOLE_HOST,), "/host/etc/cni/net.d", ""),
        ((HOST_IN_MEMORY,), "/host/etc/cni/net.d", ""),
        ((HOST_RUN,), "/srv/run/istio-cni", ""),
        ((PODMAN_RUN,), "/srv/run/istio-cni", "is on a tmpfs of the container, mounted at /srv/run"),
        ((PODMAN_RUN, HOST_RUN), "/srv/run/istio-cni", ""),
        ((HOST_RUN, PODMAN_RUN), "/srv/run/istio-cni", ""),
        ((EMPTY_DIR,), "/srv/run/istio-cni", "is an emptyDir volume"),
        ((EMPTY_DIR, HOST_RUN), "/srv/run/istio-cni", ""),  # what is mounted last is on top
        ((HOST_RUN, EMPTY_DIR), "/srv/run/istio-cni", "is an emptyDir volume"),
    ],
)
def test_directory(root: str, lines: tuple[str, ...], directory: str, words: str) -> None:
    found = why_not_of_host(directory, mount_points("\n".join((root, PROC, *lines))))
    assert found == (f"{directory} {words}" if words else "")


def test_nothing_is_known_without_a_procfs() -> None:
    assert why_not_of_host("/host/opt/cni/bin", ()) == ""


def test_blanks_and_backslashes_in_paths() -> None:
    (mount,) = mount_points(r"40 27 254:0 /a\040b /c\134d\012e rw shared:1 master:2 - ext4 /dev/vda rw")
    assert mount == MountPoint("/c\\d\ne", "/a b", "ext4")


@given(st.text())
def test_any_text_is_survived(text: str) -> None:
    why_not_of_host("/host/opt/cni/bin", mount_points(text))
