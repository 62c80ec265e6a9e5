"""The GPU checks without a GPU: what the command says it cannot run, what a failure looks like, and its checks on two CPUs."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu_checks import __main__ as command
from benchmarks.gpu_checks import checks, second_gpu

CPU = torch.device("cpu")


@pytest.fixture
def cards(monkeypatch):
    """cards(name, ...) makes torch see these GPUs; the groups then hold no checks, but know what they miss."""

    def see(*names):
        monkeypatch.setenv("TRITON_CACHE_DIR", "unused")  # the command sets it for good
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(names))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: names[index])
        monkeypatch.setattr(command, "environment", lambda device: {"card": names[0]})
        for name, group in list(command.GROUPS.items()):
            ran = lambda comfyui, name=name: [says(f"{name} ran")]  # noqa: E731
            monkeypatch.setitem(command.GROUPS, name, SimpleNamespace(missing=group.missing, checks=ran))

    return see


def says(name, failure=None):
    def check():
        if failure is not None:
            raise failure
        return "seen"

    check.__name__ = name.replace(" ", "_")
    return check


def test_without_a_gpu_a_sentence_says_so(cards):
    cards()
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU: this machine has none that PyTorch can use.$"):
        command.main([])


def test_with_one_gpu_the_second_ones_checks_are_not_run_and_that_is_said(cards, capsys):
    cards("H100")
    assert command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "card H100",
        "ok      operator ran: seen",
        "NOT RUN second GPU: it needs two GPUs of one model, and PyTorch sees 1.",
        "NOT RUN ComfyUI: --comfyui PATH is not given.",
    ]


def test_two_unlike_gpus_are_not_compared(cards, capsys):
    cards("H100", "A100")
    assert command.main([]) == 0
    said = capsys.readouterr().out
    assert "NOT RUN second GPU: it needs two GPUs of one model, and these are H100 and A100.\n" in said


def test_with_two_gpus_of_one_model_both_groups_run(cards, capsys):
    cards("H100", "H100")
    assert command.main([]) == 0
    said = capsys.readouterr().out
    assert "ok      operator ran: seen\nok      second GPU ran: seen\n" in said


def test_one_group_alone(cards, capsys):
    cards("H100", "H100")
    assert command.main(["--only", "second GPU"]) == 0
    assert capsys.readouterr().out.splitlines() == ["card H100", "ok      second GPU ran: seen"]


def test_the_code_of_an_rtx_card_is_checked_alone_and_on_hopper(cards, monkeypatch, capsys):
    cards("RTX 4090")
    for more in (["--only", "operator"], ["--comfyui", "somewhere"]):
        with pytest.raises(SystemExit):
            command.main(["--rtx", *more])
        assert "--rtx runs alone, without --only and --comfyui" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    with pytest.raises(SystemExit, match="--rtx needs an H100 or H200, and this is RTX 4090"):
        command.main(["--rtx"])


def test_in_the_code_of_an_rtx_card_the_forward_checks_run(cards, monkeypatch, capsys):
    cards("H100")
    begun = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(command.Imitation, "begin", lambda imitation: begun.append(imitation.card.capability))
    monkeypatch.setattr(command.operator_alone, "forward_checks", lambda: [says("forward ran")])
    assert command.main(["--rtx"]) == 0
    assert begun == [(8, 9)] and capsys.readouterr().out.splitlines() == ["card H100", "ok      forward ran: seen"]


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        ("second GPU", "it needs two GPUs of one model, and PyTorch sees 1."),
        ("ComfyUI", "--comfyui PATH is not given."),
    ],
)
def test_the_one_group_that_was_asked_for_and_cannot_run_is_a_failure(cards, group, reason):
    cards("H100")
    with pytest.raises(SystemExit) as stopped:
        command.main(["--only", group])
    # a sentence instead of a number is exit code 1
    assert stopped.value.code == f"NOT RUN {group}: {reason}"


def test_an_unknown_group_is_refused_in_one_sentence_that_names_the_groups(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--only", "third GPU"])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("there is no group 'third GPU': the groups are operator, second GPU, ComfyUI.")


def test_help_names_the_groups(capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--help"])
    assert stopped.value.code == 0
    assert "one of: operator, second GPU, ComfyUI" in capsys.readouterr().out


def test_a_folder_without_comfyui_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["--comfyui", str(tmp_path)])
    assert stopped.value.code == 2
    assert f"{tmp_path} is no ComfyUI checkout: comfy/model_base.py is missing." in capsys.readouterr().err


def test_a_failing_check_is_named_the_others_run_and_the_exit_code_is_1(cards, monkeypatch, capsys):
    cards("H100")
    found = [
        says("sees too much", checks.CheckFailed("3 dense calls")),
        says("breaks", RuntimeError("no kernel")),
        says("holds"),
    ]
    monkeypatch.setitem(
        command.GROUPS, "operator", SimpleNamespace(missing=lambda comfyui: None, checks=lambda comfyui: found)
    )
    assert command.main([]) == 1
    printed = capsys.readouterr()
    assert "FAILED  sees too much: CheckFailed: 3 dense calls\n" in printed.out
    assert "FAILED  breaks: RuntimeError: no kernel\nok      holds: seen\n" in printed.out
    # a check's own failure explains itself; anything else shows where it came from
    assert "Traceback" in printed.err and "no kernel" in printed.err and "3 dense calls" not in printed.err


@pytest.fixture
def two_cpus(monkeypatch):
    """The second GPU's checks take the CPU for both, and a few tokens."""
    monkeypatch.setattr(second_gpu, "DEVICES", (CPU, CPU))
    monkeypatch.setattr(second_gpu, "TOKENS", (300, 129, 200))
    monkeypatch.setattr(second_gpu, "ROUNDS", 1)
    monkeypatch.setattr(second_gpu, "TRAINING_STEPS", 2)


