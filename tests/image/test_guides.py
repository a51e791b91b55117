"""The guides hold: each of their commands is run, and what they make is used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from image.registry import Oras
from lab import daemonset
from lab.imageagent import ImageAgent
from lab.mesh import APP_PORT, Mesh
from lab.namespaces import call_in_netns
from lab.objects import sidecar_pod
from lab.traffic import address_seen
from tests.image import guides, localregistry
from tests.image.running import runtime_image

from image import keys, registry, signing, tools

HERE = Path(__file__).parent
TAG = "0.1.0"
# The tools take plain HTTP from a registry of that name, so the guides' commands need no flag for it.
HOST = f"localhost:{localregistry.PORT}"
REPOSITORY, MIRROR = f"{HOST}/mesh/install-cni", f"{HOST}/ns/dhi-istio-install-cni"


@dataclass(frozen=True, slots=True)
class Reader:
    """What somebody who follows a guide has."""

    folder: Path
    netns: str
    variables: dict[str, str]


@pytest.fixture(scope="module")
def reader(built_image: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """The signed layout in `build/image`, the public key, a registry that has the image, and credentials for it."""
    folder = tmp_path_factory.mktemp("reader")
    key = keys.generate()
    shutil.copytree(built_image, folder / "build" / "image")
    signing.sign(folder / "build" / "image", key)
    (folder / "meshcni.pub").write_bytes(key.public.pem())
    with localregistry.running(folder / "registry") as server:
        (folder / ".docker").mkdir()
        login = json.loads(server.credentials.read_text())["auths"][localregistry.HOST]
        credentials = folder / ".docker" / "config.json"
        credentials.write_text(json.dumps({"auths": {HOST: login}}))
        oras = Oras(tools.find("oras"), credentials, plain_http=True)
        call_in_netns(server.netns, lambda: registry.push(folder / "build" / "image", REPOSITORY, oras))
        yield Reader(folder, server.netns, {"REPOSITORY": REPOSITORY, "MIRROR": MIRROR, "TAG": TAG})


def test_verifying(reader: Reader) -> None:
    done = guides.run("verify.md", reader.folder, reader.variables, reader.netns)
    assert done.returncode == 0, done.stderr


def test_verifying_something_else_stops(reader: Reader, tmp_path: Path) -> None:
    """The guide's commands can fail: with another key none of what follows is reached."""
    shutil.copytree(reader.folder / "build", tmp_path / "build")
    (tmp_path / "meshcni.pub").write_bytes(keys.generate().public.pem())
    done = guides.run("verify.md", tmp_path, reader.variables, reader.netns)
    assert done.returncode != 0
    assert "failed: python -m image verify" in done.stderr


def test_migrating(reader: Reader) -> None:
    """The original's manifest with the reference changed by the guide: it does the original's job on a node."""
    manifest = reader.folder / "istio-cni-node.yaml"
    shutil.copy(HERE / "original.yaml", manifest)
    *forward, back = guides.blocks("migration.md", "sh")
    assert "cp before.yaml" in back
    assert forward
    done = guides.run("migration.md", reader.folder, reader.variables, reader.netns)
    assert done.returncode == 0, done.stderr
    assert manifest.read_text() == (HERE / "original.yaml").read_text(), "there and back again"

    with Mesh("image") as mesh:
        mesh.runtime.start()
        agent = ImageAgent(
            mesh.node,
            mesh.runtime,
            mesh.api.environment,
            mesh.node.folder / "serviceaccount",
            image=runtime_image(reader.folder / "build" / "image"),
            manifest=daemonset.read(HERE / "original.yaml"),
            verbatim=True,
        )
        mesh.agent = agent
        try:
            agent.start()
            said = [
                agent.command(*line.split()[1:]) for line in guides.blocks("migration.md", "container")[0].splitlines()
            ]
            assert all(said)
            assert "ready" in said[1]
            pod = mesh.start_pod(sidecar_pod("shop", "moved"))
            envoy = mesh.start_proxy(pod)
            assert address_seen(mesh.node.netns, pod.address(4), APP_PORT) == "127.0.0.6"
            assert envoy.captured().inbound == 1
        finally:
            agent.close()
