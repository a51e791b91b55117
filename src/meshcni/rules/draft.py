"""A rule set in the making: steps append to and insert into chains, in the order in which the original emits them."""

from __future__ import annotations

from collections.abc import Sequence

from meshcni.rules.model import (
    BUILT_IN_CHAINS,
    Action,
    Backend,
    Chain,
    Family,
    Jump,
    LocalRoute,
    LoopbackAddress,
    Match,
    PolicyRule,
    Purpose,
    Rule,
    Ruleset,
    Table,
    TableName,
)


class Draft:
    """Chains being filled for `families`, to be rendered for `backend`.

    One list per chain holds the rules of both families. A rule of a family that is not wanted is not added.
    """

    def __init__(self, families: frozenset[Family], backend: Backend, purpose: Purpose = Purpose.SIDECAR) -> None:
        self.backend = backend
        self.purpose = purpose
        self.families = tuple(family for family in Family if family in families)
        self._chains: dict[tuple[TableName, str], list[Rule]] = {}
        self._inserted: dict[tuple[TableName, str], int] = {}
        self._policy_rules: list[PolicyRule] = []
        self._routes: list[LocalRoute] = []
        self._addresses: list[LoopbackAddress] = []

    def append(
        self,
        table: TableName,
        chain: str,
        matches: Sequence[Match],
        action: Action,
        why: str,
        family: Family | None = None,
        *,
        is_counted: bool = True,
    ) -> None:
        """Add a rule at the end of a chain."""
        if family is None or family in self.families:
            rule = Rule(tuple(matches), action, why, family, is_counted)
            self._chains.setdefault((table, chain), []).append(rule)

    def insert(
        self,
        table: TableName,
        chain: str,
        index: int,
        matches: Sequence[Match],
        action: Action,
        why: str,
        family: Family | None = None,
    ) -> None:
        """Add a rule before the one at `index` (0 = first) of a chain, at its end when there are not so many."""
        if family is None or family in self.families:
            key = (table, chain)
            self._chains.setdefault(key, []).insert(index, Rule(tuple(matches), action, why, family))
            self._inserted[key] = self._inserted.get(key, 0) + 1

    def add_policy_rule(self, rule: PolicyRule) -> None:
        """Add a policy rule."""
        self._policy_rules.append(rule)

    def add_route(self, route: LocalRoute) -> None:
        """Add a route."""
        self._routes.append(route)

    def add_address(self, address: LoopbackAddress) -> None:
        """Add an address on the loopback interface."""
        self._addresses.append(address)

    def finish(self) -> Ruleset:
        """Return the finished rule set: chains in order of their first rule, then those that are only jumped to."""
        return Ruleset(
            families=frozenset(self.families),
            tables=tuple(table for name in TableName if (table := self._table(name)).chains),
            policy_rules=tuple(self._policy_rules),
            routes=tuple(self._routes),
            addresses=tuple(self._addresses),
            purpose=self.purpose,
        )

    def _table(self, name: TableName) -> Table:
        filled = {chain: rules for (table, chain), rules in self._chains.items() if table is name}
        targets = [rule.action.chain for rules in filled.values() for rule in rules if isinstance(rule.action, Jump)]
        names = dict.fromkeys([*filled, *targets])
        return Table(name, tuple(self._chain(name, chain, filled.get(chain, [])) for chain in names))

    def _chain(self, table: TableName, name: str, rules: list[Rule]) -> Chain:
        # Where a rule stands among other people's matters in built-in chains only; our own chains hold nothing else.
        inserted = self._inserted.get((table, name), 0) if name in BUILT_IN_CHAINS else 0
        return Chain(name, tuple(rules), inserted)
