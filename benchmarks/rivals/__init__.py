"""What SLA2 is compared with: other packages, for time, and other methods in plain torch, for quality."""
