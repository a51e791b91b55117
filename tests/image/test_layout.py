"""The finished layout, read by us and by others; and what is left when writing one goes wrong."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from image.build import lock_of
from image.model import ImageError
from image.referrers import INDEX, MANIFEST
from tests.image.layers import Layout

from image import definition, layout, lockfile

ROOT = Path(__file__).resolve().parents[2]
DEFINITION = definition.read(ROOT / "image" / "image.toml", ROOT / "src")
LOCK = lockfile.read(ROOT / "image" / "lock.json")
CREATED = LOCK.created.strftime("%Y-%m-%dT%H:%M:%SZ")
PATH = "PATH=/opt/cni/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PLATFORMS = {"amd64": {"os": "linux", "architecture": "amd64"}, "arm64": {"os": "linux", "architecture": "arm64"}}
PLATFORMS["arm64"]["variant"] = "v8"
each = pytest.mark.parametrize(
    ("variant", "architecture"), [(v, a) for v in ("runtime", "dev") for a in ("amd64", "arm64")]
)


def tag_of(variant: str) -> str:
    return DEFINITION.version + {"runtime": "", "dev": "-dev"}[variant]


def test_the_tags_are_those_of_the_grammar(built_image: Path) -> None:
    major, minor, _ = DEFINITION.version.split(".")
    versions = (major, f"{major}.{minor}", DEFINITION.version)
    expected = {f"{v}{s}{d}" for v in versions for s in ("", "-debian", "-debian13") for d in ("", "-dev")}
    tags = Layout(built_image).tags
    assert set(tags) == expected
    assert len({tags[tag].digest for tag in expected if tag.endswith("-dev")}) == 1
    assert len({tags[tag].digest for tag in expected if not tag.endswith("-dev")}) == 1


def test_every_blob_is_what_its_name_says_and_something_names_it(built_image: Path) -> None:
    files = list((built_image / "blobs" / "sha256").iterdir())
    for file in files:
        assert hashlib.sha256(file.read_bytes()).hexdigest() == file.name
        assert file.stat().st_mode & 0o777 == 0o644
    assert {f"sha256:{file.name}" for file in files} == set(Layout(built_image).stored.reachable())
    assert sorted(one.name for one in built_image.iterdir()) == ["blobs", "index.json", "oci-layout"]


@pytest.mark.parametrize("variant", ["runtime", "dev"])
def test_an_index_has_both_platforms(built_image: Path, variant: str) -> None:
    index = Layout(built_image).index(tag_of(variant)).content
    assert index["mediaType"] == INDEX
    assert [row["platform"] for row in index["manifests"]] == [PLATFORMS["amd64"], PLATFORMS["arm64"]]


@each
def test_the_configuration(built_image: Path, variant: str, architecture: str) -> None:
    read = Layout(built_image)
    manifest = read.manifest(tag_of(variant), architecture)
    config = json.loads(read.blob(manifest.children[0]))
    assert {key: config.get(key) for key in ("os", "architecture", "variant")} == {
        "variant": None,
        **PLATFORMS[architecture],
    }
    assert config["created"] == CREATED
    run = config["config"]
    assert run["User"] == {"runtime": "65532:65532", "dev": "0:0"}[variant]
    assert run["Entrypoint"] == ["/usr/local/bin/install-cni"]
    assert "Cmd" not in run
    assert run["WorkingDir"] == "/"
    more = {"runtime": [], "dev": ["DEBIAN_FRONTEND=noninteractive"]}[variant]
    assert sorted(run["Env"]) == sorted([PATH, *more])
    blobs = [read.blob(one) for one in manifest.children[1:]]
    digests = [f"sha256:{hashlib.sha256(gzip.decompress(blob)).hexdigest()}" for blob in blobs]
    assert config["rootfs"] == {"type": "layers", "diff_ids": digests}
    assert [row["created"] for row in config["history"]] == [CREATED] * len(blobs)
    assert not any(row.get("empty_layer") for row in config["history"])


@each
def test_the_annotations_say_what_the_image_is(built_image: Path, variant: str, architecture: str) -> None:
    read = Layout(built_image)
    manifest, index = read.manifest(tag_of(variant), architecture), read.index(tag_of(variant))
    annotations = manifest.content["annotations"]
    config = json.loads(read.blob(manifest.children[0]))
    assert manifest.content["mediaType"] == MANIFEST
    assert annotations == index.content["annotations"] == config["config"]["Labels"]
    expected = {
        "org.opencontainers.image.title": DEFINITION.title,
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.version": DEFINITION.version,
        "org.opencontainers.image.created": CREATED,
        "io.meshcni.image.variant": variant,
        "io.meshcni.image.distribution": "debian-13",
        "io.meshcni.image.shell": {"runtime": "", "dev": "bash"}[variant],
        "io.meshcni.image.package-manager": {"runtime": "", "dev": "apt"}[variant],
        "io.meshcni.image.fips": "false",
        "io.meshcni.image.lock": f"sha256:{LOCK.digest}",
    }
    assert expected.items() <= annotations.items()


def test_the_dev_variant_begins_with_the_layers_of_the_runtime_one(built_image: Path) -> None:
    read = Layout(built_image)
    for architecture in PLATFORMS:
        layers = [read.manifest(tag_of(one), architecture).children[1:] for one in ("runtime", "dev")]
        assert layers[1][: len(layers[0])] == layers[0]
        assert len(layers[1]) == len(layers[0]) + 1


@pytest.mark.parametrize("architecture", ["amd64", "arm64"])
def test_the_runtime_image_is_small(built_image: Path, architecture: str) -> None:
    layers = Layout(built_image).manifest(tag_of("runtime"), architecture).children[1:]
    assert sum(layer.size for layer in layers) <= 17.5 * 2**20  # 2 of it are OpenSSL in the plugin


@each
def test_skopeo_takes_it_with_every_digest_checked(
    built_image: Path, tmp_path: Path, variant: str, architecture: str
) -> None:
    if not shutil.which("skopeo"):
        pytest.skip("no skopeo on this machine (apt-get install skopeo)")
    source = f"oci:{built_image}:{tag_of(variant)}"
    command = ["skopeo", "--override-arch", architecture, "copy", "--quiet", source, f"dir:{tmp_path / 'copy'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "copy" / "manifest.json").read_text())
    assert found == Layout(built_image).manifest(tag_of(variant), architecture).content


# --- reading what is wrong --------------------------------------------------------------------------------------------


def test_an_unknown_tag_is_refused_with_the_known_ones(built_image: Path) -> None:
    with pytest.raises(ImageError, match="no image has the tag 'latest'") as raised:
        Layout(built_image).manifest("latest", "amd64")
    assert DEFINITION.version in raised.value.hint
    with pytest.raises(ImageError, match="is not for riscv64"):
        Layout(built_image).manifest(DEFINITION.version, "riscv64")


def read_all(read: Layout) -> list[bytes]:
    return [read.blob(one) for one in read.manifest(DEFINITION.version, "amd64").children]


def test_a_flipped_byte_is_found_in_any_blob(built_image: Path, tmp_path: Path) -> None:
    read = Layout(built_image)
    manifest = read.manifest(DEFINITION.version, "amd64")
    for number, blob in enumerate([read.index(DEFINITION.version).descriptor, manifest.descriptor, *manifest.children]):
        copy = tmp_path / str(number)
        shutil.copytree(built_image, copy, copy_function=os.link)
        path = read.stored.blob_path(blob.digest)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        damaged = Layout(copy).stored.blob_path(blob.digest)
        damaged.unlink()
        damaged.write_bytes(data)
        with pytest.raises(ImageError) as raised:
            read_all(Layout(copy))
        found = f"sha256:{hashlib.sha256(data).hexdigest()}"
        assert all(part in raised.value.message for part in (str(damaged), blob.digest, found)), raised.value.message


# --- writing goes wrong -----------------------------------------------------------------------------------------------


def write(output: Path, text: str) -> None:
    with layout.replacing(output) as writer:
        layer = writer.add_blob("text/plain", text.encode())
        writer.add_index({"amd64": writer.add_manifest({"os": "linux"}, [layer], {})}, {}, ["1"])
        writer.finish()


def fail(output: Path) -> None:
    with layout.replacing(output) as writer:
        writer.add_blob("text/plain", b"half")
        raise RuntimeError


def text_of(output: Path) -> bytes:
    read = Layout(output)
    return read.blob(read.manifest("1", "amd64").children[1])


def test_a_new_layout_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    output = tmp_path / "folder" / "image"
    write(output, "old")
    assert text_of(output) == b"old"
    write(output, "new")
    assert text_of(output) == b"new"
    assert {one.name for one in output.parent.iterdir()} == {"image", ".image.lock"}


def test_an_error_leaves_the_old_layout_and_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "image"
    with pytest.raises(RuntimeError):
        fail(output)
    assert [one.name for one in tmp_path.iterdir()] == [".image.lock"]
    write(output, "old")
    with pytest.raises(RuntimeError):
        fail(output)
    assert text_of(output) == b"old"
    assert {one.name for one in tmp_path.iterdir()} == {"image", ".image.lock"}


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "thesis.txt").write_text("years")
    with pytest.raises(ImageError, match="expected nothing or an OCI layout"):
        write(tmp_path / "image", "new")
    assert (tmp_path / "image" / "thesis.txt").read_text() == "years"


WRITER = """
import os, sys, time
from pathlib import Path
from image import layout
with layout.replacing(Path(sys.argv[1])) as writer:
    writer.add_blob("text/plain", b"half")
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("is_there_before", [False, True])
def test_a_killed_build_leaves_the_old_layout_and_the_next_one_cleans_up(tmp_path: Path, is_there_before: bool) -> None:
    output = tmp_path / "image"
    if is_there_before:
        write(output, "old")
    with subprocess.Popen([sys.executable, "-c", WRITER, str(output)], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert output.exists() == is_there_before
    if is_there_before:
        assert text_of(output) == b"old"
    assert (tmp_path / "image.new").exists()
    write(output, "new")
    assert text_of(output) == b"new"
    assert {one.name for one in tmp_path.iterdir()} == {"image", ".image.lock"}


def test_a_kill_between_two_renames_is_made_good(tmp_path: Path) -> None:
    """As a file system without exchange leaves it: the old layout is out of the way, the new one not yet there."""
    output = tmp_path / "image"
    write(output, "old")
    output.rename(tmp_path / "image.old")
    with pytest.raises(RuntimeError):
        fail(output)
    assert text_of(output) == b"old"


FULL = """
import sys
from pathlib import Path
from image import layout
from image.build import lock_of
from image.model import ImageError
try:
    with layout.replacing(Path(sys.argv[1]) / "image") as writer:
        for number in range(100):
            writer.add_blob("text/plain", bytes([number]) * 65536)
except ImageError as error:
    print(error.message, "|", error.hint)
print(sorted(one.name for one in Path(sys.argv[1]).iterdir()))
"""


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    script = 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -c "$3" "$1"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "-", str(tmp_path)]
    done = subprocess.run([*command, sys.executable, FULL], cwd=ROOT, capture_output=True, text=True)
    if "unshare" in done.stderr:
        pytest.skip(f"no user namespaces here: {done.stderr.strip()}")
    assert "No space left on device" in done.stdout, done.stderr
    assert "free some space" in done.stdout
    assert done.stdout.splitlines()[-1] == "['.image.lock']"


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["build", "--variant", "fips"], 2, ("fips", "runtime", "dev")),
        (["bake"], 2, ("error: unknown command 'bake'", "hint: known: build, lock")),
        ([], 2, ("build every variant",)),
        (["--help"], 0, ("build every variant",)),
    ],
)
def test_unknown_words_are_refused_with_the_known_ones(
    arguments: list[str], status: int, said: tuple[str, ...]
) -> None:
    command = [sys.executable, "-m", "image", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status
    for part in said:
        assert part in done.stdout + done.stderr


def test_a_lock_that_is_not_the_definitions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    shutil.copy(ROOT / "image" / "lock.json", tmp_path / "image")
    asked = (ROOT / "image" / "image.toml").read_text()
    (tmp_path / "image" / "image.toml").write_text(asked.replace('names = ["h11", ', 'names = ["jinja2", "h11", '))
    with pytest.raises(ImageError, match="they differ in jinja2") as refused:
        lock_of(tmp_path)
    assert refused.value.hint == "run `make lock`"
    assert lock_of(ROOT).wheels
