"""What is compiled for the image, for both architectures: as files, and running in a root of locked packages."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from image.binaries import PYTHON, Executable, compile_python
from image.model import ARCHITECTURES, ImageError
from tests.image.nativeroot import (
    CACHE,
    ENTER_USERNS,
    EVERYTHING,
    FIVE,
    LAUNCHER,
    PLUGIN,
    QEMU,
    ROOT,
    TRAMPOLINE,
    USER,
    ask,
    built,
    entered,
    execute,
    give_capabilities,
    lock,
    open_folder,
    place,
    runtime_root,
    toolchain,
)

NAMES = ("plugin", "trampoline", "launcher", "enter_userns")
LIBRARIES = {"launcher": {"libc.so.6", "libm.so.6", "libz.so.1"}, "enter_userns": {"libc.so.6"}}  # the others: none
EXECUTABLES = [(architecture, name) for architecture in ARCHITECTURES for name in NAMES]
MACHINES = {"amd64": "EM_X86_64", "arm64": "EM_AARCH64"}
DEFAULTS = sum(1 << number for number in (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31))  # of container runtimes
PATHS = ["/usr/lib/meshcni", f"/usr/lib/python{PYTHON}", f"/usr/lib/python{PYTHON}/lib-dynload"]
IMPORTS = """
import asyncio, ctypes, hashlib, http.client, json, random, socket, ssl, subprocess, threading, unicodedata, uuid, zlib
names = 'sha256', 'sha512', 'sha1', 'md5', 'blake2b', 'sha3_256'
digests = [hashlib.new(name, b'').hexdigest()[:8] for name in names]
async def slept():
    await asyncio.sleep(0)
    return ctypes.CDLL(None).getpid() == os.getpid()
say([digests, asyncio.run(slept()), bool(ssl.create_default_context()), zlib.decompress(zlib.compress(b'a')) == b'a'])
"""
IMPORTED = [["e3b0c442", "cf83e135", "da39a3ee", "d41d8cd9", "786a02f7", "a7ffc6f8"], True, True, True]
VERSION = {"CNI_COMMAND": "VERSION"}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: enters a root of its own")
needs_qemu = pytest.mark.skipif(not QEMU, reason="needs qemu-user-static")


def executable(architecture: str, name: str) -> Executable:
    found = getattr(built(architecture), name)
    assert isinstance(found, Executable)
    return found


def elf(data: bytes) -> ELFFile:
    return ELFFile(BytesIO(data))


def dynamic_tags(file: ELFFile) -> dict[str, object]:
    section = file.get_section_by_name(".dynamic")
    return {tag.entry.d_tag: getattr(tag, "needed", tag.entry.d_val) for tag in section.iter_tags()}


def symbols(path: Path, kind: str) -> set[str]:
    """Names of the interpreter's interface that a file defines or does not define."""
    done = subprocess.run(["nm", "--dynamic", f"--{kind}-only", path], capture_output=True, text=True, check=True)
    return set(re.findall(r" (_?Py\w+)$", done.stdout, re.MULTILINE))


@pytest.fixture(scope="session")
def amd64() -> Iterator[Path]:
    folder = open_folder()
    yield runtime_root(folder, "amd64")
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def arm64() -> Iterator[Path]:
    folder = open_folder()
    yield runtime_root(folder, "arm64")
    shutil.rmtree(folder)


# As files


