"""GPU measurements that a user can repeat: `python -m benchmarks.forward --help`, from the repository's root."""