def test_the_second_gpus_checks_pass_where_both_devices_are_one(two_cpus, capsys):
    only_for_gpus = second_gpu.a_gpu_changed_between_runs, second_gpu.heads_copied_between_gpus
    found = [check for check in second_gpu.checks(None) if check not in only_for_gpus]
    assert checks.run(found) == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all("equal" in line for line in lines)


def test_a_second_device_with_other_bits_is_found(two_cpus):
    calls = []

    def compute(device):
        calls.append(device)
        return [torch.ones(3), torch.tensor([1.0, 2.0 + 1e-6 * (len(calls) == 2)])]

    with pytest.raises(checks.CheckFailed, match=r"the second device differs by \[4\.\d+e-07\]"):
        second_gpu.on_both(compute)
    assert len(calls) == 3


def test_a_first_device_that_does_not_repeat_itself_proves_nothing(two_cpus):
    calls = []

    def compute(device):
        calls.append(device)
        return [torch.tensor(float(len(calls)))]

    with pytest.raises(checks.CheckFailed, match="gives other bits the second time"):
        second_gpu.on_both(compute)


def test_nan_on_both_devices_is_no_agreement(two_cpus):
    with pytest.raises(checks.CheckFailed, match="NaN or infinity"):
        second_gpu.on_both(lambda device: [torch.tensor(float("nan"))])


def test_a_call_that_leaves_another_device_current_is_found(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with pytest.raises(checks.CheckFailed, match="device 1 is current afterwards, not 0"):
        second_gpu.on_both(lambda device: [torch.zeros(1)])


def test_another_gpu_in_the_next_process_is_made_by_the_environment(monkeypatch):
    """Each process sees one GPU, of those that this one may see, and all share a cache of kernels."""
    started = []

    def run(command, *, env, **options):
        started.append((env["CUDA_VISIBLE_DEVICES"], env["TRITON_CACHE_DIR"], command[-1]))
        return SimpleNamespace(returncode=0, stdout="abc\n", stderr="")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    monkeypatch.setattr(second_gpu.subprocess, "run", run)
    assert "GPUs 4, 6, 4" in second_gpu.a_gpu_changed_between_runs()
    assert [gpu for gpu, _, _ in started] == ["4", "6", "4"]
    assert len({cache for _, cache, _ in started}) == 1
    assert {module for *_, module in started} == {"benchmarks.gpu_checks.one_call"}


def test_a_process_that_fails_or_differs_is_found(monkeypatch):
    results = [(0, "abc", ""), (0, "abd", ""), (0, "abc", ""), (1, "", "CUDA error: invalid device")]

    def run(*args, **options):
        code, out, err = results.pop(0)
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    monkeypatch.setattr(second_gpu.subprocess, "run", run)
    with pytest.raises(checks.CheckFailed, match="other bits"):
        second_gpu.a_gpu_changed_between_runs()
    with pytest.raises(checks.CheckFailed, match="failed: CUDA error: invalid device"):
        second_gpu.a_gpu_changed_between_runs()
