"""Random draws as functions of (seed, step), their distributions, and properties of CutMix boxes."""

import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpmatch_pl import CutMix, FeaturePerturbation, NetworkPerturbation, UserError
from mlpmatch_pl.perturbation import bypass, deactivate
from mlpmatch_pl.perturbation.input import inside_boxes, partner_shift

STAGES = [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10, 11, 12], [13, 14, 15]]  # ResNet-50
BLOCKS = [block for stage in STAGES for block in stage]
SAMPLERS = {
    "single_block": {},
    "single_stage": {},
    "stage_bernoulli": {"p": 0.25},
    "n_blocks": {"k": 3},
    "block_bernoulli": {"p": 0.2},
}


DRAWN = {
    "single_block": [8],
    "single_stage": [7, 8, 9, 10, 11, 12],
    "stage_bernoulli": [13, 14, 15],
    "n_blocks": [1, 3, 8],
    "block_bernoulli": [3, 5, 9, 10, 13],
}
SHIFTS = [4, 7, 5, 6, 4, 5, 6, 2]


def draws(sampler, count, seed=0, **options):
    perturbation = NetworkPerturbation(sampler, seed, **options)
    return [perturbation.draw(STAGES, step) for step in range(count)]


def test_draws_are_the_same_on_every_machine():
    """Ranks rely on it, and so does resuming."""
    drawn = {sampler: sorted(draws(sampler, 1, 4, **options)[0]) for sampler, options in SAMPLERS.items()}
    assert drawn == DRAWN
    assert [partner_shift(8, 4, step) for step in range(8)] == SHIFTS


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_network_draws_depend_only_on_seed_and_step(sampler):
    first = draws(sampler, 30, 1, **SAMPLERS[sampler])
    random.seed(99)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    states = random.getstate(), torch.get_rng_state()
    perturbation = NetworkPerturbation(sampler, 1, **SAMPLERS[sampler])
    assert [perturbation.draw(STAGES, step) for step in reversed(range(30))] == first[::-1]  # in any order
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert draws(sampler, 30, 2, **SAMPLERS[sampler]) != first
    assert len(set(first)) > 1


def chi_square(values, categories):
    counts, expected = Counter(values), len(values) / len(categories)
    assert set(counts) <= set(categories)
    return sum((counts[category] - expected) ** 2 / expected for category in categories)


def test_single_block_is_uniform_over_all_blocks():
    drawn = draws("single_block", 8000)
    assert {len(draw) for draw in drawn} == {1}
    assert chi_square([min(draw) for draw in drawn], BLOCKS) < 37.7  # 15 degrees of freedom, p = 0.001


def test_single_stage_is_uniform_over_whole_stages():
    assert chi_square(draws("single_stage", 4000), [frozenset(stage) for stage in STAGES]) < 16.3  # 3, p = 0.001


@pytest.mark.parametrize("options", [{}, {"p": 0.25}], ids=["default", "explicit"])
def test_stage_bernoulli_draws_each_stage_independently(options):
    drawn = draws("stage_bernoulli", 8000, **options)
    taken = [[set(stage) <= draw for stage in STAGES] for draw in drawn]
    assert all(
        draw == {block for stage, whole in zip(STAGES, row, strict=True) if whole for block in stage}
        for draw, row in zip(drawn, taken, strict=True)
    )
    assert sum(not draw for draw in drawn) / len(drawn) == pytest.approx(0.316, abs=0.02)
    correlation = np.corrcoef(np.array(taken, dtype=float).T)
    assert np.mean(taken, axis=0) == pytest.approx([0.25] * 4, abs=0.02)
    assert np.abs(correlation - np.eye(4)).max() < 0.05


@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_n_blocks_draws_k_blocks(k):
    drawn = draws("n_blocks", 300, k=k)
    assert {len(draw) for draw in drawn} == {k}
    assert all(draw <= set(BLOCKS) for draw in drawn)


