"""The pictures of the workflows in the template browser: frames of the miniature for its own, else a drawing, and measured step times.

No model but the miniature is at hand to make frames; the times are those of benchmarks/results, with the card they were measured on.
"""

import base64
import json
from dataclasses import dataclass
from html import escape

from ..paths import ROOT

SIZE = {"width": 800, "height": 500}
SIDE = 14  # blocks along a side of the two small maps
FRAMES = ROOT / "docs" / "real_length.jpg"  # rows of the miniature's frames: dense, without a router, with one
RESULTS = ROOT / "benchmarks" / "results"
CALLS, STEPS = "comfyui-calls-nvidia-h200.json", "comfyui-step-nvidia-h100-80gb-hbm3.json"
DENSE = "dense, ComfyUI's default"


@dataclass(frozen=True)
class Card:
    """way: what goes in, the model, what comes out. how: it is run. times: (results file, part, SLA2's variant) or None.

    frames: the miniature's are shown in place of the drawing.
    """

    way: tuple[str, ...]
    how: str
    times: tuple[str, str, str] | None = None
    frames: bool = False


H3 = (CALLS, "MiniMax H3, int8 weights", "SLA2, skips 90%, fitted ratio")
LTX = (CALLS, "LTX-2, second stage, int8 weights", "SLA2, skips 90%, fitted ratio")
WAN_2_2 = (CALLS, "Wan 2.2 14B, 720p, int8 weights (10 of 40 blocks)", "SLA2, skips 90%, fitted ratio")
WAN_1_3B = (STEPS, "1.3B-480p", "SLA2, skips 97%, auto, estimated ratio")
WAN_14B = (STEPS, "14B-720p", "SLA2, skips 97%, auto, estimated ratio")
CARDS = {
    "First look, nothing to download": Card(("words", "the miniature", "video"), "runs on any machine", frames=True),
    "Miniature, both stages beside dense": Card(("words", "the miniature", "three videos"), "dense, router, LoRA", frames=True),
    "MiniMax H3 image to video": Card(("image + text", "MiniMax H3", "video + sound"), "turbo LoRA, 8 steps", H3),
    "MiniMax H3 text to video": Card(("text", "MiniMax H3", "video + sound"), "turbo LoRA, 8 steps", H3),
    "MiniMax H3 references to video": Card(("images + text", "MiniMax H3", "video + sound"), "turbo LoRA, 4 steps", H3),
    "LTX-2.5 image to video": Card(("image + text", "LTX-2.5", "video + sound"), "distilled, 8 + 3 steps", LTX),
    "LTX-2.3 image to video": Card(("image + text", "LTX-2.3", "video + sound"), "distilled LoRA, 8 + 3 steps", LTX),
    "Wan 2.2 image to video": Card(("image + text", "Wan 2.2 14B", "video"), "4-step LoRAs, 2 + 2 steps", WAN_2_2),
    "Wan 2.1 text to video": Card(("text", "Wan 2.1 1.3B", "two videos"), "30 steps, dense and SLA2", WAN_1_3B),
    "Wan 2.1 14B image to video": Card(("image + text", "Wan 2.1 14B", "two videos"), "30 steps, dense and SLA2", WAN_14B),
    "TurboWan 2.1 text to video (SLA)": Card(("text", "TurboWan 2.1", "video"), "trained for SLA (version 1)"),
    "Measure on this card (Wan 2.1)": Card(("text", "SLA2 Compare", "times + videos"), "is it worth it here?", WAN_1_3B),
    "Train a router (Wan 2.1)": Card(("prompts", "SLA2 Train Router", "router"), "no videos needed"),
    "Train a LoRA (Wan 2.1)": Card(("prompts", "SLA2 Train LoRA", "LoRA + router"), "no videos needed"),
}  # fmt: skip
STYLE = """
body { margin: 0; background: #15181d; color: #e8ecf2; font: 24px/1.35 "DejaVu Sans", Arial, sans-serif; }
main { box-sizing: border-box; width: 800px; height: 500px; padding: 28px 36px; }
h1 { margin: 0; font-size: 36px; white-space: nowrap; letter-spacing: -1px; } p { margin: 2px 0 20px; color: #9fb0c4; }
.way { display: flex; align-items: center; gap: 10px; margin-bottom: 22px; }
.way b { padding: 7px 14px; border-radius: 12px; background: #273142; font-weight: 600; white-space: nowrap; }
.way i { font-style: normal; color: #9fb0c4; }
.maps { display: flex; gap: 24px; align-items: center; } .maps span { display: block; font-size: 21px; }
small { display: block; color: #9fb0c4; font-size: 17px; } figure { margin: 0; display: flex; gap: 16px; align-items: center; }
svg { flex: none; width: 150px; height: 150px; background: #0d0f13; }
.frames { display: grid; grid-template-columns: 90px 1fr; gap: 8px 12px; align-items: center; }
.frames div { height: 62px; background-size: 636px auto; }
.bars { display: grid; grid-template-columns: 90px 1fr; gap: 6px 12px; margin-top: 14px; font-size: 20px; align-items: center; }
.bars div { display: flex; align-items: center; gap: 10px; } .bars div::before { content: ""; height: 20px; width: var(--w); background: var(--c); }
"""


