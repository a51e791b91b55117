"""Images in a real registry: pushed, mirrored, fetched; digests and referrers stay, passwords are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from image.model import ImageError
from image.registry import Oras
from image.stored import StoredLayout
from lab.namespaces import call_in_netns
from tests.image import localregistry, smallimage
from tests.image.localregistry import HOST, PASSWORD, USER, LocalRegistry
from tests.image.programs import Result, cosign_key, run

from image import keys, registry, signing, tools, verify

KEY, OTHER_KEY = keys.generate(), keys.generate()
TAGS = {*smallimage.RUNTIME_TAGS, *smallimage.DEV_TAGS}
REPOSITORY = f"{HOST}/mesh/istio-install-cni"
MIRROR = f"{HOST}/ns/dhi-istio-install-cni"
NOBODY = "127.0.0.1:1/mesh/istio-install-cni"
INSECURE = ["--allow-http-registry", "--allow-insecure-registry"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRegistry]:
    with localregistry.running(tmp_path_factory.mktemp("registry") / "registry") as found:
        yield found


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = smallimage.write(tmp_path_factory.mktemp("layout") / "image")
    signing.sign(path, KEY)
    return path


@pytest.fixture(scope="module")
def pushed(server: LocalRegistry, layout: Path) -> str:
    oras = Oras(tools.find("oras"), server.credentials, plain_http=True)
    assert set(call_in_netns(server.netns, lambda: registry.push(layout, REPOSITORY, oras))) == TAGS
    return REPOSITORY


@pytest.fixture
def home(tmp_path: Path, server: LocalRegistry) -> Path:
    """A home folder with the pull secret's contents where docker, oras and cosign look for them."""
    (tmp_path / ".docker").mkdir()
    (tmp_path / ".docker" / "config.json").write_bytes(server.credentials.read_bytes())
    return tmp_path


def oras(server: LocalRegistry, home: Path, *arguments: str | Path) -> Result:
    return run("oras", *arguments, home=home, netns=server.netns)


def tree(server: LocalRegistry, home: Path, reference: str) -> list[object]:
    """All referrers of a digest, and theirs, by digest and kind."""
    done = oras(server, home, "discover", "--plain-http", "--format", "json", reference)
    assert done.returncode == 0, done.stderr
    repository, _, _ = reference.partition("@")
    found = sorted((one["digest"], one["artifactType"]) for one in json.loads(done.stdout)["manifests"])
    return [(digest, kind, tree(server, home, f"{repository}@{digest}")) for digest, kind in found]


def test_every_tag_has_the_layouts_digest(server: LocalRegistry, pushed: str, layout: Path) -> None:
    tags = StoredLayout(layout).tags
    name = pushed.removeprefix(f"{HOST}/")
    for tag in TAGS:
        stored = smallimage.blob(layout, tags[tag].digest).read_bytes()
        assert server.get(f"/v2/{name}/manifests/{tag}", tags[tag].media_type) == stored
    ours = {tag for tag in server.tags(name) if not tag.startswith("sha256-")}
    assert ours == TAGS


@pytest.mark.parametrize("reference", [":1.30.3", ":1.30-dev", "@index", "@amd64", "@arm64"])
def test_cosign_verifies_in_the_registry_by_tag_and_digest(
    server: LocalRegistry, pushed: str, layout: Path, home: Path, reference: str
) -> None:
    if reference == "@index":
        reference = "@" + StoredLayout(layout).tags["1"].digest
    elif reference.startswith("@"):
        reference = "@" + smallimage.platform_digest(layout, "1", reference[1:])
    public, other = keys.write_pair(home / "a", KEY)[1], keys.write_pair(home / "b", OTHER_KEY)[1]

    def verify_signature(key: Path, *options: str) -> int:
        command = ["verify", *INSECURE, *cosign_key(key), *options, pushed + reference]
        return run("cosign", *command, home=home, netns=server.netns).returncode

    assert verify_signature(public) == 0  # by the tag sha256-HEX.sig
    assert verify_signature(public, "--experimental-oci11") == 0  # as a referrer
    assert verify_signature(other) != 0
    assert verify_signature(other, "--experimental-oci11") != 0


