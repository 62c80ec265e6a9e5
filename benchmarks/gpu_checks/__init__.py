"""What only a GPU can show, in groups of checks: see __main__.py."""
