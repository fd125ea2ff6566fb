"""MLPMatch and its baselines as plain data, read from ``conf/method/*.yaml``.

    L = scale * [ (1 - lambda) * Lx + lambda * Lx_np + sum(s_i * Ls_i) + fp * Lfp + u_np * Lu_np ]

Methods differ only in these values, so every ablation is an override of one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.resources import files
from typing import Any

import torch
import yaml
from torch import Tensor

from mlpmatch_pl.methods.schedules import SCHEDULES
from mlpmatch_pl.perturbation.input import require_partner
from mlpmatch_pl.utils.errors import UserError, require_choice, suggest

CHOICES: Mapping[str, tuple[str, ...]] = {
    "strong_dropout": ("none", "independent", "complementary"),
    "partner": ("batch", "flipped", "same_image"),
    "passes": ("forked", "official", "strong", "stream"),
    "lambda_schedule": SCHEDULES,
    "batchnorm": ("every", "weak"),
    "pseudo_labels": ("student", "teacher"),
}


@dataclass(frozen=True)
class Method:
    """What a training step computes. A term with weight 0 whose perturbation is on is still computed and logged.

    Attributes:
        name: Name of the preset.
        scale: Factor of the whole loss.
        strong_weights: Weight of each strong view, which also sets their number. Empty: labeled images only.
        feature_weight: Weight of the feature-perturbed term; 0 turns the perturbation off.
        feature_dropout: Probability that a feature channel is dropped.
        strong_dropout: Whether the strong views drop channels, too: ``none``, ``independent`` or ``complementary``, see
            `mlpmatch_pl.perturbation.feature.StrongDropout`.
        network_perturbation: ``{"sampler": ..., **options}``; None turns it off, with both of its terms.
        network_weight: Weight of the network-perturbed unlabeled term.
        lambda_max: Largest weight of the volatile term (network perturbation on labeled images).
        lambda_schedule: ``linear_epoch``, ``linear_step``, ``constant`` or ``off``.
        burn_in: Share of the training on labeled images alone, as the supervised baseline trains, from 0 to below 1.
        full_labeled_batch: Whether a batch has as many labeled images as one of the supervised baseline, and the
            unlabeled ones on top, instead of sharing this number.
        teacher: ``{"decay": ..., "ramp": ...}`` of an averaged network, see `mlpmatch_pl.methods.teacher.Teacher`,
            which is validated, tested and predicted with; None for none.
        pseudo_labels: Whether they come from the ``student``'s weak pass, or from the ``teacher`` in eval mode.
        batchnorm: Which passes move BatchNorm's running statistics: ``every``, or the ``weak`` one alone. All passes
            normalize by their own batch.
        cutmix: Options of `mlpmatch_pl.perturbation.CutMix`.
        partner: Source of CutMix's boxes: ``batch`` (another image of the batch), ``flipped`` (that of the reversed
            batch, as in UniMatch V2) or ``same_image`` (another view).
        passes: Where the deactivated network runs. ``forked``: beside the weak views. With a teacher for the unlabeled
            ones, the student's weak pass may have the labeled ones alone: ``strong`` runs it beside the first strong
            view, ``stream`` deactivates blocks in the strong views, without a pass of their own. ``official``: the
            authors' separate passes.
        late_schedule: Whether the learning rate lags by one step, as in the authors' code.
    """

    name: str
    scale: float
    strong_weights: tuple[float, ...]
    feature_weight: float
    feature_dropout: float
    strong_dropout: str
    network_perturbation: Mapping[str, Any] | None
    network_weight: float
    lambda_max: float
    lambda_schedule: str
    burn_in: float
    full_labeled_batch: bool
    teacher: Mapping[str, Any] | None
    pseudo_labels: str
    batchnorm: str
    cutmix: Mapping[str, Any]
    partner: str
    passes: str
    late_schedule: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "strong_weights", tuple(self.strong_weights))
        for key, choices in CHOICES.items():
            require_choice(f"method.{key}", getattr(self, key), choices)
        weights = (self.scale, *self.strong_weights, self.feature_weight, self.network_weight)
        if min(weights) < 0 or not 0 <= self.lambda_max <= 1:
            raise UserError(f"expected method {self.name} to have weights of at least 0 and lambda_max from 0 to 1")
        if not 0 <= self.burn_in < 1:
            raise UserError(
                f"expected method.burn_in from 0 to below 1, a share of the training, but got {self.burn_in}"
            )
        if self.pseudo_labels == "teacher" and not self.teacher:
            raise UserError(
                "expected a teacher for method.pseudo_labels=teacher, but got method.teacher=null; "
                "set method.teacher={decay: 0.99, ramp: true}"
            )
        if self.passes == "official" and self.batchnorm != "every":
            raise UserError(
                f"expected method.batchnorm=every for method.passes=official, but got {self.batchnorm}; use "
                "method.passes=forked"
            )
        if self.passes in ("strong", "stream") and (self.pseudo_labels != "teacher" or self.feature_weight):
            raise UserError(
                f"expected method.pseudo_labels=teacher and feature_weight=0 for method.passes={self.passes}, but got "
                f"{self.pseudo_labels} and {self.feature_weight}"
            )
        if self.passes == "stream" and self.network_weight:
            raise UserError(
                f"expected method.network_weight=0 for method.passes=stream, but got {self.network_weight}; use "
                "method.passes=strong"
            )
        if self.strong_dropout == "complementary" and (len(self.strong_weights) != 2 or self.feature_dropout != 0.5):
            raise UserError(
                "expected two strong views and feature_dropout=0.5 for method.strong_dropout=complementary, but got "
                f"{len(self.strong_weights)} and {self.feature_dropout}; use method.strong_dropout=independent"
            )
        if not self.strong_weights and (self.feature_weight or self.network_perturbation):
            raise UserError(
                "expected at least one strong view beside feature or network perturbation, "
                "but got method.strong_weights=[]; use method.strong_weights=[0.25]"
            )

    @property
    def uses_unlabeled(self) -> bool:
        """Whether the step uses unlabeled images."""
        return bool(self.strong_weights)

    def check_batch_sizes(
        self, labeled: int, unlabeled: int, synchronized: int = 1, has_batchnorm: bool = True
    ) -> None:
        """Check that batches are large enough for BatchNorm and CutMix.

        Args:
            labeled: Number of labeled images per device.
            unlabeled: Number of unlabeled images per device.
            synchronized: Number of devices that share SyncBatchNorm's statistics.
            has_batchnorm: Whether the network has BatchNorm.

        Raises:
            UserError: If BatchNorm would see a single image, or CutMix would have no partner.
        """
        passes = [labeled]
        if self.passes == "stream":
            passes += [unlabeled]  # each strong view alone
        elif self.passes == "strong":
            passes += [unlabeled * len(self.strong_weights)]
        elif self.uses_unlabeled:
            passes = [labeled + unlabeled, unlabeled * len(self.strong_weights)]
            if self.batchnorm == "weak" and self.feature_weight:
                passes += [unlabeled]  # dropped features are decoded alone
        if has_batchnorm and min(passes) * synchronized < 2:
            raise UserError(
                f"expected at least 2 images in every pass, because BatchNorm cannot train on one, but a batch has "
                f"{labeled} labeled and {unlabeled} unlabeled images; raise loader.batch_size"
            )
        if self.uses_unlabeled and self.partner == "batch":
            require_partner(unlabeled)


def _read_presets() -> dict[str, Method]:
    found = (file for file in files("mlpmatch_pl.conf").joinpath("method").iterdir() if file.name.endswith(".yaml"))
    presets = [Method(**yaml.safe_load(file.read_text(encoding="utf-8"))) for file in found]
    return {preset.name: preset for preset in sorted(presets, key=lambda preset: preset.name)}


PRESETS: Mapping[str, Method] = _read_presets()


def resolve_method(spec: str | Mapping[str, Any] | Method) -> Method:
    """Return the method for a preset's name or a mapping.

    Args:
        spec: A name in `PRESETS`, or a mapping with such a ``name`` and the values that differ from the preset.

    Raises:
        UserError: If the name or a key is unknown.

    Example:
        >>> resolve_method("unimatch").feature_weight
        0.5
        >>> resolve_method({"name": "mlpmatch", "lambda_max": 0.0}).network_weight
        0.25
    """
    if isinstance(spec, Method):
        return spec
    values = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = values.get("name", "mlpmatch")
    if name not in PRESETS:
        raise UserError(f"expected a method of {', '.join(PRESETS)}, but got {name!r}." + suggest(str(name), PRESETS))
    if not values.pop("network_updates_batchnorm", True):  # in checkpoints of version 0.1
        raise UserError(
            "expected no method.network_updates_batchnorm, which exists no longer; method.batchnorm=weak lets the weak "
            "pass alone move BatchNorm's statistics"
        )
    known = [entry.name for entry in fields(Method)]
    for key in values:
        if key not in known:
            raise UserError(f"method has no key {key!r}." + suggest(key, known))
    return Method(**{**asdict(PRESETS[name]), **values})


def total_loss(terms: Mapping[str, Tensor], method: Method, lambda_np: float) -> Tensor:
    """Return the loss: ``scale * [(1 - lambda) Lx + lambda Lx_np + weighted unlabeled terms]``.

    During burn-in the only term is ``x``, and the loss is that of the supervised baseline.

    Args:
        terms: Scalar loss terms by name, see `mlpmatch_pl.methods.step.StepResult`.
        method: The method with their weights.
        lambda_np: Weight of the volatile term, 0 without network perturbation.

    Example:
        >>> method = resolve_method("mlpmatch")
        >>> names = ("x", "x_np", "s1", "s2", "fp", "u_np")
        >>> total_loss({name: torch.tensor(1.0) for name in names}, method, 0.1).item()
        1.0
    """
    if method.uses_unlabeled and terms.keys() == {"x"}:  # during burn-in
        return terms["x"]
    weights = {"x": 1 - lambda_np, "x_np": lambda_np, "fp": method.feature_weight, "u_np": method.network_weight}
    weights |= {f"s{view}": weight for view, weight in enumerate(method.strong_weights, 1)}
    return method.scale * torch.stack([weights[name] * term for name, term in terms.items()]).sum()
