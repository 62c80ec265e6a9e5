"""SLA2 attention for diffusers' Wan transformer (diffusers 0.35 and newer), as attention processors.

    handle = apply_sla2(pipe.transformer, router, sparsity=0.9)
    video = pipe(...)
    print(handle.summary())
    handle.undo()

Self-attention (attn1) of every block runs through ``sla2_kernels.sla2_attention``; cross-attention is left alone.
"""

import functools
import logging
from collections import Counter
from dataclasses import dataclass, field

import torch

from sla2_kernels import K_BLOCK, sla2_attention, unsupported_reason
from sla2_kernels.arguments import checked_count, checked_sparsity
from sla2_kernels.fitted_attention import FITTED_ROWS, fitted_attention, sample_rows, squared_error
from sla2_kernels.forced_blocks import attended_keys
from sla2_kernels.kernel_failures import failure_in_a_line, kernel_failure_remedy
from sla2_kernels.query_blocks import default_query_block
from sla2_kernels.router import block_count, selected_block_count
from sla2_kernels.support import resolve_precision
from sla2_kernels.wan_self_attention import MODEL_FAMILY, VACE_FAMILY, project_qkv, rotate

logger = logging.getLogger("sla2")

# relative sizes, of the heads of a process that shares a call: only the first one's arrival and the last one's return wait
HEAD_GROUPS = (1, 3, 1)


@dataclass
class LayerCounts:
    """Calls of one layer since the last reset. dense: sentence why -> number of calls.

    compiled: what the layer did last in code of torch.compile, which counts no calls: "sparse", or the sentence why it was dense.
    squares: per device float32 (2,), squared norms of the error in query rows that were computed exactly, and of these.
    """

    sparse: int = 0
    dense: Counter = field(default_factory=Counter)
    kept_pairs: int = 0  # of query and key tokens
    all_pairs: int = 0
    squares: dict = field(default_factory=dict)
    compiled: str | None = None

    @property
    def attention_error(self):
        """||output - dense|| / ||dense|| over the exact rows, or None where no call fitted its ratio. Waits for the device."""
        error, exact = sum((squares.double().cpu() for squares in self.squares.values()), torch.zeros(2)).tolist()
        return (error / exact) ** 0.5 if exact else None

    def add_squares(self, squares):
        """Adds those of one call."""
        # a new tensor each time: one of inference mode must not be changed outside it
        self.squares[squares.device] = self.squares.get(squares.device, 0) + squares

    def add_dense(self, reason):
        """Counts a call that runs dense."""
        # compiled code that reads a count is compiled again for the next one: it may only write
        if torch.compiler.is_compiling():
            self.compiled = reason
        else:
            self.dense[reason] += 1

    def add_sparse(self, kept_pairs, all_pairs):
        """Counts a sparse call, and its pairs of query and key tokens."""
        if torch.compiler.is_compiling():
            self.compiled = "sparse"
            return
        self.sparse += 1
        self.kept_pairs += kept_pairs
        self.all_pairs += all_pairs


