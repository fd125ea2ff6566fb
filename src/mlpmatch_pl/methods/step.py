"""The training step: from a batch to its loss terms, as in the paper.

Letters: B images, V strong views, C classes, H and W pixels. ``x`` is labeled, ``u`` unlabeled, ``fp``
feature-perturbed, ``np`` network-perturbed (as in method and metric names).

Images are uint8, or int32 for 16-bit files, with 3 or any other number of channels (written as 3 below). A labeled
batch holds ``image`` (B, 3, H, W), ``mask`` (B, H, W) uint8 or int64, and ``index`` (B,). An unlabeled batch holds
``weak`` (B, 3, H, W), ``strong`` (B, V, 3, H, W), ``valid`` (B, H, W) bool (False on padding), ``boxes`` (B, V, 4)
int64 (CutMix y0, x0, y1, x1; all 0 for no box) and ``index`` (B,). With ``partner: same_image`` it also holds
``partner`` with ``weak``, ``strong`` and ``valid`` of a second view. ``index`` identifies the images for callbacks; no
step uses it.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlpmatch_pl.methods.batch import BatchValidator
from mlpmatch_pl.methods.losses import Criterion, consistency_loss
from mlpmatch_pl.methods.method import Method
from mlpmatch_pl.methods.partner import Batch, BatchPartner, FlippedPartner, Partner, SameImagePartner
from mlpmatch_pl.methods.pseudo_labels import PseudoLabels
from mlpmatch_pl.methods.teacher import Teacher
from mlpmatch_pl.perturbation import FeaturePerturbation, NetworkPerturbation
from mlpmatch_pl.perturbation.feature import StrongDropout
from mlpmatch_pl.perturbation.input import inside_boxes
from mlpmatch_pl.perturbation.network import Unit, block_of, has_branches
from mlpmatch_pl.segmentor import Features, NetworkAdapter, Segmentor
from mlpmatch_pl.segmentor.blocks import frozen_batchnorm_statistics
from mlpmatch_pl.utils.errors import UserError


@dataclass(frozen=True)
class StepResult:
    """Output of a step.

    Attributes:
        terms: Scalar loss terms by name: ``x``, ``x_np``, ``s1``, ``s2`` ..., ``fp``, ``u_np``.
        pseudo: Pseudo-labels of the unlabeled images; None without any.
    """

    terms: dict[str, Tensor]
    pseudo: PseudoLabels | None


@dataclass(frozen=True)
class WeakPass:
    """Predictions for the weak views.

    Attributes:
        x: Logits of the labeled views, (B, C, H, W).
        u: Logits of the unlabeled views, from which the pseudo-labels are made; of none of them if a teacher labels.
        fp: Logits from perturbed features of the unlabeled views, by name of the perturbation.
        perturbed: Features from the deactivated network, by name, if the pass has computed them.
    """

    x: Tensor
    u: Tensor
    fp: dict[str, Tensor]
    perturbed: dict[str, Features]


@dataclass(frozen=True)
class StrongPass:
    """Predictions for the strong views.

    Attributes:
        logits: Logits of each view, (B, C, H, W).
        perturbed: Features of the first view from the deactivated network, by name, if the pass has computed them.
    """

    logits: list[Tensor]
    perturbed: dict[str, Features]


class SupervisedStep:
    """The supervised baseline, with labeled images only."""

    def __init__(self, segmentor: Segmentor, criterion: Criterion, method: Method) -> None:
        self.segmentor, self.criterion = segmentor, criterion
        self.validate_batch = BatchValidator(method, len(segmentor.mean_C11))

    def __call__(self, labeled: Batch, unlabeled: Batch, step: int) -> StepResult:
        """Return the single term ``x``.

        Raises:
            UserError: If the batch does not have the tensors that the method needs.
        """
        self.validate_batch(labeled, unlabeled)
        return StepResult({"x": self.criterion(self.segmentor(labeled["image"]), labeled["mask"])}, None)

    def deactivated_blocks(self, step: int) -> frozenset[int]:
        """Return no blocks."""
        return frozenset()


class MultiLevelStep:
    """Weak views, pseudo-labels, strong views, and a term for every perturbation that is on.

    Args:
        segmentor: The network, shared by all passes.
        criterion: Loss of the labeled terms.
        method: Perturbations and their options.
        threshold: Minimum confidence of pseudo-labels (tau).
        seed: Seed of all random draws.
        teacher: Predicts the pseudo-labels; None if the weak pass of the segmentor does.

    Raises:
        UserError: If the network is to be perturbed, but the backbone has no blocks that can be deactivated.
    """

    def __init__(
        self,
        segmentor: Segmentor,
        criterion: Criterion,
        method: Method,
        threshold: float,
        seed: int,
        teacher: Teacher | None = None,
    ) -> None:
        self.segmentor, self.criterion, self.threshold, self.teacher = segmentor, criterion, threshold, teacher
        self.validate_batch = BatchValidator(method, len(segmentor.mean_C11))
        # Perturbations by name; those that are off are left out, so the step needs no conditions.
        fp = {"fp": FeaturePerturbation(method.feature_dropout, seed)} if method.feature_weight else {}
        options = method.network_perturbation
        self.feature_perturbations = fp
        self.network_perturbations = {"np": NetworkPerturbation(**{"seed": seed, **options})} if options else {}
        drop = StrongDropout(method.strong_dropout == "complementary", method.feature_dropout, seed)
        self.drop_strong = _keep if method.strong_dropout == "none" else drop
        _require_units(segmentor, options)

        # Where the deactivated network runs: beside the weak pass, beside the first strong view, or in both of them.
        network, none = self.network_perturbations, dict[str, NetworkPerturbation]()
        alone = method.passes in ("strong", "stream")  # the labeled images in the weak pass
        self.weak_unlabeled = slice(0) if alone else slice(None)
        self.weak_forks = network if method.lambda_max or not alone else none
        self.strong_forks = network if method.passes == "strong" else none
        self.encode_strong = self._encode_stream if method.passes == "stream" else self._encode_strong
        self.network_targets = self._mixed_targets if method.passes == "strong" else self._weak_targets
        self.draw_views = self._draw_views if method.passes == "stream" else self._draw_once

        self.views = len(method.strong_weights)
        partners: dict[str, Callable[[Batch, int], Partner]] = {
            "batch": BatchPartner(seed),
            "flipped": FlippedPartner(),
            "same_image": SameImagePartner(teacher.network if teacher else segmentor),
        }
        self.partner = partners[method.partner]
        every = method.batchnorm == "every"
        # Passes of perturbed views, features and networks run in this context.
        self.perturbed_context: Callable[[], AbstractContextManager[None]] = (
            nullcontext if every else partial(frozen_batchnorm_statistics, segmentor)
        )
        self.decode_features = self._decode_together if every else self._decode_apart

    def __call__(self, labeled: Batch, unlabeled: Batch, step: int) -> StepResult:
        """Return all terms of one step.

        Args:
            labeled: Labeled batch, see the module's docstring.
            unlabeled: Unlabeled batch.
            step: Number of the step, which seeds its draws.

        Raises:
            UserError: If the batch does not have the tensors that the method needs.
        """
        self.validate_batch(labeled, unlabeled)
        partner = self.partner(unlabeled, step)
        weak = self.weak_pass(labeled["image"], unlabeled["weak"], step)
        pseudo = PseudoLabels.from_logits(self.pseudo_logits(weak, unlabeled), unlabeled["valid"])
        strong_images, targets = mix_views(unlabeled, pseudo, partner)
        strong = self.strong_pass(strong_images, step)
        x_network, u_network = self.network_pass(labeled["image"], unlabeled["weak"], weak, strong, step)

        labeled_logits = {"x": weak.x} | x_network
        terms = {name: self.criterion(logits, labeled["mask"]) for name, logits in labeled_logits.items()}
        terms |= {
            f"s{view}": consistency_loss(logits, target, self.threshold)
            for view, (logits, target) in enumerate(zip(strong.logits, targets, strict=True), 1)
        }
        network_targets = self.network_targets(pseudo, targets)
        terms |= {name: consistency_loss(logits, pseudo, self.threshold) for name, logits in weak.fp.items()}
        terms |= {name: consistency_loss(logits, network_targets, self.threshold) for name, logits in u_network.items()}
        return StepResult(terms, pseudo)

    def weak_pass(self, labeled_B3HW: Tensor, unlabeled_B3HW: Tensor, step: int) -> WeakPass:
        """Predict the weak views, plain and with dropped feature channels, and run the deactivated encoder.

        Labeled and unlabeled images share one pass, and so BatchNorm's statistics. The deactivated pass forks off at
        the first deactivated block. Only features that a term needs are decoded.
        """
        weak_views = [labeled_B3HW, unlabeled_B3HW[self.weak_unlabeled]]
        sizes = [len(views) for views in weak_views]
        features, perturbed = self.encode_forked(torch.cat(weak_views), step)
        unlabeled = features[sizes[0] :]
        dropped = [Features(drop(unlabeled.levels, step)) for drop in self.feature_perturbations.values()]
        logits, *fp = self.decode_features([features, *dropped], labeled_B3HW.shape[2:])
        x, u = torch.split(logits, sizes)
        return WeakPass(x, u, dict(zip(self.feature_perturbations, fp, strict=True)), perturbed)

    def _decode_together(self, features: list[Features], size: Sequence[int]) -> list[Tensor]:
        """Decode plain and perturbed features in one pass, which also shares BatchNorm's batch."""
        logits = self.segmentor.decode(Features.cat(features), size)
        return list(torch.split(logits, [len(part.levels[0]) for part in features]))

    def _decode_apart(self, features: list[Features], size: Sequence[int]) -> list[Tensor]:
        """Decode plain features, and the perturbed ones in the context of perturbed passes."""
        plain, *perturbed = features
        logits = [self.segmentor.decode(plain, size)]
        with self.perturbed_context():
            return logits + [self.segmentor.decode(part, size) for part in perturbed]

    def pseudo_logits(self, weak: WeakPass, unlabeled: Batch) -> Tensor:
        """Return the logits (B, C, H, W) that become pseudo-labels."""
        return weak.u if self.teacher is None else self.teacher(unlabeled["weak"])

    def encode_forked(self, images_B3HW: Tensor, step: int) -> tuple[Features, dict[str, Features]]:
        """Return plain features, and those of the deactivated network by name if it forks from the weak pass."""
        return self._encode(images_B3HW, step, self.weak_forks, slice(None))

    def _encode(
        self, images_B3HW: Tensor, step: int, forks: Mapping[str, NetworkPerturbation], perturbed_images: slice
    ) -> tuple[Features, dict[str, Features]]:
        plain, perturbed = None, {}
        for name, perturbation in forks.items():
            deactivated = perturbation.draw(self.segmentor.encoder.stages, step)
            plain, perturbed[name] = self.segmentor.encode_forked(
                images_B3HW, deactivated, self.perturbed_context(), perturbed_images
            )
        return plain or self.segmentor.encode(images_B3HW), perturbed

    def strong_pass(self, views: list[Tensor], step: int) -> StrongPass:
        """Predict all strong views, with dropped channels if the method drops them."""
        with self.perturbed_context():
            features, perturbed = self.encode_strong(views, step)
            features = Features(self.drop_strong(features.levels, step, len(views)))
            logits = self.segmentor.decode(features, views[0].shape[2:])
        return StrongPass(list(logits.chunk(len(views))), perturbed)

    def _encode_strong(self, views: list[Tensor], step: int) -> tuple[Features, dict[str, Features]]:
        """Encode all views in one pass; the deactivated network, if it forks from it, gets the first one."""
        return self._encode(torch.cat(views), step, self.strong_forks, slice(len(views[0])))

    def _encode_stream(self, views: list[Tensor], step: int) -> tuple[Features, dict[str, Features]]:
        """Encode each view with other blocks deactivated."""
        pairs = zip(views, self.draw_views(step), strict=True)
        return Features.cat([self.segmentor.encode(images, deactivated) for images, deactivated in pairs]), {}

    def network_pass(
        self, labeled_B3HW: Tensor, unlabeled_B3HW: Tensor, weak: WeakPass, strong: StrongPass, step: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Predict the labeled and the unlabeled images with the deactivated network; return both by term."""
        x_logits: dict[str, Tensor] = {}
        u_logits: dict[str, Tensor] = {}
        for name in self.network_perturbations:
            parts = [forked.perturbed[name] for forked in (weak, strong) if name in forked.perturbed]
            if parts:
                x_logits[f"x_{name}"], u = self._decode_pair(Features.cat(parts), labeled_B3HW)
                u_logits |= {f"u_{name}": u} if len(u) else {}
        return x_logits, u_logits

    def _decode_pair(self, features: Features, labeled_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        with self.perturbed_context():
            logits = self.segmentor.decode(features, labeled_B3HW.shape[2:])
        return logits[: len(labeled_B3HW)], logits[len(labeled_B3HW) :]

    @staticmethod
    def _weak_targets(pseudo: PseudoLabels, mixed: list[PseudoLabels]) -> PseudoLabels:
        return pseudo

    @staticmethod
    def _mixed_targets(pseudo: PseudoLabels, mixed: list[PseudoLabels]) -> PseudoLabels:
        return mixed[0]

    def deactivated_blocks(self, step: int) -> frozenset[int]:
        """Return the indices of the encoder's blocks that are deactivated for unlabeled images, whole or in part."""
        return frozenset(block_of(unit) for draw in self.draw_views(step) for unit in draw)

    def _draw_once(self, step: int) -> list[frozenset[Unit]]:
        stages = self.segmentor.encoder.stages
        return [perturbation.draw(stages, step) for perturbation in self.network_perturbations.values()]

    def _draw_views(self, step: int) -> list[frozenset[Unit]]:
        stages, draws = self.segmentor.encoder.stages, [frozenset[Unit]()] * self.views
        for perturbation in self.network_perturbations.values():
            draws = perturbation.draw_views(stages, step, self.views)
        return draws


def _keep(features: tuple[Tensor, ...], step: int, views: int) -> tuple[Tensor, ...]:
    return features


def _require_units(segmentor: Segmentor, options: Mapping[str, Any] | None) -> None:
    blocks = [segmentor.encoder.blocks[index] for stage in segmentor.encoder.stages for index in stage]
    if options and not blocks and isinstance(segmentor, NetworkAdapter):
        raise UserError(
            f"expected residual blocks that can be deactivated, but {type(segmentor.network).__name__} has none of a "
            "known type; register their type with mlpmatch_pl.perturbation.bypass.register, or train it with "
            "method='unimatch' or method={'name': 'mlpmatch', 'network_perturbation': None}"
        )
    if options and not blocks:
        raise UserError(
            "expected a backbone with residual blocks that can be deactivated, but the configured one has none; "
            "choose another backbone.name, or method.network_perturbation=null"
        )
    if options and options.get("sampler") == "single_branch" and not all(map(has_branches, blocks)):
        raise UserError(
            "expected a transformer for method.network_perturbation.sampler=single_branch, but the configured backbone "
            "has blocks without attention and MLP; use sampler=single_block"
        )


def mix_views(unlabeled: Batch, pseudo: PseudoLabels, partner: Partner) -> tuple[list[Tensor], list[PseudoLabels]]:
    """Mix images (B, 3, H, W) and targets of each strong view with their partners (CutMix)."""
    strong_BV3HW, boxes_BV4 = unlabeled["strong"], unlabeled["boxes"]
    labels = partner.labels(pseudo)
    images, targets = [], []
    for view in range(strong_BV3HW.shape[1]):
        inside_BHW = inside_boxes(boxes_BV4[:, view], *strong_BV3HW.shape[3:])
        images.append(torch.where(inside_BHW[:, None], partner.strong_BV3HW[:, view], strong_BV3HW[:, view]))
        targets.append(pseudo.mix(labels, inside_BHW))
    return images, targets


class BurnInStep:
    """The supervised step for batches without unlabeled images, and that of the method for all others.

    The data module leaves the unlabeled images out until burn-in ends.
    """

    def __init__(self, supervised: SupervisedStep, main: MultiLevelStep) -> None:
        self.supervised, self.main = supervised, main

    def __call__(self, labeled: Batch, unlabeled: Batch, step: int) -> StepResult:
        """Return the term ``x`` during burn-in, and all terms after it."""
        return (self.main if unlabeled else self.supervised)(labeled, unlabeled, step)

    def deactivated_blocks(self, step: int) -> frozenset[int]:
        """Return the blocks that are deactivated after burn-in."""
        return self.main.deactivated_blocks(step)


def step_values(
    result: StepResult, loss: Tensor, lambda_np: float, mask_BHW: Tensor, ignore_index: int, threshold: float
) -> dict[str, Tensor]:
    """Return the values to log, by name, without synchronizing with the device.

    Args:
        result: Output of the step.
        loss: Total loss.
        lambda_np: Weight of the volatile term.
        mask_BHW: Masks of the labeled images.
        ignore_index: Mask value of ignored pixels.
        threshold: Minimum confidence of pseudo-labels (tau).
    """
    terms, pseudo = result.terms, result.pseudo
    values = {"loss": loss, **{f"loss_{name}": term for name, term in terms.items()}}
    if pseudo is not None:
        values["loss_s"] = torch.stack([term for name, term in terms.items() if name[1:].isdigit()]).mean()
        values["confident_ratio"] = pseudo.confident_ratio(threshold)
        values["empty_unlabeled"] = (~pseudo.valid_BHW.any()).float()
    # Filled on the device: Lightning would copy Python numbers there and wait for each.
    no_label = (mask_BHW == ignore_index).all()
    return values | {"lambda_np": loss.new_full((), lambda_np), "empty_labeled": no_label.float()}
