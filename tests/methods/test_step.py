"""The step against plain transcriptions of the method's formulas, in float64.

Letters: B labeled and U unlabeled images, V strong views, C classes, H and W pixels.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mlpmatch_pl.methods.build import build_step
from mlpmatch_pl.methods.losses import build_criterion
from mlpmatch_pl.methods.method import PRESETS, resolve_method, total_loss
from mlpmatch_pl.methods.partner import SameImagePartner
from mlpmatch_pl.perturbation import FeaturePerturbation, NetworkPerturbation
from mlpmatch_pl.perturbation.input import partner_shift
from mlpmatch_pl.segmentor import Features, Segmentor
from mlpmatch_pl.segmentor.blocks import eval_mode
from mlpmatch_pl.utils.errors import UserError

CLASSES, SIZE, TAU, SEED = 4, (33, 41), 0.6, 3
LABELED, UNLABELED = 2, 3  # different, so that a wrong split shows
UNLABELED_TERMS = ("s1", "s2", "fp", "u_np")
# The authors' loss at lambda = 0.1, by term, as in the method's table.
MLPMATCH = {"x": 0.45, "x_np": 0.05, "s1": 0.125, "s2": 0.125, "fp": 0.125, "u_np": 0.125}


@pytest.fixture(scope="module")
def trained():
    """A segmentor whose residual branches matter, whose statistics are its own, and whose labels are fairly sure."""
    torch.manual_seed(0)
    segmentor = Segmentor(CLASSES, backbone="test_resnet", decoder_channels=8).double()
    for norm in segmentor.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    nn.init.normal_(segmentor.decoder.classifier.weight, std=1.0)
    return segmentor


@pytest.fixture
def segmentor(trained):
    return copy.deepcopy(trained).train()


def make_batches(num_strong=2, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def images(*shape):
        return torch.randint(0, 256, (*shape, 3, *SIZE), dtype=torch.uint8, generator=rng)

    def padded(count):
        valid_UHW = torch.ones(count, *SIZE, dtype=torch.bool)
        for image in range(count):
            valid_UHW[image, SIZE[0] - 8 * image :] = False
            valid_UHW[image, :, SIZE[1] - 9 * image :] = False
        return valid_UHW

    mask_BHW = torch.randint(0, CLASSES, (LABELED, *SIZE), dtype=torch.uint8, generator=rng)
    mask_BHW[:, :5] = 255
    corners_UV2 = torch.randint(0, 15, (UNLABELED, num_strong, 2), generator=rng)
    boxes_UV4 = torch.cat([corners_UV2, corners_UV2 + torch.randint(4, 18, corners_UV2.shape, generator=rng)], dim=2)
    boxes_UV4[0, -1] = 0  # one view without a box
    labeled = {"image": images(LABELED), "mask": mask_BHW}
    unlabeled = {
        "weak": images(UNLABELED),
        "strong": images(UNLABELED, num_strong),
        "valid": padded(UNLABELED),
        "boxes": boxes_UV4,
        "index": torch.arange(UNLABELED),
        "partner": {
            "weak": images(UNLABELED),
            "strong": images(UNLABELED, num_strong),
            "valid": padded(UNLABELED).flip(0),
        },
    }
    return labeled, unlabeled


def run_step(segmentor, spec, labeled, unlabeled, step=0, criterion="ce"):
    method = resolve_method(spec)
    criterion = build_criterion(criterion, CLASSES)
    return build_step(segmentor, criterion, method, TAU, SEED)(labeled, unlabeled, step), method


def gradients(loss, segmentor):
    parameters = dict(segmentor.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    return dict(zip(parameters, grads, strict=True))


# A plain transcription of the method, without the code under test.


def paste(image_U_HW, partner_U_HW, boxes_U4):
    """Copy each partner's box, for tensors whose last two dimensions are H and W."""
    mixed = image_U_HW.clone()
    for index, (y0, x0, y1, x1) in enumerate(boxes_U4.tolist()):
        mixed[index, ..., y0:y1, x0:x1] = partner_U_HW[index, ..., y0:y1, x0:x1]
    return mixed


