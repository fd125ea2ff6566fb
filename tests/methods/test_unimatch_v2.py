"""Twenty steps of UniMatch V2, and of MLPMatch on top of it, against a training written from their description.

The network is a transformer without BatchNorm, on images whose positions need no resizing, which timm does in float32.
"""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from helpers.batches import make_batch
from torch import nn

from mlpmatch_pl import MLPMatch, Segmentor, UserError
from mlpmatch_pl.methods.method import resolve_method
from mlpmatch_pl.methods.teacher import Teacher
from mlpmatch_pl.perturbation import NetworkPerturbation
from mlpmatch_pl.perturbation.feature import StrongDropout
from mlpmatch_pl.perturbation.network import Branch, block_of

CLASSES, SIZE, TAU, SEED, STEPS, EPOCHS = 4, (32, 32), 0.26, 3, 20, 5
LABELED, UNLABELED = 2, 3  # the middle unlabeled image is its own partner
LR, LR_MULTI, DECAY, BETAS, EPS = 2e-3, 40.0, 0.01, (0.9, 0.999), 1e-8


def make_module(method):
    torch.manual_seed(0)
    module = MLPMatch(
        CLASSES, method=method, backbone="test_vit", decoder={"name": "dpt", "channels": 4, "level_channels": [4] * 4},
        lr=LR, lr_multi=LR_MULTI, optimizer={"name": "AdamW", "weight_decay": DECAY, "betas": list(BETAS)}, seed=SEED,
        confidence_threshold=TAU,
    )  # fmt: skip
    for network in (module.segmentor, module.teacher.network):
        model = network.encoder.model
        model.patch_embed.grid_size = (SIZE[0] // 16, SIZE[1] // 16)
        model.pos_embed = nn.Parameter(torch.randn(1, 1 + 2 * 2, 64, generator=torch.Generator().manual_seed(1)))
    module.teacher.requires_grad_(False)
    module.set_length(steps=STEPS, epochs=EPOCHS)
    return module.double().train()


class Plain:
    """One network, run plainly: a full pass for each deactivated one, and everything else as the description says."""

    def __init__(self, network, placement, lambda_max):
        self.student, self.teacher = network, copy.deepcopy(network).eval().requires_grad_(False)
        self.placement, self.lambda_max = placement, lambda_max
        trained = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
        self.weights, multipliers = (
            [p for _, p in trained],
            [LR_MULTI if "decoder" in name else 1.0 for name, _ in trained],
        )
        self.lr = LR * flat([torch.full_like(p, m) for p, m in zip(self.weights, multipliers, strict=True)])
        self.first = self.second = torch.zeros_like(self.lr)

    def predict(self, images, deactivated=frozenset(), masks=None):
        levels = self.student.encoder(self.student.normalize(images), deactivated).levels
        if masks is not None:
            levels = tuple(level * masks[:, :, None, None] for level in levels)
        return self.decode(levels)

    def decode(self, levels):
        logits = self.student.decoder(type("Maps", (), {"levels": levels}))
        return F.interpolate(logits, size=SIZE, mode="bilinear", align_corners=True)

    def mix(self, image, partner, boxes):
        mixed = image.clone()
        for index, (y0, x0, y1, x1) in enumerate(boxes.tolist()):
            mixed[index, ..., y0:y1, x0:x1] = partner[index, ..., y0:y1, x0:x1]
        return mixed

    def loss(self, labeled, unlabeled, step):
        with torch.no_grad():
            confidence, label = self.teacher(unlabeled["weak"]).softmax(1).max(1)
        plain_targets = (label, confidence, unlabeled["valid"])
        order = list(range(UNLABELED))[::-1]
        views, targets = [], []
        for view in range(2):
            boxes, strong = unlabeled["boxes"][:, view], unlabeled["strong"][:, view]
            views.append(self.mix(strong, strong[order], boxes))
            targets.append([self.mix(target, target[order], boxes) for target in plain_targets])

        perturbation, stages = NetworkPerturbation("single_block", SEED), self.student.encoder.stages
        block = perturbation.draw(stages, step)
        ones = (torch.ones(2 * UNLABELED, 64, 1, 1, dtype=torch.float64),)
        masks = StrongDropout(True, 0.5, SEED)(ones, step)[0][:, :, 0, 0].chunk(2)
        deactivated = [frozenset()] * 2
        if self.placement == "stream":
            first = perturbation.draw(stages, step, 0)
            left = [[index for index in stage if index not in first] for stage in stages]
            deactivated = [first, perturbation.draw([stage for stage in left if stage], step, 1)]

        x_loss = F.cross_entropy(self.predict(labeled["image"]), labeled["mask"].long(), ignore_index=255)
        s1, s2 = (
            unlabeled_loss(self.predict(images, draw, mask), target)
            for images, draw, mask, target in zip(views, deactivated, masks, targets, strict=True)
        )
        epoch = step // (STEPS // EPOCHS)
        weight = self.lambda_max * epoch / EPOCHS
        total = (1 - weight) * x_loss
        if self.lambda_max:
            x_np = self.predict(labeled["image"], block)
            total = total + weight * F.cross_entropy(x_np, labeled["mask"].long(), ignore_index=255)
        if self.placement in (None, "stream"):
            return (total + 0.5 * (s1 + s2)) / 2
        images, target = (unlabeled["weak"], plain_targets) if self.placement == "weak" else (views[0], targets[0])
        return (total + 0.375 * (s1 + s2) + 0.25 * unlabeled_loss(self.predict(images, block), target)) / 2

    def update(self, step):
        """AdamW with the learning rate of the step before, then the average."""
        lr, grad, weights = self.lr * (1 - max(step - 1, 0) / STEPS) ** 0.9, gradient(self.weights), flat(self.weights)
        self.first = BETAS[0] * self.first + (1 - BETAS[0]) * grad
        self.second = BETAS[1] * self.second + (1 - BETAS[1]) * grad**2
        first, second = self.first / (1 - BETAS[0] ** (step + 1)), self.second / (1 - BETAS[1] ** (step + 1))
        weights = weights * (1 - lr * DECAY) - lr * first / (second.sqrt() + EPS)
        nn.utils.vector_to_parameters(weights, self.weights)
        decay = min(1 - 1 / (step + 1), 0.996)
        average = decay * flat(self.teacher.parameters()) + (1 - decay) * flat(self.student.parameters())
        nn.utils.vector_to_parameters(average, self.teacher.parameters())


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def gradient(weights):
    """Return the gradient as one vector, and remove it."""
    grad = flat([weight.grad for weight in weights])
    for weight in weights:
        weight.grad = None
    return grad


def unlabeled_loss(logits, targets):
    label, confidence, valid = targets
    loss = F.cross_entropy(logits, label, reduction="none")
    return loss[valid & (confidence >= TAU)].sum() / valid.sum()


CASES = {  # placement of the deactivated network and largest weight of the volatile term
    "unimatch_v2": ("unimatch_v2", None, 0.0),
    "weak": ({"name": "mlpmatch_v2", "passes": "forked"}, "weak", 0.25),
    "strong": ("mlpmatch_v2", "strong", 0.25),
    "stream, volatile": ({"name": "mlpmatch_v2_stream", "lambda_max": 0.25}, "stream", 0.25),
}


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps_equal_a_plain_training(case):
    method, placement, lambda_max = CASES[case]
    module = make_module(method)
    plain = Plain(copy.deepcopy(module.segmentor), placement, lambda_max)
    optimizers = module.configure_optimizers()
    optimizer, scheduler = optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"]
    for step in range(STEPS):
        batch = make_batch(LABELED, UNLABELED, 2, SIZE, CLASSES, seed=step)
        loss = module.training_step(batch, step)
        expected = plain.loss(batch["labeled"], batch["unlabeled"], step)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-10), step
        loss.backward()
        expected.backward()
        own = flat([p.grad for p in module.segmentor.parameters() if p.requires_grad])
        reference = flat([p.grad for p in plain.weights])
        torch.testing.assert_close(own, reference, rtol=0, atol=1e-10 * max(reference.abs().max().item(), 1))
        assert min(module.last_terms.values()) > 0  # some pixels are confident
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        plain.update(step)
    for own, other in ((module.segmentor, plain.student), (module.teacher.network, plain.teacher)):
        torch.testing.assert_close(flat(own.parameters()), flat(other.parameters()), rtol=0, atol=1e-10)


