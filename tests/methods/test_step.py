"""The training step against plain transcriptions of each method's formulas, in float64.

`MethodTester` holds the checks for every method; a new method is one subclass with its reference. Letters: B labeled
and U unlabeled images, C classes, H and W pixels.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.batches import make_batch
from torch import nn

from mlpmatch_pl.methods.build import build_step
from mlpmatch_pl.methods.losses import build_criterion
from mlpmatch_pl.methods.method import PRESETS, resolve_method, total_loss
from mlpmatch_pl.methods.partner import SameImagePartner
from mlpmatch_pl.methods.step import StepResult, step_values
from mlpmatch_pl.methods.teacher import Teacher
from mlpmatch_pl.perturbation import FeaturePerturbation, NetworkPerturbation
from mlpmatch_pl.perturbation.input import partner_shift
from mlpmatch_pl.segmentor import Features, Segmentor
from mlpmatch_pl.utils.errors import UserError

CLASSES, SIZE, TAU, SEED = 4, (33, 41), 0.6, 3
LABELED, UNLABELED = 2, 3  # different, so that a wrong split shows
LAMBDA = 0.1
CONFIDENT = 8.0  # factor of the teacher's logits
STEPS = (3, 5)  # with different draws of stage_bernoulli


@pytest.fixture(scope="module")
def trained():
    """A segmentor whose residual branches matter, with its own statistics and fairly confident predictions."""
    torch.manual_seed(0)
    segmentor = Segmentor(CLASSES, backbone="test_resnet", decoder={"channels": 8}).double()
    for norm in batch_norms(segmentor):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    nn.init.normal_(segmentor.decoder.classifier.weight, std=1.0)
    return segmentor


@pytest.fixture
def segmentor(trained):
    return copy.deepcopy(trained).train()


def make_step(segmentor, spec, criterion="ce"):
    method = resolve_method(spec)
    teacher = Teacher(make_teacher(segmentor), **method.teacher) if method.teacher else None
    return build_step(segmentor, build_criterion(criterion, CLASSES), method, TAU, SEED, teacher)


def make_teacher(segmentor):
    """A network with other weights, confident in eval mode."""
    teacher = copy.deepcopy(segmentor)
    with torch.no_grad():
        teacher.decoder.classifier.weight.mul_(CONFIDENT)
    return teacher


def run_step(segmentor, spec, batch=None, step=0, criterion="ce"):
    views = len(resolve_method(spec).strong_weights)
    batch = batch or make_batch(LABELED, UNLABELED, views, SIZE, CLASSES)
    return make_step(segmentor, spec, criterion)(batch["labeled"], batch.get("unlabeled", {}), step)


def gradients(loss, segmentor):
    parameters = dict(segmentor.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    return dict(zip(parameters, grads, strict=True))


def batch_norms(segmentor):
    return [module for module in segmentor.modules() if isinstance(module, nn.BatchNorm2d)]


def running_statistics(segmentor):
    return {name: buffer.clone() for name, buffer in segmentor.named_buffers() if "running_" in name}


# A plain transcription of the methods, without the code under test. Targets are tuples (label, confidence, valid).


def paste(image_U_HW, partner_U_HW, boxes_U4):
    """Copy each partner's box, for tensors whose last two dimensions are H and W."""
    mixed = image_U_HW.clone()
    for index, (y0, x0, y1, x1) in enumerate(boxes_U4.tolist()):
        mixed[index, ..., y0:y1, x0:x1] = partner_U_HW[index, ..., y0:y1, x0:x1]
    return mixed


def predict(segmentor, levels):
    return F.interpolate(segmentor.decoder(Features(levels)), size=SIZE, mode="bilinear", align_corners=True)


def targets_of(logits_UCHW, valid_UHW):
    confidence_UHW, label_UHW = logits_UCHW.detach().softmax(dim=1).max(dim=1)
    return label_UHW, confidence_UHW, valid_UHW


def labeled_term(logits_BCHW, mask_BHW):
    return F.cross_entropy(logits_BCHW, mask_BHW.long(), ignore_index=255)


