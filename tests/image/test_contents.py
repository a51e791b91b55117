"""What is in the images, path by path, read from their layers; and the agent's code run by the image's own launcher."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import os
import posixpath
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from image.model import ARCHITECTURES
from tests.image.layers import Node, file_system
from tests.image.layers import unpack as write

from image import definition, elf, fetch, lockfile, selection, unpack

ROOT = Path(__file__).resolve().parents[2]
DEFINITION = definition.read(ROOT / "image" / "image.toml", ROOT / "src")
LOCK = lockfile.read(ROOT / "image" / "lock.json")
RUNTIME, DEV = DEFINITION.version, f"{DEFINITION.version}-dev"
CACHE = ROOT / ".cache" / "image"
ENTRY = "usr/local/bin/install-cni"
FIVE = sum(1 << number for number in (1, 12, 13, 19, 21))  # linux/capability.h
NETFILTER = {
    f"usr/sbin/{family}{flavour}{suffix}"
    for family in ("iptables", "ip6tables")
    for flavour in ("", "-nft", "-legacy")
    for suffix in ("", "-save", "-restore")
}
PROGRAMS = {
    ENTRY,
    "usr/local/lib/meshcni/install-cni",
    "usr/local/lib/meshcni/enter-userns",
    "opt/cni/bin/istio-cni",
    "usr/sbin/nft",
    "usr/sbin/xtables-nft-multi",
    "usr/sbin/xtables-legacy-multi",
}
# Modules that a kubeconfig and the people's command line need; the image has neither (see image.toml).
NOT_IN_THE_IMAGE = {"click", "httpx2", "lightkube", "meshcni.kube.kubeconfig"}
# In the launcher itself, or made by another module when that is imported.
BUILT_IN = {*sys.builtin_module_names, "_socket", "collections.abc", "os.path"}
Image = Callable[[str, str], dict[str, Node]]
each = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture(scope="session")
def image(built_image: Path) -> Image:
    """Reads each image once."""
    return functools.lru_cache(None)(lambda tag, architecture: file_system(built_image, tag, architecture))


@pytest.fixture(params=ARCHITECTURES)
def runtime(image: Image, request: pytest.FixtureRequest) -> dict[str, Node]:
    return image(RUNTIME, request.param)


@pytest.fixture(params=[(tag, one) for tag in (RUNTIME, DEV) for one in ARCHITECTURES], ids=str)
def any_image(image: Image, request: pytest.FixtureRequest) -> dict[str, Node]:
    return image(*request.param)


def test_the_only_programs_are_ours_and_those_of_netfilter(runtime: dict[str, Node]) -> None:
    loaders = re.compile(r"usr/lib/[^/]+/(ld-linux-.*|libc)\.so\.\d")
    executable = {path for path, node in runtime.items() if node.info.isreg() and node.info.mode & 0o111}
    assert {path for path in executable if not loaders.fullmatch(path)} == PROGRAMS
    links = {path for path, node in runtime.items() if node.info.issym() and path.startswith(("usr/sbin/", "usr/bin/"))}
    assert links == NETFILTER


def test_no_shell_interpreter_package_manager_or_pip(runtime: dict[str, Node]) -> None:
    forbidden = re.compile(
        r"(a|ba|da|k|z)?sh|busybox|python[0-9.]*|perl.*|m?awk|dpkg.*|apt.*|apk|rpm|pip[0-9.]*|ensurepip|site-packages|openssl|su|sudo"
    )
    files = [path for path, node in runtime.items() if not node.info.isdir() and "/status.d/" not in path]
    assert [path for path in files if forbidden.fullmatch(posixpath.basename(path))] == []
    shebangs = [path for path, node in runtime.items() if node.data.startswith(b"#!") and node.info.mode & 0o111]
    assert shebangs == []


def test_variants_differ_in_the_iptables_flavour_by_name(runtime: dict[str, Node]) -> None:
    for path in NETFILTER:
        flavour = "legacy" if "-legacy" in path else "nft"
        assert resolve(runtime, path) == f"usr/sbin/xtables-{flavour}-multi"


def test_nothing_is_setuid_or_a_device_and_only_tmp_is_writable(any_image: dict[str, Node]) -> None:
    writable = {}
    for path, node in any_image.items():
        assert node.info.type in (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE), path
        assert not node.info.mode & 0o6000, path
        if not node.info.issym() and node.info.mode & 0o022:
            writable[path] = node.info.mode
    assert writable.pop("tmp") == 0o1777
    assert writable in ({}, {"var/tmp": 0o1777})


def test_one_file_has_capabilities_and_they_are_not_effective(any_image: dict[str, Node]) -> None:
    attributes = {path: node.xattrs for path, node in any_image.items() if node.xattrs}
    assert attributes == {ENTRY: {"security.capability": struct.pack("<5I", 0x02000000, FIVE, 0, 0, 0)}}
    assert any_image[ENTRY].info.uid == 0
    assert any_image[ENTRY].info.mode == 0o755


def test_every_time_and_owner_is_fixed(any_image: dict[str, Node]) -> None:
    assert {node.info.mtime for node in any_image.values()} == {LOCK.epoch}
    assert {(node.info.uname, node.info.gname) for node in any_image.values()} == {("", "")}


def test_every_path_has_its_folder_and_every_link_a_target(runtime: dict[str, Node]) -> None:
    for path, node in runtime.items():
        parent = posixpath.dirname(path)
        assert not parent or runtime[parent].info.isdir(), path
        if node.info.issym():
            assert resolve(runtime, path) in runtime, path


def resolve(nodes: dict[str, Node], path: str) -> str:
    """Follow links, those of folders on the way too."""
    at = ""
    for part in path.strip("/").split("/"):
        at = posixpath.normpath(posixpath.join(at, part))
        for _ in range(10):
            if at in nodes and nodes[at].info.issym():
                at = resolve(nodes, posixpath.join("/", posixpath.dirname(at), nodes[at].info.linkname)[1:])
    return at


def test_accounts(any_image: dict[str, Node]) -> None:
    users = [line.split(":") for line in any_image["etc/passwd"].data.decode().splitlines()]
    groups = [line.split(":") for line in any_image["etc/group"].data.decode().splitlines()]
    assert ["nonroot", "x", "65532", "65532", "nonroot", "/home/nonroot", "/usr/sbin/nologin"] in users
    assert ["nonroot", "x", "65532", ""] in groups
    assert any(user[:4] == ["root", "x", "0", "0"] for user in users)
    assert len({user[0] for user in users}) == len(users)
    assert len({group[2] for group in groups}) == len(groups)
    assert {line.split(":")[1] for line in any_image["etc/shadow"].data.decode().splitlines()} == {"*"}
    home = any_image["home/nonroot"].info
    assert (home.uid, home.gid, home.mode) == (65532, 65532, 0o700)


def test_folders_that_the_agent_and_its_tools_need(runtime: dict[str, Node]) -> None:
    assert runtime["run"].info.isdir()  # the lock of iptables-legacy
    assert runtime["var/run"].info.linkname == "/run"
    assert not [
        path for path in runtime if path.startswith(("host", "opt/cni/bin/")) and path != "opt/cni/bin/istio-cni"
    ]
    assert runtime["etc/nsswitch.conf"].data.startswith(b"passwd: files\n")
    assert b'PRETTY_NAME="meshcni' in runtime["usr/lib/os-release"].data


def test_certificates(any_image: dict[str, Node]) -> None:
    bundle = any_image["etc/ssl/certs/ca-certificates.crt"].data
    assert 100 < bundle.count(b"-----BEGIN CERTIFICATE-----") == bundle.count(b"-----END CERTIFICATE-----")
    assert resolve(any_image, "usr/lib/ssl/cert.pem") == "etc/ssl/certs/ca-certificates.crt"


@each
def test_executables_are_for_the_architecture_and_find_their_libraries(image: Image, architecture: str) -> None:
    nodes = image(RUNTIME, architecture)
    folder = elf.library_folder(architecture)
    needed = set(DEFINITION.loaded_libraries)
    for path, node in nodes.items():
        header = elf.read(path, node.data)
        if header is None:
            continue
        assert header.machine == elf.MACHINES[architecture], path
        for name in header.needed:
            assert resolve(nodes, f"{folder}/{name}") in nodes, (path, name)
            needed.add(name)
        if header.interpreter:
            assert resolve(nodes, header.interpreter) in nodes, path
            needed.add(posixpath.basename(header.interpreter))
    reached = {resolve(nodes, f"{folder}/{name}") for name in needed}
    libraries = {path for path in nodes if posixpath.dirname(path) == folder and nodes[path].info.isreg()}
    assert libraries == reached
    plugin = elf.read("plugin", nodes["opt/cni/bin/istio-cni"].data)
    assert plugin is not None
    assert (plugin.needed, plugin.interpreter) == ((), "")


@each
def test_iptables_has_every_extension_of_its_package(image: Image, architecture: str) -> None:
    """iptables-save fails at a rule of somebody else's whose extension is missing."""
    package = next(one for one in LOCK.group(f"runtime/{architecture}") if one.name == "iptables")
    unpacked = unpack.deb(package, fetch.fetch([package], CACHE)[package])
    kinds = re.compile(r".*/xtables/lib(xt|ipt|ip6t)_.*")
    shipped = {entry.path for entry in unpacked.entries if kinds.fullmatch(entry.path)}
    assert len(shipped) > 100
    assert shipped <= set(image(RUNTIME, architecture))


