"""Where the API server is and how to prove who we are: the pod's service account, or a kubeconfig file.

Nothing here logs or shows a token. Files are looked at again when they change: the kubelet rotates a service account's
token and CA by swapping a symlink, so the inode behind the same path changes.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from meshcni import istio
from meshcni.kube import failures
from meshcni.kube.failures import ApiError

if TYPE_CHECKING:  # lightkube is heavy: kubeconfig.py says how much
    from lightkube.config.kubeconfig import SingleConfig

TOKEN_NAME = "token"
CA_NAME = "ca.crt"
MAX_TOKEN_BYTES = 64 * 1024

Stamp = tuple[int, int, int]


def file_stamp(path: str) -> Stamp | None:
    """Changes whenever the content of `path` may have changed (mtime ns, inode, size); None when it is not there."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size


class TokenFile:
    """The bearer token in a file, read again when the file changes or the API server refuses it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._token = ""
        self._stamp: Stamp | None = None

    def __repr__(self) -> str:
        return f"TokenFile({self.path!r})"

    def current(self) -> str:
        """The token. Raises ApiError while there has never been a readable one; a file gone later keeps the last."""
        stamp = file_stamp(self.path)
        if stamp is not None and stamp != self._stamp:
            self._read(stamp)
        if not self._token:
            raise ApiError(
                0,
                f"no API token in {self.path}",
                "is the service account's token mounted (automountServiceAccountToken)?",
                cause=failures.CREDENTIALS,
            )
        return self._token

    def forget(self) -> None:
        """Read the file at the next use even if it looks unchanged: the server refused what we have."""
        self._stamp = None

    def _read(self, stamp: Stamp) -> None:
        try:
            text = Path(self.path).read_text(encoding="ascii")[:MAX_TOKEN_BYTES].strip()
        except (OSError, UnicodeDecodeError):
            return  # half-way through a rotation: the old token stays, the stamp too, so the next call looks again
        if text:
            self._token, self._stamp = text, stamp


def subject(token: str) -> str:
    """Whom a service account's token stands for, `system:serviceaccount:a:b`; empty for a token that does not say.

    Only for messages: nothing is verified here.
    """
    payload = token.split(".")[1] if token.count(".") == 2 else ""
    try:
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except ValueError:
        return ""
    found = claims.get("sub") if isinstance(claims, dict) else None
    return found if isinstance(found, str) else ""


@dataclass(frozen=True)
class InCluster:
    """Access of a pod: address from the environment the kubelet sets, token and CA from the service account's mount.

    HTTPS_PROXY and NO_PROXY of the environment count (proxies.py).
    """

    environment: Mapping[str, str] = field(repr=False)
    service_account_dir: str = istio.SERVICE_ACCOUNT_DIR

    @property
    def server(self) -> str:
        """`https://10.96.0.1:443`; raises ApiError outside of a pod."""
        values = {
            name: self.environment.get(name, "") for name in ("KUBERNETES_SERVICE_HOST", "KUBERNETES_SERVICE_PORT")
        }
        for name, value in values.items():
            if not value:
                raise ApiError(
                    0,
                    f"{name} is not set: this does not run within a pod",
                    "run it in its DaemonSet, or name a kubeconfig file",
                    cause=failures.CREDENTIALS,
                )
        host, port = values.values()
        protocol = self.environment.get("KUBERNETES_SERVICE_PROTOCOL") or "https"
        return f"{protocol}://{f'[{host}]' if ':' in host else host}:{port}"

    @property
    def ca_file(self) -> str:
        """The CA bundle that signs the API server's certificate."""
        return os.path.join(self.service_account_dir, CA_NAME)

    def token_file(self) -> TokenFile | None:
        """The service account's token."""
        return TokenFile(os.path.join(self.service_account_dir, TOKEN_NAME))


@dataclass(frozen=True)
class KubeconfigFile:
    """Access by a kubeconfig: for people's tools and for tests; `context` empty means its current-context."""

    path: str
    context: str = ""

    def token_file(self) -> TokenFile | None:
        """The user's `tokenFile`, watched as a service account's is; other credentials are left to lightkube."""
        config = self.load()
        if config.user is None or config.user.token_file is None:
            return None
        return TokenFile(os.path.join(os.path.dirname(self.path), config.user.token_file))

    def load(self) -> SingleConfig:
        """The chosen context. Raises ApiError when the file cannot be used."""
        import yaml
        from lightkube.config.kubeconfig import KubeConfig
        from lightkube.config.models import User
        from lightkube.core.exceptions import ConfigError

        try:
            config = KubeConfig.from_file(self.path).get(self.context or None)
        except (ConfigError, OSError, yaml.YAMLError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ApiError(
                0,
                f"kubeconfig {self.path}: {type(error).__name__}: {error}",
                "name an existing file with clusters, users, contexts and a current-context",
                cause=failures.CREDENTIALS,
            ) from error
        assert config is not None
        return config if config.user is not None else config._replace(user=User())


Access = InCluster | KubeconfigFile
