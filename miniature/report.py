"""Write the figures of the shipped weights into README.md: `python -m miniature.report --measured FOLDER`.

Reads weights/long_log.json (the last sitting of miniature.train_long) and weights/measure.json (miniature.measure's report of the
weights, copied there by --measured FOLDER), and replaces the text between the two results markers, so that no number there is
typed by hand.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file

from .objects import CHECKS
from .sample import WEIGHTS
from .train_dit import DIT_FILE
from .train_long import LOG_FILE
from .train_vae import VAE_FILE
from .vae import WanVAE
from .wan import WanConfig
from .weight_files import weight_file

BEGIN, END = "<!-- results begin -->", "<!-- results end -->"
MEASURED = "measure.json"


def results_table(weights: Path) -> str:
    """The Markdown between the markers, from the logs and the files in the folder."""
    log = json.loads((weights / LOG_FILE).read_text())
    run, results = log["run"], log["results"]
    dit, vae = (weight_file(name, weights) for name in (DIT_FILE, VAE_FILE))
    state = load_file(dit)
    on = f"{run['processes']} {run['device_name']}" if run.get("processes", 1) > 1 else run["device_name"]
    numbers, layers = sum(tensor.numel() for tensor in state.values()), WanConfig.from_state_dict(state).num_layers
    width = WanVAE.from_state_dict(load_file(vae)).dim
    rows = [
        ("Transformer", f"{dit.stat().st_size / 1e6:.1f} MB, {numbers / 1e6:.2f} million weights, {layers} layers, bfloat16"),
        ("VAE", f"{vae.stat().st_size / 1e6:.1f} MB, base width {width}, float16"),
        (f"Last sitting ({run['sitting']})", f"{results['steps']} steps, {results['seconds'] / 60:.1f} minutes on {on}"),
        ("Validation loss, held-out captions, 832x480", f"{results['validation_loss_full']:.4f}"),
        ("Validation loss, held-out captions, 208x128", f"{results['validation_loss_small']:.4f}"),
    ]  # fmt: skip
    if (weights / MEASURED).exists():
        rows += measured_rows(json.loads((weights / MEASURED).read_text()))
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def measured_rows(report: dict) -> list[tuple[str, str]]:
    """What miniature.measure found."""
    frames, height, width = report["size"]
    how = f"{frames} frames of {width}x{height}, {report['steps']} steps, guidance {report['cfg']:g}, shift {report['shift']:g}"
    shares = [f"{check} {mean([row[check] for row in report['rows']]):.2f}" for check in CHECKS]
    return [
        (f"Held-out captions that pass the image test ({how})", f"{report['passed']} of {report['of']}"),
        ("Frames that pass", ", ".join([f"all checks {mean([row['frames_passed'] for row in report['rows']]):.2f}", *shares])),
    ]  # fmt: skip


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


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
    parser.add_argument(
        "--measured", type=Path, help="--out folder of miniature.measure: its report is kept beside the weights"
    )
    parser.add_argument("--readme", type=Path, default=Path(__file__).with_name("README.md"))
    args = parser.parse_args(argv)
    if args.measured:
        shutil.copyfile(args.measured / MEASURED, args.weights / MEASURED)
    fill(args.readme, args.weights)


if __name__ == "__main__":
    main()
