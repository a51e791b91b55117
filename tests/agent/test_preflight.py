"""What the kernel lacks is named before the first pod meets it, and looking for it leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lab.namespaces import call_in_netns
from tests.agent.scene import new_netns

from meshcni.agent.ownpod import KERNEL
from meshcni.agent.preflight import NO_IPV6, Preflight
from meshcni.host import kernelsupport
from meshcni.host.kernelsupport import EVERY_POD, FEATURES, Feature, Lack, has_ipv6, lacks
from meshcni.rules.model import Backend, Family

WAYS = [(Backend.IPTABLES, "nft"), (Backend.IPTABLES, "legacy"), (Backend.NFTABLES, "nftables")]
NONSENSE = Feature(
    "xt_nonsense",
    ("nat", "OUTPUT -m nonsense -j RETURN"),
    "nft_nonsense",
    ("type nat hook output priority -100;", "nonsense"),
    "nobody misses it",
)


def state_of_this_netns() -> tuple[str, ...]:
    """Every table and rule, of both worlds, without making one appear."""
    nft = subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
    names = ("ip_tables_names", "ip6_tables_names")
    found = [Path("/proc/thread-self/net", name) for name in names]
    return (nft, *(path.read_text() if path.exists() else "" for path in found))


@pytest.mark.parametrize(("backend", "variant"), WAYS)
def test_this_kernel_has_everything_and_keeps_nothing(backend: Backend, variant: str) -> None:
    with new_netns() as netns:
        before = call_in_netns(netns, state_of_this_netns)
        gc.collect()  # what earlier tests left to it may not close in between
        descriptors = len(os.listdir("/proc/self/fd"))
        assert call_in_netns(netns, lambda: lacks(backend, variant, ipv6=True)) == ()
        assert call_in_netns(netns, state_of_this_netns) == before
        assert len(os.listdir("/proc/self/fd")) <= descriptors


@pytest.mark.parametrize(("backend", "variant"), WAYS)
def test_what_the_kernel_does_not_know_is_named_alone(backend: Backend, variant: str) -> None:
    found = lacks(backend, variant, ipv6=True, features=(*FEATURES, NONSENSE))
    name = "xt_nonsense" if backend is Backend.IPTABLES else "nft_nonsense"
    assert [(lack.modules, lack.family) for lack in found] == [(name, Family.V4), (name, Family.V6)]
    assert all(lack.reason for lack in found)


def without(*modules: str, family: Family | None = None) -> kernelsupport.Attempt:
    """A kernel that lacks these."""

    def attempt(given: Family, features: tuple[Feature, ...]) -> str:
        names = {feature.module for feature in features} | {feature.nft_module for feature in features}
        missing = sorted(names & set(modules)) if family in (None, given) else []
        return f"no {missing[0]}" if missing else ""

    return attempt


@pytest.mark.parametrize("feature", FEATURES, ids=lambda feature: feature.module)
def test_each_module_in_turn(feature: Feature) -> None:
    (lack,) = lacks(Backend.IPTABLES, "nft", ipv6=False, attempt=without(feature.module))
    text = str(lack)
    assert text.startswith(f"the kernel lacks {feature.module} for IPv4: {feature.without} (no {feature.module}); ")
    assert "NATIVE_NFTABLES=true" in text
    assert "modprobe" in text


def test_a_family_without_any_table() -> None:
    (lack,) = lacks(
        Backend.IPTABLES, "legacy", ipv6=True, attempt=lambda family, _: "no table" if family is Family.V6 else ""
    )
    assert str(lack).startswith(
        "the kernel lacks ip6_tables, ip6table_{nat,mangle,raw} for IPv6: with an IPv6 address,"
    )
    assert "AMBIENT_IPV6=false" in str(lack)


# How the commands say it: iptables 1.8.9, legacy with the module away, nft as nft_chain and nft_cmd word it.
NO_TABLE = {
    "legacy": "ip6tables-restore v1.8.9 (legacy): ip6tables-restore: unable to initialize table '{}'",
    "nft": "line 1: TABLE_ADD failed (Operation not supported): table {}",
}


def without_tables(variant: str, *tables: str, family: Family = Family.V6) -> kernelsupport.Attempt:
    """A kernel that has the modules, and not these tables of a family."""

    def attempt(given: Family, features: tuple[Feature, ...]) -> str:
        missing = [feature.iptables[0] for feature in features if feature.iptables[0] in tables]
        return NO_TABLE[variant].format(missing[0]) if missing and given is family else ""

    return attempt


@pytest.mark.parametrize(
    ("variant", "base", "instead"),
    [
        ("legacy", "ip6_tables, ip6table_{nat,mangle,raw}", "NATIVE_NFTABLES=true"),
        ("nft", "nf_tables (family ip6)", "FORCE_IPTABLES_BINARY=legacy"),
    ],
)
def test_a_family_whose_tables_are_missing_is_one_lack(variant: str, base: str, instead: str) -> None:
    attempt = without_tables(variant, "nat", "mangle", "raw")
    (lack,) = lacks(Backend.IPTABLES, variant, ipv6=True, attempt=attempt)
    assert (lack.modules, lack.family, lack.instead) == (base, Family.V6, instead)
    assert "pods without IPv6 addresses lose nothing" in str(lack)
    assert "start the agent again" in str(lack)


@pytest.mark.parametrize(("variant", "name"), [("legacy", "ip6table_nat"), ("nft", "nf_tables (table nat)")])
def test_a_table_that_is_missing_is_named_and_not_the_rules_in_it(variant: str, name: str) -> None:
    (lack,) = lacks(Backend.IPTABLES, variant, ipv6=True, attempt=without_tables(variant, "nat"))
    assert (lack.modules, lack.without) == (name, f"with an IPv6 address, {EVERY_POD}")


@pytest.mark.parametrize("variant", NO_TABLE)
def test_what_is_missing_for_ipv6_alone(variant: str) -> None:
    def found(attempt: kernelsupport.Attempt, backend: Backend = Backend.IPTABLES) -> list[str]:
        return [lack.modules for lack in kernelsupport.lacks_for_ipv6_alone(backend, variant, attempt=attempt)]

    away = without_tables(variant, "nat", "mangle", "raw")
    assert len(found(away)) == 1
    assert found(away, Backend.NFTABLES) == []
    assert found(without("xt_CT", family=Family.V6)) == ["xt_CT"]
    assert found(without("xt_CT")) == [], "IPv4 pods fail as well: it is no matter of the family"
    assert found(without("xt_TPROXY", "xt_conntrack", family=Family.V6)) == [], "ambient pods need none"


def test_the_reason_is_below_the_name_of_the_program() -> None:
    """A rule that the kernel refuses: the nft variant's command says so in its second line."""
    refused = Feature("xt_owner", ("mangle", "PREROUTING -m owner --uid-owner 1 -j RETURN"), "", ("", ""), EVERY_POD)
    (lack, _) = lacks(Backend.IPTABLES, "nft", ipv6=True, features=(refused,))
    assert "RULE_APPEND failed" in lack.reason


