"""The part "step" of several_gpus.py: one call of diffusers' Wan transformer whose tokens GPUs share (Ulysses).

Random weights at the sizes of Wan 14B, bf16. The rows with SLA2 are INT8 and have the stand-in of a trained router; dense
is what diffusers does by itself, torch's attention. A part of a step is what its stream spends in it: "attention" in the
operator alone, "exchange" in the rest of a shared attention call, which is what the overlap did not hide.
"""

import functools
import json
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist

from sla2_diffusers import SLA2WanProcessor, apply_sla2
from sla2_kernels import RouterLayer, RouterWeights

from .measure import is_gpu
from .ours import weights_for
from .several_gpus_operator import TRANSFERS
from .together import SPARSITY, largest, slowest_ms

SIZES = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "text_dim": 4096, "freq_dim": 256}
LATENTS = (1, 16, 21, 90, 160)  # 75,600 tokens
TINY_SIZES = {"num_attention_heads": 8, "attention_head_dim": 32, "ffn_dim": 64, "text_dim": 32, "freq_dim": 32}
TINY_LATENTS = (1, 16, 3, 24, 20)  # 360 tokens
TEXT_TOKENS = 512
RESERVED = 24e9  # bytes for what a step computes
# name -> (exchange, groups of heads), None is dense; one GPU exchanges nothing
WAYS = {
    "SLA2": ("16bit", 1),
    "SLA2, two groups": ("16bit", 2),
    "SLA2, four groups": ("16bit", 4),
    "SLA2, groups 1:3:1": ("16bit", (1, 3, 1)),
    "dense": None,
    "SLA2, 8-bit exchange": ("8bit", 2),
}
ALONE = ("SLA2", "dense")


def measure_steps(args, device):
    """{layers, alone, together}: ways by name, {seconds, parts, bytes, error, sparse, dense}, on one GPU and on all.

    alone: every GPU makes the whole call by itself; only in the first run of a command, which leaves its outputs in the
    folder. error: of the output, against one GPU's in the same way. sparse, dense: attention calls of a step.
    """
    facts = args.folder / "layers.json"
    first = not facts.exists()
    dist.barrier()
    if first:
        layers = min(args.layers, layers_that_fit(device)) if is_gpu(device) else args.layers
        if dist.get_rank() == 0:
            facts.write_text(json.dumps(layers), encoding="utf-8")
    dist.barrier()
    layers = json.loads(facts.read_text(encoding="utf-8"))
    model, inputs = transformer(layers, device, args.tiny), model_inputs(device, args.tiny)
    found = {"layers": layers}
    if first:
        found["alone"] = {name: measure_way(args, model, inputs, name, device, alone=True) for name in ALONE}
    share_tokens(model, dist.get_world_size(), device)
    found["together"] = {name: measure_way(args, model, inputs, name, device) for name in WAYS}
    return found


def layers_that_fit(device):
    """Layers whose weights a GPU holds beside what a step computes."""
    width = SIZES["num_attention_heads"] * SIZES["attention_head_dim"]
    bytes_each = 2 * (8 * width**2 + 2 * width * SIZES["ffn_dim"])
    return max(1, int((torch.cuda.mem_get_info(device)[0] - RESERVED) // bytes_each))


def transformer(layers, device, tiny, dtype=None, **sizes):
    """The same random model in every process. dtype: else bfloat16, on a CPU float32. sizes: where not those of Wan 14B."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    dtype = dtype or (torch.bfloat16 if is_gpu(device) else torch.float32)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = WanTransformer3DModel(**(TINY_SIZES if tiny else SIZES | sizes), num_layers=layers)
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def share_tokens(model, processes, device):
    """diffusers' context parallelism over all processes."""
    from diffusers import ContextParallelConfig

    if not is_gpu(device):
        # diffusers counts accelerators, and divides by their number
        torch.accelerator.device_count = lambda: 1
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=processes))


def model_inputs(device, tiny):
    generator = torch.Generator().manual_seed(1)
    dtype = torch.bfloat16 if is_gpu(device) else torch.float32
    sizes, latents = (TINY_SIZES, TINY_LATENTS) if tiny else (SIZES, LATENTS)
    hidden = torch.randn(latents, generator=generator).to(device, dtype)
    context = torch.randn(1, TEXT_TOKENS, sizes["text_dim"], generator=generator).to(device, dtype)
    return {"hidden_states": hidden, "timestep": torch.tensor([500.0], device=device), "encoder_hidden_states": context}


def router(model):
    """The stand-in of a trained router, its ratios as logits."""
    heads, head_dim = model.config.num_attention_heads, model.config.attention_head_dim
    weights = weights_for("learned", heads, head_dim, "cpu")
    layer = RouterLayer(weights.proj_q, weights.proj_k, torch.logit(weights.alpha)[None, :, None])
    layers = (layer,) * len(model.blocks)
    return RouterWeights(layers, model_family="wan", num_heads=heads, head_dim=head_dim, sparsities=(SPARSITY,))


