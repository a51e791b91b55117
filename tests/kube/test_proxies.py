"""Which proxy HTTPS_PROXY and NO_PROXY mean: as Go's clients read them, and without a password in any message."""

from __future__ import annotations

import base64

import pytest

from meshcni.kube import failures
from meshcni.kube.failures import ApiError
from meshcni.kube.proxies import Proxy, is_exempt, proxy_towards, variables

EXEMPT = [
    ("10.96.0.1", "10.96.0.1"),
    ("10.96.0.1", "10.96.0.1:443"),
    ("10.96.0.1", " 10.96.0.0/12 ,"),
    ("10.96.0.1", "10.96.0.1/12"),  # host bits set
    ("10.96.0.1", "a.example,10.96.0.1"),
    ("10.96.0.1", "*"),
    ("10.96.0.1", "a.example, *"),
    ("::ffff:10.96.0.1", "10.96.0.1"),
    ("fd00::1", "fd00::1"),
    ("fd00::1", "FD00:0::1"),
    ("fd00::1", "[fd00::1]:443"),
    ("fd00::1", "[fd00::1]"),
    ("fd00::1", "fd00::/8"),
    ("kubernetes.default.svc", "svc"),
    ("kubernetes.default.svc", "default.svc"),
    ("kubernetes.default.svc", ".svc"),
    ("kubernetes.default.svc", "*.svc"),
    ("kubernetes.default.svc", "kubernetes.default.svc:443"),
    ("kubernetes.default.svc", ".default.svc:443"),
    ("Kubernetes.Default.svc", "KUBERNETES.default.svc"),
    ("127.0.0.1", ""),
    ("127.1.2.3", ""),
    ("::1", ""),
    ("localhost", ""),
]
NOT_EXEMPT = [
    ("10.96.0.1", ""),
    ("10.96.0.1", ",,"),
    ("10.96.0.1", "10.96.0.10"),
    ("10.96.0.1", "10.96.0.1:6443"),
    ("10.96.0.1", "10.97.0.0/16"),
    ("10.96.0.1", "0.1"),
    ("10.96.0.1", ".1"),
    ("10.96.0.1", "10.96.0.0/x,10.96.0.0/99"),
    ("10.96.0.1", "fd00::/8"),
    ("10.96.0.1", "*:443"),
    ("10.96.0.1", ":443"),
    ("fd00::1", "10.0.0.0/8"),
    ("fd00::1", "[fd00::1]:80"),
    ("svc", ".svc"),
    ("svc", "*.svc"),
    ("kubernetes.default.svc", "fault.svc"),
    ("kubernetes.default.svc", "kubernetes"),
    ("kubernetes.default.svc", "*ernetes.default.svc"),
    ("kubernetes.default.svc", "svc:80"),
    ("kubernetes.default.svc", "10.0.0.0/8"),
    ("localhost.example", "localhost"),
]


@pytest.mark.parametrize(("host", "text"), EXEMPT)
def test_exempt(host: str, text: str) -> None:
    assert is_exempt(host, 443, text)
    assert proxy_towards(host, 443, {"HTTPS_PROXY": "socks5://never-looked-at", "NO_PROXY": text}) is None


@pytest.mark.parametrize(("host", "text"), NOT_EXEMPT)
def test_not_exempt(host: str, text: str) -> None:
    assert not is_exempt(host, 443, text)
    assert proxy_towards(host, 443, {"HTTPS_PROXY": "http://p", "NO_PROXY": text}) is not None


ADDRESSES = [
    ("http://proxy.example:3128", "proxy.example", 3128),
    ("http://proxy.example:3128/", "proxy.example", 3128),
    ("HTTP://Proxy.example", "proxy.example", 80),
    ("proxy.example:3128", "proxy.example", 3128),
    ("10.0.0.1", "10.0.0.1", 80),
    (" http://10.0.0.1:3128\n", "10.0.0.1", 3128),
    ("http://[fd00::2]:8080", "fd00::2", 8080),
]


@pytest.mark.parametrize(("value", "host", "port"), ADDRESSES)
def test_addresses(value: str, host: str, port: int) -> None:
    assert proxy_towards("10.96.0.1", 443, {"HTTPS_PROXY": value}) == Proxy(host, port, "HTTPS_PROXY")