def predict(segmentor, levels):
    return F.interpolate(segmentor.decoder(Features(levels)), size=SIZE, mode="bilinear", align_corners=True)


def label_and_confidence(logits_UCHW):
    confidence_UHW, label_UHW = logits_UCHW.detach().softmax(dim=1).max(dim=1)
    return label_UHW, confidence_UHW


def plain_labeled(logits_BCHW, mask_BHW):
    return F.cross_entropy(logits_BCHW, mask_BHW.long(), ignore_index=255)


def plain_unlabeled(logits_UCHW, label_UHW, confidence_UHW, valid_UHW):
    truth_UHW = logits_UCHW.log_softmax(dim=1).gather(1, label_UHW[:, None])[:, 0]
    return -truth_UHW[(confidence_UHW >= TAU) & valid_UHW].sum() / valid_UHW.sum()


def plain_strong(segmentor, unlabeled, own, partner_strong, partner):
    """Ls1 and Ls2; own and partner hold label, confidence and validity."""
    views = [
        paste(unlabeled["strong"][:, v], partner_strong[:, v], unlabeled["boxes"][:, v])
        for v in range(unlabeled["strong"].shape[1])
    ]
    logits = segmentor(torch.cat(views)).split(UNLABELED)
    return [
        plain_unlabeled(logits[v], *(paste(a, b, unlabeled["boxes"][:, v]) for a, b in zip(own, partner, strict=True)))
        for v in range(len(views))
    ]


def authors_loss(segmentor, labeled, unlabeled, lambda_np, step):
    """The authors' step as the method's page lists it."""
    segmentor.eval()
    with torch.no_grad():
        partner = (*label_and_confidence(segmentor(unlabeled["partner"]["weak"])), unlabeled["partner"]["valid"])
    segmentor.train()

    images = torch.cat([labeled["image"], unlabeled["weak"]])
    levels = segmentor.encode(images).levels
    dropped = FeaturePerturbation(0.5, SEED)(levels, step)
    both = tuple(torch.cat([plain, drop]) for plain, drop in zip(levels, dropped, strict=True))
    x, u, _, fp = predict(segmentor, both).split([LABELED, UNLABELED] * 2)
    own = (*label_and_confidence(u), unlabeled["valid"])

    strong = plain_strong(segmentor, unlabeled, own, unlabeled["partner"]["strong"], partner)

    deactivated = NetworkPerturbation("stage_bernoulli", SEED, p=0.25).draw(segmentor.encoder.stages, step)
    x_np, u_np = predict(segmentor, segmentor.encode(images, deactivated).levels).split([LABELED, UNLABELED])
    return weigh(labeled["mask"], x, x_np, lambda_np, [*strong, *(plain_unlabeled(p, *own) for p in (fp, u_np))])


def two_pass_loss(segmentor, labeled, unlabeled, lambda_np, step, sampler):
    """MLPMatch with two full encoder passes, and the batch as its own partner."""
    images = torch.cat([labeled["image"], unlabeled["weak"]])
    levels = segmentor.encode(images).levels
    dropped = FeaturePerturbation(0.5, SEED)(tuple(level[LABELED:] for level in levels), step)
    both = tuple(torch.cat([plain, drop]) for plain, drop in zip(levels, dropped, strict=True))
    x, u, fp = predict(segmentor, both).split([LABELED, UNLABELED, UNLABELED])
    own = (*label_and_confidence(u), unlabeled["valid"])

    shift = partner_shift(UNLABELED, SEED, step)
    order = [(image - shift) % UNLABELED for image in range(UNLABELED)]
    strong = plain_strong(segmentor, unlabeled, own, unlabeled["strong"][order], tuple(target[order] for target in own))

    deactivated = NetworkPerturbation(sampler, SEED).draw(segmentor.encoder.stages, step)
    x_np, u_np = predict(segmentor, segmentor.encode(images, deactivated).levels).split([LABELED, UNLABELED])
    return weigh(labeled["mask"], x, x_np, lambda_np, [*strong, *(plain_unlabeled(p, *own) for p in (fp, u_np))])


