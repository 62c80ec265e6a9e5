"""One picture of the two videos: frames of the dense one above, of SLA2's below."""

import torch

from miniature.images import contact_sheet, write_png

NAME = "comparison.png"


def read_video(path):
    """(3, F, H, W) float32 in [-1, 1] of a video file or an animated picture."""
    frames = _animation(path) if path.suffix == ".webp" else _video(path)
    return torch.stack(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def _animation(path):
    import numpy as np
    from PIL import Image, ImageSequence

    with Image.open(path) as image:
        return [torch.from_numpy(np.array(frame.convert("RGB"))) for frame in ImageSequence.Iterator(image)]


def _video(path):
    import av

    with av.open(str(path)) as container:
        return [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def write(folder, videos):
    """Writes ``comparison.png`` of the files named in ``videos`` (dense, SLA2) to ``folder``."""
    write_png(folder / NAME, contact_sheet([read_video(folder / name) for name in videos], columns=6, shrink=1))
