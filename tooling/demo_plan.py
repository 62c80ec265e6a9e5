"""What the demo generates: sizes, steps, caption."""

from dataclasses import dataclass

from miniature.sample import GUIDANCE, SHIFT
from miniature.scaled import rope_scale

CAPTION = "two red balls bounce over tiles, camera still"


@dataclass(frozen=True)
class Plan:
    """What the demo generates. minimum_tokens 0: sparse however short the sequence is."""

    device: str
    frames: int
    height: int
    width: int
    steps: int
    sparsity: float
    cfg: float = GUIDANCE
    shift: float = SHIFT
    seed: int = 7
    minimum_tokens: int = 0
    dense_layers: tuple = ()
    fps: int = 16

    @property
    def tokens(self):
        """Tokens of the self-attention: 4 frames, 16 x 16 pixels each."""
        return (1 + (self.frames - 1) // 4) * (self.height // 16) * (self.width // 16)

    @property
    def rope_scale(self):
        """ScaleROPE's scale_x and scale_y: the miniature knows pictures by their positions at 480 pixels."""
        return rope_scale(self.height)


def plan_for(device, steps=None, tiny=False):
    """The demo on "cpu" (2,184 tokens) or "cuda" (32,760 tokens, skips 97%). tiny: 192 tokens, for a trial.

    Both are sizes that the miniature was trained at. On a CPU as much is skipped as gives the attention error of 97% at
    32,760 tokens (benchmarks/demo_sparsity.py).
    """
    if tiny:
        return Plan(device, frames=9, height=128, width=128, steps=steps or 2, sparsity=0.6)
    if device == "cpu":
        return Plan(device, frames=81, height=128, width=208, steps=steps or 20, sparsity=0.82)
    return Plan(device, frames=81, height=480, width=832, steps=steps or 20, sparsity=0.97)
