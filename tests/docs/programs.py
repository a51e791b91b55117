"""Checks a documented command line: program, sub-command and flags exist, and values of the chart that it sets."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from tests.docs.pages import ROOT

from meshcni.agent import subcommands
from meshcni.agent.__main__ import COMMANDS as INSTALL_CNI
from meshcni.agent.resolution import FLAGS
from meshcni.cli import conf, explain, rules, status
from meshcni.cli.__main__ import COMMANDS as MESHCNI
from meshcni.errors import UsageError
from meshcni.pflag import Flag, parse

CHART_DEFAULTS = ROOT / "charts" / "istio-cni" / "values.yaml"
ROOT_KEY = "_internal_defaults_do_not_set"
OWN = {
    "version": (subcommands.SHORT, subcommands.OUTPUT, *subcommands.PERSISTENT),
    "settings": (*FLAGS, subcommands.OUTPUT),
    "status": (subcommands.OUTPUT, subcommands.RUN_DIR, *subcommands.PERSISTENT),
    "explain": explain.FLAGS,
    "uninstall": (*FLAGS, subcommands.PURGE),
}
KUBECTL = {
    "apply", "auth", "create", "debug", "delete", "describe", "exec", "get", "label", "logs", "patch", "rollout",
}  # fmt: skip
HELM = {"get", "rollback", "status", "uninstall", "upgrade", "lint"}
HELM_FLAGS = {"--install", "--namespace", "-n", "--set", "--reuse-values", "--create-namespace", "--version", "-f"}
ELSEWHERE = {"ls", "touch", "stat", "journalctl", "nft", "nsenter", "test"}  # programs of a node or a person's machine


class WrongCommandError(AssertionError):
    """A page names a command that does not exist."""


def check(line: str) -> None:
    """Raise WrongCommandError for a command line with something that does not exist."""
    words = shlex.split(line, comments=True)
    while words and "=" in words[0] and words[0].split("=")[0].isupper():
        words.pop(0)  # variables for the program
    if not words:
        return
    program, arguments = words[0].rpartition("/")[2], words[1:]
    checks: dict[str, Callable[[Sequence[str]], None]] = {
        "install-cni": _install_cni,
        "meshcni": _meshcni,
        "kubectl": _kubectl,
        "helm": _helm,
        "curl": lambda arguments: _need(any(one.startswith("localhost:") for one in arguments), line),
        "make": lambda arguments: _need(f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text(), line),
        "env": lambda arguments: check(shlex.join([one for one in arguments if one != "-i"])),
        "istio-cni": lambda arguments: _need(not arguments, line),
        "python": lambda arguments: _need(
            arguments[0] == "-m" and (ROOT / arguments[1].replace(".", "/")).exists(), line
        ),
        "promtool": lambda arguments: _need(tuple(arguments[:2]) in {("check", "rules"), ("test", "rules")}, line),
    }
    if program in checks:
        checks[program](arguments)
    elif line.startswith("scripts/"):
        _need((ROOT / words[0]).exists(), line)
    else:
        _need(program in ELSEWHERE, line)


def _need(good: bool, what: object) -> None:
    if not good:
        raise WrongCommandError(f"not a command of this release: {what}")


def _install_cni(arguments: Sequence[str]) -> None:
    if not arguments:
        return
    name, *rest = arguments
    _need(name in INSTALL_CNI and name in OWN, f"install-cni {name}")
    _flags(OWN[name], rest, f"install-cni {name}")
    if name not in ("explain",):
        _need(not parse(OWN[name], rest).rest, arguments)


def _meshcni(arguments: Sequence[str]) -> None:
    name, *rest = arguments
    _need(name in MESHCNI, f"meshcni {name}")
    if name == "rules":
        kind, *rest = rest
        _need(kind in rules.KINDS, f"meshcni rules {kind}")
        _flags(rules.KINDS[kind].flags, rest, f"meshcni rules {kind}")
    elif name == "conf":
        kinds = {"show": (), "insert": (*conf.EDITING, *conf.ENTRY), "remove": conf.EDITING}
        _need(rest[0] in kinds, arguments)
        _flags(kinds[rest[0]], rest[1:], "meshcni conf")
    else:
        _flags({"explain": explain.FLAGS, "status": status.FLAGS}[name], rest, f"meshcni {name}")


def _flags(flags: Sequence[Flag], arguments: Sequence[str], what: str) -> None:
    try:
        parse(flags, arguments)
    except UsageError as error:
        raise WrongCommandError(f"{what}: {error}") from error


def _kubectl(arguments: Sequence[str]) -> None:
    before, _, inside = _cut(arguments, "--")
    words = [
        one for index, one in enumerate(before) if not one.startswith("-") and before[index - 1] not in ("-n", "-c")
    ]
    _need(words and words[0] in KUBECTL, arguments)
    if inside:
        _need(words[0] in ("exec", "debug"), arguments)
        check(shlex.join(inside))


def _helm(arguments: Sequence[str]) -> None:
    _need(arguments[0] in HELM, arguments)
    for index, one in enumerate(arguments):
        if one.startswith("-"):
            _need(one in HELM_FLAGS, f"helm {one}")
        if one == "--set":
            for pair in arguments[index + 1].split(","):
                _need(is_chart_value(pair.partition("=")[0]), f"chart value {pair}")


def _cut(words: Sequence[str], mark: str) -> tuple[list[str], str, list[str]]:
    if mark not in words:
        return list(words), "", []
    index = list(words).index(mark)
    return list(words[:index]), mark, list(words[index + 1 :])


def chart_defaults() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(CHART_DEFAULTS.read_text())[ROOT_KEY]
    return found


def is_chart_value(path: str) -> bool:
    """Whether the chart has a value of that path; below an empty map everything goes."""
    found: Any = chart_defaults()
    for part in path.split("."):
        if not isinstance(found, dict) or (found and part not in found):
            return False
        found = found.get(part, {})
    return True
