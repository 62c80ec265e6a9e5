"""One sampling from pure noise, as the KSampler node does it."""

import comfy.sample
import comfy.utils


def latent_for(model, latent_image):
    """A LATENT's samples as the model takes them: an empty latent gets its channels and, where it makes one, its sound."""
    ratios = [latent_image[k] for k in ("downscale_ratio_spacial", "downscale_ratio_temporal") if k in latent_image]
    return comfy.sample.fix_empty_latent_channels(model, latent_image["samples"], *ratios)


def sample_once(model, positive, negative, latent_image, seed, callback, sampler):
    """The sampled latent, a tensor, or of several parts where the model makes sound too.

    callback(step, x0, x, steps) comes after each step; sampler: steps, cfg, names.
    """
    latent = latent_for(model, latent_image)
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
