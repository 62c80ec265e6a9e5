"""The pictures of these workflows in the template browser: drawn, since no model is at hand that could make their frames."""

from html import escape

SIZE = {"width": 800, "height": 500}
SIDE = 14  # blocks along a side of the two small maps
# workflow: (what goes in, the model, how it is run, what comes out)
CARDS = {
    "MiniMax H3 image to video": ("image + text", "MiniMax H3", "turbo LoRA, 8 steps", "video + sound"),
    "MiniMax H3 text to video": ("text", "MiniMax H3", "turbo LoRA, 8 steps", "video + sound"),
    "MiniMax H3 references to video": ("images + text", "MiniMax H3", "turbo LoRA, 4 steps", "video + sound"),
    "LTX-2.5 image to video": ("image + text", "LTX-2.5", "distilled, 8 + 3 steps", "video + sound"),
    "LTX-2.3 image to video": ("image + text", "LTX-2.3", "distilled LoRA, 8 + 3 steps", "video + sound"),
    "Wan 2.2 image to video": ("image + text", "Wan 2.2 14B", "4-step LoRAs, 2 + 2 steps", "video"),
}
STYLE = """
body { margin: 0; background: #15181d; color: #e8ecf2; font: 24px/1.35 "DejaVu Sans", Arial, sans-serif; }
main { box-sizing: border-box; width: 800px; height: 500px; padding: 34px 40px; }
h1 { margin: 0; font-size: 40px; } p { margin: 4px 0 26px; color: #9fb0c4; }
.way { display: flex; align-items: center; gap: 12px; margin-bottom: 30px; }
.way b { padding: 9px 16px; border-radius: 12px; background: #273142; font-weight: 600; white-space: nowrap; }
.way i { font-style: normal; color: #9fb0c4; }
.maps { display: flex; gap: 24px; align-items: center; } .maps span { display: block; font-size: 21px; }
.maps small { display: block; color: #9fb0c4; font-size: 18px; } figure { margin: 0; display: flex; gap: 16px; align-items: center; }
svg { flex: none; width: 190px; height: 190px; background: #0d0f13; }
"""


def card(name):
    """HTML of a workflow's picture, SIZE pixels large."""
    given, model, how, made = map(escape, CARDS[name])
    return f"""<style>{STYLE}</style><main><h1>{escape(name)}</h1><p>{how}</p>
<div class="way"><b>{given}</b><i>&#8594;</i><b>{model}</b><i>&#8594;</i><b>{made}</b></div>
<div class="maps"><figure>{blocks(lambda row, column: True, "#f0b429")}<figcaption><span>dense</span>
<small>every block</small></figcaption></figure><figure>{blocks(is_kept, "#2f7fd6")}<figcaption><span>SLA2</span>
<small>the relevant blocks,<br>the rest linear</small></figcaption></figure></div></main>"""


def is_kept(row, column):
    """A pattern like those of routing maps: what is near in time, and a few blocks further away."""
    return abs(row - column) < 1 or (3 * row + 5 * column) % 23 == 0


def blocks(kept, colour):
    cells = [
        f'<rect x="{12 * column + 1}" y="{12 * row + 1}" width="10" height="10" fill="{colour}"/>'
        for row in range(SIDE) for column in range(SIDE) if kept(row, column)
    ]  # fmt: skip
    return f'<svg viewBox="0 0 {12 * SIDE} {12 * SIDE}">{"".join(cells)}</svg>'
