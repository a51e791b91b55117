"""Writes the plugin's modules as marshalled code objects into a C file that the executable is linked from.

    freeze.py SOURCE_DIR STUB_DIR OUT.c

Must run under the interpreter whose libpython is linked: bytecode differs between minor versions. The same sources give
the same bytes in any folder: code objects name `<frozen module>`, not a path.

Every byte and every class costs each start of the plugin (a page touched costs up to 2 us, a class made 15 us). So
docstrings, assertions and annotations are left out, and so are definitions of errors and istio that nothing here uses.

The modules that decide about pods are the agent's own. What they use of the standard library has stand-ins among the
stubs; what only the agent uses of them is left out, with the imports that it needs.
"""

import ast
import marshal
import sys
from collections.abc import Iterable
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
    "meshcni.pflag",
    "meshcni.pods",
    "meshcni.pods.interception",
    "meshcni.pods.model",
    "meshcni.pods.ambientsettings",
    "meshcni.pods.podidentity",
    "meshcni.pods.selectors",
    "meshcni.pods.eligibility",
    "meshcni.plugin",
    "meshcni.plugin.decide",
    "meshcni.plugin.doubt",
    "meshcni.plugin.effects",
    "meshcni.plugin.log",
    "meshcni.plugin.kubeconfig",
    "meshcni.plugin.resolver",
    "meshcni.plugin.apicall",
    "meshcni.plugin.inquiry",
    "meshcni.plugin.agentcall",
    "meshcni.plugin.add",
    "meshcni.plugin.verbs",
)
ENTRY = "meshcni.plugin.__main__"  # frozen as __main__
# Left out of these is what nothing uses: in the executable no annotation does, and nothing that only the agent calls.
PRUNED = (
    *("meshcni.errors", "meshcni.istio", "meshcni.pflag", "meshcni.plugin.effects"),
    *(name for name in MODULES if name.startswith("meshcni.pods.")),
)
STUBS = ("io", "encodings", "collections", "collections.abc", "dataclasses", "enum", "types")
BUILT_IN = ("_codecs", "_socket", "_tls", "fcntl", "posix", "sys", "time")
DEFINITIONS = (ast.ClassDef, ast.FunctionDef)


class Annotations(ast.NodeTransformer):
    """Removes annotations; of the fields of a dataclass it leaves that there is one."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:  # noqa: D102
        self.generic_visit(node)
        node.returns = None
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            argument.annotation = None
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:  # noqa: D102
        if "dataclass" in names_read(node.decorator_list):
            fields = [statement for statement in node.body if isinstance(statement, ast.AnnAssign)]
            others = [self.visit(statement) for statement in node.body if statement not in fields]
            for statement in fields:
                statement.annotation = ast.Constant(None)
            node.body = [*fields, *others]
            return node
        self.generic_visit(node)
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


def names_read(nodes: Iterable[ast.AST]) -> set[str]:
    """Every name that is read, other than as an attribute."""
    walked = (node for tree in nodes for node in ast.walk(tree))
    return {node.id for node in walked if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def names_taken(trees: Iterable[ast.Module], module: str) -> set[str]:
    """Every name that is imported from a module, or accessed as an attribute of anything."""
    taken = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            taken.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module == module:
            taken.update(alias.name for alias in node.names)
    return taken


def is_used(statement: ast.stmt, used: set[str]) -> bool:
    """Whether a statement of a module must stay; only definitions and plain constants can go."""
    if isinstance(statement, DEFINITIONS):
        return statement.name in used
    if isinstance(statement, ast.Assign):
        return any(not isinstance(target, ast.Name) or target.id in used for target in statement.targets)
    return True


def pruned(tree: ast.Module, taken: set[str]) -> list[ast.stmt]:
    """The statements of a module that must stay, its imports cut down to the names that these use."""
    read = names_read([tree])
    body: list[ast.stmt] = []
    for statement in tree.body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            statement.names = [alias for alias in statement.names if (alias.asname or alias.name) in read]
            if statement.names:
                body.append(statement)
        elif is_used(statement, taken | read):
            body.append(statement)
    return body


def prune(trees: dict[str, ast.Module]) -> None:
    """Leaves out what nothing uses, then what only that used, and so on."""
    size = None
    while size != (size := sum(len(ast.dump(trees[name])) for name in PRUNED)):
        for name in PRUNED:
            trees[name].body = pruned(trees[name], names_taken(trees.values(), name))


def check_imports(trees: dict[str, ast.Module]) -> None:
    """Nothing may import what the executable does not hold. Raises SystemExit."""
    held = {*MODULES, *STUBS, *BUILT_IN}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            wanted = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                wanted = [node.module]
            for module in wanted:
                if module not in held:
                    raise SystemExit(f"freeze: {name} imports {module}, which is neither frozen nor built in")


def frozen(name: str, tree: ast.Module) -> bytes:
    """The marshalled code of one module, without docstrings and assertions."""
    tree = ast.fix_missing_locations(tree)
    return marshal.dumps(compile(tree, f"<frozen {name}>", "exec", dont_inherit=True, optimize=2))


def tables(source_dir: Path, stub_dir: Path) -> dict[str, list[tuple[str, bytes, bool]]]:
    """C table name -> rows of module name, code and whether it is a package."""
    paths = {name: module_path(source_dir, name) for name in (*MODULES, ENTRY)}
    trees = {name: Annotations().visit(ast.parse(path.read_bytes())) for name, (path, _) in paths.items()}
    prune(trees)
    check_imports(trees)
    app = [("__main__", frozen("__main__", trees[ENTRY]), False)]
    app += [(name, frozen(name, trees[name]), paths[name][1]) for name in MODULES]
    app += [(name, stub(stub_dir, name), module_path(stub_dir, name)[1]) for name in STUBS]
    return {"app_frozen": app, "boot_frozen": [("_frozen_importlib", stub(stub_dir, "bootstrap"), False)]}


def stub(stub_dir: Path, name: str) -> bytes:
    """The marshalled code of our stand-in for a module of the standard library."""
    return frozen(name, ast.parse(module_path(stub_dir, name)[0].read_bytes()))


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
