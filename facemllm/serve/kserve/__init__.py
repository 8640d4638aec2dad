"""Models in KServe: what is applied to the cluster, and how a new one takes over there."""
