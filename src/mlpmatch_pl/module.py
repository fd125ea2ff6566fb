"""MLPMatch as a LightningModule.

Li, Wang, Hu, Liu: "Revisiting Network Perturbation for Semi-Supervised Semantic Segmentation" (PRCV 2024,
arXiv 2411.05307), with UniMatch, FixMatch and the supervised baseline as presets of the same module. Use::

    trainer = lightning.pytorch.Trainer(max_epochs=80)
    trainer.fit(MLPMatch(num_classes=21, lr=0.001), datamodule=SemiSupervisedDataModule(...))

Any data module will do whose training batches are ``{"labeled": ..., "unlabeled": ...}`` as described in
`mlpmatch_pl.steps`, and whose validation batches are ``{"image": ..., "mask": ...}``.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from mlpmatch_pl.errors import UserError
from mlpmatch_pl.evaluation import ConfusionMatrix, Scores, predict_logits
from mlpmatch_pl.evaluation.confusion import check_absent
from mlpmatch_pl.methods import Method, resolve_method
from mlpmatch_pl.objective import build_criterion, volatile_weight
from mlpmatch_pl.palette import require_colors
from mlpmatch_pl.segmentor import Segmentor
from mlpmatch_pl.segmentor.segmentor import IMAGENET_MEAN, IMAGENET_STD
from mlpmatch_pl.steps import build_step

ARCHITECTURE = ("num_classes", "backbone", "in_chans", "output_stride", "decoder_channels", "atrous_rates")


class MLPMatch(LightningModule):
    """Semi-supervised segmentation with multi-level perturbation and volatile learning.

    All arguments are plain data, so a checkpoint holds them and loads with ``weights_only=True``, without Hydra.
    Defaults are the paper's for Pascal VOC.

    Args:
        num_classes: Number of classes, background included.
        method: A preset (``mlpmatch``, ``mlpmatch_official``, ``unimatch``, ``fixmatch``, ``supervised``) or a
            mapping with its ``name`` and what differs from it, see `mlpmatch_pl.methods.Method`.
        backbone: Name of a timm model, see `mlpmatch_pl.segmentor.Encoder`.
        pretrained: True, or the path of a local file with the encoder's weights.
        in_chans: Number of image channels.
        output_stride: 8, 16 or 32.
        decoder_channels: Width of the decoder.
        atrous_rates: Dilations of the ASPP branches.
        mean: Mean of each channel, for values as they are stored.
        std: Standard deviation of each channel, likewise.
        criterion: Labeled loss, see `mlpmatch_pl.objective.build_criterion`.
        confidence_threshold: Least confidence of a pseudo label that counts (tau): 0.95 for VOC, 0 for Cityscapes.
        ignore_index: Mask value of pixels that do not count.
        lr: Learning rate of the encoder.
        lr_multi: The decoder learns at ``lr * lr_multi``.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.
        power: Exponent of the polynomial decay of the learning rate, per step.
        class_names: Names for the metrics' keys; ``0``, ``1``, ... when left out.
        palette: An RGB colour for each class, which a checkpoint carries for pictures of its predictions.
        bit_depth: Bits a channel of the images that it was trained on, 8 or 16, which a checkpoint carries likewise.
        absent: Whether classes that are absent from truth and prediction are excluded from means, or count zero.
        channels_last: Keep weights and activations in channels-last memory format (faster on recent GPUs).
        compile_blocks: Compile each block of the encoder for training.
        activation_checkpointing: Keep only the inputs of the encoder's blocks for the backward pass, and compute the
            rest again: less memory, more time.
        fused_optimizer: Update all weights in one kernel.
        seed: Seed of the draws inside the step.

    Raises:
        UserError: If an argument is unknown or out of range.

    Example:
        >>> module = MLPMatch(num_classes=3, backbone="test_resnet", decoder_channels=16)
        >>> tuple(module(torch.zeros(2, 3, 65, 65, dtype=torch.uint8)).shape)
        (2, 3, 65, 65)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        method: str | Mapping[str, Any] = "mlpmatch",
        backbone: str = "resnet50s",
        pretrained: bool | str = False,
        in_chans: int = 3,
        output_stride: int = 16,
        decoder_channels: int = 256,
        atrous_rates: Sequence[int] = (6, 12, 18),
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        criterion: str | Mapping[str, Any] = "ce",
        confidence_threshold: float = 0.95,
        ignore_index: int = 255,
        lr: float = 0.001,
        lr_multi: float = 10.0,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        power: float = 0.9,
        class_names: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        bit_depth: int = 8,
        absent: str = "exclude",
        channels_last: bool = False,
        compile_blocks: bool = False,
        activation_checkpointing: bool = False,
        fused_optimizer: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_ranges(lr, lr_multi, momentum, weight_decay, power, confidence_threshold, std)
        self.save_hyperparameters(ignore=["pretrained"])  # a checkpoint has the weights themselves
        self.method = resolve_method(method)
        self.class_names = _names(class_names, num_classes)
        _check_palette(palette or (), num_classes)
        self.absent = check_absent(absent)
        self.segmentor = Segmentor(
            num_classes, backbone, pretrained, in_chans, output_stride, decoder_channels, atrous_rates, mean, std,
            compile_blocks, activation_checkpointing,
        )  # fmt: skip
        if channels_last:
            self.segmentor.to(memory_format=torch.channels_last)
        self.criterion = build_criterion(criterion, num_classes, ignore_index)
        self.step = build_step(self.segmentor, self.criterion, self.method, confidence_threshold, seed)
        self.confusion = ConfusionMatrix(num_classes)
        self.last_terms: dict[str, Tensor] = {}  # of the last training step, and "loss"

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return logits at the images' size, (B, num_classes, H, W), for images with values 0..255."""
        return predict_logits(self.segmentor, image_BCHW)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of a batch of labeled and unlabeled images, see `mlpmatch_pl.steps`."""
        lambda_np = self.volatile_weight()
        result = self.step(batch["labeled"], batch.get("unlabeled", {}), self.draw_step(batch_idx))
        loss = total_loss(result.terms, self.method, lambda_np)
        self.last_terms = {name: term.detach() for name, term in {**result.terms, "loss": loss}.items()}
        self._log_step(loss, result.terms, lambda_np, batch, result.pseudo)
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Count the pixels of whole images."""
        self.confusion.update(self(batch["image"]).argmax(dim=1), batch["mask"])

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole validation set."""
        self._log_scores("val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Count the pixels of whole images."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the whole test set."""
        self._log_scores("test")

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the class of every pixel, (B, H, W)."""
        prediction: Tensor = self(batch["image"]).argmax(dim=1)
        return prediction

    def configure_optimizers(self) -> Any:
        """SGD with the encoder at ``lr`` and the decoder at ``lr * lr_multi``, decayed polynomially per step."""
        hparams = self.hparams
        decoder_lr = hparams["lr"] * hparams["lr_multi"]
        groups = [
            {"params": self.segmentor.encoder.parameters(), "lr": hparams["lr"], "name": "encoder"},
            {
                "params": self.segmentor.decoder.parameters(),
                "lr": decoder_lr,
                "name": "decoder",
            },
        ]
        optimizer = torch.optim.SGD(
            groups,
            momentum=hparams["momentum"],
            weight_decay=hparams["weight_decay"],
            fused=hparams["fused_optimizer"] or None,
        )
        decay = partial(
            poly_decay,
            steps=int(self.trainer.estimated_stepping_batches),
            power=hparams["power"],
            late=self.method.late_schedule,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def volatile_weight(self) -> float:
        """Return lambda at the present step; 0 without network perturbation."""
        if not self.method.network_perturbation or self._trainer is None:
            return 0.0
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        steps_per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        return volatile_weight(
            self.method.lambda_schedule,
            self.method.lambda_max,
            epoch=self.current_epoch,
            epochs=math.ceil(steps / steps_per_epoch),
            step=self.global_step,
            steps=steps,
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another architecture, before anything is changed."""
        check_architecture(checkpoint.get("hyper_parameters", {}), self.hparams)

    def deactivated_blocks(self, batch_idx: int) -> frozenset[int]:
        """Return the encoder's blocks that a training step deactivates; none without network perturbation."""
        drawn: frozenset[int] = frozenset()
        for perturbation in getattr(self.step, "network_perturbations", {}).values():
            drawn |= perturbation.draw(self.segmentor.encoder.stages, self.draw_step(batch_idx))
        return drawn

    def draw_step(self, batch_idx: int) -> int:
        """Return the number that seeds the draws of a training step."""
        # Batches that are accumulated into one optimizer step still draw differently.
        accumulated = 1 if self._trainer is None else self.trainer.accumulate_grad_batches
        return self.global_step * accumulated + batch_idx % accumulated

    def _log_step(
        self, loss: Tensor, terms: Mapping[str, Tensor], lambda_np: float, batch: Mapping[str, Any], pseudo: Any
    ) -> None:
        mask_BHW = batch["labeled"]["mask"]
        no_label = (mask_BHW == self.hparams["ignore_index"]).all()
        values: dict[str, Any] = {"loss": loss, **{f"loss_{name}": term for name, term in terms.items()}}
        if pseudo is not None:
            strong = [terms[f"s{view}"] for view in range(1, 1 + len(self.method.strong_weights))]
            values["loss_s"] = torch.stack(strong).mean()
            values["confident_ratio"] = pseudo.confident_ratio(self.hparams["confidence_threshold"])
            values["empty_unlabeled"] = (~pseudo.valid_BHW.any()).float()
        # Numbers are filled in on the device: Lightning would copy each there, and wait for it.
        values |= {"lambda_np": loss.new_full((), lambda_np), "empty_labeled": no_label.float()}
        if self._trainer is not None:
            values["lr"] = loss.new_full((), self.trainer.optimizers[0].param_groups[0]["lr"])
        self.log_dict({f"train/{key}": value for key, value in values.items()}, batch_size=len(mask_BHW))

    def _log_scores(self, stage: str) -> None:
        counts_CC = self.confusion.compute()
        self.confusion.reset()
        if self._trainer is None or not self.trainer.sanity_checking:
            scores = Scores.of(counts_CC.cpu(), self.absent).as_dict(self.class_names)
            self.log_dict({f"{stage}/{key}": value for key, value in scores.items()})
            self.last_counts_CC = counts_CC.cpu()


