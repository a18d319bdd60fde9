"""The surrogate against textbook formulas, and a search guided by it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.exporter.tiny import tiny_vit
from vp_exporter.plan import ReductionPlan
from vp_exporter.searching.calibration import Calibration
from vp_exporter.searching.limits import Limits, Trace
from vp_exporter.searching.schedule.bayesian_optimisation import BayesianOptimisation
from vp_exporter.searching.schedule.gaussian_process import GaussianProcess
from vp_exporter.searching.schedule.space import Extras, Space, usual_shapes
from vp_exporter.searching.scoring import Scorer

VIT, DESCRIPTION = tiny_vit()


def textbook(points: np.ndarray, values: np.ndarray, asked: np.ndarray, length: float, noise: float):
    """Rasmussen and Williams, equations 2.25 and 2.26, with a constant mean; amplitude 1."""

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.array([[np.exp(-np.mean((x - y) ** 2) / (2 * length**2)) for y in b] for x in a])

    inverse = np.linalg.inv(kernel(points, points) + noise * np.eye(len(points)))
    towards = kernel(asked, points)
    mean = values.mean() + towards @ inverse @ (values - values.mean())
    return mean, 1 - np.einsum("ij,jk,ik->i", towards, inverse, towards)


@pytest.mark.parametrize("seed", range(4))
def test_predictions_are_the_textbooks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    points, asked, values = rng.random((9, 3)), rng.random((5, 3)), rng.normal(size=9)
    fitted = GaussianProcess.fit(points, np.zeros((9, 0)), values)
    length, _, noise = fitted.scales
    mean, variance = textbook(points, values, asked, length, noise)
    found, deviation = fitted.predict(asked, np.zeros((5, 0)))
    np.testing.assert_allclose(found, mean, atol=1e-9)
    rest = values - values.mean()
    kernel = np.exp(-((points[:, None] - points[None]) ** 2).mean(axis=2) / (2 * length**2)) + noise * np.eye(9)
    amplitude = rest @ np.linalg.solve(kernel, rest) / 9
    np.testing.assert_allclose(deviation**2, amplitude * variance, atol=1e-9)


def test_it_sees_through_noise() -> None:
    """The lowest noisy value is not at the minimum of the bowl; the process gets closer."""
    nearer = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        points = rng.random((60, 2))
        values = ((points - 0.5) ** 2).sum(axis=1) + rng.normal(scale=0.15, size=60)
        fitted = GaussianProcess.fit(points, np.zeros((60, 0)), values)
        thought = points[fitted.predict(points, np.zeros((60, 0)))[0].argmin()]
        lucky = points[values.argmin()]
        nearer.append(np.linalg.norm(thought - 0.5) <= np.linalg.norm(lucky - 0.5))
    assert np.mean(nearer) > 0.75


def test_points_that_repeat_and_equal_values_are_taken() -> None:
    points = np.zeros((4, 2))
    mean, deviation = GaussianProcess.fit(points, np.ones((4, 1)), [2.0] * 4).predict(points, np.ones((4, 1)))
    np.testing.assert_allclose(mean, 2.0)
    assert np.isfinite(deviation).all()


def test_settings_have_a_scale_of_their_own() -> None:
    rng = np.random.default_rng(0)
    points, settings = rng.random((40, 2)), rng.integers(0, 2, (40, 1)).astype(float)
    fitted = GaussianProcess.fit(points, settings, points.sum(axis=1) + 3 * settings[:, 0])
    mean, _ = fitted.predict(np.full((2, 2), 0.5), np.array([[0.0], [1.0]]))
    assert mean[1] - mean[0] == pytest.approx(3, abs=0.3)


class Bowl(Scorer):
    """Known losses: the distance of a schedule from a given one, plus noise that is fixed per plan."""

    def losses(self, plan: ReductionPlan, batches, temperature=None) -> torch.Tensor:
        space = Space(plan.method, self.description, plan.budget["target_macs"])
        goal = space.scaled([0, 1, 2, 0])
        here = [row.mlp for row in plan.tokens()]
        there = [row.mlp for row in space.plan(goal, Extras.of(plan.method, self.description.depth)).tokens()]
        far = 1e-3 * sum((a - b) ** 2 for a, b in zip(here, there, strict=True))
        jump = int(plan.fingerprint()[:6], 16) / 16**6 - 0.5
        return torch.full((self.calibration.count(batches),), 0.05 + far + 0.004 * jump, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["topk", "bat"])
def test_a_guided_search_comes_near_the_goal_and_knows_it(method: str) -> None:
    images = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scorer = Bowl(VIT, DESCRIPTION, Calibration.of_tensors(images, None, VIT, DESCRIPTION, batch_size=4))
    space, trace = Space(method, DESCRIPTION, 0.75), Trace()
    search = BayesianOptimisation(scorer, space, Limits(80), seed=0, temperature=3.0, trace=trace)
    search.begin([space.scaled([1.0] * DESCRIPTION.depth)])
    start = search.best.loss
    search.improve()
    assert 0.05 - 0.002 <= search.best.loss < 0.05 + (start - 0.05) / 3
    assert len(trace.rows) == len(search.found) == search.limits.spent <= 80
    assert len({one.plan.fingerprint() for one in search.found}) == len(search.found), "none is run twice"
    assert all(space.macs(one.removed) <= space.budget for one in search.found)
    chosen = search.finalists(3)
    assert 3 <= len(chosen) <= 6
    assert search.best.plan in chosen


class Slope(Bowl):
    """The same on batches of unequal difficulty."""

    ran: list[tuple[int, ...]]

    def losses(self, plan: ReductionPlan, batches, temperature=None) -> torch.Tensor:
        self.ran.append(tuple(batches))
        return torch.cat([(1 + batch) * super(Slope, self).losses(plan, (batch,)) for batch in batches])


def test_candidates_take_turns_on_the_images_and_are_compared_as_on_all_of_them() -> None:
    images = torch.randn(24, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scorer = Slope(VIT, DESCRIPTION, Calibration.of_tensors(images, None, VIT, DESCRIPTION, batch_size=4))
    scorer.ran = []
    space = Space("topk", DESCRIPTION, 0.75)
    search = BayesianOptimisation(scorer, space, Limits(12), seed=0, temperature=3.0, trace=Trace())
    search.begin(usual_shapes(space))
    search.improve()
    every = scorer.calibration.search
    parts = scorer.ran[:4]
    assert tuple(batch for part in parts for batch in part) == every, "the first start is run on all"
    later = scorer.ran[len(parts) : len(parts) + len(search.found) - 1]
    assert later == [parts[(1 + i) % len(parts)] for i in range(len(later))]
    for one in search.found:
        assert one.loss == pytest.approx(float(scorer.losses(one.plan, every).mean()))


def test_a_small_space_is_searched_to_its_end() -> None:
    images = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    scorer = Bowl(VIT, DESCRIPTION, Calibration.of_tensors(images, None, VIT, DESCRIPTION, batch_size=4))
    space = Space("topk", DESCRIPTION, 0.97)
    search = BayesianOptimisation(scorer, space, Limits(), seed=0, temperature=3.0, trace=Trace())
    search.begin(usual_shapes(space))
    search.improve()
    assert search.best.loss <= min(one.loss for one in search.found) + 0.004
