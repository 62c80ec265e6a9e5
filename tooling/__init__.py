"""What the two commands of the README are made of: run_tests.py and demo.py. Not part of the node pack."""
