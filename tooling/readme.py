"""The README's measured part, written from benchmarks/results: python -m tooling.readme

No number is typed there: a test compares the README with what this module would write. Plots go to docs/.
"""

import sys

from benchmarks.consumer_table import consumer_markdown
from benchmarks.plot import part_plot
from benchmarks.results import RESULTS, load
from benchmarks.table import markdown, step_markdown

from .plan import ROOT

BEGIN, END = "<!-- measured begin -->", "<!-- measured end -->"
PICTURE = "workflows/wan2.1_t2v_1.3b_sla2.jpg"
PLOTS = {
    "shapes": "Times faster than FlashAttention-2, at Wan's real sizes",
    "length": "Time of one attention call against the number of tokens",
    "sparsity": "Time of one attention call against the share that is skipped",
}


def measured(folder=RESULTS):
    """Contents of the results files that hold the table's part, the best measured card first."""
    contents = [load(path) for path in sorted(folder.glob("*.json"))]
    whole = [content for content in contents if "shapes" in content.get("parts", {})]
    return sorted(whole, key=lambda content: -len(content["parts"]))


def steps(folder=RESULTS):
    """Contents of the results files of benchmarks.comfyui_step."""
    contents = [load(path) for path in sorted(folder.glob("comfyui-step-*.json"))]
    return [content for content in contents if content["rows"]]


def consumers(folder=RESULTS):
    """Contents of the results files of benchmarks.consumer."""
    contents = [load(path) for path in sorted(folder.glob("consumer-*.json"))]
    return [content for content in contents if content["rows"]]


def plots(contents):
    """{file name: (SVG text, what it shows)} of the first card that has each part."""
    found = {}
    for part, shows in PLOTS.items():
        svg = next(filter(None, (part_plot(content, part) for content in contents)), None)
        if svg:
            found[f"{part}.svg"] = svg, shows
    return found


def block(contents, step_contents=(), consumer_contents=()):
    """What stands between the README's two marks."""
    if not contents and not step_contents:
        picture = f"![Dense and SLA2 side by side in one ComfyUI workflow]({PICTURE})"
        return f"{picture}\n\nNothing has been measured on a GPU yet, so no number stands here."
    pictures = [f"![{shows}](docs/{name})" for name, (_, shows) in plots(contents).items()]
    tables = [*map(markdown, contents), *map(consumer_markdown, consumer_contents), *map(step_markdown, step_contents)]
    return "\n\n".join([*pictures[:1], *tables, *pictures[1:]])


def insert(text, content):
    """``text`` with the marked part replaced. Raises ValueError where a mark is missing or there twice."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the README must hold {BEGIN} and {END} once each.")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{content}\n{END}{rest.split(END)[1]}"


def main():
    contents = measured()
    drawn = plots(contents)
    if drawn:
        (ROOT / "docs").mkdir(exist_ok=True)
    for name, (svg, _) in drawn.items():
        (ROOT / "docs" / name).write_text(svg, encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(
        insert(readme.read_text(encoding="utf-8"), block(contents, steps(), consumers())), encoding="utf-8"
    )
    print(f"README.md: {len(contents)} measured cards; docs/: {', '.join(drawn) or 'no plots'}")


if __name__ == "__main__":
    sys.exit(main())
