"""The kubeconfig in the run dir: for our plugin while the agent is down, for the original's, and for tools."""

from __future__ import annotations

import re
from base64 import b64encode

from meshcni import istio
from meshcni.cni.conftext import go_string
from meshcni.errors import InstallError

RESULT = "CREATE_KUBECONFIG_FAILURE"  # cni/pkg/monitoring: label of istio_cni_installs_total
# A string that YAML reads back as itself without quotes: begins with a letter, has none of YAML's signs, is no keyword.
PLAIN = re.compile(r"(?!(?:y|n|yes|no|on|off|true|false|null)$)[A-Za-z][\w.:/+=@%\[\]-]*", re.ASCII | re.IGNORECASE)


def server_url(protocol: str, host: str, port: str) -> str:
    """`https://10.96.0.1:443`, an IPv6 host in brackets.

    Raises InstallError with the original's words when host or port is missing.
    """
    for value, variable in ((host, "KUBERNETES_SERVICE_HOST"), (port, "KUBERNETES_SERVICE_PORT")):
        if not value:
            raise InstallError(
                RESULT,
                f"write kubeconfig: {variable} not set. Is this not running within a pod?",
                f"set {variable}; kubelet does it in every pod",
            )
    bracketed = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"{protocol or 'https'}://{bracketed}:{port}"


def kubeconfig(server: str, token: str, ca: bytes | None) -> str:
    """The file's text, keys sorted as the original's YAML writer sorts them.

    `token` goes in verbatim; `ca` is PEM, None to skip the verification of the server's certificate.
    """
    trust = "insecure-skip-tls-verify: true"
    if ca is not None:
        trust = f"certificate-authority-data: {b64encode(ca).decode()}"
    return f"""apiVersion: v1
clusters:
- cluster:
    {trust}
    server: {scalar(server)}
  name: local
contexts:
- context:
    cluster: local
    user: {istio.PLUGIN_NAME}
  name: istio-cni-context
current-context: istio-cni-context
kind: Config
users:
- name: {istio.PLUGIN_NAME}
  user:
    token: {scalar(token)}
"""


def scalar(value: str) -> str:
    """A string of the deepest level as YAML: plain where that is safe, a block when it ends a line, else quoted."""
    if PLAIN.fullmatch(value) and not value.endswith(":"):
        return value
    if value.endswith("\n") and PLAIN.fullmatch(value[:-1]):
        return "|\n      " + value[:-1]  # a token file is taken over verbatim, its last line end too
    return go_string(value)