# 5 MiB of arm64's are zeros: its hundred small extension modules of iptables align their segments to 64 KiB.
MAX_UNPACKED_MIB = {"amd64": 45, "arm64": 50}


@each
def test_the_unpacked_size(image: Image, architecture: str) -> None:
    size = sum(len(node.data) for node in image(RUNTIME, architecture).values())
    assert size <= MAX_UNPACKED_MIB[architecture] * 2**20


# --- packages ---------------------------------------------------------------------------------------------------------


@each
def test_packages_are_listed_for_scanners_with_sums_of_their_files(image: Image, architecture: str) -> None:
    nodes = image(RUNTIME, architecture)
    folder = "var/lib/dpkg/status.d/"
    names = {path.removeprefix(folder) for path in nodes if path.startswith(folder) and not path.endswith(".md5sums")}
    versions = {package.name: package.version for package in LOCK.group(f"runtime/{architecture}")}
    assert {"libc6", "iptables", "libssl3t64", "libpython3.13-stdlib"} <= names <= set(versions)
    assert not {"dpkg", "debconf", "mawk", "tzdata", "perl-base"} & names
    for name in names:
        fields = dict(line.split(": ", 1) for line in nodes[folder + name].data.decode().splitlines() if ": " in line)
        assert (fields["Package"], fields["Version"]) == (name, versions[name])
        assert resolve(nodes, f"usr/share/doc/{name}/copyright") in nodes, name
        for line in nodes[f"{folder}{name}.md5sums"].data.decode().splitlines():
            assert line.split(maxsplit=1)[1] in nodes
    assert not [path for path in nodes if path.startswith("var/lib/dpkg/") and not path.startswith(folder[:-1])]