def unlabeled_term(logits_UCHW, targets):
    label_UHW, confidence_UHW, valid_UHW = targets
    log_likelihood_UHW = logits_UCHW.log_softmax(dim=1).gather(1, label_UHW[:, None])[:, 0]
    return -log_likelihood_UHW[(confidence_UHW >= TAU) & valid_UHW].sum() / valid_UHW.sum()


def strong_terms(segmentor, unlabeled, targets, partner_strong, partner_targets):
    views = range(unlabeled["strong"].shape[1])
    mixed = [paste(unlabeled["strong"][:, v], partner_strong[:, v], unlabeled["boxes"][:, v]) for v in views]
    logits = segmentor(torch.cat(mixed)).split(UNLABELED)
    return [
        unlabeled_term(
            logits[v], [paste(*pair, unlabeled["boxes"][:, v]) for pair in zip(targets, partner_targets, strict=True)]
        )
        for v in views
    ]


def rolled_partner(unlabeled, targets, step):
    shift = partner_shift(UNLABELED, SEED, step)
    order = [(image - shift) % UNLABELED for image in range(UNLABELED)]
    return unlabeled["strong"][order], [target[order] for target in targets]


def plain_terms(segmentor, labeled, unlabeled, step, feature=False, sampler=None):
    """FixMatch, UniMatch (with feature perturbation) and MLPMatch (with a second full pass)."""
    images = torch.cat([labeled["image"], unlabeled["weak"]])
    levels = segmentor.encode(images).levels
    both = levels
    if feature:
        dropped = FeaturePerturbation(0.5, SEED)(tuple(level[LABELED:] for level in levels), step)
        both = tuple(torch.cat(pair) for pair in zip(levels, dropped, strict=True))
    x, u, *fp = predict(segmentor, both).split([LABELED, UNLABELED] + [UNLABELED] * feature)
    targets = targets_of(u, unlabeled["valid"])
    strong = strong_terms(segmentor, unlabeled, targets, *rolled_partner(unlabeled, targets, step))
    terms = {"x": labeled_term(x, labeled["mask"])} | {f"s{view}": term for view, term in enumerate(strong, 1)}
    if feature:
        terms["fp"] = unlabeled_term(*fp, targets)
    if sampler:
        terms |= network_terms(segmentor, images, labeled, targets, NetworkPerturbation(sampler, SEED), step)
    return terms


def network_terms(segmentor, images, labeled, targets, perturbation, step):
    deactivated = perturbation.draw(segmentor.encoder.stages, step)
    x_np, u_np = predict(segmentor, segmentor.encode(images, deactivated).levels).split([LABELED, UNLABELED])
    return {"x_np": labeled_term(x_np, labeled["mask"]), "u_np": unlabeled_term(u_np, targets)}


def authors_terms(segmentor, labeled, unlabeled, step, network=True):
    """The authors' step as docs/method.md lists it."""
    segmentor.eval()
    with torch.no_grad():
        partner_targets = targets_of(segmentor(unlabeled["partner"]["weak"]), unlabeled["partner"]["valid"])
    segmentor.train()

    images = torch.cat([labeled["image"], unlabeled["weak"]])
    levels = segmentor.encode(images).levels
    dropped = FeaturePerturbation(0.5, SEED)(levels, step)
    both = tuple(torch.cat(pair) for pair in zip(levels, dropped, strict=True))
    x, u, _, fp = predict(segmentor, both).split([LABELED, UNLABELED] * 2)
    targets = targets_of(u, unlabeled["valid"])

    s1, s2 = strong_terms(segmentor, unlabeled, targets, unlabeled["partner"]["strong"], partner_targets)
    terms = {"x": labeled_term(x, labeled["mask"]), "s1": s1, "s2": s2, "fp": unlabeled_term(fp, targets)}
    if not network:
        return terms
    perturbation = NetworkPerturbation("stage_bernoulli", SEED, p=0.25)
    return terms | network_terms(segmentor, images, labeled, targets, perturbation, step)