def check_architecture(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Compare the hyperparameters that decide the network.

    Raises:
        UserError: For the first one that differs.
    """
    for key in ARCHITECTURE:
        if key in saved and _plain(saved[key]) != _plain(here[key]):
            raise UserError(
                f"expected a checkpoint of this architecture, but it has {key}={saved[key]} and the configuration "
                f"{key}={here[key]}; resume with the configuration of the run that wrote it"
            )


def total_loss(terms: Mapping[str, Tensor], method: Method, lambda_np: float) -> Tensor:
    """Weigh the terms of a step: ``scale * [(1 - lambda) Lx + lambda Lx_np + weighted unlabeled terms]``.

    Args:
        terms: Scalars by name, see `mlpmatch_pl.steps.StepResult`.
        method: Their weights.
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


def poly_decay(step: int, steps: int, power: float, late: bool) -> float:
    """Return the factor of the learning rate, ``(1 - step / steps) ** power``.

    Args:
        step: Optimizer step from 0.
        steps: Number of steps in all; beyond it the factor stays 0.
        power: Exponent, 0.9 in the paper.
        late: Use the value of the step before, as the authors' code does.

    Example:
        >>> [round(poly_decay(step, 10, 0.9, late=True), 4) for step in range(4)]
        [1.0, 1.0, 0.9095, 0.8181]
    """
    return float(max(1 - max(step - late, 0) / max(steps, 1), 0.0) ** power)


def _check_ranges(
    lr: float,
    lr_multi: float,
    momentum: float,
    weight_decay: float,
    power: float,
    confidence_threshold: float,
    std: Sequence[float],
) -> None:
    numbers = {"lr": lr, "lr_multi": lr_multi, "momentum": momentum, "weight_decay": weight_decay, "power": power}
    if wrong := [key for key, value in numbers.items() if not 0 <= value < math.inf]:
        raise UserError(f"expected {wrong[0]} as a number of at least 0, but got {numbers[wrong[0]]}")
    if not 0 <= confidence_threshold <= 1:
        raise UserError(f"expected confidence_threshold from 0 to 1, but got {confidence_threshold}")
    if not all(value > 0 for value in std):
        raise UserError(f"expected std with values above 0, but got {list(std)}; check prints them")


def _names(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    names = [str(index) for index in range(num_classes)] if class_names is None else list(class_names)
    if len(names) != num_classes:
        raise UserError(f"expected {num_classes} class names, but got {len(names)}")
    return names


def _check_palette(palette: Sequence[Sequence[int]], num_classes: int) -> None:
    require_colors("palette", palette)
    if palette and len(palette) != num_classes:
        raise UserError(f"expected {num_classes} colours in palette, one a class, but got {len(palette)}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
