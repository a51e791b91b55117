"""`meshcni conf`: show the CNI configuration as a runtime reads it, put our plugin's entry in, take it out."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from typing import Final

from meshcni import istio
from meshcni.cni import conf
from meshcni.cni.confplan import Assessment, Change, ConfDir, ConfPolicy, assess
from meshcni.cni.conftext import parse
from meshcni.errors import ConfError, MeshCniError, UsageError
from meshcni.host import files
from meshcni.host.confdir import carry_out, read_conf_dir
from meshcni.pflag import Flag, ParsedFlags, go_bool, help_text
from meshcni.pflag import parse as parse_flags

USAGE: Final = "Usage: meshcni conf show FILE|DIR | insert FILE [--dry-run] | remove FILE [--dry-run]"
EDITING: Final = (
    Flag("dry-run", kind="bool", default="false", help="print the resulting file, change nothing"),
    Flag("diff", kind="bool", default="false", help="print the change as a unified diff"),
)
# What the entry says; the agent's settings of the same names.
ENTRY: Final = (
    Flag("cni-agent-run-dir", default=istio.RUN_DIR, help="run dir of the node agent, as the host sees it"),
    Flag("exclude-namespaces", help="namespaces whose pods pass, separated by commas"),
    Flag("pod-namespace", help="namespace of the node agent"),
    Flag("ambient-enabled", kind="bool", default="false", help="whether ambient mode is on"),
    Flag("native-nftables", kind="bool", default="false", help="whether rules are nftables rules"),
    Flag("plugin-log-level", default="info", help="log level of the plugin"),
    Flag("cni-conf-original-conversion", kind="bool", default="false", help="convert as the original does"),
)


def main(argv: Sequence[str]) -> int:
    """Run `conf` with its arguments (`["show", ...]`); return the exit status."""
    try:
        return _run(list(argv))
    except MeshCniError as error:
        message, hint, status = error.message, error.hint, error.exit_code
    except OSError as error:
        message, hint, status = str(error), "" if isinstance(error, FileNotFoundError) else files.hint(error), 1
    print(f"meshcni conf: {message}", *([f"  {hint}"] if hint else []), sep="\n", file=sys.stderr)
    return status


def _run(argv: list[str]) -> int:
    command, arguments = (argv[0], argv[1:]) if argv else ("", [])
    flags = {"show": (), "insert": (*EDITING, *ENTRY), "remove": EDITING}.get(command)
    if flags is None:
        if command not in ("", "help", "-h", "--help"):
            raise UsageError(f"no such conf command: {command!r}", USAGE)
        print(help_text(USAGE, (*EDITING, *ENTRY)))
        return 0 if command else UsageError.exit_code
    parsed = parse_flags(flags, arguments)
    if parsed.help:
        print(help_text(USAGE, flags))
        return 0
    if len(parsed.rest) != 1:
        raise UsageError(f"conf {command} takes one path, got {len(parsed.rest)}", USAGE)
    path = parsed.rest[0]
    if command == "show":
        return _show(path)
    folder, name = os.path.split(os.path.abspath(path))
    if not _is_on(parsed, "dry-run"):
        with files.locked(folder):
            return _edit(command, folder, name, parsed)
    return _edit(command, folder, name, parsed)


def _is_on(parsed: ParsedFlags, name: str) -> bool:
    text = parsed.text(name) or "false"
    try:
        return go_bool(text)
    except ValueError:
        raise UsageError(f"--{name}={text} is no boolean", "write true or false") from None


# --- show -------------------------------------------------------------------------------------------------------------


def _show(path: str) -> int:
    """A line for each file in the runtime's order; exit status 1 when one of them is broken."""
    is_folder = os.path.isdir(path)
    folder, only = (path, "") if is_folder else os.path.split(os.path.abspath(path))
    if only:
        os.stat(path)
    directory, _ = read_conf_dir(folder, only)
    names = [only] if only else conf.candidates({*directory.files, *directory.unreadable})
    rows = [(name, *_description(directory, name)) for name in names]
    used = next((name for name, valid, _ in rows if valid), "")
    for name, _, text in rows:
        mark = " (the runtime uses this one)" if is_folder and name == used else ""
        print(f"{name}{mark}\n{text}")
    if not rows:
        print(f"no conf in {folder}")
    return 0 if all(valid for _, valid, _ in rows) else 1


