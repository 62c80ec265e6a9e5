"""Which step of its sampling run a model call is, and which sparsity the settings plan for a layer in it."""

import dataclasses
from typing import NamedTuple

from ...sla2_kernels.support import MINIMUM_TOKENS
from ..runs.error_target import MIN_SPARSITY, Choice
from ..runs.record import capturing
from ..settings.automatic import Plan, plan_of
from ..settings.schedule import RunProgress, StepNumbers, goes_on, needs_numbers, needs_progress, sparsity_of
from ..settings.values import AUTOMATIC
from .run_dense import RunDense

NO_NUMBER = "the sampler does not say which step this is: the schedule's rules for numbered steps do not apply"
NO_STEP = "the sampler does not say which step this is: target_error keeps the sparsity that it starts with"
GOES_ON = "this sampler goes on with what another one began: the schedule's rules for numbered steps do not apply to it"


class Step(NamedTuple):
    """A step of a run, whose plan holds sparsity and schedule. progress: 0 to 1. number: from 1.

    Each of the rest is None where the sampler does not say. choice: of the sparsity, where target_error is set and the step
    has calls to choose for.
    """

    plan: Plan
    in_window: bool | None
    progress: float | None = None
    number: int | None = None
    choice: Choice | None = None


class RunSteps:
    """Steps of the sampling run under way.

    model_sampling: the MODEL's own, where the sampler brings none. layers: of the model. facts: RunFacts without those of the
    run itself, for settings that plan themselves.
    """

    def __init__(self, settings, model_sampling, layers, facts=None):
        self._settings = settings
        self._model_sampling = model_sampling
        self._layers = layers
        self._facts = facts
        self._plan = None
        self._planned = (None, None)
        self._progress = None
        self._numbers = StepNumbers()

    def begin(self, patcher=None):
        """Starts a run. Returns the noise levels of start_percent and end_percent, or None for the whole run.

        patcher: the sampler's model, whose sigmas a later node may have shifted.
        """
        sampling, self._numbers, self._planned = self._sampling(patcher), StepNumbers(), (None, None)
        settings = self._settings
        self._plan = None if settings.plans_itself else Plan(settings.sparsity, settings.schedule)
        has_progress = settings.plans_itself or needs_progress(settings.schedule)
        self._progress = RunProgress(sampling.percent_to_sigma) if has_progress else None
        if settings.whole_run:
            return None
        ends = (settings.start_percent, settings.end_percent)
        return tuple(float(sampling.percent_to_sigma(percent)) for percent in ends)

    def number_from(self, inputs, patcher, run):
        """Numbers the steps by what the sampler was given; inputs: function that returns it by name."""
        if not needs_numbers(self._settings.schedule):
            return
        given, sampling = inputs(), self._sampling(patcher)
        self._numbers = StepNumbers(goes_on(given.get("noise"), given.get("sigmas"), sampling.sigma_max))
        if self._numbers.goes_on:
            run.note(GOES_ON)

    def at(self, run, options, tokens=lambda: None):
        """The Step of a model call with these transformer_options. tokens: function that returns the video's, None: unknown."""
        sigmas, sample_sigmas = options.get("sigmas"), options.get("sample_sigmas")
        plan = self._planned_run(run, sample_sigmas, tokens)
        progress = None if self._progress is None or sigmas is None else self._progress.at(run.sigma(sigmas))
        step = Step(plan, run.in_window(sigmas), progress, self._number(run, plan, sigmas, sample_sigmas))
        if not self._settings.target_error or not self._is_planned(step):
            return step
        return step._replace(choice=self._choice(run, sigmas, sample_sigmas, tokens()))

    def _planned_run(self, run, sample_sigmas, tokens):
        """The run's Plan: of the settings, or what the first model call whose length is known makes of it."""
        if self._plan is not None:
            return self._plan
        known = {"tokens": tokens(), "steps": None, "begins_at": None}
        if sample_sigmas is not None:
            known |= {"steps": len(sample_sigmas) - 1, "begins_at": self._progress.at(float(sample_sigmas[0]))}
        run.plan = plan_of(dataclasses.replace(self._facts, **known))
        if known["tokens"] is not None:
            self._plan = run.plan
        return run.plan

    def _choice(self, run, sigmas, sample_sigmas, tokens):
        target = run.target(self._settings.target_error)
        if sigmas is None:
            run.note(NO_STEP)
            return target.at(None, None, run.relative_errors, tokens)
        if target.latest is not None and capturing(sigmas.device):
            return target.latest  # nothing may be read from the device now
        planned = self._planned_sigmas(run, sample_sigmas)
        choice = target.at(run.sigma(sigmas), planned, run.relative_errors, tokens)
        if target.is_out_of_reach:
            run.note(out_of_reach(self._settings))
        return choice

    def _planned_sigmas(self, run, sample_sigmas):
        """Noise levels of the steps in which a layer may run sparse, None where the sampler does not say; read once."""
        known, planned = self._planned
        if sample_sigmas is not None and known is not sample_sigmas:
            sigmas = sample_sigmas.tolist()[:-1]
            planned = [
                sigma for number, sigma in enumerate(sigmas, 1) if self._is_planned(self._step(run, sigma, number))
            ]
            self._planned = (sample_sigmas, planned)
        return None if sample_sigmas is None else planned

    def _step(self, run, sigma, number):
        progress = None if self._progress is None else self._progress.at(sigma)
        number = None if self._numbers.goes_on else number
        return Step(run.plan or self._plan, run.window is None or run.is_inside(sigma), progress, number)

    def _is_planned(self, step):
        return any(planned_dense_reason(self._settings, layer, step) is None for layer in range(self._layers))

    def _sampling(self, patcher):
        return self._model_sampling if patcher is None else patcher.get_model_object("model_sampling")

    def _number(self, run, plan, sigmas, sample_sigmas):
        if not needs_numbers(plan.schedule) or self._numbers.goes_on:
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


def planned_dense_reason(settings, layer, step):
    """The same for a Step, the schedule's rules included; what target_error chose does not count."""
    reason = kept_dense_reason(settings, layer, step.in_window)
    if reason is None and _scheduled(layer, step, step.plan.sparsity) is None:
        planned = "the preset automatic keeps this step dense"  # it leaves the widget "schedule" empty
        reason = planned if settings.plans_itself else "the schedule keeps this step or layer dense"
    return reason


def planned_sparsity(settings, layer, step):
    """Sparsity of a layer's calls in a Step; raises RunDense where a setting keeps them dense."""
    reason = planned_dense_reason(settings, layer, step)
    if reason is not None:
        raise RunDense(reason, by_setting=True)
    chosen = step.plan.sparsity if step.choice is None else step.choice.sparsity
    sparsity = _scheduled(layer, step, chosen)
    if sparsity is None:
        raise RunDense(out_of_reach(settings), by_setting=True)
    return sparsity


def _scheduled(layer, step, otherwise):
    return sparsity_of(step.plan.schedule, layer, step.progress, otherwise, step.number)


def out_of_reach(settings):
    """Why the rest of a run is dense whose error stayed above target_error."""
    return (
        f"target_error {settings.target_error:g} is out of reach: skipping {100 * MIN_SPARSITY:g}% was not exact enough, "
        "so the rest of the run is dense"
    )


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
