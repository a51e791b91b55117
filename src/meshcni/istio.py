"""Every fixed name, port, mark, path, label, annotation and variable of the contract, each with its upstream file.

The files are those of istio/istio at commit 86c9f01fd735. Imported by the plugin's fast path, so this module holds
constants and imports nothing.
"""

# --- files, directories and sockets: cni/pkg/constants/constants.go -------------------------------------------------
PLUGIN_NAME = "istio-cni"
AGENT_NAME = "install-cni"
BINARY_SOURCE_DIR = "/opt/cni/bin"
HOST_BINARY_DIR = "/host/opt/cni/bin"
HOST_CONF_DIR = "/host/etc/cni/net.d"
RUN_DIR = "/var/run/istio-cni"
KUBECONFIG_NAME = "istio-cni-kubeconfig"
LOG_SOCKET_NAME = "log.sock"
EVENT_SOCKET_NAME = "pluginevent.sock"
AGENT_SOCKET_NAME = "agent.sock"  # ours: the plugin hands ADDs over here
CONTROL_SOCKET_NAME = "control.sock"  # ours: `install-cni status` and `uninstall` ask the running agent
UNINSTALLED_MARKER_NAME = "uninstalled"  # ours: the agent is gone on purpose, ADDs pass through
PLUGIN_LOG_NAME = "istio-cni.log"
SERVICE_ACCOUNT_DIR = "/var/run/secrets/kubernetes.io/serviceaccount"
ZTUNNEL_SOCKET = "/var/run/ztunnel/ztunnel.sock"
HOST_NETNS = "/host/proc/1/ns/net"  # with ALLOW_SWITCH_TO_HOST_NS
OWN_NETNS = "/proc/self/ns/net"
STANDALONE_CONF_NAME = "YYY-istio-cni.conf"
OWNED_CONF_NAME = "02-istio-cni.conflist"
CONVERTED_NETWORK_NAME = "k8s-pod-network"  # cni/pkg/install/cniconfig.go: name given to a converted single network
CONF_CNI_VERSION = "0.3.1"  # cni/pkg/install/cniconfig.go
EVENT_PATH = "/cmdadd"
LOG_PATH = "/log"

# --- ports of the agent: cni/pkg/constants/constants.go, cni/pkg/config/config.go -------------------------------------
HEALTH_PORT = 8000
READY_PATH = "/readyz"
LIVE_PATH = "/healthz"
METRICS_PORT = 15014
CONTROLZ_PORT = 9876

# --- the DaemonSet: manifests/charts/istio-cni/templates/daemonset.yaml ----------------------------------------------
DAEMONSET_NAME = "istio-cni-node"
AGENT_POD_PREFIX = "istio-cni-node-"
REPAIR_COMPONENT = "cni-repair"  # source of the repair controller's Events
AGENT_POD_LABEL = ("k8s-app", "istio-cni-node")

# --- containers the injector makes: cni/pkg/plugin/plugin.go, pkg/config/constants -----------------------------------
PROXY_CONTAINER = "istio-proxy"
INIT_CONTAINER = "istio-init"
VALIDATION_CONTAINER = "istio-validation"
VALIDATION_EXIT_CODE = 126  # tools/istio-iptables/pkg/constants

# --- labels and annotations: istio.io/api annotation and label, cni/pkg/plugin/sidecar_redirect.go -------------------
INJECT_KEY = "sidecar.istio.io/inject"
SIDECAR_STATUS = "sidecar.istio.io/status"
INTERCEPTION_MODE = "sidecar.istio.io/interceptionMode"
INCLUDE_OUTBOUND_CIDRS = "traffic.sidecar.istio.io/includeOutboundIPRanges"
EXCLUDE_OUTBOUND_CIDRS = "traffic.sidecar.istio.io/excludeOutboundIPRanges"
INCLUDE_INBOUND_PORTS = "traffic.sidecar.istio.io/includeInboundPorts"
EXCLUDE_INBOUND_PORTS = "traffic.sidecar.istio.io/excludeInboundPorts"
INCLUDE_OUTBOUND_PORTS = "traffic.sidecar.istio.io/includeOutboundPorts"
EXCLUDE_OUTBOUND_PORTS = "traffic.sidecar.istio.io/excludeOutboundPorts"
EXCLUDE_INTERFACES = "traffic.sidecar.istio.io/excludeInterfaces"
REROUTE_VIRTUAL_INTERFACES = "istio.io/reroute-virtual-interfaces"
KUBEVIRT_INTERFACES = "traffic.sidecar.istio.io/kubevirtInterfaces"
STATUS_PORT = "status.sidecar.istio.io/port"
DATAPLANE_MODE = "istio.io/dataplane-mode"
AMBIENT_REDIRECTION = "ambient.istio.io/redirection"
REDIRECTION_ENABLED = "enabled"
REDIRECTION_PENDING = "pending"
AMBIENT_BYPASS_INBOUND = "ambient.istio.io/bypass-inbound-capture"
AMBIENT_DNS_CAPTURE = "ambient.istio.io/dns-capture"

