"""What the videos of one fine-tuning step are: decided by the step's number and the seed alone."""

import torch


def drawn(config, step, count):
    """What the videos of one step are, whatever the number of processes: (indices, noise levels, dropped captions), each
    (batch,), and a seed for each video's noise.

    config: has seed, batch, shift (of the noise levels, 1: none) and drop_caption (share). count: videos there are.
    """
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) % 2**63)
    indices = torch.randint(count, (config.batch,), generator=generator)
    # one level from each equal part of the range, shifted towards noise as sampling is
    u = (
        torch.randperm(config.batch, generator=generator) + torch.rand(config.batch, generator=generator)
    ) / config.batch
    u = u.clamp(1e-4, 1 - 1e-4)
    levels = shifted(u, config.shift)
    dropped = torch.rand(config.batch, generator=generator) < config.drop_caption
    seeds = torch.randint(2**62, (config.batch,), generator=generator)
    return indices, levels, dropped, seeds


def shifted(levels, shift):
    """Noise levels (0 to 1, any shape) moved towards noise, as sampling does; a shift of 1 leaves them."""
    return shift * levels / (1 + (shift - 1) * levels)


def noise_like(latents, seeds):
    """Gaussian noise for each video from its own seed, so that sharing out a batch changes nothing."""

    def noise(x, seed):
        generator = torch.Generator(device=x.device).manual_seed(int(seed))
        return torch.randn(x.shape, device=x.device, generator=generator, dtype=x.dtype)

    return torch.stack([noise(x, seed) for x, seed in zip(latents, seeds, strict=True)])


def learning_rate_factor(step, steps, warmup):
    """What a learning rate is multiplied by at ``step`` of ``steps``: full after ``warmup``, falling over the last quarter."""
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1, steps // 4))
