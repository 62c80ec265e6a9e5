"""The loss of every layer over a training, drawn with Pillow."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

SIZE = (720, 400)
LEFT, TOP, RIGHT, BOTTOM = 64, 34, 16, 44
BACKGROUND, GRID, TEXT, MEAN = (24, 26, 31), (58, 62, 72), (206, 210, 218), (255, 255, 255)
FIRST_LAYER, LAST_LAYER = (84, 160, 255), (255, 140, 90)


TITLE = "SLA2 router training: loss by layer (share of the output's energy)"


def plot_losses(losses, title=TITLE):
    """losses: {layer: [loss per optimisation step]} -> ComfyUI IMAGE (1, 400, 720, 3) float32; logarithmic loss axis.

    A single curve is named by its key.
    """
    image = Image.new("RGB", SIZE, BACKGROUND)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    curves = {layer: smooth(values) for layer, values in sorted(losses.items()) if values}
    draw.text((LEFT, 10), title, fill=TEXT, font=font)
    if curves:
        _draw_curves(draw, font, curves)
    pixels = np.asarray(image, dtype=np.float32) / 255
    return torch.from_numpy(pixels)[None]


def _draw_curves(draw, font, curves):
    steps = max(len(values) for values in curves.values())
    positive = [value for values in curves.values() for value in values if value > 0] or [1.0]
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    high = max(high, low + 1)

    def place(step, value):
        x = LEFT + (SIZE[0] - LEFT - RIGHT) * step / max(1, steps - 1)
        share = (math.log10(max(value, 10.0**low)) - low) / (high - low)
        return x, SIZE[1] - BOTTOM - (SIZE[1] - TOP - BOTTOM) * share

    for power in range(low, high + 1):
        y = place(0, 10.0**power)[1]
        draw.line([(LEFT, y), (SIZE[0] - RIGHT, y)], fill=GRID)
        draw.text((8, y - 6), f"{10.0**power:g}", fill=TEXT, font=font)
    draw.text((LEFT, SIZE[1] - BOTTOM + 8), "step 1", fill=TEXT, font=font)
    draw.text((SIZE[0] - RIGHT - 60, SIZE[1] - BOTTOM + 8), f"step {steps}", fill=TEXT, font=font)
    layers = list(curves)
    for number, layer in enumerate(layers if len(layers) > 1 else ()):
        colour = _between(FIRST_LAYER, LAST_LAYER, number / max(1, len(layers) - 1))
        _curve(draw, place, curves[layer], colour, 1)
    _curve(draw, place, _mean(curves.values(), steps), MEAN, 3)
    legend = ((FIRST_LAYER, f"layer {layers[0]}"), (LAST_LAYER, f"layer {layers[-1]}"), (MEAN, "mean of all layers"))
    if len(layers) == 1:
        legend = ((MEAN, str(layers[0])),)
    for number, (colour, name) in enumerate(legend):
        draw.text((LEFT + 150 * number, SIZE[1] - 20), name, fill=colour, font=font)


def _curve(draw, place, values, colour, width):
    points = [place(step, value) for step, value in enumerate(values)]
    if len(points) == 1:
        points.append((points[0][0] + 2, points[0][1]))
    draw.line(points, fill=colour, width=width)


def smooth(values, weight=0.8):
    """Running mean: each step draws other query blocks, so single losses jump."""
    smoothed, kept = [], None
    for value in values:
        kept = value if kept is None else weight * kept + (1 - weight) * value
        smoothed.append(kept)
    return smoothed


def _mean(curves, steps):
    columns = ([values[step] for values in curves if step < len(values)] for step in range(steps))
    return [sum(column) / len(column) for column in columns]


def _between(first, last, share):
    return tuple(round(a + (b - a) * share) for a, b in zip(first, last, strict=True))
