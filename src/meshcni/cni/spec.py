"""What a runtime says to a CNI plugin and hears from it: environment and stdin in, result or error text out.

Behaviour: containernetworking/cni pkg/skel and pkg/utils at v1.3.0, istio/istio cni/pkg/plugin/plugin.go. The error
codes tell the causes apart (the original answers 999 for all of them). Imported by the plugin's fast path.
"""

from meshcni import istio
from meshcni.cni.jsontext import JsonError, compact, indented, parse
from meshcni.cni.results import Result, parse_result
from meshcni.cni.versions import CURRENT_VERSION, OLDEST_VERSION, SUPPORTED_VERSIONS
from meshcni.errors import (
    CNI_DECODING_FAILURE,
    CNI_INCOMPATIBLE_VERSION,
    CNI_INVALID_CONFIG,
    CNI_INVALID_ENVIRONMENT,
    CniInputError,
    MeshCniError,
)

MAX_STDIN_BYTES = 1 << 20  # a conf with prevResult has a few KiB; etcd would not store a larger one either
DEFAULT_AGENT_WAIT_SECONDS = 20.0
MAX_AGENT_WAIT_SECONDS = 600.0

# Verb -> variables it needs besides CNI_COMMAND, and the first conf version that has it. DEL and VERSION are not here:
# they are answered without looking at anything else.
VERBS = {
    "ADD": (("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"), "0.1.0"),
    "CHECK": (("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"), "0.4.0"),
    "GC": (("CNI_PATH",), "1.1.0"),
    "STATUS": (("CNI_PATH",), "1.1.0"),
}
ALL_VERBS = (*VERBS, "DEL", "VERSION")

# Key of the conf -> the type it must have. Keys are matched in any case and unknown ones ignored, as Go does.
CONF_KEYS: dict[str, type] = {
    "cniVersion": str,
    "name": str,
    "type": str,
    "capabilities": dict,
    "ipam": dict,
    "dns": dict,
    "prevResult": dict,
    "plugin_log_level": str,
    "cni_agent_run_dir": str,
    "ambient_enabled": bool,
    "enablement_selectors": list,
    "exclude_namespaces": list,
    "pod_namespace": str,
    "native_nftables": bool,
    "enable_ambient_detection_retry": bool,
    "agent_wait_seconds": float,  # ours: how long an ADD waits for the agent
    "system_namespace": str,  # ours: the control plane's, in which ztunnel is no pod of the mesh
}
_TYPE_NAMES = {
    str: "a string",
    dict: "an object",
    list: "a list of strings",
    bool: "true or false",
    float: "a number",
}
_CANONICAL_KEYS = {key.lower(): key for key in CONF_KEYS}

# Keys of CNI_ARGS that the original knows; only name, namespace and UID are used.
_KNOWN_ARGS = ("IgnoreUnknown", "K8S_POD_NAME", "K8S_POD_NAMESPACE", "K8S_POD_INFRA_CONTAINER_ID", "K8S_POD_UID")
_BOOLEANS = {"1": True, "true": True, "0": False, "false": False}

_ALPHANUMERIC = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
_IDENTIFIER = _ALPHANUMERIC + "_.-"
_MAX_IFNAME_BYTES = 15  # IFNAMSIZ without its end mark
_MAX_RUN_DIR_BYTES = 107 - len("/" + istio.AGENT_SOCKET_NAME)  # sun_path of sockaddr_un without its end mark


class Conf:
    """The entry of the conf that belongs to us, as far as the plugin acts on it."""

    __slots__ = (
        "agent_wait_seconds",
        "ambient_enabled",
        "enablement_selectors",
        "exclude_namespaces",
        "log_level",
        "pod_namespace",
        "run_dir",
        "system_namespace",
    )

    def __init__(
        self,
        run_dir: str,
        log_level: str,
        pod_namespace: str,
        exclude_namespaces: list[str],
        agent_wait_seconds: float,
        ambient_enabled: bool | None = None,
        enablement_selectors: object = None,
        system_namespace: str = "",
    ) -> None:
        """The last three, as they stand in the conf, are only looked at when the agent is down."""
        self.run_dir = run_dir
        self.log_level = log_level
        self.pod_namespace = pod_namespace
        self.exclude_namespaces = exclude_namespaces
        self.agent_wait_seconds = agent_wait_seconds
        self.ambient_enabled = ambient_enabled
        self.enablement_selectors = enablement_selectors
        self.system_namespace = system_namespace


