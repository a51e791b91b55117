"""What the double's caller may do: everything, but for verbs on resources that a test denies, as a role would."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from lab.apiserver.objects import Refusal
from lab.apiserver.wire import Request

REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
VERBS = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}
EVERY = "*"


class Denials(set[tuple[str, str]]):
    """Pairs of verb and resource (`("list", "pods")`, `("patch", "pods/status")`) that nobody may; `*` is each."""

    def deny(self, *rights: str) -> None:
        """Deny rights as people write them: `list pods`, `* namespaces`, `* *`."""
        self.update(_pair(right) for right in rights)

    def allow(self, *rights: str) -> None:
        """Take denials back; all of them when none is named."""
        self.difference_update(set(self) if not rights else {_pair(right) for right in rights})

    def denies(self, verb: str, target: str) -> bool:
        """Whether one of the denials is about that."""
        return any(pair in self for pair in ((verb, target), (EVERY, target), (verb, EVERY), (EVERY, EVERY)))

    def check(self, request: Request) -> None:
        """Raise Refusal 403, worded as a real API server does, for a request that is denied."""
        verb, target = right_of(request)
        if self.denies(verb, target):
            message = f'{target} is forbidden: User "the double" cannot {verb} resource "{target}"'
            raise Refusal(403, "Forbidden", message)


def review(request: Request, denials: Denials) -> dict[str, Any]:
    """Answer a SelfSubjectAccessReview."""
    asked = json.loads(request.body)
    attributes = asked["spec"]["resourceAttributes"]
    target = "/".join(_given((attributes["resource"], attributes.get("subresource", ""))))
    return {**asked, "status": {"allowed": not denials.denies(attributes["verb"], target)}}


def right_of(request: Request) -> tuple[str, str]:
    """Verb and resource of a request, in RBAC's words."""
    parts = _given(request.path.split("/"))
    rest = parts[2:] if parts[:1] == ["api"] else parts[3:]
    if len(rest) > 2 and rest[0] == "namespaces" and rest[2] != "status":
        rest = rest[2:]
    target = "/".join([*rest[:1], *rest[2:3]])
    if request.is_watch:
        return "watch", target
    return VERBS.get(request.method, "get" if len(rest) > 1 else "list"), target


def _given(parts: Iterable[str]) -> list[str]:
    return [part for part in parts if part]


def _pair(right: str) -> tuple[str, str]:
    verb, _, target = right.partition(" ")
    return verb, target
