"""Package URLs, against the reference implementation."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image.documents import purl
from image.model import DebPackage
from packageurl import PackageURL
from tests.image.samplecontents import SUBJECT, WHEEL, deb

NAMES = st.from_regex(r"[a-z0-9][a-z0-9+.-]{1,20}", fullmatch=True)
VERSIONS = st.from_regex(r"([0-9]:)?[0-9][0-9A-Za-z.+~]{0,20}(-[0-9a-z+.~]{1,8})?", fullmatch=True)


@given(NAMES, VERSIONS, NAMES, VERSIONS)
def test_debian_packages_have_canonical_purls_that_say_what_went_in(
    name: str, version: str, source: str, source_version: str
) -> None:
    package = DebPackage(name, version, "amd64", "debian", "pool/x.deb", "0" * 64, 1, source, source_version)
    text = purl.deb(package)
    parsed = PackageURL.from_string(text)
    assert parsed.to_string() == text
    assert (parsed.type, parsed.namespace, parsed.name, parsed.version) == ("deb", "debian", name, version)
    assert parsed.qualifiers["arch"] == "amd64"
    upstream = parsed.qualifiers.get("upstream", name)
    assert upstream == (source if source_version == version else f"{source}@{source_version}")


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (purl.pypi(WHEEL), "pkg:pypi/pyyaml@6.0.3"),
        (purl.pypi(replace(WHEEL, name="prometheus_client")), "pkg:pypi/prometheus-client@6.0.3"),
        (purl.own("istio-cni", "0.1.0", "arm64"), "pkg:generic/meshcni/istio-cni@0.1.0?arch=arm64"),
        (purl.own("meshcni", "0.1.0", "all"), "pkg:generic/meshcni/meshcni@0.1.0"),
        (purl.oci(SUBJECT), f"pkg:oci/install-cni@sha256:{'ab' * 32}?arch=amd64"),
        (
            purl.deb(replace(deb("libstdc++6"), source="libstdc++6", version="1", source_version="1")),
            "pkg:deb/debian/libstdc%2B%2B6@1?arch=amd64&distro=debian-13",
        ),
    ],
)
def test_purls(made: str, expected: str) -> None:
    assert made == expected
    assert PackageURL.from_string(made).to_string() == made
