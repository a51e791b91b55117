"""What is compiled for an image: the plugin, the agent's launcher, the small programs beside it, Python modules.

Both architectures are built by the toolchain's amd64 programs; nothing of arm64 runs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from native.plugin import recipe

from image.model import DebPackage, ImageError
from image.toolchain import NATIVE, Job, Toolchain, sysroot

REPOSITORY = Path(__file__).resolve().parent.parent
LAUNCHER = REPOSITORY / "native" / "launcher"
PYTHON = "3.13"
TRIPLETS = {"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}
MAP = "-Wl,-Map,link.map"
# Lines of a linker's map: a member of an archive that something needed, and an object file.
LINKED = re.compile(r"^(?:LOAD )?(/[^\s()]+\.(?:a|o))(?:\([^()]+\))?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Executable:
    """An executable, and the packages whose code was linked into it."""

    data: bytes
    linked: tuple[DebPackage, ...]

    @property
    def sha256(self) -> str:
        """Of its bytes, in hexadecimal."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True, slots=True)
class Binaries:
    """The executables of an image."""

    plugin: Executable  # /opt/cni/bin/istio-cni: static-PIE, CPython and the plugin's frozen modules
    trampoline: Executable  # /usr/local/bin/install-cni: static-PIE, has the file capabilities
    launcher: Executable  # /usr/local/lib/meshcni/install-cni: PIE, CPython; needs libc, libm and libz
    enter_userns: Executable  # /usr/local/lib/meshcni/enter-userns: PIE, needs libc


def build(toolchain: Toolchain, architecture: str, repository: Path = REPOSITORY) -> Binaries:
    """The executables for an architecture from the sources of a repository."""
    native = repository / "native" / "launcher"
    tools = tools_for(architecture)
    plugin = {name: path.read_bytes() for name, path in recipe.files(repository).items()}
    return Binaries(
        plugin=_executable(toolchain, plugin, recipe.commands(tools), "istio-cni"),
        trampoline=_executable(toolchain, _sources(native, "trampoline"), trampoline_commands(tools), "trampoline"),
        launcher=_executable(toolchain, _sources(native, "launcher", "inittab"), launcher_commands(tools), "launcher"),
        enter_userns=_executable(
            toolchain, _sources(native, "enter-userns"), enter_userns_commands(tools), "enter-userns"
        ),
    )


def tools_for(architecture: str) -> recipe.Tools:
    """The programs and files of the toolchain that build for an architecture."""
    root, triplet = sysroot(architecture), TRIPLETS[architecture]
    compiler: tuple[str, ...] = ("gcc",)
    if architecture != NATIVE:
        # The cross compiler comes with a libc that lags behind the one of the image, and would take that first.
        headers = (f"{root}/usr/include/{triplet}", f"{root}/usr/include")
        own = (f"--sysroot={root}", f"-B{root}/usr/lib/{triplet}", *(f"-isystem{folder}" for folder in headers))
        compiler = (f"{triplet}-gcc", *own)
    return recipe.Tools(
        interpreter=f"python{PYTHON}",
        compiler=compiler,
        include=f"{root}/usr/include/python{PYTHON}",
        library=f"{root}/usr/lib/python{PYTHON}/config-{PYTHON}-{triplet}/libpython{PYTHON}-pic.a",
    )


def trampoline_commands(tools: recipe.Tools) -> tuple[tuple[str, ...], ...]:
    """The commands that make the trampoline."""
    return (
        tools.compile("trampoline.c", *recipe.WARN),
        (*tools.compiler, "-static-pie", *recipe.LINK, MAP, "-o", "trampoline", "trampoline.o"),
    )


def launcher_commands(tools: recipe.Tools) -> tuple[tuple[str, ...], ...]:
    """The commands that make the launcher.

    libpython is linked statically: that is 0.7 MB less than the shared one and starts no slower, and the image has no
    library that other programs could embed Python with. Extension modules find its functions in the executable.
    """
    objects = ("launcher.o", "inittab.o", tools.library, "-lz", "-lm")
    return (
        tools.compile("launcher.c", *recipe.WARN),
        tools.compile("inittab.c", *recipe.WARN),
        (*tools.compiler, "-pie", "-rdynamic", *recipe.LINK, "-Wl,--as-needed", MAP, "-o", "launcher", *objects),
    )


def enter_userns_commands(tools: recipe.Tools) -> tuple[tuple[str, ...], ...]:
    """The commands that make the program that enters user namespaces; with the image's libc, for it has no rights."""
    return (
        tools.compile("enter-userns.c", *recipe.WARN),
        (*tools.compiler, "-pie", *recipe.LINK, MAP, "-o", "enter-userns", "enter-userns.o"),
    )


def compile_python(toolchain: Toolchain, files: Mapping[str, bytes], *, positions: bool = True) -> Mapping[str, bytes]:
    """Path of a module in an image, without leading slash -> its bytecode, which is never compared with the source.

    `positions` of columns are what a traceback marks a part of the source line with. Where the source is not in the
    image they are of no use, and they make a fifth of the compressed standard library.
    """
    sources = {f"root/{path}": data for path, data in sorted(files.items())}
    script = {"bytecode.py": (LAUNCHER / "bytecode.py").read_bytes()}
    without = () if positions else ("-X", "no_debug_ranges")
    command = (f"python{PYTHON}", "-sSP", *without, "bytecode.py", "root")
    made = toolchain.run(Job(sources | script, (command,), tuple(f"{name}c" for name in sources)))
    return {path: made[f"root/{path}c"] for path in files}


def _sources(folder: Path, *names: str) -> dict[str, bytes]:
    return {f"{name}.c": (folder / f"{name}.c").read_bytes() for name in names}


def _executable(
    toolchain: Toolchain, files: Mapping[str, bytes], commands: tuple[tuple[str, ...], ...], name: str
) -> Executable:
    made = toolchain.run(Job(files, commands, (name, "link.map")))
    paths = set(LINKED.findall(made["link.map"].decode()))
    if not paths:
        raise ImageError(f"the linker's map of {name} names no library")
    return Executable(made[name], tuple(sorted({toolchain.owner(path) for path in paths})))
