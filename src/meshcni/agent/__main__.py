"""`install-cni`: the agent, and its sub-commands, which `kubectl exec` can run without a shell.

Sub-commands import what they need when they run: `version` answers in 30 ms and loads nothing of the agent.
"""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

from meshcni.errors import MeshCniError, UsageError

Command = Callable[[Sequence[str]], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = _command_first(list(sys.argv[1:] if arguments is None else arguments))
    command = COMMANDS.get(given[0]) if given else None
    try:
        return command[0](given[1:]) if command else _agent(given)
    except MeshCniError as error:
        _complain(f"error: {error.message}")
        if error.hint:
            _complain(f"hint: {error.hint}")
        return error.exit_code
    except BrokenPipeError:  # the reader of our output went away
        return 1


def _command_first(arguments: list[str]) -> list[str]:
    """The arguments with the sub-command, if there is one, before the flags of every command that preceded it."""
    if not arguments or not arguments[0].startswith("--"):
        return arguments
    from meshcni.agent.subcommands import PERSISTENT
    from meshcni.pflag import parse

    try:
        rest = parse(PERSISTENT, arguments, interspersed=False).rest
    except UsageError:  # a flag of the agent's own
        return arguments
    return [*rest[:1], *arguments[: len(arguments) - len(rest)], *rest[1:]]


def _agent(arguments: Sequence[str]) -> int:
    """Run the agent itself."""
    # Process 1 of a container ignores what it has no handler for; a stop would wait for the end of the grace period.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the agent lives, there is nothing to end
    gc.disable()  # until all is loaded: nothing of that is garbage, and looking for some takes a tenth of the start
    from meshcni.agent.start import run

    return run(arguments)


def _version(arguments: Sequence[str]) -> int:
    from meshcni.agent.subcommands import version

    return version(arguments)


def _settings(arguments: Sequence[str]) -> int:
    from meshcni.agent.subcommands import settings

    return settings(arguments)


def _status(arguments: Sequence[str]) -> int:
    from meshcni.agent.subcommands import status

    return status(arguments)


def _uninstall(arguments: Sequence[str]) -> int:
    from meshcni.agent.subcommands import uninstall

    return uninstall(arguments)


def _explain(arguments: Sequence[str]) -> int:
    from meshcni.cli.explain import main as explain

    return explain(list(arguments))


def _not_provided(_arguments: Sequence[str]) -> int:
    _complain("error: this command of the original is not provided")
    _complain("hint: install-cni help lists the commands; docs/reference has the generated pages")
    return 1


def _help(_arguments: Sequence[str]) -> int:
    from meshcni.agent.resolution import FLAGS
    from meshcni.pflag import help_text

    lines = ["install-cni [flags]: run the node agent", "", "Commands:"]
    lines += [f"  {name:<12} {meaning}" for name, (_, meaning) in COMMANDS.items()]
    _say("\n".join(lines) + "\n")
    _say(help_text("", FLAGS).lstrip())
    return 0


COMMANDS: Mapping[str, tuple[Command, str]] = {
    "version": (_version, "print the version (-s, --short; -o, --output yaml|json)"),
    "settings": (_settings, "print every setting with its value and where it comes from (-o json)"),
    "status": (_status, "ask the agent of this node how it is (-o json)"),
    "explain": (_explain, "say what would happen to a pod, and why"),
    "uninstall": (_uninstall, "take conf entry and kubeconfig off this node (--purge: the plugin too)"),
    "completion": (_not_provided, "not provided"),
    "collateral": (_not_provided, "not provided"),
    "--version": (_version, "the same as version"),
    "help": (_help, "print this"),
    "--help": (_help, "print this"),
    "-h": (_help, "print this"),
}


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _complain(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
