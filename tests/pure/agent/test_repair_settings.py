"""Settings of repair that cannot mean anything end the start, and say which part is wrong."""

from __future__ import annotations

import pytest

from meshcni.agent.resolution import resolve
from meshcni.errors import SettingError


@pytest.mark.parametrize(
    ("variable", "text", "named"),
    [
        ("REPAIR_LABEL_SELECTORS", "app=web,tier in (a", "'tier in (a'"),
        ("REPAIR_LABEL_SELECTORS", "app=-", "app"),
        ("REPAIR_FIELD_SELECTORS", "spec.nodename=n1", "spec.nodeName"),
        ("REPAIR_INIT_CONTAINER_EXIT_CODE", "many", "many"),
        ("REPAIR_DELETE_PODS", "perhaps", "perhaps"),
        ("HOST_NETNS_DIR", "run/netns", "absolute"),
    ],
)
def test_what_is_wrong_is_named(variable: str, text: str, named: str) -> None:
    with pytest.raises(SettingError) as caught:
        resolve([], {variable: text})
    assert variable in str(caught.value)
    assert named in str(caught.value)


def test_selectors_are_kept_as_they_were_written() -> None:
    settings = resolve(["--repair-field-selectors=metadata.namespace!=x"], {"REPAIR_LABEL_SELECTORS": "a in (b, c)"})
    assert settings.repair_label_selectors == "a in (b, c)"
    assert settings.repair_field_selectors == "metadata.namespace!=x"


def test_a_flag_can_be_empty_where_a_variable_cannot() -> None:
    assert resolve(["--repair-init-container-name="], {}).repair_init_container_name == ""
    assert resolve([], {"REPAIR_INIT_CONTAINER_NAME": ""}).repair_init_container_name == "istio-validation"