def weak_statistics_terms(segmentor, teacher, labeled, unlabeled, step):
    """MLPMatch with pseudo-labels of a teacher, and BatchNorm statistics of the weak pass alone."""
    images = torch.cat([labeled["image"], unlabeled["weak"]])
    levels = segmentor.encode(images).levels
    x, _ = predict(segmentor, levels).split([LABELED, UNLABELED])
    for norm in batch_norms(segmentor):
        norm.momentum = 0.0
    teacher.eval()
    with torch.no_grad():
        targets = targets_of(teacher(unlabeled["weak"]), unlabeled["valid"])
    dropped = FeaturePerturbation(0.5, SEED)(tuple(level[LABELED:] for level in levels), step)
    terms = {"x": labeled_term(x, labeled["mask"]), "fp": unlabeled_term(predict(segmentor, dropped), targets)}
    strong = strong_terms(segmentor, unlabeled, targets, *rolled_partner(unlabeled, targets, step))
    terms |= {f"s{view}": term for view, term in enumerate(strong, 1)}
    return terms | network_terms(segmentor, images, labeled, targets, NetworkPerturbation("single_block", SEED), step)


def stream_terms(segmentor, teacher, labeled, unlabeled, step, volatile=True):
    """Blocks are deactivated in the strong views, other ones in each, and for the volatile term."""
    teacher.eval()
    with torch.no_grad():
        targets = targets_of(teacher(unlabeled["weak"]), unlabeled["valid"])
    terms = {"x": labeled_term(segmentor(labeled["image"]), labeled["mask"])}
    for norm in batch_norms(segmentor):
        norm.momentum = 0.0
    perturbation, stages = NetworkPerturbation("single_block", SEED), segmentor.encoder.stages
    drawn = []
    if volatile:
        x_np = predict(segmentor, segmentor.encode(labeled["image"], perturbation.draw(stages, step)).levels)
        terms["x_np"] = labeled_term(x_np, labeled["mask"])
    partner_strong, partner_targets = rolled_partner(unlabeled, targets, step)
    levels = []
    for view in range(unlabeled["strong"].shape[1]):
        images = paste(unlabeled["strong"][:, view], partner_strong[:, view], unlabeled["boxes"][:, view])
        left = [[block for block in stage if block not in drawn] for stage in stages]
        drawn += perturbation.draw([stage for stage in left if stage], step, view)
        levels.append(segmentor.encode(images, frozenset(drawn[-1:])).levels)
    logits = predict(segmentor, tuple(map(torch.cat, zip(*levels, strict=True)))).chunk(len(levels))
    for view, part in enumerate(logits):
        mixed = [paste(*pair, unlabeled["boxes"][:, view]) for pair in zip(targets, partner_targets, strict=True)]
        terms[f"s{view + 1}"] = unlabeled_term(part, mixed)
    return terms


def assert_same_terms_and_gradients(own, other, weights):
    """Compare pairs of a segmentor and its terms."""
    grads = []
    for segmentor, terms in (own, other):
        assert terms.keys() == weights.keys()
        grads.append(gradients(sum(weights[name] * term for name, term in terms.items()), segmentor))
    for name, term in own[1].items():
        torch.testing.assert_close(term, other[1][name], rtol=1e-12, atol=0, msg=name)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-7, atol=1e-9, msg=name)
        assert grad.any(), name


