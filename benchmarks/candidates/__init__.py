"""Kernels that may replace one of the package's, once a card has shown that they are right and faster."""
