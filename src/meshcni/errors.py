"""The exceptions of every layer: each says what went wrong, with which value, from where, and what to do next.

Imported by the plugin's fast path, so this module may import nothing.
"""

# CNI error codes. 1..99 belong to the CNI specification (https://www.cni.dev/docs/spec/#error), 100 and up are ours.
CNI_INCOMPATIBLE_VERSION = 1
CNI_UNSUPPORTED_FIELD = 2
CNI_UNKNOWN_CONTAINER = 3
CNI_INVALID_ENVIRONMENT = 4
CNI_IO_FAILURE = 5
CNI_DECODING_FAILURE = 6
CNI_INVALID_CONFIG = 7
CNI_INVALID_NETNS = 8
CNI_TRY_AGAIN_LATER = 11
CNI_PLUGIN_NOT_AVAILABLE = 50
CNI_INTERNAL = 999  # what the original answers for every cause


class MeshCniError(Exception):
    """Base of all our errors.

    `message` says what went wrong with which value and where it came from; `hint` says what to do next (may be empty).
    `exit_code` is the status of a command line program that ends because of it, `cni_code` the code of the CNI error
    that a plugin answers because of it.
    """

    exit_code = 1
    cni_code = CNI_INTERNAL

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(MeshCniError):
    """A command line that cannot be understood."""

    exit_code = 2
    cni_code = CNI_INVALID_ENVIRONMENT


class SettingError(MeshCniError):
    """A setting (flag or environment variable) with a value that cannot be used."""


class CniInputError(MeshCniError):
    """The runtime's environment or standard input breaks the CNI contract."""

    def __init__(self, cni_code: int, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.cni_code = cni_code


class PodSpecError(MeshCniError):
    """A pod's annotation or container field with a value that cannot be used; names it, the value and the form."""

    cni_code = CNI_INVALID_CONFIG


class ConfError(MeshCniError):
    """A CNI configuration file that cannot be used or edited."""

    cni_code = CNI_INVALID_CONFIG


class InstallError(MeshCniError):
    """Binary, kubeconfig or conf could not be put in place; `result` is the metric label of the failed part."""

    def __init__(self, result: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.result = result


class NetnsError(MeshCniError):
    """A network namespace that is not one, is the host's, is gone, or is not the pod's."""

    cni_code = CNI_INVALID_ENVIRONMENT


class KubeletNotFoundError(MeshCniError):
    """No process of the host is the kubelet, so the rule that exempts its probes cannot be written."""


class CgroupError(MeshCniError):
    """A process's cgroup file that is none, or that names two containers or two pods."""


class RulesError(MeshCniError):
    """Parameters that make no valid rule set, or text that is no rule listing."""

    cni_code = CNI_INVALID_CONFIG


class ApplyError(MeshCniError):
    """The kernel or a tool refused a rule set; nothing of it stays."""

    cni_code = CNI_TRY_AGAIN_LATER


class ProtocolError(MeshCniError):
    """A peer broke the protocol; `cause` is the metric label."""

    cni_code = CNI_IO_FAILURE

    def __init__(self, cause: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.cause = cause


class ZtunnelError(MeshCniError):
    """ztunnel was not told, or did not do, what it should; `cause` is the metric label.

    One of `no-connection`, `nack`, `timeout` (it did not answer in time), `closed` (the connection ended before the
    answer), `oversized` (the pod's names do not fit into a message).
    """

    cni_code = CNI_TRY_AGAIN_LATER

    def __init__(self, cause: str, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.cause = cause


class KubeError(MeshCniError):
    """The Kubernetes API did not give what was asked; `status` is the HTTP status, 0 when there was no answer."""

    cni_code = CNI_TRY_AGAIN_LATER

    def __init__(self, status: int, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.status = status


class AgentUnavailableError(MeshCniError):
    """The node agent did not answer in the time allowed."""

    cni_code = CNI_TRY_AGAIN_LATER
