"""The image has no lightkube: what its commands say to a kubeconfig, to a proxy, and where there is no cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from tests.image.layers import file_system, unpack

from image import definition

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = definition.read(ROOT / "image" / "image.toml", ROOT / "src").version
OUTSIDE = "with a kubeconfig use the meshcni command line outside of the image"
POD = {"KUBERNETES_SERVICE_HOST": "198.51.100.1", "KUBERNETES_SERVICE_PORT": "443"}


@pytest.fixture(scope="module")
def root(built_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("chroot needs root")
    folder = tmp_path_factory.mktemp("root")
    unpack(file_system(built_image, RUNTIME, "amd64"), folder)
    folder.chmod(0o755)
    (folder / "tmp" / "config").write_text("apiVersion: v1\nkind: Config\n")
    yield folder
    shutil.rmtree(folder)


def run(root: Path, *arguments: str, user: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """`install-cni` in a network namespace without a way out."""
    words = ["/usr/bin/unshare", "--net", "/usr/sbin/chroot", f"--userspec={user}:{user}", str(root), "install-cni"]
    full = {"PATH": "/usr/local/bin:/usr/sbin", **environment}
    return subprocess.run([*words, *arguments], capture_output=True, text=True, env=full, timeout=60)


EXPLAIN = ("explain", "pod", "shop/web")
# arguments, environment -> exit status, what is said
REFUSED: dict[str, tuple[tuple[str, ...], Mapping[str, str], int, str]] = {
    "flag": ((*EXPLAIN, "--kubeconfig", "/tmp/config"), {}, 2, "kubeconfig '/tmp/config' (flag --kubeconfig) cannot"),
    "flag, no such file": ((*EXPLAIN, "--kubeconfig=x"), {}, 2, "kubeconfig 'x' (flag --kubeconfig) cannot be used"),
    "flag in a pod": ((*EXPLAIN, "--kubeconfig", "x"), POD, 2, "kubeconfig 'x' (flag --kubeconfig) cannot be used"),
    "variable": (EXPLAIN, {"KUBECONFIG": "/tmp/config"}, 1, "'/tmp/config' (environment variable KUBECONFIG) cannot"),
    "both": ((*EXPLAIN, "--kubeconfig", "x"), {"KUBECONFIG": "y"}, 2, "kubeconfig 'x' (flag --kubeconfig) cannot"),
    "no cluster": (EXPLAIN, {}, 2, "no cluster to ask: KUBERNETES_SERVICE_HOST is not set"),
}


@pytest.mark.parametrize("user", [0, 65532, 12345])  # the last has no account and no home
@pytest.mark.parametrize(("arguments", "environment", "status", "said"), REFUSED.values(), ids=REFUSED)
def test_explain_uses_no_kubeconfig(
    root: Path, user: int, arguments: tuple[str, ...], environment: Mapping[str, str], status: int, said: str
) -> None:
    done = run(root, *arguments, user=user, **environment)
    assert (done.returncode, done.stdout) == (status, "")
    problem, hint = done.stderr.splitlines()
    assert problem.startswith("meshcni explain: ")
    assert said in problem
    assert "lightkube, which is not installed here" in problem
    assert hint.endswith(OUTSIDE)
    assert "the agent's pod" in hint


def test_the_agent_has_no_flag_for_a_kubeconfig(root: Path) -> None:
    assert run(root, "--kubeconfig=/tmp/config").stderr.startswith("error: unknown flag: --kubeconfig\n")


def test_explain_in_a_pod_without_its_account(root: Path) -> None:
    done = run(root, *EXPLAIN, **POD)
    assert (done.returncode, done.stdout) == (1, "")
    assert "automountServiceAccountToken" in done.stderr
    assert "Traceback" not in done.stderr


def test_explain_goes_through_a_proxy_with_what_the_image_has(root: Path) -> None:
    """As far as the proxy, at which nobody listens: everything that this takes has been imported by then."""
    account = root / "run/secrets/kubernetes.io/serviceaccount"  # /var/run is a link to /run
    account.mkdir(parents=True)
    shutil.copy(root / "etc/ssl/certs/ca-certificates.crt", account / "ca.crt")
    (account / "token").write_text("a-token")
    try:
        done = run(root, *EXPLAIN, **POD, HTTPS_PROXY="http://me:s3cret@127.0.0.1:3128")
    finally:
        shutil.rmtree(root / "run" / "secrets")
    assert (done.returncode, done.stdout) == (1, "")
    assert "proxy 127.0.0.1:3128 (HTTPS_PROXY) cannot be reached: " in done.stderr
    assert "exempt 198.51.100.1 in NO_PROXY" in done.stderr
    assert "s3cret" not in done.stderr
    assert "Traceback" not in done.stderr