@each
def test_python_packages_are_listed_for_scanners(image: Image, architecture: str) -> None:
    nodes = image(RUNTIME, architecture)
    metadata = [node.data.decode() for path, node in nodes.items() if path.endswith(".dist-info/METADATA")]
    found = {tuple(re.findall(r"^(?:Name|Version): (.*)$", text, re.MULTILINE)[:2]) for text in metadata}
    expected = {(wheel.name, wheel.version) for wheel in LOCK.wheels_for(architecture)}
    assert {(name.replace("_", "-"), version) for name, version in found} == expected | {("meshcni", RUNTIME)}
    for path, node in nodes.items():
        if path.endswith(".dist-info/RECORD"):
            for line in node.data.decode().splitlines():
                assert f"usr/lib/meshcni/{line.split(',')[0]}" in nodes, (path, line)


def test_a_bill_of_materials_is_inside(runtime: dict[str, Node]) -> None:
    bom = json.loads(runtime["usr/share/meshcni/sbom/install-cni.cdx.json"].data)
    names = {component["name"] for component in bom["components"]}
    assert bom["specVersion"] == "1.6"
    assert {"libc6", "protobuf", "h11", "meshcni", "istio-cni", "zlib1g-dev"} <= names


@each
def test_licences_that_copyright_files_refer_to_are_there(image: Image, architecture: str) -> None:
    nodes = image(RUNTIME, architecture)
    folder = "usr/share/common-licenses/"
    referred = set()
    for path, node in nodes.items():
        if path.startswith("usr/share/doc/"):
            referred |= set(re.findall(rb"/usr/share/common-licenses/([A-Za-z0-9.-]*[A-Za-z0-9])", node.data))
    available = {path.removeprefix(folder) for path in nodes if path.startswith(folder)}
    assert {"GPL-2", "LGPL-2.1"} <= {name.decode() for name in referred} & available


