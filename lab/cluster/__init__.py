"""A real Kubernetes on one machine, for tests and demos: control plane and nodes in namespaces of their own.

    from lab.cluster import Cluster, workloads
    with Cluster(nodes=2) as cluster:                       # two Ready nodes
        cluster.apply([workloads.namespace("shop"), workloads.plain_pod("shop", "cart")])
        cluster.wait_ready("shop", count=1)
        print(cluster.kubectl("get", "pods", "-A", "-o", "wide"))

Needs root, scripts/setup and scripts/build-kubernetes; nothing of the host is changed, whatever ends the process that
holds the cluster ends the cluster too, and `python -m lab.clean` removes the folders and cgroups it then leaves. Any
number of clusters may run at once: they share neither network nor names. `python -m lab.cluster` is the command line.

- `Cluster`: the whole. `api` (a JSON client, no process per call), `kubectl`, `helm`, `apply`, `wait_…`,
  `import_image`, `install_agent`, `install_manifest`, `stop_api_server`, `capture`, `verdict`.
- `KubeNode` (`cluster.nodes["n1"]`): `run`, `path`, `pod_netns`, `agent`, `kill_agent`, `agent_alive`,
  `stop_kubelet`, `stop_containerd`, `power_loss`, `start(order=…)`, `write_conflist`.
- Logs of all daemons: `node.log_path("kubelet")`, `cluster.control.log_path("kube-apiserver")`.

No node has a default route: a connection to `addresses.NOWHERE_V4` fails at once with "no route", unless rules in the
pod's netns redirect it. There is no DNS: use addresses.
"""

from lab.cluster import workloads
from lab.cluster.binaries import missing_binaries
from lab.cluster.capture import Captured
from lab.cluster.client import ApiClient, ApiError
from lab.cluster.cluster import Cluster
from lab.cluster.kubenode import KubeNode

__all__ = ["ApiClient", "ApiError", "Captured", "Cluster", "KubeNode", "missing_binaries", "workloads"]
