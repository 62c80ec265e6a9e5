"""Write the figures of the training logs into README.md: `python -m miniature.report`.

Reads weights/vae_log.json and weights/dit_log.json and replaces the text between the two results markers, so that no
number there is typed by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .sample import WEIGHTS
from .train_dit import DIT_FILE
from .train_vae import VAE_FILE
from .weight_files import weight_file

BEGIN, END = "<!-- results begin -->", "<!-- results end -->"


def results_table(weights: Path) -> str:
    """The Markdown between the markers, from the logs and the files in the folder."""
    vae = json.loads((weights / "vae_log.json").read_text())
    dit = json.loads((weights / "dit_log.json").read_text())
    codec, flow = vae["results"], dit["results"]
    frames, height, width = flow["full_size"]
    vae_seconds, dit_seconds = (max(record["seconds"] for record in log["records"]) for log in (vae, dit))
    rows = [
        (
            "VAE file",
            f"{weight_file(VAE_FILE, weights).stat().st_size / 1e6:.1f} MB, base width {vae['run']['vae_dim']}, float16",
        ),
        ("VAE training", f"{codec['vae_steps']} steps, {vae_seconds / 60:.1f} minutes on {vae['run']['device_name']}"),
        (
            "VAE PSNR, held-out captions",
            f"{codec['vae_test_psnr_db']:.1f} dB mean, {codec['vae_test_psnr_db_worst']:.1f} dB worst "
            f"of {codec['vae_test_clips']} clips",
        ),
        (
            "Transformer file",
            f"{weight_file(DIT_FILE, weights).stat().st_size / 1e6:.1f} MB, {flow['dit_parameters'] / 1e6:.2f} million weights, "
            f"{dit['run']['layers']} layers, bfloat16",
        ),
        (
            "Transformer training",
            f"{flow['dit_steps']} steps, {dit_seconds / 60:.1f} minutes on {dit['run']['device_name']}, "
            f"{flow['small_clips']} small and {flow['full_clips']} full clips",
        ),
        ("Evaluated size", f"{frames} frames of {width}x{height}, {flow['full_tokens']} tokens"),
        ("Validation loss, held-out captions", f"{flow['validation_loss_full']:.4f}"),
        ("Validation loss, training captions, new scenes", f"{flow['validation_loss_full_seen_captions']:.4f}"),
        ("Validation loss, small clips, held-out captions", f"{flow['validation_loss_small']:.4f}"),
    ]
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join([*table, "", "Sampled after training, held-out captions, rows from the top:", "",
                      *(f"{number}. {caption}" for number, caption in enumerate(flow["sampled"], 1))])  # fmt: skip


def fill(readme: Path, weights: Path) -> None:
    """Replace the text between the markers of the readme.

    Raises:
        ValueError: the markers are missing.
    """
    text = readme.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme} needs exactly one {BEGIN} and one {END}: put them where the figures belong")
    head, rest = text.split(BEGIN)
    readme.write_text(f"{head}{BEGIN}\n{results_table(weights)}\n{END}{rest.split(END)[1]}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--readme", type=Path, default=Path(__file__).with_name("README.md"))
    args = parser.parse_args(argv)
    fill(args.readme, args.weights)


if __name__ == "__main__":
    main()