def test_a_kernel_without_nftables() -> None:
    (lack,) = lacks(Backend.NFTABLES, "nftables", ipv6=False, attempt=lambda family, _: "no nf_tables")
    assert (lack.modules, lack.without) == ("nf_tables (family inet)", EVERY_POD)
    assert "NATIVE_NFTABLES=false" in str(lack)


def test_ipv6_that_is_not_looked_at(tmp_path: Path) -> None:
    seen: list[Family] = []

    def attempt(family: Family, features: tuple[Feature, ...]) -> str:
        seen.append(family)
        return ""

    assert lacks(Backend.NFTABLES, "nftables", ipv6=False, attempt=attempt) == ()
    assert seen == [Family.V4]
    assert not has_ipv6(str(tmp_path / "ipv6"))
    assert has_ipv6(str(tmp_path))


class Programmer:
    """Chooses at once, or finds nothing that works."""

    def __init__(self, variant: str) -> None:
        self.config = SimpleNamespace(backend=Backend.IPTABLES)
        self.choice = SimpleNamespace(variant=variant) if variant else None

    async def prepare(self) -> None:
        pass


LACK = Lack("xt_TPROXY", Family.V4, "pods cannot start", "no TPROXY")


@pytest.mark.parametrize(
    ("look", "has", "wants_ipv6", "notes", "told"),
    [
        (lambda *_: (), True, True, 0, 0),
        (lambda *_: (LACK,), True, True, 1, 1),
        (lambda *_: (), False, True, 1, 0),
        (lambda *_: (), False, False, 0, 0),
        (lambda *_: (LACK,), False, True, 2, 1),
    ],
)
def test_what_is_said(
    look: Callable[..., tuple[Lack, ...]],
    has: bool,
    wants_ipv6: bool,
    notes: int,
    told: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    events: list[tuple[str, str]] = []
    programmer: Any = Programmer("nft")
    found = Preflight(
        programmer,
        lambda reason, message: events.append((reason, message)),
        ambient_ipv6=wants_ipv6,
        look=look,
        has_ipv6=lambda: has,
    )
    asyncio.run(found.run())
    assert len(found.notes) == notes
    assert (NO_IPV6 in found.notes) == (not has and wants_ipv6)
    assert [reason for reason, _ in events] == [KERNEL] * told
    assert all(note in caplog.text for note in found.notes)


def test_nothing_is_tried_where_nothing_was_chosen() -> None:
    programmer: Any = Programmer("")
    found = Preflight(programmer, lambda *_: None, ambient_ipv6=True, look=lambda *_: (LACK,))
    asyncio.run(found.run())
    assert found.notes == ()
