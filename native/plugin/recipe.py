"""How the plugin is built: one recipe for the compiler of this machine and for the image's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from native.plugin import freeze

HARDEN = ("-fPIE", "-fstack-protector-strong", "-D_FORTIFY_SOURCE=2")
WARN = ("-Wall", "-Wextra", "-Wno-missing-field-initializers")
# Packed relative relocations take 5 KB instead of 100, which each start has to read.
LINK = ("-s", "-Wl,--gc-sections,--build-id=none,-z,pack-relative-relocs,-z,relro,-z,now,-z,noexecstack")

# What a start needs lies together, and OpenSSL behind it: the kernel maps more around a page than is asked for.
LIBRARIES = ("-Wl,--start-group", "-lgcc", "-lgcc_eh", "-lc", "-lssl", "-lcrypto", "-Wl,--end-group")
LINK_PLUGIN = ("-Wl,--wrap=OPENSSL_cpuid_setup", "-Wl,-T,discard.ld", "-Wl,--no-eh-frame-hdr", "-Wl,-Map,link.map")


@dataclass(frozen=True)
class Tools:
    """What builds: the interpreter must be the one whose library is linked, if perhaps for another architecture."""

    interpreter: str
    compiler: tuple[str, ...]
    include: str  # folder that has Python.h
    library: str  # static libpython of position-independent code

    def compile(self, source: str, *options: str) -> tuple[str, ...]:
        """The command that compiles a file of C."""
        includes = (f"-I{self.include}", f"-I{self.include}/internal")
        return (*self.compiler, "-O2", *HARDEN, *includes, *options, "-c", source)


def files(root: Path) -> dict[str, Path]:
    """Name in the folder of the build -> file of the repository: all that is compiled in or says how."""
    native, source = root / "native" / "plugin", root / "src"
    scripts = [native / "discard.ld", native / "freeze.py", native / "postpone.py"]
    paths = [*native.glob("*.c"), *scripts, *native.glob("stubs/**/*.py")]
    found = {str(path.relative_to(native)): path for path in sorted(paths)}
    modules = (freeze.module_path(source, name)[0] for name in (*freeze.MODULES, freeze.ENTRY))
    return found | {f"src/{path.relative_to(source)}": path for path in modules}


def commands(tools: Tools) -> tuple[tuple[str, ...], ...]:
    """The commands that make `istio-cni`, and `link.map` beside it, in a folder that holds `files`.

    They name relative paths only, so that no path of the machine can get into the executable.
    """
    return (
        (tools.interpreter, "-I", "-X", "no_debug_ranges", "freeze.py", "src", "stubs", "frozen.c"),
        tools.compile("main.c", *WARN),
        tools.compile("slim.c", *WARN),
        tools.compile("tls.c", *WARN),
        tools.compile("frozen.c"),
        (
            *(*tools.compiler, "-static-pie", *LINK, *LINK_PLUGIN, "-o", "istio-cni"),
            *("main.o", "slim.o", "tls.o", "frozen.o", tools.library, "-lz", "-lm", *LIBRARIES),
        ),
        (tools.interpreter, "-I", "postpone.py", "istio-cni", "link.map"),
    )
