"""What time is spent on: the kernels of one call of the operator, and the parts of a model's denoising step.

Of a call: each phase's GPU time beside the least that its bytes and FLOPs would take. Kernels are told apart by name with
torch.profiler. Bytes and FLOPs are counted by formula, each input read once and each output written once; the floor is the
larger of bytes / copy rate and FLOPs / matmul rate, both measured first. Of a step: GPU events around modules, and attention
calls told apart by their keys.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch

from sla2_kernels import K_BLOCK, Q_BLOCK
from sla2_kernels.router import block_count, selected_block_count

from .inputs import make_inputs
from .measure import is_gpu, measure_ceilings, median_ms
from .ours import NO_LINEAR_BRANCH, sla2_method

# phase -> parts of kernel names, first match wins
KERNELS = (
    ("pool", ("pool", "smooth")),
    ("select", ("select", "topk", "radix")),
    ("pack", ("pack",)),
    ("mass", ("unselected_mass",)),
    ("linear", ("masked_sum", "linear", "weighted_mask")),
    ("loop", ("sparse_attention", "attend", "attention")),
    ("score", ("score", "product", "project")),
)
RUNS = 10
OVERRIDE = "optimized_attention_override"
# module attribute within a block -> part of the step
MODULES = {"self_attn": "self-attention block", "cross_attn": "cross-attention block", "ffn": "feed-forward"}
PROJECTIONS = ("q", "k", "v", "o")
NORMS = ("norm_q", "norm_k")


@dataclass(frozen=True)
class Work:
    """What one phase must do at least: bytes moved, FLOPs of matrix products, and the format they run in."""

    bytes: float = 0
    flops: float = 0
    matmul: str = "16bit"


def phase_of(kernel):
    """The phase that a kernel of this name belongs to; its own name where none does."""
    name = kernel.lower()
    return next((phase for phase, parts in KERNELS if any(part in name for part in parts)), kernel[:40])


def least_work(shape, sparsity, precision, element=2, linear=True):
    """{phase: Work} of one call; element: bytes of a number of q. linear: with the linear branch."""
    heads, tokens, dim = shape.batch * shape.heads, shape.tokens, shape.head_dim
    rows, blocks = block_count(tokens, Q_BLOCK), block_count(tokens, K_BLOCK)
    chosen = selected_block_count(sparsity, blocks)
    low = element if precision == "16bit" else 1
    tensor = heads * tokens * dim
    pools = heads * (rows + blocks) * dim * 4
    scores = heads * rows * blocks
    sums = dim * (dim + 1) if linear else 0
    projected = 2 * tensor * dim if linear else 0  # phi(K)^T V, phi(Q) H
    unit = "16bit" if precision == "16bit" else "fp8"
    return {
        "pool": Work(2 * tensor * element + pools),
        "score": Work(pools + 4 * scores, 2 * scores * dim),
        "select": Work(4 * scores + 4 * heads * rows * chosen + (element * scores if linear else 0)),
        "pack": Work(2 * tensor * (element + low) + heads * blocks * sums * element, projected),
        "mass": Work(tensor * element, 2 * heads * tokens * blocks * dim),
        "linear": Work(element * (scores + heads * (rows + blocks) * sums), 2 * scores * sums),
        "loop": Work(
            2 * tensor * (element + low) + heads * rows * sums * element,
            4 * heads * rows * Q_BLOCK * chosen * K_BLOCK * dim + projected,
            unit,
        ),
    }


def kernel_times(function, runs=RUNS):
    """{kernel name: (ms per call of ``function``, launches per call)}, by torch.profiler."""
    from torch.profiler import ProfilerActivity, profile

    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(runs):
            function()
        torch.cuda.synchronize()
    kernels = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            ms, launches = kernels.get(event.name, (0.0, 0))
            kernels[event.name] = ms + event.device_time / 1000, launches + 1
    return {name: (ms / runs, launches / runs) for name, (ms, launches) in kernels.items()}


def costliest_kernels(function, count=12):
    """[(ms, launches, name)] of the kernels that took longest during function()."""
    times = kernel_times(function, runs=1)
    return [(ms, n, name) for name, (ms, n) in sorted(times.items(), key=lambda item: -item[1][0])[:count]]


def phase_rows(times, work, ceilings):
    """[(phase, ms, launches, Work, floor ms)] in order of time; phases without a formula have an empty Work."""
    phases = {}
    for name, (ms, launches) in times.items():
        phase = phase_of(name)
        before = phases.get(phase, (0.0, 0))
        phases[phase] = before[0] + ms, before[1] + launches
    rows = []
    for phase, (ms, launches) in sorted(phases.items(), key=lambda item: -item[1][0]):
        counted = work.get(phase, Work())
        rate = ceilings.matmul.get(counted.matmul, ceilings.matmul["16bit"])
        floor = 1000 * max(counted.bytes / ceilings.copy, counted.flops / rate)
        rows.append((phase, ms, launches, counted, floor))
    return rows


def print_phases(shape, sparsity, precision, device, *, alpha="learned", backend="auto"):
    """Prints the table of one shape. Raises ValueError on the CPU."""
    if not is_gpu(device):
        raise ValueError("phases are told apart by GPU kernels: run this on a GPU.")
    ceilings = measure_ceilings(device)
    q, k, v = make_inputs(shape, device=device)
    run = sla2_method(sparsity, precision, alpha, backend).prepare(q, k, v)
    whole = median_ms(run, device)
    work = least_work(shape, sparsity, precision, q.element_size(), linear=alpha != NO_LINEAR_BRANCH)
    rows = phase_rows(kernel_times(run), work, ceilings)
    rates = ", ".join(f"{name} {rate / 1e12:.0f} TFLOP/s" for name, rate in ceilings.matmul.items())
    print(f"{shape.name}, skips {100 * sparsity:g}%, {precision}, {alpha} ratio: {whole:.3f} ms as a whole")
    print(f"ceilings: copy {ceilings.copy / 1e9:.0f} GB/s, matmul {rates}\n")
    print(table(rows))


def table(rows):
    """Markdown of phase_rows()."""
    lines = [
        "| phase | ms | launches | GB | GB/s | TFLOP | TFLOP/s | floor ms | time / floor |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for phase, ms, launches, work, floor in rows:
        seconds = ms / 1000
        lines.append(
            f"| {phase} | {ms:.3f} | {launches:g} | {work.bytes / 1e9:.3f} | {work.bytes / 1e9 / seconds:.0f} | "
            f"{work.flops / 1e12:.3f} | {work.flops / 1e12 / seconds:.0f} | {floor:.3f} | "
            + (f"{ms / floor:.1f} |" if floor else "- |")
        )
    total, floors = sum(row[1] for row in rows), sum(row[4] for row in rows)
    lines.append(f"| sum | {total:.3f} | | | | | | {floors:.3f} | {total / floors:.1f} |" if floors else "")
    return "\n".join(lines)


class StepParts:
    """Times one model's parts while it is attached: ``with StepParts(diffusion_model, options) as parts: ...``.

    options: transformer_options of the patcher; its attention override is wrapped while attached. Works on the GPU alone.
    """

    def __init__(self, diffusion_model, options):
        self.model = diffusion_model
        self.options = options
        self.spans = defaultdict(list)
        self._open = defaultdict(list)
        self._handles = []

    def __enter__(self):
        self._watch(self.model, "model call")
        for block in self.model.blocks:
            for attribute, part in MODULES.items():
                self._watch(getattr(block, attribute), part)
            for name in PROJECTIONS:
                self._watch(getattr(block.self_attn, name), "q, k, v and output projections")
            for name in NORMS:
                self._watch(getattr(block.self_attn, name), "q and k norms")
        self._below = self.options.get(OVERRIDE)
        self.options[OVERRIDE] = self._timed_override(self._below)
        return self

    def __exit__(self, *failure):
        for handle in self._handles:
            handle.remove()
        if self._below is None:
            del self.options[OVERRIDE]
        else:
            self.options[OVERRIDE] = self._below

    def _watch(self, module, part):
        self._handles.append(module.register_forward_pre_hook(lambda *_: self._begin(part)))
        self._handles.append(module.register_forward_hook(lambda *_: self._end(part)))

    def _begin(self, part):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._open[part].append(event)

    def _end(self, part):
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.spans[part].append((self._open[part].pop(), event))

    def _timed_override(self, below):
        def timed(func, *args, **kwargs):
            part = "self-attention" if args[0].shape[1] == args[1].shape[1] else "cross-attention"
            self._begin(part)
            try:
                return func(*args, **kwargs) if below is None else below(func, *args, **kwargs)
            finally:
                self._end(part)

        return timed

    def milliseconds(self, calls):
        """{part: ms per model call}, parts disjoint, the rest named; ``calls``: model calls seen."""
        torch.cuda.synchronize()
        spent = {part: sum(a.elapsed_time(b) for a, b in spans) / calls for part, spans in self.spans.items()}
        return disjoint(spent)


def disjoint(spent):
    """Spans that lie in each other -> parts that add up to the model call."""
    attention, cross = spent["self-attention"], spent["cross-attention"]
    projections, norms = spent["q, k, v and output projections"], spent["q and k norms"]
    parts = {
        "self-attention": attention,
        "q, k, v and output projections": projections,
        "q and k norms": norms,
        "rotation of q and k, rest of the self-attention block": spent["self-attention block"]
        - attention
        - projections
        - norms,
        "cross-attention": cross,
        "projections and norms of cross-attention": spent["cross-attention block"] - cross,
        "feed-forward": spent["feed-forward"],
    }
    parts["norms, modulation, embeddings, head"] = spent["model call"] - sum(parts.values())
    return parts
