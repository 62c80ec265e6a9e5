"""The README's measured parts, written from benchmarks/results: python -m benchmarks.readme

Three parts lie between marks: "steps", whole denoising steps, "measured", attention calls, and "cards", those in the
instructions of RTX cards. No number is typed there: a
test compares the README with what this module would write. Plots go to docs/.
"""

import sys

from tooling.paths import ROOT

from .consumer_table import consumer_markdown, traffic_markdown
from .error_against_time import plot as error_plot
from .plot import part_plot
from .results import RESULTS, load
from .table import calls_markdown, markdown, memory_markdown, step_markdown

NOTHING = "Nothing has been measured on a GPU yet, so there are no numbers here."
# columns of the first screen
SHOWN_FIRST = ("MiniMax H3, int8", "LTX-2, second stage, 16 bit", "Wan 2.2 14B, 720p, fp8")
NO_CALLS = "MiniMax H3, LTX-2, HunyuanVideo and others [run too](#supported-models); no full step of theirs has been timed yet."
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


def calls(folder=RESULTS):
    """Contents of the results files of benchmarks.comfyui_calls."""
    return [load(path) for path in sorted(folder.glob("comfyui-calls-*.json"))]


def consumers(folder=RESULTS):
    """Contents of the results files of benchmarks.consumer."""
    return [load(path) for path in sorted(folder.glob("consumer-*.json"))]


def plots(contents, folder=RESULTS):
    """{file name: (SVG text, what it shows)}: error against time, and each part of the first card that has it."""
    found = {}
    if svg := error_plot(folder):
        found["error_time.svg"] = svg, "Attention error against time of a call, by method"
    for part, shows in PLOTS.items():
        svg = next(filter(None, (part_plot(content, part) for content in contents)), None)
        if svg:
            found[f"{part}.svg"] = svg, shows
    return found


def marks(part):
    return f"<!-- {part} begin -->", f"<!-- {part} end -->"


def blocks():
    """{part of the README: what stands between its two marks}"""
    return {
        "steps": first_screen(steps(), calls()),
        "measured": details(measured(), steps(), calls()),
        "cards": "\n\n".join(cards(consumers())) or NOTHING,
    }


def cards(contents):
    """The tables of benchmarks.consumer's results, times and bytes."""
    tables = []
    for content in contents:
        if any(row["part"].startswith("sm_") for row in content["rows"]):
            tables.append(consumer_markdown(content))
        tables.append(traffic_markdown(content))
    return list(filter(None, tables))


def first_screen(step_contents, call_contents):
    """One table: the models that most people run where they were timed, else Wan alone."""
    if call_contents:
        return "\n\n".join(calls_markdown(content, SHOWN_FIRST) for content in call_contents)
    return "\n\n".join([*map(step_markdown, step_contents), NO_CALLS]) if step_contents else NOTHING


def details(contents, step_contents, call_contents):
    """Pictures and tables of attention calls; where the first screen has another table, steps with other weights and memory, too."""
    pictures = [f"![{shows}](docs/{name})" for name, (_, shows) in plots(contents).items()]
    further = list(map(step_markdown, step_contents)) if call_contents else []
    further += [table(content) for table in (calls_markdown, memory_markdown) for content in call_contents]
    return "\n\n".join(filter(None, [*pictures[:1], *map(markdown, contents), *further, *pictures[1:]])) or NOTHING


def insert(text, part, content):
    """``text`` with one marked part replaced. Raises ValueError where a mark is missing or there twice."""
    begin, end = marks(part)
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the document must hold {begin} and {end} once each.")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def main():
    contents = measured()
    drawn = plots(contents)
    if drawn:
        (ROOT / "docs").mkdir(exist_ok=True)
    for name, (svg, _) in drawn.items():
        (ROOT / "docs" / name).write_text(svg, encoding="utf-8")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for part, content in blocks().items():
        text = insert(text, part, content)
    readme.write_text(text, encoding="utf-8")
    print(f"README.md: {len(contents)} measured cards; docs/: {', '.join(drawn) or 'no plots'}")


if __name__ == "__main__":
    sys.exit(main())
