"""Writes the plugin's modules as marshalled code objects into a C file that the executable is linked from.

    freeze.py SOURCE_DIR STUB_DIR OUT.c

Must run under the interpreter whose libpython is linked: bytecode differs between minor versions. The same sources give
the same bytes in any folder: code objects name `<frozen module>`, not a path.

Every byte and every class costs each start of the plugin (a page touched costs up to 2 us, a class made 15 us). So
docstrings, assertions and annotations are left out, and so are classes and constants of errors and istio that nothing
here uses.
"""

import ast
import marshal
import sys
from pathlib import Path

# What is frozen of the package, in the order of the import direction.
MODULES = (
    "meshcni",
    "meshcni.errors",
    "meshcni.istio",
    "meshcni.cni",
    "meshcni.cni.versions",
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
    "meshcni.plugin.add",
    "meshcni.plugin.verbs",
)
ENTRY = "meshcni.plugin.__main__"  # frozen as __main__
PRUNED = ("meshcni.errors", "meshcni.istio")
STUBS = ("io", "encodings")


class Annotations(ast.NodeTransformer):
    """Removes annotations."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:  # noqa: D102
        self.generic_visit(node)
        node.returns = None
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            argument.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:  # noqa: D102
        if node.value is None:
            return ast.copy_location(ast.Pass(), node)
        return ast.copy_location(ast.Assign(targets=[node.target], value=node.value), node)


def module_path(source_dir: Path, name: str) -> tuple[Path, bool]:
    """The file of a module, and whether it is a package."""
    path = source_dir.joinpath(*name.split("."))
    package = path / "__init__.py"
    return (package, True) if package.exists() else (path.with_suffix(".py"), False)


def names_used(trees: list[ast.Module]) -> set[str]:
    """Every name that is read, imported, or accessed as an attribute anywhere."""
    used = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                used.add(node.id)
            elif isinstance(node, ast.Attribute):
                used.add(node.attr)
            elif isinstance(node, ast.alias):
                used.add(node.name)
    return used


def is_used(statement: ast.stmt, used: set[str]) -> bool:
    """Whether a statement of a module must stay; only classes and plain constants can go."""
    if isinstance(statement, ast.ClassDef):
        return statement.name in used
    if isinstance(statement, ast.Assign):
        return any(not isinstance(target, ast.Name) or target.id in used for target in statement.targets)
    return True


def frozen(name: str, tree: ast.Module) -> bytes:
    """The marshalled code of one module, without docstrings and assertions."""
    tree = ast.fix_missing_locations(Annotations().visit(tree))
    return marshal.dumps(compile(tree, f"<frozen {name}>", "exec", dont_inherit=True, optimize=2))


def tables(source_dir: Path, stub_dir: Path) -> dict[str, list[tuple[str, bytes, bool]]]:
    """C table name -> rows of module name, code and whether it is a package."""
    paths = {name: module_path(source_dir, name) for name in (*MODULES, ENTRY)}
    trees = {name: ast.parse(path.read_bytes()) for name, (path, _) in paths.items()}
    used = names_used(list(trees.values()))
    for name in PRUNED:
        trees[name].body = [statement for statement in trees[name].body if is_used(statement, used)]
    app = [("__main__", frozen("__main__", trees[ENTRY]), False)]
    app += [(name, frozen(name, trees[name]), paths[name][1]) for name in MODULES]
    app += [(name, stub(stub_dir, name), False) for name in STUBS]
    return {"app_frozen": app, "boot_frozen": [("_frozen_importlib", stub(stub_dir, "bootstrap"), False)]}


def stub(stub_dir: Path, name: str) -> bytes:
    """The marshalled code of our stand-in for a module of the standard library."""
    return frozen(name, ast.parse((stub_dir / f"{name}.py").read_bytes()))


def c_source(all_tables: dict[str, list[tuple[str, bytes, bool]]]) -> str:
    """The C file; rows have the four members that `struct _frozen` of 3.11 and 3.13 share."""
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
