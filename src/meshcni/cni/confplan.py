"""What has to change in the conf directory so that the runtime calls our plugin, decided from what lies there.

`assess` and `removal` are pure: files in, changes out. A freshly started agent knows nothing but these files, so
nothing else decides. Names the operator gave and names found by ourselves stay apart: the latter are found anew each
time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from meshcni import istio
from meshcni.cni import conf
from meshcni.cni.conftext import Document, parse
from meshcni.errors import ConfError, SettingError

MULTUS = "multus"  # how its plugins' types begin
OWNED_NAME_SETTING = "ISTIO_OWNED_CNI_CONFIG_FILENAME"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfPolicy:
    """What the operator wants. Raises SettingError for a name that can never work."""

    own: Mapping[str, object]  # conf.entry()
    conf_name: str = ""  # the operator's; empty: found by ourselves
    chained: bool = True
    owned: bool = False
    owned_name: str = istio.OWNED_CONF_NAME
    original_conversion: bool = False

    def __post_init__(self) -> None:
        for value, variable in (
            (self.conf_name, "CNI_CONF_NAME"),
            (self.owned_name, "ISTIO_OWNED_CNI_CONFIG_FILENAME"),
        ):
            if "/" in value or "\0" in value or value in (".", ".."):
                raise SettingError(f"{variable}={value!r} is no file name", "give the name without a directory")
        if self.owned and conf.suffix(self.owned_name) != conf.LIST_SUFFIX:
            raise SettingError(
                f"{OWNED_NAME_SETTING}={self.owned_name!r} does not end in {conf.LIST_SUFFIX}",
                f"the owned file holds a list; give a name like {istio.OWNED_CONF_NAME}",
            )

    @property
    def uses_owned(self) -> bool:
        """Whether our entry lives in a list of our own; the same answer for writing and for cleaning up."""
        return self.owned and self.chained

    @property
    def run_dir(self) -> str:
        """By this our own entries are told from those of another agent."""
        return str(self.own[conf.RUN_DIR_KEY])


@dataclass(frozen=True, slots=True)
class ConfDir:
    """What lies in the conf directory: candidate files and the operator's, by name.

    `unreadable` has those that could not be read, with the reason; `plugin_folders` the networks with a folder of
    plugin files. `path` is for messages.
    """

    path: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    plugin_folders: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Change:
    """Write a file, or remove it (`data` is None). A new file gets mode and owner of the one named `like`, if any."""

    name: str
    data: bytes | None
    like: str = ""


@dataclass(frozen=True, slots=True)
class Assessment:
    """What to do. In place and fine exactly when there is neither a change nor a `reason`.

    `target` is the file that carries our entry once the changes are made, in their order, empty when none can;
    `reason` says why it cannot be, and `failed` that waiting does not help: a file is not as it must be. `notes` are
    troubles that do not stop us; `converted` names the single network's file that the changes replace. `doubt` says why
    the runtime may use another file all the same.
    """

    target: str = ""
    changes: tuple[Change, ...] = ()
    reason: str = ""
    notes: tuple[str, ...] = ()
    converted: str = ""
    failed: bool = False
    doubt: str = ""


def assess(directory: ConfDir, policy: ConfPolicy) -> Assessment:
    """What has to be done so that the runtime calls our plugin. Never raises for what lies in the directory."""
    valid, broken = _sorted_out(directory)
    if not policy.chained:
        return _standalone(directory, policy)
    try:
        found = _owned(directory, policy, valid) if policy.uses_owned else _chained(directory, policy, valid)
    except ConfError as error:
        found = Assessment(reason=f"the conf cannot be edited and is left as it is: {error}", failed=True)
    if not found.target and not found.reason:
        found = Assessment(reason=_waiting(directory, policy, broken))
    doubt = "" if policy.conf_name else _doubt(directory, found.target)
    notes = tuple(
        _broken_note(name, why, found.target)
        for name, why in broken.items()
        if name != found.converted and why not in found.reason and why not in doubt
    )
    notes += _multus_note(directory, found.target)
    return replace(found, notes=found.notes + notes, doubt=doubt)


def _multus_note(directory: ConfDir, target: str) -> tuple[str, ...]:
    """Chained into a meta plugin's own conf, we are called until it writes that anew."""
    if target not in directory.files:
        return ()
    try:
        others = conf.foreign_part(conf.as_list(target, directory.files[target]))["plugins"]
    except ConfError:
        return ()
    if not others or not str(others[0].get("type")).startswith(MULTUS):
        return ()
    return (
        f"{target} belongs to Multus, which writes it anew: let a NetworkAttachmentDefinition call {istio.PLUGIN_NAME} "
        "(chart values chained=false and provider=multus, which global.platform=openshift sets), or name the conf that "
        "Multus delegates to with CNI_CONF_NAME",
    )


