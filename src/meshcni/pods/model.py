"""What this project keeps of a Kubernetes pod: a small frozen projection, parsed once from the API's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

NO_PAIRS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Container:
    """One container, init or regular, with the fields that decide interception.

    `env` holds literal values only; names whose value comes from elsewhere (`valueFrom`) are in `env_from_elsewhere`.
    """

    name: str
    is_init: bool = False
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default=NO_PAIRS)
    env_from_elsewhere: frozenset[str] = frozenset()
    run_as_user: int | None = None
    run_as_group: int | None = None


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod's identity, metadata and the parts of its spec and status that decisions need."""

    namespace: str
    name: str
    uid: str = ""
    node_name: str = ""
    labels: Mapping[str, str] = field(default=NO_PAIRS)
    annotations: Mapping[str, str] = field(default=NO_PAIRS)
    host_network: bool = False
    containers: tuple[Container, ...] = ()  # init containers first, in the order of the spec
    run_as_user: int | None = None  # of the pod's own securityContext
    run_as_group: int | None = None
    ips: tuple[str, ...] = ()
    phase: str = ""
    terminating: bool = False
    resource_version: str = ""

    @property
    def full_name(self) -> str:
        """`namespace/name`, as people write it."""
        return f"{self.namespace}/{self.name}"
