"""What each self-attention call of a run would have had for an error at every rung of a ladder of sparsities, over all rows.

benchmarks.target_error --record writes these files. From them a choice of sparsities can be replayed without a GPU and without
the model: the error over all rows, and what rows drawn at random would have said of it, with a ratio of any age.
"""

from dataclasses import dataclass

import torch
from safetensors.torch import save_file

from sla2_kernels import sla2_attention
from sla2_kernels.fitted_attention import FITTED_ROWS, SAMPLE_ROWS, sample_rows
from sla2_kernels.support import default_precision

RUNGS = (0.996, 0.993, 0.99, 0.985, 0.98, 0.97, 0.96, 0.94, 0.92, 0.89, 0.85, 0.8, 0.7, 0.5, 0.2)
DRAWS = 4  # of SAMPLE_ROWS rows, the same for both halves of guidance
SCALE = 64.0  # of what is kept in float16


@dataclass
class Recording:
    """Filled by see(), in float32 on the host.

    energy: (steps, halves, layers, heads), squared norm of dense attention. products: (..., rungs, heads, 3), sums over all rows
    of |O - O_l|^2, <O - O_l, O_s - O_l> and |O_s - O_l|^2, from which the squared error at any ratio follows. ratio: (..., rungs,
    draws, heads), fitted on the first FITTED_ROWS rows of a draw. row_error: (..., rungs, draws, heads, rows), float16, squared
    errors at these ratios over the mean energy of a row, times SCALE; row_energy: (..., draws, heads, rows), the same.
    """

    steps: int
    layers: int
    heads: int
    tokens: int
    rungs: tuple[float, ...] = RUNGS

    def __post_init__(self):
        calls, sizes = (self.steps, 2, self.layers), (len(self.rungs), DRAWS, self.heads)
        self.energy = torch.zeros(*calls, self.heads)
        self.products = torch.zeros(*calls, len(self.rungs), self.heads, 3)
        self.ratio = torch.zeros(*calls, *sizes)
        self.row_error = torch.zeros(*calls, *sizes, SAMPLE_ROWS, dtype=torch.float16)
        self.row_energy = torch.zeros(*calls, *sizes[1:], SAMPLE_ROWS, dtype=torch.float16)

    @torch.no_grad()
    def see(self, step, half, layer, q, k, v, exact):
        """q, k, v, exact: (1, N, H, D) of one call; ``exact`` is dense attention."""
        call = step, half, layer
        numbers = [((step + 1000 * draw) << 20) + layer for draw in range(DRAWS)]
        rows = torch.stack([sample_rows(self.tokens, number, q.device) for number in numbers]).long()  # (draws, R)
        exact = exact[0].float()
        of_rows = exact.square().sum(dim=-1)  # (N, H)
        energy = of_rows.sum(dim=0, dtype=torch.float64)
        mean = (energy / self.tokens).float()[None, :, None]
        self.row_energy[call] = _packed(of_rows[rows].transpose(1, 2) / mean)
        self.energy[call] = energy.float().cpu()
        for rung, sparsity in enumerate(self.rungs):
            products = self._products(q, k, v, exact, sparsity)  # (3, N, H)
            self.products[call][rung] = products.sum(dim=1, dtype=torch.float64).T.float().cpu()
            some = products[:, rows].transpose(2, 3)  # (3, draws, H, R)
            target, cross, square = some
            ratio = (cross[..., :FITTED_ROWS].sum(-1) / square[..., :FITTED_ROWS].sum(-1)).nan_to_num(1.0).clamp(0, 1)
            self.ratio[call][rung] = ratio.cpu()
            at = ratio[..., None]
            self.row_error[call][rung] = _packed((target - 2 * at * cross + at**2 * square) / mean)

    @staticmethod
    def _products(q, k, v, exact, sparsity):
        options = {
            "sparsity": sparsity,
            "layout": "BNHD",
            "keep_diagonal": True,
            "precision": default_precision(q.device),
        }
        o_linear, o_sparse = (
            sla2_attention(q, k, v, alpha=torch.full((q.shape[2],), ratio, device=q.device), **options)[0].float()
            for ratio in (0.0, 1.0)
        )
        target, step = exact - o_linear, o_sparse - o_linear
        return torch.stack([(a * b).sum(dim=-1) for a, b in ((target, target), (target, step), (step, step))])

    def save(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        names = ("energy", "products", "ratio", "row_error", "row_energy")
        facts = {"rungs": " ".join(map(str, self.rungs)), "tokens": str(self.tokens)}
        save_file({name: getattr(self, name) for name in names}, path, metadata=facts)


def _packed(x):
    return (SCALE * x).clamp(max=60000).to(torch.float16).cpu()
