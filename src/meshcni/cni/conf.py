"""CNI conf files as the runtimes read them, our plugin's entry, and putting it in and taking it out.

Rules: containernetworking/cni v1.3.0 libcni/conf.go and istio/istio cni/pkg/install/cniconfig.go. Unlike the
original's, an edit leaves the bytes of others alone, a conversion keeps the network's name and version, and `.json`
files count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from meshcni import istio
from meshcni.cni.conftext import (
    Document,
    array_at,
    go_json,
    go_string,
    object_at,
    parse,
    parse_text,
    style,
    with_item,
    without,
)
from meshcni.errors import ConfError

LIST_SUFFIX = ".conflist"
SINGLE_SUFFIXES = (".conf", ".json")  # containerd and CRI-O read a .json like a .conf
SUFFIXES = (LIST_SUFFIX, *SINGLE_SUFFIXES)
RUN_DIR_KEY = "cni_agent_run_dir"


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryConfig:
    """What the plugin's conf entry says; `extra` holds our own keys, only those whose setting is not its default."""

    run_dir: str = istio.RUN_DIR
    plugin_log_level: str = "info"
    ambient_enabled: bool = False
    enablement_selectors: tuple[Mapping[str, object], ...] = ()
    exclude_namespaces: tuple[str, ...] = ()
    pod_namespace: str = ""
    native_nftables: bool = False
    ambient_detection_retry: bool = False
    extra: Mapping[str, object] = field(default_factory=dict)


def entry(config: EntryConfig) -> dict[str, object]:
    """The plugin's configuration with the original's keys in the original's order (cni/pkg/plugin/plugin.go Config)."""
    return {
        "cniVersion": istio.CONF_CNI_VERSION,
        "name": istio.PLUGIN_NAME,
        "type": istio.PLUGIN_NAME,
        "ipam": {},
        "dns": {},
        "plugin_log_level": config.plugin_log_level,
        RUN_DIR_KEY: config.run_dir,
        "ambient_enabled": config.ambient_enabled,
        "enablement_selectors": [dict(selector) for selector in config.enablement_selectors],
        "exclude_namespaces": list(config.exclude_namespaces) or None,  # Go writes a nil list as null
        "pod_namespace": config.pod_namespace,
        "native_nftables": config.native_nftables,
        "enable_ambient_detection_retry": config.ambient_detection_retry,
        **config.extra,
    }


def standalone_file(own: Mapping[str, object]) -> bytes:
    """The file of a plugin that is not chained: keys in the order of `own`, as Go writes a struct."""
    return (go_json(dict(own), sort=False) + "\n").encode()


def list_entry(own: Mapping[str, object]) -> dict[str, object]:
    """The entry as it stands in a list, which has one cniVersion for all."""
    return {key: value for key, value in own.items() if key != "cniVersion"}


# --- reading ----------------------------------------------------------------------------------------------------------


def suffix(name: str) -> str:
    """The extension as Go's filepath.Ext gives it: from the last dot on, also when the name starts with it."""
    return name[name.rindex(".") :] if "." in name else ""


def candidates(names: Iterable[str]) -> list[str]:
    """The names that runtimes look at, in their order."""
    return sorted(name for name in names if suffix(name) in SUFFIXES)


def list_name(name: str) -> str:
    """The name of a file once it holds a list: `10-x.conf` becomes `10-x.conflist`, other names stay."""
    return name[: -len(suffix(name))] + LIST_SUFFIX if suffix(name) in SINGLE_SUFFIXES else name


def read(name: str, data: bytes, plugin_folders: frozenset[str] = frozenset()) -> Document:
    """A conf file by the runtimes' rules. Raises ConfError when they would not accept it.

    `plugin_folders` names the networks that have plugin files of their own in a folder of the network's name; only
    those lists may do without `plugins`.
    """
    document = parse(data, name)
    if suffix(name) == LIST_SUFFIX:
        _check_list(name, document.value, plugin_folders)
    else:
        _check_plugin(name, document.value, "")
    return document


def is_list(name: str, document: Document) -> bool:
    """Whether a file is to be edited as a list: by its content, and by its name where the content could be both."""
    has_plugins = isinstance(document.value.get("plugins"), list)
    if suffix(name) == LIST_SUFFIX or not document.value.get("type"):
        return has_plugins
    return False


