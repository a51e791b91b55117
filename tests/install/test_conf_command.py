"""`meshcni conf` on real files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.install.hosts import BRIDGE, SINGLE

from meshcni.cli.conf import main


@pytest.fixture
def conf_dir(tmp_path: Path) -> Path:
    (tmp_path / "10-a.conflist").write_text(BRIDGE)
    (tmp_path / "20-b.conf").write_text(SINGLE)
    return tmp_path


def test_show_a_directory(conf_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(conf_dir)]) == 0
    assert capsys.readouterr().out == (
        "10-a.conflist (the runtime uses this one)\n  list 'net', cniVersion 1.0.0\n  plugins: bridge\n"
        "  istio-cni: not called\n"
        "20-b.conf\n  single network 'net', cniVersion 0.4.0\n  plugins: bridge\n  istio-cni: not called\n"
    )
    (conf_dir / "05-x.json").write_text(BRIDGE)
    assert main(["show", str(conf_dir)]) == 1
    assert "not accepted by a runtime: 05-x.json: 'type' is missing" in capsys.readouterr().out


def test_insert_shows_what_it_would_write_and_writes_the_same(
    conf_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = conf_dir / "10-a.conflist"
    arguments = ["insert", str(path), "--exclude-namespaces=kube-system, other", "--pod-namespace", "mesh"]
    assert main([*arguments, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert path.read_text() == BRIDGE
    entry = json.loads(shown)["plugins"][1]
    assert entry["exclude_namespaces"] == ["kube-system", "other"]
    assert entry["pod_namespace"] == "mesh"
    assert main(arguments) == 0
    assert path.read_text() == shown
    assert "wrote" in capsys.readouterr().err
    assert main(arguments) == 0
    assert "nothing was changed" in capsys.readouterr().err
    assert main(["show", str(path)]) == 0
    assert "istio-cni: called\n" in capsys.readouterr().out
    assert main(["remove", str(path), "--dry-run"]) == 0
    assert capsys.readouterr().out == BRIDGE
    assert path.read_text() == shown
    assert main(["remove", str(path)]) == 0
    assert path.read_text() == BRIDGE


def test_insert_into_a_single_network(conf_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = conf_dir / "20-b.conf"
    assert main(["insert", str(path), "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert "20-b.conf would be removed" in captured.err
    assert "20-b.conflist would be written" in captured.err
    assert json.loads(captured.out)["name"] == "net"
    assert main(["insert", str(path), "--dry-run", "--cni-conf-original-conversion"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "k8s-pod-network"
    assert main(["insert", str(path), "--dry-run", "--diff"]) == 0
    diff = capsys.readouterr().out
    assert diff.startswith("--- 20-b.conf\n+++ 20-b.conflist\n")
    assert path.read_text() == SINGLE
    assert main(["insert", str(path)]) == 0
    assert sorted(item.name for item in conf_dir.iterdir()) == ["10-a.conflist", "20-b.conflist"]


def test_remove_what_is_not_there_changes_nothing(conf_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["remove", str(conf_dir / "20-b.conf"), "--dry-run"]) == 0
    assert capsys.readouterr().out == SINGLE
    own = conf_dir / "mesh.conf"
    own.write_text('{"type": "istio-cni"}')
    assert main(["remove", str(own), "--dry-run"]) == 0
    assert capsys.readouterr() == ("", "meshcni conf: mesh.conf would be removed\n")
    assert own.exists()


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        ([], 2, "Usage: "),
        (["frob"], 2, "no such conf command"),
        (["insert"], 2, "takes one path, got 0"),
        (["insert", "a", "b"], 2, "takes one path, got 2"),
        (["insert", "FILE", "--unknown"], 2, "unknown flag"),
        (["insert", "FILE", "--dry-run=perhaps"], 2, "is no boolean"),
        (["insert", "MISSING"], 1, "no such file"),
        (["show", "MISSING"], 1, "No such file"),
        (["insert", "BROKEN", "--dry-run"], 1, "is not valid JSON"),
        (["insert", "BROKEN"], 1, "is not valid JSON"),
        (["remove", "BROKEN"], 1, "is not valid JSON"),
    ],
)
def test_bad_input(
    conf_dir: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, part: str
) -> None:
    (conf_dir / "broken.conflist").write_text('{"name":')
    paths = {"FILE": "10-a.conflist", "MISSING": "missing.conflist", "BROKEN": "broken.conflist"}
    assert main([str(conf_dir / paths[one]) if one in paths else one for one in arguments]) == status
    captured = capsys.readouterr()
    assert part in captured.err + captured.out
    assert (conf_dir / "broken.conflist").read_text() == '{"name":'
    assert (conf_dir / "10-a.conflist").read_text() == BRIDGE