def test_cosign_verifies_attestations_in_the_registry(
    server: LocalRegistry, pushed: str, layout: Path, home: Path
) -> None:
    public = keys.write_pair(home / "a", KEY)[1]
    platform = f"{pushed}@{smallimage.platform_digest(layout, '1', 'arm64')}"
    command = ["verify-attestation", *INSECURE, *cosign_key(public), "--type", "slsaprovenance1", platform]
    assert run("cosign", *command, home=home, netns=server.netns).returncode == 0
    attached = [digest for digest, kind, _ in tree(server, home, platform) if "in-toto" in kind]  # type: ignore[misc]
    assert len(attached) == 4
    for digest in attached:  # and the signature of each attestation's manifest, as hardened images have it
        command = ["verify", *INSECURE, *cosign_key(public), "--experimental-oci11", f"{pushed}@{digest}"]
        assert run("cosign", *command, home=home, netns=server.netns).returncode == 0


def test_a_mirror_keeps_digests_and_referrers(server: LocalRegistry, pushed: str, layout: Path, home: Path) -> None:
    plain = ["--from-plain-http", "--to-plain-http"]
    done = oras(server, home, "cp", "-r", "--no-tty", *plain, f"{pushed}:1.30.3", f"{MIRROR}:1.30.3,1.30")
    assert done.returncode == 0, done.stderr
    digests = [
        StoredLayout(layout).tags["1.30.3"].digest,
        *(smallimage.platform_digest(layout, "1.30.3", architecture) for architecture in ("amd64", "arm64")),
    ]
    for digest in digests:
        mirrored = tree(server, home, f"{MIRROR}@{digest}")
        assert mirrored
        assert mirrored == tree(server, home, f"{pushed}@{digest}")
    public = keys.write_pair(home / "a", KEY)[1]
    command = ["verify", *INSECURE, *cosign_key(public), "--experimental-oci11", f"{MIRROR}:1.30"]
    assert run("cosign", *command, home=home, netns=server.netns).returncode == 0