def card(name):
    """HTML of a workflow's picture, SIZE pixels large."""
    about = CARDS[name]
    way = "<i>&#8594;</i>".join(f"<b>{escape(part)}</b>" for part in about.way)
    shown = frames() if about.frames else maps()
    return f"""<style>{STYLE}</style><main><h1>{escape(name)}</h1><p>{escape(about.how)}</p>
<div class="way">{way}</div>{shown}{bars(*about.times) if about.times else ""}</main>"""


def maps():
    return f"""<div class="maps"><figure>{blocks(lambda row, column: True, "#f0b429")}<figcaption><span>dense</span>
<small>every block</small></figcaption></figure><figure>{blocks(is_kept, "#2f7fd6")}<figcaption><span>SLA2</span>
<small>the relevant blocks,<br>the rest linear</small></figcaption></figure></div>"""


def is_kept(row, column):
    """A pattern like those of routing maps: what is near in time, and a few blocks further away."""
    return abs(row - column) < 1 or (3 * row + 5 * column) % 23 == 0


def blocks(kept, colour):
    cells = [
        f'<rect x="{12 * column + 1}" y="{12 * row + 1}" width="10" height="10" fill="{colour}"/>'
        for row in range(SIDE)
        for column in range(SIDE)
        if kept(row, column)
    ]
    return f'<svg viewBox="0 0 {12 * SIDE} {12 * SIDE}">{"".join(cells)}</svg>'


def frames():
    """The first two of the picture's three rows."""
    data = base64.b64encode(FRAMES.read_bytes()).decode()
    rows = "".join(
        f'<span>{words}</span><div style="background: url(data:image/jpeg;base64,{data}) 0 {place} / 636px auto"></div>'
        for words, place in (("dense", "0%"), ("SLA2", "50%"))
    )
    return (
        f'<div class="frames">{rows}</div><small>the miniature\'s own frames; SLA2 without a router, skips 97%</small>'
    )


def bars(file, part, variant):
    """Measured seconds per step of a part of the results, dense and with SLA2; nothing where that part was not measured."""
    found = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    seconds = {row["variant"]: row["seconds_per_step"] for row in found["rows"] if row["part"] == part}
    if DENSE not in seconds or variant not in seconds:
        return ""
    environment = found["environment"]["card"]
    rows = "".join(
        f'<span>{words}</span><div style="--c: {colour}; --w: {440 * value / seconds[DENSE]:.0f}px">{value:.3g} s</div>'
        for words, value, colour in (("dense", seconds[DENSE], "#f0b429"), ("SLA2", seconds[variant], "#2f7fd6"))
    )
    skips = next(words for words in variant.split(", ") if words.startswith("skips"))
    model = part if file == CALLS else f"Wan 2.1 {part}"
    said = f"one step of {model}, {skips}: {environment}, random weights"
    return f'<div class="bars">{rows}</div><small>{escape(said)}</small>'