class SLA2WanProcessor:
    """Attention processor of one self-attention layer; ``dense`` is the processor that was there before.

    query_block: that of the layer's router, None for an untrained one, where default_query_block() decides.
    failures: list that all layers share; holds the sentence why kernels cannot run here, once that is known.
    undone: set by the handle's undo(); who still calls this processor, such as one that was put around it, then gets ``dense``.
    """

    def __init__(self, dense, settings, layer, weights, keep_diagonal, query_block, failures):
        self.dense = dense
        self.settings = settings
        self.layer = layer
        self.weights = weights
        self.keep_diagonal = keep_diagonal
        self.query_block = query_block
        self.failures = failures
        self.undone = False
        # not asked for in each call: code compiled for a block would hold its number, and not serve the others
        self.stays_dense = layer in settings.dense_layers
        self.counts = LayerCounts()
        self._on_device = {}

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None, *others, **kwargs
    ):
        def dense(reason):
            self.counts.add_dense(reason)
            return self.dense(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb, *others, **kwargs)

        precision = self.settings.precision_on(hidden_states.device)
        reason = self._dense_reason(attn, hidden_states, encoder_hidden_states, attention_mask, precision)
        reason = reason or _unknown_argument(rotary_emb, others, kwargs)
        if reason:
            return dense(reason)
        q, k, v = project_qkv(attn, hidden_states)
        # checked on q: with layerwise casting or quantised layers the weights' dtype is not the one that is computed in
        reason = unsupported_reason(q.device, q.dtype, q.shape[3], precision, self.settings.backend)
        if reason:
            return dense(reason)
        if rotary_emb is not None:
            q, k = rotate(q, *rotary_emb), rotate(k, *rotary_emb)
        query_block = self.query_block or default_query_block(q, precision)
        attend = functools.partial(self._attend, precision, query_block)
        # processes that share a call must all take the same path, so there an error is raised instead of running dense
        if self._parallel_config is None:
            out, reason = self._attempt(attend, q, k, v)
            if reason:
                return dense(reason)
        else:
            out = self._attend_together(attend, query_block, q, k, v)
        self._count_sparse(q.shape)
        out = out.flatten(2)
        for step in attn.to_out:
            out = step(out)
        return out

    @property
    def _parallel_config(self):
        """The configuration of enable_parallelism(), which diffusers stores on each processor; None in a single process."""
        return getattr(self.dense, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, config):
        self.dense._parallel_config = config

    @property
    def _attention_backend(self):
        """The backend of set_attention_backend(), which diffusers stores here: used by the dense calls, and kept after undo()."""
        return self.dense._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend):
        self.dense._attention_backend = backend

    def _attempt(self, attend, q, k, v):
        """(output of all heads, None), or (None, one sentence) where kernels cannot be built, loaded or started."""
        try:
            return attend(q, k, v, slice(None)), None
        except Exception as error:
            remedy = kernel_failure_remedy(error)
            if remedy is None:
                raise
            reason = f"the kernels could not be built or started ({failure_in_a_line(error)}); {remedy}"
        self.failures.append(reason)
        logger.warning("SLA2: every layer runs dense from now on: %s", reason)
        return None, reason

    def _attend_together(self, attend, query_block, q, k, v):
        """The output of this process's tokens; q, k, v (B, N / P, H, D)."""
        from sla2_kernels.pool_routing import PoolRouting
        from sla2_kernels.sequence_parallel import sequence_parallel_attention

        routing, groups = None, HEAD_GROUPS
        if self.settings.exchange == "8bit":
            proj_q, proj_k, _ = self._weights_on(q.device)
            groups = 1  # packing and opening messages beside attention takes longer than it hides
            settings = self.settings
            routing = PoolRouting(settings.sparsity, proj_q, proj_k, self.keep_diagonal, settings.backend, query_block)
        mesh = self._parallel_config.context_parallel_config._ulysses_mesh
        return sequence_parallel_attention(q, k, v, attend, mesh.get_group(), head_groups=groups, routing=routing)

    def _attend(self, precision, query_block, q, k, v, heads, key_blocks=None):
        """SLA2 attention of the heads in the slice ``heads``; q, k, v (B, N, those heads, D)."""
        proj_q, proj_k, ratio = _of_heads(heads, *self._weights_on(q.device))
        options = {
            "sparsity": self.settings.sparsity,
            "precision": precision,
            "layout": "BNHD",
            "backend": self.settings.backend,
            "keep_diagonal": self.keep_diagonal,
            "key_blocks": key_blocks,
            "query_block": query_block,
        }
        if ratio is None and self._fits(q, k, v):
            return self._fitted(q, k, v, proj_q, proj_k, options)
        return sla2_attention(q, k, v, proj_q, proj_k, ratio, **options)

    def _fits(self, q, k, v):
        """Whether a call without a trained ratio fits one: not where it is trained, compiled or captured."""
        if torch.compiler.is_compiling():
            return False
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
            return False
        if q.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        blocks = block_count(k.shape[1], K_BLOCK)
        return selected_block_count(self.settings.sparsity, blocks) < blocks

    def _fitted(self, q, k, v, proj_q, proj_k, options):
        """Output of a call that fits its ratio, and is judged by rows that the fit did not see."""
        # seeded by the layer alone: the same video again gives the same bits
        rows = sample_rows(q.shape[1], self.layer, q.device)
        found = fitted_attention(q, k, v, proj_q, proj_k, rows=rows, **options)
        judging = found.dense[:, :, FITTED_ROWS:], rows[FITTED_ROWS:]
        self.counts.add_squares(squared_error(found.out.transpose(1, 2), *judging))
        return found.out

    def _dense_reason(self, attn, x, context, mask, precision):
        """None, or one sentence why this call runs through the processor that was there before."""
        settings, tokens = self.settings, x.shape[1]
        if self.undone:
            return "undo() was called, and another processor still calls this one"
        if self.stays_dense:
            return "dense_layers keeps this layer dense"
        if context is not None:
            return "the call is cross-attention"
        if mask is not None:
            return "the call has an attention mask"
        if self._parallel_config is not None:
            parallel = self._parallel_config.context_parallel_config
            if parallel.ring_degree > 1 or getattr(parallel, "ulysses_anything", False):
                return "context parallelism is not plain Ulysses, which is what SLA2 takes part in"
            if attn.heads % parallel.ulysses_degree:
                return f"{parallel.ulysses_degree} devices cannot share {attn.heads} heads equally"
            tokens *= parallel.ulysses_degree
        if tokens < settings.minimum_tokens:
            return f"the sequence has {tokens} tokens, minimum_tokens is {settings.minimum_tokens}"
        if self.failures:
            return self.failures[0]
        head_dim = attn.inner_dim // attn.heads
        return unsupported_reason(x.device, None, head_dim, precision, settings.backend)

    def _weights_on(self, device):
        placed = self._on_device.get(device)
        if placed is None:
            with torch.inference_mode(False):  # training can use them too
                placed = tuple(None if t is None else t.to(device) for t in self.weights)
            # replaced, not updated: frees the former device's tensors, and a thread of another device keeps those it holds
            self._on_device = {device: placed}
        return placed

    def _count_sparse(self, shape):
        """Counts a call by the shape of its q: where processes share it, the tokens are theirs, and so is a share of the heads."""
        batch, tokens, heads, _ = shape
        if self._parallel_config is not None:
            processes = self._parallel_config.context_parallel_config.ulysses_degree
            tokens, heads = tokens * processes, heads // processes
        rows = batch * heads * tokens
        self.counts.add_sparse(rows * attended_keys(tokens, self.settings.sparsity), rows * tokens)