def test_n_blocks_draws_all_blocks_if_there_are_fewer():
    assert NetworkPerturbation("n_blocks", 0, k=99).draw(STAGES, 0) == set(BLOCKS)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_block_bernoulli_draws_each_block_with_probability_p(p):
    drawn = draws("block_bernoulli", 2000, p=p)
    shares = [np.mean([block in draw for draw in drawn]) for block in BLOCKS]
    assert shares == pytest.approx([p] * len(BLOCKS), abs=0.05 if 0 < p < 1 else 0)


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        ("single_blok", {}, "but got 'single_blok'. Did you mean single_block"),
        ("single_block", {"k": 2}, "sampler 'single_block' takes no options, but got k"),
        ("n_blocks", {"p": 0.2}, "sampler 'n_blocks' takes k, but got p"),
        ("stage_bernoulli", {"p": 1.2}, "expected the sampler's p between 0 and 1, but got 1.2"),
        ("block_bernoulli", {"p": -0.1}, "expected the sampler's p between 0 and 1, but got -0.1"),
        ("n_blocks", {"k": 0}, "expected the sampler's k as an integer of at least 1, but got 0"),
        ("n_blocks", {"k": 1.5}, "expected the sampler's k as an integer of at least 1, but got 1.5"),
    ],
)
def test_wrong_samplers_are_refused(sampler, options, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        NetworkPerturbation(sampler, **options)
    assert "\n" not in str(error.value)


def test_k_may_be_an_integral_float():
    assert len(NetworkPerturbation("n_blocks", 0, k=2.0).draw(STAGES, 0)) == 2


def ones(batch=4, low=64, high=96):
    return torch.ones(batch, low, 5, 5), torch.ones(batch, high, 2, 3)


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.8])
def test_feature_dropout_drops_whole_channels_and_scales_the_others(p):
    features = tuple(torch.rand_like(level) + 0.5 for level in ones())
    for level, dropped in zip(features, FeaturePerturbation(p)(features, 3), strict=True):
        factor = dropped / level
        assert torch.equal(factor.amax((2, 3)) > 0, factor.amin((2, 3)) > 0)
        kept = factor.amax((2, 3)) > 0
        torch.testing.assert_close(dropped[kept], level[kept] / (1 - p))
        assert dropped.shape == level.shape


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
def test_feature_dropout_drops_channels_independently_with_probability_p(p):
    low, high = ((level.amax((2, 3)) == 0).double() for level in FeaturePerturbation(p)(ones(8, 500, 500), 0))
    for dropped_BD in (low, high):
        assert dropped_BD.mean().item() == pytest.approx(p, abs=0.03)
        assert np.abs(np.corrcoef(dropped_BD.numpy()) - np.eye(8)).max() < 0.2
    assert abs(np.corrcoef(low.flatten().numpy(), high.flatten().numpy())[0, 1]) < 0.06


def test_feature_dropout_depends_only_on_seed_and_step():
    torch.manual_seed(1)
    first = FeaturePerturbation(0.5, seed=1)(ones(), 7)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = FeaturePerturbation(0.5, seed=1)(ones(), 7)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for seed, step in ((2, 7), (1, 8)):
        other = FeaturePerturbation(0.5, seed=seed)(ones(), step)
        assert all(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_gradient_flows_through_kept_channels_only():
    levels = tuple(level.requires_grad_() for level in ones())
    dropped = FeaturePerturbation(0.5)(levels, 0)
    sum(level.sum() for level in dropped).backward()
    for level, result in zip(levels, dropped, strict=True):
        assert torch.equal(level.grad, result.detach())  # inputs are ones, so the factor is the output


def test_feature_dropout_does_not_modify_its_input():
    levels = ones()
    FeaturePerturbation(0.5)(levels, 0)
    assert all((level == 1).all() for level in levels)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_wrong_feature_dropout_is_refused(p):
    with pytest.raises(UserError, match="expected a feature dropout of at least 0 and less than 1, but got"):
        FeaturePerturbation(p)


seeds = st.integers(0, 2**32)
sizes = st.tuples(st.integers(16, 900), st.floats(1 / 3, 3)).map(
    lambda size: (size[0], max(16, int(size[0] * size[1])))
)


class ImpatientRandom(random.Random):
    def __init__(self, seed, patience=10_000):
        super().__init__(seed)
        self.patience = patience

    def uniform(self, a, b):
        self.patience -= 1
        if self.patience < 0:
            raise TimeoutError("no box fits")
        return super().uniform(a, b)


@pytest.mark.parametrize("size", [(16, 900), (900, 16)])
def test_narrow_images_get_a_box_too(size):
    for seed in range(20):
        y0, x0, y1, x1 = CutMix(p=1.0).box(ImpatientRandom(seed), *size)
        assert 0 <= y0 <= y1 <= size[0]
        assert 0 <= x0 <= x1 <= size[1]


@given(sizes, seeds)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_boxes_lie_inside_with_area_and_ratio_in_range(size, seed):
    cutmix, (height, width) = CutMix(p=1.0), size
    y0, x0, y1, x1 = cutmix.box(random.Random(seed), height, width)
    assert 0 <= y0 <= y1 <= height
    assert 0 <= x0 <= x1 <= width
    rows, columns = y1 - y0, x1 - x0
    # Sides are truncated to integers, so the exact ones are up to a pixel longer.
    assert rows * columns <= cutmix.area[1] * height * width
    assert (rows + 1) * (columns + 1) >= cutmix.area[0] * height * width
    assert rows / (columns + 1) <= cutmix.ratio[1]
    assert (rows + 1) / max(columns, 1e-9) >= cutmix.ratio[0]


@given(sizes, seeds)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_p_zero_never_gives_a_box_and_p_one_always_does(size, seed):
    assert CutMix(p=0.0).box(random.Random(seed), *size) == (0, 0, 0, 0)
    y0, x0, y1, x1 = CutMix(p=1.0).box(random.Random(seed), *(max(side, 32) for side in size))
    assert y1 > y0
    assert x1 > x0


@pytest.mark.parametrize("p", [0.5, 0.2])
def test_boxes_come_with_probability_p(p):
    rng = random.Random(0)
    drawn = [CutMix(p=p).box(rng, 321, 321) for _ in range(4000)]
    assert np.mean([box != (0, 0, 0, 0) for box in drawn]) == pytest.approx(p, abs=0.03)


def test_boxes_cover_the_ranges_of_area_ratio_and_position():
    rng = random.Random(0)
    y0, x0, y1, x1 = np.array([CutMix(p=1.0).box(rng, 321, 321) for _ in range(2000)]).T
    areas, ratios = (y1 - y0) * (x1 - x0) / 321**2, (y1 - y0) / (x1 - x0)
    assert areas.min() < 0.03
    assert areas.max() > 0.36
    assert ratios.min() < 0.4
    assert ratios.max() > 3
    assert min(y0.min(), x0.min()) < 5
    assert min(y1.max(), x1.max()) > 316


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1.5}, "expected CutMix p between 0 and 1, but got 1.5"),
        ({"area": (0.0, 0.4)}, "expected CutMix area as 0 < low <= high <= 0.8, but got [0.0, 0.4]"),
        ({"area": (0.4, 0.2)}, "expected CutMix area as 0 < low <= high <= 0.8, but got [0.4, 0.2]"),
        ({"ratio": (2.0, 1.0)}, "expected CutMix ratios for which a box of area 0.4 fits, but got [2.0, 1.0]"),
        ({"ratio": (4.0, 5.0)}, "expected CutMix ratios for which a box of area 0.4 fits, but got [4.0, 5.0]"),
    ],
)
def test_wrong_cutmix_options_are_refused(options, message):
    with pytest.raises(UserError) as error:
        CutMix(**options)
    assert str(error.value) == message


