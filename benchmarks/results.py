"""The measured rows of one card: benchmarks/results/<card>.json.

{"environment": {...}, "parts": {part: {"ceilings", "absent", "environment"}}, "rows": [{part, method, shape, sparsity,
precision, ms, peak_bytes, ...}]}. A part is measured in one run, peers included; measuring it again replaces its rows.
"""

import json
import os
import re
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def card_file(card, folder=RESULTS):
    """The file of a card, "NVIDIA H100 80GB HBM3" -> nvidia-h100-80gb-hbm3.json."""
    return Path(folder) / (re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") + ".json")


def load(path):
    """The content of a results file; an empty one where there is none."""
    path = Path(path)
    if not path.exists():
        return {"environment": {}, "parts": {}, "rows": []}
    return json.loads(path.read_text(encoding="utf-8"))


def measured(path):
    """The content of a results file with rows; ends the script where there are none."""
    content = load(path)
    if not content["rows"]:
        raise SystemExit(f"{path} has no rows: name a results file by --out.")
    return content


def save(path, content):
    """Writes the file whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def replace_part(content, part, rows, about):
    """``content`` with the rows of ``part`` replaced and what belongs to the run beside them."""
    kept = [row for row in content["rows"] if row["part"] != part]
    return {
        "environment": about["environment"],
        "parts": {**content["parts"], part: about},
        "rows": kept + rows,
    }


def timed(rows):
    """The rows with a time that counts: no failed peer, and no row of ours that did not pass its check."""
    return [row for row in rows if row.get("ms") is not None and row.get("passed", True)]