def test_no_pattern_of_the_tables_is_stale() -> None:
    """A pattern that matches nothing was written for a file that has another name now, and may be in the image."""
    found: set[str] = set()
    for group in ("runtime", "dev"):
        for architecture in ARCHITECTURES:
            packages = LOCK.group(f"{group}/{architecture}")
            for unpacked in unpack.debs(fetch.fetch(packages, CACHE)).values():
                found |= {entry.path for entry in unpacked.entries}
    rules = {rule for variant in DEFINITION.variants.values() for rule in variant.removals}
    made = {link.path for variant in DEFINITION.variants.values() for link in variant.links}
    assert selection.unused(found | made, rules) == []


# --- our code ---------------------------------------------------------------------------------------------------------


def test_our_code_is_there_with_sources_and_byte_code_and_others_only_as_byte_code(runtime: dict[str, Node]) -> None:
    modules = {path.removeprefix("usr/lib/meshcni/") for path in runtime if path.endswith(".py")}
    expected = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "meshcni").rglob("*.py")}
    left_out = expected - modules
    assert modules <= expected
    commands = ("__main__", "conf", "rules", "sidecarflags", "sidecarrules", "status", "validation")  # the people's
    assert {path for path in left_out if not path.startswith("meshcni/plugin/")} == {
        "meshcni/kube/kubeconfig.py",
        *(f"meshcni/cli/{name}.py" for name in commands),
    }
    for path in modules:
        assert runtime[f"usr/lib/meshcni/{path}"].data == (ROOT / "src" / path).read_bytes()
        folder, name = posixpath.split(path)
        assert f"usr/lib/meshcni/{folder}/__pycache__/{name[:-3]}.cpython-313.pyc" in runtime
    assert "usr/lib/python3.13/os.pyc" in runtime


def test_byte_code_never_asks_for_its_source(runtime: dict[str, Node]) -> None:
    for path, node in runtime.items():
        if path.endswith(".pyc"):
            assert int.from_bytes(node.data[4:8], "little") == 0b01, path  # PEP 552: hash, unchecked


def test_every_import_in_our_code_is_in_the_image(runtime: dict[str, Node]) -> None:
    """Those within functions too, which only a rare case executes."""
    folders = ("usr/lib/meshcni", "usr/lib/python3.13", "usr/lib/python3.13/lib-dynload")
    missing = set()
    for path, node in runtime.items():
        if not (path.startswith("usr/lib/meshcni/meshcni/") and path.endswith(".py")):
            continue
        for name in imported(ast.parse(node.data)):
            place = name.replace(".", "/")
            files = [
                f"{folder}/{place}{ending}"
                for folder in folders
                for ending in (".py", ".pyc", "/__init__.py", "/__init__.pyc")
            ]
            extension = any(found.startswith(f"{folders[2]}/{place}.cpython-313-") for found in runtime)
            is_there = extension or any(file in runtime for file in files) or name in BUILT_IN
            if not is_there and not any(name == one or name.startswith(f"{one}.") for one in NOT_IN_THE_IMAGE):
                missing.add(f"{path}: {name}")
    assert missing == set()


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


PROBE = """
import importlib, json, os, sys
failed, names = {}, []
for folder, _, files in os.walk("/usr/lib/meshcni/meshcni"):
    for file in files:
        if file.endswith(".py") and file != "__main__.py":
            path = os.path.relpath(os.path.join(folder, file), "/usr/lib/meshcni")[:-3]
            names.append(path.replace("/", ".").removesuffix(".__init__"))
for name in sorted(names):
    try:
        importlib.import_module(name)
    except BaseException as error:
        failed[name] = repr(error)
import asyncio, decimal, ssl, socket, subprocess, yaml
from google.protobuf.internal import api_implementation
from nftables import Nftables
from meshcni.protocols import zds_pb2
message = zds_pb2.WorkloadRequest(add=zds_pb2.AddWorkload(uid="u"))
def main():
    print(json.dumps({
        "path": sys.path, "modules": len(names), "failed": failed, "flags": [sys.flags.isolated, sys.flags.no_site],
        "authorities": ssl.create_default_context().cert_store_stats()["x509_ca"],
        "protobuf": zds_pb2.WorkloadRequest.FromString(message.SerializeToString()).add.uid,
        "idna": "b\\u00fccher.example".encode("idna").decode(), "yaml": yaml.safe_load("a: [1, 2.5]"),
        "nft": Nftables().cmd("list tables")[0], "child": subprocess.run(["/usr/sbin/nft", "-v"]).returncode,
    }), flush=True)
    return 0
"""


