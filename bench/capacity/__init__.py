"""What many agents cost a real API server, and what one of them costs its node: `python -m bench.capacity`.

Some hundred agents are simulated by the parts of the real one that talk to the API server (client, informers, review of
rights, look-up of a pod, annotation), each with an account token and connections of its own, against etcd and a
kube-apiserver in a network namespace of their own. Kernel, runtime and ztunnel play no part.
"""