def weigh(mask_BHW, x, x_np, lambda_np, unlabeled_terms):
    labeled = (1 - lambda_np) * plain_labeled(x, mask_BHW) + lambda_np * plain_labeled(x_np, mask_BHW)
    return 0.5 * (labeled + 0.25 * sum(unlabeled_terms))


def assert_same_loss_and_gradients(loss, segmentor, reference_loss, reference):
    torch.testing.assert_close(loss, reference_loss, rtol=1e-10, atol=1e-12)
    expected = gradients(reference_loss, reference)
    for name, grad in gradients(loss, segmentor).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-7, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")
        assert grad.abs().sum() > 0, name


@pytest.mark.parametrize("step", [0, 1, 2, 3])
@pytest.mark.parametrize("lambda_np", [0.0, 0.2])
def test_official_step_is_the_authors_step(segmentor, step, lambda_np):
    labeled, unlabeled = make_batches(seed=step)
    reference = copy.deepcopy(segmentor)
    reference_loss = authors_loss(reference, labeled, unlabeled, lambda_np, step)

    result, method = run_step(segmentor, "mlpmatch_official", labeled, unlabeled, step)

    assert_same_loss_and_gradients(total_loss(result.terms, method, lambda_np), segmentor, reference_loss, reference)
    assert 0.05 < result.pseudo.confident_ratio(TAU) < 0.95  # the threshold matters


def test_official_step_updates_running_statistics_in_the_authors_order(segmentor):
    labeled, unlabeled = make_batches()
    reference = copy.deepcopy(segmentor)
    authors_loss(reference, labeled, unlabeled, 0.2, 1)
    run_step(segmentor, "mlpmatch_official", labeled, unlabeled, 1)
    expected = running_statistics(reference)
    for name, value in running_statistics(segmentor).items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_official_draws_in_these_tests_differ(segmentor):
    perturbation = NetworkPerturbation("stage_bernoulli", SEED, p=0.25)
    assert len({perturbation.draw(segmentor.encoder.stages, step) for step in range(4)}) >= 2


@pytest.mark.parametrize("sampler", ["single_block", "single_stage", "stage_bernoulli"])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_forked_step_is_two_full_passes(segmentor, sampler, step):
    labeled, unlabeled = make_batches(seed=step)
    reference = copy.deepcopy(segmentor)
    reference_loss = two_pass_loss(reference, labeled, unlabeled, 0.2, step, sampler)

    spec = {"name": "mlpmatch", "network_perturbation": {"sampler": sampler}}
    result, method = run_step(segmentor, spec, labeled, unlabeled, step)

    assert_same_loss_and_gradients(total_loss(result.terms, method, 0.2), segmentor, reference_loss, reference)


def test_default_sampler_deactivates_one_block():
    assert PRESETS["mlpmatch"].network_perturbation == {"sampler": "single_block"}


def test_mlpmatch_without_network_perturbation_is_unimatch_exactly(segmentor):
    labeled, unlabeled = make_batches()
    reference = copy.deepcopy(segmentor)
    spec = {"name": "mlpmatch", "network_perturbation": None, "lambda_schedule": "off", "feature_weight": 0.5}
    result, method = run_step(segmentor, spec, labeled, unlabeled)
    expected, unimatch = run_step(reference, "unimatch", labeled, unlabeled)

    loss, reference_loss = total_loss(result.terms, method, 0.0), total_loss(expected.terms, unimatch, 0.0)
    assert torch.equal(loss, reference_loss)
    reference_grads = gradients(reference_loss, reference)
    assert all(torch.equal(grad, reference_grads[name]) for name, grad in gradients(loss, segmentor).items())


@pytest.mark.parametrize("name", ["mlpmatch", "mlpmatch_official"])
def test_pseudo_labels_carry_no_gradient(segmentor, name, monkeypatch):
    labeled, unlabeled = make_batches()
    step = build_step(segmentor, build_criterion("ce", CLASSES), resolve_method(name), TAU, SEED)
    seen, weak_pass = [], step.weak_pass
    monkeypatch.setattr(step, "weak_pass", lambda *args: seen.append(weak_pass(*args)) or seen[0])
    result = step(labeled, unlabeled, 0)

    assert not result.pseudo.label_BHW.requires_grad
    assert not result.pseudo.confidence_BHW.requires_grad
    assert seen[0].u.requires_grad
    for term in UNLABELED_TERMS:
        assert torch.autograd.grad(result.terms[term], seen[0].u, retain_graph=True, allow_unused=True) == (None,)