class MethodTester:
    """Checks for one method.

    Attributes:
        spec: The method.
        weights: Weight of each term in the loss at lambda = 0.1.
        same_statistics: Whether BatchNorm's running statistics equal the reference's; not with a shared prefix.
    """

    spec: str | dict
    weights: dict[str, float]
    same_statistics = True

    def reference(self, segmentor, labeled, unlabeled, step):
        """Return the terms, computed plainly."""
        raise NotImplementedError

    @property
    def method(self):
        return resolve_method(self.spec)

    @property
    def lambda_np(self):
        return LAMBDA if self.method.network_perturbation else 0.0

    def make_batch(self, seed=0):
        return make_batch(LABELED, UNLABELED, len(self.method.strong_weights), SIZE, CLASSES, seed)

    def test_terms_have_their_weights(self, segmentor):
        terms = {
            name: torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
            for name in run_step(segmentor, self.spec).terms
        }
        grads = torch.autograd.grad(total_loss(terms, self.method, self.lambda_np), list(terms.values()))
        assert dict(zip(terms, map(float, grads), strict=True)) == pytest.approx(self.weights)

    @pytest.mark.parametrize("step", STEPS)
    def test_loss_gradients_and_statistics_equal_the_reference(self, segmentor, step):
        batch, plain = self.make_batch(seed=step), copy.deepcopy(segmentor)
        expected = self.reference(plain, batch["labeled"], batch.get("unlabeled"), step)
        terms = run_step(segmentor, self.spec, batch, step).terms
        assert_same_terms_and_gradients((segmentor, terms), (plain, expected), self.weights)
        loss = sum(self.weights[name] * term.item() for name, term in expected.items())
        assert total_loss(terms, self.method, self.lambda_np).item() == pytest.approx(loss, rel=1e-12)
        if self.same_statistics:
            expected_statistics = running_statistics(plain)
            for name, value in running_statistics(segmentor).items():
                torch.testing.assert_close(value, expected_statistics[name], msg=name)

    def test_draws_ignore_the_global_generator(self, trained):
        values = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            terms = run_step(copy.deepcopy(trained).train(), self.spec, step=5).terms
            values.append({name: term.item() for name, term in terms.items()})
        assert values[0] == values[1]

    def test_ranks_run_the_same_blocks_but_drop_different_channels(self, trained, monkeypatch):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        calls, terms = [], []
        for rank in (0, 1):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            segmentor, order = copy.deepcopy(trained).train(), []
            for index, block in enumerate(segmentor.encoder.blocks):
                block.register_forward_hook(lambda *_, index=index, order=order: order.append(index))
            terms.append({name: term.item() for name, term in run_step(segmentor, self.spec, step=1).terms.items()})
            calls.append(order)
        assert calls[0] == calls[1]
        assert (terms[0] != terms[1]) == ("fp" in self.weights)

    def test_pseudo_labels_carry_no_gradient(self, segmentor):
        result = run_step(segmentor, self.spec)
        assert (result.pseudo is None) == (not self.method.uses_unlabeled)
        if result.pseudo is not None:
            assert not result.pseudo.confidence_BHW.requires_grad
            assert 0.05 < result.pseudo.confident_ratio(TAU) < 0.95  # the threshold matters

    @pytest.mark.parametrize("criterion", ["ce", {"name": "ohem", "min_kept": 50, "dice_weight": 1}])
    def test_terms_without_valid_pixels_are_zero_with_zero_gradient(self, segmentor, criterion):
        batch = self.make_batch()
        batch["labeled"]["mask"][:] = 255
        for views in (batch.get("unlabeled", {}), batch.get("unlabeled", {}).get("partner", {})):
            if views:
                views["valid"][:] = False
        for name, term in run_step(segmentor, self.spec, batch, criterion=criterion).terms.items():
            assert term.item() == 0, name
            assert all(not grad.any() for grad in gradients(term, segmentor).values() if grad is not None), name

    def test_the_batch_is_not_modified(self, segmentor):
        batch = self.make_batch()
        before = copy.deepcopy(batch)
        run_step(segmentor, self.spec, batch)
        for half, tensors in flatten(batch).items():
            assert torch.equal(tensors, flatten(before)[half]), half


def flatten(batch, prefix=""):
    values = {}
    for name, value in batch.items():
        values |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return values


class TestSupervised(MethodTester):
    spec, weights = "supervised", {"x": 1.0}

    def reference(self, segmentor, labeled, unlabeled, step):
        return {"x": labeled_term(segmentor(labeled["image"]), labeled["mask"])}


class TestFixMatch(MethodTester):
    spec, weights = "fixmatch", {"x": 0.5, "s1": 0.5}

    def reference(self, segmentor, labeled, unlabeled, step):
        return plain_terms(segmentor, labeled, unlabeled, step)


class TestUniMatch(MethodTester):
    spec, weights = "unimatch", {"x": 0.5, "s1": 0.125, "s2": 0.125, "fp": 0.25}

    def reference(self, segmentor, labeled, unlabeled, step):
        return plain_terms(segmentor, labeled, unlabeled, step, feature=True)


