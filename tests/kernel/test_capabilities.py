"""Without one of the capabilities: an error that says so, and nothing half done."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tests.kernel.world import Netns, state

from meshcni.host.capabilities import CAPABILITIES

# Prints what is missing, then what an ADD answers.
ONE_ADD = """
import sys
from meshcni.errors import MeshCniError
from meshcni.host.capabilities import missing_capabilities
from meshcni.pods.interception import Interception
from tests.kernel.world import Netns, apply
print(*(capability.name for capability in missing_capabilities()))
try:
    print("applied", apply(Netns(int(sys.argv[1])), Interception(), sys.argv[2]).changed)
except MeshCniError as error:
    print("refused:", error)
"""
CHART = [capability.name.removeprefix("CAP_").lower() for capability in CAPABILITIES]
# What cannot be done without; iptables-legacy opens a raw socket.
NEEDED = {
    "net_admin": ("nftables", "nft", "legacy"),
    "sys_admin": ("nftables", "nft", "legacy"),
    "net_raw": ("legacy",),
}


@pytest.mark.parametrize("dropped", ["", *CHART])
def test_add_with_the_charts_capabilities_but_one(dropped: str, variant: str, pod: Netns) -> None:
    before = state(pod)
    kept = ",".join(f"+{name}" for name in CHART if name != dropped)
    os.set_inheritable(pod.fd, True)
    command = ["setpriv", "--no-new-privs", f"--bounding-set=-all,{kept}", "--inh-caps=-all"]
    command += [sys.executable, "-c", ONE_ADD, str(pod.fd), variant]
    environment = {"PYTHONPATH": "src:.", "PATH": os.environ["PATH"]}
    done = subprocess.run(command, close_fds=False, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    missing, answer = done.stdout.rstrip("\n").split("\n", 1)

    assert missing == (f"CAP_{dropped.upper()}" if dropped else "")
    if variant in NEEDED.get(dropped, ()):
        assert answer.startswith("refused:")
        assert f"CAP_{dropped.upper()}" in answer
        assert state(pod) == before
    else:
        assert answer == "applied True"


def test_detection_without_the_right_to_make_a_namespace() -> None:
    """As in an init container, which has NET_ADMIN and NET_RAW only: no trial, but an answer."""
    code = "from meshcni.host.backends.detection import choose_variant; print(choose_variant().variant)"
    command = ["setpriv", "--bounding-set=-all,+net_admin,+net_raw", "--inh-caps=-all", sys.executable, "-c", code]
    assert subprocess.check_output(command, env={"PYTHONPATH": "src"}, text=True) == "nft\n"