@pytest.mark.parametrize(
    "criterion", ["ce", {"name": "ohem", "min_kept": 50}, "dice", {"name": "ce", "dice_weight": 1}]
)
@pytest.mark.parametrize("empty", [("labeled",), ("unlabeled",), ("labeled", "unlabeled")], ids="+".join)
@pytest.mark.parametrize("name", ["mlpmatch", "mlpmatch_official"])
def test_empty_batches_give_zero_terms_with_zero_gradient(segmentor, name, empty, criterion):
    labeled, unlabeled = make_batches()
    if "labeled" in empty:
        labeled["mask"][:] = 255
    if "unlabeled" in empty:
        unlabeled["valid"][:] = False
        unlabeled["partner"]["valid"][:] = False
    result, method = run_step(segmentor, name, labeled, unlabeled, criterion=criterion)

    zero = {"labeled": ("x", "x_np"), "unlabeled": UNLABELED_TERMS}
    expected_zero = [term for part in empty for term in zero[part]]
    for term, value in result.terms.items():
        sizes = [grad.abs().max().item() for grad in gradients(value, segmentor).values() if grad is not None]
        if term in expected_zero:
            assert value.item() == 0, term
            assert max(sizes) == 0, term
        else:
            assert value.item() > 0, term
            assert 0 < max(sizes) < float("inf"), term
    assert total_loss(result.terms, method, 0.1).isfinite()


def running_statistics(segmentor):
    return {name: buffer for name, buffer in segmentor.named_buffers() if "running_" in name}


@pytest.mark.parametrize("name", ["mlpmatch", "mlpmatch_official"])
def test_frozen_network_pass_leaves_running_statistics_and_the_loss(segmentor, name):
    labeled, unlabeled = make_batches()
    without, moving = copy.deepcopy(segmentor), copy.deepcopy(segmentor)
    stage = {"sampler": "single_stage"}
    frozen = {"name": name, "network_perturbation": stage, "network_updates_batchnorm": False}
    result, method = run_step(segmentor, frozen, labeled, unlabeled, 1)
    run_step(without, {"name": name, "network_perturbation": None}, labeled, unlabeled, 1)
    other, _ = run_step(moving, {"name": name, "network_perturbation": stage}, labeled, unlabeled, 1)

    statistics, expected = running_statistics(segmentor), running_statistics(without)
    assert all(torch.equal(value, expected[key]) for key, value in statistics.items())
    assert any(not torch.equal(value, expected[key]) for key, value in running_statistics(moving).items())
    assert torch.equal(total_loss(result.terms, method, 0.2), total_loss(other.terms, method, 0.2))
    assert {norm.momentum for norm in segmentor.modules() if isinstance(norm, nn.BatchNorm2d)} == {0.1}


def training_flags(segmentor):
    return [module.training for module in segmentor.modules()]


def test_partner_pass_runs_in_eval_mode_and_restores_every_part(segmentor):
    segmentor.encoder.model.layer1.eval()  # a user's frozen part
    before, during = training_flags(segmentor), []
    segmentor.register_forward_pre_hook(lambda module, args: during.extend(training_flags(module)))
    statistics = copy.deepcopy(running_statistics(segmentor))
    SameImagePartner(segmentor)(make_batches()[1], 0)

    assert not any(during)
    assert training_flags(segmentor) == before
    assert any(before)
    assert not all(before)
    assert all(torch.equal(value, statistics[key]) for key, value in running_statistics(segmentor).items())


def test_partner_pass_restores_every_part_after_an_exception(segmentor):
    segmentor.decoder.fuse.eval()
    before = training_flags(segmentor)

    def fail(module, args):
        raise RuntimeError("interrupted")

    segmentor.decoder.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        SameImagePartner(segmentor)(make_batches()[1], 0)
    assert training_flags(segmentor) == before


