"""Effects on the Kubernetes API: client, informer, credentials, events."""
