"""What a denoising step's time is spent on: GPU events around modules, and attention calls told apart by their keys."""

from collections import defaultdict

import torch

OVERRIDE = "optimized_attention_override"
# module attribute within a block -> part of the step
MODULES = {"self_attn": "self-attention block", "cross_attn": "cross-attention block", "ffn": "feed-forward"}
PROJECTIONS = ("q", "k", "v", "o")
NORMS = ("norm_q", "norm_k")


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


def costliest_kernels(function, count=12):
    """[(ms, launches, name)] of the kernels that took longest during function(), by torch.profiler."""
    from .phases import kernel_times

    times = kernel_times(function, runs=1)
    return [(ms, n, name) for name, (ms, n) in sorted(times.items(), key=lambda item: -item[1][0])[:count]]