MLPMATCH = {"x": 0.45, "x_np": 0.05, "s1": 0.125, "s2": 0.125, "fp": 0.125, "u_np": 0.125}  # as in docs/method.md


class TestMLPMatch(MethodTester):
    spec, weights, same_statistics = "mlpmatch", MLPMATCH, False

    def reference(self, segmentor, labeled, unlabeled, step):
        return plain_terms(segmentor, labeled, unlabeled, step, feature=True, sampler="single_block")

    @pytest.mark.parametrize("sampler", ["single_stage", "n_blocks"])
    def test_other_samplers_equal_the_reference(self, segmentor, sampler):
        batch, plain = self.make_batch(), copy.deepcopy(segmentor)
        expected = plain_terms(plain, *batch.values(), step=0, feature=True, sampler=sampler)
        spec = {"name": "mlpmatch", "network_perturbation": {"sampler": sampler}}
        terms = run_step(segmentor, spec, batch).terms
        assert_same_terms_and_gradients((segmentor, terms), (plain, expected), self.weights)


class TestMLPMatchOfficial(MethodTester):
    spec, weights = "mlpmatch_official", MLPMATCH

    def reference(self, segmentor, labeled, unlabeled, step):
        return authors_terms(segmentor, labeled, unlabeled, step)

    def test_the_reference_draws_differ(self, segmentor):
        perturbation = NetworkPerturbation("stage_bernoulli", SEED, p=0.25)
        assert len({perturbation.draw(segmentor.encoder.stages, step) for step in STEPS}) == len(STEPS)


class TestUniMatchOfficial(MethodTester):
    spec, weights = "unimatch_official", TestUniMatch.weights

    def reference(self, segmentor, labeled, unlabeled, step):
        return authors_terms(segmentor, labeled, unlabeled, step, network=False)


STREAM = {
    "name": "mlpmatch", "passes": "stream", "teacher": {"decay": 0.9, "ramp": True}, "pseudo_labels": "teacher",
    "feature_weight": 0.0, "network_weight": 0.0, "batchnorm": "weak",
}  # fmt: skip


class TestStream(MethodTester):
    spec, weights = STREAM, {"x": 0.45, "x_np": 0.05, "s1": 0.125, "s2": 0.125}

    def reference(self, segmentor, labeled, unlabeled, step):
        return stream_terms(segmentor, make_teacher(segmentor), labeled, unlabeled, step)

    def test_views_and_steps_have_draws_of_their_own(self, segmentor):
        step = make_step(segmentor, self.spec)
        draws = [step.deactivated_blocks(number) for number in range(20)]
        assert len(set(draws)) > 5
        assert {len(blocks) for blocks in draws} == {2}  # one in each view

    def test_without_volatile_learning_the_weak_pass_is_plain(self, segmentor):
        calls = []
        segmentor.encoder.blocks[-1].register_forward_hook(lambda *_: calls.append(1))
        terms = run_step(segmentor, {**self.spec, "lambda_max": 0.0, "network_perturbation": None}).terms
        assert terms.keys() == {"x", "s1", "s2"}
        assert len(calls) == 4  # labeled, teacher (a copy with the same hook), two views


class TestMLPMatchBurnIn(MethodTester):
    spec, weights = "mlpmatch_burn_in", {"x": 1.0, "s1": 0.5}
    lambda_np = 0.0

    def reference(self, segmentor, labeled, unlabeled, step):
        return stream_terms(segmentor, make_teacher(segmentor), labeled, unlabeled, step, volatile=False)


@pytest.mark.parametrize("change", [{"feature_weight": 0.25}, {"network_weight": 0.25}, {"pseudo_labels": "student"}])
def test_a_stream_has_no_passes_beside_it(change):
    with pytest.raises(
        UserError, match=r"expected method\.(pseudo_labels=teacher and feature_weight|network_weight)=0"
    ):
        resolve_method({**STREAM, **change})