def _sorted_out(directory: ConfDir) -> tuple[dict[str, Document], dict[str, str]]:
    """The valid candidates in the runtimes' order, and why the others are not."""
    valid: dict[str, Document] = {}
    broken: dict[str, str] = {}
    for name in conf.candidates({*directory.files, *directory.unreadable}):
        try:
            if name in directory.unreadable:
                raise ConfError(f"{name} cannot be read: {directory.unreadable[name]}")
            valid[name] = conf.read(name, directory.files[name], directory.plugin_folders)
        except ConfError as error:
            broken[name] = error.message
    return valid, broken


def _waiting(directory: ConfDir, policy: ConfPolicy, broken: Mapping[str, str]) -> str:
    if policy.conf_name:
        return f"waiting for the conf named by the operator: {directory.path}/{policy.conf_name} does not exist"
    if broken:
        return f"no valid conf in {directory.path}: {'; '.join(broken.values())}"
    return f"no conf in {directory.path} yet: waiting for the primary CNI plugin to write one"


def _doubt(directory: ConfDir, target: str) -> str:
    """A file that we cannot read may be one that the runtime can: a link out of the directory that is mounted here."""
    earlier = [name for name in conf.candidates(directory.unreadable) if name < target]
    if not earlier:
        return ""
    cause = "; ".join(f"{name} cannot be read: {directory.unreadable[name]}" for name in earlier)
    return f"the runtime may use a conf that sorts before {target}: {cause}"


def _broken_note(name: str, why: str, target: str) -> str:
    effect = "; it sorts before ours, and containerd loads no conf until it is repaired" if name < target else ""
    return f"another plugin's conf is broken and left as it is: {why}{effect}"


def _primary(directory: ConfDir, policy: ConfPolicy, valid: Mapping[str, Document]) -> str:
    """The file to chain into, empty when there is none (yet). A name of the operator's only has to exist."""
    if policy.conf_name:
        stem = policy.conf_name[: -len(conf.suffix(policy.conf_name))]
        forms = [policy.conf_name]
        if conf.suffix(policy.conf_name) in conf.SUFFIXES:
            forms += [stem + other for other in conf.SUFFIXES]
        known = {*directory.files, *directory.unreadable}
        return next((name for name in forms if name in known), "")
    # A list of our own name that carries our entry is a copy left from the owned mode, not a primary.
    return next((name for name in valid if not _is_own_copy(name, valid[name], policy)), "") or next(iter(valid), "")


def _is_own_copy(name: str, document: Document, policy: ConfPolicy) -> bool:
    return name == policy.owned_name and (policy.uses_owned or conf.has_entry(document, policy.run_dir))


def _content(directory: ConfDir, name: str) -> bytes:
    if name in directory.unreadable:
        raise ConfError(f"{name} cannot be read: {directory.unreadable[name]}")
    return directory.files[name]


