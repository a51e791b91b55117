"""Random bodies for `/cmdadd`: events with something wrong in them, other JSON, and bytes that are none."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

TEXTS = (
    "",
    "/run/netns/none",
    "/etc/passwd",
    "/proc/self/ns/net/",
    "../../x",
    "shop",
    "cart",
    "a/b",
    "a?b#c%2e",
    "..",
    "\0",
    "\n",
    "\ud800",
    "é" * 100,
    "x" * 5000,
    "10.0.0.1",
    "::ffff:10.0.0.1",
    "fe80::1%eth0",
    "////AA==",
    "=",
)
NUMBERS = (0, -1, 1.5, 2**63, 10**400, True, False, None)
KEYS = ("Netns", "PodName", "PodNamespace", "IPs", "netns", "PODNAME", "podnamespace", "ips", "PodUID", "IfName", "x")


def bodies(count: int, seed: int) -> Iterator[bytes]:
    """`count` bodies, the same ones for the same seed; print the seed to repeat a failure."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    for _ in range(count):
        yield _body(chance)


def _body(chance: random.Random) -> bytes:
    kind = chance.randrange(10)
    if kind == 0:
        return chance.randbytes(chance.randrange(200))
    if kind == 1:
        return json.dumps(_value(chance, 4)).encode()
    if kind == 2:
        opening = chance.choice((b"[", b'{"a":', b'{"IPs":[', b'{"IPs":[{"Address":'))
        return opening * chance.randrange(1, 3000)
    text = json.dumps(_event(chance)).encode(chance.choice(("utf-8",) * 8 + ("utf-16", "utf-32")))
    return _damaged(chance, text) if kind < 6 else text


def _event(chance: random.Random) -> dict[str, Any]:
    """An event most of whose fields are of the right type."""
    event: dict[str, Any] = {
        "Netns": chance.choice(TEXTS),
        "PodName": chance.choice(TEXTS),
        "PodNamespace": chance.choice(TEXTS),
        "IPs": chance.choice((None, [_address(chance) for _ in range(chance.randrange(4))])),
    }
    for _ in range(chance.randrange(3)):
        event[chance.choice(KEYS)] = _value(chance, 3)
    return event


def _address(chance: random.Random) -> dict[str, Any]:
    network = {"IP": chance.choice(TEXTS[-6:]), "Mask": chance.choice((None, "////AA==", "="))}
    return {"Interface": chance.choice(NUMBERS), "Address": chance.choice((network, network, None)), "Gateway": ""}


def _value(chance: random.Random, depth: int) -> Any:
    match chance.randrange(5 if depth else 3):
        case 0:
            return chance.choice(NUMBERS)
        case 3:
            return [_value(chance, depth - 1) for _ in range(chance.randrange(4))]
        case 4:
            return {chance.choice(KEYS): _value(chance, depth - 1) for _ in range(chance.randrange(4))}
    return chance.choice(TEXTS)


def _damaged(chance: random.Random, data: bytes) -> bytes:
    """Some bytes changed, cut off or doubled."""
    damaged = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        place = chance.randrange(len(damaged))
        match chance.randrange(3):
            case 0:
                damaged[place] = chance.randrange(256)
            case 1:
                del damaged[place : place + chance.randrange(1, 20)]
            case 2:
                damaged[place:place] = damaged[place : place + 10]
        if not damaged:
            break
    return bytes(damaged)
