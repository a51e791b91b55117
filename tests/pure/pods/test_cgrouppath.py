"""Pods and containers in the text of /proc/PID/cgroup."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.errors import CgroupError
from meshcni.pods.cgrouppath import ContainerCgroup, parse_cgroup, parse_path, uid_key

UID = "3f0c5d1e-9a7b-4c26-8e14-0b2d6f8a9c33"
OTHER_UID = "c0ffee00-1234-4abc-9def-00112233aabb"
MANIFEST_HASH = "9d41f0a27be35c8812aa40ff6e0d71c5"
ID = "5b1e" * 16
OTHER_ID = "77aa" * 16
UNDERSCORES = UID.replace("-", "_")
DIGITS = UID.replace("-", "")

# What a path says: name, path, pod UID, container id; no UID and no id for a process of no container.
PATHS = (
    ("cgroupfs", f"/kubepods/burstable/pod{UID}/{ID}", UID, ID),
    ("cgroupfs, guaranteed", f"/kubepods/pod{UID}/{ID}", UID, ID),
    (
        "systemd, containerd",
        f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{UNDERSCORES}.slice/cri-containerd-{ID}.scope",
        UID,
        ID,
    ),
    ("systemd, CRI-O", f"/kubepods.slice/kubepods-pod{UNDERSCORES}.slice/crio-{ID}.scope", UID, ID),
    ("systemd, CRI-O's conmon", f"/kubepods.slice/kubepods-pod{UNDERSCORES}.slice/crio-conmon-{ID}.scope", UID, ID),
    ("systemd, docker", f"/kubepods.slice/kubepods-pod{UNDERSCORES}.slice/docker-{ID}.scope", UID, ID),
    (
        "containerd that takes a systemd path for a cgroupfs one",
        f"/system.slice/containerd.service/kubepods-burstable-pod{UNDERSCORES}.slice:cri-containerd:{ID}",
        UID,
        ID,
    ),
    (
        "kind",
        f"/docker/{OTHER_ID}/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{UNDERSCORES}.slice/"
        f"cri-containerd-{ID}.scope",
        UID,
        ID,
    ),
    ("kind, cgroupfs", f"/kubelet/kubepods/besteffort/pod{UID}/{ID}", UID, ID),
    ("seen from a cgroup namespace", f"/../../pod{UID}/{ID}", UID, ID),
    (
        "systemd, seen from a cgroup namespace",
        f"/../../kubepods-pod{UNDERSCORES}.slice/cri-containerd-{ID}.scope",
        UID,
        ID,
    ),
    ("a static pod", f"/kubepods/pod{MANIFEST_HASH}/{ID}", MANIFEST_HASH, ID),
    ("a UID without separators", f"/kubepods/pod{DIGITS}/{ID}", DIGITS, ID),
    ("a UID with capital letters", f"/kubepods/pod{UID.upper()}/{ID}", UID.upper(), ID),
    ("Kata's sandbox", f"/kubepods/besteffort/pod{UID}/kata_{ID}", UID, ID),
    ("a short container id", f"/kubepods/pod{UID}/web", UID, "web"),
    ("a cgroup made inside the container", f"/kubepods/pod{UID}/{ID}/init.scope", UID, "init"),
    (
        "a pod's name inside another's container",
        f"/kubepods/pod{UID}/{ID}/kubepods/pod{OTHER_UID}/{OTHER_ID}",
        UID,
        OTHER_ID,
    ),
    ("CRI-O without the pod", f"/machine.slice/crio-{ID}.scope", None, ID),
    ("CRI-O without the pod, cgroupfs", f"/crio/{ID}", None, ID),
    ("CRI-O's conmon without the pod", f"/machine.slice/crio-conmon-{ID}.scope", None, None),
    ("a container's name inside a container of CRI-O", f"/machine.slice/crio-{ID}.scope/crio-{OTHER_ID}", None, None),
    ("the root", "/", None, None),
    ("nothing", "", None, None),
    ("a service", "/system.slice/containerd.service", None, None),
    ("a container of docker's own", f"/docker/{ID}", None, None),
    ("a pod's cgroup without a container", f"/kubepods/pod{UID}", None, None),
    ("a pod's slice without a container", f"/kubepods.slice/kubepods-pod{UNDERSCORES}.slice/", None, None),
    ("a UID with a digit too few", f"/kubepods/pod{UID[:-1]}/{ID}", None, None),
    ("a UID with no hexadecimal digit", f"/kubepods/pod{UID[:-1]}g/{ID}", None, None),
    ("a UID with two separators", f"/kubepods/pod{UID.replace('-', '--')}/{ID}", None, None),
    ("a UID without its word", f"/kubepods/{UID}/{ID}", None, None),
    ("a word that ends in pod", f"/kubepods/xpod{UID}/{ID}", None, None),
    ("CRI-O with another pod's UID behind the word", f"/pod{UID}crio-{ID}", None, None),
    ("a removed cgroup", f"/kubepods/pod{UID}/{ID} (deleted)", None, None),
)


@pytest.mark.parametrize(("path", "uid", "container"), [case[1:] for case in PATHS], ids=[case[0] for case in PATHS])
def test_paths(path: str, uid: str | None, container: str | None) -> None:
    expected = None if container is None else ContainerCgroup(uid, container)
    assert parse_path(path) == expected
    assert parse_cgroup(f"0::{path}\n") == expected


def test_every_hierarchy_of_cgroup_v1_counts() -> None:
    text = (
        f"12:hugetlb:/kubepods/pod{UID}/{ID}\n11:cpu,cpuacct:/kubepods/pod{UNDERSCORES}/{ID}\n"
        "10:rdma:/\n1:name=systemd:/system.slice/containerd.service\n0::/system.slice/containerd.service\n"
    )
    assert parse_cgroup(text) == ContainerCgroup(UID, ID)
    assert parse_cgroup(text.rstrip("\n")) == ContainerCgroup(UID, ID)
    assert parse_cgroup("") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"2:cpu:/kubepods/pod{UID}/{ID}\n1:pids:/kubepods/pod{UID}/{OTHER_ID}\n", "those of two containers"),
        (f"2:cpu:/kubepods/pod{UID}/{ID}\n1:pids:/kubepods/pod{OTHER_UID}/{ID}\n", "those of two pods"),
        (f"2:cpu:/kubepods/pod{UID}/{ID}\n1:pids:/crio-{ID}\n", "those of two pods"),
        (f"2:cpu:/kubepods/pod{UID}/{ID}\n1:pids:/crio-{OTHER_ID}\n", "those of two containers"),
        ("0:/\n", "the cgroup line '0:/' is not of the form"),
        ("0::/\n\n", "the cgroup line '' is not of the form"),
        ("nonsense", "the cgroup line 'nonsense' is not of the form"),
    ],
)
def test_contradictions_and_nonsense(text: str, message: str) -> None:
    with pytest.raises(CgroupError, match=re.escape(message)):
        parse_cgroup(text)


def test_a_contradiction_names_both_sides() -> None:
    with pytest.raises(CgroupError) as caught:
        parse_cgroup(f"1:pids:/crio-{ID}\n0::/kubepods/pod{UID}/{OTHER_ID}\n")
    assert f"container {ID} of pod (not named), container {OTHER_ID} of pod {UID}" in str(caught.value)


# --- for whatever a runtime may come up with --------------------------------------------------------------------------

PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
uids = st.uuids().map(str)
names = st.text("0123456789abcdefghijklmnopqrstuvwxyzABCXYZ", min_size=1, max_size=70)
marks = st.sampled_from(PUNCTUATION)
# Neither "pod" nor "crio" can come together from these letters.
folders = st.lists(st.text("abeks" + PUNCTUATION, max_size=8), max_size=5).map("/".join)


@given(uids, names, folders, folders, st.lists(marks | st.just(""), min_size=4, max_size=4), marks, marks, marks)
def test_any_separators(
    uid: str, name: str, before: str, between: str, inside: list[str], first: str, second: str, third: str
) -> None:
    groups = uid.split("-")
    spelled = groups[0] + "".join(mark + group for mark, group in zip(inside, groups[1:], strict=True))
    expected = groups[0] + "".join(
        ("-" if mark else "") + group for mark, group in zip(inside, groups[1:], strict=True)
    )
    for end in ("", ".scope"):
        found = parse_path(f"{before}{first}pod{spelled}{second}{between}{third}{name}{end}")
        assert found == ContainerCgroup(expected, name)
        assert uid_key(found.pod_uid or "") == uid_key(uid)


@given(uids, uids, names, folders)
def test_no_process_can_name_itself_after_another_pod(own: str, other: str, name: str, chosen: str) -> None:
    found = parse_path(f"/kubepods/pod{own}/{name}/{chosen}/kubepods/pod{other}/{name}")
    assert found is not None
    assert found.pod_uid == own


@pytest.mark.parametrize("separator", ["\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028"])
def test_only_a_line_feed_ends_a_line(separator: str) -> None:
    inside = f"0::/kubepods/pod{UID}/{ID}/x-{separator}0::/kubepods/pod{OTHER_UID}/{OTHER_ID}\n"
    assert parse_cgroup(inside) == ContainerCgroup(UID, OTHER_ID)


@given(st.text() | st.text("0:/pod-crio.scope\n"))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = parse_cgroup(text)
    except CgroupError:
        return
    assert found is None or found.container_id


def test_a_hostile_path_costs_little() -> None:
    # 4 KiB, the longest there can be, of almost-pods; a search that starts over at each would not end within the test.
    assert parse_path(f"/pod{UID}-" * 95 + "/") is None
