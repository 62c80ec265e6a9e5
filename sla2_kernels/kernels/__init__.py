"""The Triton kernels: one idea per file. Imported only where Triton runs."""