@pytest.mark.parametrize("by_digest", [False, True])
def test_an_image_in_a_registry_is_verified_like_a_layout(
    server: LocalRegistry,
    pushed: str,
    layout: Path,
    tmp_path: Path,
    by_digest: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    public = keys.write_pair(tmp_path / "a", KEY)[1]
    lock = smallimage.write_lock(tmp_path / "lock.json")
    reference = f"{pushed}@{StoredLayout(layout).tags['1-dev'].digest}" if by_digest else f"{pushed}:1-dev"
    options = ["--plain-http", "--authfile", str(server.credentials), "--lock", str(lock)]
    arguments = [reference, "--key", str(public), *options]
    status = call_in_netns(server.netns, lambda: verify.main(arguments))
    said = capsys.readouterr().out
    assert status == 0, said
    assert "FAILED" not in said
    assert said.count("is about this image, signed by key") == 2 * 4


def test_the_push_command_pushes_an_unsigned_image_too(
    server: LocalRegistry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unsigned = smallimage.write(tmp_path / "image", mark="unsigned")
    target = f"{HOST}/mesh/unsigned"
    options = ["--layout", str(unsigned), "--plain-http", "--authfile", str(server.credentials)]
    assert call_in_netns(server.netns, lambda: registry.main([target, *options])) == 0
    assert {line.rsplit(":", 1)[1] for line in capsys.readouterr().out.split()} == TAGS


# --- authentication ---------------------------------------------------------------------------------------------------


def test_an_anonymous_pull_is_refused(server: LocalRegistry, pushed: str, tmp_path: Path) -> None:
    done = oras(server, tmp_path, "manifest", "fetch", "--plain-http", f"{pushed}:1")
    assert done.returncode != 0
    assert "401" in done.stderr or "credential" in done.stderr


def test_a_pull_secret_is_enough(server: LocalRegistry, pushed: str, layout: Path, tmp_path: Path) -> None:
    options = ["--from-plain-http", "--from-registry-config", str(server.credentials)]
    done = oras(server, tmp_path, "cp", "-r", *options, f"{pushed}:1", "--to-oci-layout", f"{tmp_path}/copy:1")
    assert done.returncode == 0, done.stderr
    assert StoredLayout(tmp_path / "copy").tags["1"].digest == StoredLayout(layout).tags["1"].digest


def test_logging_in_makes_credentials_that_push_and_pull(server: LocalRegistry, layout: Path, tmp_path: Path) -> None:
    authfile = tmp_path / "auth.json"
    login = ["login", "--plain-http", "--registry-config", authfile, "-u", USER, "-p", PASSWORD, HOST]
    assert oras(server, tmp_path, *login).returncode == 0
    program = Oras(tools.find("oras"), authfile, plain_http=True)
    assert call_in_netns(server.netns, lambda: registry.push(layout, f"{HOST}/mesh/login", program))


def test_logging_in_with_a_wrong_password_is_refused(server: LocalRegistry, tmp_path: Path) -> None:
    login = ["login", "--plain-http", "--registry-config", tmp_path / "auth.json", "-u", USER, "-p", "wrong", HOST]
    assert oras(server, tmp_path, *login).returncode != 0


# --- bad input --------------------------------------------------------------------------------------------------------


def failure(server: LocalRegistry, layout: Path, target: str, authfile: Path | None) -> ImageError:
    program = Oras(tools.find("oras"), authfile, plain_http=True)
    with pytest.raises(ImageError) as caught:
        call_in_netns(server.netns, lambda: registry.push(layout, target, program))
    return caught.value


def test_a_wrong_password_says_what_to_do(server: LocalRegistry, layout: Path) -> None:
    error = failure(server, layout, f"{HOST}/mesh/refused", server.wrong)
    assert HOST in error.message
    assert "log in" in error.hint
    assert not (server.storage / "docker/registry/v2/repositories/mesh/refused").exists()


def test_a_registry_that_is_down_says_so(server: LocalRegistry, layout: Path) -> None:
    error = failure(server, layout, NOBODY, server.credentials)
    assert "127.0.0.1:1" in error.message
    assert "no registry answers" in error.hint


def test_missing_credentials_are_named(server: LocalRegistry, layout: Path, tmp_path: Path) -> None:
    error = failure(server, layout, f"{HOST}/mesh/refused", tmp_path / "none.json")
    assert "none.json" in error.message


@pytest.mark.parametrize(
    "target", ["istio-install-cni", "mesh/x", f"{HOST}/mesh/x:1.30", f"{HOST}/Mesh", f"{HOST}/", ""]
)
def test_a_target_that_is_no_repository_is_refused_before_anything_is_sent(
    server: LocalRegistry, layout: Path, target: str
) -> None:
    assert "expected HOST" in failure(server, layout, target, server.credentials).message


def test_a_damaged_layout_is_not_pushed(server: LocalRegistry, tmp_path: Path) -> None:
    layout = smallimage.write(tmp_path / "image")
    victim = sorted((layout / "blobs" / "sha256").iterdir())[0]
    victim.write_bytes(b"\x00" + victim.read_bytes()[1:])
    error = failure(server, layout, f"{HOST}/mesh/damaged", server.credentials)
    assert victim.name in error.message
    assert not (server.storage / "docker/registry/v2/repositories/mesh/damaged").exists()


def test_an_image_that_is_not_there_is_named(
    server: LocalRegistry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = Oras(tools.find("oras"), server.credentials, plain_http=True)
    with pytest.raises(ImageError, match="mesh/nothing:1"):
        call_in_netns(server.netns, lambda: registry.fetch(f"{HOST}/mesh/nothing:1", tmp_path / "copy", program))