def test_eval_mode_restores_a_module_that_was_in_eval_mode():
    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1)).eval()
    with eval_mode(module):
        pass
    assert not any(child.training for child in module.modules())


def strong_inputs(segmentor, name, step):
    """The images of the pass over the strong views, and the labels that each view was given."""
    labeled, unlabeled = make_batches()
    training_step = build_step(segmentor, build_criterion("ce", CLASSES), resolve_method(name), TAU, SEED)
    inputs, targets, strong_pass = [], [], training_step.strong_pass
    segmentor.register_forward_pre_hook(lambda module, args: inputs.append(args[0]) if module.training else None)

    def recorded(*args):
        logits, targets[:] = strong_pass(*args)
        return logits, targets

    training_step.strong_pass = recorded
    result = training_step(labeled, unlabeled, step)
    return unlabeled, result.pseudo, inputs[0].split(UNLABELED), targets


@pytest.mark.parametrize("step", range(4))
def test_batch_partner_is_another_image_mixed_as_the_boxes_say(segmentor, step):
    unlabeled, pseudo, images, targets = strong_inputs(segmentor, "mlpmatch", step)
    shift = partner_shift(UNLABELED, SEED, step)
    order = [(image - shift) % UNLABELED for image in range(UNLABELED)]
    assert all(order[image] != image for image in range(UNLABELED))
    for view, (image, target) in enumerate(zip(images, targets, strict=True)):
        strong, boxes = unlabeled["strong"][:, view], unlabeled["boxes"][:, view]
        assert torch.equal(image, paste(strong, strong[order], boxes))
        assert not torch.equal(image[1], strong[1])
        for part in ("label_BHW", "confidence_BHW", "valid_BHW"):
            own = getattr(pseudo, part)
            assert torch.equal(getattr(target, part), paste(own, own[order], boxes)), part


def test_same_image_partner_is_mixed_as_the_boxes_say(segmentor):
    reference = copy.deepcopy(segmentor).eval()
    unlabeled, pseudo, images, targets = strong_inputs(segmentor, "mlpmatch_official", 0)
    with torch.no_grad():
        label, confidence = label_and_confidence(reference(unlabeled["partner"]["weak"]))
    partner = {"label_BHW": label, "confidence_BHW": confidence, "valid_BHW": unlabeled["partner"]["valid"]}
    for view, (image, target) in enumerate(zip(images, targets, strict=True)):
        boxes = unlabeled["boxes"][:, view]
        assert torch.equal(image, paste(unlabeled["strong"][:, view], unlabeled["partner"]["strong"][:, view], boxes))
        for part, other in partner.items():
            torch.testing.assert_close(getattr(target, part), paste(getattr(pseudo, part), other, boxes))


def test_a_view_without_a_box_is_left_alone(segmentor):
    unlabeled, pseudo, images, targets = strong_inputs(segmentor, "mlpmatch", 0)
    assert unlabeled["boxes"][0, 1].tolist() == [0, 0, 0, 0]
    assert torch.equal(images[1][0], unlabeled["strong"][0, 1])
    assert torch.equal(targets[1].label_BHW[0], pseudo.label_BHW[0])


def weight_of_each_term(terms, method, lambda_np):
    values = {name: torch.tensor(1.0, dtype=torch.float64, requires_grad=True) for name in terms}
    grads = torch.autograd.grad(total_loss(values, method, lambda_np), list(values.values()))
    return {name: pytest.approx(grad.item()) for name, grad in zip(values, grads, strict=True)}