def test_strong_dropout_is_complementary_and_spares_half_of_the_images():
    batch, width = 5, 8
    features, dropout = (
        (torch.ones(2 * batch, width, 1, 1), torch.ones(2 * batch, width, 2, 2)),
        StrongDropout(seed=SEED),
    )
    kept, whole = torch.zeros(batch, width), torch.zeros(batch)
    for step in range(10_000 // batch):
        first, second = dropout(features, step)
        assert torch.equal(first[..., 0, 0], second[..., 1, 1])  # maps of the same width share their draw
        one, other = first[..., 0, 0].chunk(2)
        assert torch.equal(one + other, torch.full((batch, width), 2.0))
        is_whole = (one == 1).all(1)
        assert is_whole.sum() == batch // 2
        assert set(one[~is_whole].unique().tolist()) <= {0.0, 2.0}
        kept, whole = kept + (one == 2), whole + is_whole
    assert (kept / (10_000 // batch - whole)[:, None] - 0.5).abs().max() < 0.06
    assert (whole / (10_000 // batch) - 0.4).abs().max() < 0.05
    (alone,) = dropout((torch.ones(2, width, 1, 1),), 0)  # a batch of one is always dropped
    assert not (alone == 1).any()


def test_independent_strong_dropout_draws_each_view_and_map():
    low, high = StrongDropout(False, 0.5, SEED)((torch.ones(400, 300, 1, 1), torch.ones(400, 200, 1, 1)), 0)
    first, second = (part for part in low[:, :, 0, 0].chunk(2))
    dropped = (first != 1).any(1)
    assert dropped.sum() == 100
    assert abs(torch.corrcoef(torch.stack([first[dropped].flatten(), second[dropped].flatten()]))[0, 1]) < 0.02
    assert (
        abs(torch.corrcoef(torch.stack([low[:200, :200, 0, 0].flatten(), high[:200, :, 0, 0].flatten()]))[0, 1]) < 0.02
    )


def test_views_have_other_blocks_deactivated():
    stages = [[0, 1], [2, 3], [4]]
    for sampler, options in {
        "single_block": {},
        "single_stage": {},
        "block_bernoulli": {"p": 0.1},
        "single_branch": {},
    }.items():
        perturbation = NetworkPerturbation(sampler, SEED, **options)
        for step in range(50):
            first, second = (set(map(block_of, draw)) for draw in perturbation.draw_views(stages, step, 2))
            assert not first & second
        assert perturbation.draw_views(stages, 3, 2)[0] == perturbation.draw(stages, 3, 0)
    assert NetworkPerturbation("single_block", SEED).draw_views([[7]], 0, 2) == [{7}, {7}]  # there are no others


def test_single_branch_draws_attention_and_mlp_of_all_blocks():
    perturbation = NetworkPerturbation("single_branch", SEED)
    drawn = Counter(unit for step in range(2000) for unit in perturbation.draw([[0, 1], [2]], step))
    assert set(drawn) == {Branch(block, name) for block in range(3) for name in ("attn", "mlp")}
    assert max(drawn.values()) < 1.3 * min(drawn.values())


def test_the_average_reaches_its_decay_after_250_steps():
    student = Segmentor(2, "test_vit", decoder="linear")
    teacher, bias = Teacher(student, decay=0.996), student.decoder.classifier.bias
    for step, decay in ((0, 0.0), (1, 0.5), (9, 0.9), (248, 1 - 1 / 249), (249, 0.996), (5000, 0.996)):
        nn.init.zeros_(teacher.network.decoder.classifier.bias)
        nn.init.ones_(bias)
        teacher.update(student, step)
        assert teacher.network.decoder.classifier.bias.tolist() == pytest.approx([1 - decay] * 2, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "backbone", "message"),
    [
        (
            {"strong_weights": [1.0]},
            "test_vit",
            "expected two strong views and feature_dropout=0.5 for method.strong_d",
        ),
        (
            {"feature_dropout": 0.3},
            "test_vit",
            "feature_dropout=0.5 for method.strong_dropout=complementary, but got 2",
        ),
        (
            {"pseudo_labels": "student"},
            "test_vit",
            "expected method.pseudo_labels=teacher and feature_weight=0 for meth",
        ),
        (
            {"network_perturbation": {"sampler": "single_branch"}},
            "test_resnet",
            "expected a transformer for method.netw",
        ),
    ],
)
def test_wrong_methods_are_refused(method, backbone, message):
    with pytest.raises(UserError) as error:
        MLPMatch(2, method={"name": "unimatch_v2", **method}, backbone=backbone, decoder="linear")
    assert message in str(error.value)


def test_a_branch_is_deactivated_in_a_step():
    module = make_module({"name": "mlpmatch_v2", "network_perturbation": {"sampler": "single_branch"}})
    batch = make_batch(LABELED, UNLABELED, 2, SIZE, CLASSES)
    loss = module.training_step(batch, 0)
    assert module.deactivated_blocks(0) <= set(range(6))
    assert loss.item() != make_module("mlpmatch_v2").training_step(batch, 0).item()
    assert resolve_method("mlpmatch_v2").check_batch_sizes(1, 1, has_batchnorm=False) is None
