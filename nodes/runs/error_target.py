"""The sparsity of each step where the user set an attention error: chosen from what earlier steps of the run measured.

The error of a call is sqrt(FLOOR^2 + (level * sqrt(odds))^2), with odds = sparsity / (1 - sparsity): 8 bit and the linear branch
leave a floor, the rest grows with the sparsity. The level moves along a run, mostly down; a Kalman filter follows its
logarithm and its drift. The run's error is the root mean square over its sparse calls, so that what is left to spend is
known at every step. In a long run all steps to come get an equal part. In a short one the parts are in proportion to their
levels, which fall fast, and the last step gets less: no later one could make up for it. A step leaves enough for the later ones
even if its level is as high as only one in ten is: 8 bit alone has an error of LOWEST, and below KEPT of the target they would
have to skip far less than the others.

The constants were measured on the miniature at 32,760 tokens: benchmarks/target_error.py records, target_replay.py replays.
"""

import math
import operator
import threading
from typing import NamedTuple

from .fitted_ratios import EVERY, SHORT_RUN

FLOOR, SLOPE, SLOPE_VARIANCE = 0.04, 0.5, 0.1**2
MIN_SLOPE, MAX_SLOPE = 0.3, 1.0
MAX_FLOOR = 0.8  # of an error that was measured
# what is known before the first step: log(level) of so many tokens and its variance; drift over a whole run, and its variance
START_LEVEL, START_TOKENS, START_VARIANCE = math.log(0.0245), 32_760, 0.4**2
START_DRIFT, DRIFT_VARIANCE = -0.6, 0.7**2  # of short runs; long ones start without a drift
FEWEST_TOKENS = 8_400  # that the level of the first step was compared at; taken where the length is not known
DRIFT_CHANGE = 2.0**2  # variance of the drift's change over a whole run
CALL_NOISE = 0.05  # variance of log(error) as one call's rows say it
FITTED_TOO = 1.012  # the rows that the ratio was fitted on are among them: so much larger is the error over all rows
STALENESS = 2.0  # a ratio that was fitted t of a run before adds this * t^2 to log(error)
AIM = 0.95  # of the target
LAST = 0.3  # squared error that the last step of a short run may have, over that of others
KEPT = 0.6  # of the target, for each later step of a short run
LOWEST = 0.06  # root mean square error of the last three of 4 steps that skip 40% to 50%: 0.049 to 0.065 in four runs
ONE_IN_TEN = 1.28  # standard deviations
MAX_COMPENSATION = 1.6  # times more than the target that one step may aim at; in long runs as much less
MIN_SPARSITY, MAX_SPARSITY = 0.5, 0.996  # at 20% the error is larger than at 50%, in every recorded step
DIGITS = 4  # of a sparsity: a key block of 1,000 is 0.001
# steps at the start of a long run that each decide anew; later every EVERY-th does, at the end twice as many
FIRST_DECISIONS = 3
HORIZON = 4  # steps that are left, where the sampler does not say


class Choice(NamedTuple):
    """sparsity: of the sparse calls of a step, None where the target is out of reach. measures: its calls measure their error."""

    sparsity: float | None
    measures: bool