def _unknown_argument(rotary_emb, others, kwargs):
    """None, or one sentence what a call has that Wan's attention does not know: AnyFlow and Helios have models much like it."""
    if kwargs:
        return f"the call has the unknown keyword {sorted(kwargs)[0]}"
    if others:
        return "the call has more arguments than Wan's attention takes"
    if rotary_emb is not None and not (isinstance(rotary_emb, (tuple, list)) and len(rotary_emb) == 2):
        return "the call's rotary embedding is not Wan's pair of cosines and sines"
    return None


def _of_heads(heads, proj_q, proj_k, ratio):
    """A layer's weights for a slice of its heads; projections of two dimensions are shared by all heads."""
    proj_q, proj_k = (p if p is None or p.dim() == 2 else p[heads] for p in (proj_q, proj_k))
    return proj_q, proj_k, None if ratio is None else ratio[heads]


@dataclass(frozen=True)
class Settings:
    """Checked settings of apply_sla2; see there."""

    sparsity: float
    precision: str
    minimum_tokens: int
    dense_layers: frozenset
    backend: str
    exchange: str

    def precision_on(self, device):
        return resolve_precision(self.precision, device)


class SLA2Handle:
    """What apply_sla2 did to a transformer: counters, and how to undo it."""

    def __init__(self, layers):
        self._layers = layers

    @property
    def layers(self):
        """LayerCounts per layer, since the last reset."""
        return [processor.counts for _, processor in self._layers]

    @property
    def sparse_calls(self):
        return sum(layer.sparse for layer in self.layers)

    @property
    def dense_calls(self):
        return sum(layer.dense.total() for layer in self.layers)

    @property
    def sparsity(self):
        """Share of (query, key) token pairs that the softmax branch skipped in the sparse calls, or None where there was none."""
        kept, total = (sum(getattr(layer, name) for layer in self.layers) for name in ("kept_pairs", "all_pairs"))
        return 1 - kept / total if total else None

    @property
    def attention_error(self):
        """Root mean square of the layers' measured errors, or None where no call fitted its ratio. Waits for the device.

        With context parallelism: of the heads that this process computes.
        """
        errors = self._errors()
        return (sum(error**2 for error in errors) / len(errors)) ** 0.5 if errors else None

    def _errors(self):
        return [error for error in (layer.attention_error for layer in self.layers) if error is not None]

    def dense_reasons(self):
        """Counter: sentence why -> number of dense calls, over all layers."""
        return sum((layer.dense for layer in self.layers), Counter())

    def summary(self):
        """A few readable lines: calls, achieved sparsity, measured error, why calls ran dense, and what is not counted."""
        total = self.sparse_calls + self.dense_calls
        lines = [f"{self.sparse_calls} of {total} self-attention calls ran sparse"]
        if self.sparsity is not None:
            skipped = round(100 * self.sparsity, 1)
            lines[0] += f" (skips {skipped:g}%, keeps {round(100 - skipped, 1):g}%)"
        errors = self._errors()
        if errors:
            lines.append(f"attention error {self.attention_error:.2f} (layers {min(errors):.2f} to {max(errors):.2f})")
        lines += [f"  {count} dense: {reason}" for reason, count in self.dense_reasons().most_common()]
        compiled = Counter(layer.compiled for layer in self.layers if layer.compiled)
        for what, count in compiled.most_common():
            how = what if what == "sparse" else f"dense: {what}"
            lines.append(f"  {count} layers in compiled code, where calls are not counted, {how}")
        return "\n".join(lines)

    def reset(self):
        """Counts from zero again."""
        for _, processor in self._layers:
            processor.counts = LayerCounts()

    def undo(self):
        """Puts the former processors back, wherever ours is still in place; elsewhere ours runs dense. May be called twice."""
        for attention, processor in self._layers:
            processor.undone = True
            if attention.processor is processor:
                attention.set_processor(processor.dense)


