"""Timing several checkouts in turns, without a GPU: whose kernels a process takes, the order of the turns, and the table."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import builds

ROOT = Path(builds.__file__).resolve().parent.parent


@pytest.fixture
def folders(tmp_path):
    made = [tmp_path / name for name in ("before", "after")]
    for folder in made:
        (folder / "sla2_kernels").mkdir(parents=True)
        (folder / "sla2_kernels" / "__init__.py").write_text("")
    return [str(folder) for folder in made]


def test_a_process_takes_the_kernels_of_the_folder_and_the_benchmarks_of_this_checkout(folders):
    code = (
        f"from benchmarks import builds; builds.use_kernels_of({folders[0]!r})\n"
        "import benchmarks.inputs, sla2_kernels\n"
        "print(sla2_kernels.__file__, benchmarks.inputs.__file__, sep='\\n')"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    kernels, inputs = map(Path, run.stdout.splitlines())
    assert kernels.parent.parent == Path(folders[0]) and inputs.is_relative_to(ROOT)


def test_kernels_that_are_imported_already_are_not_replaced(folders):
    import sla2_kernels  # noqa: F401

    with pytest.raises(RuntimeError, match="imported already"):
        builds.use_kernels_of(folders[0])


@pytest.mark.parametrize(
    ("words", "gpu", "said"),
    [
        (["benchmarks"], True, "benchmarks holds no sla2_kernels: name the root of a checkout."),
        ([".", "--turns", "0"], True, "--turns 0: each build must run at least once."),
        ([".", "--shapes", "H3,LTX"], True, "'LTX' is not one of 14B-720p, H3,"),
        ([".", "--sparsities", "0.9,97%"], True, "argument --sparsities: invalid"),
        (["."], False, "there is no GPU."),
    ],
)
def test_what_cannot_be_timed_is_told(monkeypatch, capsys, words, gpu, said):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with pytest.raises(SystemExit):
        builds.main(words)
    assert said in capsys.readouterr().err


def test_builds_take_turns_and_the_table_says_where_turns_differ(folders, monkeypatch, capsys):
    ran = []
    times = iter([(1.0, 0.5), (0.8, 0.3), (1.1, 0.5), (0.801, 0.3)])

    def measured(args, build, cache):
        ran.append((build.name, cache.name))
        whole, loop = next(times)
        row = {"shape": "LTX-2", "sparsity": 0.97, "ms": whole, "kernels": {"_loop": loop}}
        if build.name == "after":
            row["kernels"] = {"_loop": loop, "_new": 0.1}
        return [row]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(builds, "measured_apart", measured)
    builds.main(folders)
    assert ran == [("before", "0"), ("after", "1")] * 2
    assert capsys.readouterr().out.splitlines() == [
        f"| ms | {folders[0]} | {folders[1]} |",
        "|---|---|---|",
        "| LTX-2, 97% | 1.05 (1 to 1.1) | 0.8005 |",
        "| _loop | 0.5 | 0.3 |",
        "| _new | - | 0.1 |",
    ]