WEAK_STATISTICS = {
    "name": "mlpmatch", "teacher": {"decay": 0.9, "ramp": True}, "pseudo_labels": "teacher", "batchnorm": "weak"
}  # fmt: skip


class TestTeacherAndWeakStatistics(MethodTester):
    spec = WEAK_STATISTICS
    weights = MLPMATCH

    def reference(self, segmentor, labeled, unlabeled, step):
        return weak_statistics_terms(segmentor, make_teacher(segmentor), labeled, unlabeled, step)


def test_during_burn_in_a_step_is_that_of_supervised_training(segmentor):
    batch, plain = make_batch(LABELED, 0, 0, SIZE, CLASSES), copy.deepcopy(segmentor)
    method = resolve_method({"name": "mlpmatch", "burn_in": 0.3})
    terms = run_step(segmentor, {"name": "mlpmatch", "burn_in": 0.3}, batch).terms
    expected = run_step(plain, "supervised", batch).terms
    own, other = total_loss(terms, method, LAMBDA), total_loss(expected, resolve_method("supervised"), 0.0)
    assert own.item() == other.item()
    for name, grad in gradients(own, segmentor).items():
        assert torch.equal(grad, gradients(other, plain)[name]), name
    for name, value in running_statistics(segmentor).items():
        assert torch.equal(value, running_statistics(plain)[name]), name


def test_after_burn_in_a_step_is_that_of_the_method(segmentor):
    batch = make_batch(LABELED, UNLABELED, 2, SIZE, CLASSES)
    expected = run_step(copy.deepcopy(segmentor), "mlpmatch", batch).terms
    terms = run_step(segmentor, {"name": "mlpmatch", "burn_in": 0.3}, batch).terms
    assert {name: term.item() for name, term in terms.items()} == {n: term.item() for n, term in expected.items()}


def test_every_preset_has_a_tester():
    testers = {cls.spec for cls in MethodTester.__subclasses__() if isinstance(cls.spec, str)}
    assert testers | {"unimatch_v2", "mlpmatch_v2", "mlpmatch_v2_stream"} == set(PRESETS)  # see test_unimatch_v2.py


@pytest.mark.parametrize(
    ("override", "lambda_np", "expected"),
    [
        ({"network_perturbation": None}, 0.0, {"x": 0.5, "s1": 0.125, "s2": 0.125, "fp": 0.125}),
        ({"lambda_max": 0.0}, 0.0, {**MLPMATCH, "x": 0.5, "x_np": 0.0}),  # unlabeled images only
        ({"network_weight": 0.0}, LAMBDA, {**MLPMATCH, "u_np": 0.0}),  # volatile learning only
        ({"feature_weight": 0.0}, LAMBDA, {name: weight for name, weight in MLPMATCH.items() if name != "fp"}),
        ({"strong_weights": [0.5]}, LAMBDA, {**{k: v for k, v in MLPMATCH.items() if k != "s2"}, "s1": 0.25}),
        ({"network_perturbation": {"sampler": "block_bernoulli", "p": 0.2}}, LAMBDA, MLPMATCH),
    ],
    ids=str,
)
def test_ablations_have_their_terms_and_weights(segmentor, override, lambda_np, expected):
    method = resolve_method({"name": "mlpmatch", **override})
    terms = dict.fromkeys(run_step(segmentor, method).terms, torch.tensor(1.0))
    weights = {
        name: total_loss({other: value * (other == name) for other, value in terms.items()}, method, lambda_np).item()
        for name in terms
    }
    assert weights == pytest.approx(expected)


def test_mlpmatch_without_network_perturbation_is_unimatch(trained):
    spec = {"name": "mlpmatch", "network_perturbation": None, "feature_weight": 0.5}
    losses, grads = [], []
    for each in (spec, "unimatch"):
        segmentor = copy.deepcopy(trained).train()
        losses.append(total_loss(run_step(segmentor, each).terms, resolve_method(each), 0.0))
        grads.append(gradients(losses[-1], segmentor))
    assert torch.equal(*losses)
    assert all(torch.equal(grad, grads[1][name]) for name, grad in grads[0].items())


