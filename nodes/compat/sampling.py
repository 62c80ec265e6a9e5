"""One sampling from pure noise, as the KSampler node does it."""

import comfy.sample
import comfy.utils


def sample_once(model, positive, negative, latent_image, seed, callback, sampler):
    """The sampled latent (tensor). callback(step, x0, x, steps) comes after each step; sampler: steps, cfg, names."""
    ratios = [latent_image[k] for k in ("downscale_ratio_spacial", "downscale_ratio_temporal") if k in latent_image]
    latent = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"], *ratios)
    return comfy.sample.sample(
        model,
        comfy.sample.prepare_noise(latent, seed, latent_image.get("batch_index")),
        positive=positive,
        negative=negative,
        latent_image=latent,
        denoise=1.0,
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
        **sampler,
    )
