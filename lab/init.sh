#!/bin/bash
# Process 1 of a lab node, in fresh mount, network, pid, ipc and uts namespaces. Killing it ends everything in the node.
# The host's tree is covered where daemons would write, so nothing of it changes.
#   init.sh NAME [SCRIPT ARGUMENT...]   SCRIPT is read instead of covering /var/lib, and may cover more
set -eu
trap 'echo "failed in line $LINENO"' ERR
mount --make-rprivate /
mount -t tmpfs -o mode=755 meshcni-lab /run
mkdir -p /run/lock /run/netns /run/lab/lib /run/lab/lib-work
if [ $# -gt 1 ]; then
    # shellcheck source=/dev/null
    . "$2" "${@:3}"
else
    mount -t overlay -o lowerdir=/var/lib,upperdir=/run/lab/lib,workdir=/run/lab/lib-work meshcni-lab /var/lib
fi
mount --make-rshared /  # as on a real node, but among its own mount namespaces only
hostname "$1"
ip link set lo up
for setting in net.ipv4.ip_forward=1 net.ipv6.conf.all.disable_ipv6=0 net.ipv6.conf.default.disable_ipv6=0 \
    net.ipv6.conf.all.forwarding=1 net.ipv6.conf.default.accept_dad=0; do
    path=/proc/sys/${setting%=*}
    echo "${setting#*=}" > "$(tr . / <<< "$path")"
done
echo ready
# As process 1 it also reaps what loses its parent; bash does that while it waits.
while :; do sleep 3600 & wait $! || true; done
