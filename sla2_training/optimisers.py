"""The optimisers of a LoRA and of the mixing ratios beside it: AdamW for both, or Muon for the LoRA's matrices."""

import torch

OPTIMISERS = ("adamw", "muon")
BETAS = (0.9, 0.99)


def missing_optimiser(name):
    """None, or why this PyTorch has no optimiser of OPTIMISERS, as a clause for a sentence."""
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        return f"Muon comes with PyTorch 2.9 and newer, this is {torch.__version__}"
    return None


def optimisers(name, lora, ratios, learning_rate, ratio_learning_rate):
    """A tuple of torch optimisers whose groups have the full learning rate as "base", and 0 as "lr" until one is set.

    Muon (Jordan et al., 2024) takes steps of AdamW's size (arXiv 2502.16982): learning rates mean the same to both.

    Args:
        name: of OPTIMISERS. lora: matrices (2-D parameters). ratios: parameters of any shape.

    Raises:
        ValueError: no such optimiser, here or at all.
    """
    if name not in OPTIMISERS:
        raise ValueError(f"optimiser must be one of {', '.join(OPTIMISERS)}, got {name!r}.")
    reason = missing_optimiser(name)
    if reason:
        raise ValueError(f'{reason}: take "adamw", or update PyTorch.')
    adapters = {"params": list(lora), "lr": 0.0, "base": learning_rate}
    mixing = {"params": list(ratios), "lr": 0.0, "base": ratio_learning_rate}
    if name == "adamw":
        return (torch.optim.AdamW([adapters, mixing], betas=BETAS, weight_decay=0.0),)
    muon = torch.optim.Muon([adapters], weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW([mixing], betas=BETAS, weight_decay=0.0)


def take_step(optimisers, factor):
    """One step of all with the gradients that lie in the parameters, which are cleared. factor: of the full learning rates."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["base"] * factor
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
