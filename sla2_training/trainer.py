"""Stage 1 of SLA2: train the router and the mixing ratio of every layer on its own Q, K, V against dense attention.

Source: arXiv 2602.12675, Algorithm 1. Nothing is stored: each observation draws a random subset of query blocks,
computes their dense rows exactly, and takes an optimisation step. No N x N tensor exists.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ._kernels import (
    Q_BLOCK,
    RouterWeights,
    failure_in_a_line,
    identity_router,
    kernel_failure_remedy,
    resample_ratio,
    selected_block_count,
)
from .errors import TrainingError
from .layer_state import LayerState, ratios_of, resumed_layer, solved_ratios
from .layer_tensors import LayerTensors
from .report import VARIANTS, LayerErrors, TrainingReport
from .soft_top_k import TAU, soft_top_k_masks
from .step_sums import step_sums

SURE = 40.0  # logits above all others': the soft mask is 1 in float32


@dataclass(frozen=True)
class TrainerOptions:
    """How stage 1 trains.

    per_head: a projection per head, (H, D, D), instead of one for all heads. knots: ratio knots along the query axis.
    learning_rate: Adam's, for the projections. projection_memory, ratio_memory: what a step's share in the projections'
    average and in the ratio's least squares keeps with each further step. tau: SoftTop-k's temperature.
    normalise_scores: bring each row of scores to unit spread before SoftTop-k. query_blocks: drawn per head and step.
    memory_bytes: bound on a step's working memory. One head with one query block is the least a step can work on: see
    memory_of(), 0.16 GB at 32,760 tokens of head_dim 128 and 0.36 GB at 75,600, whatever the bound says.
    steps_per_observation: optimisation steps on each tensor that is seen, each with new query blocks. seed: of the draws.
    keep_diagonal, query_block: as in sla2_attention; a training that is resumed keeps what it began with.
    """

    per_head: bool = True
    knots: int = 1
    learning_rate: float = 2e-3
    projection_memory: float = 0.97
    ratio_memory: float = 0.99
    tau: float = TAU
    normalise_scores: bool = False
    query_blocks: int = 8
    memory_bytes: int = 2**30
    steps_per_observation: int = 1
    seed: int = 0
    keep_diagonal: bool = True
    query_block: int = Q_BLOCK


class RouterTrainer:
    """Trains the router of one model layer by layer, on the Q, K and V of every call it is shown; works with any sampler.

    Args:
        model_family, num_layers, num_heads, head_dim: the model, as in the router file.
        sparsities: shares of skipped key blocks to train for.
        options: TrainerOptions. resume: RouterWeights of the same model to go on from.

    Raises:
        RouterFileError: resume is another model's. ValueError: no sparsity, or one outside 0 to 1.
    """

    def __init__(
        self,
        model_family,
        num_layers,
        num_heads,
        head_dim,
        *,
        sparsities=(0.97, 0.95, 0.90),
        options=None,
        resume=None,
    ):
        self.sparsities = tuple(float(s) for s in sparsities)
        if not self.sparsities or not all(0 < s < 1 for s in self.sparsities):
            raise ValueError(f"sparsities must be one or more numbers above 0 and below 1, got {self.sparsities}.")
        if len(set(self.sparsities)) < len(self.sparsities):
            raise ValueError(f"sparsities must differ from each other, got {self.sparsities}.")
        model = {"model_family": model_family, "num_layers": num_layers, "num_heads": num_heads, "head_dim": head_dim}
        self.start = identity_router(**model) if resume is None else resume
        self.start.require_model(**model)
        self.options = TrainerOptions() if options is None else options
        self.query_blocks, self.memory_bytes = self.options.query_blocks, self.options.memory_bytes
        self.tau, self.by_kernels = self.options.tau, True
        self.keep_diagonal = self.options.keep_diagonal if resume is None else resume.keep_diagonal
        self.query_block = self.options.query_block if resume is None else resume.q_block
        self.generator = torch.Generator().manual_seed(self.options.seed)
        self.states = {}
        self.steps = {}
        self.losses = {}
        self.errors = {}
        self.notes = []

    def observe(self, layer, q, k, v, *, layout="BHND", scale=None, steps=None, prefix=0, suffix=0):
        """Trains ``layer`` on these tensors; returns the relative squared error of its soft masks, before the last step.

        Args:
            layer: 0 to num_layers - 1. q: (B, H, N, D) or (B, N, H, D) by ``layout``, any float dtype; k, v may have
            another token count. Inference tensors are fine. scale: softmax scale, None is D ** -0.5.
            steps: optimisation steps on these tensors, each with new query blocks; None takes the options'.
            prefix, suffix: keys before and after the video's (text, sound, references), which every query attends: the
            router picks among the blocks of video alone, as in sla2_kernels.forced_blocks. q has the video's queries alone.

        Raises:
            TrainingError: NaN or infinity in the tensors, or no memory even for one head and query block.
        """
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(q.device.type, enabled=False):
            return self.observe_tensors(self._tensors(layer, q, k, v, layout, scale, prefix, suffix), steps)

    def _tensors(self, *call):
        return LayerTensors(*call, query_block=self.query_block)

    def observe_tensors(self, tensors, steps=None):
        """observe() of a LayerTensors, outside inference mode and autocast."""
        tensors.check(self.start.num_heads, self.start.head_dim)
        tensors.by_kernels = tensors.by_kernels and self.by_kernels
        layer, state = tensors.layer, self.layer_state(tensors.layer).on(tensors.q.device)
        if tensors.forced.free <= 1:
            # a single key block of video is always selected, so there is nothing to learn
            return 0.0
        for _ in range(self.options.steps_per_observation if steps is None else steps):
            loss = self._within_memory(tensors, lambda: self._step(state, tensors))
            self.steps[layer] = self.steps.get(layer, 0) + 1
            self.losses.setdefault(layer, []).append(loss)
        return loss

    def evaluate(self, layer, q, k, v, *, layout="BHND", scale=None, prefix=0, suffix=0):
        """Output error of hard top-k attention on a random subset of query blocks; trains nothing. Arguments as observe().

        Returns LayerErrors of this call; the report sums those of all calls.
        """
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            return self.evaluate_tensors(self._tensors(layer, q, k, v, layout, scale, prefix, suffix))

    @torch.no_grad()
    def evaluate_tensors(self, tensors, variants=VARIANTS):
        """evaluate() of a LayerTensors, outside inference mode and autocast; of some (router, ratio) variants alone."""
        tensors.check(self.start.num_heads, self.start.head_dim)
        state = self.layer_state(tensors.layer).on(tensors.q.device)
        errors = self._within_memory(tensors, lambda: self._evaluate(state, tensors, variants))
        self.errors[tensors.layer] = self.errors[tensors.layer] + errors if tensors.layer in self.errors else errors
        return errors

    def router(self):
        """The RouterWeights as trained so far; layers never seen stay as they were at the start."""
        layers = tuple(
            self.layer_state(i).weights() if i in self.states else self._start_layer(i)
            for i in range(self.start.num_layers)
        )
        return RouterWeights(
            layers,
            self.start.model_family,
            self.start.num_heads,
            self.start.head_dim,
            sparsities=self.sparsities,
            precision="16bit",
            keep_diagonal=self.keep_diagonal,
            q_block=self.query_block,
        )

    def report(self):
        """TrainingReport of all evaluations and notes so far."""
        return TrainingReport(self.sparsities, dict(self.errors), dict(self.steps), tuple(self.notes))

    def _start_layer(self, layer):
        return resumed_layer(self.start, layer, self.sparsities, self.options.knots)

    def layer_state(self, layer):
        """The LayerState of a layer, made from the start router when it is first asked for."""
        if layer not in self.states:
            if not 0 <= layer < self.start.num_layers:
                raise ValueError(f"layer must be 0 to {self.start.num_layers - 1}, got {layer}.")
            start = self._start_layer(layer)
            self.states[layer] = LayerState(start, self.start.num_heads, self.start.head_dim, self.options)
        return self.states[layer]

    def _within_memory(self, tensors, work):
        """work(), with half the query blocks after each out-of-memory error until it fits, without kernels that do not run."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                # handled below, when the failed attempt's tensors are freed
                pass
            except Exception as error:
                remedy = kernel_failure_remedy(error) if tensors.by_kernels else None
                if remedy is None:
                    raise
                self.by_kernels = tensors.by_kernels = False
                self.notes.append(
                    f"Kernels cannot run here ({failure_in_a_line(error)}): went on without, which is slower. To have them, {remedy}."
                )
                continue
            if self.query_blocks == 1:
                raise TrainingError(
                    f"Training stopped at layer {tensors.layer}: not enough memory for one query block of one head; "
                    "free some memory or make the video smaller."
                )
            self.query_blocks = max(1, self.query_blocks // 2)
            self.memory_bytes //= 2
            self.notes.append(
                f"Out of memory at layer {tensors.layer}: went on with {self.query_blocks} query blocks a step."
            )
            if tensors.q.device.type == "cuda":
                torch.cuda.empty_cache()

    def always_selected(self, tensors, blocks):
        """bool (B, H, R, T_n): key blocks that the query blocks (B, H, R) take whatever their score, or None."""
        return tensors.own(blocks) if self.keep_diagonal else None

    def hard_masks(self, scores, always=None, forced=None):
        """(B, H, R, T_n) scores -> the hard top-k masks at all sparsities, (B * H, R, S, T_n) of 0 and 1.

        forced: ForcedBlocks, whose ends are 1 in every mask; None where every block is free.
        """
        scores = scores if always is None else scores.masked_fill(always, torch.inf)
        scores = _free_part(scores, forced)
        # of equal scores the lowest index wins, as in top_k_blocks
        order = scores.argsort(dim=-1, descending=True, stable=True)
        places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, places)
        counts = torch.tensor(self._counts(scores), device=scores.device)[:, None]
        return _with_forced((rank[..., None, :] < counts).to(scores.dtype).flatten(0, 1), forced)

    def _counts(self, scores):
        return [selected_block_count(s, scores.shape[-1]) for s in self.sparsities]

    def _soft_masks(self, scores, always, forced):
        scores, always = _free_part(scores, forced), None if always is None else _free_part(always, forced)
        if self.options.normalise_scores and scores.shape[-1] > 1:
            scores = (scores - scores.mean(dim=-1, keepdim=True)) / scores.std(dim=-1, keepdim=True).clamp_min(1e-6)
        if always is not None:
            scores = torch.where(always, scores.detach().amax(dim=-1, keepdim=True) + SURE * self.tau, scores)
        return _with_forced(soft_top_k_masks(scores, self._counts(scores), self.tau).flatten(0, 1), forced)

    def _ratios(self, alpha_logits, tensors, blocks):
        """The ratios of the drawn query blocks by logits (S, H, A), (B * H, R, S)."""
        ratios = ratios_of(alpha_logits, tensors.query_block_count).permute(1, 2, 0).expand(blocks.shape[0], -1, -1, -1)
        index = blocks[..., None].expand(-1, -1, -1, len(self.sparsities))
        return ratios.gather(2, index).flatten(0, 1)

    @torch.no_grad()
    def _ratio_equations(self, tensors, blocks, sums):
        """A step's least squares for the ratios under hard masks: gram (S, H, A, A), right (S, H, A)."""
        knots, shape = self.options.knots, blocks.shape
        basis = resample_ratio(torch.eye(knots, device=blocks.device), tensors.query_block_count).T[blocks]
        product, norm = sums.product.unflatten(0, shape[:2]), sums.norm.unflatten(0, shape[:2])
        right = torch.einsum("bhrs,bhra->sha", product, basis)
        gram = torch.einsum("bhrs,bhra,bhrc->shac", norm, basis, basis)
        return gram, right

    def _first_ratio(self, tensors, blocks, hard):
        """Ratio logits for the first step, from its own query blocks. Its equations count when the step is done."""
        sums = step_sums(tensors, blocks, hard, self.memory_bytes)
        return solved_ratios(*self._ratio_equations(tensors, blocks, sums))

    def _step(self, state, tensors):
        # what a step that ran out of memory left
        state.optimizer.zero_grad()
        blocks = tensors.draw(self.query_blocks, self.generator)
        scores = tensors.scores(state.proj_q, state.proj_k, blocks)
        with torch.no_grad():
            always = self.always_selected(tensors, blocks)
            hard = self.hard_masks(scores, always, tensors.forced)
            logits = state.alpha_logits
            logits = self._first_ratio(tensors, blocks, hard) if logits is None else logits
            ratios = self._ratios(logits, tensors, blocks)
        soft = self._soft_masks(scores, always, tensors.forced)
        sums = step_sums(tensors, blocks, hard, self.memory_bytes, soft.detach(), ratios)
        total = (sums.energy * len(self.sparsities)).clamp_min(torch.finfo(torch.float32).tiny)
        soft.backward(sums.gradient * (2 / total))
        # in use the ratio mixes branches of hard masks, so it is fitted on those
        gram, right = self._ratio_equations(tensors, blocks, sums)
        finite = (state.proj_q.grad, state.proj_k.grad, gram, right)
        largest = [torch.linalg.vector_norm(x, torch.inf) for x in finite]
        loss, *largest = torch.stack([sums.error / total, *largest]).tolist()
        if not all(map(math.isfinite, largest)):
            raise TrainingError(f"Training stopped at layer {tensors.layer}: the gradient of its router is not finite.")
        state.step()
        # as large as the projections themselves, and kept for every layer otherwise
        state.optimizer.zero_grad()
        state.learn_ratio(gram, right)
        return loss

    def _evaluate(self, state, tensors, variants):
        blocks = tensors.draw(self.query_blocks, self.generator)
        projections = {"untrained": (None, None), "trained": state.projections()}
        routers = [name for name in projections if any(name == router for router, _ in variants)]
        always = self.always_selected(tensors, blocks)
        masks = [
            self.hard_masks(tensors.scores(*projections[name], blocks), always, tensors.forced) for name in routers
        ]
        masks = torch.cat(masks, dim=2)
        ratios = {"estimated": None, "learned": None}
        if state.alpha_logits is not None:
            ratios["learned"] = self._ratios(state.alpha_logits, tensors, blocks).repeat(1, 1, len(routers))
        squared, energy = {ratio: 0.0 for _, ratio in variants}, 0.0
        for chunk in tensors.chunks(blocks, self.memory_bytes):
            sums, mask = tensors.sums(blocks, chunk), masks[chunk]
            branches = sums.branches(mask)
            for ratio in squared:
                used = sums.estimated_ratio(mask) if ratios[ratio] is None else ratios[ratio][chunk]
                errors = sums.squared_error(sums.output(mask, used, branches)).sum(dim=(0, 1))
                squared[ratio] = squared[ratio] + errors
            energy = energy + sums.energy().sum()
            del sums, branches
        squared = {ratio: errors.unflatten(0, (len(routers), -1)).tolist() for ratio, errors in squared.items()}
        squared = {(router, ratio): tuple(squared[ratio][routers.index(router)]) for router, ratio in variants}
        return LayerErrors(self.sparsities, squared, float(energy))


def _free_part(scores, forced):
    """Of (..., T_n), the key blocks that the router picks from."""
    return scores if forced is None else scores[..., forced.prefix : forced.prefix + forced.free]


def _with_forced(masks, forced):
    """Masks (..., free blocks) -> (..., T_n), 1 at the forced blocks of both ends."""
    return masks if forced is None else F.pad(masks, (forced.prefix, forced.suffix), value=1.0)