def test_the_first_variable_that_is_not_empty_counts() -> None:
    upper, lower = {"HTTPS_PROXY": "http://upper"}, {"https_proxy": "http://lower", "no_proxy": "10.0.0.0/8"}
    assert str(proxy_towards("192.0.2.1", 443, lower | upper)) == "proxy upper:80 (HTTPS_PROXY)"
    assert str(proxy_towards("192.0.2.1", 443, lower | {"HTTPS_PROXY": ""})) == "proxy lower:80 (https_proxy)"
    assert proxy_towards("10.96.0.1", 443, lower | upper | {"NO_PROXY": " "}) is None
    assert proxy_towards("10.96.0.1", 443, lower | upper | {"NO_PROXY": "b.example"}) is not None


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_variables_that_go_does_not_use_for_https(name: str) -> None:
    assert proxy_towards("10.96.0.1", 443, {name: "http://proxy.example"}) is None


def test_what_an_environment_holds() -> None:
    given = {"HTTPS_PROXY": "a", "https_proxy": "", "no_proxy": "b", "HTTP_PROXY": "c", "PATH": "/bin"}
    assert variables(given) == {"HTTPS_PROXY": "a", "no_proxy": "b"}


LOGINS = [
    ("me:secret", b"me:secret"),
    ("me", b"me:"),
    ("me:", b"me:"),
    ("me:s%40%3A%2Fcret", b"me:s@:/cret"),
    ("me:s@cret", b"me:s@cret"),
    ("me:s%C3%A4cret", "me:säcret".encode()),
    ("me:säcret", "me:säcret".encode()),
    ("me:s%FFcret", b"me:s\xffcret"),
    ("me:s\udcffcret", b"me:s\xffcret"),  # as os.environ gives a byte that is no UTF-8
]


@pytest.mark.parametrize(("login", "pair"), LOGINS)
def test_user_and_password(login: str, pair: bytes) -> None:
    proxy = proxy_towards("10.96.0.1", 443, {"HTTPS_PROXY": f"http://{login}@proxy.example:3128"})
    assert proxy is not None
    scheme, _, encoded = proxy.authorization.partition(" ")
    assert (proxy.host, scheme, base64.b64decode(encoded)) == ("proxy.example", "Basic", pair)
    assert "cret" not in f"{proxy} {proxy!r}"
    assert encoded not in f"{proxy} {proxy!r}"


UNUSABLE = [
    ("http://", "'http://'"),
    ("http://:3128", "'http://:3128'"),
    ("http://me:secret@", "'***@'"),
    ("http://me:secret@proxy:abc", "'***@proxy:abc'"),
    ("http://me:secret@proxy:99999", "'***@proxy:99999'"),
    ("http://me:secret@proxy:0", "'***@proxy:0'"),
    ("http://me:secret@[fd00::1", "'***@[fd00::1'"),
    ("me:se/cret@proxy:3128", "'***@proxy:3128'"),
    ("me:1/secret@proxy:3128", "'***@proxy:3128'"),
    ("http://me:1#secret@proxy:3128", "'***@proxy:3128'"),
    ("http://me:1?secret@proxy:3128", "'***@proxy:3128'"),
]


@pytest.mark.parametrize(("value", "shown"), UNUSABLE)
def test_an_address_that_is_none(value: str, shown: str) -> None:
    with pytest.raises(ApiError) as caught:
        proxy_towards("10.96.0.1", 443, {"https_proxy": value})
    assert caught.value.message == f"https_proxy is {shown}, which is no address of a proxy"
    assert "http://[user:password@]host[:port]" in caught.value.hint
    assert caught.value.cause == failures.CREDENTIALS


@pytest.mark.parametrize("scheme", ["https", "socks5", "socks5h", "ftp"])
def test_a_scheme_that_is_not_supported(scheme: str) -> None:
    with pytest.raises(ApiError) as caught:
        proxy_towards("10.96.0.1", 443, {"HTTPS_PROXY": f"{scheme}://me:secret@proxy:1080"})
    assert caught.value.message.startswith(f"HTTPS_PROXY is '***@proxy:1080': proxies of {scheme}:// are not supported")
    assert "http:// proxy" in caught.value.hint
    assert "NO_PROXY" in caught.value.hint
