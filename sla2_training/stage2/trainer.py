"""The training loop of stage 2, on one device or on many through Hugging Face accelerate.

A step is decided by its number and the seed alone: which way to sample it trains, which videos, which noise, which levels.
Processes share it out, so one process and many compute the same loss, and a resumed run goes on as if it had never stopped.
"""

import hashlib
import math
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sla2_kernels.support import resolve_precision

from ..draws import drawn, learning_rate_factor, noise_like
from ..errors import TrainingError
from ..losses import DENSE_FROM
from ..optimisers import optimisers, take_step
from ..ratios import with_trained_ratios
from . import checkpoint
from .lora import save_lora
from .report import Report, Validation
from .student import LORA, RATIOS, freeze_all_but
from .ways import Turns, euler

FULL = {"full_state_dict": True, "cpu_offload": True}


def make_accelerator(config):
    """The Accelerator that a configuration asks for: one device or all that the launcher started, bfloat16 autocast."""
    from accelerate import Accelerator

    return Accelerator(mixed_precision=config.mixed_precision)


def shard(student, device):
    """Splits every weight over all processes, block by block (FSDP2); autocast, not the sharding, sets the precision.

    A student on the CPU is moved to ``device`` on the way, so that no GPU ever holds more than a block of the whole.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in student.model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(student, mesh=mesh)


class Stage2Trainer:
    """Fine-tunes a Student's LoRA and mixing ratios.

    Args:
        config: Stage2Config. student: Student, on any device. data, validation: VideoLatents; validation may be None.
        model_name: how messages and checkpoints call the model. accelerator: accelerate.Accelerator, None makes one.
        say: called with each line of progress.

    Raises:
        ValueError: guidance without an empty caption, or a few-step LoRA that is not this model's.
    """

    def __init__(self, config, student, data, *, validation=None, model_name, accelerator=None, say=print):
        self.config, self.data, self.validation, self.say = config, data, validation, say
        self.accelerator = make_accelerator(config) if accelerator is None else accelerator
        self.device = self.accelerator.device
        self.rounds = config.rounds(self.accelerator.num_processes)
        self.sharded = config.fsdp and self.accelerator.num_processes > 1
        if not self.sharded:
            student.to(self.device)
        self.student = student
        freeze_all_but(student)
        config.check_data(data)
        if config.drop_caption > 0 and data.empty is None:
            self._say('the data has no "empty_context": no captions are dropped')
        self.output, self.step = Path(config.output), 0
        self.turns = self._guarded(lambda: Turns(config, student.model))
        self.facts = {
            "model": {"name": model_name, **_facts_of(student)},
            "adapter": {
                "rank": config.lora_rank,
                "lora_alpha": config.lora_alpha,
                "sparsity": config.sparsity,
                "targets": list(config.lora_targets),
            },
            "training": {"steps in turns": self.turns.names, "states": config.few_step_states},
        }
        if self.sharded:
            self.wrapped = shard(student, self.device)
            self._start_ratios()
        else:
            # before the processes compare their weights
            self._start_ratios()
            self.wrapped = self.accelerator.prepare(student)
        named = [(n, p) for n, p in self.wrapped.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        parts = ([p for n, p in named if kind in n] for kind in (LORA, RATIOS))
        self.optimisers = optimisers(config.optimiser, *parts, config.learning_rate, config.ratio_learning_rate)
        self.report = Report(config.loss, config.sparsity, self.turns.names)

    def train(self, resume=None):
        """Trains to the end and exports; returns the Report.

        resume: a checkpoint's path, or True for the newest one in the output folder (none there: starts anew).

        Raises:
            TrainingError: the loss or its gradient is not finite, memory ran out, the checkpoint is another model's, a file cannot
                be written, or the output folder holds checkpoints and ``resume`` is not set.
        """
        checkpoint.prepare(self.output, resume)
        if resume:
            found = checkpoint.checkpoints(self.output)[-1:] if resume is True else [resume]
            for path in found:
                self._load(path)
        self.wrapped.train()
        self._say(f"{self.accelerator.num_processes} process(es), {'sharded' if self.sharded else 'whole'} weights")
        try:
            self._steps()
        finally:
            self.turns.end()
        self._guarded(self._final_loss)
        self.validate()
        self._save()
        self.export()
        return self.report

    def _steps(self):
        first = self.step
        while self.step < self.config.steps:
            if (self.step - first) % self.config.validate_every == 0:
                self.validate()
            loss = self._guarded(self._forward_backward)
            # saved before the update: these weights are known to give a finite loss
            if self.step > first and self.step % self.config.checkpoint_every == 0:
                self._save()
            self._update()
            self.report.losses[self.step] = loss
            self.step += 1
            if self.step % 10 == 0 or self.step == self.config.steps:
                self._say(f"step {self.step} of {self.config.steps}: {self._newest_losses()}")

    def _newest_losses(self):
        steps = range(max(0, self.step - len(self.turns.ways)), self.step)
        pairs = ((self.turns.of(step).name, self.report.losses.get(step)) for step in steps)
        return ", ".join(f"{name} loss {loss:.5f}" for name, loss in pairs if loss is not None)

    def export(self):
        """Writes lora.safetensors (for ComfyUI's LoRA loaders), router.safetensors and log.json into the output folder."""
        state = self._state()
        if not self.accelerator.is_main_process:
            return
        self.output.mkdir(parents=True, exist_ok=True)
        name = self.facts["model"]["name"]
        about = f"SLA2 stage 2 LoRA of {name}, trained to skip {100 * self.config.sparsity:g}%; use it with router.safetensors"
        lora = {n: t for n, t in state.items() if LORA in n}
        save_lora(self.output / "lora.safetensors", lora, self.config.lora_alpha, about)
        self.trained_router(state).save(self.output / "router.safetensors")
        self.report.write(self.output / "log.json")

    def trained_router(self, state=None):
        """RouterWeights with the ratios as they are trained so far."""
        state = self._state() if state is None else state
        logits = [state[f"{RATIOS}.{i}"] for i in range(self.student.router.num_layers)]
        precision = resolve_precision(self.student.precision, self.device)
        return with_trained_ratios(self.student.router, logits, self.config.sparsity, precision)

    def _start_ratios(self):
        if self.student.needs_start:
            batch = self._batch(drawn(self.config, 0, len(self.data)), slice(0, 1), self.data)
            with self.accelerator.autocast():
                self.student.start_ratios(*batch[:3])

    def _batch(self, draw, part, data):
        """(noisy, t, context, velocity) of some positions of a draw, as the way that trains has them."""
        way, turn = self.turns.now, self.turns.number(self.step)
        indices, levels, dropped, seeds = way.rows(*(x[part] for x in draw), turn)
        clean, context = data.batch(indices, dropped, self.device)
        noise, t = noise_like(clean, seeds), levels.to(self.device)
        if way.sampled:
            with torch.no_grad():
                noisy = euler(lambda x, t: self._velocity(x, t, context), noise, way.levels_to(turn))
        else:
            noisy = torch.lerp(clean, noise, t.view(-1, 1, 1, 1, 1))
        return noisy, t, context, noise - clean

    def _loss(self, noisy, t, context, velocity):
        wanted = self._wanted(noisy, t, context, velocity)
        return self.turns.now.error(self._velocity(noisy, t, context) - wanted).square().mean()

    @torch.no_grad()
    def _wanted(self, noisy, t, context, velocity):
        """What the model is trained towards: the video's velocity, or that of the model of the same weights run dense."""
        loss = self.config.loss if self.turns.now.by_loss else "distill"
        if loss == "flow":
            return velocity
        if loss == "distill":
            return self._velocity(noisy, t, context, dense=True)
        follows = t >= DENSE_FROM[loss]
        # processes must call the model equally often
        rows = follows if self.accelerator.num_processes == 1 else torch.ones_like(follows)
        dense = velocity.clone()
        if rows.any():
            dense[rows] = self._velocity(noisy[rows], t[rows], context[rows], dense=True)
        return torch.where(follows.view(-1, 1, 1, 1, 1), dense, velocity)

    def _velocity(self, noisy, t, context, dense=False):
        with self.accelerator.autocast():
            return self.wrapped(noisy, t, context, dense=dense).float()

    def _parts(self):
        own = self.config.batch // self.accelerator.num_processes
        start, size = self.accelerator.process_index * own, self.config.micro_batch
        return [slice(i, i + size) for i in range(start, start + own, size)]

    def _forward_backward(self):
        """The step's loss over all processes; its gradients stay in the parameters."""
        self.turns.take(self.turns.of(self.step))
        draw, parts, total = drawn(self.config, self.step, len(self.data)), self._parts(), 0.0
        for number, part in enumerate(parts):
            batch = self._batch(draw, part, self.data)
            with self._synchronised(number + 1 == len(parts)):
                loss = self._loss(*batch) / len(parts)
                self.accelerator.backward(loss)
            total = total + loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        return self._finite(total, float(norm.full_tensor() if isinstance(norm, DTensor) else norm))

    def _synchronised(self, last):
        """Gradients are synchronised across processes in a step's last round only."""
        if self.sharded:
            self.wrapped.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    @torch.no_grad()
    def _final_loss(self):
        draw = drawn(self.config, self.step, len(self.data))
        parts = self._parts()
        return self._finite(sum(self._loss(*self._batch(draw, part, self.data)) for part in parts) / len(parts), 0.0)

    def _finite(self, loss, norm):
        loss = float(self.accelerator.reduce(loss.float(), reduction="mean"))
        if math.isfinite(loss) and math.isfinite(norm):
            return loss
        what = "the loss" if not math.isfinite(loss) else "the gradient"
        raise TrainingError(
            f"Stage 2 stopped at step {self.step} ({self.turns.now.name}): {what} is not finite (loss {loss}). {self._last_good()} "
            "Lower learning_rate, or leave out the video that causes it."
        )

    def _last_good(self):
        saved = checkpoint.checkpoints(self.output, self.step)
        return f"The last good checkpoint is {saved[-1]}." if saved else "No checkpoint had been written yet."

    def _guarded(self, work):
        try:
            return work()
        except torch.OutOfMemoryError as error:
            hints = ["lower micro_batch"] if self.config.micro_batch > 1 else []
            hints += [] if self.config.gradient_checkpointing else ["set gradient_checkpointing to true"]
            if self.config.few_step_loras:
                hints.append("leave few_step_loras out, which need a copy of the weights")
            elif not self.config.fsdp:
                hints.append("set fsdp to true and use more GPUs")
            if self.config.guidance != 1 and self.config.micro_batch == 1:
                hints.append("leave guidance out, whose steps run a video twice")
            raise TrainingError(
                f"Stage 2 ran out of memory at step {self.step}: {', or '.join([*hints, 'train on shorter videos'])}. "
                f"{self._last_good()}"
            ) from error

    def _update(self):
        take_step(self.optimisers, learning_rate_factor(self.step, self.config.steps, self.config.warmup))

    @torch.no_grad()
    def validate(self):
        """Adds both losses on the validation videos, at even noise levels, to the report; processes share the work out.

        Of the model with no few-step LoRA, whichever way was trained last.
        """
        if self.validation is None:
            return
        self.turns.end()
        self.wrapped.eval()
        levels, count = self.config.validation_levels, len(self.validation)
        pairs = [(video, level) for video in range(count) for level in range(levels)]
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        sums = torch.zeros(3, device=self.device)
        for start in range(0, len(pairs), world):
            # every process calls the model equally often, which sharded weights need
            position = start + rank
            video, level = pairs[min(position, len(pairs) - 1)]
            draw = (
                torch.tensor([video]),
                torch.tensor([(level + 0.5) / levels]),
                torch.tensor([False]),
                torch.tensor([1000 + video]),
            )
            noisy, t, context, velocity = self._batch(draw, slice(0, 1), self.validation)
            teacher, own = (self._velocity(noisy, t, context, dense=dense) for dense in (True, False))
            losses = [(a - b).square().mean() for a, b in ((own, velocity), (own, teacher), (teacher, velocity))]
            sums += torch.stack(losses) * (position < len(pairs))
        flow, distance, dense = (self.accelerator.reduce(sums, reduction="sum") / len(pairs)).tolist()
        self.wrapped.train()
        self.report.dense_flow = dense
        self.report.validations.append(Validation(self.step, flow, distance))
        self._say(f"step {self.step}: flow-matching loss {flow:.5f} (dense {dense:.5f}), distance {distance:.6f}")

    def _state(self):
        options = sharded.StateDictOptions(**FULL, ignore_frozen_params=True)
        return sharded.get_model_state_dict(self.wrapped, options=options)

    def _save(self):
        tensors = self._state()
        options = sharded.StateDictOptions(**FULL)
        optimiser = sharded.get_optimizer_state_dict(self.wrapped, self.optimisers, options=options)
        if self.accelerator.is_main_process:
            checkpoint.save(self.output, self.step, tensors, optimiser, self.facts, self.config.keep)
        self.accelerator.wait_for_everyone()

    def _load(self, path):
        tensors, optimiser, stored = checkpoint.load(path, self.facts)
        self.step = stored["step"]
        if self.step > self.config.steps:
            raise TrainingError(
                f"Checkpoint {path} has {self.step} steps, and steps is {self.config.steps}: set it higher, or resume another one."
            )
        own = {name: tensor.shape for name, tensor in self._state().items()}
        # with split weights only the main process has them
        if own and own != {name: tensor.shape for name, tensor in tensors.items()}:
            raise TrainingError(f"Checkpoint {path} is damaged: it holds other weights than those that train.")
        sharded.set_model_state_dict(
            self.wrapped, tensors, options=sharded.StateDictOptions(full_state_dict=True, strict=False)
        )
        try:
            sharded.set_optimizer_state_dict(
                self.wrapped, self.optimisers, optimiser, options=sharded.StateDictOptions(full_state_dict=True)
            )
        except KeyError as error:
            raise TrainingError(
                f'Checkpoint {path} has no state of the optimiser "{self.config.optimiser}": set the one that it was made with.'
            ) from error
        self._say(f"resumed {path} at step {self.step}")
        for what, wanted in self.facts["training"].items():
            before = stored.get("training", {}).get(what, wanted)
            if before != wanted:
                self._say(f"it was trained with other {what}: {_listed(before)}; from here on {_listed(wanted)}")

    def _say(self, text):
        if self.accelerator.is_main_process:
            self.say(text)


def _listed(names):
    return names if isinstance(names, str) else ", ".join(names)


def _facts_of(student):
    """Identifies a model: sizes, and a digest of a few numbers of every frozen weight."""
    router, digest = student.router, hashlib.sha256()
    for name, parameter in student.model.named_parameters():
        if LORA not in name:
            digest.update(parameter.detach().flatten()[:8].float().cpu().numpy().tobytes())
    return {
        "family": router.model_family,
        "number of layers": router.num_layers,
        "number of heads": router.num_heads,
        "head_dim": router.head_dim,
        "digest of the weights": digest.hexdigest()[:16],
    }
