from __future__ import annotations

import pytest
import yaml

from meshcni.cni.kubeconfig import kubeconfig, scalar, server_url
from meshcni.errors import InstallError


@pytest.mark.parametrize(
    ("protocol", "host", "port", "expected"),
    [
        ("https", "10.96.0.1", "443", "https://10.96.0.1:443"),
        ("", "10.96.0.1", "443", "https://10.96.0.1:443"),
        ("http", "api.example", "8080", "http://api.example:8080"),
        ("https", "fd00::1", "443", "https://[fd00::1]:443"),
        ("https", "[fd00::1]", "443", "https://[fd00::1]:443"),
    ],
)
def test_server(protocol: str, host: str, port: str, expected: str) -> None:
    assert server_url(protocol, host, port) == expected


@pytest.mark.parametrize(("host", "port", "name"), [("", "443", "HOST"), ("h", "", "PORT")])
def test_a_missing_variable_is_named_in_the_words_of_the_original(host: str, port: str, name: str) -> None:
    with pytest.raises(InstallError) as raised:
        server_url("https", host, port)
    assert f"KUBERNETES_SERVICE_{name} not set. Is this not running within a pod?" in raised.value.message
    assert raised.value.result == "CREATE_KUBECONFIG_FAILURE"


def test_layout_with_ca() -> None:
    assert kubeconfig("https://10.96.0.1:443", "eyJh.b-c_d", b"PEM\n") == (
        "apiVersion: v1\nclusters:\n- cluster:\n    certificate-authority-data: UEVNCg==\n"
        "    server: https://10.96.0.1:443\n  name: local\ncontexts:\n- context:\n    cluster: local\n"
        "    user: istio-cni\n  name: istio-cni-context\ncurrent-context: istio-cni-context\nkind: Config\nusers:\n"
        "- name: istio-cni\n  user:\n    token: eyJh.b-c_d\n"
    )


def test_layout_without_verification() -> None:
    text = kubeconfig("https://[fd00::1]:443", "t0", None)
    assert "- cluster:\n    insecure-skip-tls-verify: true\n    server: https://[fd00::1]:443\n" in text
    assert "certificate-authority" not in text


@pytest.mark.parametrize(
    "value",
    ["eyJhbGciOi.JSUzI1_NiIs-x", "token\n", "", "true", "No", "123", "a: b", "x #y", "two\nlines", "ä", "a:", "- x"],
)
def test_a_token_is_read_back_verbatim(value: str) -> None:
    text = kubeconfig("https://h:1", value, None)
    assert yaml.safe_load(text)["users"][0]["user"]["token"] == value


def test_an_ordinary_token_stands_without_quotes() -> None:
    assert scalar("eyJhbGciOi.JSUzI1_NiIs-x") == "eyJhbGciOi.JSUzI1_NiIs-x"
    assert scalar("token\n") == "|\n      token"