@pytest.mark.parametrize(("architecture", "name"), EXECUTABLES)
def test_format(architecture: str, name: str) -> None:
    file = elf(executable(architecture, name).data)
    segments = {segment.header.p_type: segment for segment in file.iter_segments()}
    tags = dynamic_tags(file)
    assert (file.header.e_type, file.header.e_machine) == ("ET_DYN", MACHINES[architecture])
    assert "PT_GNU_RELRO" in segments
    assert segments["PT_GNU_STACK"].header.p_flags == 6  # read and write
    assert not [s for s in file.iter_segments() if s.header.p_type == "PT_LOAD" and s.header.p_flags & 3 == 3]
    assert int(str(tags["DT_FLAGS_1"])) & 0x08000001 == 0x08000001  # PIE, bound at start
    assert {"DT_RPATH", "DT_RUNPATH", "DT_TEXTREL"}.isdisjoint(tags)
    assert ("PT_INTERP" in segments) == (name in LIBRARIES)
    assert not file.get_section_by_name(".symtab")
    assert not [section for section in file.iter_sections() if section.name.startswith((".debug", ".note.gnu.build"))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_libraries(architecture: str) -> None:
    loader = {"amd64": "ld-linux-x86-64.so.2", "arm64": "ld-linux-aarch64.so.1"}[architecture]
    for name in NAMES:
        section = elf(executable(architecture, name).data).get_section_by_name(".dynamic")
        needed = {tag.needed for tag in section.iter_tags() if tag.entry.d_tag == "DT_NEEDED"}
        assert needed - {loader} == LIBRARIES.get(name, set())


@pytest.mark.parametrize(("architecture", "name"), EXECUTABLES)
def test_linked_packages(architecture: str, name: str) -> None:
    linked = {package.name: package for package in executable(architecture, name).linked}
    compiler = {"amd64": "libgcc-14-dev", "arm64": "libgcc-14-dev-arm64-cross"}[architecture]
    python = {"plugin": {"libpython3.13-dev", "libssl-dev", "zlib1g-dev"}, "launcher": {"libpython3.13-dev"}}
    assert set(linked) == {"libc6-dev", compiler} | python.get(name, set())
    runtime = {package.source: package for package in lock().group(f"runtime/{architecture}")}
    for package in linked.values():
        if package.name != compiler:  # the code that is linked in is of the version that the image has as a library
            assert package.architecture == architecture
            assert package.source_version == runtime[package.source].source_version


def test_no_path_of_the_machine_is_in_them() -> None:
    for architecture, name in EXECUTABLES:
        data = executable(architecture, name).data
        for path in (str(ROOT), str(CACHE), "/jobs/", toolchain().digest, "launcher.c"):
            assert path.encode() not in data, (architecture, name, path)


@needs_root
def test_anybody_builds_the_same_anywhere() -> None:
    """Another copy of the repository, another cache and thus another unpacked toolchain, another user, another mood."""
    folder = open_folder()
    try:
        for part in ("image", "native", "src"):
            shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        packages = {package for packages in toolchain().parts.values() for package in packages}
        (folder / "cache" / "debs").mkdir(parents=True)
        for package in packages:
            shutil.copy(CACHE / "debs" / package.sha256, folder / "cache" / "debs")
        for path in (folder, *folder.rglob("*")):
            os.chown(path, USER, USER, follow_symlinks=False)
        code = (
            "import json, pathlib; from image import binaries, lockfile; from image.toolchain import Toolchain\n"
            "toolchain = Toolchain(lockfile.read(pathlib.Path('image/lock.json')), pathlib.Path('cache'))\n"
            "both = [binaries.build(toolchain, name) for name in ('amd64', 'arm64')]\n"
            "code = binaries.compile_python(toolchain, {'usr/lib/a.py': b'x = {1.5, None, \"a\"}'})\n"
            f"print(json.dumps([[getattr(b, name).sha256 for name in {NAMES}] for b in both]"
            " + [code['usr/lib/a.py'].hex(), toolchain.gzip(bytes(9)).hex()]))"
        )
        odd = {"TZ": "Asia/Tokyo", "LC_ALL": "tr_TR.UTF-8", "PYTHONHASHSEED": "7", "HOME": "/", "CFLAGS": "-O0"}
        user = ["setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups"]
        done = subprocess.run(
            [*user, sys.executable, "-c", code],
            cwd=folder,
            env={**odd, "PATH": os.environ["PATH"]},
            umask=0o077,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
    finally:
        shutil.rmtree(folder)
    mine: list[object] = [[executable(arch, name).sha256 for name in NAMES] for arch in ARCHITECTURES]
    mine.append(compile_python(toolchain(), {"usr/lib/a.py": b'x = {1.5, None, "a"}'})["usr/lib/a.py"].hex())
    assert json.loads(done.stdout) == [*mine, toolchain().gzip(bytes(9)).hex()]


# Bytecode


def test_bytecode_is_never_compared_with_the_source() -> None:
    sources = {"usr/lib/meshcni/a.py": b"def f():\n    return __file__\n", "usr/lib/b/__init__.py": b"1\n"}
    made = compile_python(toolchain(), sources)
    assert list(made) == list(sources)
    for data in made.values():
        assert data[:4] == (3571).to_bytes(2, "little") + b"\r\n"  # CPython 3.13
        assert struct.unpack("<I", data[4:8]) == (1,)  # by hash, unchecked
    assert b"/usr/lib/meshcni/a.py" in made["usr/lib/meshcni/a.py"]
    assert b"root/" not in made["usr/lib/meshcni/a.py"]
    without = compile_python(toolchain(), sources, positions=False)
    assert len(without["usr/lib/meshcni/a.py"]) < len(made["usr/lib/meshcni/a.py"])


def test_a_module_that_is_no_python_is_named() -> None:
    with pytest.raises(ImageError, match=r"(?s)bytecode\.py.*/usr/lib/broken\.py"):
        compile_python(toolchain(), {"usr/lib/good.py": b"", "usr/lib/broken.py": b"def f(:\n"})


# The launcher


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_launcher_has_what_extension_modules_need(architecture: str, request: pytest.FixtureRequest) -> None:
    root: Path = request.getfixturevalue(architecture)
    launcher = symbols(root / LAUNCHER.lstrip("/"), "defined")
    modules = list((root / f"usr/lib/python{PYTHON}/lib-dynload").glob("*.so"))
    assert len(modules) > 30
    missing = {}
    for path in modules:
        if not path.name.startswith(("_interp", "_test", "xx", "_xx")):  # sub-interpreters, tests, examples
            needed = symbols(path, "undefined")
            assert needed, path
            missing[path.name] = needed - launcher
    assert {name: sorted(names) for name, names in missing.items() if names} == {}


@needs_root
def test_what_the_interpreter_knows(amd64: Path) -> None:
    code = "import __main__; say([sys.path, sys.executable, sys.argv, sys.orig_argv, list(sys.flags), sys.prefix,"
    code += "__file__, sys.version_info[:2], sorted(set(sys.modules) & {'site', 'runpy', 'importlib'}), __name__])"
    argv = [LAUNCHER, code]
    flags = [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, False, 1, 0, True, 4300]  # isolated, no bytecode written, UTF-8
    where = "/usr/lib/meshcni/meshcni/agent/__main__.py"
    expected = [PATHS, "", argv, argv, flags, "/usr", where, [3, 13], [], "meshcni.agent.__main__"]
    assert ask(amd64, code, path=LAUNCHER) == expected


@pytest.fixture
def not_in_the_background() -> Iterator[None]:
    """A shell starts what runs in the background with SIGINT ignored, and so are its children, the launcher too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@needs_root
@pytest.mark.usefixtures("not_in_the_background")
def test_signals_and_exit_status(amd64: Path) -> None:
    code = "import signal as s; say([s.getsignal(2) is s.default_int_handler, s.getsignal(13) is s.SIG_IGN])"
    assert ask(amd64, code) == [True, True]
    assert execute(amd64, [LAUNCHER, "sys.exit(7)"]).returncode == 7
    failed = execute(amd64, [LAUNCHER, "raise ValueError('for once')"])
    assert failed.returncode == 1
    assert failed.stderr.startswith("Traceback (most recent call last):")
    assert failed.stderr.endswith("ValueError: for once\n")
    assert execute(amd64, [LAUNCHER, "os.kill(os.getpid(), 2)"]).returncode == -2


@needs_root
@pytest.mark.parametrize("user", [0, USER])
def test_imports(amd64: Path, user: int) -> None:
    assert ask(amd64, IMPORTS, user=user) == IMPORTED


@needs_root
def test_options_of_python_are_the_agents(amd64: Path) -> None:
    for option in ("-c", "-m", "-i", "-X", "--help", "-"):
        done = execute(amd64, [TRAMPOLINE, "say(sys.argv[2:])", option, "pass"])
        assert (done.stdout, done.stderr) == (json.dumps([option, "pass"]) + "\n", "")


HOSTILE = {
    "PYTHONPATH": "/hostile",
    "PYTHONHOME": "/hostile",
    "PYTHONSTARTUP": "/hostile/os.py",
    "PYTHONINSPECT": "1",
    "PYTHONUSERBASE": "/hostile",
    "PYTHONPLATLIBDIR": "hostile",
    "PYTHONPYCACHEPREFIX": "/hostile",
    "PYTHONUTF8": "0",
    "PYTHONIOENCODING": "ascii",
    "PYTHONVERBOSE": "2",
    "PYTHONWARNINGS": "error",
    "PYTHONBREAKPOINT": "hostile",
    "PYTHONDEVMODE": "1",
    "PYTHONMALLOC": "debug",
    "PYTHONOPTIMIZE": "2",
    "PYTHONASYNCIODEBUG": "1",
    "PYTHONPROFILEIMPORTTIME": "1",
    "LC_ALL": "tr_TR.ISO-8859-9",
    "LANG": "C",
    "SSLKEYLOGFILE": "/hostile/keys",
    "OPENSSL_CONF": "/hostile/openssl.cnf",
    "OPENSSL_MODULES": "/hostile",
    "OPENSSL_ENGINES": "/hostile",
    "XTABLES_LIBDIR": "/hostile",
    "GCONV_PATH": "/hostile",
}
LOADER = {
    "LD_PRELOAD": "/hostile/a.so",
    "LD_LIBRARY_PATH": "/hostile",
    "LD_AUDIT": "/hostile/a.so",
    "TMPDIR": "/hostile",
}


@pytest.fixture
def hostile(amd64: Path) -> Iterator[Path]:
    folder = amd64 / "hostile"
    folder.mkdir()
    folder.chmod(0o777)
    for name in ("os", "json", "sitecustomize", "usercustomize", "meshcni", "encodings"):
        (folder / f"{name}.py").write_text("import sys; sys.stderr.write('hostile'); sys.exit(1)\n")
    (folder / "openssl.cnf").write_text(
        "openssl_conf = a\n[a]\nssl_conf = b\n[b]\nsystem_default = c\n[c]\nMinProtocol = TLSv1.3\n"
    )
    yield amd64
    shutil.rmtree(folder)


@needs_root
@pytest.mark.parametrize("user", [0, USER])
def test_hostile_environment(hostile: Path, user: int) -> None:
    code = (
        "import ssl; os.chdir('/hostile'); import json as again\n"
        "default, plain = ssl.create_default_context(), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)\n"
        "say([sys.path, list(sys.flags), sys.stdout.encoding, sys.warnoptions, default.keylog_filename, again.__file__,"
        " plain.minimum_version.name, sorted(name for name in os.environ if name.startswith(REMOVED))])"
    ).replace("REMOVED", repr(("OPENSSL_", "XTABLES_", "GCONV_", "LD_")))
    before = sorted(path.name for path in (hostile / "hostile").iterdir())
    environ = HOSTILE | (LOADER if user else {})  # the loader obeys whom the trampoline gives nothing, such as root
    assert ask(hostile, code, environ, user=user) == ask(hostile, code, {}, user=user)
    assert sorted(path.name for path in (hostile / "hostile").iterdir()) == before


@needs_root
def test_the_hostile_openssl_configuration_would_work(hostile: Path) -> None:
    code = "import ctypes; ctypes.CDLL(None).setenv(b'OPENSSL_CONF', b'/hostile/openssl.cnf', 1); import ssl\n"
    code += "say(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).minimum_version.name)"
    assert ask(hostile, code) == "TLSv1_3"


@needs_root
def test_trust_stores_are_found_by_privileged_users_too(amd64: Path) -> None:
    """OpenSSL would ignore SSL_CERT_FILE, and /proc/self would be root's, were the launcher AT_SECURE."""
    certificates = "".join(path.read_text() for path in (amd64 / "usr/share/ca-certificates/mozilla").glob("*.crt"))
    place(amd64, "/ca.pem", certificates.encode(), 0o644)
    code = "import ssl; say(len(ssl.create_default_context().get_ca_certs()) > 100)"
    assert ask(amd64, code, {"SSL_CERT_FILE": "/ca.pem"}, user=USER) is True
    assert ask(amd64, code, {}, user=USER) is False


# The trampoline


CASES = {
    # started as: (user, bounding set, no_new_privs) -> (effective = permitted, ambient)
    "root": (0, EVERYTHING, False, EVERYTHING, FIVE),
    "root with the five": (0, FIVE, False, FIVE, FIVE),
    "root with a runtime's defaults": (0, DEFAULTS, False, DEFAULTS, FIVE & DEFAULTS),
    "root with nothing": (0, 0, False, 0, 0),
    "root, no new privileges": (0, EVERYTHING, True, EVERYTHING, FIVE),
    "user, privileged container": (USER, EVERYTHING, False, FIVE, FIVE),
    "user with the five": (USER, FIVE, False, FIVE, FIVE),
    "user with a runtime's defaults": (USER, DEFAULTS, False, FIVE & DEFAULTS, FIVE & DEFAULTS),
    "user with nothing": (USER, 0, False, 0, 0),
    "user, no new privileges": (USER, EVERYTHING, True, 0, 0),
}


def own_bounding_set() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapBnd"))
    return int(line.split()[1], 16)


@needs_root
@pytest.mark.parametrize("case", CASES)
def test_privileges(amd64: Path, case: str) -> None:
    user, bounding, no_new_privs, effective, ambient = CASES[case]
    effective &= own_bounding_set()
    expected = {"effective": effective, "permitted": effective, "inheritable": ambient, "ambient": ambient}
    expected |= {"secure": 0, "dumpable": 1}
    found = ask(
        amd64,
        "say([state(), child('say(state())')])",
        user=user,
        bounding=bounding,
        no_new_privs=no_new_privs,
    )
    assert found == [expected, expected]


@needs_root
@pytest.mark.parametrize("attribute", [True, False])
def test_capabilities_of_the_caller_are_not_handed_on(amd64: Path, attribute: bool) -> None:
    """A user whom a runtime gave ambient capabilities keeps none but the five; without the attribute, none else."""
    given = "+net_bind_service,+sys_chroot,+net_raw"
    user = ["setpriv", "--reuid", str(USER), "--clear-groups", "--inh-caps", given, "--ambient-caps", given]
    if not attribute:
        os.removexattr(amd64 / TRAMPOLINE.lstrip("/"), "security.capability")
    try:
        command = [*user, "chroot", amd64, TRAMPOLINE, "say(state())"]
        found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    finally:
        give_capabilities(amd64, FIVE)
    held = FIVE if attribute else 1 << 13  # CAP_NET_RAW
    assert [found[name] for name in ("effective", "permitted", "inheritable", "ambient")] == [held] * 4


@needs_root
def test_it_asks_the_kernel_for_nothing_else(amd64: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    place(tmp_path, "/program", built("amd64").trampoline.data)
    subprocess.run(["strace", "-o", trace, tmp_path / "program"], capture_output=True, check=False)
    calls = re.findall(r"^(\w+)\((.*)", trace.read_text(), re.MULTILINE)
    names = [name for name, _ in calls]
    own = calls[names.index("capget") :]
    raised = ["CAP_DAC_OVERRIDE", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_SYS_PTRACE", "CAP_SYS_ADMIN"]
    assert [name for name, _ in own] == ["capget", "capset", *["prctl"] * 5, "execve", *["write"] * 5, "exit_group"]
    assert re.findall(r"PR_CAP_AMBIENT_RAISE, (\w+)", trace.read_text()) == raised
    assert set(names[: -len(own)]) <= {
        *("execve", "brk", "arch_prctl", "set_tid_address", "set_robust_list", "rseq", "prlimit64", "readlinkat"),
        *("readlink", "getrandom", "mprotect", "newuname", "uname"),
    }


@needs_root
def test_arguments_and_environment_pass_through(amd64: Path) -> None:
    argv = ["any name", "say([sys.orig_argv, sorted(os.environ.items())])", "--flag=ä", "", "\udcff", "a b"]
    environ = {"B": "ü", "A": "", "PATH": "/x"}
    done = subprocess.run(
        argv,
        executable=TRAMPOLINE,
        env=environ,
        capture_output=True,
        text=True,
        preexec_fn=entered(amd64),
    )
    assert json.loads(done.stdout) == [argv, sorted([name, value] for name, value in environ.items())]


@needs_root
def test_it_says_why_there_is_no_agent(tmp_path: Path) -> None:
    place(tmp_path, TRAMPOLINE, built("amd64").trampoline.data)
    missing = execute(tmp_path, [TRAMPOLINE])
    message = f"install-cni: cannot execute {LAUNCHER}: "
    assert (missing.returncode, missing.stderr) == (127, message + "No such file or directory\n")
    place(tmp_path, LAUNCHER, b"", 0o644)
    denied = execute(tmp_path, [TRAMPOLINE])
    assert (denied.returncode, denied.stdout, denied.stderr) == (126, "", message + "Permission denied\n")


def refuse(*numbers: int) -> Callable[[], None]:
    """Installs a seccomp filter that answers these system calls of amd64 with EPERM."""

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    lines = [(0x20, 0, 0, 0)]  # load the number
    for left, number in zip(range(len(numbers), 0, -1), numbers, strict=True):
        lines.append((0x15, left, 0, number))  # equal: to the last line
    lines += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001)]  # allow; EPERM
    program = Program(len(lines), b"".join(struct.pack("<HBBI", *line) for line in lines))
    call = ctypes.CDLL(None, use_errno=True).syscall

    def install() -> None:
        if call(317, 1, 0, ctypes.byref(program)) != 0:
            raise OSError(ctypes.get_errno(), "seccomp")

    return install


@needs_root
@pytest.mark.parametrize("numbers", [(125,), (126,), (157,), (125, 126, 157)], ids=["get", "set", "prctl", "all"])
def test_a_kernel_that_refuses_does_not_stop_it(amd64: Path, numbers: tuple[int, ...]) -> None:
    code = "say(os.getuid())"
    assert ask(amd64, code, refused=refuse(*numbers)) == 0
    if 126 in numbers:  # the filter works
        calls = (
            "libc = ctypes.CDLL(None); say(libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()))"
        )
        assert ask(amd64, calls, refused=refuse(*numbers)) == -1


# The plugin, and the other architecture


@needs_root
def test_the_plugin_needs_nothing_around_it(tmp_path: Path) -> None:
    place(tmp_path, PLUGIN, built("amd64").plugin.data)
    done = execute(tmp_path, [PLUGIN], VERSION)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1.0.0" in json.loads(done.stdout)["supportedVersions"]


@needs_root
@needs_qemu
def test_the_other_architecture(arm64: Path, tmp_path: Path) -> None:
    assert QEMU
    shutil.copy(QEMU, tmp_path / "qemu")
    place(tmp_path, PLUGIN, built("arm64").plugin.data)
    place(tmp_path, TRAMPOLINE, built("arm64").trampoline.data)
    version = execute(tmp_path, ["/qemu", PLUGIN], VERSION)
    assert (version.returncode, version.stderr) == (0, "")
    assert version.stdout == execute_native_version(tmp_path)
    missing = execute(tmp_path, ["/qemu", TRAMPOLINE])
    assert (missing.returncode, missing.stderr[:34]) == (127, f"install-cni: cannot execute {LAUNCHER}"[:34])
    done = execute(arm64, ["/qemu", LAUNCHER, f"assert sys.path == {PATHS}\n{IMPORTS}"])
    assert (done.stderr, json.loads(done.stdout)) == ("", IMPORTED)
    done = execute(arm64, ["/qemu", ENTER_USERNS, "0", "/qemu"])
    message = "enter-userns: cannot enter the user namespace of descriptor 0: Invalid argument\n"
    assert (done.returncode, done.stderr) == (122, message)


def execute_native_version(folder: Path) -> str:
    place(folder, "/native", built("amd64").plugin.data)
    return execute(folder, ["/native"], VERSION).stdout
