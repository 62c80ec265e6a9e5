"""What the demo generates: sizes, steps, caption."""

from dataclasses import dataclass

CAPTION = "two red balls bounce over tiles, camera still"
SHIFT = 8.0  # ComfyUI's default for Wan2.1


@dataclass(frozen=True)
class Plan:
    """What the demo generates. minimum_tokens 0: sparse however short the sequence is.

    In the miniature's first layer the first query block decides the first frame's colour: sparse there, it is another one.
    """

    device: str
    frames: int
    height: int
    width: int
    steps: int
    sparsity: float
    cfg: float = 3.0
    seed: int = 7
    minimum_tokens: int = 0
    dense_layers: tuple = (0,)
    fps: int = 16

    @property
    def tokens(self):
        """Tokens of the self-attention: 4 frames, 16 x 16 pixels each."""
        return (1 + (self.frames - 1) // 4) * (self.height // 16) * (self.width // 16)


def plan_for(device, steps=None, tiny=False):
    """The demo on "cpu" (1,300 tokens, skips 75%) or "cuda" (8,400 tokens, skips 90%). tiny: 192 tokens, for a trial.

    Both have a number of frames that the miniature was trained at, which it needs for the first frame (a latent frame of its
    own kind); on a CPU, where 1,300 tokens are the limit, the pictures are smaller than any that it saw.
    """
    if tiny:
        return Plan(device, frames=9, height=128, width=128, steps=steps or 2, sparsity=0.75)
    if device == "cpu":
        return Plan(device, frames=49, height=160, width=160, steps=steps or 20, sparsity=0.75)
    return Plan(device, frames=81, height=320, width=320, steps=steps or 30, sparsity=0.9)
