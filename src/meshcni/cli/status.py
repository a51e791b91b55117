"""`meshcni status`: what the agent of this node says of itself; the same as `install-cni status` in its container."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Final

from meshcni import istio
from meshcni.cli.control import STATUS_PATH, ask
from meshcni.cli.statustext import as_text
from meshcni.errors import MeshCniError, UsageError
from meshcni.pflag import Flag, help_text, parse

USAGE: Final = "Usage: meshcni status [--format text|json] [--cni-agent-run-dir DIR]"
FLAGS: Final = (
    Flag("format", "o", default="text", help="text or json"),
    Flag("cni-agent-run-dir", default=istio.RUN_DIR, env=("CNI_AGENT_RUN_DIR",), help="run directory of the agent"),
)


def main(argv: Sequence[str]) -> int:
    """Run `status`; the exit status is 1 when the agent is not ready, or when there is none."""
    try:
        return _run(argv)
    except MeshCniError as error:
        lines = [f"meshcni status: {error.message}", *([f"  {error.hint}"] if error.hint else [])]
        print(*lines, sep="\n", file=sys.stderr)
        return error.exit_code


def _run(argv: Sequence[str]) -> int:
    parsed = parse(FLAGS, argv)
    if parsed.help or parsed.rest[:1] == ["help"]:
        print(help_text(USAGE, FLAGS))
        return 0
    form = parsed.text("format") or "text"
    if parsed.rest or form not in ("text", "json"):
        raise UsageError(
            f"cannot understand {parsed.rest[0] if parsed.rest else form!r}", "write --format text or json"
        )
    run_dir = parsed.text("cni-agent-run-dir") or os.environ.get("CNI_AGENT_RUN_DIR") or istio.RUN_DIR
    document = ask(run_dir, "GET", STATUS_PATH)
    print(json.dumps(document, indent=2) if form == "json" else as_text(document))
    return 0 if document["ready"] else 1
