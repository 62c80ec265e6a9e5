"""The sparsity of each step where the user set an attention error: chosen from what earlier steps of the run measured.

Over the sparsities of use the error follows a straight line: log(error) = level + slope * log(sparsity / (1 - sparsity)). Its
slope hardly changes within a run, its level does, so that recent steps count most. The run's error is the root mean square
over its sparse calls: a step that was more exact than it had to be lets the following ones be less so, and the other way round.
"""

import math
import threading
from typing import NamedTuple

from .fitted_ratios import EVERY, SHORT_RUN

# measured at 32,760 tokens, 85% to 99% skipped: docs/QUALITY.md
SLOPE = 0.45
# at sparsity 0.5, for a first step that nothing was measured before: that of 8,400 tokens, twice that of 32,760
START_ERROR = 0.07
MIN_SLOPE, MAX_SLOPE = 0.2, 1.5
SLOPE_WEIGHT = 0.25  # of SLOPE against measurements: that of two steps whose log odds differ by 0.7
FADE = 0.5  # weight of a measurement against that of the next one, for the slope
CALL_NOISE = 0.04  # variance of log(error), measured on the 8 rows per head of one call
DRIFT = 0.05**2  # variance of the level's change from one step to the next
TREND = 0.5  # share of the level's last change that is taken to go on
MIN_SPARSITY, MAX_SPARSITY = 0.1, 0.99
DIGITS = 4  # of a sparsity: a key block of 1,000 is 0.001
# steps at the start of a long run that each decide anew; later every EVERY-th does, at the end twice as many
FIRST_DECISIONS = 3
# share of the target; in long runs most calls take a ratio of an earlier step, whose extra 2% to 4% is not measured
AIM = 0.94
MAX_COMPENSATION = 1.5  # times more, or less, than the target that one step may aim at
SAME_ENOUGH = 0.02  # relative error of a prediction that is no reason for another sparsity in a long run
HORIZON = 4  # steps that are left, where the sampler does not say


class Choice(NamedTuple):
    """sparsity: of the sparse calls of a step, None where the target is out of reach. measures: its calls measure their error."""

    sparsity: float | None
    measures: bool


class Measured(NamedTuple):
    """log_odds: of the sparsity. log_error: its variance is ``noise``. step: the first one, from 0, that had this sparsity."""

    log_odds: float
    log_error: float
    step: int
    noise: float


class ErrorTarget:
    """Choices of one run for an attention ``error``. Used by several threads (MultiGPU), whose step is one and the same."""

    def __init__(self, error):
        self.error = error
        self.chosen = []  # sparsities of the steps so far
        self.is_out_of_reach = False
        self._choice = self._sigma = None
        self._points = []  # Measured, oldest first
        self._seen = (0.0, 0)  # what read() returned last
        self._spent = 0.0  # sum over the steps of their squared error
        self._covered = 0  # steps in it
        self._steps = 0  # that began
        self._since = 0  # of them, since the last decision
        self._lock = threading.Lock()

    def at(self, sigma, planned, read):
        """The Choice of the step with this noise level, made as its first model call begins.

        planned: noise levels of the run's steps that may run sparse, falling, or None where the sampler does not say. read:
        function that returns (sum of squared relative errors, number) of the calls measured so far; it may wait for a GPU.
        """
        with self._lock:
            if self._choice is None or sigma != self._sigma:
                self._sigma = sigma
                self._choice = self._next(sigma, planned, read)
                self._steps += 1
                self._since += 1
                self.chosen += [self._choice.sparsity] if self._choice.sparsity is not None else []
            return self._choice

    @property
    def latest(self):
        """The last Choice, None before the first."""
        return self._choice

    def _next(self, sigma, planned, read):
        if self.is_out_of_reach:
            return self._choice
        is_short = planned is None or len(planned) <= SHORT_RUN
        left = self._steps_left(sigma, planned)
        lasting = 1 if is_short or self._steps < FIRST_DECISIONS else EVERY if left > EVERY else EVERY // 2
        if self._steps % lasting:
            return Choice(self._choice.sparsity, False)
        self._learn(*read())
        aim = self._aim(left, self.error * AIM)
        return self._choose(aim, *self._line(self._steps + (lasting - 1) / 2), is_short)

    def _learn(self, total, count):
        """Takes in what was measured since the last decision, for all steps since then."""
        (old_total, old_count), self._seen = self._seen, (total, count)
        since, self._since = self._since, 0
        if count == old_count or not 0 < total - old_total < math.inf:
            return
        square = (total - old_total) / (count - old_count)
        noise = CALL_NOISE / (count - old_count)
        self._points.append(
            Measured(_log_odds(self._choice.sparsity), math.log(square) / 2, self._steps - since, noise)
        )
        self._spent += square * since
        self._covered += since

    def _steps_left(self, sigma, planned):
        """Steps from this one on, as many as are planned; more by as much as samplers of higher order took so far."""
        if planned is None:
            return HORIZON
        left = max(1, sum(other <= sigma * (1 + 1e-6) for other in planned))
        passed = len(planned) - left
        return left * max(1.0, self._steps / passed) if passed else left

    def _aim(self, left, goal):
        square = ((self._covered + left) * goal**2 - self._spent) / left
        return min(max(math.sqrt(max(square, 0.0)), goal / MAX_COMPENSATION), goal * MAX_COMPENSATION)

    def _choose(self, aim, level, slope, is_short):
        before = self._choice.sparsity if self._points else None
        if before is not None:
            expected = math.exp(level + slope * _log_odds(before))
            if before == MIN_SPARSITY and expected > self.error:
                self.is_out_of_reach = True
                return Choice(None, False)
            if not is_short and abs(expected / aim - 1) <= SAME_ENOUGH:
                return Choice(before, True)
        sparsity = 1 / (1 + math.exp(-(math.log(aim) - level) / slope))
        return Choice(round(min(max(sparsity, MIN_SPARSITY), MAX_SPARSITY), DIGITS), True)

    def _line(self, step):
        """(level at this step, slope)."""
        if not self._points:
            return math.log(START_ERROR), SLOPE
        slope = self._slope()
        first, *rest = self._points
        level, trend, variance, last = first.log_error - slope * first.log_odds, 0.0, first.noise, first.step
        # a Kalman filter of one state, which follows as fast as the noise of the measurements allows
        for point in rest:
            steps, last = point.step - last, point.step
            variance += DRIFT * steps
            gain = variance / (variance + point.noise)
            change = gain * (point.log_error - slope * point.log_odds - level)
            level, trend, variance = level + change, TREND * gain * change / steps, (1 - gain) * variance
        return level + trend * (step - last), slope

    def _slope(self):
        """By least squares over the measurements, drawn to SLOPE."""
        weighted = [(FADE**age, point.log_odds, point.log_error) for age, point in enumerate(reversed(self._points))]
        total = sum(weight for weight, *_ in weighted)
        x, y = (sum(point[0] * point[n] for point in weighted) / total for n in (1, 2))
        spread = sum(weight * (a - x) ** 2 for weight, a, _ in weighted)
        common = sum(weight * (a - x) * (b - y) for weight, a, b in weighted)
        return min(max((common + SLOPE_WEIGHT * SLOPE) / (spread + SLOPE_WEIGHT), MIN_SLOPE), MAX_SLOPE)


def _log_odds(sparsity):
    return math.log(sparsity / (1 - sparsity))
