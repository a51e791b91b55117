"""Which pod and which container a process belongs to, by the text of its /proc/PID/cgroup.

The kubelet names a pod's cgroup after the pod's UID, the runtime names the container's after the container's id; how
both are separated depends on the cgroup driver and on the runtime. Upstream: cni/pkg/nodeagent/podcgroupns_linux.go.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from meshcni.errors import CgroupError

_SCOPE = ".scope"  # of systemd, behind the container's id
_PUNCTUATION = r"[!-/:-@\[-`{-~]"
_OTHER = r"[^!-/:-@\[-`{-~]"
_UID = rf"{_PUNCTUATION}?".join(rf"[0-9A-Fa-f]{{{digits}}}" for digits in (8, 4, 4, 4, 12))
# Of several pods in a path the outermost counts: the kubelet names that one, but what is below a container's cgroup its
# own processes may name as they like, such as after another pod.
_IN_POD = re.compile(rf"{_PUNCTUATION}pod({_UID}){_PUNCTUATION}(?:.*{_PUNCTUATION})?({_OTHER}+)\Z", re.DOTALL)
_NAMES_POD = re.compile(rf"pod{_UID}")
_CRIO = re.compile(rf"crio{_PUNCTUATION}({_OTHER}+)\Z")  # CRI-O outside the kubelet's cgroups
_IN_CRIO_CONTAINER = re.compile(rf"crio{_PUNCTUATION}[0-9a-f]{{64}}{_PUNCTUATION}")
_ANY_PUNCTUATION = re.compile(_PUNCTUATION)


@dataclass(frozen=True, slots=True)
class ContainerCgroup:
    """A container's cgroup: `pod_uid` with its groups separated by `-` or by nothing, None when the path names none.

    A static pod's UID here is the hash of its manifest: 32 hexadecimal digits, not the UID of its API object.
    """

    pod_uid: str | None
    container_id: str


def parse_cgroup(text: str) -> ContainerCgroup | None:
    """Read a whole /proc/PID/cgroup; None for a process that is in no container of a pod.

    Raises CgroupError for a line of another form than `ID:CONTROLLERS:PATH`, and when lines contradict each other.
    """
    found: ContainerCgroup | None = None
    # At line feeds only, as the kernel forbids no other separator in a cgroup's name.
    for line in text.removesuffix("\n").split("\n") if text else ():
        parts = line.split(":", 2)
        if len(parts) != 3:
            raise CgroupError(f"the cgroup line {line[:200]!r} is not of the form ID:CONTROLLERS:PATH")
        here = parse_path(parts[2])
        if here is None or here == found:
            continue
        if found is not None:
            what = "pods" if here.container_id == found.container_id else "containers"
            raise CgroupError(f"its cgroups are those of two {what}: {_words(found)}, {_words(here)}")
        found = here
    return found


def parse_path(path: str) -> ContainerCgroup | None:
    """Read the path of one hierarchy; None when it is no container's."""
    path = path.removesuffix(_SCOPE)
    if in_pod := _IN_POD.search(path):
        return ContainerCgroup(_ANY_PUNCTUATION.sub("-", in_pod[1]), in_pod[2])
    crio = _CRIO.search(path)
    if crio is None or _NAMES_POD.search(path) or _IN_CRIO_CONTAINER.search(path):
        return None
    return ContainerCgroup(None, crio[1])


def uid_key(uid: str) -> str:
    """Return what compares equal for all spellings of a pod's UID: its digits alone."""
    return uid.replace("-", "")


def _words(cgroup: ContainerCgroup) -> str:
    return f"container {cgroup.container_id} of pod {cgroup.pod_uid or '(not named)'}"
