from __future__ import annotations

import copy
import tomllib
from typing import Any

import pytest
from image.model import ImageError

from image import definition

CODE = '"""x"""\n__version__ = "3.4.5"\n'
TEXT = """
packages = {}
wheels = {}
[image]
name = "n"
title = "t"
description = "d"
licenses = "Apache-2.0"
distribution = "debian-13"
tag-suffixes = ["", "-debian", "-debian13"]
[config]
entrypoint = ["/usr/local/bin/install-cni"]
working-directory = "/"
capabilities = ["CAP_NET_ADMIN", "CAP_SYS_ADMIN"]
[config.environment]
PATH = "/bin"
[libraries.loaded]
"libx.so.1" = "opened by name"
[variants.runtime]
packages = ["runtime"]
user = "65532:65532"
tag-suffix = ""
shell = ""
package-manager = ""
package-database = "status.d"
whole-packages = false
[variants.dev]
extends = "runtime"
packages = ["runtime", "dev"]
user = "0:0"
tag-suffix = "-dev"
shell = "bash"
package-manager = "apt"
package-database = "dpkg"
whole-packages = true
environment = { X = "y" }
[[remove]]
variants = ["runtime"]
paths = ["usr/bin/*"]
except = ["usr/bin/x"]
why = "w"
[[directory]]
path = "tmp"
mode = "1777"
[[account]]
name = "nonroot"
uid = 65532
gid = 65532
"""


def parse(change: dict[str, Any] | None = None) -> definition.Definition:
    data = tomllib.loads(TEXT)
    for path, value in (change or {}).items():
        at: Any = data
        *way, last = path.split("/")
        for step in way:
            at = at[int(step)] if isinstance(at, list) else at[step]
        if value is None:
            del at[last]
        else:
            at[last] = copy.deepcopy(value)
    return definition.parse(data, "image.toml", CODE)


def test_the_tables_become_values() -> None:
    found = parse()
    assert found.version == "3.4.5"
    assert found.capabilities == 1 << 12 | 1 << 21
    runtime, dev = found.variants["runtime"], found.variants["dev"]
    assert [one.paths for one in runtime.removals] == [("usr/bin/*",)]
    assert dev.removals == ()
    assert dev.environment == {"PATH": "/bin", "X": "y"}
    assert runtime.environment == {"PATH": "/bin"}
    assert runtime.directories[0].mode == 0o1777
    assert runtime.accounts == dev.accounts


def test_tags() -> None:
    found = parse()
    expected = "3 3-debian 3-debian13 3.4 3.4-debian 3.4-debian13 3.4.5 3.4.5-debian 3.4.5-debian13"
    assert list(found.tags(found.variant("runtime"))) == expected.split()
    assert list(found.tags(found.variant("dev"))) == [f"{tag}-dev" for tag in expected.split()]


def test_an_unknown_variant_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ImageError, match="unknown variant 'fips'") as raised:
        parse().variant("fips")
    assert raised.value.hint == "known: runtime, dev"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("image/name", None, "image.name: expected a text, found nothing"),
        ("image/name", 3, "image.name: expected a text, found 3"),
        ("image/nmae", "x", "image has unknown keys: nmae"),
        ("imgae", {}, "the file has unknown keys: imgae"),
        ("config/capabilities", ["CAP_SYS_BOOT"], "config.capabilities: expected names among"),
        ("config/entrypoint", "x", "config.entrypoint: expected a list"),
        ("config/entrypoint", [1], "config.entrypoint: expected a list of texts, found 1"),
        ("config/environment", {"A": 1}, "config.environment.A: expected a text"),
        ("variants/runtime/whole-packages", "no", "variants.runtime.whole-packages: expected true or false"),
        (
            "variants/runtime/package-database",
            "rpm",
            "variants.runtime.package-database: expected one of status.d, dpkg",
        ),
        ("variants/dev/tag", "x", "variants.dev has unknown keys: tag"),
        ("directory/0/mode", "778", "directory[0].mode: expected octal digits"),
        ("directory/0/mode", "4755", "directory[0].mode: expected at most 1777"),
        ("directory/0/mdoe", "0755", "directory[0] has unknown keys: mdoe"),
        ("remove/0/why", None, "remove[0].why: expected a text, found nothing"),
        ("remove/0/variants", ["prod"], "remove[0].variants: expected names among runtime, dev, found 'prod'"),
        ("account/0/uid", True, "account[0].uid: expected a number, found True"),
        ("account", {"name": "x"}, "account: expected a list"),
        ("account", ["x"], "account: expected a list of tables"),
    ],
)
def test_what_is_wrong_is_named(path: str, value: object, said: str) -> None:
    with pytest.raises(ImageError) as raised:
        parse({path: value})
    assert raised.value.message.startswith("image.toml: ")
    assert said in raised.value.message


def test_code_without_a_version_is_refused() -> None:
    with pytest.raises(ImageError, match="__version__"):
        definition.parse(tomllib.loads(TEXT), "image.toml", "x = 1\n")
