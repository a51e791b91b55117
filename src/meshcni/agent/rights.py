"""What the agent's service account must be allowed at the API server, and which of it is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from meshcni import istio
from meshcni.agent.needs import Weight
from meshcni.errors import KubeError
from meshcni.kube.client import DAEMONSETS, EVENTS, NAMESPACES, NODES, PODS, Resource

REVIEW_SECONDS = 5.0  # for all questions, one after the other on one connection; nothing is installed before


@dataclass(frozen=True, slots=True)
class Right:
    """One verb on one kind of object; `name` is empty where it holds for all of them."""

    verb: str
    resource: Resource
    needed_for: str
    weight: Weight = Weight.STOPS
    subresource: str = ""
    name: str = ""

    @property
    def target(self) -> str:
        """The resource in RBAC's words: `pods/status`."""
        return "/".join(filter(None, (self.resource.plural, self.subresource)))

    def __str__(self) -> str:
        return f"{self.verb} {self.target}"


def wanted(*, ambient: bool) -> tuple[Right, ...]:
    """The rights of an agent in that mode; what asks for each of them is kube.client's caller of the same name."""
    pods = "knowing which pods of this node belong to the mesh"
    found = [Right(verb, PODS, pods) for verb in ("get", "list", "watch")]
    if ambient:
        labels = "knowing which namespaces are in ambient mode"
        found += [Right(verb, NAMESPACES, labels) for verb in ("get", "list", "watch")]
        found.append(Right("patch", PODS, "telling the mesh which pods are captured", subresource="status"))
    departure = "telling at the end whether the agent was taken off this node"
    return (
        *found,
        Right("create", EVENTS, "Events at pods that cannot join the mesh", Weight.DEGRADES),
        Right("get", NODES, departure, Weight.HELPS),
        Right("get", DAEMONSETS, departure, Weight.HELPS, name=istio.DAEMONSET_NAME),
    )


class Asks(Protocol):
    """What a review needs of KubeApi."""

    async def may(
        self, verb: str, resource: Resource, *, subresource: str, name: str, namespace: str, timeout: float
    ) -> bool:
        """Whether the API server would allow it. Raises ApiError."""


@dataclass(frozen=True, slots=True)
class Review:
    """What the API server says of a list of rights.

    `problem` says why nothing is allowed at all: no token, or one that is refused. `known` is false while there was no
    answer to go by.
    """

    refused: tuple[Right, ...] = ()
    problem: str = ""
    known: bool = True


UNKNOWN = Review(known=False)


async def review(api: Asks, rights: Sequence[Right], namespace: str, refused_lists: frozenset[str]) -> Review:
    """Ask for each right. `refused_lists`: resources (plural) whose lists the API server refuses right now.

    They tell where the question itself is refused, which every authenticated account may ask unless an administrator
    has taken that away. `namespace` is the agent's, for what is asked for there alone.
    """
    try:
        async with asyncio.timeout(REVIEW_SECONDS):
            allowed = [await _allowed(api, right, namespace) for right in rights]
    except TimeoutError:
        return UNKNOWN
    except KubeError as error:
        if error.status == 401:
            return Review(tuple(rights), str(error))
        if error.status != 403:
            return UNKNOWN
        return Review(
            tuple(right for right in rights if right.resource.plural in refused_lists and not right.subresource)
        )
    return Review(tuple(right for right, yes in zip(rights, allowed, strict=True) if not yes))


async def _allowed(api: Asks, right: Right, namespace: str) -> bool:
    return await api.may(
        right.verb,
        right.resource,
        subresource=right.subresource,
        name=right.name,
        namespace=namespace if right.name else "",
        timeout=REVIEW_SECONDS,
    )
