"""The plain reference step equals the official preset up to rounding; the step benchmark runs."""

import copy
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import benchmarks.step
from benchmarks.reference_step import ReferenceStep, reference_batch
from benchmarks.step import own_blocks
from benchmarks.step_table import TABLES, filled
from benchmarks.step_timing import STEPS, Contestant, LivingTensors, alternate, gigaflop, representative, row
from mlpmatch_pl.methods.build import build_step
from mlpmatch_pl.methods.losses import build_criterion
from mlpmatch_pl.methods.method import resolve_method, total_loss
from mlpmatch_pl.segmentor import Segmentor

ROOT = Path(__file__).parents[2]

CLASSES, SIZE, SEED, TAU = 4, (33, 41), 3, 0.5
METHODS = {
    "mlpmatch": "mlpmatch_official",
    "unimatch": {"name": "unimatch", "partner": "same_image", "passes": "official"},
}


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    segmentor = Segmentor(CLASSES, backbone="test_resnet", decoder={"channels": 8}).double()
    for norm in segmentor.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)  # otherwise, residual branches start at zero
            nn.init.normal_(norm.running_mean, std=0.1)
    nn.init.normal_(segmentor.decoder.classifier.weight, std=1.0)  # confidences on both sides of the threshold
    return segmentor.train()


def batches(seed):
    rng = torch.Generator().manual_seed(seed)

    def images(*shape):
        return torch.randint(0, 256, (*shape, 3, *SIZE), dtype=torch.uint8, generator=rng)

    def views(count):
        valid = torch.rand(count, *SIZE, generator=rng) > 0.2
        return {"weak": images(count), "strong": images(count, 2), "valid": valid}

    mask = torch.randint(0, CLASSES, (2, *SIZE), dtype=torch.uint8, generator=rng)
    mask[:, :4] = 255
    corners = torch.randint(0, 15, (2, 2, 2), generator=rng)
    boxes = torch.cat([corners, corners + torch.randint(4, 18, corners.shape, generator=rng)], dim=2)
    return {"image": images(2), "mask": mask}, {**views(2), "boxes": boxes, "partner": views(2)}


def both(trained, method, number, reference_class=ReferenceStep):
    """Return loss and network with gradients of this package and of the reference, for the same draws."""
    own, theirs = copy.deepcopy(trained), copy.deepcopy(trained)
    resolved = resolve_method(METHODS[method])
    step = build_step(own, build_criterion("ce", CLASSES), resolved, TAU, SEED)
    labeled, unlabeled = batches(number)
    own_loss = total_loss(step(labeled, unlabeled, number).terms, resolved, 0.2 if method == "mlpmatch" else 0.0)
    network = step.network_perturbations
    blocks = network["np"].draw(own.encoder.stages, number) if network else frozenset()
    drop = partial(step.feature_perturbations["fp"], step=number)
    reference = reference_class(theirs, method, TAU, lambda: blocks, drop)
    loss = reference.total(reference(reference_batch(labeled, unlabeled, theirs)), 0.2)
    own_loss.backward()
    loss.backward()
    return (own_loss.item(), own), (loss.item(), theirs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("number", [0, 1, 4])
def test_reference_equals_the_official_step(trained, method, number):
    (own_loss, own), (loss, theirs) = both(trained, method, number)
    assert own_loss == pytest.approx(loss, rel=1e-12)
    for (name, first), second in zip(own.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, rtol=1e-7, atol=1e-10, msg=name)
    for (name, first), second in zip(own.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12, msg=name)


class PartnersInTrainingMode(ReferenceStep):
    def label_partners(self, batch):
        self.segmentor.eval = self.segmentor.train
        return super().label_partners(batch)


class DividedByConfident(ReferenceStep):
    def unlabeled_term(self, logits, label, confidence, ignore):
        term = super().unlabeled_term(logits, label, confidence, ignore)
        valid = ignore != 255
        return term * valid.sum() / (valid & (confidence >= self.threshold)).sum()


class PaddingCounts(ReferenceStep):
    def unlabeled_term(self, logits, label, confidence, ignore):
        return super().unlabeled_term(logits, label, confidence, torch.zeros_like(ignore))


class OneBlockMore(ReferenceStep):
    def encode_deactivated(self, images, deactivated):
        return super().encode_deactivated(images, deactivated ^ {1})


class OtherWeights(ReferenceStep):
    def total(self, terms, lambda_np):
        return super().total(terms, lambda_np) + 1e-6 * terms["fp"]


class AnotherBox(ReferenceStep):
    def __call__(self, batch):
        return super().__call__({**batch, "box_s2": batch["box_s1"]})


@pytest.mark.parametrize(
    "broken", [PartnersInTrainingMode, DividedByConfident, PaddingCounts, OneBlockMore, OtherWeights, AnotherBox]
)
def test_broken_reference_differs(trained, broken):
    (own_loss, _), (loss, _) = both(trained, "mlpmatch", 1, broken)
    assert own_loss != pytest.approx(loss, rel=1e-9)


def test_confidences_lie_on_both_sides_of_the_threshold(trained):
    _, unlabeled = batches(1)
    with torch.no_grad():
        confidence = copy.deepcopy(trained)(unlabeled["weak"]).softmax(1).amax(1)
    assert 0.1 < (confidence >= TAU).double().mean() < 0.9


def test_reference_deactivates_whole_stages(trained):
    step = ReferenceStep(trained, "mlpmatch")
    stages = [frozenset(stage) for stage in trained.encoder.stages]
    drawn = [step.draw_stages() for _ in range(400)]
    assert all(stage <= blocks or not stage & blocks for blocks in drawn for stage in stages)
    shares = [sum(stage <= blocks for blocks in drawn) / len(drawn) for stage in stages]
    assert all(0.15 < share < 0.35 for share in shares)  # 0.25, with more than four standard deviations


def test_rounds_alternate_and_ratios_compare_sums():
    calls = []
    network = nn.Linear(1, 1)

    def contestant(name):
        def loss(number):
            calls.append((number, name))
            return network(torch.ones(1, 1)).sum()

        return Contestant(name, loss, network, None)

    pair = [contestant("a"), contestant("b")]
    assert alternate(pair, torch.device("cpu"), seconds=0) == 3
    assert calls == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "b"), (2, "a"), (3, "a"), (3, "b")]
    pair[0].seconds, pair[1].seconds = [1.0, 2.0, 9.0], [0.5, 1.0, 3.0]
    figures = row(pair[1], pair[0], images=4)
    assert (figures["ms"], figures["ms_min"]) == (1500, 500)
    assert figures["ratio"] == pytest.approx(12 / 4.5, abs=1e-3)
    assert figures["images_per_second"] == pytest.approx(4 / 1.5, abs=0.01)


