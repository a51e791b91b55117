"""`meshcni`, the people's command line: each command is a `main(argv) -> int` of its own module."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from meshcni import __version__

COMMANDS = {  # command: module with its main, one line of help
    "explain": ("meshcni.cli.explain", "What is decided about a pod, why, and what comes next."),
    "rules": ("meshcni.cli.rules", "Rules of a sidecar, an ambient pod or the host."),
    "status": ("meshcni.cli.status", "How the agent of this node is: its pods, ztunnel, errors."),
    "conf": ("meshcni.cli.conf", "Show and edit CNI configuration files."),
}


class ForwardedCommand(click.Command):
    """A command that reads its own arguments; its module is loaded when it is run."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments as they were typed."""
        ctx.args = list(args)
        return []

    def invoke(self, ctx: click.Context) -> None:
        """Run the command's main and end with its status."""
        assert self.name is not None
        module = import_module(COMMANDS[self.name][0])
        ctx.exit(module.main(ctx.args))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="meshcni", message="%(prog)s %(version)s")
def group() -> None:
    """Look into an Istio-compatible CNI node agent, and do by hand what it does."""


@group.command()
def version() -> None:
    """Print the version."""
    click.echo(f"meshcni {__version__}")


for _name, (_module, _help) in COMMANDS.items():
    group.add_command(ForwardedCommand(_name, help=_help, add_help_option=False))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name; None: this process's own) and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = group.main(args=arguments, prog_name="meshcni", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough; nor may the interpreter's last flush complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())
