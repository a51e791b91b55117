"""Writes the plugin's modules as marshalled code objects into a C file that the executable is linked from.

    freeze.py SOURCE_DIR STUB_DIR OUT.c

Must run under the interpreter whose libpython is linked: bytecode differs between minor versions. The same sources give
the same bytes in any folder: code objects name `<frozen module>`, not a path.
"""

import marshal
import os
import sys
from pathlib import Path

# What is frozen of the package, in the order of the import direction; the last one runs as __main__.
MODULES = (
    "meshcni",
    "meshcni.errors",
    "meshcni.istio",
    "meshcni.cni",
    "meshcni.cni.jsontext",
    "meshcni.cni.results",
    "meshcni.cni.spec",
    "meshcni.protocols",
    "meshcni.protocols.podadd",
    "meshcni.plugin",
    "meshcni.plugin.decide",
    "meshcni.plugin.effects",
    "meshcni.plugin.log",
    "meshcni.plugin.agentcall",
    "meshcni.plugin.verbs",
)
ENTRY = "meshcni.plugin.__main__"
STUBS = ("io", "encodings")


def frozen(name: str, path: Path) -> bytes:
    """The marshalled code of one module, without docstrings and assertions."""
    code = compile(path.read_bytes(), f"<frozen {name}>", "exec", dont_inherit=True, optimize=2)
    return marshal.dumps(code)


def package_path(source_dir: Path, name: str) -> tuple[Path, bool]:
    """The file of a module, and whether it is a package."""
    path = source_dir.joinpath(*name.split("."))
    package = path / "__init__.py"
    return (package, True) if package.exists() else (path.with_suffix(".py"), False)


def tables(source_dir: Path, stub_dir: Path) -> dict[str, list[tuple[str, bytes, bool]]]:
    """C table name -> rows of module name, code and whether it is a package."""
    app = [("__main__", frozen("__main__", package_path(source_dir, ENTRY)[0]), False)]
    app += [(name, frozen(name, stub_dir / f"{name}.py"), False) for name in STUBS]
    for name in MODULES:
        path, is_package = package_path(source_dir, name)
        app.append((name, frozen(name, path), is_package))
    bootstrap = Path(os.__file__).parent / "importlib" / "_bootstrap.py"
    boot = [
        ("_frozen_importlib", frozen("importlib._bootstrap", bootstrap), False),
        ("_frozen_importlib_external", frozen("_bootstrap_external", stub_dir / "bootstrap_external.py"), False),
    ]
    return {"app_frozen": app, "boot_frozen": boot}


def c_source(all_tables: dict[str, list[tuple[str, bytes, bool]]]) -> str:
    """The C file; rows have the four members that 3.11 and 3.13 share."""
    lines = ["#include <Python.h>"]
    for table, rows in all_tables.items():
        for index, (_, code, _) in enumerate(rows):
            lines.append(f"static const unsigned char {table}_{index}[] = {{{','.join(map(str, code))}}};")
        lines.append(f"const struct _frozen {table}[] = {{")
        for index, (name, code, is_package) in enumerate(rows):
            lines.append(f'    {{"{name}", {table}_{index}, {len(code)}, {int(is_package)}}},')
        lines.append("    {0}};")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    source_dir, stub_dir, out = map(Path, sys.argv[1:])
    out.write_text(c_source(tables(source_dir, stub_dir)))
