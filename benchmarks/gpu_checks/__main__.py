"""What only a GPU can show: each check says "ok" and what it saw, or "FAILED" and why; the exit code is 1 if one failed.

    python -m benchmarks.gpu_checks                      the operator; with two GPUs of one model also the second of them
    python -m benchmarks.gpu_checks --comfyui PATH       also ComfyUI's own Wan class with the miniature's weights:
                                                         torch.compile of the whole model, memory that really runs out,
                                                         and dynamic VRAM; with two GPUs also on the second one
    python -m benchmarks.gpu_checks --only "second GPU"  one group of checks
    python -m benchmarks.gpu_checks --rtx                the operator's forward pass in the instructions of an RTX 40, on an
                                                         H100 or H200 (see benchmarks/consumer_imitation.py)

Needs no checkpoint but the miniature's. Checks of the operator that a CPU can make are in tests/.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch

from tooling.comfyui import find_comfyui

from ..consumer_imitation import CARDS, Imitation
from ..measure import environment
from . import in_comfyui, operator_alone, second_gpu
from .checks import run

# in this order: the operator's first check needs a fresh process, ComfyUI's last one changes ComfyUI for good
GROUPS = {"operator": operator_alone, "second GPU": second_gpu, "ComfyUI": in_comfyui}


def group_name(text):
    if text not in GROUPS:
        raise argparse.ArgumentTypeError(f"there is no group {text!r}: the groups are {', '.join(GROUPS)}.")
    return text


def parse(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_checks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--comfyui", nargs="?", const=find_comfyui()[1], type=Path, help="folder of a ComfyUI checkout")
    parser.add_argument("--only", metavar="GROUP", type=group_name, help=f"one of: {', '.join(GROUPS)}")
    parser.add_argument("--rtx", action="store_true", help="the forward pass in an RTX 40's instructions, alone")
    args = parser.parse_args(argv)
    if args.rtx and (args.only or args.comfyui):
        parser.error("--rtx runs alone, without --only and --comfyui: the process compiles for that card from then on.")
    if args.comfyui is not None and not (args.comfyui / "comfy" / "model_base.py").is_file():
        parser.error(f"{args.comfyui} is no ComfyUI checkout: comfy/model_base.py is missing.")
    return args


def main(argv=None):
    """Runs the groups that can run here and says why others do not; 1 where a check failed, else 0."""
    args = parse(argv)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_checks needs an NVIDIA GPU: this machine has none that PyTorch can use.")
    print(", ".join(f"{name} {value}" for name, value in environment("cuda").items()), flush=True)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        # empty, so that the first call compiles; Triton reads the variable then
        os.environ["TRITON_CACHE_DIR"] = folder
        if args.rtx:
            return 1 if run(_in_rtx_code()) else 0
        for name in [args.only] if args.only else GROUPS:
            reason = GROUPS[name].missing(args.comfyui)
            if reason and args.only:
                sys.exit(f"NOT RUN {name}: {reason}.")
            if reason:
                print(f"NOT RUN {name}: {reason}.", flush=True)
            else:
                failed += run(GROUPS[name].checks(args.comfyui))
    return 1 if failed else 0


def _in_rtx_code():
    """The checks of the forward pass, which from now on is compiled for an RTX 40."""
    if torch.cuda.get_device_capability()[0] != 9:
        sys.exit(
            f"--rtx needs an H100 or H200, and this is {torch.cuda.get_device_name()}: check an RTX card without it."
        )
    Imitation(CARDS[89]).begin()
    return operator_alone.forward_checks()


if __name__ == "__main__":
    sys.exit(main())
