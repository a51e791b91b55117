# Read by lab/init.sh in a Kubernetes node: covers with the node's own disk what daemons and pods write in.
#   node.sh DISK HYPERKUBE CHECKOUT
# The last two are shown below /run/lab, because their own place may be covered.
touch /run/lab/hyperkube
mount --bind "$2" /run/lab/hyperkube
# A process is named after the file that was started; our agent looks for a kubelet by that name.
for name in kubelet kube-proxy; do ln -s hyperkube /run/lab/$name; done
mkdir /run/lab/checkout
mount --bind "$3" /run/lab/checkout
mount -o remount,bind,ro /run/lab/checkout
for covered in etc opt var; do mount --bind "$1/$covered" "/$covered"; done
mount --bind /run/netns /run/netns
# The kubelet writes these settings of the whole machine unless they have its value: it is shown files that do.
mkdir /run/lab/sysctl
for setting in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
    kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
    shown=/run/lab/sysctl/$(tr / . <<< "${setting%=*}")
    echo "${setting#*=}" > "$shown"
    mount --bind "$shown" "/proc/sys/${setting%=*}"
done
# Services need the packets between two pods of one bridge to pass the node's rules.
for setting in /proc/sys/net/bridge/bridge-nf-call-iptables /proc/sys/net/bridge/bridge-nf-call-ip6tables; do
    [ ! -e "$setting" ] || echo 1 > "$setting"
done
# A pod that is not in the mesh shall learn at once, each time, that there is no way to an address.
for setting in /proc/sys/net/ipv4/icmp_ratelimit /proc/sys/net/ipv6/icmp/ratelimit; do echo 0 > "$setting"; done
# By this the kubelet knows, and says to the API server, that the node has been rebooted.
cat /proc/sys/kernel/random/uuid > /run/lab/boot_id
mount --bind /run/lab/boot_id /proc/sys/kernel/random/boot_id
