"""nft's words for sets of addresses with comments: commands that change them, and what a listing says.

Nothing here touches anything; `probeset` hands the commands to libnftables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import pairwise

IpAddress = IPv4Address | IPv6Address

# A comment stands in quotes as it is, line breaks and braces included; nft has no way to write a quote inside one.
_TOKEN = re.compile(r'"[^"]*(?:"|\Z)|[{},=]|[^\s{},="]+')
_NAMED_AFTER = "@"


@dataclass(frozen=True, slots=True)
class Block:
    """One object of a listed table: its kind ("set", "chain", ...), name and the tokens between its braces."""

    kind: str
    name: str
    tokens: tuple[str, ...]

    @property
    def elements(self) -> Mapping[IpAddress, str]:
        """The elements of a set that are addresses, with their comments; empty for one without."""
        return dict(_elements(self.tokens))

    def mentions(self, set_name: str) -> bool:
        """Tell whether a rule or map in here looks into set `set_name`."""
        return _NAMED_AFTER + set_name in self.tokens


def put(table: str, name: str, comments: Mapping[IpAddress, str], there: Mapping[IpAddress, str]) -> str:
    """Return commands, for one transaction, after which each address is there with its comment; `there` is what is.

    A deletion is dear (see `replace`), so what is new is created only, and what is right left alone. A creation fails
    when the element has come meanwhile; adding it would succeed and leave the other comment.
    """
    new = {address: comment for address, comment in comments.items() if address not in there}
    changed = {address: comment for address, comment in comments.items() if there.get(address, comment) != comment}
    created = f"create element inet {table} {name} {{ {_elements_text(new)} }}\n" if new else ""
    return created + (replace(table, name, changed) if changed else "")


def replace(table: str, name: str, comments: Mapping[IpAddress, str]) -> str:
    """Return commands, for one transaction, after which each address is there with its comment, whatever was there.

    Adding an element that is there changes nothing, not even its comment, so each is added, deleted and added. The
    kernel makes whoever deleted wait for all processors when the socket closes: 12 to 15 ms, an addition takes 0.3.
    """
    new = _elements_text(comments)
    addition = f"add element inet {table} {name} {{ {new} }}\n"
    return addition + _deletion(table, name, comments) + addition


def delete(table: str, name: str, addresses: Iterable[IpAddress]) -> str:
    """Return commands, for one transaction, after which none of the addresses is there.

    Deleting what is not there is an error, so each is added first, which changes nothing where it is there.
    """
    keys = tuple(addresses)
    return f"add element inet {table} {name} {{ {_keys(keys)} }}\n{_deletion(table, name, keys)}"


def blocks(listing: str) -> tuple[Block, ...]:
    """Return the objects of every table in what `list table` or `list set` printed, in its order."""
    return tuple(_blocks(_TOKEN.findall(listing)))


def _deletion(table: str, name: str, addresses: Iterable[IpAddress]) -> str:
    return f"delete element inet {table} {name} {{ {_keys(addresses)} }}\n"


def _elements_text(comments: Mapping[IpAddress, str]) -> str:
    return ", ".join(f'{address} comment "{comment}"' for address, comment in comments.items())


def _keys(addresses: Iterable[IpAddress]) -> str:
    return ", ".join(map(str, addresses))


def _blocks(tokens: list[str]) -> Iterator[Block]:
    depth, start = 0, 0
    heading: tuple[str, str] = ("", "")
    for index, token in enumerate(tokens):
        if token == "{":
            depth += 1
            if depth == 2:  # inside the table's braces
                start = index + 1
                heading = (tokens[index - 2] if index > 1 else "", tokens[index - 1])
        elif token == "}":
            if depth == 2:
                yield Block(*heading, tuple(tokens[start:index]))
            depth = max(0, depth - 1)


def _elements(tokens: tuple[str, ...]) -> Iterator[tuple[IpAddress, str]]:
    opening = ("elements", "=", "{")
    start = next((at + 3 for at in range(len(tokens)) if tokens[at : at + 3] == opening), len(tokens))
    words: list[str] = []
    for token in tokens[start:]:
        if token in (",", "}"):
            yield from _element(words)
            words = []
            if token == "}":
                return
        else:
            words.append(token)


def _element(words: list[str]) -> Iterator[tuple[IpAddress, str]]:
    """Read one element: its key, then options such as a time-out or a counter, among them perhaps a comment."""
    try:
        address = ip_address(words[0]) if words else None
    except ValueError:
        return  # a prefix or a range, in a set that is not of our making
    if address is not None:
        quoted = [value for option, value in pairwise(words) if option == "comment"]
        yield address, quoted[-1].strip('"') if quoted else ""
