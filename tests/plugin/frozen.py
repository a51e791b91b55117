"""Decides about pods with what the plugin freezes and with its stand-ins, in an ordinary interpreter.

    python -I frozen.py REPOSITORY < cases > decisions

A case is a line of JSON: pod, namespace or null, and policy, as the API and the conf have them; so is each decision.
"""

import json
import marshal
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

repository = Path(sys.argv[1])
sys.dont_write_bytecode = True
sys.path.insert(0, str(repository))
from native.plugin import freeze  # noqa: E402

ROWS = freeze.tables(repository / "src", repository / "native" / "plugin" / "stubs")["app_frozen"]
FROZEN = {name: (code, is_package) for name, code, is_package in ROWS}


class Finder:
    """Finds the frozen modules, before any other."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in FROZEN:
            return None
        return ModuleSpec(name, cls(), is_package=FROZEN[name][1])

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: object) -> None:
        exec(marshal.loads(FROZEN[module.__name__][0]), module.__dict__)


sys.meta_path.insert(0, Finder)
for name in freeze.STUBS:
    if name not in ("io", "encodings"):  # these two CPython itself needs
        sys.modules.pop(name, None)

from meshcni.errors import MeshCniError  # noqa: E402
from meshcni.pods.eligibility import Policy, decide  # noqa: E402
from meshcni.pods.model import namespace_from_object, pod_from_object  # noqa: E402
from meshcni.pods.podidentity import uids_of  # noqa: E402
from meshcni.pods.selectors import parse_enablement_selectors  # noqa: E402

assert sys.modules["dataclasses"].__doc__ is None, "the stand-ins are used"


def decision(pod: dict[str, object], namespace: dict[str, object] | None, policy: dict[str, object]) -> object:
    try:
        selectors = parse_enablement_selectors(policy["enablement_selectors"])
        settings = Policy(
            **{
                **policy,
                "exclude_namespaces": frozenset(policy["exclude_namespaces"]),
                "enablement_selectors": selectors,
            }
        )
        read = pod_from_object(pod)
        labels = None if namespace is None else namespace_from_object(namespace)
        found = decide(read, labels, settings)
    except MeshCniError as error:
        return [type(error).__name__, error.message, error.hint]
    return [found.verdict.value, found.reason.code, found.reason.text, found.evidence, *found.warnings, *uids_of(read)]


for line in sys.stdin:
    print(json.dumps(decision(*json.loads(line))))
