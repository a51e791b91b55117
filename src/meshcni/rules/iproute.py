"""Policy rules, routes and addresses of a rule set as the commands a person would type.

For reading: the agent makes them through netlink, and only where they are missing, because a repeated `ip rule add`
adds the rule once more.
"""

from __future__ import annotations

from meshcni.rules.iptables_rule import ALL_BITS
from meshcni.rules.model import LocalRoute, LoopbackAddress, PolicyRule, Ruleset


def render(ruleset: Ruleset) -> str:
    """Return one command a line; empty when the packet rules need none."""
    commands = [
        *map(_address, ruleset.addresses),
        *map(_policy_rule, ruleset.policy_rules),
        *map(_route, ruleset.routes),
    ]
    return "".join(f"{command}\n" for command in commands)


def _address(item: LoopbackAddress) -> str:
    return f"ip -{item.address.version} addr add {item.address}/{item.prefix_length} dev lo"


def _policy_rule(rule: PolicyRule) -> str:
    priority = "" if rule.priority is None else f" pref {rule.priority}"
    return f"ip -{rule.family.value} rule add fwmark {mark_words(rule)}{priority} lookup {rule.table}"


def mark_words(rule: PolicyRule) -> str:
    """Return the mark as `ip rule` takes it: `1337`, with a mask `0x111/0xfff`."""
    return str(rule.mark) if rule.mask == ALL_BITS else f"{rule.mark:#x}/{rule.mask:#x}"


def _route(route: LocalRoute) -> str:
    return f"ip -{route.destination.version} route add local {route.destination} dev lo table {route.table}"
