"""Where a model call stands in its sampling run, and which sparsity the settings plan for a layer in it."""

from typing import NamedTuple

from ...sla2_kernels.support import MINIMUM_TOKENS
from ..settings.schedule import RunProgress, StepNumbers, goes_on, needs_numbers, needs_progress, sparsity_of
from ..settings.values import AUTOMATIC
from .run_dense import RunDense

NO_NUMBER = "the sampler does not say which step this is: the schedule's rules for numbered steps do not count"
GOES_ON = "this sampler goes on with what another one began: the schedule's rules for numbered steps do not count in it"


class Step(NamedTuple):
    """A step of a run, each part None where the sampler does not say. progress: 0 to 1. number: from 1."""

    in_window: bool | None
    progress: float | None = None
    number: int | None = None


class RunSteps:
    """Steps of the sampling run under way. model_sampling: the MODEL's own, where the sampler brings none."""

    def __init__(self, settings, model_sampling):
        self._settings = settings
        self._model_sampling = model_sampling
        self._progress = None
        self._numbers = StepNumbers()

    def begin(self, patcher=None):
        """Starts a run. Returns the noise levels of start_percent and end_percent, or None for the whole run.

        patcher: the sampler's model, whose sigmas a later node may have shifted.
        """
        sampling, self._numbers = self._sampling(patcher), StepNumbers()
        self._progress = RunProgress(sampling.percent_to_sigma) if needs_progress(self._settings.schedule) else None
        if self._settings.whole_run:
            return None
        ends = (self._settings.start_percent, self._settings.end_percent)
        return tuple(float(sampling.percent_to_sigma(percent)) for percent in ends)

    def number_from(self, inputs, patcher, run):
        """Numbers the steps by what the sampler was given; inputs: function that returns it by name."""
        if not needs_numbers(self._settings.schedule):
            return
        given, sampling = inputs(), self._sampling(patcher)
        self._numbers = StepNumbers(goes_on(given.get("noise"), given.get("sigmas"), sampling.sigma_max))
        if self._numbers.goes_on:
            run.note(GOES_ON)

    def at(self, run, options):
        """The Step of a model call with these transformer_options."""
        sigmas = options.get("sigmas")
        progress = None if self._progress is None or sigmas is None else self._progress.at(run.sigma(sigmas))
        return Step(run.in_window(sigmas), progress, self._number(run, sigmas, options.get("sample_sigmas")))

    def _sampling(self, patcher):
        return self._model_sampling if patcher is None else patcher.get_model_object("model_sampling")

    def _number(self, run, sigmas, sample_sigmas):
        if not needs_numbers(self._settings.schedule) or self._numbers.goes_on:
            return None
        if sigmas is None or sample_sigmas is None:
            run.note(NO_NUMBER)
            return None
        return self._numbers.at(run.sigma(sigmas), sample_sigmas)


def kept_dense_reason(settings, layer, in_window):
    """None, or one sentence which setting keeps this layer's call dense."""
    if layer in settings.dense_layers:
        return "dense_layers keeps this layer dense"
    if in_window is None:
        return "the sampler does not say which step this is, and start_percent or end_percent is set"
    if not in_window:
        return "the step lies outside start_percent to end_percent"
    return None


def planned_sparsity(settings, layer, step):
    """Sparsity of a layer's calls in a Step; raises RunDense where a setting keeps them dense."""
    reason = kept_dense_reason(settings, layer, step.in_window)
    if reason is None:
        sparsity = sparsity_of(settings.schedule, layer, step.progress, settings.sparsity, step.number)
        if sparsity is not None:
            return sparsity
        reason = "the schedule keeps this step or layer dense"
    raise RunDense(reason, by_setting=True)


def check_length(settings, tokens):
    """Raises RunDense where a sequence is too short to gain."""
    least = MINIMUM_TOKENS if settings.minimum_tokens == AUTOMATIC else settings.minimum_tokens
    if tokens < least:
        raise RunDense(f"the sequence has {tokens} tokens, minimum_tokens is {least}", by_setting=True)


def guidance_halves(options):
    """Which halves of guidance a model call's batch holds."""
    return tuple(options.get("cond_or_uncond") or ())


def step_count(options):
    """Steps of the run, or None where the sampler does not say."""
    sigmas = options.get("sample_sigmas")
    return None if sigmas is None else len(sigmas) - 1
