"""What the groups share. A check is a function that returns what it saw, and raises CheckFailed where that is wrong."""

import traceback

import torch

# as in docs: relative error against float64 on data without structure
BOUNDS = {"16bit": 1e-2, "int8": 6e-2, "fp8": 1e-1}


class CheckFailed(AssertionError):
    """A check saw something else than it must."""


def require(condition, what):
    if not condition:
        raise CheckFailed(what)


def random_qkv(tokens, heads, head_dim=128, dtype=torch.bfloat16, seed=0, batch=1):
    """q, k, v (B, N, H, D) on the current GPU, in the layout that ComfyUI hands over."""
    generator = torch.Generator(device="cuda").manual_seed(seed)
    return tuple(
        torch.randn(batch, tokens, heads, head_dim, device="cuda", dtype=dtype, generator=generator) for _ in range(3)
    )


def relative_error(out, expected):
    return ((out.double() - expected).norm() / expected.norm()).item()


def no_second_gpu():
    """None where PyTorch sees two GPUs of one model, else why that is not so."""
    names = [torch.cuda.get_device_name(i) for i in range(min(2, torch.cuda.device_count()))]
    if len(names) < 2:
        return f"it needs two GPUs of one model, and PyTorch sees {len(names)}"
    return None if names[0] == names[1] else f"it needs two GPUs of one model, and these are {names[0]} and {names[1]}"


def run(checks):
    """Runs and says each; the names of those that failed."""
    failed = []
    for check in checks:
        name = check.__name__.replace("_", " ")
        try:
            print(f"ok      {name}: {check()}", flush=True)
        except Exception as error:
            failed.append(name)
            if not isinstance(error, CheckFailed):
                traceback.print_exc()
            print(f"FAILED  {name}: {type(error).__name__}: {error}", flush=True)
        torch.cuda.empty_cache()
    return failed