def test_timed_steps_are_representative():
    method = resolve_method({"name": "mlpmatch", "network_perturbation": {"sampler": "stage_bernoulli"}})
    step = build_step(Segmentor(CLASSES, "test_resnet", decoder={"channels": 8}), None, method, TAU, SEED)
    cost = partial(own_blocks, step)
    numbers = representative(cost)
    assert len(set(numbers)) == STEPS
    everything = [cost(number) for number in range(5000)]
    assert sum(map(cost, numbers)) / STEPS == pytest.approx(sum(everything) / 5000, abs=0.1)  # of 4 blocks


def test_tensors_are_counted_as_long_as_they_exist():
    mib = 2**20
    with LivingTensors() as living:
        first = torch.zeros(256, 1024)
        second = first + 1
        view = second.view(-1)[::2]
        del second
        assert living.now == 2 * mib
        del first, view
        assert living.now == 0
        x = torch.zeros(256, 1024, requires_grad=True)
        x.exp().sum().backward()  # the exponentials exist until the backward pass is done
    assert living.now < 2.1 * mib
    assert 2.9 * mib < living.peak < 3.1 * mib


def test_benchmark_runs_and_writes_the_figures_of_the_tables(tmp_path, monkeypatch):
    out = tmp_path / "step.json"
    arguments = ["--device=cpu", "--backbone=test_resnet", "--crop=33", "--decoder-channels=8", "--classes=4",
                 "--seconds=0", f"--out={out}"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["step", *arguments])
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # restores what the script sets
    benchmarks.step.main()
    result = json.loads(out.read_text())
    names = [line["name"] for line in result["against_reference"]]
    assert names[:4] == ["reference mlpmatch", "mlpmatch", "reference unimatch", "unimatch"]
    assert {"mlpmatch_official", "floor mlpmatch"} <= set(names)
    costs = {line["name"]: line for line in result["perturbations"]}
    memory = [costs[name]["peak_mib"] for name in ("supervised", "fixmatch", "unimatch", "mlpmatch, single_block")]
    assert memory == sorted(memory)
    assert len(TABLES["reference"](result).splitlines()) == 2 + len(names)
    assert len(TABLES["perturbations"](result).splitlines()) == 2 + len(costs)


def test_performance_page_shows_the_committed_figures():
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert text.count("<!-- step_table: ") == 3
    assert filled(text) == text
    result = json.loads((ROOT / re.search(r"step_table: reference (\S+)", text)[1]).read_text(encoding="utf-8"))
    ratio = next(row["ratio"] for row in result["against_reference"] if row["name"] == "mlpmatch")
    assert ratio == pytest.approx(1.5, abs=0.1)  # README: two thirds of the time


def test_operations_of_convolutions_are_counted():
    convolution = nn.Conv2d(3, 4, 3, padding=1)
    image_BCHW = torch.rand(2, 3, 8, 8)
    contestant = Contestant("", lambda number: convolution(image_BCHW).sum(), convolution, None, numbers=[0, 1])
    # 2 operations a weight and pixel, in the forward pass and for the gradient of the weights
    assert gigaflop(contestant, torch.device("cpu")) == pytest.approx(2 * 2 * (3 * 4 * 9) * (2 * 8 * 8) / 1e9)
