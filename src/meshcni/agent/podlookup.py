"""Where the agent finds the pod of an ADD: in the informer, else with one question to the API server.

An answer is only taken for the pod that the runtime means: a pod of the same name but another UID is a predecessor or a
successor (StatefulSets make them), whose spec may be another. Upstream looks at the name alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from meshcni.errors import KubeError
from meshcni.kube.client import NAMESPACES, Object
from meshcni.pods.model import Namespace, Pod, namespace_from_object
from meshcni.pods.podidentity import is_meant

T = TypeVar("T", covariant=True)


class Store(Protocol[T]):
    """What is needed of an informer."""

    def get(self, namespace: str, name: str) -> T | None:
        """One projection."""


class Api(Protocol):
    """What is needed of the API client."""

    async def get_pod(self, namespace: str, name: str, *, timeout: float) -> Pod:
        """One pod."""

    async def get_object(
        self, group: str, version: str, resource: str, namespace: str | None, name: str, *, timeout: float
    ) -> Object:
        """One object."""


@dataclass(frozen=True, slots=True)
class Found:
    """The pod, and who knew it: `informer` or `api`."""

    pod: Pod
    source: str


class PodLookup:
    """Finds pods and namespaces; `namespaces` is None when nobody watches them."""

    def __init__(self, api: Api, pods: Store[Pod], namespaces: Store[Namespace] | None, timeout_seconds: float) -> None:
        self._api = api
        self._pods = pods
        self._namespaces = namespaces
        self._timeout = timeout_seconds

    async def pod(self, namespace: str, name: str, uid: str) -> Found:
        """The pod with that name and, when `uid` is not empty, that UID. Raises KubeError.

        Without a UID only the API server is believed: what the informer has may be a predecessor that just went.
        """
        known = self._pods.get(namespace, name)
        if known is not None and uid and is_meant(known, uid):
            return Found(known, "informer")
        try:
            asked = await self._api.get_pod(namespace, name, timeout=self._timeout)
        except KubeError as error:
            raise KubeError(
                error.status,
                f"cannot tell whether pod {namespace}/{name} belongs to the mesh: {error.message}",
                error.hint,
            ) from error
        if not is_meant(asked, uid):
            raise KubeError(
                404,
                f"pod {namespace}/{name} with UID {uid} is gone: the API server knows one with UID {asked.uid}",
                "the sandbox of a deleted pod needs nothing; the kubelet gives it up by itself",
            )
        return Found(asked, "api")

    async def namespace(self, name: str) -> Namespace:
        """The namespace with its labels. Raises KubeError."""
        known = self._namespaces.get("", name) if self._namespaces is not None else None
        if known is not None:
            return known
        try:
            return namespace_from_object(await self._api.get_object(*NAMESPACES, None, name, timeout=self._timeout))
        except KubeError as error:
            raise KubeError(
                error.status, f"cannot read the labels of namespace {name}: {error.message}", error.hint
            ) from error
