"""Dense attention, so that the GPU is shared with another process: python -m benchmarks.gpu_checks.busy

Says "busy" again and again: it ends when nobody can read that any more, or when another_process() of operator_alone.py ends it.
"""

import torch
import torch.nn.functional as F

CALLS = 10  # under way at a time


def main():
    q, k, v = (torch.randn(1, 12, 32_760, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    while True:
        for _ in range(CALLS):
            F.scaled_dot_product_attention(q, k, v)
        torch.cuda.synchronize()
        print("busy", flush=True)


if __name__ == "__main__":
    main()