def test_with_weak_statistics_the_perturbed_passes_leave_no_trace(trained):
    off = {"network_perturbation": None, "feature_weight": 0.0}
    specs = {
        "weak": {"name": "mlpmatch", "batchnorm": "weak"},
        "weak pass alone": {"name": "mlpmatch", "batchnorm": "weak", **off},
        "every": {"name": "mlpmatch"},
    }
    statistics = {}
    for key, spec in specs.items():
        segmentor = copy.deepcopy(trained).train()
        run_step(segmentor, spec, step=1)
        statistics[key] = running_statistics(segmentor)
        assert {norm.momentum for norm in batch_norms(segmentor)} == {0.1}
    same = [all(torch.equal(v, statistics["weak"][n]) for n, v in other.items()) for other in statistics.values()]
    assert same == [True, True, False]


def test_the_authors_passes_cannot_have_weak_statistics():
    with pytest.raises(UserError, match=r"method.batchnorm=every for method.passes=official, but got weak"):
        resolve_method({"name": "mlpmatch_official", "batchnorm": "weak"})


def test_a_method_of_an_older_checkpoint_is_read_or_refused():
    assert resolve_method({"name": "mlpmatch", "network_updates_batchnorm": True}) == resolve_method("mlpmatch")
    with pytest.raises(UserError, match="lets the weak pass alone move"):
        resolve_method({"name": "mlpmatch", "network_updates_batchnorm": False})


def test_the_partner_pass_runs_in_eval_mode_and_changes_nothing(segmentor):
    segmentor.encoder.model.layer1.eval()  # a part that the user has frozen
    before, during = [part.training for part in segmentor.modules()], []
    segmentor.register_forward_pre_hook(lambda module, args: during.extend(part.training for part in module.modules()))
    statistics = running_statistics(segmentor)
    SameImagePartner(segmentor)(make_batch()["unlabeled"], 0)
    assert during
    assert not any(during)
    assert [part.training for part in segmentor.modules()] == before
    assert all(torch.equal(value, statistics[name]) for name, value in running_statistics(segmentor).items())


@pytest.mark.parametrize("step", [0, 1])
def test_views_are_mixed_with_another_image_inside_the_boxes(segmentor, step):
    batch = make_batch()
    unlabeled, inputs = batch["unlabeled"], []
    each_step = make_step(segmentor, "mlpmatch")
    strong_pass = each_step.strong_pass
    each_step.strong_pass = lambda views, number: inputs.append(torch.cat(views)) or strong_pass(views, number)
    each_step(batch["labeled"], unlabeled, step)
    shift = partner_shift(UNLABELED, SEED, step)
    order = [(image - shift) % UNLABELED for image in range(UNLABELED)]
    assert all(source != image for image, source in enumerate(order))
    for view, images in enumerate(inputs[0].split(UNLABELED)):
        strong, boxes = unlabeled["strong"][:, view], unlabeled["boxes"][:, view]
        assert torch.equal(images, paste(strong, strong[order], boxes))
        assert not torch.equal(images[1], strong[1])
    assert torch.equal(inputs[0][UNLABELED], unlabeled["strong"][0, 1])  # it has no box


def test_logged_values_are_tensors_with_the_loss_and_all_terms():
    """Lightning would copy a Python number to the device and wait for it."""
    result, mask_BHW = StepResult({"x": torch.tensor(2.0)}, None), torch.full((1, 2, 2), 255)
    values = step_values(result, torch.tensor(1.0), 0.125, mask_BHW, 255, 0.95)
    assert all(isinstance(value, torch.Tensor) for value in values.values())
    assert {name: value.item() for name, value in values.items()} == {
        "loss": 1, "loss_x": 2, "lambda_np": 0.125, "empty_labeled": 1,
    }  # fmt: skip


def test_a_backbone_without_blocks_to_deactivate_is_refused():
    segmentor = Segmentor(CLASSES, backbone="test_efficientnet", decoder={"channels": 8})
    with pytest.raises(UserError, match="residual blocks that can be deactivated, but the configured one has none"):
        make_step(segmentor, "mlpmatch")
    make_step(segmentor, "unimatch")
