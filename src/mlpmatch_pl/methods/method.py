"""MLPMatch and its baselines as plain data: the weights and perturbations of each method.

    L = scale * [ (1 - lambda) * Lx + lambda * Lx_np + sum(s_i * Ls_i) + fp * Lfp + u_np * Lu_np ]

Methods differ only in these values, so every ablation is an override of one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from mlpmatch_pl.methods.schedules import SCHEDULES
from mlpmatch_pl.perturbation.input import require_partner
from mlpmatch_pl.utils.errors import UserError, suggest

PARTNERS = ("batch", "same_image")
PASSES = ("forked", "official")


@dataclass(frozen=True)
class Method:
    """What a training step computes. A term with weight 0 whose perturbation is on is still computed and logged.

    Attributes:
        name: Name of the preset.
        scale: Factor of the whole loss.
        strong_weights: Weight of each strong view, which also sets their number. Empty: labeled images only.
        feature_weight: Weight of the feature-perturbed term; 0 turns the perturbation off.
        feature_dropout: Probability that a feature channel is dropped.
        network_perturbation: ``{"sampler": ..., **options}``; None turns it off, with both of its terms.
        network_weight: Weight of the network-perturbed unlabeled term.
        lambda_max: Largest weight of the volatile term (network perturbation on labeled images).
        lambda_schedule: ``linear_epoch``, ``linear_step``, ``constant`` or ``off``.
        network_updates_batchnorm: Whether the perturbed pass moves BatchNorm's running statistics.
        cutmix: Options of `mlpmatch_pl.perturbation.CutMix`.
        partner: Source of CutMix's boxes: ``batch`` (another image of the batch) or ``same_image`` (another view).
        passes: ``forked`` shares the encoder's prefix; ``official`` runs the authors' separate passes.
        late_schedule: Whether the learning rate lags by one step, as in the authors' code.
    """

    name: str
    scale: float = 0.5
    strong_weights: tuple[float, ...] = ()
    feature_weight: float = 0.0
    feature_dropout: float = 0.5
    network_perturbation: Mapping[str, Any] | None = None
    network_weight: float = 0.0
    lambda_max: float = 0.0
    lambda_schedule: str = "linear_epoch"
    network_updates_batchnorm: bool = True
    cutmix: Mapping[str, Any] = field(default_factory=lambda: {"p": 0.5, "area": [0.02, 0.4], "ratio": [0.3, 1 / 0.3]})
    partner: str = "batch"
    passes: str = "forked"
    late_schedule: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "strong_weights", tuple(self.strong_weights))
        for key, choices in (("partner", PARTNERS), ("passes", PASSES), ("lambda_schedule", tuple(SCHEDULES))):
            value = getattr(self, key)
            if value not in choices:
                raise UserError(
                    f"expected method.{key} of {', '.join(choices)}, but got {value!r}." + suggest(str(value), choices)
                )
        weights = (self.scale, *self.strong_weights, self.feature_weight, self.network_weight)
        if min(weights) < 0 or not 0 <= self.lambda_max <= 1:
            raise UserError(f"expected method {self.name} to have weights of at least 0 and lambda_max from 0 to 1")
        if not self.strong_weights and (self.feature_weight or self.network_perturbation):
            raise UserError(
                "expected at least one strong view beside feature or network perturbation, "
                "but got method.strong_weights=[]; use method.strong_weights=[0.25]"
            )

    @property
    def uses_unlabeled(self) -> bool:
        """Whether the step uses unlabeled images."""
        return bool(self.strong_weights)

    def check_batch_sizes(self, labeled: int, unlabeled: int, synchronized: int = 1) -> None:
        """Check that batches are large enough for BatchNorm and CutMix.

        Args:
            labeled: Number of labeled images per device.
            unlabeled: Number of unlabeled images per device.
            synchronized: Number of devices that share SyncBatchNorm's statistics.

        Raises:
            UserError: If BatchNorm would see a single image, or CutMix would have no partner.
        """
        views = unlabeled * len(self.strong_weights)
        smallest = min(labeled + unlabeled, views) if self.uses_unlabeled else labeled
        if smallest * synchronized < 2:
            raise UserError(
                f"expected at least 2 images in every pass, because BatchNorm cannot train on one, but a batch has "
                f"{labeled} labeled and {unlabeled} unlabeled images; raise loader.batch_size"
            )
        if self.uses_unlabeled and self.partner == "batch":
            require_partner(unlabeled)


_UNIMATCH = Method("unimatch", strong_weights=(0.25, 0.25), feature_weight=0.5)
_MLPMATCH = Method(
    "mlpmatch",
    strong_weights=(0.25, 0.25),
    feature_weight=0.25,
    network_perturbation={"sampler": "single_block"},
    network_weight=0.25,
    lambda_max=0.25,
)

PRESETS: Mapping[str, Method] = {
    "mlpmatch": _MLPMATCH,
    "mlpmatch_official": Method(
        **{
            **asdict(_MLPMATCH),
            "name": "mlpmatch_official",
            "network_perturbation": {"sampler": "stage_bernoulli", "p": 0.25},
            "partner": "same_image",
            "passes": "official",
            "late_schedule": True,
        }
    ),
    "unimatch": _UNIMATCH,
    "fixmatch": Method("fixmatch", strong_weights=(1.0,)),
    "supervised": Method("supervised", scale=1.0),
}


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
    known = [entry.name for entry in fields(Method)]
    for key in values:
        if key not in known:
            raise UserError(f"method has no key {key!r}." + suggest(key, known))
    return Method(**{**asdict(PRESETS[name]), **values})


def total_loss(terms: Mapping[str, Tensor], method: Method, lambda_np: float) -> Tensor:
    """Return the loss: ``scale * [(1 - lambda) Lx + lambda Lx_np + weighted unlabeled terms]``.

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
    weights = {"x": 1 - lambda_np, "x_np": lambda_np, "fp": method.feature_weight, "u_np": method.network_weight}
    weights |= {f"s{view}": weight for view, weight in enumerate(method.strong_weights, 1)}
    return method.scale * torch.stack([weights[name] * term for name, term in terms.items()]).sum()