@torch.no_grad()
def measure_way(args, model, inputs, name, device, alone=False):
    way, handle, spans = WAYS[name], None, Spans(device)
    if way is not None:
        precision = "int8" if is_gpu(device) else "16bit"
        handle = apply_sla2(model, router(model), sparsity=SPARSITY, precision=precision, exchange=way[0])

    def call():
        return model(**inputs, return_dict=False)[0]

    with exchanging(way or ("16bit", 1), args.transfer), timed_parts(spans):
        out = call()  # compiles
        spans.clear()
        counted = (handle.sparse_calls, handle.dense_calls) if handle else (0, len(model.blocks))
        if is_gpu(device):
            torch.cuda.reset_peak_memory_stats()
        seconds = slowest_ms(spans.wrap("step", call), device, args.calls, warmup=0) / 1000
    if handle:
        handle.undo()
    found = {
        "seconds": seconds,
        "parts": parts_of(spans.mean(), sparse=way is not None),
        "bytes": largest(torch.cuda.max_memory_allocated(), device) if is_gpu(device) else None,
        "error": error_against_one(args, name, out, alone),
        "sparse": counted[0],
        "dense": counted[1],
    }
    if dist.get_rank() == 0:
        # a run may be cut
        facts = {"GPUs": 1 if alone else dist.get_world_size(), "way": name, "transfer": args.transfer or "auto"}
        print(json.dumps({**facts, **found}), flush=True)
    return found


def parts_of(spans, sparse):
    """What a step consists of: seconds by name, of rank 0."""
    attention = spans.get("attention", 0.0)
    if not sparse:
        return {"attention with exchange": attention, "rest": spans["step"] - attention}
    together = spans.get("together", attention)
    return {"attention": attention, "exchange": together - attention, "rest": spans["step"] - together}


def error_against_one(args, name, out, alone):
    """||out - out of one GPU|| / ||out of one GPU||; one GPU leaves its output in the folder."""
    path = args.folder / f"{name.split(',')[0]}.pt"
    if alone and dist.get_rank() == 0:
        torch.save(out.cpu(), path)
    dist.barrier()
    expected = torch.load(path).to(out)
    return ((out.float() - expected.float()).norm() / expected.float().norm()).item()


@contextmanager
def exchanging(way, transfer):
    """Shared calls exchange in the groups of one of WAYS; what is 16 bit by ``transfer``, or as it ships if that is None."""
    import sla2_diffusers
    from sla2_kernels import sequence_parallel

    before = sla2_diffusers.HEAD_GROUPS, sequence_parallel.sequence_parallel_attention
    sla2_diffusers.HEAD_GROUPS = way[1]
    if transfer and way[0] == "16bit":
        together = functools.partial(before[1], transfer=TRANSFERS[transfer])
        sequence_parallel.sequence_parallel_attention = together
    try:
        yield
    finally:
        sla2_diffusers.HEAD_GROUPS, sequence_parallel.sequence_parallel_attention = before


class Spans:
    """Seconds of the current stream (on a CPU: of the clock) in named stretches."""

    def __init__(self, device):
        self._gpu, self._marks = is_gpu(device), []

    def _now(self):
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def clear(self):
        self._marks.clear()

    def wrap(self, name, function):
        def timed(*args, **kwargs):
            begin = self._now()
            result = function(*args, **kwargs)
            self._marks.append((name, begin, self._now()))
            return result

        return timed

    def mean(self):
        """name -> seconds per step."""
        if self._gpu:
            torch.cuda.synchronize()
        steps = sum(name == "step" for name, _, _ in self._marks)
        found = {}
        for name, begin, end in self._marks:
            seconds = begin.elapsed_time(end) / 1000 if self._gpu else end - begin
            found[name] = found.get(name, 0.0) + seconds / steps
        return found


@contextmanager
def timed_parts(spans):
    """Within it, spans know the self-attention of a Wan model: SLA2's own, shared calls as a whole, and dense calls."""
    from diffusers.models.transformers import transformer_wan

    sparse, together, dense = (
        SLA2WanProcessor._attend,
        SLA2WanProcessor._attend_together,
        transformer_wan.dispatch_attention_fn,
    )
    timed_dense = spans.wrap("attention", dense)

    def self_attention_timed(query, key, *args, **kwargs):
        chosen = timed_dense if query.shape[1] == key.shape[1] else dense
        return chosen(query, key, *args, **kwargs)

    SLA2WanProcessor._attend = spans.wrap("attention", sparse)
    SLA2WanProcessor._attend_together = spans.wrap("together", together)
    transformer_wan.dispatch_attention_fn = self_attention_timed
    try:
        yield
    finally:
        SLA2WanProcessor._attend, SLA2WanProcessor._attend_together = sparse, together
        transformer_wan.dispatch_attention_fn = dense


def step_table(runs):
    lines = [
        "| GPUs | layers | attention | s per step | against one GPU | against dense on one | parts, s | peak GB each | error against one GPU |",
        "|---" * 9 + "|",
    ]
    alone = next(run["alone"] for run in runs.values() if "alone" in run)
    for count, ways in [(1, alone), *((count, run["together"]) for count, run in runs.items())]:
        for name, row in ways.items():
            one = alone[name.split(",")[0]]["seconds"]
            parts = ", ".join(f"{part} {seconds:.3f}" for part, seconds in row["parts"].items())
            memory = "-" if row["bytes"] is None else f"{row['bytes'] / 1e9:.1f}"
            layers = next(iter(runs.values()))["layers"]
            lines.append(
                f"| {count} | {layers} | {name} | {row['seconds']:.3f} | {one / row['seconds']:.2f}x | "
                f"{alone['dense']['seconds'] / row['seconds']:.2f}x | {parts} | {memory} | {row['error']:.1e} |"
            )
    return "\n".join(lines)