def _description(directory: ConfDir, name: str) -> tuple[bool, str]:
    """Whether a runtime accepts the file, and what it says or why not."""
    if name in directory.unreadable:
        return False, f"  cannot be read: {directory.unreadable[name]}"
    try:
        document = conf.read(name, directory.files[name], directory.plugin_folders)
    except ConfError as error:
        return False, f"  not accepted by a runtime: {error.message}"
    as_list = conf.is_list(name, document)
    plugins = conf.plugins_of(document) if as_list else [document.value]
    ours = [index for index, plugin in enumerate(plugins) if conf.is_ours(plugin)]
    lines = [
        f"  {'list' if as_list else 'single network'} {document.value.get('name', '')!r}, "
        f"cniVersion {document.value.get('cniVersion', 'absent')}",
        f"  plugins: {', '.join(str(plugin.get('type')) for plugin in plugins)}",
        f"  {istio.PLUGIN_NAME}: {_place(ours, len(plugins))}",
    ]
    return True, "\n".join(lines)


def _place(ours: list[int], count: int) -> str:
    if not ours:
        return "not called"
    if len(ours) > 1:
        return f"called {len(ours)} times, expected once"
    if ours[0] == 0 and count > 1:
        return "called first, before there is an interface"
    return "alone in its file" if count == 1 else "called"


# --- insert and remove ------------------------------------------------------------------------------------------------


def _edit(command: str, folder: str, name: str, parsed: ParsedFlags) -> int:
    directory, states = read_conf_dir(folder, name)
    if name in directory.unreadable:
        raise ConfError(f"{name} cannot be read: {directory.unreadable[name]}")
    if name not in directory.files:
        raise FileNotFoundError(2, "no such file", os.path.join(folder, name))
    found = _inserted(directory, name, parsed) if command == "insert" else _removed(directory, name)
    if found.reason:
        raise ConfError(found.reason)
    for note in found.notes:
        print(f"meshcni conf: {note}", file=sys.stderr)
    if _is_on(parsed, "diff"):
        _print_diff(directory, name, found)
    elif _is_on(parsed, "dry-run"):
        _print_result(directory, name, found)
    if _is_on(parsed, "dry-run"):
        return 0
    for change in found.changes:
        print(carry_out(folder, change, states), file=sys.stderr)
    if not found.changes:
        print(f"{name} is as it should be; nothing was changed", file=sys.stderr)
    return 0


def _inserted(directory: ConfDir, name: str, parsed: ParsedFlags) -> Assessment:
    """What the agent would do with CNI_CONF_NAME naming this file."""
    entry = conf.EntryConfig(
        run_dir=parsed.text("cni-agent-run-dir") or istio.RUN_DIR,
        plugin_log_level=parsed.text("plugin-log-level") or "info",
        ambient_enabled=_is_on(parsed, "ambient-enabled"),
        exclude_namespaces=tuple(filter(None, map(str.strip, (parsed.text("exclude-namespaces") or "").split(",")))),
        pod_namespace=parsed.text("pod-namespace") or "",
        native_nftables=_is_on(parsed, "native-nftables"),
    )
    original = _is_on(parsed, "cni-conf-original-conversion")
    return assess(directory, ConfPolicy(own=conf.entry(entry), conf_name=name, original_conversion=original))


def _removed(directory: ConfDir, name: str) -> Assessment:
    data = directory.files[name]
    document = parse(data, name)
    if conf.is_ours(document.value):
        return Assessment(name, (Change(name, None),))
    return Assessment(name, (Change(name, conf.without_entry(name, data)),) if conf.has_entry(document) else ())


def _print_result(directory: ConfDir, name: str, found: Assessment) -> None:
    """The file that would be there afterwards; that it would have another name, or be gone, goes to stderr."""
    for change in found.changes:
        if change.data is None:
            print(f"meshcni conf: {change.name} would be removed", file=sys.stderr)
        elif change.name != name:
            print(f"meshcni conf: {change.name} would be written", file=sys.stderr)
    written = [change.data for change in found.changes if change.data is not None]
    removed = any(change.data is None for change in found.changes)
    result = written[0] if written else b"" if removed else directory.files[name]
    sys.stdout.write(result.decode())


def _print_diff(directory: ConfDir, name: str, found: Assessment) -> None:
    target = next((change for change in found.changes if change.data is not None), Change(name, b""))
    if not found.changes:
        return
    before, after = directory.files[name].decode(), (target.data or b"").decode()
    new_name = target.name if target.data else "/dev/null"
    lines = difflib.unified_diff(before.splitlines(True), after.splitlines(True), name, new_name)
    sys.stdout.writelines(line if line.endswith("\n") else line + "\n\\ No newline at end of file\n" for line in lines)
