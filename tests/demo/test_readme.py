"""The README's measured part is what the results files say, and its pictures exist."""

import re

import pytest

from benchmarks import forward, readme
from benchmarks.results import load, save
from tooling.paths import ROOT


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folder with results of the CPU at tiny shapes, and one file of another kind."""
    folder = tmp_path_factory.mktemp("results")
    base = ["--device", "cpu", "--precisions", "16bit", "--out", str(folder / "cpu.json")]
    forward.main([*base, "--parts", "shapes", "--shapes", "tiny", "--sparsities", "0.75"])
    forward.main([*base, "--parts", "length", "--lengths", "1024", "--sparsities", "0.75"])
    save(folder / "a_step.json", {"step": 1})
    return folder


@pytest.mark.parametrize("part", ["steps", "measured", "cards"])
def test_the_readme_is_what_the_results_say(part):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.insert(text, part, readme.blocks()[part]) == text, "run: python -m benchmarks.readme"


def test_the_plots_are_what_the_results_say():
    for name, (svg, _) in readme.plots(readme.measured()).items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == svg, "run: python -m benchmarks.readme"


def test_every_picture_of_the_readme_exists():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


def test_the_first_screen_is_a_sentence_a_picture_a_table_and_two_commands():
    first, _ = (ROOT / "README.md").read_text(encoding="utf-8").split("```\n\n", 1)
    paragraphs = [part for part in first.split("\n\n") if not part.startswith("|")]
    assert paragraphs[0].startswith("# ") and paragraphs[1].count(". ") == 0 and "![" in paragraphs[2]
    assert first.count("![") == 1 and readme.blocks()["steps"] in first
    assert first.endswith("```\npython demo.py\npython run_tests.py\n")


def test_measured_results_become_picture_and_table(results):
    contents = readme.measured(results)
    assert contents == [load(results / "cpu.json")]
    text = readme.details(contents, [], [])
    assert text.startswith("![Attention error against time of a call, by method](docs/error_time.svg)\n\n| method |")
    assert text.endswith("![Time of one attention call against the number of tokens](docs/length.svg)")
    assert "skips 75%" in text and readme.NOTHING not in text
    assert list(readme.plots(contents, results)) == ["length.svg"]


def test_measured_steps_become_a_table(tmp_path):
    rows = [
        {"part": "tiny", "variant": name, "seconds_per_step": seconds, "peak_bytes": peak}
        for name, seconds, peak in (("dense", 3.0, 100), ("SLA2, skips 97%", 1.0, 101))
    ]
    facts = {"card": "a card", "comfyui": "0.33.0", "torch": "2.11"}
    save(tmp_path / "comfyui-step-a.json", {"environment": facts, "parts": {"tiny": {}}, "rows": rows})
    (content,) = readme.steps(tmp_path)
    text = readme.first_screen([content], [])
    assert (
        "| dense | 3.00 s (1.0x) |\n| **SLA2**, skips 97% | 1.00 s (3.0x) |" in text and "at most 1.010 times" in text
    )


@pytest.mark.parametrize("text", ["", "{begin}{begin}{end}", "{begin}{end}{end}"])
def test_the_marks_must_be_there_once(text):
    begin, end = readme.marks("steps")
    with pytest.raises(ValueError, match="once each"):
        readme.insert(text.format(begin=begin, end=end), "steps", "x")
