"""Effects on this machine: network namespaces, netfilter, routes, files, sockets."""