class Request:
    """One ADD that can be understood. `pod_name`, `pod_namespace` and `pod_uid` are empty without Kubernetes."""

    __slots__ = (
        "cni_version",
        "conf",
        "container_id",
        "ifname",
        "may_be_own_netns",
        "netns",
        "pod_name",
        "pod_namespace",
        "pod_uid",
        "prev_result",
    )

    def __init__(
        self, environ: dict[str, str], cni_version: str, conf: Conf, args: dict[str, str], prev_result: Result | None
    ) -> None:
        self.cni_version = cni_version
        self.conf = conf
        self.container_id = environ["CNI_CONTAINERID"]
        self.ifname = environ["CNI_IFNAME"]
        self.netns = environ["CNI_NETNS"]
        self.may_be_own_netns = environ.get("CNI_NETNS_OVERRIDE", "").lower() in ("1", "true")
        self.pod_name = args.get("K8S_POD_NAME", "")
        self.pod_namespace = args.get("K8S_POD_NAMESPACE", "")
        self.pod_uid = args.get("K8S_POD_UID", "")
        self.prev_result = prev_result


def check_environment(environ: dict[str, str]) -> str:
    """The verb, when everything it needs is set and well formed. Raises CniInputError (code 4)."""
    command = environ.get("CNI_COMMAND", "")
    if command not in VERBS:
        raise CniInputError(
            CNI_INVALID_ENVIRONMENT, f"unknown CNI_COMMAND: {command}", "known are " + ", ".join(ALL_VERBS)
        )
    required = VERBS[command][0]
    missing = [name for name in required if not environ.get(name)]
    if missing:
        raise CniInputError(
            CNI_INVALID_ENVIRONMENT,
            f"required env variables [{','.join(missing)}] missing",
            f"{command} needs CNI_COMMAND, {', '.join(required)}",
        )
    if "CNI_CONTAINERID" in required:
        _check_container_id(environ["CNI_CONTAINERID"])
        _check_ifname(environ["CNI_IFNAME"])
    return command


def parse_conf(command: str, stdin: bytes) -> tuple[str, dict[str, object]]:
    """The conf's version (empty means 0.1.0) and its known members under canonical keys, checked.

    Raises CniInputError: 6 what is no JSON object, 7 a wrong member, 1 a version that we or the verb do not have.
    """
    members = _decode_conf(stdin)
    version = str(members.get("cniVersion") or OLDEST_VERSION)
    if version not in SUPPORTED_VERSIONS:
        supported = " ".join(SUPPORTED_VERSIONS)
        raise CniInputError(
            CNI_INCOMPATIBLE_VERSION,
            "incompatible CNI versions",
            f'config is "{version}", plugin supports [{supported}]',
        )
    since = VERBS[command][1]
    if SUPPORTED_VERSIONS.index(version) < SUPPORTED_VERSIONS.index(since):
        raise CniInputError(
            CNI_INCOMPATIBLE_VERSION,
            f"config version does not allow {command}",
            f"the conf has cniVersion {version}, {command} exists since {since}",
        )
    name = str(members.get("name", ""))
    if not name:
        raise _bad_conf("name", "missing", "the name of the network")
    if not _is_identifier(name):
        raise _bad_conf("name", repr(name), "letters, digits, '_', '.', '-', the first a letter or digit")
    return version, members


def parse_add(environ: dict[str, str], version: str, members: dict[str, object]) -> Request:
    """The ADD that a checked environment and conf ask for. Raises CniInputError: 4 CNI_ARGS, 7 conf or prevResult."""
    args = parse_args(environ.get("CNI_ARGS", ""))
    document = members.get("prevResult")
    # A conf without prevResult cannot be told from one that stands alone (Multus), so it is no error.
    prev_result = None if document is None else parse_result(document, version)
    return Request(environ, version, _conf(members), args, prev_result)


def parse_args(text: str) -> dict[str, str]:
    """CNI_ARGS (`K=V;K=V`). Raises CniInputError (code 4), also for unknown keys unless IgnoreUnknown is set."""
    args: dict[str, str] = {}
    for pair in text.split(";") if text else []:
        key, equals, value = pair.partition("=")
        if not equals or "=" in value:
            raise CniInputError(
                CNI_INVALID_ENVIRONMENT, f'CNI_ARGS: ARGS: invalid pair "{pair}"', "the form is KEY=VALUE;KEY=VALUE"
            )
        args[key] = value
    ignore = args.get("IgnoreUnknown", "false")
    if ignore.lower() not in _BOOLEANS:
        raise CniInputError(
            CNI_INVALID_ENVIRONMENT, f'CNI_ARGS: IgnoreUnknown is "{ignore}"', "it must be 1, 0, true or false"
        )
    unknown = [key for key in args if key not in _KNOWN_ARGS]
    if unknown and not _BOOLEANS[ignore.lower()]:
        raise CniInputError(
            CNI_INVALID_ENVIRONMENT, f"CNI_ARGS: ARGS: unknown args {unknown}", "IgnoreUnknown=1 lets them pass"
        )
    return args