def _check_list(name: str, value: Mapping[str, Any], plugin_folders: frozenset[str]) -> None:
    if not isinstance(value.get("name"), str):
        raise ConfError(f"{name}: 'name' is missing or no string")
    if not isinstance(value.get("cniVersion", ""), str):
        raise ConfError(f"{name}: 'cniVersion' is no string")
    versions = value.get("cniVersions", [])
    if not isinstance(versions, list) or not all(isinstance(one, str) and _is_version(one) for one in versions):
        raise ConfError(f"{name}: 'cniVersions' is no list of versions like 1.0.0")
    for key in ("disableCheck", "disableGC", "loadOnlyInlinedPlugins"):
        given = value.get(key, False)
        if not isinstance(given, bool) and str(given).lower() not in ("true", "false"):
            raise ConfError(f"{name}: {key!r} is neither true nor false")
    if "plugins" not in value and value["name"] in plugin_folders and not _is_true(value.get("loadOnlyInlinedPlugins")):
        return
    plugins = value.get("plugins")
    if not isinstance(plugins, list) or not plugins:
        raise ConfError(f"{name}: 'plugins' is missing, empty or no list")
    for index, plugin in enumerate(plugins):
        _check_plugin(name, plugin, f"plugins[{index}]: ")


def _check_plugin(name: str, plugin: object, where: str) -> None:
    """What Go's decoder of one network accepts: keys in any case, null as absent."""
    if not isinstance(plugin, dict):
        raise ConfError(f"{name}: {where}expected an object")
    for key in ("cniVersion", "name", "type"):
        if not isinstance(_field(plugin, key, ""), str):
            raise ConfError(f"{name}: {where}{key!r} is no string")
    capabilities = _field(plugin, "capabilities", {})
    if not isinstance(capabilities, dict) or not all(isinstance(on, bool | None) for on in capabilities.values()):
        raise ConfError(f"{name}: {where}'capabilities' is no object of booleans")
    ipam = _field(plugin, "ipam", {})
    if not isinstance(ipam, dict) or not isinstance(_field(ipam, "type", ""), str):
        raise ConfError(f"{name}: {where}'ipam' is no object with a string 'type'")
    dns = _field(plugin, "dns", {})
    if not isinstance(dns, dict):
        raise ConfError(f"{name}: {where}'dns' is no object")
    if not _field(plugin, "type", ""):
        raise ConfError(f"{name}: {where}'type' is missing or empty")


def _field(plugin: Mapping[str, Any], key: str, default: object) -> object:
    """A field as Go's decoder finds it: the last key that matches in any case; null leaves the default."""
    found: list[object] = [value for name, value in plugin.items() if name.lower() == key.lower()]
    return default if not found or found[-1] is None else found[-1]


def _is_version(text: str) -> bool:
    parts = text.split(".")
    return text == "" or (len(parts) <= 3 and all(part.isascii() and part.isdigit() for part in parts))


def _is_true(value: object) -> bool:
    return str(value).lower() == "true"


# --- our entry in a file ----------------------------------------------------------------------------------------------


def plugins_of(document: Document) -> list[Any]:
    """The plugins of a list, of which a reader takes the last `plugins` key; empty when there is none."""
    plugins = document.value.get("plugins")
    return plugins if isinstance(plugins, list) else []


def is_ours(plugin: object, run_dir: str = "") -> bool:
    """Whether a plugin object is our entry; with `run_dir` only one that belongs to the agent of that run dir."""
    if not isinstance(plugin, dict) or plugin.get("type") != istio.PLUGIN_NAME:
        return False
    return not run_dir or plugin.get(RUN_DIR_KEY, run_dir) == run_dir


def has_entry(document: Document, run_dir: str = "") -> bool:
    """Whether a list calls our plugin."""
    return any(is_ours(plugin, run_dir) for plugin in plugins_of(document))


def is_in_place(document: Document, own: Mapping[str, object]) -> bool:
    """Whether a list calls our plugin exactly once, after the interface was made, and configured as `own`."""
    plugins = plugins_of(document)
    found = [index for index, plugin in enumerate(plugins) if is_ours(plugin)]
    if len(found) != 1 or (found[0] == 0 and len(plugins) > 1):
        return False
    return bool(plugins[found[0]] == as_read(list_entry(own)))


