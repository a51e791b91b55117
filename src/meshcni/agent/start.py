"""From the command line to a running agent: settings, logging, event loop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
from collections.abc import Mapping, Sequence

from meshcni.agent import logs, privileges
from meshcni.agent.resolution import FLAGS, settle, show
from meshcni.agent.settings import Settings
from meshcni.errors import SettingError, UsageError
from meshcni.host import procfs
from meshcni.pflag import parse

log = logging.getLogger(__name__)

DESCRIPTORS = 65536
ENOUGH_DESCRIPTORS = 4096  # for 500 ambient pods, and for all of them to start at once


def run(arguments: Sequence[str]) -> int:
    """Run the agent until it ends; returns the exit status. Raises UsageError, SettingError and PrivilegesError."""
    parsed = parse(FLAGS, arguments)
    if parsed.help:
        from meshcni.agent.__main__ import main

        return main(["help"])
    if parsed.rest:
        raise UsageError(f"unknown command {parsed.rest[0]!r}", "install-cni help lists the commands")
    settings = settle(parsed, os.environ)
    plugin_log_level = _configure_logging(settings)
    for shown in show(settings):
        if shown.origin != "default":
            log.info("setting %s=%s", shown.row.name, shown.value, extra=logs.labels(origin=shown.origin))
    _mind_kubeconfig(os.environ)
    lacking = privileges.check(settings, procfs.privileges())
    if lacking:
        log.warning("%s", lacking)
    _raise_descriptor_limit()
    from meshcni.agent.app import Agent  # the heavy part, after errors in settings have been told

    gc.freeze()
    gc.enable()

    async def live() -> int:
        return await Agent(settings, plugin_log_level).run()

    return asyncio.run(live())


def _mind_kubeconfig(environment: Mapping[str, str]) -> None:
    """The original's agent would go by KUBECONFIG; ours goes by its service account, and must not do so silently."""
    path = environment.get("KUBECONFIG")
    if path:
        log.warning("KUBECONFIG=%s has no effect: the agent reaches the API server by its service account", path)


def _raise_descriptor_limit() -> None:
    """Take as many open files as we may: an ambient pod keeps one, an ADD under way has six, runtimes allow 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if wanted < ENOUGH_DESCRIPTORS:
        log.warning("at most %d files can be open; raise the hard limit of the container to %d", hard, DESCRIPTORS)


def _configure_logging(settings: Settings) -> str:
    try:
        return logs.configure(
            settings.log_output_level,
            settings.log_stacktrace_level,
            settings.log_caller,
            settings.log_as_json,
            settings.log_target,
        )
    except OSError as error:
        raise SettingError(f"cannot log to {', '.join(settings.log_target)}: {error}", "see --log_target") from None
