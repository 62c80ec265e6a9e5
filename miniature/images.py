"""Pictures of videos: a contact sheet as PNG (no library needed) or JPEG, and an animated WebP (both need Pillow)."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import torch


def to_bytes(video: torch.Tensor) -> torch.Tensor:
    """(3, F, H, W) in [-1, 1] -> (F, H, W, 3) uint8 on the CPU."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu()


def contact_sheet(videos: list[torch.Tensor], columns: int = 8, shrink: int = 2) -> torch.Tensor:
    """(H, W, 3) uint8: one row per video, `columns` frames spread over its length, each side divided by `shrink`."""
    rows = []
    for video in videos:
        moments = torch.linspace(0, video.shape[1] - 1, columns).round().long()
        frames = torch.nn.functional.avg_pool2d(video[:, moments].float().transpose(0, 1), shrink)
        frames = torch.nn.functional.pad(frames, (2, 2, 2, 2), value=1.0)
        rows.append(torch.cat(list(to_bytes(frames.transpose(0, 1))), 1))
    return torch.cat(rows, 0)


def write_png(path: Path | str, image: torch.Tensor) -> None:
    """Write (H, W, 3) uint8."""
    height, width, _ = image.shape
    rows = image.contiguous().numpy()
    raw = b"".join(b"\0" + rows[y].tobytes() for y in range(height))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 6)) + chunk(b"IEND", b"")
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def write_jpg(path: Path | str, image: torch.Tensor, quality: int = 88) -> None:
    """Write (H, W, 3) uint8."""
    from PIL import Image

    Image.fromarray(image.numpy()).save(path, quality=quality, optimize=True)


def write_webp(path: Path | str, video: torch.Tensor, fps: int = 24, quality: int = 80) -> None:
    """Write (3, F, H, W) in [-1, 1] as an endless animation."""
    from PIL import Image

    frames = [Image.fromarray(frame.numpy()) for frame in to_bytes(video)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0, quality=quality)
