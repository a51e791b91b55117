"""The files that maintainer scripts would make, and what becomes of a tree."""

from __future__ import annotations

import pytest
from image.definition import Account, Alternative
from image.model import Entry, EntryKind, ImageError
from image.tree import Tree

from image import accounts, dpkgdb, pruning, trustedcas

CERTIFICATE = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


def test_accounts_without_a_master() -> None:
    found = accounts.files([Account("root", 0, 0, "root", "/root"), Account("n", 7, 8), Account("g", -1, 9)])
    assert found["etc/passwd"] == (
        0o644,
        "root:x:0:0:root:/root:/usr/sbin/nologin\nn:x:7:8::/nonexistent:/usr/sbin/nologin\n",
    )
    assert found["etc/group"] == (0o644, "root:x:0:\nn:x:8:\ng:x:9:\n")
    assert found["etc/shadow"] == (0o640, "root:*::0:99999:7:::\nn:*::0:99999:7:::\n")


def test_accounts_beside_those_of_the_distribution() -> None:
    passwd, group = "root:*:0:0:root:/root:/bin/bash\n", "root:*:0:\nnogroup:*:65534:\n"
    found = accounts.files([Account("root", 0, 0), Account("_apt", 42, 65534)], passwd, group)
    assert found["etc/passwd"][1].splitlines() == [
        "root:x:0:0:root:/root:/bin/bash",
        "_apt:x:42:65534::/nonexistent:/usr/sbin/nologin",
    ]
    assert found["etc/group"][1] == "root:x:0:\nnogroup:x:65534:\n"


def test_certificates_are_bundled_in_the_order_of_their_names() -> None:
    other = CERTIFICATE.replace(b"AAAA", b"BBBB")
    assert trustedcas.bundle({"b": CERTIFICATE, "a": other.rstrip()}) == other + CERTIFICATE


@pytest.mark.parametrize("data", [b"", b"x", CERTIFICATE * 2, b"x" + CERTIFICATE])
def test_what_is_no_certificate_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match="/a: expected one PEM certificate"):
        trustedcas.bundle({"a": data})
    with pytest.raises(ImageError, match="no certificate"):
        trustedcas.bundle({})


def package(name: str, **more: str) -> dpkgdb.Installed:
    control = {"Package": name, "Version": "1", "Architecture": "amd64", "Description": "short\n long", **more}
    files = {
        "control": b"",
        "postinst": b"#!/bin/sh\n",
        "triggers": b"interest-noawait /usr/x\ninterest y\nactivate z\n",
    }
    return dpkgdb.Installed(control, files, ["usr/bin/tool", "etc/x"], {"/etc/x": "0" * 32})


def test_the_database_of_dpkg() -> None:
    found = dpkgdb.database([package("b", **{"Multi-Arch": "same"}), package("a")])
    first, second = found["var/lib/dpkg/status"].decode().split("\n\n")
    assert first.splitlines() == [
        "Package: a",
        "Status: install ok installed",
        "Version: 1",
        "Architecture: amd64",
        "Description: short",
        " long",
        "Conffiles:",
        f" /etc/x {'0' * 32}",
    ]
    assert second.startswith("Package: b\n")
    assert found["var/lib/dpkg/info/b:amd64.list"] == b"/.\n/etc\n/etc/x\n/usr\n/usr/bin\n/usr/bin/tool\n"
    assert found["var/lib/dpkg/info/a.postinst"] == b"#!/bin/sh\n"
    assert "var/lib/dpkg/info/a.control" not in found
    assert found["var/lib/dpkg/triggers/File"] == b"/usr/x a/noawait\n/usr/x b:amd64/noawait\n"
    assert found["var/lib/dpkg/triggers/y"] == b"a\nb:amd64\n"


