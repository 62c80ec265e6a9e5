"""GPU measurements that a user can repeat: `python -m benchmarks.attention --help`, from the repository's root."""
