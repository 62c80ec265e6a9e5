"""Commands beside each other: outputs whole and under their titles, statuses in order, nothing left running."""

import os
import sys
import time

import pytest

from tooling import side_by_side
from tooling.side_by_side import Part, run_side_by_side


def part(title, code, **variables):
    return Part(title, [sys.executable, "-S", "-c", code], {**os.environ, **variables})


def test_outputs_stay_whole_and_statuses_in_order(tmp_path, capsys):
    speak = "import os, time\nfor n in range(3): print(os.environ['WHO'], n, flush=True); time.sleep(0.1)\n"
    parts = [part("one", speak, WHO="a"), part("two", speak + "raise SystemExit(3)", WHO="b"), part("three", "1")]
    assert run_side_by_side(parts, tmp_path, tmp_path, 2) == [0, 3, 0]
    said = capsys.readouterr().out
    for title, who in (("one", "a"), ("two", "b")):
        assert f"{who} 0\n{who} 1\n{who} 2\n" in said.split(f"== {title}: ")[1]
    assert said.index("started: two") < min(said.index("== one"), said.index("== two")) < said.index("started: three")


@pytest.mark.parametrize("limit", [1, 2])
def test_no_more_than_the_limit_run_at_a_time(tmp_path, limit):
    times = [tmp_path / f"{number}.txt" for number in range(3)]
    code = "import sys, time\ns = time.time(); time.sleep(0.3); open({!r}, 'w').write(f'{{s}} {{time.time()}}')"
    assert run_side_by_side([part(str(t), code.format(str(t))) for t in times], tmp_path, tmp_path, limit) == [0, 0, 0]
    spans = [tuple(map(float, path.read_text().split())) for path in times]
    for start, _ in spans:
        assert sum(first <= start < last for first, last in spans) <= limit


def test_it_says_how_far_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "SAY_EVERY_S", 0)
    seen, said = tmp_path / "seen", []

    def say(text):
        said.append(text.strip())
        if "(42%)" in text:
            seen.touch()

    monkeypatch.setattr(side_by_side, "say", say)
    wait = "for _ in range(6000):\n    if not os.path.exists(os.environ['SEEN']): time.sleep(0.01)"
    code = f"import os, time\nprint('.. [ 42%]', flush=True)\n{wait}"
    assert run_side_by_side([part("slow", code, SEEN=str(seen))], tmp_path, tmp_path, 2) == [0]
    assert "still running: slow (42%)" in said


def test_what_was_started_is_ended_when_interrupted(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(side_by_side.time, "sleep", interrupt)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_side_by_side([part("endless", "import threading; threading.Event().wait()")], tmp_path, tmp_path, 2)
    assert time.monotonic() - start < 20