def test_files_for_scanners() -> None:
    found = dpkgdb.status_files([package("a")], {"a": {"usr/bin/tool": "f" * 32}})
    name, text = found["var/lib/dpkg/status.d/a"]
    assert name == "a"
    assert text.startswith(b"Package: a\nVersion: 1\n")
    assert b"Status" not in text
    assert found["var/lib/dpkg/status.d/a.md5sums"] == ("a", b"f" * 32 + b"  usr/bin/tool\n")


def test_alternatives_lead_to_the_highest_priority() -> None:
    low = Alternative("t", "usr/bin/t", "usr/bin/t-low", 1, {"usr/bin/s": "usr/bin/s-low"})
    high = Alternative("t", "usr/bin/t", "usr/bin/t-high", 2, {"usr/bin/s": "usr/bin/s-high"})
    files, links = dpkgdb.alternatives([high, low])
    assert links == {
        "usr/bin/t": "/etc/alternatives/t",
        "etc/alternatives/t": "/usr/bin/t-high",
        "usr/bin/s": "/etc/alternatives/s",
        "etc/alternatives/s": "/usr/bin/s-high",
    }
    assert files["var/lib/dpkg/alternatives/t"].decode().split("\n") == [
        *("auto", "/usr/bin/t", "s", "/usr/bin/s", ""),
        *("/usr/bin/t-high", "2", "/usr/bin/s-high"),
        *("/usr/bin/t-low", "1", "/usr/bin/s-low", "", ""),
    ]


def entry(path: str, kind: EntryKind = EntryKind.FILE, target: str = "", component: str = "deb:a") -> Entry:
    return Entry(path, kind, 0o755, component, target=target)


def test_two_things_at_one_path_are_refused_but_a_shared_folder_is_not() -> None:
    tree = Tree()
    tree.add(entry("d", EntryKind.DIRECTORY))
    tree.add(entry("d", EntryKind.DIRECTORY, component="deb:b"))
    tree.add(entry("d/f"))
    with pytest.raises(ImageError, match="/d/f comes from deb:a as file and from deb:b as link"):
        tree.add(entry("d/f", EntryKind.LINK, "x", "deb:b"))


@pytest.mark.parametrize(
    ("target", "resolves"),
    [
        ("f", True),
        ("/d/f", True),
        ("../d/f", True),
        ("gone", False),
        ("/l", False),
        ("/e/f", True),
        ("/proc/mounts", True),
    ],
)
def test_links_are_followed(target: str, resolves: bool) -> None:
    tree = Tree()
    tree.add(entry("d/f"))
    tree.add(entry("d/l", EntryKind.LINK, target))
    tree.add(entry("l", EntryKind.LINK, "l"))
    tree.add(entry("e", EntryKind.LINK, "d"))
    tree.add(entry("proc", EntryKind.DIRECTORY))
    tree.complete("meshcni:image")
    assert tree.resolves("d/l") is resolves
    assert ("d/l" in tree.pointless()) is not resolves
    if not resolves:
        with pytest.raises(ImageError, match="the link /d/l to"):
            tree.check(["d/l"])


def test_documents_of_packages_without_files_go_unless_others_lead_to_them() -> None:
    tree = Tree()
    tree.add(entry("usr/lib/a"))
    tree.add(entry("usr/share/doc/a", EntryKind.LINK, "base"))
    tree.add(entry("usr/share/doc/base/copyright", component="deb:base"))
    tree.add(entry("usr/share/doc/c/copyright", component="deb:c"))
    assert pruning.left_over_documents(tree) == ["usr/share/doc/c/copyright"]


def test_licences_that_nobody_mentions_go() -> None:
    tree = Tree()
    tree.file("usr/share/doc/a/copyright", b"see /usr/share/common-licenses/GPL.", "deb:a")
    tree.file("usr/share/common-licenses/GPL-3", b"", "deb:base")
    tree.file("usr/share/common-licenses/BSD", b"", "deb:base")
    tree.link("usr/share/common-licenses/GPL", "GPL-3", "deb:base")
    assert pruning.unmentioned_licences(tree) == ["usr/share/common-licenses/BSD"]
