"""What steps of enrolment act upon, without a kernel: namespaces, ztunnels, the host's set, the API's annotations.

Every effect is checked while it happens: what must never be is an AssertionError, whoever causes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Address, IPv6Address

from meshcni.pods.enrollment import Actual, Addresses, Annotation, Desired, Intent, Life, NetnsId, Step

PARTLY = "partly removed"
TAMPERED = "changed by somebody else"


class Outcome(Enum):
    """How a step goes: as told, refused before anything happened, failed after all or a part of it had happened."""

    OK = "ok"
    REFUSED = "refused"
    LATE = "late"
    HALF = "half"


@dataclass
class Inside:
    """What a netns holds of ours.

    `rest`: what connections under way need after the rules that capture were taken out. `captured`: an agent has held
    the pod for enrolled in it.
    """

    rules: str = ""
    routes: bool = False
    rest: bool = False
    captured: bool = False


@dataclass
class Ztunnel:
    """A ztunnel process: its proxies, and what its connection, when it has one, has acknowledged."""

    proxies: dict[str, NetnsId] = field(default_factory=dict)
    connected: bool = False
    complete: bool = False
    acked: dict[str, NetnsId] = field(default_factory=dict)

    def disconnect(self) -> None:
        """End the connection; proxies go on."""
        self.connected = self.complete = False
        self.acked.clear()

    def take_snapshot(self, named: Iterable[tuple[str, NetnsId | None]], refused: frozenset[str] = frozenset()) -> None:
        """Take Adds and Keeps (None), then drop what was not named."""
        kept = set()
        for uid, netns in named:
            kept.add(uid)
            if netns is not None and uid not in refused:
                self.serve(uid, netns)
        self.proxies = {uid: netns for uid, netns in self.proxies.items() if uid in kept}
        self.complete = True

    def serve(self, uid: str, netns: NetnsId) -> None:
        """Open listeners."""
        others = [other for other, there in self.proxies.items() if there == netns and other != uid]
        assert not others, f"ztunnel got the netns of {others} for {uid} too"
        self.proxies[uid] = self.acked[uid] = netns


@dataclass
class ApiPod:
    """A pod in the API; `version` grows with each change."""

    annotation: Annotation = Annotation.ABSENT
    belongs: bool = True
    addresses: Addresses = frozenset()
    terminated: bool = False
    version: int = 1


class World:
    """All of it, for any number of pods."""

    def __init__(self) -> None:
        self.netns: dict[NetnsId, Inside] = {}
        self.ztunnels: list[Ztunnel] = []  # in the order of their connections
        self.held: dict[IPv4Address | IPv6Address, str] = {}  # the host's set
        self.api: dict[str, ApiPod] = {}
        self.steps: list[tuple[str, Step]] = []
        self.running: dict[str, NetnsId] = {}  # pods whose processes can be found
        self.unmarked: set[NetnsId] = set()  # where an agent could not annotate the pod, or not tell
        self._inode = 0

    def new_netns(self) -> NetnsId:
        """Make an empty one."""
        self._inode += 1
        made = NetnsId(4, self._inode)
        self.netns[made] = Inside()
        return made

    # --- the link, as the agent sees it -------------------------------------------------------------------------------

    @property
    def newest(self) -> Ztunnel | None:
        """The ztunnel that connected last."""
        return next((one for one in reversed(self.ztunnels) if one.connected), None)

    @property
    def settled(self) -> bool:
        """Whether it has its snapshot."""
        return self.newest is not None and self.newest.complete

    def acked(self, uid: str) -> NetnsId | None:
        """The netns in which it has acknowledged the pod."""
        return self.newest.acked.get(uid) if self.newest else None

    # --- steps --------------------------------------------------------------------------------------------------------

    def begin(self, step: Step, uid: str, desired: Desired, actual: Actual) -> None:
        """Check that `step` may be begun; `actual` is what the agent believes, the acknowledgement included."""
        inside = self.netns[desired.netns] if desired.netns else Inside()
        runs_in = self.netns[self.running[uid]] if uid in self.running else Inside()
        if step is Step.RULES and desired.life is Life.RUNNING and not actual.enrolled:
            assert actual.acked == desired.netns, "rules in a running pod that ztunnel does not serve"
        if step is Step.ADD and desired.life is Life.STARTING:
            assert inside.rules or actual.enrolled, "ztunnel is told of a sandbox without rules"
        if step is Step.ENABLE:
            assert actual.acked == desired.netns is not None, "annotated enabled without an acknowledgement"
            assert inside.rules in {desired.rules, TAMPERED} - {""}, "annotated enabled without rules"
        if step is Step.RELEASE:
            assert desired.intent is Intent.LEAVE, "a pod that belongs is let go of"
        if step is Step.REMOVE_RULES and desired.life is Life.RUNNING and desired.intent is Intent.ENROLL:
            assert not actual.enrolled, "an enrolled pod is opened"
            assert not inside.captured, "a pod that an earlier agent had enrolled is opened"
        if step is Step.DEL and desired.life is Life.RUNNING:
            assert not inside.rules, "rules lead to listeners that are closed"
            assert desired.netns or not runs_in.captured, "rules that nobody has looked for lead to closed listeners"
            unseen = desired.intent is Intent.LEAVE and actual.annotation is Annotation.ENABLED
            assert not (unseen and desired.in_api and desired.netns), "peers are not told that the listeners close"

        if step is Step.WITHDRAW and desired.life is Life.RUNNING and desired.intent is Intent.LEAVE:
            left = inside.rules or inside.routes or inside.rest
            assert not left, "what is left is not to be known of any more"

    def perform(self, step: Step, uid: str, desired: Desired, actual: Actual, outcome: Outcome) -> bool:
        """Do it, all or in part; False when it fails."""
        self.steps.append((uid, step))
        if step in (Step.PEND, Step.WITHDRAW) and outcome is not Outcome.OK and desired.netns:
            self.unmarked.add(desired.netns)
        if outcome is not Outcome.REFUSED:
            done = self._do(step, uid, desired, actual, outcome is Outcome.HALF)
            return done and outcome is Outcome.OK
        return False

    def _do(self, step: Step, uid: str, desired: Desired, actual: Actual, half: bool) -> bool:
        inside = self.netns[desired.netns] if desired.netns else Inside()
        match step:
            case Step.ROUTES:
                inside.routes = not half
            case Step.RULES:
                return self._put_rules(inside, desired, actual, half)
            case Step.RELEASE:
                inside.rest, inside.captured = inside.rest or inside.rules != "", False
                inside.rules = PARTLY if half and inside.rules else ""
            case Step.REMOVE_RULES:
                inside.rest = half and inside.rest
                inside.rules = PARTLY if half and inside.rules else ""
                inside.routes = half and inside.routes
                inside.captured = False
            case Step.ADD:
                assert desired.netns is not None
                if self.newest is None:
                    return False
                if not half:
                    self.newest.serve(uid, desired.netns)
            case Step.DEL:
                for ztunnel in [one for one in self.ztunnels if one.connected][: 1 if half else None]:
                    ztunnel.proxies.pop(uid, None)
                    ztunnel.acked.pop(uid, None)
            case Step.ADDRESSES:
                if not half:
                    self.take_addresses(uid)
                new = sorted(desired.addresses, key=str)[: 1 if half else None]
                self.held |= dict.fromkeys(new, uid)
            case Step.REMOVE_ADDRESSES:
                self.take_addresses(uid, 1 if half else None)
            case Step.ENABLE:
                self.annotate(uid, Annotation.ENABLED)
            case Step.PEND:
                self.annotate(uid, Annotation.PENDING)
            case Step.WITHDRAW:
                self.annotate(uid, Annotation.ABSENT)
        return True

    def _put_rules(self, inside: Inside, desired: Desired, actual: Actual, half: bool) -> bool:
        """As host.ambient.apply_pod: what fails leaves an enrolled pod as it was, and nothing in another."""
        if half and actual.enrolled:
            return False
        inside.rules, inside.routes = ("", False) if half else (desired.rules, True)
        inside.rest = False
        return True

    def take_addresses(self, uid: str, most: int | None = None) -> None:
        """Take a pod's addresses out of the set."""
        for address in [address for address, owner in self.held.items() if owner == uid][:most]:
            del self.held[address]

    def annotate(self, uid: str, annotation: Annotation) -> None:
        """Patch; a pod that is gone has no annotation."""
        pod = self.api.get(uid)
        if pod is not None and pod.annotation is not annotation:
            pod.annotation, pod.version = annotation, pod.version + 1

    def addresses_of(self, uid: str) -> Addresses:
        """What the set holds of a pod."""
        return frozenset(address for address, owner in self.held.items() if owner == uid)

    def served_by(self, uid: str) -> list[NetnsId]:
        """The namespaces in which connected ztunnels have listeners for the pod."""
        return [one.proxies[uid] for one in self.ztunnels if one.connected and uid in one.proxies]
