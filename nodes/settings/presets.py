"""Presets of SLA2 Apply Attention, as data. A preset fills in sparsity and schedule; every other widget stays as it is.
*automatic* does so as each run begins, see automatic.py. *constant quality* fills in target_error where the widget is 0.

``measured`` is the figure in docs/QUALITY.md, on the miniature at 32,760 tokens beside a dense run of as many steps; None if there
is none yet. The report says which. In distilled models of 4 to 8 steps, each step is an eighth to a quarter of the run: their
presets keep the first step dense (in "fast" at 90%), by its number instead of a share of the run.
"""

from dataclasses import dataclass

from .values import MEASURING_RATIO_MODES

AUTOMATIC_PRESET, CUSTOM = "automatic", "custom"


@dataclass(frozen=True)
class Preset:
    """steps: sampling steps it is meant for. trained: whether it needs a trained router (or SLA weights).

    target_error: attention error that the run holds, in place of the sparsity; 0: none.
    """

    name: str
    steps: str
    sparsity: float
    schedule: str = ""
    trained: bool = False
    target_error: float = 0.0
    measured: str | None = None


PRESETS = (
    Preset(
        "quality", "20-50", 0.80, "0%-20%: dense", measured="20 steps: 6 of 6 videos right, SSIM 0.99, PSNR 32.9 dB"
    ),
    Preset(
        "balanced", "20-50", 0.90, "0%-10%: dense", measured="20 steps: 5 of 6 videos right, SSIM 0.98, PSNR 29.3 dB"
    ),
    Preset(
        "fast",
        "20-50",
        0.97,
        "0%-10%: 0.9 -> 0.97",
        trained=True,
        measured="20 steps: 2 of 6 videos right, SSIM 0.93, PSNR 21.7 dB",
    ),
    Preset(
        "quality, 4-8 steps",
        "4-8",
        0.80,
        "step 1: dense",
        measured="8 steps: 6 of 6 videos right, SSIM 0.99, PSNR 33.0 dB; 4 steps: 6 of 6 videos right, SSIM 0.99, PSNR 34.7 dB",
    ),
    Preset(
        "balanced, 4-8 steps",
        "4-8",
        0.90,
        "step 1: dense",
        measured="8 steps: 5 of 6 videos right, SSIM 0.98, PSNR 30.6 dB; 4 steps: 6 of 6 videos right, SSIM 0.99, PSNR 32.9 dB",
    ),
    Preset(
        "fast, 4-8 steps",
        "4-8",
        0.95,
        "step 1: 0.9",
        trained=True,
        measured="8 steps: 5 of 6 videos right, SSIM 0.95, PSNR 26.2 dB; 4 steps: 5 of 6 videos right, SSIM 0.96, PSNR 27.8 dB",
    ),
    # between the errors of 0.90 and 0.97 at 32,760 tokens (docs/QUALITY.md)
    Preset(
        "constant quality",
        "4-50",
        0.90,
        "0%-10%: dense",
        target_error=0.12,
        measured="20 steps: 6 of 6 videos right, SSIM 0.97, PSNR 28.2 dB; 8 steps: 5 of 6 videos right, SSIM 0.98, PSNR 30.6 dB; "
        "4 steps: 5 of 6 videos right, SSIM 0.99, PSNR 33.5 dB",
    ),
)
NAMES = (AUTOMATIC_PRESET, CUSTOM, *(preset.name for preset in PRESETS))


def preset_named(name):
    """The Preset, or None for "custom" and "automatic"; raises ValueError with one sentence."""
    if name in (AUTOMATIC_PRESET, CUSTOM):
        return None
    found = next((preset for preset in PRESETS if preset.name == name), None)
    if found is None:
        raise ValueError(f"preset must be one of {', '.join(NAMES)}, got {name!r}.")
    return found


def check_preset(name, method, ratio_mode=None, has_sla=False):
    """Raises ValueError with one sentence where there is no such preset, or none that goes with the other inputs.

    ratio_mode: None where it is not known yet. has_sla: whether weights of SLA (version 1) are connected.
    """
    preset = preset_named(name)
    if name == AUTOMATIC_PRESET and method == "top-k only":
        raise ValueError(
            'method "top-k only" needs the sparsity that its LoRA was distilled with, which the preset automatic cannot know: '
            "set preset to custom, and sparsity."
        )
    if preset is None or not preset.target_error:
        return
    if method == "top-k only" or ratio_mode not in (None, *MEASURING_RATIO_MODES):
        raise ValueError(
            f'the preset "{name}" needs calls that measure their error: set ratio_mode to fitted or learned and method to '
            "automatic or sla2, or choose another preset."
        )
    if has_sla:
        raise ValueError(
            f'the preset "{name}" has no part in SLA (version 1): choose another, or take sla_weights out.'
        )


def preset_notes(preset, router, sla_weights=None):
    """Sentences for the report on what a preset rests on."""
    if preset is None:
        return []
    state = (
        f"was measured on the miniature alone ({preset.measured})" if preset.measured else "has not been measured yet"
    )
    notes = [f'the preset "{preset.name}" {state}: compare with a dense run']
    if preset.trained and router is None and sla_weights is None:
        notes.append(f'the preset "{preset.name}" is meant for a trained router, and none is connected')
    return notes
