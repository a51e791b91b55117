"""`meshcni rules sidecar --apply` leaves the kernel as the original's command with the same flags does.

Two fresh namespaces with the same addresses: the oracle's texts are loaded by hand into one, the command runs in the
other, then everything that the kernel's own tools list is compared, order included.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tests.kernel.contract_oracle import FLAGS, Contract, contract, pod_flags
from tests.kernel.listings import ADDRESSES, listing, new_netns, settled
from tests.kernel.world import Netns

import meshcni.cli.rules
import meshcni.host.redirection  # noqa: F401  (what a command loads when it runs is there already in each fork)
from meshcni.cli.__main__ import main as meshcni_main

MESHCNI = str(Path(__file__).parents[2] / ".venv/bin/meshcni")
VARIANTS = {
    "nftables": ["--backend=nftables"],
    "nft": ["--backend=iptables", "--force-iptables-binary=nft"],
    "legacy": ["--backend=iptables", "--force-iptables-binary=legacy"],
}
RESOLV_CONF = {
    "": "",
    "v4": "search cluster.local\nnameserver 10.96.0.10\nnameserver 10.96.0.11\noptions ndots:5\n",
    "v6": "nameserver fd00:96::a\n",
    "mixed": "nameserver fd00:96::a\nnameserver 10.96.0.10\nnameserver nonsense\nnameserver ::127.0.0.53\n",
    "none": "search cluster.local\n",
}


def addresses(kind: str) -> list[str]:
    """Return a netns's addresses in the kernel's order: IPv4 first."""
    added = ADDRESSES[kind]
    return ["127.0.0.1", *(a for a in added if ":" not in a), "::1", *(a for a in added if ":" in a)]


@dataclass(frozen=True)
class Case:
    """One command line in one kind of namespace."""

    flags: str | list[str]
    netns: str = "v4"
    env: Mapping[str, str] = field(default_factory=dict)
    resolv_conf: str = ""
    # {variant: what the original has to be told there to say the same}
    spelled: Mapping[str, str] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        return self.flags.split() if isinstance(self.flags, str) else self.flags

    def contract(self, variant: str) -> Contract:
        words = self.spelled[variant].split() if variant in self.spelled else self.words
        return contract(words, self.env, addresses(self.netns), RESOLV_CONF[self.resolv_conf])


ALL = "-b * -i *"
TPROXY = "-m TPROXY -b * -i *"
CNI = "-p 15001 -u 1337 -g 1337 -m REDIRECT -i * -b * -d 15020,15021,15090 -o 15020"
DNS_ALL = "--redirect-dns --capture-all-dns"

IPV6_SERVERS_ONLY = Case("-i * --redirect-dns", resolv_conf="v6")

CASES = {
    "no flags": Case(""),
    "no flags, IPv6 only": Case("", "v6"),
    "everything captured": Case(ALL),
    "everything captured, IPv6 only": Case(ALL, "v6"),
    "everything captured, dual stack": Case(f"{ALL} --dual-stack", "dual"),
    "dual-stack addresses, IPv6 off": Case(ALL, "dual"),
    "dual-stack flag without an IPv6 address": Case(f"{ALL} --dual-stack"),
    "as an ADD": Case(CNI),
    "as an ADD, dual stack": Case(f"{CNI} --dual-stack", "dual"),
    "no inbound ports, explicitly": Case(["-b", "", "-i", "*"]),
    "inbound ports": Case("-b 80,443,,9090"),
    "inbound list ignores excludes": Case("-b 80,443 -d 443"),
    "inbound excludes": Case("-b * -d 22,15020,22"),
    "excludes without inbound ports": Case("-d 22"),
    # The original hands the spelling on, so that each of its back ends refuses the other's.
    "port ranges as in iptables": Case(
        "-b * -d 8000:8010,22 -o 1:9 -q 20:29", spelled={"nftables": "-b * -d 8000-8010,22 -o 1-9 -q 20-29"}
    ),
    "port ranges as in nft": Case(
        "-b 8000-8010,http -o 9000-9010", spelled=dict.fromkeys(("nft", "legacy"), "-b 8000:8010,http -o 9000:9010")
    ),
    "open port ranges": Case("-b :80,8000:", spelled={"nftables": "-b 0-80,8000-65535"}),
    "odd spellings of ports": Case("-b 0x50,0443"),
    "spaces": Case(["-b", "80, 443", "-c", "eth9, net1", "-u", "1, 2", "-o", " 22"]),
    "repeated values": Case("-b 80,80 -c eth9,eth9 -u 1,1 -g 2,2 -i 10.0.0.0/8,10.0.0.0/8 -k tap0,tap0 -q 1,1 -o 2,2"),
    "service names": Case("-b http,https -d ssh -o domain -q mysql"),
    "all ports of the proxy": Case("-p 16001 -z 16006 -e 16008 -b *"),
    "outbound port excludes": Case(f"{ALL} -o 15020,3306"),
    "outbound port includes": Case("-q 80,443"),
    "outbound port includes and excludes": Case("-i * -q 80 -o 443,80"),
    "outbound CIDRs": Case("-i 10.0.0.0/8,172.16.0.0/12"),
    "outbound CIDRs with host bits": Case("-i 10.1.2.3/8 -x 10.9.8.7/16,10.1.1.1/32"),
    "outbound CIDRs of both families": Case(
        "-i 10.0.0.0/8,fd00:1::/32,172.16.0.0/12,fd00:2::/32 -x fd00:3::/64,10.1.0.0/16,fd00:4::5/64 --dual-stack",
        "dual",
    ),
    "outbound CIDRs of both families, IPv6 off": Case("-i fd00:1::/32,10.0.0.0/8 -x fd00:3::/64,10.1.0.0/16"),
    "only IPv6 CIDRs, IPv6 off": Case("-i fd00:1::/32"),
    "only IPv4 CIDRs, IPv6 only": Case("-i 10.0.0.0/8 -x 10.1.0.0/16", "v6"),
    "default routes": Case("-i 0.0.0.0/0,::/0 --dual-stack", "dual"),
    "outbound excludes with *": Case("-i * -x 10.0.0.0/8,192.168.0.0/16 -q 53"),
    "loopback prefix": Case("-b * -i 127.0.0.0/8,10.0.0.0/8"),
    "loopback prefix of IPv6": Case("-b * -i 10.0.0.0/8,::1/128 --dual-stack", "dual"),
    "loopback prefix of IPv6, IPv6 off": Case("-b * -i 10.0.0.0/8,::1/128"),
    "loopback prefix and DNS": Case(f"-b * -i 127.1.2.3/32 {DNS_ALL}"),
    "loopback CIDR": Case(TPROXY, env={"ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR": "127.0.0.0/8"}),
    "loopback CIDR with host bits": Case(ALL, env={"ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR": "127.1.2.3/16"}),
    "uids": Case(f"{ALL} -u 1337,1338,,0"),
    "uids and gids": Case(f"{TPROXY} -u 1,2 -g 3,4 {DNS_ALL} --dual-stack", "dual"),
    "gid only": Case("-b * -g 4711"),
    "ranges of users": Case(f"{ALL} -u 1000-1999 -g 7", env={"ISTIO_OUTBOUND_OWNER_GROUPS": "100-200,300"}),
    "names of users": Case("-b * -u daemon,root -g bin"),
    "the proxy's user from the environment": Case(ALL, env={"ENVOY_USER": "nobody"}),
    "owner groups excluded": Case(ALL, env={"ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE": "202,,101"}),
    "owner groups included": Case(ALL, env={"ISTIO_OUTBOUND_OWNER_GROUPS": "101,202,303"}),
    "owner groups included beat excluded": Case(
        ALL, env={"ISTIO_OUTBOUND_OWNER_GROUPS": "101", "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE": "202"}
    ),
    "owner groups: none": Case(ALL, "v6", env={"ISTIO_OUTBOUND_OWNER_GROUPS": ""}),
    "owner groups by name, DNS": Case(f"{ALL} {DNS_ALL}", env={"ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE": "daemon"}),
    "excluded interfaces": Case("-b * -c eth9,net1.100"),
    "excluded interfaces, TPROXY, INVALID": Case(f"{TPROXY} -c eth9,net1 --drop-invalid --dual-stack", "dual"),
    "families of interfaces": Case("-b * -c eth+ -k tap+ -i *", spelled={"nftables": "-b * -c eth* -k tap* -i *"}),
    "virtual interfaces": Case("-b * -k tap0,tap1 -i *"),
    "virtual interfaces, IPv6": Case("-k tap0,tap1 -i *", "v6"),
    "virtual interfaces, no CIDR": Case("-k tap0,tap1"),
    "virtual interfaces, CIDRs": Case("-b * -k tap0,tap1 -i 10.0.0.0/8,fd00:1::/32,172.16.0.0/12 --dual-stack", "dual"),
    "virtual and excluded interfaces": Case(f"{TPROXY} -k tap0,tap1 -c eth9 -o 22"),
    "virtual interfaces, one CIDR, IPv6 off": Case("-k tap0 -i fd00:1::/32,10.0.0.0/8"),
    "TPROXY": Case(TPROXY),
    "TPROXY, IPv6 only": Case(TPROXY, "v6"),
    "TPROXY, dual stack": Case(f"{TPROXY} --dual-stack -d 22,23", "dual"),
    "excluded ports, TPROXY of both families": Case(f"{TPROXY} -d 22 -o 23 --dual-stack -z 16006", "dual"),
    "TPROXY without inbound ports": Case("-m TPROXY -i *"),
    "TPROXY without inbound ports, dual stack": Case("-m TPROXY --dual-stack", "dual"),
    "TPROXY, inbound ports": Case("-m TPROXY -b 80,443 -d 22"),
    "TPROXY, inbound range, IPv6": Case("-m TPROXY -b 80:90,443", "v6", spelled={"nftables": "-m TPROXY -b 80-90,443"}),
    "TPROXY, mark and table": Case(f"{TPROXY} -t 4242 -r 144 -z 16006"),
    "TPROXY, hexadecimal mark": Case(f"{TPROXY} -t 0x2a"),
    "tproxy in small letters is REDIRECT": Case("-m tproxy -b *"),
    "INVALID dropped": Case("--drop-invalid"),
    "INVALID dropped, dual stack": Case(f"{ALL} --drop-invalid --dual-stack", "dual"),
    "DNS": Case(f"{ALL} {DNS_ALL}"),
    "DNS, IPv6 only": Case(f"{ALL} {DNS_ALL}", "v6"),
    "DNS, dual stack, TPROXY": Case(f"{TPROXY} {DNS_ALL} --dual-stack -d 22", "dual"),
    "DNS without outbound": Case(f"-b * {DNS_ALL} -o 53 -e 16008"),
    "capture-all without redirect": Case(f"{ALL} --capture-all-dns"),
    "DNS to IPv4 servers": Case(f"{ALL} --redirect-dns", resolv_conf="v4"),
    "DNS to IPv4 servers, dual stack": Case(f"{ALL} --redirect-dns --dual-stack", "dual", resolv_conf="v4"),
    "DNS to IPv4 servers, IPv6 only": Case("-i * --redirect-dns", "v6", resolv_conf="v4"),
    "DNS to IPv6 servers, dual stack": Case(f"{ALL} --redirect-dns --dual-stack", "dual", resolv_conf="v6"),
    "DNS to IPv6 servers, IPv6 only": Case("-i * --redirect-dns -u 1,2", "v6", resolv_conf="v6"),
    "DNS to IPv6 servers, IPv6 off": IPV6_SERVERS_ONLY,
    "DNS to servers of both families": Case(f"{ALL} --redirect-dns --dual-stack", "dual", resolv_conf="mixed"),
    "DNS to servers of both families, IPv6 off": Case(f"{ALL} --redirect-dns", resolv_conf="mixed"),
    "DNS without servers": Case(f"{ALL} --redirect-dns", resolv_conf="none"),
    "nothing asked for": Case(f"{TPROXY} --skip-rule-apply", "v6"),
    "environment": Case(
        "",
        env={
            "ISTIO_INBOUND_PORTS": "*",
            "ISTIO_LOCAL_EXCLUDE_PORTS": "22",
            "ISTIO_SERVICE_CIDR": "*",
            "PROXY_UID": "7",
            "DROP_INVALID": "yes",
            "REDIRECT_DNS": "true",
            "CAPTURE_ALL_DNS": "T",
            "ISTIO_INBOUND_INTERCEPTION_MODE": "TPROXY",
            "ISTIO_INBOUND_TPROXY_MARK": "99",
        },
    ),
    "flags before the environment": Case(
        ["-b", "", "-i10.0.0.0/8", "-u=8", "--drop-invalid=false", "-o", "1", "-o", "2"],
        env={"ISTIO_INBOUND_PORTS": "*", "ISTIO_SERVICE_CIDR": "*", "PROXY_UID": "7", "INVALID_DROP": "true"},
    ),
    "the second name of a variable before the first": Case(
        ALL, env={"DROP_INVALID": "true", "INVALID_DROP": "0", "PROXY_GID": "", "DUAL_STACK": "1"}
    ),
    "everything at once": Case(
        f"-m TPROXY -b 80,443 -d 22 -c eth9 -k tap0,tap1 -i 10.0.0.0/8,fd00:1::/32 -x 10.1.0.0/16,fd00:2::/64 -q 81 "
        f"-o 22,23 -u 1,2 -g 3 --drop-invalid --dual-stack {DNS_ALL} -e 1 -p 2 -z 3 -t 4 -r 5",
        "dual",
        env={"ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE": "9,10", "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR": "127.0.0.0/8"},
    ),
}

# --- the two namespaces -----------------------------------------------------------------------------------------------


def load(netns: Netns, rules: Contract, variant: str) -> None:
    """Do by hand what the original does with its texts."""
    if variant == "nftables":
        netns.shell("nft", "-f", "-", text=rules.nft)
    else:
        for command, text in (("iptables", rules.iptables), ("ip6tables", rules.ip6tables)):
            if text:
                netns.shell(f"{command}-{variant}-restore", "--noflush", text=text)
    netns.shell("sh", "-e", text=rules.ip)


def environment(env: Mapping[str, str]) -> dict[str, str]:
    flags = {variable for _, variables, _ in FLAGS.values() for variable in variables}
    return {name: value for name, value in os.environ.items() if name not in flags} | dict(env)


def run(netns: Netns, words: Sequence[str], env: Mapping[str, str], resolv_conf: str = "") -> tuple[int, str]:
    """Run `meshcni rules sidecar --apply`, return its status and what it printed.

    The executable itself is started only where it needs a resolv.conf of its own; else a fork does the same sooner.
    """
    words = ["rules", "sidecar", "--apply", *words]
    with tempfile.TemporaryFile() as output, tempfile.NamedTemporaryFile("w") as file:
        file.write(resolv_conf)
        file.flush()
        if resolv_conf:
            script = f'mount --bind {file.name} /etc/resolv.conf && exec {MESHCNI} "$@"'
            command = ["unshare", "-m", "sh", "-c", script, "sh", *words]
            call = partial(subprocess.call, command, stdout=output, stderr=output, env=environment(env))
        else:
            call = partial(run_forked, words, environment(env), output.fileno())
        status = netns.call(call)
        output.seek(0)
        return status, output.read().decode()


def run_forked(words: Sequence[str], env: Mapping[str, str], output: int) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 99
    try:
        os.environ.clear()
        os.environ.update(env)
        sys.stdout = sys.stderr = os.fdopen(output, "w")
        status = meshcni_main(words)
    finally:
        sys.stdout.flush()
        os._exit(status)


# --- tests ------------------------------------------------------------------------------------------------------------


def words_for(case: Case, variant: str) -> list[str]:
    """Return the case's flags for our command; which families get rules is left to the original's way of choosing."""
    return [*VARIANTS[variant], "--family-policy=original", *case.words]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", CASES)
def test_command_line(name: str, variant: str) -> None:
    case = CASES[name]
    rules = case.contract(variant)
    if case is IPV6_SERVERS_ONLY:  # the original jumps to chains that it does not declare; nft refuses all, see below
        rules = replace(rules, nft=rules.nft_declared)
    resolv_conf = RESOLV_CONF[case.resolv_conf]
    with closing(new_netns(case.netns)) as theirs, closing(new_netns(case.netns)) as ours:
        load(theirs, rules, variant)

        status, output = run(ours, words_for(case, variant), case.env, resolv_conf)

        assert status == 0, output
        wanted = listing(theirs, variant)
        assert listing(ours, variant) == wanted

        # Once more: nothing doubles, not even the policy rule, of which each run of the original adds another.
        assert run(ours, words_for(case, variant), case.env, resolv_conf)[0] == 0
        assert listing(ours, variant) == wanted


def test_there_are_enough_command_lines() -> None:
    assert len(CASES) >= 45


def test_the_original_fails_where_servers_and_addresses_have_no_family_in_common() -> None:
    with closing(new_netns("v4")) as theirs, pytest.raises(AssertionError, match="No such file or directory"):
        load(theirs, IPV6_SERVERS_ONLY.contract("nftables"), "nftables")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["as an ADD", "TPROXY", "outbound CIDRs of both families, IPv6 off"])
def test_a_dual_stack_netns_counts_as_dual_stack_unless_told_otherwise(name: str, variant: str) -> None:
    """The original leaves IPv6 alone without --dual-stack, since IPv4 comes first: then it is not redirected."""
    case = replace(CASES[name], netns="dual")
    with closing(new_netns("dual")) as theirs, closing(new_netns("dual")) as ours:
        load(theirs, replace(case, flags=[*case.words, "--dual-stack"]).contract(variant), variant)

        assert run(ours, [*VARIANTS[variant], *case.words], {})[0] == 0

        assert listing(ours, variant) == listing(theirs, variant)


REFUSED: dict[str, tuple[Case, str]] = {  # what the original gets no rules from either, and our message
    "excluded star": (Case("-i * -x *"), "'*' cannot be excluded"),
    "unknown service": (Case("-b 80,nonsense"), "'nonsense' is no port"),
    "port": (Case("-b * -d 65536"), "'65536' is no port"),
    "excluded port star": (Case("-b * -d *"), "'*' is no port"),
    "user": (Case("-u nobody-knows"), "'nobody-knows' is no id"),
    "group": (Case("", env={"ISTIO_OUTBOUND_OWNER_GROUPS": "nobody-knows"}), "'nobody-knows' is no id"),
    "interface": (Case("-c an-interface-of-24-bytes"), "is no interface name"),
    "prefix": (Case("-i 10.0.0.0/33"), "is no prefix"),
    "mark": (Case("-m TPROXY -b * -t mark"), "mark is 'mark'"),
    "no address but of loopback": (Case("", "none"), "no valid local IP address"),
    "no address but of the link": (Case("", "link-local"), "no valid local IP address"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_both(name: str, variant: str) -> None:
    case, message = REFUSED[name]
    with closing(new_netns(case.netns)) as theirs, closing(new_netns(case.netns)) as ours:
        before = listing(ours, variant)
        with pytest.raises((AssertionError, ValueError)):
            load(theirs, case.contract(variant), variant)

        status, output = run(ours, words_for(case, variant), case.env)

        assert status == 1
        assert message in output
        assert listing(ours, variant) == before


# --- over what the original left --------------------------------------------------------------------------------------

# Each is applied over the state of the one before. Neighbours differ in as much as possible.
SUCCESSION = [
    "TPROXY, dual stack",
    "no flags",
    "DNS, dual stack, TPROXY",
    "everything captured",
    "uids and gids",
    "owner groups included",
    "everything captured, dual stack",
    "INVALID dropped",
    "TPROXY without inbound ports, dual stack",
    "loopback prefix and DNS",
    "virtual interfaces, CIDRs",
    "as an ADD",
    "excluded ports, TPROXY of both families",
    "outbound CIDRs of both families",
    "DNS without outbound",
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("former", "latter"), list(pairwise([*SUCCESSION, SUCCESSION[0]])))
def test_over_the_original(former: str, latter: str, variant: str) -> None:
    first, second = (replace(CASES[name], netns="dual") for name in (former, latter))
    with closing(new_netns("dual")) as ours, closing(new_netns("dual")) as fresh:
        load(ours, first.contract(variant), variant)
        load(fresh, second.contract(variant), variant)
        before = listing(ours, variant)

        status, output = run(ours, words_for(first, variant), first.env)
        assert status == 0, output
        assert listing(ours, variant) == before

        status, output = run(ours, words_for(second, variant), second.env)
        assert status == 0, output
        assert settled(listing(ours, variant)) == settled(listing(fresh, variant))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", SUCCESSION[::2])
def test_cleanup(name: str, variant: str) -> None:
    """Rules, addresses and routes go; the original leaves the last two, and in a clean netns it even adds them."""
    case = replace(CASES[name], netns="dual")
    with closing(new_netns("dual")) as ours:
        nothing = settled(listing(ours, variant))
        words = [*words_for(case, variant), "--cleanup-only"]

        for _state in ("as the original left it", "clean"):
            assert run(ours, words, case.env)[0] == 0
            assert settled(listing(ours, variant)) == nothing
            load(ours, case.contract(variant), variant)
        assert run(ours, words, case.env)[0] == 0
        assert settled(listing(ours, variant)) == nothing


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interface_excluded_before_stays_excluded_in_iptables(variant: str) -> None:
    """Its rules look like anybody's; after them all is as if this had been the first run."""
    first, second = CASES["excluded interfaces, TPROXY, INVALID"], replace(CASES["DNS"], netns="dual")
    with closing(new_netns("dual")) as ours, closing(new_netns("dual")) as fresh:
        load(ours, first.contract(variant), variant)
        load(fresh, second.contract(variant), variant)

        assert run(ours, words_for(second, variant), second.env)[0] == 0

        left = re.compile(
            r"-A (PREROUTING -i|OUTPUT -o) (eth9|net1) -j RETURN|\s+[io]ifname \"(eth9|net1)\" counter return"
        )
        lines = listing(ours, variant)
        found = [line for line in lines if left.fullmatch(line)]
        assert bool(found) is (variant != "nftables")
        rest = [line for line in lines if not left.fullmatch(line)]
        assert settled(rest) == settled(listing(fresh, variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_routing_of_a_mark_of_its_own_stays(variant: str) -> None:
    """Whose a policy rule of another mark or table is cannot be told; the original leaves all of them."""
    first, second = (replace(CASES[name], netns="dual") for name in ("TPROXY, mark and table", "as an ADD"))
    with closing(new_netns("dual")) as ours, closing(new_netns("dual")) as fresh:
        load(ours, first.contract(variant), variant)
        load(fresh, second.contract(variant), variant)

        assert run(ours, words_for(second, variant), second.env)[0] == 0

        lines = settled(listing(ours, variant))
        left = ["32765:\tfrom all fwmark 0x1092 lookup 144", "local default dev lo table 144 scope host "]
        assert [line for line in lines if line in left] == left
        assert [line for line in lines if line not in left] == settled(listing(fresh, variant))


# --- pods -------------------------------------------------------------------------------------------------------------

TRAFFIC = "traffic.sidecar.istio.io/"
MODE = "sidecar.istio.io/interceptionMode"


def pod(
    annotations: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
    security: Mapping[str, int] | None = None,
    *,
    native: bool = False,
) -> dict[str, Any]:
    proxy = {
        "name": "istio-proxy",
        "image": "proxy",
        "env": [{"name": name, "value": value} for name, value in (env or {}).items()],
        "securityContext": dict(security or {}),
    }
    application = {"name": "application", "image": "application"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "pod",
            "namespace": "default",
            "annotations": {"sidecar.istio.io/status": "{}", **(annotations or {})},
        },
        "spec": {
            "initContainers": [{**proxy, "restartPolicy": "Always"}] if native else [],
            "containers": [application] if native else [application, proxy],
        },
    }


PODS: dict[str, tuple[dict[str, Any], str]] = {
    "defaults": (pod(), "v4"),
    "defaults, IPv6": (pod(), "v6"),
    "native sidecar": (pod(security={"runAsUser": 1001, "runAsGroup": 1002}, native=True), "v4"),
    "proxy as root": (pod(security={"runAsUser": 0, "runAsGroup": 0}), "v4"),
    "dual stack": (pod(env={"ISTIO_DUAL_STACK": "true"}), "dual"),
    "TPROXY": (pod({MODE: "TPROXY"}), "v4"),
    "TPROXY, DNS, dual stack": (
        pod({MODE: "TPROXY"}, {"ISTIO_META_DNS_CAPTURE": "1", "ISTIO_DUAL_STACK": "T", "INVALID_DROP": "true"}),
        "dual",
    ),
    "DNS": (pod(env={"ISTIO_META_DNS_CAPTURE": "true"}), "v4"),
    "switches that are no booleans": (
        pod(env={"ISTIO_META_DNS_CAPTURE": "yes", "ISTIO_DUAL_STACK": "on", "INVALID_DROP": ""}),
        "dual",
    ),
    "inbound ports": (pod({f"{TRAFFIC}includeInboundPorts": "80,443"}), "v4"),
    "no inbound ports": (pod({f"{TRAFFIC}includeInboundPorts": ""}), "v4"),
    "TPROXY, no inbound ports": (pod({MODE: "TPROXY", f"{TRAFFIC}includeInboundPorts": ""}), "v6"),
    "excluded inbound ports": (pod({f"{TRAFFIC}excludeInboundPorts": "3306,15021,22,3306"}), "v4"),
    "no excluded inbound ports": (pod({f"{TRAFFIC}excludeInboundPorts": ""}), "v4"),
    "outbound ranges": (
        pod(
            {
                f"{TRAFFIC}includeOutboundIPRanges": "10.1.2.3/8,fd00:1::/32,192.0.2.0/24",
                f"{TRAFFIC}excludeOutboundIPRanges": "10.96.0.0/16,fd00:2::/64",
            },
            {"ISTIO_DUAL_STACK": "true"},
        ),
        "dual",
    ),
    "no outbound ranges": (
        pod({f"{TRAFFIC}includeOutboundIPRanges": "", f"{TRAFFIC}includeOutboundPorts": "80,8080"}),
        "v4",
    ),
    "loopback range": (pod({f"{TRAFFIC}includeOutboundIPRanges": "127.0.0.1/8"}), "v4"),
    "excluded outbound ports": (pod({f"{TRAFFIC}excludeOutboundPorts": "3306,5432"}), "v4"),
    "no excluded outbound ports": (pod({f"{TRAFFIC}excludeOutboundPorts": ""}), "v4"),
    "interfaces": (
        pod({f"{TRAFFIC}excludeInterfaces": "net1,net2", "istio.io/reroute-virtual-interfaces": "tap0,tap1"}),
        "v4",
    ),
    "interfaces by the old name": (pod({f"{TRAFFIC}kubevirtInterfaces": "tap0"}), "v4"),
    "interfaces by both names": (
        pod({f"{TRAFFIC}kubevirtInterfaces": "tap0", "istio.io/reroute-virtual-interfaces": "tap1"}),
        "v4",
    ),
    "status port": (pod({"status.sidecar.istio.io/port": "15022"}), "v4"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", PODS)
def test_pod(name: str, variant: str, tmp_path: Path) -> None:
    manifest, kind = PODS[name]
    path = tmp_path / "pod.yaml"
    path.write_text(json.dumps(manifest))
    with closing(new_netns(kind)) as theirs, closing(new_netns(kind)) as ours:
        load(theirs, contract(pod_flags(manifest), {}, addresses(kind)), variant)

        status, output = run(ours, [*VARIANTS[variant], "--family-policy=original", f"--pod={path}"], {})

        assert status == 0, output
        assert listing(ours, variant) == listing(theirs, variant)
