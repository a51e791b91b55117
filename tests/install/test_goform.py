"""Our canonical form is Go's own: the same values through encoding/json and through `go_json`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from meshcni.cni.conftext import Number, go_json, go_number, go_string

PROGRAM = """
package main

import ("encoding/json"; "os")

func main() {
	var values []any
	if err := json.NewDecoder(os.Stdin).Decode(&values); err != nil { panic(err) }
	texts := []string{}
	for _, value := range values {
		text, err := json.MarshalIndent(value, "", "  ")
		if err != nil { panic(err) }
		texts = append(texts, string(text))
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""
# The cache is the one that scripts/build-cnitool fills, so that the standard library is compiled once.
GO_CACHE = str(Path(__file__).parents[2] / ".cache/go/build")
GO_ENVIRONMENT = {"GOCACHE": GO_CACHE, "GOTOOLCHAIN": "local", "GO111MODULE": "off", "CGO_ENABLED": "0"}
NUMBERS = [
    "0",
    "-0",
    "1",
    "1.50",
    "1e20",
    "1e21",
    "1e-6",
    "1e-7",
    "-12.5E+30",
    "9007199254740993",
    "5e-324",
    "0.1",
    "1e300",
]
STRINGS = ["<a&b>", "\u2028\u2029", "\x00\x08\x0c\x1f\x7f", "ä€😀", '\\"/', "\t\r\n", "\ud800"]
VALUES: list[object] = [{}, [], {"b": {}, "a": [], "ä": [1, {"x": None}], "B": True}, [[[]], [{}]], "text", None]


def go() -> str:
    beside = Path(sys.executable).with_name("go")
    found = str(beside) if beside.exists() else shutil.which("go")
    if not found:
        pytest.skip("no Go toolchain: `make setup` installs one")
    return found


def test_the_same_bytes_as_go(tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(PROGRAM)
    values = [f'{{"n":{token}}}' for token in NUMBERS] + [json.dumps(value) for value in [*STRINGS, *VALUES]]
    environment = {**os.environ, **GO_ENVIRONMENT}
    done = subprocess.run(
        [go(), "run", str(tmp_path / "main.go")],
        input="[" + ",".join(values) + "]",
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    ours = [go_json({"n": Number(token)}) for token in NUMBERS] + [go_json(value) for value in [*STRINGS, *VALUES]]
    assert ours == json.loads(done.stdout)
    assert go_number("1.50") == "1.5"
    assert go_string("<") == '"\\u003c"'
