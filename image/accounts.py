"""The files of users and groups."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from image.definition import Account

_BASE_PASSWD = "usr/share/base-passwd"
PASSWD_MASTER = f"{_BASE_PASSWD}/passwd.master"
GROUP_MASTER = f"{_BASE_PASSWD}/group.master"
_NO_PASSWORD = "*"


def files(accounts: Sequence[Account], passwd_master: str = "", group_master: str = "") -> dict[str, tuple[int, str]]:
    """Mode and text of /etc/passwd and the like, by path; nobody has a password.

    The masters are those of the package base-passwd, whose maintainer script would copy them.
    """
    users = [line.replace(":*:", ":x:", 1) for line in passwd_master.splitlines()]
    groups = [line.replace(":*:", ":x:", 1) for line in group_master.splitlines()]
    named = {line.split(":", 1)[0] for line in (*users, *groups)}
    for account in accounts:
        if account.name in named:
            continue
        if account.uid >= 0:
            row = (account.name, "x", account.uid, account.gid, account.comment, account.home, account.shell)
            users.append(":".join(map(str, row)))
        if not any(line.split(":")[2] == str(account.gid) for line in groups):
            groups.append(f"{account.name}:x:{account.gid}:")
    # The days since a password's last change stay empty: no password, no age.
    shadow = [f"{line.split(':', 1)[0]}:{_NO_PASSWORD}::0:99999:7:::" for line in users]
    gshadow = [f"{line.split(':', 1)[0]}:{_NO_PASSWORD}::" for line in groups]
    return {
        "etc/passwd": (0o644, _text(users)),
        "etc/group": (0o644, _text(groups)),
        "etc/shadow": (0o640, _text(shadow)),
        "etc/gshadow": (0o640, _text(gshadow)),
    }


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
