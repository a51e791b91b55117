"""Command lines as Go's pflag reads them, and Go's booleans, integers and durations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshcni.errors import UsageError
from meshcni.pflag import Flag, go_bool, go_duration, go_int, help_text, parse

FLAGS = (
    Flag("ports", "b", help="which ports"),
    Flag("uid", "u", "int", "1337", ("PROXY_UID",), "whose"),
    Flag("dry-run", "n", "bool", "false"),
    Flag("quick", "q", "bool", "false"),
    Flag("target", "", "strings"),
)

UNDERSTOOD = {
    "nothing": ([], {}, []),
    "long with space": (["--ports", "80"], {"ports": "80"}, []),
    "long with equals": (["--ports=80"], {"ports": "80"}, []),
    "long, equals within the value": (["--ports=a=b"], {"ports": "a=b"}, []),
    "long, explicitly empty": (["--ports="], {"ports": ""}, []),
    "long, empty word": (["--ports", ""], {"ports": ""}, []),
    "a value may look like a flag": (["--ports", "--uid"], {"ports": "--uid"}, []),
    "short with space": (["-b", "80"], {"ports": "80"}, []),
    "short attached": (["-b80"], {"ports": "80"}, []),
    "short with equals": (["-b=80"], {"ports": "80"}, []),
    "short, empty word": (["-b", ""], {"ports": ""}, []),
    "short with nothing after the equals keeps it": (["-b="], {"ports": "="}, []),
    "short attached star": (["-b*"], {"ports": "*"}, []),
    "boolean alone": (["--dry-run"], {"dry-run": "true"}, []),
    "boolean with equals": (["--dry-run=F"], {"dry-run": "F"}, []),
    "boolean takes no next word": (["--dry-run", "false"], {"dry-run": "true"}, ["false"]),
    "short boolean": (["-n"], {"dry-run": "true"}, []),
    "short boolean with equals": (["-n=false"], {"dry-run": "false"}, []),
    "short booleans together": (["-nq"], {"dry-run": "true", "quick": "true"}, []),
    "short booleans, then a value": (["-nb", "80"], {"dry-run": "true", "ports": "80"}, []),
    "the last one wins": (["-b", "1", "--ports=2", "-b3"], {"ports": "3"}, []),
    "strings are collected": (["--target=a,b", "--target", "c"], {"target": ["a,b", "c"]}, []),
    "positional among flags": (["add", "-b", "1", "all"], {"ports": "1"}, ["add", "all"]),
    "two dashes end the flags": (["-b1", "--", "-n", "--x"], {"ports": "1"}, ["-n", "--x"]),
    "one dash is positional": (["-"], {}, ["-"]),
    "an empty word is positional": ([""], {}, [""]),
}


@pytest.mark.parametrize(("arguments", "values", "rest"), UNDERSTOOD.values(), ids=UNDERSTOOD)
def test_understands(arguments: list[str], values: dict[str, object], rest: list[str]) -> None:
    parsed = parse(FLAGS, arguments)
    assert (parsed.values, parsed.rest, parsed.help) == (values, rest, False)


REFUSED = {
    "unknown flag": (["--prots", "1"], "unknown flag: --prots"),
    "unknown flag with a value": (["--prots=1"], "unknown flag: --prots"),
    "unknown shorthand": (["-x"], "unknown shorthand flag: 'x' in -x"),
    "unknown shorthand after a known one": (["-nx"], "'x' in -nx"),
    "long flag without its value": (["--ports"], "flag --ports needs a value"),
    "shorthand without its value": (["-n", "-b"], "flag -b needs a value"),
    "three dashes": (["---ports=1"], "bad flag syntax"),
    "no name": (["--=1"], "bad flag syntax"),
    "no abbreviations": (["--port", "1"], "unknown flag"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(FLAGS, arguments)
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["-b1", "-h"], ["-nh"]])
def test_help_is_noticed(arguments: list[str]) -> None:
    assert parse(FLAGS, arguments).help


def test_a_flag_of_ones_own_may_be_called_help() -> None:
    parsed = parse([Flag("help"), Flag("host", "h")], ["--help", "x", "-h", "y"])
    assert (parsed.values, parsed.help) == ({"help": "x", "host": "y"}, False)


def test_without_interspersing_the_first_word_ends_the_flags() -> None:
    parsed = parse(FLAGS, ["-n", "explain", "--file", "x"], interspersed=False)
    assert (parsed.values, parsed.rest) == ({"dry-run": "true"}, ["explain", "--file", "x"])


def test_text_of_a_flag() -> None:
    parsed = parse(FLAGS, ["-b", "", "--target=a"])
    assert (parsed.text("ports"), parsed.text("uid"), parsed.text("target")) == ("", None, None)


WORDS = st.text(alphabet="-=bnqhup0 portsdrye*", max_size=8)
WORDS.validate()  # hypothesis reads its table of characters now: a pure test may not


@given(st.lists(WORDS, max_size=6))
def test_any_command_line_is_understood_or_refused(arguments: list[str]) -> None:
    try:
        parsed = parse(FLAGS, arguments)
    except UsageError:
        return
    assert set(parsed.values) <= {flag.name for flag in FLAGS}


def test_the_help_names_every_flag_with_default_and_variable() -> None:
    text = help_text("Usage: program", FLAGS)
    assert text.startswith("Usage: program\n")
    assert "-u, --uid INT\n        whose (default 1337; env PROXY_UID)" in text
    assert "-n, --dry-run\n" in text  # a boolean takes no word and its default goes without saying
    assert all(flag.spelling in text for flag in FLAGS)


@pytest.mark.parametrize("text", ["1", "t", "T", "TRUE", "true", "True"])
def test_true(text: str) -> None:
    assert go_bool(text) is True


@pytest.mark.parametrize("text", ["0", "f", "F", "FALSE", "false", "False"])
def test_false(text: str) -> None:
    assert go_bool(text) is False


@pytest.mark.parametrize("text", ["", "yes", "no", "on", "tRUE", " true", "2", "true\n"])
def test_no_boolean(text: str) -> None:
    with pytest.raises(ValueError, match="not a boolean"):
        go_bool(text)


INTEGERS = {
    "0": 0, "600": 600, "0600": 0o600, "0o600": 0o600, "0O17": 0o17, "0x1F": 31, "0XfF": 255, "0b101": 5, "-5": -5,
    "+5": 5, "-0x10": -16, "1_000": 1000, "0x_ff": 255, "0_7": 7, "9223372036854775807": 2**63 - 1,
    "-9223372036854775808": -(2**63), "00": 0,
}  # fmt: skip


@pytest.mark.parametrize(("text", "number"), INTEGERS.items())
def test_integers(text: str, number: int) -> None:
    assert go_int(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "08",
        "0x",
        "0b2",
        "1.5",
        " 1",
        "1 ",
        "--1",
        "1__0",
        "_1",
        "1_",
        "9223372036854775808",
        "٣",
        "1e3",
        "1\n",
    ],
)
def test_no_integer(text: str) -> None:
    with pytest.raises(ValueError, match=r"not an integer|64 bits"):
        go_int(text)


DURATIONS = {
    "0": 0.0, "5s": 5.0, "1m30s": 90.0, "1.5h": 5400.0, "-1s": -1.0, "+2s": 2.0, "100ms": 0.1, "1h2m3s": 3723.0,
    ".5s": 0.5, "1.s": 1.0, "1000000us": 1.0, "1000µs": 0.001, "1000000000ns": 1.0, "-0": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(("text", "seconds"), DURATIONS.items())
def test_durations(text: str, seconds: float) -> None:
    assert go_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "s", "5 s", "5d", "-", "1m 3s", ".s", "1s1", "5S"])
def test_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        go_duration(text)
