"""A real Kubernetes node on this machine: containerd, CNI plugins, our agent and Envoy in namespaces of their own.

Used by the node tier of the tests, by the demo and by the benchmark. Nothing here is part of what gets installed.
"""
