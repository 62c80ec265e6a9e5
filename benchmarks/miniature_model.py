"""The miniature text-to-video model as quality.py uses it: recorded attention calls, validation loss, videos."""

from dataclasses import dataclass
from pathlib import Path

import torch

from miniature.captions import embed, split_captions
from miniature.captures import Recorder
from miniature.pool import fill_pool
from miniature.sample import GUIDANCE, SHIFT, WEIGHTS, load_models, sample_latents
from miniature.train_dit import validation_losses
from miniature.vae import WanVAE, denormalise_latents, psnr
from miniature.wan import WanConfig, WanModel

from .video_metrics import ssim

SEED = 4000


@dataclass
class Miniature:
    """size: (frames, height, width) of its videos. steps: of sampling. levels: noise levels of the validation loss.

    bf16: run and record in bfloat16, as ComfyUI runs the model. cfg: guidance scale, 1 turns guidance off. shift: of the
    noise levels.
    """

    model: WanModel
    vae: WanVAE
    size: tuple[int, int, int]
    steps: int
    device: torch.device
    levels: int = 8
    bf16: bool = False
    cfg: float = GUIDANCE
    shift: float = SHIFT

    @classmethod
    def load(cls, folder, device, *, steps=20, levels=8, bf16=False, cfg=GUIDANCE):
        """The trained model at 32,760 tokens."""
        model, vae = load_models(Path(folder) if folder else WEIGHTS, device)
        bf16 = bf16 or torch.device(device).type != "cpu"
        return cls(model, vae, (81, 480, 832), steps, torch.device(device), levels, bf16, cfg)

    @classmethod
    def tiny(cls, device):
        """A random model: 320 tokens, 2 layers."""
        torch.manual_seed(0)
        model = WanModel(WanConfig(dim=128, ffn_dim=128, num_layers=2, text_dim=4096))
        vae, device = WanVAE(2).to(device).eval(), torch.device(device)
        return cls(model.to(device).eval(), vae, (17, 128, 128), 2, device, 1, device.type != "cpu")

    @property
    def latent_shape(self):
        frames, height, width = self.size
        return 1, 16, (frames - 1) // 4 + 1, height // 8, width // 8

    def record(self, split, *, prompts, per_video):
        """Captures of dense self-attention calls while sampling: ``per_video`` model calls of each video, all layers.

        split: "train" or "held out" captions. With guidance every other call has the empty caption; both are met.
        """
        _, _, frames, height, width = self.latent_shape
        guided = self.cfg != 1
        every = max(1, self.steps * (2 if guided else 1) // per_video)
        if guided:
            # an odd stride meets both halves of guidance
            every |= 1
        dtype = torch.bfloat16 if self.bf16 else None
        recorder = Recorder((frames, height // 2, width // 2), every=every, dtype=dtype)
        seed = SEED if split == "train" else 2 * SEED
        for number, caption in enumerate(self._captions(split, prompts)):
            recorder.calls.clear()
            self._sample(caption, seed + number, recorder)
        return recorder.captures

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def _captions(self, split, count):
        captions = split_captions()[0 if split == "train" else 1]
        return [str(captions[i * len(captions) // count]) for i in range(count)]

    def _sample(self, caption, seed, attention):
        with self._autocast():
            options = {"steps": self.steps, "cfg": self.cfg, "device": self.device, "attention": attention}
            options["shift"] = self.shift
            return sample_latents(self.model, embed(caption), shape=self.latent_shape, seed=seed, **options)

    def validation_loss(self, attention, clips):
        """Mean of validation_losses()."""
        losses = self.validation_losses(attention, clips)
        return sum(losses) / len(losses)

    def validation_losses(self, attention, clips):
        """Flow-matching loss of each of ``clips`` clips of held-out captions: same clips and noise at every call."""
        if not hasattr(self, "_clips"):
            held_out = split_captions()[1]
            chosen = [i * len(held_out) // clips for i in range(clips)]
            self._clips = fill_pool(
                self.vae, held_out, chosen, size=self.size, seed=SEED + 12, device=self.device, pixels=1
            )
            self._contexts = torch.cat([embed(str(caption)) for caption in held_out]).to(self.device)

        def run(x, t, context, **options):
            return self.model(x, t, context, attention, **options)

        return validation_losses(run, self._clips, self._contexts, levels=self.levels)

    @torch.no_grad()
    def videos(self, attention, prompts):
        """One video (3, F, H, W) per held-out caption, on the CPU."""
        made = []
        for number, caption in enumerate(self._captions("held out", prompts)):
            latents = self._sample(caption, 3 * SEED + number, attention)
            with self._autocast():
                made.append(self.vae.decode(denormalise_latents(latents))[0].float().cpu())
        return made

    def likeness(self, videos, reference):
        """{"psnr": mean dB, "ssim": mean} against the dense videos of the same seeds; None for these themselves."""
        if videos is reference:
            return {"psnr": None, "ssim": None}
        pairs = list(zip(videos, reference, strict=True))
        return {
            "psnr": sum(psnr(a, b) for a, b in pairs) / len(pairs),
            "ssim": sum(ssim(a.to(self.device), b.to(self.device)) for a, b in pairs) / len(pairs),
        }
