"""The part of the demo that runs inside its environment: python -m tooling.demo_inside FOLDER [--comfyui PATH]."""

import argparse
import sys
from pathlib import Path

from . import outcome
from .demo_plan import plan_for
from .environment import SetupError, say


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--comfyui", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()

    import torch

    from . import checkpoint

    for name in ("dense", "sla2", "comparison"):
        for old in options.folder.glob(f"{name}.*"):
            old.unlink()
    plan = plan_for("cuda" if torch.cuda.is_available() else "cpu", options.steps, options.tiny)
    weights = checkpoint.find_or_make(options.folder / "weights")
    say(
        f"Two videos of {plan.frames} frames, {plan.width} x {plan.height} ({plan.tokens} tokens), on the {plan.device.upper()}"
    )
    if options.comfyui is None:
        from . import diffusers_demo

        found = diffusers_demo.generate(options.folder, plan, weights)
    else:
        from . import comfyui_demo
        from .graph import GraphError
        from .server import PromptFailed

        try:
            found = comfyui_demo.generate(options.comfyui, options.folder, plan, weights)
        except (SetupError, PromptFailed, GraphError) as error:
            say(f"The demo stopped: {error}")
            return 1
    say("\n" + outcome.write(found, options.folder))
    say(f"\nEverything is in {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