def _chained(directory: ConfDir, policy: ConfPolicy, valid: Mapping[str, Document]) -> Assessment:
    """Our entry in the primary's own file."""
    primary = _primary(directory, policy, valid)
    if not primary:
        return Assessment()
    data = _content(directory, primary)
    target = conf.list_name(primary)
    wanted = conf.with_entry(primary, data, policy.own, original_conversion=policy.original_conversion)
    changes: list[Change] = []
    converted = ""
    if target != primary:
        _check_overwrite(directory, primary, target)
        converted = primary
        changes = [Change(target, wanted, like=primary), Change(primary, None)]
    elif wanted != data:
        changes = [Change(target, wanted)]
    if policy.conf_name:
        return Assessment(
            target, tuple(changes), notes=_preemption(policy, valid, primary, target), converted=converted
        )
    changes += _elsewhere(policy, valid, {primary, target})
    return Assessment(target, tuple(changes), converted=converted)


def _check_overwrite(directory: ConfDir, single: str, target: str) -> None:
    """A list that is in the way of a conversion may only be the outcome of an earlier one."""
    there = directory.files.get(target)
    if there is None and target not in directory.unreadable:
        return
    document = conf.as_list(target, _content(directory, target))
    before = conf.as_list(single, directory.files[single])
    types = [[plugin.get("type") for plugin in conf.foreign_part(one)["plugins"]] for one in (document, before)]
    if not conf.has_entry(document) or types[0] != types[1]:
        raise ConfError(f"{single} would become {target}, which exists and holds another network", "remove one of them")


def _preemption(policy: ConfPolicy, valid: Mapping[str, Document], primary: str, target: str) -> tuple[str, ...]:
    first = next(iter(valid), primary)
    if first in (primary, target) or first >= primary or conf.has_entry(valid[first]):
        return ()
    return (
        f"{first} sorts before {primary}, which CNI_CONF_NAME={policy.conf_name} names: "
        "the runtime uses it, and it does not call our plugin",
    )


def _elsewhere(policy: ConfPolicy, valid: Mapping[str, Document], keep: set[str]) -> list[Change]:
    """Takes our entry out of lists that are no longer the place for it; a copy of our own goes as a whole."""
    changes = []
    for name, document in valid.items():
        if name in keep or not conf.has_entry(document, policy.run_dir) or not conf.foreign_part(document)["plugins"]:
            continue
        own_copy = _is_own_copy(name, document, policy)
        changes.append(Change(name, None if own_copy else conf.without_entry(name, document.text.encode())))
    return changes


def _owned(directory: ConfDir, policy: ConfPolicy, valid: Mapping[str, Document]) -> Assessment:
    """Our entry in a copy of the primary that sorts before it; the primary stays as its owner wrote it."""
    own_name = policy.owned_name
    others = {name: document for name, document in valid.items() if name != own_name}
    primary = _primary(directory, policy, others)
    if not primary or primary == own_name:
        return Assessment()
    earlier = next((name for name in others if name < own_name), "")
    if earlier:
        return Assessment(
            reason=f"the owned conf {own_name} sorts after {earlier}, so the runtime would not use it: "
            f"give an earlier name with {OWNED_NAME_SETTING}"
        )
    data = _content(directory, primary)
    wanted = conf.with_entry(primary, data, policy.own, original_conversion=policy.original_conversion)
    current = valid.get(own_name)
    changes = [] if current is not None and _same(current, wanted, policy) else [Change(own_name, wanted)]
    return Assessment(own_name, (*changes, *_elsewhere(policy, others, set())))


def _same(current: Document, wanted: bytes, policy: ConfPolicy) -> bool:
    """Equal by value, everything compared: bodies of the other plugins, top-level keys, our entry."""
    desired = conf.as_list(policy.owned_name, wanted)
    return conf.is_in_place(current, policy.own) and conf.foreign_part(current) == conf.foreign_part(desired)