class Level:
    """log(level) along a run, its drift per run, and the slope, as far as they were measured: a Kalman filter of these three."""

    def __init__(self, tokens, is_short):
        shorter = START_TOKENS / min(max(tokens or FEWEST_TOKENS, 1), START_TOKENS)
        self._state = [START_LEVEL + math.log(shorter) / 2, START_DRIFT if is_short else 0.0, SLOPE]
        self._covariance = [[START_VARIANCE, 0.0, 0.0], [0.0, DRIFT_VARIANCE, 0.0], [0.0, 0.0, SLOPE_VARIANCE]]
        self.floor = FLOOR

    def after(self, share):
        """log(level) that is expected when ``share`` of a run has passed since the last measurement."""
        return self._state[0] + share * self._state[1]

    def doubt(self, share):
        """Standard deviation of that, with the slope as it is."""
        level, drift, slope = self._covariance
        with_slope = level[2] + share * drift[2]
        variance = level[0] + 2 * share * level[1] + share**2 * drift[1] - with_slope**2 / slope[2]
        return math.sqrt(variance + DRIFT_CHANGE * share**3 / 3)

    def pass_by(self, share):
        """Goes on by a share of a run."""
        self._state[0] = self.after(share)
        level, drift, slope = self._covariance
        level[0] += share * (2 * level[1] + share * drift[1]) + DRIFT_CHANGE * share**3 / 3
        level[1] += share * drift[1] + DRIFT_CHANGE * share**2 / 2
        level[2] += share * drift[2]
        drift[1] += DRIFT_CHANGE * share
        drift[0], slope[0] = level[1], level[2]

    def measure(self, error, sparsity, calls):
        """Takes in an error that so many calls had at this sparsity."""
        self.floor = min(FLOOR, MAX_FLOOR * error)
        above = 1 - (self.floor / error) ** 2  # share of the squared error that the level decides
        seen = [1.0, 0.0, _log_odds(sparsity)]
        both = [sum(map(operator.mul, row, seen)) for row in self._covariance]
        variance = sum(map(operator.mul, both, seen)) + CALL_NOISE / calls / above**2
        expected = sum(map(operator.mul, self._state, seen))
        surprise = math.log(error) + math.log(above) / 2 - expected
        self._state = [value + part / variance * surprise for value, part in zip(self._state, both, strict=True)]
        self._covariance = [
            [value - part * other / variance for value, other in zip(row, both, strict=True)]
            for row, part in zip(self._covariance, both, strict=True)
        ]

    @property
    def slope(self):
        return min(max(self._state[2], MIN_SLOPE), MAX_SLOPE)

    def error(self, log_level, sparsity):
        return math.hypot(self.floor, math.exp(log_level + self.slope * _log_odds(sparsity)))

    def sparsity(self, log_level, error):
        """Sparsity at which this error is expected."""
        above = max(error**2 - self.floor**2, (0.3 * error) ** 2)
        sparsity = 1 / (1 + math.exp((log_level - math.log(above) / 2) / self.slope))
        return round(min(max(sparsity, MIN_SPARSITY), MAX_SPARSITY), DIGITS)


class Stretch:
    """Steps with one sparsity, of which the first measured its error: ``error``, None before it is known."""

    def __init__(self, first, sparsity):
        self.first, self.sparsity, self.steps, self.error = first, sparsity, 0, None

    def squares(self, total, following, level):
        """Sum over its steps of their squared error, in a run of ``total`` steps; between two measurements the level goes straight.

        following: the next Stretch that measured, or None.
        """
        growth = 0.0
        if following is not None and self.steps > 1:
            here, there = (math.log(level.error(0.0, stretch.sparsity)) for stretch in (self, following))
            growth = (math.log(following.error / self.error) + here - there) / (following.first - self.first)
        logs = [growth * step + STALENESS * (step / total) ** 2 for step in range(self.steps)]
        return sum((self.error * math.exp(log)) ** 2 for log in logs)


