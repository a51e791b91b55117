"""What the plugins beside ours in the conf tell: whether the runtime looks for plugins where we put ours.

`config` says where we put it, `directory` is the conf directory as read, `target` the file in it that is to carry our
entry (empty: none). The functions look at the host's directories and change nothing.
"""

from __future__ import annotations

import os

from meshcni.agent import platforms
from meshcni.agent.installconfig import InstallConfig
from meshcni.cni import conf
from meshcni.cni.confplan import ConfDir
from meshcni.cni.conftext import parse
from meshcni.errors import ConfError
from meshcni.host.mounts import shown_directory

ALONE = (
    "{path} is the first conf of its directory and holds our plugin alone: a runtime that reads this directory itself "
    "would give pods no network; CHAINED_CNI_PLUGIN=false is for Multus, which calls us by a "
    "NetworkAttachmentDefinition (chart value provider=multus) and reads a directory of its own (cniConfDir)"
)


def doubts(config: InstallConfig, directory: ConfDir, target: str) -> tuple[str, ...]:
    """Why pods may get no network though our entry is in place, as sentences; empty: nothing suggests it."""
    return _missing(config, directory, target) + _alone(config, directory)


def elsewhere(config: InstallConfig, directory: ConfDir, target: str) -> str:
    """Why our entry would let no pod start: all other plugins of the conf are in a directory that is not ours.

    Not even our own successor with the right directory could start then. Empty: nothing speaks against our entry.
    """
    types, absent = _types(config, directory, target)
    if not absent or absent != types:
        return ""
    where = platforms.directory_of_plugins(config.host_root, types)
    if not where:
        return ""
    return f"the plugins of {target} are in {where} of the host, ours would not be, so the conf is not touched"


def _missing(config: InstallConfig, directory: ConfDir, target: str) -> tuple[str, ...]:
    """A hint when the plugins that the conf names are not where we put ours: the runtime may look elsewhere."""
    dirs, absent = config.binary_target_dirs, _types(config, directory, target)[1]
    if not absent or not os.path.isdir(dirs[0]):
        return ()
    hint = platforms.hint_for_plugins(config.host_root, absent)
    return (
        f"{target} names {', '.join(absent)}, not found in {', '.join(dirs)}: the runtime seems to use another "
        f"directory for plugins, and would not find ours; {hint}",
    )


def _alone(config: InstallConfig, directory: ConfDir) -> tuple[str, ...]:
    """A file that holds our plugin alone gives no pod an interface, so it must not be what the runtime reads."""
    first = next(iter(conf.candidates(directory.files)), "")
    if config.chained or not first or "multus" in shown_directory(config.conf_dir):
        return ()
    try:
        ours = conf.is_ours(parse(directory.files[first], first).value)
    except ConfError:
        return ()
    return (ALONE.format(path=os.path.join(config.conf_dir, first)),) if ours else ()


def _types(config: InstallConfig, directory: ConfDir, target: str) -> tuple[list[str], list[str]]:
    """The types of the conf's other plugins, and which of them are in none of our directories."""
    data = directory.files.get(target)
    if data is None or not config.chained:
        return [], []
    plugins = conf.foreign_part(conf.as_list(target, data))["plugins"]
    types = sorted({str(plugin.get("type")) for plugin in plugins})
    dirs = config.binary_target_dirs
    return types, [one for one in types if not any(os.path.exists(os.path.join(base, one)) for base in dirs)]
