"""`istio-cni`: the plugin that the container runtime executes, frozen into one static executable."""