def apply_sla2(
    transformer,
    router=None,
    *,
    sparsity=0.9,
    precision="auto",
    minimum_tokens=0,
    dense_layers=(),
    backend="auto",
    exchange="16bit",
):
    """Puts SLA2 attention into the self-attention of a Wan transformer; returns an SLA2Handle.

    torch.compile may follow, of the whole or of its blocks; the handle then says what the layers do, and counts no calls.

    Args:
        transformer: diffusers' WanTransformer3DModel (Wan 2.1 and 2.2, text and image to video), or
            WanVACETransformer3DModel, whose vace_blocks are the layers behind its blocks.
        router: RouterWeights of sla2_kernels.load_router(), made for this model; None routes by the mean of each block,
            keeps each query block's own key blocks and fits the mixing ratio in every call; 64 query tokens share a
            selection on Hopper in INT8, else 128. For VACE a router of family "wan-vace" covers all layers; one of
            family "wan" the blocks, and vace_blocks run as with None.
            A layer without a trained ratio has it estimated from the attention mass under autograd, torch.compile or
            CUDA graphs.
        sparsity: share of key blocks that the softmax branch skips, 0 <= sparsity < 1: 0.97 skips 97%, keeps 3%.
        precision: "auto" (what is fastest on the device), "16bit", "int8" or "fp8".
        minimum_tokens: shorter sequences run dense.
        dense_layers: numbers of layers that always run dense; -1 is the last.
        backend: as in sla2_attention. A call that the operator has no fast path for runs dense and is counted with the
            reason; "torch" computes it block by block on any device.
        exchange: what GPUs that share a video send each other (context parallelism): "16bit" is q, k and v in their own
            dtype, and the result that of one GPU; "8bit" half the bytes, the same key blocks, and an error 3 to 17% above
            INT8's. Meant for GPUs joined by PCI Express, where it was not timed: over NVLink it gains nothing.

    Raises:
        TypeError: transformer is not a Wan transformer, or router is no RouterWeights.
        ValueError: a setting does not fit; the sentence says which.
        RouterFileError: the router was trained for another model.
    """
    blocks = getattr(transformer, "blocks", None)
    if not blocks or not all(hasattr(getattr(block, "attn1", None), "set_processor") for block in blocks):
        raise TypeError(f"apply_sla2 takes diffusers' WanTransformer3DModel, got {type(transformer).__name__}.")
    vace_blocks = getattr(transformer, "vace_blocks", ())
    attentions = [block.attn1 for block in (*blocks, *vace_blocks)]
    settings = _checked(sparsity, precision, minimum_tokens, dense_layers, backend, exchange, len(attentions))
    if any(isinstance(attention.processor, SLA2WanProcessor) for attention in attentions):
        raise ValueError("SLA2 is applied to this transformer already: undo() the former handle first.")
    if router is not None:
        if not hasattr(router, "require_model"):
            raise TypeError(f"router must be what load_router() returns, or None, got {type(router).__name__}.")
        heads = attentions[0].heads
        whole = bool(vace_blocks) and router.model_family != MODEL_FAMILY
        router.require_model(
            model_family=VACE_FAMILY if whole else MODEL_FAMILY,
            num_layers=len(attentions) if whole else len(blocks),
            num_heads=heads,
            head_dim=attentions[0].inner_dim // heads,
        )
    layers, failures = [], []
    for index, attention in enumerate(attentions):
        weights = _weights(router, index, sparsity)
        processor = SLA2WanProcessor(attention.processor, settings, index, *weights, failures)
        attention.set_processor(processor)
        layers.append((attention, processor))
    return SLA2Handle(layers)


