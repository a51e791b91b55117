"""Which pods are broken, what is to be done with them, and how long to wait after a failure.

A pod that was started without our plugin has no redirection. The injector gives every pod in CNI mode an init container
that notices it and ends with status 126, so such a pod never gets further. Upstream: cni/pkg/repair. Where we differ:
a termination counts whether it is the current one or the one before (upstream looks at the one before, so that a pod
with restartPolicy Never is never seen), and a pod on the host's network, or one that leaves, is no case for repair.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

from meshcni import istio
from meshcni.pods.model import InitStatus, Pod, Termination

NEVER: Final = "Never"  # core/v1 RestartPolicy
FAILED: Final = "Failed"  # core/v1 PodPhase
# Seconds after the first, second, ... failure in a row. Upstream tries five times within a tenth of a second.
BACK_OFF_SECONDS: Final = (2.0, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0)
JITTER: Final = 0.25  # the part of a pause by which it is made shorter, at random
MAX_MESSAGE: Final = 120  # of a termination message in a sentence

REPAIR_SETTING, DELETE_SETTING, LABEL_SETTING = "REPAIR_REPAIR_PODS", "REPAIR_DELETE_PODS", "REPAIR_LABEL_PODS"


@dataclass(frozen=True, slots=True)
class RepairRules:
    """What shows a broken pod; an empty text or an exit status 0 stands for any."""

    sidecar_annotation: str = istio.SIDECAR_STATUS
    container: str = istio.VALIDATION_CONTAINER
    message: str = ""
    exit_code: int = istio.VALIDATION_EXIT_CODE


@dataclass(frozen=True, slots=True)
class Broken:
    """Why a pod is broken: the init container that failed, and how; `final`: it will not be started again."""

    container: str
    exit_code: int
    message: str
    is_current: bool
    restarts: int
    final: bool

    def __str__(self) -> str:
        when = "ended" if self.is_current else "last ended"
        said = f" saying {_shortened(self.message)!r}" if self.message.strip() else ""
        restarts = f", restarted {self.restarts} times" if self.restarts else ""
        return f"init container {self.container} {when} with status {self.exit_code}{said}{restarts}"


def detect(pod: Pod, rules: RepairRules) -> Broken | None:
    """Tell whether and why `pod` is broken."""
    if rules.sidecar_annotation and rules.sidecar_annotation not in pod.annotations:
        return None
    if pod.host_network or pod.terminating:
        return None
    if pod.has_terminated and (pod.phase != FAILED or pod.restart_policy != NEVER):
        return None  # evicted, or past its deadline; its sandbox is gone
    found = (_broken(pod, status, rules) for status in pod.init_statuses)
    return next((one for one in found if one is not None), None)


def _broken(pod: Pod, status: InitStatus, rules: RepairRules) -> Broken | None:
    if rules.container not in ("", status.name):
        return None
    is_current = status.current is not None and _matches(status.current, rules)
    end = status.current if is_current else status.last
    if end is None or not _matches(end, rules):
        return None
    final = pod.restart_policy == NEVER and status.current is not None
    if pod.has_terminated and not (final and is_current):
        return None
    return Broken(status.name, end.exit_code, end.message, is_current, status.restarts, final)


def _matches(end: Termination, rules: RepairRules) -> bool:
    wanted = rules.message.strip()
    return (not wanted or end.message.strip() == wanted) and rules.exit_code in (0, end.exit_code)


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 3] + "..."


# --- what to do -------------------------------------------------------------------------------------------------------


class Mode(Enum):
    """What happens to broken pods; the values are the metric's label `type`."""

    REPAIR = "repair"
    DELETE = "delete"
    LABEL = "label"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class ModeChoice:
    """The one mode that is in force and why; `ignored` are the settings that are on and of no effect."""

    mode: Mode
    reason: str
    ignored: tuple[str, ...] = ()


def choose_mode(*, repair: bool, delete: bool, label: bool) -> ModeChoice:
    """Choose as upstream: the first one that is on, in this order; the chart makes its role in the same order."""
    settings = ((Mode.REPAIR, REPAIR_SETTING, repair), (Mode.DELETE, DELETE_SETTING, delete))
    on = [(mode, name) for mode, name, is_on in (*settings, (Mode.LABEL, LABEL_SETTING, label)) if is_on]
    if not on:
        names = f"{REPAIR_SETTING}, {DELETE_SETTING} and {LABEL_SETTING} are all off"
        return ModeChoice(Mode.NONE, f"{names}: broken pods are told in the log, and nothing is done about them")
    (mode, name), *rest = on
    if not rest:
        return ModeChoice(mode, f"{name} is on")
    ignored = tuple(other for _mode, other in rest)
    return ModeChoice(mode, f"{name} is on and wins over {' and '.join(ignored)}", ignored)


class Action(Enum):
    """What to do with one broken pod."""

    PROGRAM = "program"  # rules into its netns
    DELETE = "delete"
    LABEL = "label"
    SKIP = "skip"  # it has the label already
    GIVE_UP = "give-up"  # nothing that this mode can do would help it
    TELL = "tell"  # in the log only


@dataclass(frozen=True, slots=True)
class Treatment:
    """What to do with a broken pod, and why."""

    action: Action
    reason: str


def treat(pod: Pod, broken: Broken, mode: Mode, label_key: str) -> Treatment:
    """Decide about one broken pod."""
    if mode is Mode.NONE:
        return Treatment(Action.TELL, "no mode of repair is on")
    if mode is Mode.DELETE:
        return Treatment(Action.DELETE, "a pod made in its place gets redirection from the start")
    if mode is Mode.LABEL:
        if label_key in pod.labels:
            return Treatment(Action.SKIP, f"it has the label {label_key}={pod.labels[label_key]} already")
        return Treatment(Action.LABEL, "whoever looks for the label takes care of it")
    if broken.final:
        return Treatment(
            Action.GIVE_UP,
            f"restartPolicy is {NEVER}, so {broken.container} is not started again and rules would not bring the pod "
            "back. A Job makes another pod by itself while its backoffLimit allows; a pod of nobody's has to be made "
            f"anew; {DELETE_SETTING}=true deletes such pods",
        )
    return Treatment(Action.PROGRAM, f"with rules in place, {broken.container} succeeds when it is started again")


def back_off_seconds(failures: int, chance: float) -> float:
    """Seconds to wait after that many failures in a row (1 and up); `chance` from 0 to 1 takes up to JITTER off."""
    grown = BACK_OFF_SECONDS[min(max(failures, 1), len(BACK_OFF_SECONDS)) - 1]
    return grown * (1 - JITTER * chance)
