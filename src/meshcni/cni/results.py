"""CNI results: what the plugin before us printed (prevResult), and the same in the version our conf asks for.

Layouts: containernetworking/cni pkg/types/020, 040 and 100 at v1.3.0. Three layouts serve the seven versions; inside
one layout nothing is lost (unknown keys stay), between layouts only what the target can express is kept.
Imported by the plugin's fast path, so this module imports nothing but our errors and JSON.
"""

from meshcni.cni.jsontext import compact, indented
from meshcni.cni.versions import SUPPORTED_VERSIONS
from meshcni.errors import CNI_INCOMPATIBLE_VERSION, CNI_INVALID_CONFIG, CniInputError

FLAT = "0.2.0"  # ip4 and ip6, one address each, routes inside
LISTED = "0.4.0"  # lists of interfaces, ips and routes; every address names its IP version; dns is always there
CURRENT = "1.0.0"  # as LISTED without the IP version; keys sorted, dns only when it says something
LAYOUTS = dict(zip(SUPPORTED_VERSIONS, (FLAT, FLAT, LISTED, LISTED, LISTED, CURRENT, CURRENT), strict=True))

# Key -> kind of value, in the order of the output. A trailing '!' marks keys that are written even when empty.
_INTERFACE = {
    "name": "text!",
    "mac": "text",
    "mtu": "count",
    "sandbox": "text",
    "socketPath": "text",
    "pciID": "text",
}
_ADDRESS = {"version": "text!", "interface": "count!", "address": "prefix!", "gateway": "ip"}
_FLAT_ADDRESS = {"ip": "prefix!", "gateway": "ip", "routes": "routes"}
_ROUTE = {
    "dst": "prefix!",
    "gw": "ip",
    "mtu": "count",
    "advmss": "count",
    "priority": "count",
    "table": "count!",
    "scope": "count!",
}
_DNS = {"nameservers": "texts", "domain": "text", "search": "texts", "options": "texts"}
_ONLY_CURRENT = ("mtu", "socketPath", "pciID")  # of an interface

_PREV_RESULT = "prevResult"
_HINT = "the plugin before istio-cni in the chain printed this; see the conflist on this node"


class Result:
    """A result in the shape of CNI 1.x: lists of objects under their canonical keys, and what else there was."""

    __slots__ = ("dns", "extras", "interfaces", "ips", "layout", "routes")

    def __init__(self, layout: str) -> None:
        self.layout = layout
        self.interfaces: list[dict[str, object]] = []
        self.ips: list[dict[str, object]] = []
        self.routes: list[dict[str, object]] = []
        self.dns: dict[str, object] = {}
        self.extras: dict[str, object] = {}

    def addresses(self) -> tuple[str, ...]:
        """The pod's addresses with prefix length, such as `10.0.0.2/24`."""
        return tuple([str(ip["address"]) for ip in self.ips])


def parse_result(document: object, conf_version: str) -> Result:
    """Takes prevResult apart; without a `cniVersion` of its own it has that of the conf.

    Raises CniInputError (code 7, or 1 for an unknown version) naming the field.
    """
    members = _object(document, {"cniVersion": "text"}, _PREV_RESULT)
    version = members.pop("cniVersion", conf_version) or conf_version
    layout = LAYOUTS.get(str(version))
    if layout is None:
        raise CniInputError(CNI_INCOMPATIBLE_VERSION, f"{_PREV_RESULT}.cniVersion {version!r} is not supported", _HINT)
    result = Result(layout)
    for key, value in members.items():
        name = key.lower()
        where = f"{_PREV_RESULT}.{key}"
        if name == "dns":
            result.dns = _object(value, _DNS, where)
        elif layout == FLAT and name in ("ip4", "ip6"):
            _add_flat_address(result, value, where)
        elif layout != FLAT and name == "interfaces":
            result.interfaces = _objects(value, _INTERFACE, where)
        elif layout != FLAT and name == "ips":
            result.ips = _objects(value, _ADDRESS, where, "address")
        elif layout != FLAT and name == "routes":
            result.routes = _objects(value, _ROUTE, where, "dst")
        else:
            result.extras[key] = value
    return result


def _add_flat_address(result: Result, value: object, where: str) -> None:
    address = _object(value, _FLAT_ADDRESS, where)
    if "ip" not in address:
        raise _wrong(f"{where}.ip", "missing", "an address with prefix length")
    result.routes.extend(_objects(address.pop("routes", []), _ROUTE, f"{where}.routes", "dst"))
    address["address"] = address.pop("ip")
    result.ips.append(address)


def result_text(result: Result | None, version: str) -> str:
    """What an ADD prints: `result` (None: there was no prevResult) in the layout of `version`, indented by four.

    Raises CniInputError (code 7, naming prevResult) when 0.1.0 or 0.2.0 cannot express it: these need an address.
    """
    layout = LAYOUTS[version]
    if result is None:
        result = Result(layout)
    if layout == FLAT:
        members = _flat_members(result, version)
    elif layout == LISTED:
        members = _listed_members(result, version)
    else:
        members = _current_members(result, version)
    if result.layout == layout:
        members.update(result.extras)
    return indented(_sorted_deeply(members) if layout == CURRENT else members)