@given(st.lists(st.tuples(*[st.integers(0, 9)] * 4), min_size=1, max_size=4), st.integers(1, 8), st.integers(1, 8))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_inside_boxes_equals_a_plain_loop(boxes, height, width):
    inside_BHW = inside_boxes(torch.tensor(boxes), height, width)
    assert inside_BHW.dtype == torch.bool
    for index, (y0, x0, y1, x1) in enumerate(boxes):
        expected = [[y0 <= y < y1 and x0 <= x < x1 for x in range(width)] for y in range(height)]
        assert inside_BHW[index].tolist() == expected


@given(st.integers(2, 64), seeds, st.integers(0, 10**6))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_no_image_is_its_own_partner(batch_size, seed, step):
    shift = partner_shift(batch_size, seed, step)
    assert 0 < shift < batch_size
    assert all(source != image for image, source in enumerate(torch.arange(batch_size).roll(shift).tolist()))


def test_every_partner_is_drawn():
    assert {partner_shift(8, 0, step) for step in range(200)} == set(range(1, 8))


def test_a_batch_of_one_image_is_refused():
    with pytest.raises(UserError, match="expected at least 2 unlabeled images in a batch"):
        partner_shift(1, 0, 0)


class Doubling(torch.nn.Module):
    """A residual block of another library, x + x."""

    def forward(self, x_BDHW):
        return x_BDHW + x_BDHW


@bypass.register
def _(block: Doubling, x_BDHW: torch.Tensor) -> torch.Tensor:
    return x_BDHW


def test_deactivate_works_only_inside_the_context():
    blocks = [Doubling() for _ in range(3)]
    model, one = torch.nn.Sequential(*blocks), torch.ones(1, 1, 1, 1)
    with deactivate(blocks[:1]):
        assert model(one).item() == 4
        with deactivate(blocks[:2]):
            assert model(one).item() == 2
        assert model(one).item() == 4  # the outer context is still active
    assert model(one).item() == 8
    assert not any("forward" in vars(block) for block in blocks)


def test_deactivate_restores_the_blocks_after_an_error():
    model = torch.nn.Sequential(Doubling())
    with pytest.raises(RuntimeError, match="inside"), deactivate(model):
        raise RuntimeError("inside")
    assert model(torch.ones(1)).item() == 2


def test_deactivate_refuses_blocks_without_a_bypass():
    block = Doubling()
    with (
        pytest.raises(TypeError, match="but got Conv2d; register a bypass"),
        deactivate([block, torch.nn.Conv2d(1, 1, 1)]),
    ):
        pass
    assert block(torch.ones(1)).item() == 2
