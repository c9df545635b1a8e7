"""What rollout servers import, in an environment of their own: this folder alone is on their path."""
