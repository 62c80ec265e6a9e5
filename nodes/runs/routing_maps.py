"""Which key blocks each query block picked: kept for a few steps of a run, and only if an SLA2 Report is in the prompt.

A map is the share of heads that pick a key block, (query blocks, key blocks), shrunk to at most SIZE on a side. All maps of
a run become one picture for the page: a row of tiles per layer, a column per step.
"""

import os
import threading
import uuid

import numpy as np
import torch

from ...sla2_kernels import K_BLOCK, select_key_blocks
from ...sla2_kernels.router import block_count
from ..compat.recording import lasting_tensors
from ..page.events import running_prompt

SIZE = 192
MAPS_PER_RUN = 5  # steps, spread over the run
LOOKER = "SLA2Report"
_saving = threading.Lock()


def wanted_maps():
    """RoutingMaps for a run of the prompt that executes now, or None where no SLA2 Report is in it."""
    prompt = running_prompt()
    return RoutingMaps() if prompt and LOOKER in prompt.class_types else None


class RoutingMaps:
    """Maps of one run by (layer, step). Several threads may write (MultiGPU)."""

    def __init__(self):
        self.shares = {}
        self.grid = None
        self.tokens = None
        self.file = None
        self._step = None
        self._sigmas = None
        self._rooms = {}  # by layer and device: float32 (SIZE * SIZE,), memory for the next map
        self._lock = threading.Lock()

    @torch.no_grad()
    def begin_step(self, sigmas, sample_sigmas):
        """Finds out which sampling step this is: one read of the device per step."""
        if sigmas is None or sample_sigmas is None:
            self._step = None
        elif sigmas is not self._sigmas:
            self._sigmas = sigmas
            steps = max(1, len(sample_sigmas) - 1)
            distance = (sample_sigmas[:steps].float().cpu() - float(sigmas.max())).abs()
            step = int(distance.argmin())
            kept = {round(number * (steps - 1) / (MAPS_PER_RUN - 1)) for number in range(MAPS_PER_RUN)}
            self._step = step if step in kept else None

    def prepare(self, layers, device):
        """Allocates the maps of a step's ``layers``, outside of any model call."""
        with self._lock:
            for layer in layers if self._step is not None else ():
                if (layer, self._step) not in self.shares:
                    self._room(layer, device)

    def _room(self, layer, device):
        if (layer, device) not in self._rooms:
            with lasting_tensors():
                self._rooms[layer, device] = torch.empty(SIZE * SIZE, device=device)
        return self._rooms[layer, device]

    @torch.no_grad()
    def see(self, layer, part, weights, sparsity, precision):
        """The first sparse call of a layer in a kept step is routed once more, for its map: VideoPart, CallWeights; ``precision`` is that of the call."""
        key = (layer, self._step)
        with self._lock:
            if self._step is None or key in self.shares:
                return
            self.shares[key] = None
            room = self._room(layer, part.q.device)
            del self._rooms[layer, part.q.device]
        options = {"layout": part.layout, "keep_diagonal": weights.keep_diagonal and part.queries_are_keys}
        options |= {"sparsity": sparsity, "query_block": weights.query_block_of(part.q, precision)}
        picked = select_key_blocks(part.q, part.video_k, weights.proj_q, weights.proj_k, **options)
        self.tokens = part.q.shape[part.token_axis]
        key_blocks = block_count(part.video_k.shape[part.token_axis], K_BLOCK)
        share = shrunk(pick_shares(picked, key_blocks))
        self.shares[key] = room[: share.numel()].view(share.shape).copy_(share)

    def close(self):
        """Brings the maps to the CPU."""
        self._sigmas = None
        self._rooms.clear()
        shares = {key: share for key, share in self.shares.items() if share is not None}
        self.shares = {key: share.to("cpu", copy=True) for key, share in shares.items()}

    @property
    def layers(self):
        return sorted({layer for layer, _ in self.shares})

    @property
    def steps(self):
        return sorted({step for _, step in self.shares})

    def atlas(self):
        """Grey picture (layers * height, steps * width) uint8; in each tile the block picked most often is white."""
        height, width = next(iter(self.shares.values())).shape
        picture = np.zeros((len(self.layers) * height, len(self.steps) * width), dtype=np.uint8)
        for (layer, step), share in self.shares.items():
            if share.shape != (height, width):
                continue
            row, column = self.layers.index(layer) * height, self.steps.index(step) * width
            bright = share.float() / share.max().clamp_min(1e-6).float()
            picture[row : row + height, column : column + width] = (bright.sqrt() * 255).round().to(torch.uint8).numpy()
        return picture

    def for_page(self, folder):
        """What web/js draws from, with the picture saved once in ``folder`` (ComfyUI's for temporary files); None without maps."""
        if not self.shares:
            return None
        with _saving:
            if self.file is None:
                from PIL import Image

                self.file = f"sla2_routing_{uuid.uuid4().hex}.png"
                os.makedirs(folder, exist_ok=True)
                Image.fromarray(self.atlas()).save(os.path.join(folder, self.file), optimize=True)
        height, width = next(iter(self.shares.values())).shape
        return {
            # a level deeper than a result: clients list whatever names a file at this place as one, before the videos
            "file": {"filename": self.file, "subfolder": "", "type": "temp"},
            "layers": self.layers,
            "steps": self.steps,
            "tile": [width, height],
            "frames": self.grid[0] if self.grid else None,
            "tokens": self.tokens,
        }


def pick_shares(picked, key_blocks):
    """picked: (B, H, T_m, n) indices of key blocks -> (T_m, key_blocks) float32, the share of heads that pick each."""
    rows = picked.shape[2]
    flat = picked.permute(2, 0, 1, 3).reshape(rows, -1).long()
    counts = torch.zeros(rows, key_blocks, device=picked.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=counts.dtype))
    return counts / (picked.shape[0] * picked.shape[1])


def shrunk(share):
    """At most SIZE on a side: the mean of the blocks that fall together."""
    rows, columns = share.shape
    size = (min(rows, SIZE), min(columns, SIZE))
    return share if size == (rows, columns) else torch.nn.functional.adaptive_avg_pool2d(share[None], size)[0]
