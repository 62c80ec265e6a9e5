"""What a call of SLA2 in 8 bit, and one of sol_attn, must do at least on a card with mma.sync, and how long that takes by its data sheet.

An estimate: no such card was timed. Each kernel takes the longer of its bytes over the memory's rate and its matrix
products over the matrix units'; vector work, latency and what misses the caches come on top.
"""

from dataclasses import dataclass

from sla2_kernels import K_BLOCK, Q_BLOCK
from sla2_kernels.router import block_count, selected_block_count

SUM_BYTES = 2  # of a number of h_j and H_i
H200_ISSUE = 132 * 1.98e9  # as DataSheet.issue, at the clock that it ran at


@dataclass(frozen=True)
class DataSheet:
    """memory: bytes per second. rates: multiply-adds per second by format, dense, 16 bit and FP8 with FP32 accumulation.
    issue: multiprocessors times boost clock."""

    name: str
    memory: float
    rates: dict
    issue: float

    def estimate(self, kernels):
        """Milliseconds of kernels that ran on an H200, {"read", "written", "nanoseconds"} each: see consumer_table.py."""
        slower = H200_ISSUE / self.issue
        return 1000 * sum(
            max((kernel["read"] + kernel["written"]) / self.memory, kernel["nanoseconds"] * 1e-9 * slower)
            for kernel in kernels
        )


def _rates(sixteen, fp8, int8, tf32):
    tera = 1e12 / 2  # data sheets count a multiply-add as two operations
    return {"16bit": sixteen * tera, "fp8": fp8 * tera, "int8": int8 * tera, "tf32": tf32 * tera}


# GeForce cards multiply 16 bit and FP8 at half of their rate when they accumulate in FP32. NVIDIA's white papers of the
# three generations; RTX 30 has no FP8, which then runs as 16 bit.
SHEETS = (
    DataSheet("RTX 3090", 936e9, _rates(71, 71, 284, 35.6), 82 * 1.695e9),
    DataSheet("RTX 4090", 1008e9, _rates(165.2, 330.3, 660.6, 82.6), 128 * 2.52e9),
    DataSheet("RTX 5090", 1792e9, _rates(209.5, 419, 838, 104.8), 170 * 2.407e9),
)


@dataclass(frozen=True)
class Work:
    """One kernel: bytes that it moves at least, and {format: multiply-adds of its matrix products}."""

    name: str
    bytes: float
    products: dict

    def seconds(self, sheet):
        return max(self.bytes / sheet.memory, sum(count / sheet.rates[kind] for kind, count in self.products.items()))


def sla2_work(shape, sparsity, formats, element=2):
    """[Work] of one call with a ratio per head. formats: what it multiplies in, {"pv", "sums", "scores"}: see SHEETS."""
    heads, tokens, dim = shape.batch * shape.heads, shape.tokens, shape.head_dim
    rows, blocks = block_count(tokens, Q_BLOCK), block_count(tokens, K_BLOCK)
    count = selected_block_count(sparsity, blocks)
    tensor, pairs, square = heads * tokens * dim, heads * rows * blocks, dim * dim
    pools = 4 * heads * (rows + blocks) * dim
    sums = heads * blocks * square * (1 if formats["sums"] == "int8" else SUM_BYTES)
    query_sums = heads * rows * square * SUM_BYTES
    selected = heads * rows * Q_BLOCK * count * K_BLOCK * dim
    return [
        Work("pool", 2 * tensor * element + pools, {}),
        Work("scores", pools + 4 * pairs, {formats["scores"]: 3 * pairs * dim}),
        Work("select", 5 * pairs, {}),
        Work("pack", 2 * tensor * element + 2 * tensor + sums, {"16bit": tensor * dim}),
        Work("masked sum", sums + query_sums + pairs, {formats["sums"]: pairs * square}),
        Work(
            "loop",
            2 * tensor * element + 2 * tensor + query_sums,
            {"int8": selected, "16bit": tensor * dim} | _added(formats["pv"], selected, tensor * dim),
        ),
    ]


def _added(kind, selected, linear):
    """P V's products beside Q K^T's in INT8 and the linear branch's in 16 bit."""
    return {"int8": {"int8": 2 * selected}, "16bit": {"16bit": selected + linear}, "fp8": {"fp8": selected}}[kind]


def sol_work(shape, share, element=2):
    """[Work] of sol_attn with this share of key blocks: reading Q, K, V, writing out, both products in INT8. Its pools,
    scores and top-k, which it leaves to torch, are not counted."""
    heads, tokens, dim = shape.batch * shape.heads, shape.tokens, shape.head_dim
    tensor = heads * tokens * dim
    selected = share * heads * tokens**2 * dim
    return [
        Work("pack", 3 * tensor * element + 3 * tensor, {}),
        Work("loop", 3 * tensor + tensor * element, {"int8": 2 * selected}),
    ]


def milliseconds(work, sheet):
    """Sum over the kernels, one after the other."""
    return 1000 * sum(part.seconds(sheet) for part in work)