def _standalone(directory: ConfDir, policy: ConfPolicy) -> Assessment:
    """A file that holds our plugin alone, for a meta plugin that calls it by name."""
    target = policy.conf_name or istio.STANDALONE_CONF_NAME
    wanted = conf.standalone_file(policy.own)
    there = directory.files.get(target)
    if target in directory.unreadable:
        return Assessment(reason=f"{target} cannot be read: {directory.unreadable[target]}", failed=True)
    if there is not None and there.strip():
        try:
            document = parse(there, target)
        except ConfError as error:
            document = None
            if policy.conf_name:
                return Assessment(reason=f"{error.message}; it is left as it is", failed=True)
        if document is not None and document.value == conf.as_read(policy.own):
            return Assessment(target)
        if document is not None and not conf.is_ours(document.value):
            return Assessment(
                reason=f"{target} holds another plugin's network and is left as it is: "
                "give another name with CNI_CONF_NAME, or set CHAINED_CNI_PLUGIN=true to be chained into it",
                failed=True,
            )
    return Assessment(target, (Change(target, wanted),))


def removal(directory: ConfDir, policy: ConfPolicy, backups: Mapping[str, bytes]) -> Assessment:
    """What takes our entry out of the directory; files of others stay, but for our entry in them.

    `backups` has the single networks that were converted, by file name: one comes back when the list that it became
    says nothing else. `notes` say what had to stay.
    """
    changes: list[Change] = []
    notes: list[str] = []
    valid, _broken = _sorted_out(directory)
    for name in sorted(directory.files):
        is_copy = policy.uses_owned and name == policy.owned_name  # made by us, whatever has become of it
        try:
            document = parse(directory.files[name], name)
        except ConfError as error:
            if is_copy:
                changes.append(Change(name, None))  # containerd would load no conf at all
            else:
                notes.append(f"left as it is: {error.message}")
            continue
        if conf.is_ours(document.value, policy.run_dir):
            changes.append(Change(name, None))
        elif conf.has_entry(document, policy.run_dir):
            changes += _taken_out(directory, policy, name, document, backups)
        elif is_copy and valid.keys() - {name}:
            changes.append(Change(name, None))  # somebody took our entry out; the copy would hide the primary for ever
        notes += _still_named(name, document)
    notes += [f"left as it is: {name} cannot be read: {why}" for name, why in directory.unreadable.items()]
    return Assessment(changes=tuple(changes), notes=tuple(notes))


def _still_named(name: str, document: Document) -> list[str]:
    """A meta plugin's conf may hold a copy of the primary's list with our entry: that is its owner's to renew."""
    top = [plugin for plugin in conf.plugins_of(document) if not conf.is_ours(plugin)]
    inside = top if isinstance(document.value.get("plugins"), list) else list(document.value.values())
    if not any(_names_us(value) for value in inside):
        return []
    owner = next((str(plugin.get("type")) for plugin in top if isinstance(plugin, dict)), document.value.get("type"))
    return [
        f"left as it is: within the conf of {owner or 'another plugin'}, {name} still names {istio.PLUGIN_NAME}; "
        "restart what writes that file, or take the entry out by hand, before the plugin's binary is removed"
    ]


def _names_us(value: object) -> bool:
    if isinstance(value, dict):
        return conf.is_ours(value) or any(_names_us(inner) for inner in value.values())
    return isinstance(value, list) and any(_names_us(inner) for inner in value)


def _taken_out(
    directory: ConfDir, policy: ConfPolicy, name: str, document: Document, backups: Mapping[str, bytes]
) -> list[Change]:
    rest = conf.without_entry(name, directory.files[name])
    if name == policy.owned_name or not conf.foreign_part(document)["plugins"]:
        return [Change(name, None)]
    single = _backup_that_says_the_same(name, rest, policy, backups)
    if single and directory.files.get(single, backups[single]) == backups[single]:
        # The single network first: it sorts before the list, so the runtime never finds neither.
        restored = [] if single in directory.files else [Change(single, backups[single], like=name)]
        return [*restored, Change(name, None)]
    return [Change(name, rest)]


def _backup_that_says_the_same(name: str, rest: bytes, policy: ConfPolicy, backups: Mapping[str, bytes]) -> str:
    """The single network that the list `name`, now `rest`, was converted from; empty when somebody changed the list."""
    if policy.original_conversion:  # the original leaves the list
        return ""
    return next(
        (
            single
            for single, data in backups.items()
            if conf.list_name(single) == name and conf.as_list(single, data).value == conf.as_list(name, rest).value
        ),
        "",
    )