def _weights(router, layer, sparsity):
    """((proj_q, proj_k, ratio), keep_diagonal, query_block) of a layer; without a router, or behind its layers, those of an untrained one."""
    if router is None or layer >= router.num_layers:
        return (None, None, None), True, None
    row = router.layers[layer]
    with torch.inference_mode(False):
        ratio = router.ratio(layer, sparsity)
    return (row.proj_q, row.proj_k, ratio), router.keep_diagonal, router.q_block


def _checked(sparsity, precision, minimum_tokens, dense_layers, backend, exchange, count):
    sparsity, minimum_tokens = checked_sparsity(sparsity), checked_count("minimum_tokens", minimum_tokens)
    if precision not in ("auto", "16bit", "int8", "fp8"):
        raise ValueError(f'precision must be "auto", "16bit", "int8" or "fp8", got {precision!r}.')
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f'backend must be "auto", "triton" or "torch", got {backend!r}.')
    if exchange not in ("16bit", "8bit"):
        raise ValueError(f'exchange must be "16bit" or "8bit", got {exchange!r}.')
    if isinstance(dense_layers, (str, int)):
        raise ValueError(f"dense_layers must be a list of layer numbers, got {dense_layers!r}.")
    for layer in dense_layers:
        if not -count <= checked_count("dense_layers", layer) < count:
            raise ValueError(f"dense_layers names layer {layer}, but this model has layers 0 to {count - 1}.")
    dense_layers = frozenset(layer % count for layer in dense_layers)
    return Settings(sparsity, precision, minimum_tokens, dense_layers, backend, exchange)