@pytest.mark.parametrize(
    ("spec", "lambda_np", "expected"),
    [
        ("supervised", 0.0, {"x": 1.0}),
        ("fixmatch", 0.0, {"x": 0.5, "s1": 0.5}),
        ("unimatch", 0.0, {"x": 0.5, "s1": 0.125, "s2": 0.125, "fp": 0.25}),
        ("mlpmatch", 0.1, MLPMATCH),
        ("mlpmatch_official", 0.1, MLPMATCH),
        ({"network_perturbation": None}, 0.0, {"x": 0.5, "s1": 0.125, "s2": 0.125, "fp": 0.125}),
        ({"lambda_max": 0.0}, 0.0, {**MLPMATCH, "x": 0.5, "x_np": 0.0}),  # unlabeled only
        ({"lambda_schedule": "off"}, 0.0, {**MLPMATCH, "x": 0.5, "x_np": 0.0}),
        ({"network_weight": 0.0}, 0.1, {**MLPMATCH, "u_np": 0.0}),  # volatile only
        ({"feature_weight": 0.0}, 0.1, {name: weight for name, weight in MLPMATCH.items() if name != "fp"}),
        ({"strong_weights": [0.5]}, 0.1, {**{k: v for k, v in MLPMATCH.items() if k != "s2"}, "s1": 0.25}),
        ({"lambda_max": 0.5}, 0.1, MLPMATCH),
        ({"lambda_schedule": "linear_step"}, 0.1, MLPMATCH),
        ({"lambda_schedule": "constant"}, 0.1, MLPMATCH),
        ({"network_perturbation": {"sampler": "single_stage"}}, 0.1, MLPMATCH),
        ({"network_perturbation": {"sampler": "stage_bernoulli", "p": 0.25}}, 0.1, MLPMATCH),
        ({"network_perturbation": {"sampler": "n_blocks", "k": 3}}, 0.1, MLPMATCH),
        ({"network_perturbation": {"sampler": "block_bernoulli", "p": 0.2}}, 0.1, MLPMATCH),
    ],
    ids=str,
)
def test_presets_and_one_line_ablations_have_their_terms_and_weights(segmentor, spec, lambda_np, expected):
    method = resolve_method(spec if isinstance(spec, str) else {"name": "mlpmatch", **spec})
    labeled, unlabeled = make_batches(max(len(method.strong_weights), 1))
    result, _ = run_step(segmentor, method, labeled, unlabeled if method.uses_unlabeled else None)
    assert weight_of_each_term(result.terms, method, lambda_np) == expected
    assert (result.pseudo is None) == (spec == "supervised")


@pytest.mark.parametrize(
    ("sampler", "counts"), [({"sampler": "n_blocks", "k": 3}, {3}), ({"sampler": "single_block"}, {1})]
)
def test_number_of_deactivated_blocks_is_as_configured(segmentor, monkeypatch, sampler, counts):
    seen, forked = [], segmentor.encoder.forward_forked
    monkeypatch.setattr(segmentor.encoder, "forward_forked", lambda *args: seen.append(args[1]) or forked(*args))
    labeled, unlabeled = make_batches()
    for step in range(5):
        run_step(segmentor, {"name": "mlpmatch", "network_perturbation": sampler}, labeled, unlabeled, step)
    assert {len(deactivated) for deactivated in seen} == counts
    assert len(set(seen)) > 1


def test_same_step_gives_the_same_terms_whatever_the_global_generator(trained):
    labeled, unlabeled = make_batches()
    values = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        result, _ = run_step(copy.deepcopy(trained).train(), "mlpmatch", labeled, unlabeled, 5)
        values.append({name: term.item() for name, term in result.terms.items()})
    assert values[0] == values[1]


def test_step_does_not_change_its_batch(segmentor):
    labeled, unlabeled = make_batches()
    before = copy.deepcopy((labeled, unlabeled))
    run_step(segmentor, "mlpmatch_official", labeled, unlabeled)
    for batch, old in zip((labeled, unlabeled, unlabeled["partner"]), (*before, before[1]["partner"]), strict=True):
        assert all(torch.equal(value, old[key]) for key, value in batch.items() if isinstance(value, torch.Tensor))


def test_a_backbone_without_blocks_to_deactivate_is_refused_by_one_sentence():
    segmentor = Segmentor(CLASSES, backbone="test_efficientnet", decoder_channels=8)
    with pytest.raises(UserError, match="residual blocks that can be deactivated, but the configured one has none"):
        build_step(segmentor, build_criterion("ce", CLASSES), resolve_method("mlpmatch"), TAU, SEED)
    build_step(segmentor, build_criterion("ce", CLASSES), resolve_method("unimatch"), TAU, SEED)