@pytest.fixture(scope="session")
def root(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("chroot needs root")
    folder = tmp_path_factory.mktemp("root")
    write(image(RUNTIME, "amd64"), folder)
    yield folder
    shutil.rmtree(folder)


def run(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """In a network namespace of its own, so that nobody's tables are touched."""
    words = ["/usr/bin/unshare", "--net", "/usr/sbin/chroot", str(root), *command]
    environment = {"PATH": "/usr/local/bin:/usr/sbin", "PYTHONPATH": "/tmp", "PYTHONSTARTUP": "/tmp/x"}
    return subprocess.run(words, capture_output=True, text=True, env=environment)


def test_every_module_can_be_imported_by_the_launcher(root: Path) -> None:
    main = root / "usr/lib/meshcni/meshcni/agent/__main__.py"
    compiled = main.parent / "__pycache__" / "__main__.cpython-313.pyc"
    kept = main.read_bytes(), compiled.read_bytes()
    try:
        compiled.unlink()
        main.write_text(PROBE)
        done = run(root, "install-cni")
    finally:
        main.write_bytes(kept[0])
        compiled.write_bytes(kept[1])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("modules") > 100
    assert found.pop("authorities") > 100
    assert found == {
        "path": ["/usr/lib/meshcni", "/usr/lib/python3.13", "/usr/lib/python3.13/lib-dynload"],
        "failed": {},
        "flags": [1, 1],
        "protobuf": "u",
        "idna": "xn--bcher-kva.example",
        "yaml": {"a": [1, 2.5]},
        "nft": 0,
        "child": 0,
    }


POD = """
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, annotations: {sidecar.istio.io/status: "{}"}}
spec: {containers: [{name: app}, {name: istio-proxy}]}
"""


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["version"], 0, f"install-cni {DEFINITION.version}"),
        (["--help"], 0, "Commands:"),
        (["settings"], 0, "chained_cni_plugin"),
        (["settings", "-o", "json"], 0, '"name"'),
        (["explain", "--help"], 0, "explain pod"),
        (["explain", "pod", "--file", "/tmp/pod.yaml"], 0, "shop/web"),
        (["explain", "pod", "--file", "/tmp/pod.yaml", "-o", "json"], 0, '"verdict"'),
        (["status"], 1, "error: no agent answers"),
    ],
)
def test_sub_commands_work_in_the_image(root: Path, arguments: list[str], status: int, said: str) -> None:
    (root / "tmp" / "pod.yaml").write_text(POD)
    done = run(root, "install-cni", *arguments)
    assert (done.returncode, said in done.stdout + done.stderr) == (status, True), done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flavour", ["", "-nft", "-legacy"])
@pytest.mark.parametrize("family", ["iptables", "ip6tables"])
def test_iptables_loads_and_saves_foreign_rules(root: Path, family: str, flavour: str) -> None:
    rule = "-A OUTPUT -p tcp -m tcp --dport 80 -m comment --comment x -m statistic --mode random --probability 0.5"
    (root / "tmp" / "rules").write_text(f"*filter\n{rule} -j ACCEPT\nCOMMIT\n")
    tool = f"/usr/sbin/{family}{flavour}"
    words = 'mount -t proc proc "$1/proc" && chroot "$1" $2-restore < "$1/tmp/rules" && chroot "$1" $2-save'
    command = ["unshare", "--net", "--mount", "sh", "-c", words, "-", str(root), tool]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "--mode random" in done.stdout, done.stderr


def test_the_versions_in_the_tables_are_those_of_the_code() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == DEFINITION.version
    assert importlib.util.find_spec("meshcni") is not None
