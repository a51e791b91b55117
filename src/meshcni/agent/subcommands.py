"""The sub-commands of `install-cni` that need more than one line."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import socket
import sys
from collections.abc import Sequence

from meshcni import __version__, istio
from meshcni.cli.control import PURGE_QUERY, STATUS_PATH, UNINSTALL_PATH, ask
from meshcni.errors import AgentUnavailableError, MeshCniError, UsageError
from meshcni.pflag import Flag, ParsedFlags, go_bool, parse

OUTPUT = Flag("output", "o", help="json for machines")
SHORT = Flag("short", "s", "bool", help="only the version")
PURGE = Flag("purge", kind="bool", help="remove the plugin as well")
RUN_DIR = Flag("cni-agent-run-dir", default=istio.RUN_DIR, help="run directory of the agent")

# Upstream's flags of every command (pkg/log/options.go, pkg/ctrlz/options.go); here they act on the agent alone.
PERSISTENT = (
    *(Flag(name) for name in ("log_output_level", "log_stacktrace_level", "log_caller", "ctrlz_port", "ctrlz_address")),
    Flag("log_as_json", kind="bool"),
    Flag("log_target", kind="strings"),
)


def version(arguments: Sequence[str]) -> int:
    """Print the version; `-o yaml|json` and `-s` as upstream."""
    parsed = _only_flags(parse((SHORT, OUTPUT, *PERSISTENT), arguments))
    facts = {"version": __version__, "python": platform.python_version(), "machine": platform.machine()}
    form = _output(parsed, ("", "yaml", "json"))
    if form == "json":
        text = json.dumps({"clientVersion": facts}, indent=2)
    elif form == "yaml":
        text = "\n".join(["clientVersion:", *(f'  {key}: "{value}"' for key, value in facts.items())])
    elif go_bool(parsed.text("short") or "false"):
        text = __version__
    else:
        text = f"install-cni {__version__} (meshcni, Python {facts['python']}, {facts['machine']})"
    sys.stdout.write(text + "\n")
    return 0


def settings(arguments: Sequence[str]) -> int:
    """Print every setting with value and origin, as this command line and this environment give them."""
    from meshcni.agent.resolution import FLAGS, settle, show

    parsed = _only_flags(parse((*FLAGS, OUTPUT), arguments))
    form = _output(parsed, ("", "json"))
    shown = show(settle(parsed, os.environ))
    if form == "json":
        text = json.dumps([one.as_object() for one in shown], indent=2, ensure_ascii=False)
    else:
        width = max(len(one.row.name) for one in shown)
        text = "\n".join(f"{one.row.name:<{width}}  {one.value or '(empty)'}  [{one.origin}]" for one in shown)
    sys.stdout.write(text + "\n")
    return 0


def status(arguments: Sequence[str]) -> int:
    """Print what the running agent says of itself; exit status 1 when it is not ready."""
    from meshcni.cli.statustext import as_text

    parsed = _only_flags(parse((OUTPUT, RUN_DIR, *PERSISTENT), arguments))
    form = _output(parsed, ("", "json"))
    document = ask(_run_dir(parsed), "GET", STATUS_PATH)
    sys.stdout.write((json.dumps(document, indent=2) if form == "json" else as_text(document)) + "\n")
    return 0 if document["ready"] else 1


def uninstall(arguments: Sequence[str]) -> int:
    """Take everything off this node: by the running agent, which would put it back otherwise, else by ourselves."""
    from meshcni.agent.resolution import FLAGS, settle

    parsed = _only_flags(parse((*FLAGS, PURGE), arguments))
    chosen = settle(parsed, os.environ)
    purge = go_bool(parsed.text("purge") or "false")
    try:
        target = f"{UNINSTALL_PATH}?{PURGE_QUERY}" if purge else UNINSTALL_PATH
        done: list[str] = ask(chosen.cni_agent_run_dir, "POST", target)["done"]
        rest: MeshCniError | None = None
    except AgentUnavailableError:
        from meshcni.agent.removal import remove_from_node

        removal = asyncio.run(remove_from_node(chosen, chosen.node or socket.gethostname(), purge=purge))
        done, rest = list(removal.done), removal.rest
    sys.stdout.write("".join(f"{sentence}\n" for sentence in done or ["nothing of ours was there"]))
    if rest is not None:
        sys.stdout.flush()
        raise rest
    return 0


def _only_flags(parsed: ParsedFlags) -> ParsedFlags:
    if parsed.rest:
        raise UsageError(f"unexpected argument {parsed.rest[0]!r}", "install-cni help lists the commands")
    return parsed


def _output(parsed: ParsedFlags, forms: Sequence[str]) -> str:
    form = parsed.text("output") or ""
    if form not in forms:
        raise UsageError(f"output {form!r} is unknown", f"write one of {', '.join(filter(None, forms))}")
    return form


def _run_dir(parsed: ParsedFlags) -> str:
    return parsed.text("cni-agent-run-dir") or os.environ.get("CNI_AGENT_RUN_DIR") or istio.RUN_DIR
