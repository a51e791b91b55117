"""What is done inside a pod's network namespace, as the agent sees it; `meshcni.host.ambient` is the real one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from meshcni.host.backends.detection import VariantChoice
from meshcni.host.redirection import Address, Applied
from meshcni.pods.ambient import AmbientParameters
from meshcni.rules.model import Backend, Family


class PodRules(Protocol):
    """Functions that block, work in the namespace of the calling thread, and raise MeshCniError."""

    def prepare_routes(self, families: frozenset[Family]) -> bool:
        """Make policy rules and routes; tells whether any was missing."""

    def apply_pod(
        self,
        parameters: AmbientParameters,
        families: frozenset[Family],
        backend: Backend,
        *,
        force_iptables: str = ...,
        choice: VariantChoice | None = ...,
        expected_addresses: Iterable[Address] = ...,
        keep_on_failure: bool = ...,
    ) -> Applied:
        """Make rules, policy rules and routes; what fails leaves nothing, with `keep_on_failure` what was there."""

    def verify_pod(
        self,
        parameters: AmbientParameters,
        families: frozenset[Family],
        backend: Backend,
        *,
        force_iptables: str = ...,
        choice: VariantChoice | None = ...,
    ) -> tuple[str, ...]:
        """Tell in words what is not as `apply_pod` makes it."""

    def release_pod(self) -> None:
        """Let new connections pass by ztunnel."""

    def remove_pod(self) -> None:
        """Take everything out."""