class ErrorTarget:
    """Choices of one run for an attention ``error``. Used by several threads (MultiGPU), whose step is one and the same."""

    def __init__(self, error):
        self.error = error
        self.chosen = []  # sparsities of the steps so far
        self.is_out_of_reach = False
        self._choice = self._sigma = self._level = None
        self._stretches = []
        self._measured_at = 0  # step
        self._seen = (0.0, 0)  # what read() returned last
        self._steps = 0  # that began
        self._total = 1  # steps of the run, as far as is known
        self._lock = threading.Lock()

    def at(self, sigma, planned, read, tokens=None):
        """The Choice of the step with this noise level, made as its first model call begins.

        planned: noise levels of the run's steps that may run sparse, falling, or None where the sampler does not say. read:
        function that returns (sum of squared relative errors, number) of the calls measured so far; it may wait for a GPU.
        tokens: of the video, None where that is not known.
        """
        with self._lock:
            if self._choice is None or sigma != self._sigma:
                self._sigma = sigma
                is_short = planned is None or len(planned) <= SHORT_RUN
                self._level = self._level or Level(tokens, is_short)
                self._choice = self._next(sigma, planned, read, is_short)
                self._steps += 1
                if self._choice.sparsity is not None:
                    self._stretches[-1].steps += 1
                    self.chosen.append(self._choice.sparsity)
            return self._choice

    @property
    def latest(self):
        """The last Choice, None before the first."""
        return self._choice

    @property
    def ends_at_the_highest(self):
        """Whether the last step took the highest sparsity there is: what was left of the target it may not have used up."""
        return bool(self.chosen) and self.chosen[-1] == MAX_SPARSITY

    def run_error(self, total, count):
        """The run's error so far, each step counted once, where read() would now return (total, count); None before any."""
        with self._lock:
            if self._stretches:
                self._learn(total, count)
            spent, steps = self._spent()
            return math.sqrt(spent / steps) if steps else None

    def _next(self, sigma, planned, read, is_short):
        if self.is_out_of_reach:
            return self._choice
        left = self._steps_left(sigma, planned)
        self._total = self._steps + left
        lasting = 1 if is_short or self._steps < FIRST_DECISIONS else EVERY if left > EVERY else EVERY // 2
        if self._steps % lasting:
            return Choice(self._choice.sparsity, False)
        if self._stretches:
            self._learn(*read())
        if self._cannot_reach():
            self.is_out_of_reach = True
            return Choice(None, False)
        sparsity = self._sparsity(max(1, round(left)), is_short, lasting)
        self._stretches.append(Stretch(self._steps, sparsity))
        return Choice(sparsity, True)

    def _learn(self, total, count):
        """Takes in what the first step of the latest stretch measured."""
        (old_total, old_count), self._seen = self._seen, (total, count)
        if count == old_count or not 0 < total - old_total < math.inf:
            return
        stretch = self._stretches[-1]
        stretch.error = FITTED_TOO * math.sqrt((total - old_total) / (count - old_count))
        self._level.pass_by((stretch.first - self._measured_at) / self._total)
        self._measured_at = stretch.first
        self._level.measure(stretch.error, stretch.sparsity, count - old_count)

    def _steps_left(self, sigma, planned):
        """Steps from this one on, as many as are planned; more by as much as samplers of higher order took so far."""
        if planned is None:
            return HORIZON
        left = max(1, sum(other <= sigma * (1 + 1e-6) for other in planned))
        passed = len(planned) - left
        return left * max(1.0, self._steps / passed) if passed else left

    def _cannot_reach(self):
        latest = self._stretches[-1] if self._stretches else None
        return latest is not None and latest.sparsity == MIN_SPARSITY and (latest.error or 0.0) > self.error

    def _spent(self):
        """(sum of the squared errors of the steps so far whose stretch measured one, number of these steps)."""
        measured = [stretch for stretch in self._stretches if stretch.error is not None]
        pairs = zip(measured, [*measured[1:], None], strict=False)
        squares = [stretch.squares(self._total, following, self._level) for stretch, following in pairs]
        return sum(squares), sum(stretch.steps for stretch in measured)

    def _level_at(self, step):
        return self._level.after((step - self._measured_at) / self._total)

    def _sparsity(self, left, is_short, lasting):
        """Of the ``lasting`` steps from here, the first of ``left`` ones."""
        lasting = min(lasting, left)
        goal = AIM * self.error
        levels = [self._level_at(self._steps + step) for step in range(left)]
        weights = [1.0] * left
        if is_short and left > 1:
            weights = [math.exp(min(0.0, level - levels[0])) for level in levels]
            weights[-1] *= LAST
        ceilings = [self._level.error(level, MAX_SPARSITY) ** 2 for level in levels]
        spent, steps = self._spent()
        budget = max((steps + left) * goal**2 - spent, (goal / 10) ** 2)
        square = weights[0] * _share(budget, weights, ceilings)
        least = 0.0 if is_short else goal / MAX_COMPENSATION
        aim = min(max(math.sqrt(square), least), goal * MAX_COMPENSATION)
        ages = [math.exp(2 * STALENESS * (age / self._total) ** 2) for age in range(lasting)]
        aim /= math.sqrt(sum(ages) / lasting)
        sparsity = self._level.sparsity(self._level_at(self._steps + (lasting - 1) / 2), aim)
        if not is_short or left == 1:
            return sparsity
        kept = sum(max(LOWEST**2, part * (KEPT * goal) ** 2) for part in [*[1.0] * (left - 2), LAST])
        at_most = math.sqrt(budget - min(kept, budget * (left - 1) / left))
        doubt = self._level.doubt((self._steps - self._measured_at) / self._total)
        return min(sparsity, self._level.sparsity(levels[0] + ONE_IN_TEN * doubt, at_most))


def _share(budget, weights, ceilings):
    """What 1 of weight gets of ``budget``, where none gets more than its ceiling."""
    rest, weight = budget, sum(weights)
    for of_step, ceiling in sorted(zip(weights, ceilings, strict=True), key=lambda pair: pair[1] / pair[0]):
        if rest * of_step <= ceiling * weight:
            break
        rest, weight = rest - ceiling, weight - of_step
    return rest / weight if weight > 1e-9 else math.inf


def _log_odds(sparsity):
    return math.log(sparsity / (1 - sparsity))
