"""What the double does wrong on command."""

from __future__ import annotations

from dataclasses import dataclass

FOREVER = -1

KINDS = {
    "status": "answer with `status` and a Status object (with Retry-After when `retry_after_seconds` is set)",
    "delay": "wait `seconds`, then answer as usual",
    "hang": "take the request and never answer, with the connection open",
    "drop": "close the connection without an answer",
    "truncate": "send half of the body, then close the connection",
    "garbage": "answer 200 with something that is no JSON",
}


@dataclass
class Fault:
    """One kind of fault for the next `count` requests whose path starts with `prefix`.

    `method` and `watch` narrow it down: to GET, POST ..., to watches only (True) or to anything else (False).
    """

    kind: str
    prefix: str = "/"
    count: int = 1
    method: str = ""
    watch: bool | None = None
    status: int = 500
    reason: str = ""
    message: str = ""
    retry_after_seconds: int | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no such fault: {self.kind!r}; known are {', '.join(KINDS)}")

    def concerns(self, method: str, path: str, *, watch: bool) -> bool:
        """Whether this request is to suffer."""
        return (
            self.count != 0
            and path.startswith(self.prefix)
            and self.method in ("", method)
            and self.watch in (None, watch)
        )


# Reasons that a real API server gives with a status, where one fits.
REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}