# --- environment of the proxy container: cni/pkg/plugin/kubernetes.go, sidecar_redirect.go ---------------------------
ENV_DNS_CAPTURE = "ISTIO_META_DNS_CAPTURE"
ENV_DUAL_STACK = "ISTIO_DUAL_STACK"
ENV_DROP_INVALID = "INVALID_DROP"
ENV_DISABLE_ENVOY = "DISABLE_ENVOY"
ENV_LOOPBACK_CIDR = "ISTIO_OUTBOUND_IPV4_LOOPBACK_CIDR"
ENV_OWNER_GROUPS = "ISTIO_OUTBOUND_OWNER_GROUPS"
ENV_OWNER_GROUPS_EXCLUDE = "ISTIO_OUTBOUND_OWNER_GROUPS_EXCLUDE"
ENV_ENVOY_USER = "ENVOY_USER"

# --- sidecar redirection: tools/istio-iptables/pkg/constants/constants.go, tools/common/config/config.go --------------
PROXY_PORT = 15001
INBOUND_CAPTURE_PORT = 15006
INBOUND_TUNNEL_PORT = 15008
STATUS_PORT_NUMBER = 15020
HEALTH_CHECK_PORT = 15021
PROMETHEUS_PORT = 15090
AGENT_DNS_PORT = 15053
PROBE_PORT = 15002
ALWAYS_EXCLUDED_INBOUND_PORTS = (15020, 15021, 15090)
DEFAULT_EXCLUDED_PORT = 15020
PROXY_UID = 1337
PROXY_GID = 1337
TPROXY_MARK = 1337
OUTBOUND_MARK = 1338
TPROXY_TABLE = 133
LOOPBACK_CIDR = "127.0.0.1/32"
LOOPBACK_CIDR_V6 = "::1/128"
SELF_V4 = "127.0.0.6/32"  # source address of the proxy's own inbound connections
SELF_V6 = "::6/128"
CONNTRACK_ZONE_RESOLVER = 1  # proxy to upstream resolver
CONNTRACK_ZONE_APPLICATION = 2  # application to the proxy's DNS server
MAX_OWNER_GROUPS = 64

IPTABLES_CHAIN_PREFIX = "ISTIO"
NFT_TABLE_PREFIX = "istio-proxy-"  # tools/istio-nftables/pkg/constants

# --- ambient redirection: cni/pkg/iptables, cni/pkg/nftables, cni/pkg/config, cni/pkg/nodeagent -----------------------
ZTUNNEL_OUTBOUND_PORT = 15001
ZTUNNEL_INBOUND_PLAINTEXT_PORT = 15006
ZTUNNEL_INBOUND_PORT = 15008
ZTUNNEL_DNS_PORT = 15053
ZTUNNEL_MARK = 0x539  # on the packets of ztunnel's own sockets
AMBIENT_TPROXY_MARK = 0x111
AMBIENT_MARK_MASK = 0xFFF
AMBIENT_RULE_PRIORITY = 32764
AMBIENT_TABLE = 100
PROBE_SNAT_V4 = "169.254.7.127"
PROBE_SNAT_V6 = "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"
PROBE_SET_V4 = "istio-inpod-probes-v4"
PROBE_SET_V6 = "istio-inpod-probes-v6"
AMBIENT_HOST_CHAIN = "ISTIO_POSTRT"
AMBIENT_NFT_TABLE_PREFIX = "istio-ambient-"
SYSTEM_NAMESPACE = "istio-system"  # of the control plane, unless a setting names another
ZTUNNEL_LABEL = ("app", "ztunnel")  # of ztunnel's own pod, in SYSTEM_NAMESPACE
HOST_ROOT = "/host"  # where the chart mounts parts of the host
HOST_PROC = "/host/proc"
HOST_NETNS_DIR = "/host/var/run/netns"  # the runtime's bound network namespaces