def as_read(own: Mapping[str, object]) -> dict[str, Any]:
    """`own` as a reader of a file gets it, for comparing by value."""
    return parse_text(go_json(dict(own)), istio.PLUGIN_NAME).value


def foreign_part(document: Document) -> dict[str, Any]:
    """What a list holds besides our entry, for comparing by value."""
    others = [plugin for plugin in plugins_of(document) if not is_ours(plugin)]
    return {**document.value, "plugins": others}


def with_entry(name: str, data: bytes, own: Mapping[str, object], *, original_conversion: bool = False) -> bytes:
    """The file as a list that ends with our entry and holds no other of ours; a single network is converted.

    Raises ConfError when the file is neither a network nor a list. `original_conversion` converts like the original:
    network name and version fixed, everything in Go's canonical form.
    """
    document = as_list(name, data, original_conversion=original_conversion)
    if is_in_place(document, own):
        return document.text.encode()
    document = _without_ours(name, document)
    plugins = document.root.member("plugins")
    if plugins is None or not isinstance(plugins.value, list):
        raise ConfError(f"{name} has no list 'plugins'", "our plugin can only be added to a list or a single network")
    if not all(isinstance(plugin, dict) for plugin in plugins.value):
        raise ConfError(f"{name}: an item of 'plugins' is no object")
    text = with_item(document.text, array_at(document.text, plugins.value_start), list_entry(own))
    edited = parse_text(text, name)
    if foreign_part(edited) != foreign_part(document) or not has_entry(edited):
        raise ConfError(f"{name} cannot be edited without changing what belongs to others")
    return text.encode()


def without_entry(name: str, data: bytes) -> bytes:
    """The list without our entry, all other bytes as they are. Raises ConfError when it is no JSON object."""
    return _without_ours(name, parse(data, name)).text.encode()


def as_list(name: str, data: bytes, *, original_conversion: bool = False) -> Document:
    """The file as a list: itself, or the list that a single network is converted to."""
    document = parse(data, name)
    if is_list(name, document) or not document.value.get("type"):
        return document
    if original_conversion:
        return parse_text(_converted_as_original(document), name)
    return parse_text(_converted(document), name)


def _without_ours(name: str, document: Document) -> Document:
    while True:
        index = next((i for i, plugin in enumerate(plugins_of(document)) if is_ours(plugin)), None)
        plugins = document.root.member("plugins")
        if index is None or plugins is None:
            return document
        document = parse_text(without(document.text, array_at(document.text, plugins.value_start), index), name)


def _converted(document: Document) -> str:
    """A single network as a list with its own name and version; the network's bytes stay, moved to the right."""
    name = str(_field(document.value, "name", "") or istio.CONVERTED_NETWORK_NAME)
    version = str(_field(document.value, "cniVersion", "") or istio.CONF_CNI_VERSION)
    newline, unit, gap = style(document.text)
    network = _without_version(document)
    before, body = document.text[: document.root.start], network[document.root.start :]
    after = body[len(body.rstrip()) :]
    body = body.rstrip()
    if not newline:
        items = f'"plugins":{gap}[{body}]'
        return (
            f'{before}{{"cniVersion":{gap}{go_string(version)},{gap}"name":{gap}{go_string(name)},{gap}{items}}}{after}'
        )
    line = newline + unit
    body = body.replace("\n", "\n" + unit + unit)
    head = f'{{{line}"cniVersion": {go_string(version)},{line}"name": {go_string(name)},{line}"plugins": ['
    return f"{before}{head}{line}{unit}{body}{line}]{newline}}}{after}"


def _converted_as_original(document: Document) -> str:
    network = {key: value for key, value in document.value.items() if key != "cniVersion"}
    conf = {"name": istio.CONVERTED_NETWORK_NAME, "cniVersion": istio.CONF_CNI_VERSION, "plugins": [network]}
    return go_json(conf) + "\n"


def _without_version(document: Document) -> str:
    text, root = document.text, document.root
    while True:
        index = next((i for i, member in enumerate(root.elements) if member.key.lower() == "cniversion"), None)
        if index is None:
            return text
        text = without(text, root, index)
        root = object_at(text, root.start)