def _flat_members(result: Result, version: str) -> dict[str, object]:
    members: dict[str, object] = {"cniVersion": version}
    for key, family in (("ip4", 4), ("ip6", 6)):
        ips = [ip for ip in result.ips if _family(ip["address"]) == family]
        if ips:
            routes = [route for route in result.routes if _family(route["dst"]) == family]
            flat = {"ip": ips[0]["address"], "gateway": ips[0].get("gateway"), "routes": _all(routes, _ROUTE)}
            members[key] = _ordered(flat, _FLAT_ADDRESS)
    if len(members) == 1:
        raise CniInputError(
            CNI_INVALID_CONFIG,
            f"{_PREV_RESULT} has no IP address, but a result of CNI version {version} must have one",
            "put istio-cni behind a plugin that gives an address, or raise cniVersion to 0.3.1 or later",
        )
    members["dns"] = _ordered(result.dns, _DNS)
    return members


def _listed_members(result: Result, version: str) -> dict[str, object]:
    interfaces = result.interfaces
    if result.layout == CURRENT:
        interfaces = [{k: v for k, v in item.items() if k not in _ONLY_CURRENT} for item in interfaces]
    ips = [{**ip, "version": str(_family(ip["address"]))} for ip in result.ips]
    return {"cniVersion": version, **_lists(result, interfaces, ips), "dns": _ordered(result.dns, _DNS)}


def _current_members(result: Result, version: str) -> dict[str, object]:
    ips = [{k: v for k, v in ip.items() if k != "version"} for ip in result.ips]
    members = {"cniVersion": version, **_lists(result, result.interfaces, ips)}
    dns = _ordered(result.dns, _DNS)
    if dns:
        members["dns"] = dns
    return members


def _lists(result: Result, interfaces: list[dict[str, object]], ips: list[dict[str, object]]) -> dict[str, object]:
    lists = {
        "interfaces": _all(interfaces, _INTERFACE),
        "ips": _all(ips, _ADDRESS),
        "routes": _all(result.routes, _ROUTE),
    }
    return {key: items for key, items in lists.items() if items}


def _all(items: list[dict[str, object]], kinds: dict[str, str]) -> list[object]:
    return [_ordered(item, kinds) for item in items]


def _ordered(members: dict[str, object], kinds: dict[str, str]) -> dict[str, object]:
    """Known keys in their order without the empty ones, then the unknown keys as they were."""
    known = {
        key: members[key]
        for key, kind in kinds.items()
        if key in members and (kind[-1] == "!" or members[key] not in ("", 0, [], None))
    }
    return {**known, **{key: value for key, value in members.items() if key not in kinds}}


def _sorted_deeply(value: object) -> object:
    if isinstance(value, dict):
        return {key: _sorted_deeply(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_sorted_deeply(item) for item in value]
    return value


def _wrong(where: str, value: object, wanted: str) -> CniInputError:
    found = value if value == "missing" else compact(value)[:60]
    return CniInputError(CNI_INVALID_CONFIG, f"{where} is {found}, must be {wanted}", _HINT)


def _objects(value: object, kinds: dict[str, str], where: str, required: str = "") -> list[dict[str, object]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise _wrong(where, value, "a list of objects")
    items = []
    for index, item in enumerate(value):
        members = _object(item, kinds, f"{where}[{index}]")
        if required and required not in members:
            raise _wrong(f"{where}[{index}].{required}", "missing", "an address with prefix length")
        items.append(members)
    return items


def _object(value: object, kinds: dict[str, str], where: str) -> dict[str, object]:
    """The members under canonical keys (Go matches keys in any case) and checked; null counts as absent."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(where, value, "an object")
    canonical = {key.lower(): key for key in kinds}
    members: dict[str, object] = {}
    for key, member in value.items():
        if member is None:
            continue
        name = str(canonical.get(key.lower(), key))
        kind = kinds.get(name, "anything").rstrip("!")
        is_good, wanted = _KINDS[kind]
        if not is_good(member):
            raise _wrong(f"{where}.{name}", member, wanted)
        members[name] = member
    return members


def _is_anything(value: object) -> bool:
    return True


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_ip(value: object) -> bool:
    return isinstance(value, str) and (value == "" or ip_family(value) != 0)


def _is_prefix(value: object) -> bool:
    if not isinstance(value, str):
        return False
    address, _, length = value.partition("/")
    limit = {4: 32, 6: 128, 0: -1}[ip_family(address)]
    return 0 < len(length) <= 3 and length.isascii() and length.isdigit() and int(length) <= limit


_KINDS = {
    "anything": (_is_anything, ""),
    "text": (_is_text, "a string"),
    "texts": (_is_texts, "a list of strings"),
    "count": (_is_count, "an integer"),
    "ip": (_is_ip, "an IP address"),
    "prefix": (_is_prefix, "an IP address with prefix length, such as 10.0.0.2/24"),
    "routes": (_is_anything, ""),  # checked as a list of objects of its own
}


def _family(prefix: object) -> int:
    return ip_family(str(prefix).partition("/")[0])


def ip_family(text: str) -> int:
    """4, 6, or 0 for what is no IP address (leading zeros and zones are refused, as Go's parser does)."""
    if ":" not in text:
        return 4 if _is_ipv4(text) else 0
    head, gap, tail = text.partition("::")
    groups = (head.split(":") if head else []) + (tail.split(":") if tail else [])
    width = 0
    for position, group in enumerate(groups):
        if "." in group:
            if position != len(groups) - 1 or not text.endswith(group) or not _is_ipv4(group):
                return 0
            width += 2
        elif 0 < len(group) <= 4 and not group.strip("0123456789abcdefABCDEF"):
            width += 1
        else:
            return 0
    return 6 if (width < 8 if gap else width == 8) else 0


def _is_ipv4(text: str) -> bool:
    parts = text.split(".")
    return len(parts) == 4 and all(_is_octet(part) for part in parts)


def _is_octet(part: str) -> bool:
    digits = part.isascii() and part.isdigit() and len(part) <= 3
    return digits and int(part) <= 255 and (part == "0" or part[0] != "0")