def error_text(error: MeshCniError, cni_version: str = CURRENT_VERSION) -> str:
    """A CNI error: code, msg and, when the error has a hint, details."""
    members: dict[str, object] = {"cniVersion": cni_version, "code": error.cni_code, "msg": error.message}
    if error.hint:
        members["details"] = error.hint
    return indented(members)


def _decode_conf(stdin: bytes) -> dict[str, object]:
    if len(stdin) > MAX_STDIN_BYTES:
        raise CniInputError(
            CNI_DECODING_FAILURE,
            f"the conf on stdin has more than {MAX_STDIN_BYTES} bytes",
            "a conf with prevResult has a few KiB: look at what the runtime or the plugin before us sends",
        )
    try:
        document = parse(stdin)
    except JsonError as error:
        found = "empty" if not stdin.strip() else f"not JSON: {error.message}"
        raise CniInputError(
            CNI_DECODING_FAILURE, f"the conf on stdin is {found}", "the runtime must write the network configuration"
        ) from None
    if not isinstance(document, dict):
        raise CniInputError(CNI_DECODING_FAILURE, "the conf on stdin is no JSON object", "it must be { ... }")
    members: dict[str, object] = {}
    for key, value in document.items():
        name = _CANONICAL_KEYS.get(key.lower())
        if name is None or value is None:  # null is the same as absent
            continue
        wanted = CONF_KEYS[name]
        if not isinstance(value, (int, float) if wanted is float else wanted) or (
            isinstance(value, bool) and wanted is not bool
        ):
            raise _bad_conf(name, compact(value)[:60], _TYPE_NAMES[wanted])
        members[name] = value
    return members


def _conf(members: dict[str, object]) -> Conf:
    excluded = members.get("exclude_namespaces", [])
    if not isinstance(excluded, list) or not all(isinstance(item, str) for item in excluded):
        raise _bad_conf("exclude_namespaces", compact(excluded)[:60], "a list of strings")
    run_dir = str(members.get("cni_agent_run_dir") or istio.RUN_DIR)
    if run_dir[0] != "/" or "\0" in run_dir or len(run_dir.encode()) > _MAX_RUN_DIR_BYTES:
        wanted = f"an absolute path of at most {_MAX_RUN_DIR_BYTES} bytes"
        raise _bad_conf("cni_agent_run_dir", repr(run_dir)[:60], wanted)
    wait = members.get("agent_wait_seconds", DEFAULT_AGENT_WAIT_SECONDS)
    if not isinstance(wait, (int, float)) or not 0 <= wait <= MAX_AGENT_WAIT_SECONDS:
        raise _bad_conf("agent_wait_seconds", compact(wait)[:60], f"from 0 to {MAX_AGENT_WAIT_SECONDS:.0f}")
    return Conf(
        run_dir=run_dir,
        log_level=str(members.get("plugin_log_level", "")),
        pod_namespace=str(members.get("pod_namespace", "")),
        exclude_namespaces=excluded,
        agent_wait_seconds=float(wait),
        ambient_enabled=ambient if isinstance(ambient := members.get("ambient_enabled"), bool) else None,
        enablement_selectors=members.get("enablement_selectors"),
        system_namespace=str(members.get("system_namespace", "")),
    )


def _bad_conf(key: str, found: str, wanted: str) -> CniInputError:
    return CniInputError(
        CNI_INVALID_CONFIG, f"{key} of the conf is {found}, must be {wanted}", "see the istio-cni entry in the conf"
    )


def _check_container_id(text: str) -> None:
    if not _is_identifier(text):
        raise CniInputError(
            CNI_INVALID_ENVIRONMENT,
            f"CNI_CONTAINERID {text[:60]!r} is not valid",
            "letters, digits, '_', '.', '-', the first a letter or digit",
        )


def _check_ifname(text: str) -> None:
    size = len(text.encode("utf-8", "replace"))
    if size > _MAX_IFNAME_BYTES or text in (".", "..") or "/" in text or ":" in text or text.split() != [text]:
        raise CniInputError(
            CNI_INVALID_ENVIRONMENT,
            f"CNI_IFNAME {text[:60]!r} is not valid",
            f"1 to {_MAX_IFNAME_BYTES} bytes without '/', ':' and blanks, not '.' or '..'",
        )


def _is_identifier(text: str) -> bool:
    """`^[a-zA-Z0-9][a-zA-Z0-9_.\\-]*$`, for text that is not empty."""
    return text[0] in _ALPHANUMERIC and not text.strip(_IDENTIFIER)
