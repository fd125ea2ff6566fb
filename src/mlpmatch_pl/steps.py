"""The training step: from a batch to its loss terms, as in the paper.

Letters: B images, V strong views, C classes, H and W pixels, D feature channels. ``x`` is labeled, ``u``
unlabeled, ``fp`` feature-perturbed, ``np`` network-perturbed (as in method and metric names).

Images have three channels or as many as the data have, here 3, and are uint8, or int32 where files have 16 bits. A
labeled batch holds ``image`` (B, 3, H, W), ``mask`` (B, H, W) uint8 or int64 and ``index`` (B,). An unlabeled batch
holds ``weak`` (B, 3, H, W), ``strong`` (B, V, 3, H, W), ``valid`` (B, H, W) bool (False on padding), ``boxes``
(B, V, 4) int64 (CutMix y0, x0, y1, x1; empty: all 0) and ``index`` (B,); with ``partner: same_image`` also ``partner``
with ``weak``, ``strong`` and ``valid`` of a second view. No step reads ``index``: it names the images for people.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mlpmatch_pl.errors import UserError
from mlpmatch_pl.methods import Method
from mlpmatch_pl.objective import PseudoLabels, consistency_loss
from mlpmatch_pl.perturbation import FeaturePerturbation, NetworkPerturbation
from mlpmatch_pl.perturbation.input import inside_boxes, partner_shift
from mlpmatch_pl.segmentor import Features, Segmentor

Batch = Mapping[str, Any]
Criterion = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class StepResult:
    """Loss terms by name, each a scalar, and the pseudo labels they were made with (None if there are none).

    Names: ``x``, ``x_np``, ``s1``, ``s2`` ..., ``fp``, ``u_np``.
    """

    terms: dict[str, Tensor]
    pseudo: PseudoLabels | None


@dataclass(frozen=True)
class WeakPass:
    """What comes of the weak views.

    Attributes:
        x: Plain prediction on the labeled views, (B, C, H, W).
        u: Plain prediction on the unlabeled views, which becomes the pseudo labels.
        fp: Prediction from perturbed features of the unlabeled views, by name of the perturbation.
        perturbed: Features from the deactivated network, by name, where they are known already.
    """

    x: Tensor
    u: Tensor
    fp: dict[str, Tensor]
    perturbed: dict[str, Features]


@dataclass(frozen=True)
class Partner:
    """What CutMix pastes: images, and labels once the own pseudo labels are known."""

    strong_BV3HW: Tensor
    labels: Callable[[PseudoLabels], PseudoLabels]


class SupervisedStep:
    """Labeled images only: the baseline."""

    def __init__(self, segmentor: Segmentor, criterion: Criterion) -> None:
        self.segmentor, self.criterion = segmentor, criterion

    def __call__(self, labeled: Batch, unlabeled: Batch, step: int) -> StepResult:
        """Return the single term ``x``."""
        return StepResult({"x": self.criterion(self.segmentor(labeled["image"]), labeled["mask"])}, None)


class MultiLevelStep:
    """Weak views, pseudo labels, strong views, and a term for every perturbation that is on.

    Args:
        segmentor: The network, shared by all passes.
        criterion: Labeled loss.
        method: Which perturbations are on, and how.
        threshold: Least confidence of a pseudo label that counts (tau).
        seed: Seed of all draws.
    """

    def __init__(self, segmentor: Segmentor, criterion: Criterion, method: Method, threshold: float, seed: int) -> None:
        self.segmentor, self.criterion, self.threshold = segmentor, criterion, threshold
        # By name; a level that is off is not there, and so the step needs no conditions.
        fp = {"fp": FeaturePerturbation(method.feature_dropout, seed)} if method.feature_weight else {}
        options = method.network_perturbation
        self.feature_perturbations = fp
        self.network_perturbations = {"np": NetworkPerturbation(**{"seed": seed, **options})} if options else {}
        if options and not segmentor.encoder.stages:
            raise UserError(
                "expected a backbone with residual blocks that can be deactivated, but the configured one has none; "
                "choose another backbone.name, or method.network_perturbation=null"
            )
        partners: dict[str, Callable[[Batch, int], Partner]] = {
            "batch": BatchPartner(seed),
            "same_image": SameImagePartner(segmentor),
        }
        self.partner = partners[method.partner]
        self.perturbed_context = _nothing if method.network_updates_batchnorm else self._frozen_statistics

    def __call__(self, labeled: Batch, unlabeled: Batch, step: int) -> StepResult:
        """Return all terms of one step.

        Args:
            labeled: Labeled batch, see the module's docstring.
            unlabeled: Unlabeled batch.
            step: Number of the step; seeds its draws.
        """
        weak_views = [labeled["image"], unlabeled["weak"]]
        images, sizes = torch.cat(weak_views), [len(views) for views in weak_views]
        partner = self.partner(unlabeled, step)
        weak = self.weak_pass(images, sizes, step)
        pseudo = PseudoLabels.from_logits(weak.u, unlabeled["valid"])
        strong_logits, targets = self.strong_pass(unlabeled, pseudo, partner)
        network = self.network_pass(images, sizes, weak.perturbed, step)

        labeled_logits = {"x": weak.x} | {f"x_{name}": x for name, (x, _) in network.items()}
        unlabeled_logits = weak.fp | {f"u_{name}": u for name, (_, u) in network.items()}
        terms = {name: self.criterion(logits, labeled["mask"]) for name, logits in labeled_logits.items()}
        terms |= {
            f"s{view}": consistency_loss(logits, target, self.threshold)
            for view, (logits, target) in enumerate(zip(strong_logits, targets, strict=True), 1)
        }
        terms |= {name: consistency_loss(logits, pseudo, self.threshold) for name, logits in unlabeled_logits.items()}
        return StepResult(terms, pseudo)

    def weak_pass(self, images_B3HW: Tensor, sizes: list[int], step: int) -> WeakPass:
        """Predict the weak views, plain and with dropped feature channels; run the deactivated encoder on the way.

        The encoder runs once over labeled and unlabeled images, which share BatchNorm's batch; the deactivated
        copy forks off at its first deactivated block. Only predictions that a term needs are decoded.
        """
        features, perturbed = self.encode_forked(images_B3HW, step)
        unlabeled = features[sizes[0] :]
        dropped = [Features(drop(unlabeled.levels, step)) for drop in self.feature_perturbations.values()]
        logits = self.segmentor.decode(Features.cat([features, *dropped]), images_B3HW.shape[2:])
        x, u, *fp = torch.split(logits, sizes + [sizes[1]] * len(dropped))
        return WeakPass(x, u, dict(zip(self.feature_perturbations, fp, strict=True)), perturbed)

    def encode_forked(self, images_B3HW: Tensor, step: int) -> tuple[Features, dict[str, Features]]:
        """Return plain features, and those of the network perturbation where it is on."""
        plain, perturbed = None, {}
        for name, perturbation in self.network_perturbations.items():
            deactivated = perturbation.draw(self.segmentor.encoder.stages, step)
            plain, perturbed[name] = self.segmentor.encode_forked(images_B3HW, deactivated, self.perturbed_context())
        return plain or self.segmentor.encode(images_B3HW), perturbed

    def network_pass(
        self, images_B3HW: Tensor, sizes: list[int], perturbed: Mapping[str, Features], step: int
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Predict the labeled and the unlabeled weak views with the deactivated network."""
        with self.perturbed_context():
            return {name: self._decode_pair(features, images_B3HW, sizes) for name, features in perturbed.items()}

    def _decode_pair(self, features: Features, images_B3HW: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
        x, u = torch.split(self.segmentor.decode(features, images_B3HW.shape[2:]), sizes)
        return x, u

    def strong_pass(
        self, unlabeled: Batch, pseudo: PseudoLabels, partner: Partner
    ) -> tuple[list[Tensor], list[PseudoLabels]]:
        """CutMix each strong view with its partner, images and targets alike, and predict all in one pass."""
        strong_BV3HW, boxes_BV4 = unlabeled["strong"], unlabeled["boxes"]
        labels = partner.labels(pseudo)
        images, targets = [], []
        for view in range(strong_BV3HW.shape[1]):
            inside_BHW = inside_boxes(boxes_BV4[:, view], *strong_BV3HW.shape[3:])
            images.append(torch.where(inside_BHW[:, None], partner.strong_BV3HW[:, view], strong_BV3HW[:, view]))
            targets.append(pseudo.mix(labels, inside_BHW))
        return list(self.segmentor(torch.cat(images)).chunk(len(images))), targets

    def _frozen_statistics(self) -> AbstractContextManager[None]:
        return frozen_batchnorm_statistics(self.segmentor)


class OfficialStep(MultiLevelStep):
    """The authors' passes one by one, for the faithful preset.

    The same terms as `MultiLevelStep`, but the feature-perturbed half holds the labeled images too (their
    predictions are thrown away, yet enter the decoder's BatchNorm), and the deactivated network runs a full pass.
    """

    def weak_pass(self, images_B3HW: Tensor, sizes: list[int], step: int) -> WeakPass:
        """Predict the weak views, plain and with dropped feature channels, both for labeled and unlabeled images."""
        features = self.segmentor.encode(images_B3HW)
        dropped = [Features(drop(features.levels, step)) for drop in self.feature_perturbations.values()]
        logits = self.segmentor.decode(Features.cat([features, *dropped]), images_B3HW.shape[2:])
        x, u, *rest = torch.split(logits, sizes * (1 + len(dropped)))
        return WeakPass(x, u, dict(zip(self.feature_perturbations, rest[1::2], strict=True)), {})

    def network_pass(
        self, images_B3HW: Tensor, sizes: list[int], perturbed: Mapping[str, Features], step: int
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Run the deactivated network in full, after the strong views."""
        pairs = {}
        for name, perturbation in self.network_perturbations.items():
            deactivated = perturbation.draw(self.segmentor.encoder.stages, step)
            with self.perturbed_context():
                features = self.segmentor.encode(images_B3HW, deactivated)
                pairs[name] = self._decode_pair(features, images_B3HW, sizes)
        return pairs


class BatchPartner:
    """The partner is another image of the batch: saves its loading and a pass."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, unlabeled: Batch, step: int) -> Partner:
        """Pair every image with a different one."""
        shift = partner_shift(len(unlabeled["weak"]), self.seed, step)
        return Partner(unlabeled["strong"].roll(shift, 0), lambda pseudo: pseudo.roll(shift))


class SameImagePartner:
    """The partner is a second view of the same image, labeled by a pass in eval mode, as in the authors' code."""

    def __init__(self, segmentor: Segmentor) -> None:
        self.segmentor = segmentor

    def __call__(self, unlabeled: Batch, step: int) -> Partner:
        """Label the second views."""
        if "partner" not in unlabeled:
            raise UserError(
                "expected a second view of every unlabeled image for partner=same_image, but the batch has none; "
                'use SemiSupervisedDataModule(..., partner="same_image")'
            )
        partner = unlabeled["partner"]
        with eval_mode(self.segmentor), torch.no_grad():
            labels = PseudoLabels.from_logits(self.segmentor(partner["weak"]), partner["valid"])
        return Partner(partner["strong"], lambda pseudo: labels)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode, and every part of it back into its own mode afterwards, also after an error."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training


@contextmanager
def frozen_batchnorm_statistics(module: nn.Module) -> Iterator[None]:
    """Normalise by the batch, but leave the running mean and variance as they are.

    Example:
        >>> norm = nn.BatchNorm2d(2)
        >>> with frozen_batchnorm_statistics(norm):
        ...     _ = norm(torch.rand(4, 2, 3, 3))
        >>> norm.running_mean.tolist()
        [0.0, 0.0]
    """
    norms = [child for child in module.modules() if isinstance(child, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _nothing() -> AbstractContextManager[None]:
    return nullcontext()


def build_step(
    segmentor: Segmentor, criterion: Criterion, method: Method, threshold: float, seed: int
) -> SupervisedStep | MultiLevelStep:
    """Choose the step of a method."""
    if not method.uses_unlabeled:
        return SupervisedStep(segmentor, criterion)
    step = {"forked": MultiLevelStep, "official": OfficialStep}[method.passes]
    return step(segmentor, criterion, method, threshold, seed)
