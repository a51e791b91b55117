"""Finding out which iptables variant to use: the order of reasons, and that looking changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.kernel.world import Netns, apply, legacy_names, nft_tables

from meshcni.agent.programming import CHOICE_FILE_NAME, BackendConfig, settle_choice
from meshcni.errors import ApplyError, SettingError
from meshcni.host.backends import xtables
from meshcni.host.backends.detection import VariantChoice, choose_variant, legacy_rules_here, why_unusable
from meshcni.host.procfs import boot_id
from meshcni.host.redirection import FamilyPolicy, apply_sidecar, observe_sidecar
from meshcni.pods.interception import Interception
from meshcni.rules.model import Backend, Family


def nothing_wrong(variant: str) -> str:
    return ""


def only(usable: str) -> dict[str, str]:
    return {variant: "" if variant == usable else f"{variant} is broken" for variant in ("nft", "legacy")}


@pytest.mark.parametrize(
    ("forced", "host_uses_legacy", "problems", "variant", "reason"),
    [
        ("legacy", None, only("nft"), "legacy", "forced by FORCE_IPTABLES_BINARY"),
        ("nft", True, only("legacy"), "nft", "forced by FORCE_IPTABLES_BINARY"),
        ("", None, {}, "nft", "the kernel and the nft commands work"),
        ("", False, {}, "nft", "the kernel and the nft commands work"),
        ("", True, {}, "legacy", "the host's own rules are in legacy tables"),
        ("", True, only("nft"), "nft", "the kernel and the nft commands work"),
        ("", None, only("legacy"), "legacy", "nft does not work here (nft is broken)"),
    ],
)
def test_order_of_reasons(
    forced: str, host_uses_legacy: bool | None, problems: dict[str, str], variant: str, reason: str
) -> None:
    choice = choose_variant(forced, host_uses_legacy, lambda name: problems.get(name, ""))
    assert choice == VariantChoice(variant, reason, boot_id())


def test_nothing_works() -> None:
    with pytest.raises(ApplyError, match=r"nft: nft is broken; legacy: legacy is broken"):
        choose_variant(unusable=lambda name: f"{name} is broken")


def test_remembered_variant_needs_its_commands(tmp_path: Path) -> None:
    config = BackendConfig(Backend.IPTABLES, "", FamilyPolicy.BY_ADDRESS, str(tmp_path), "/nowhere")
    written = VariantChoice("legacy", "remembered", boot_id())
    (tmp_path / CHOICE_FILE_NAME).write_text(json.dumps(written.to_object()))
    assert settle_choice(config) == written
    assert settle_choice(config, lambda variant: None).variant == "nft"  # another image without legacy commands
    assert settle_choice(config).variant == "nft"


def test_unknown_forced_variant() -> None:
    with pytest.raises(SettingError, match="'ebtables' from FORCE_IPTABLES_BINARY"):
        choose_variant("ebtables")


def test_choice_survives_within_a_boot_only() -> None:
    choice = choose_variant(unusable=nothing_wrong)
    assert choice.boot_id
    assert VariantChoice.from_object(choice.to_object(), boot_id()) == choice
    assert VariantChoice.from_object(choice.to_object(), "another boot") is None
    assert VariantChoice.from_object({**choice.to_object(), "variant": "ipfw"}, boot_id()) is None
    assert VariantChoice.from_object(["nft"], boot_id()) is None


def test_both_variants_work_on_this_machine() -> None:
    assert (why_unusable("nft"), why_unusable("legacy")) == ("", "")
    assert "no iptables-ipfw-restore" in why_unusable("ipfw")


def test_looking_changes_nothing(pod: Netns) -> None:
    def names() -> tuple[list[str], ...]:
        return legacy_names(pod), legacy_names(pod, "ip6_tables_names"), nft_tables(pod)

    before = names()
    assert before == ([], [], [])
    choices = set()
    for _repetition in range(3):
        choices.add(pod.call(choose_variant))
        assert not pod.call(legacy_rules_here)
        assert pod.call(observe_sidecar).variants == ()
        assert names() == before
    assert len(choices) == 1


def test_an_apply_makes_no_tables_of_the_other_variant(pod: Netns) -> None:
    for _repetition in range(3):
        assert apply(pod, Interception(), "nft").variant == "nft"
        assert (legacy_names(pod), legacy_names(pod, "ip6_tables_names")) == ([], [])


def test_looked_at_tables_are_no_rules(pod: Netns) -> None:
    """What made the original change its mind: tables that exist only because a legacy command looked at them."""
    pod.shell("iptables-legacy", "-t", "nat", "-L")
    assert legacy_names(pod) == ["nat"]
    assert not pod.call(legacy_rules_here)
    assert apply(pod, Interception(), "nft").variant == "nft"

    pod.shell("iptables-legacy", "-t", "nat", "-A", "OUTPUT", "-d", "192.0.2.1", "-j", "RETURN")
    assert pod.call(legacy_rules_here)


@pytest.mark.parametrize("there", ["nft", "legacy"])
def test_rules_that_are_there_decide(there: str, pod: Netns) -> None:
    other = {"nft": "legacy", "legacy": "nft"}[there]
    apply(pod, Interception(), there)

    again = apply(pod, Interception(), other)
    assert (again.variant, again.reason) == (there, "the pod has rules of ours there already")

    forced = pod.call(lambda: apply_sidecar(Interception(), Backend.IPTABLES, force_iptables=other))
    assert (forced.variant, forced.changed) == (other, True)
    assert pod.call(observe_sidecar).variants == (other,)


@pytest.mark.parametrize("family", Family)
def test_legacy_chains_are_read_from_the_kernel(family: Family, pod: Netns) -> None:
    long_name = "A" * 28
    text = f"*nat\n:ISTIO_ONE - [0:0]\n:{long_name} - [0:0]\n-A OUTPUT -p tcp -m tcp --dport 80 -j ISTIO_ONE\nCOMMIT\n"
    command = {Family.V4: "iptables", Family.V6: "ip6tables"}[family]
    pod.shell(f"{command}-legacy-restore", "--noflush", text=text)
    pod.shell(f"{command}-legacy", "-t", "filter", "-A", "INPUT", "-m", "comment", "--comment", "ISTIO_TWO")

    chains = pod.call(lambda: xtables.chains(family))

    assert chains.keys() == {"nat", "filter"}
    assert (set(chains["nat"]), chains["filter"]) == ({"ISTIO_ONE", long_name}, ())
    assert pod.call(lambda: xtables.has_rules(family))
