"""MLPMatch as a LightningModule.

Li, Wang, Hu, Liu: "Revisiting Network Perturbation for Semi-Supervised Semantic Segmentation" (PRCV 2024,
arXiv 2411.05307), with UniMatch, FixMatch and the supervised baseline as presets of the same module::

    trainer = lightning.pytorch.Trainer(max_epochs=80)
    trainer.fit(MLPMatch(num_classes=21, lr=0.001), datamodule=SemiSupervisedDataModule(...))

Any data module works whose training batches are ``{"labeled": ..., "unlabeled": ...}`` as described in
`mlpmatch_pl.methods.step`, and whose validation and test batches are ``{"image": ..., "mask": ...}``.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mlpmatch_pl.evaluation import ConfusionMatrix, Scores, SlidingWindowInference, predict_logits
from mlpmatch_pl.evaluation.confusion import check_absent
from mlpmatch_pl.methods.batch import (
    image_and_mask,
    image_of,
    require_image_values,
    require_mask_values,
    split_batch,
)
from mlpmatch_pl.methods.build import build_step
from mlpmatch_pl.methods.losses import build_criterion
from mlpmatch_pl.methods.method import resolve_method, total_loss
from mlpmatch_pl.methods.optimizers import PAPER_OPTIMIZER, build_optimizer
from mlpmatch_pl.methods.schedules import TrainingLength, check_decay, lr_schedule, volatile_weight
from mlpmatch_pl.methods.step import step_values
from mlpmatch_pl.methods.teacher import Teacher
from mlpmatch_pl.segmentor import NetworkAdapter, Segmentor
from mlpmatch_pl.segmentor.segmentor import IMAGENET_MEAN, IMAGENET_STD, resolve_decoder
from mlpmatch_pl.utils.checkpoint import check_architecture
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.hub import HubMixin
from mlpmatch_pl.utils.palette import check_palette


class MLPMatch(LightningModule, HubMixin):
    """Semi-supervised segmentation with multi-level perturbation and volatile learning.

    All arguments are plain data, so that checkpoints hold them and load with ``weights_only=True``, without Hydra.
    The defaults are the paper's for Pascal VOC.

    Args:
        num_classes: Number of classes, background included.
        method: A preset (``mlpmatch``, ``mlpmatch_official``, ``mlpmatch_burn_in``, ``unimatch``,
            ``unimatch_official``, ``unimatch_v2``, ``mlpmatch_v2``, ``mlpmatch_v2_stream``, ``fixmatch``,
            ``supervised``) or a mapping with its ``name`` and the values to
            change, see `mlpmatch_pl.methods.method.Method`.
        segmentor: A network of your own, of segmentation_models_pytorch or of torchvision, see
            `mlpmatch_pl.segmentor.adapter.NetworkAdapter`; it replaces the one that the next six arguments but
            ``in_chans`` describe. Pass it to ``load_from_checkpoint``, too.
        backbone: Name of a timm model, see `mlpmatch_pl.segmentor.Encoder`.
        pretrained: True for timm's weights, ``auto`` for these or random ones without a connection, or the path of a
            local state dict of the encoder.
        in_chans: Number of image channels.
        output_stride: 8, 16 or 32.
        decoder: Name of a decoder (``deeplabv3plus``, ``dpt``, ``linear``), or a mapping with its ``name`` and options,
            see `mlpmatch_pl.segmentor`.
        pos_embed: ``timm`` or ``dinov2``, see `mlpmatch_pl.segmentor.Encoder`.
        frozen: Train the decoder alone.
        mean: Mean of each channel, for values as stored.
        std: Standard deviation of each channel, for values as stored.
        criterion: Loss of the labeled terms, see `mlpmatch_pl.methods.losses.build_criterion`.
        confidence_threshold: Minimum confidence of pseudo-labels (tau), 0.95 for VOC, 0 for Cityscapes.
        ignore_index: Mask value of ignored pixels.
        lr: Learning rate of the encoder.
        lr_multi: The learning rate of the decoder is ``lr * lr_multi``.
        layer_decay: Factor of the learning rate from a layer of the encoder to the one before it, from above 0 to 1.
        decay: How the learning rate changes, step by step: ``poly``, ``cosine``, or a scheduler of torch or timm with
            its arguments, see `mlpmatch_pl.methods.schedules.lr_schedule`.
        power: Exponent of the polynomial decay; 0 for a constant learning rate.
        warmup_steps: Number of first steps in which the learning rate rises linearly.
        optimizer: Name of an optimizer, or a mapping of its ``name`` and its arguments, see
            `mlpmatch_pl.methods.optimizers.build_optimizer`.
        class_names: Class names in the metrics' keys; ``0``, ``1``, ... by default.
        palette: RGB color of each class, saved in checkpoints to color predictions.
        bit_depth: Bits per channel of the training images, 8 or 16, saved in checkpoints to read images the same way.
        image_options: Other options of `mlpmatch_pl.data.readers.image.ImageReader`, saved for the same reason.
        absent: Whether means ``exclude`` classes absent from truth and prediction, or count them as ``zero``.
        channels_last: Use the channels-last memory format (faster on recent GPUs).
        compile_blocks: Compile each block of the encoder for training.
        activation_checkpointing: Keep only the inputs of the encoder's blocks for the backward pass, and recompute
            the rest: less memory, more time.
        seed: Seed of the random draws in the training step.
        decoder_channels: Of the DeepLabV3+ decoder, in code and checkpoints of version 0.1; use ``decoder``.
        atrous_rates: Likewise.

    Raises:
        UserError: If an argument is invalid.

    Example:
        >>> module = MLPMatch(num_classes=3, backbone="test_resnet", decoder={"channels": 16})
        >>> tuple(module(torch.zeros(2, 3, 65, 65, dtype=torch.uint8)).shape)
        (2, 3, 65, 65)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        method: str | Mapping[str, Any] = "mlpmatch",
        segmentor: nn.Module | None = None,
        backbone: str = "resnet50s",
        pretrained: bool | str = False,
        in_chans: int = 3,
        output_stride: int = 16,
        decoder: str | Mapping[str, Any] = "deeplabv3plus",
        pos_embed: str = "timm",
        frozen: bool = False,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        criterion: str | Mapping[str, Any] = "ce",
        confidence_threshold: float = 0.95,
        ignore_index: int = 255,
        lr: float = 0.001,
        lr_multi: float = 10.0,
        layer_decay: float = 1.0,
        decay: str | Mapping[str, Any] = "poly",
        power: float = 0.9,
        warmup_steps: int = 0,
        optimizer: str | Mapping[str, Any] = PAPER_OPTIMIZER,
        class_names: Sequence[str] | None = None,
        palette: Sequence[Sequence[int]] | None = None,
        bit_depth: int = 8,
        image_options: Mapping[str, Any] | None = None,
        absent: str = "exclude",
        channels_last: bool = False,
        compile_blocks: bool = False,
        activation_checkpointing: bool = False,
        seed: int = 0,
        decoder_channels: int | None = None,
        atrous_rates: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        old = {"channels": decoder_channels, "atrous_rates": atrous_rates}
        decoder = resolve_decoder({key: value for key, value in old.items() if value is not None} or decoder)
        # A checkpoint holds the weights themselves.
        self.save_hyperparameters(ignore=["pretrained", "segmentor", "decoder_channels", "atrous_rates"])
        self.save_hyperparameters({"segmentor": type(segmentor).__name__ if segmentor is not None else None})
        _check_ranges(self.hparams)
        self.method = resolve_method(method)
        self.class_names = list(map(str, range(num_classes)) if class_names is None else class_names)
        if len(self.class_names) != num_classes:
            raise UserError(f"expected {num_classes} class names, but got {len(self.class_names)}")
        check_palette(palette or (), num_classes)
        self.absent = check_absent(absent)
        if segmentor is None:
            self.segmentor = Segmentor(
                num_classes, backbone, pretrained, in_chans, output_stride, decoder, pos_embed, frozen, mean, std,
                compile_blocks, activation_checkpointing,
            )  # fmt: skip
        else:
            _check_given_network(segmentor, self.hparams)
            self.segmentor = NetworkAdapter(segmentor, num_classes, in_chans, mean, std)
        if channels_last:
            self.segmentor.to(memory_format=torch.channels_last)
        self.teacher = Teacher(self.segmentor, **self.method.teacher) if self.method.teacher else None
        self.criterion = build_criterion(criterion, num_classes, ignore_index)
        self.step = build_step(self.segmentor, self.criterion, self.method, confidence_threshold, seed, self.teacher)
        self._build_optimizer()  # a wrong one is refused here, not when training starts
        self.confusion, self.student_confusion = ConfusionMatrix(num_classes), ConfusionMatrix(num_classes)
        self.inference = SlidingWindowInference()  # of validation, test and predict steps: whole images
        self._values_checked = False
        self.last_terms: dict[str, Tensor] = {}  # of the last training step, with the total as "loss"
        self.own_length, self.own_step = TrainingLength(), 0  # without a Trainer, see set_length

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return logits (B, num_classes, H, W) for images (B, in_chans, H, W) of any size, with values as stored."""
        return predict_logits(self.network, image_BCHW)

    @property
    def network(self) -> Segmentor:
        """The network that is evaluated: the teacher's if there is one."""
        return self.segmentor if self.teacher is None else self.teacher.network

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Return the loss of a batch of labeled and unlabeled images, see `mlpmatch_pl.methods.step`.

        Raises:
            UserError: If the batch lacks what the method needs or has scaled images or masks with values that are not
                classes (on devices other than the CPU, the first one is checked), or lambda's schedule needs an
                unknown length.
        """
        labeled, unlabeled = split_batch(batch)
        self._check_values(labeled.get("image"), labeled.get("mask"), not self._values_checked, unlabeled.get("weak"))
        self._values_checked = True
        lambda_np = self.volatile_weight() if unlabeled else 0.0
        result = self.step(labeled, unlabeled, self.draw_step(batch_idx))
        self.own_step += self._trainer is None
        loss = total_loss(result.terms, self.method, lambda_np)
        self.last_terms = {name: term.detach() for name, term in {**result.terms, "loss": loss}.items()}
        values = step_values(
            result, loss, lambda_np, labeled["mask"], self.hparams["ignore_index"], self.hparams["confidence_threshold"]
        )
        if self._trainer is not None:
            values["lr"] = loss.new_full((), self.trainer.optimizers[0].param_groups[0]["lr"])
        self.log_dict({f"train/{key}": value for key, value in values.items()}, batch_size=len(labeled["mask"]))
        return loss

    def _check_values(self, image_BCHW: Any, mask_BHW: Any, is_first: bool, weak_UCHW: Any = None) -> None:
        if not isinstance(image_BCHW, Tensor) or not isinstance(mask_BHW, Tensor):
            return  # refused by name later
        if is_first or mask_BHW.device.type == "cpu":  # other devices would be waited for
            require_image_values(image_BCHW, self.segmentor.mean_C11)
            if isinstance(weak_UCHW, Tensor):
                require_image_values(weak_UCHW, self.segmentor.mean_C11)
            require_mask_values(mask_BHW, len(self.class_names), self.hparams["ignore_index"])

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Count the pixels by ``self.inference``, also for the student if there is a teacher.

        Raises:
            UserError: If a batch has no ``image`` or ``mask``, or scaled images or masks with values that are not
                classes (on devices other than the CPU, the first one is checked).
        """
        self._count(batch, batch_idx)
        if self.teacher is not None:
            self.student_confusion.update(self.inference.label(self.segmentor, batch["image"]), batch["mask"])

    def _count(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        image, mask = image_and_mask(batch)
        self._check_values(image, mask, is_first=batch_idx == 0)
        prediction = self.inference.label(self.network, image)
        if "inner" in batch:  # a block of a large image, see `EvalDataset`
            top, bottom, left, right = batch["inner"][0].tolist()
            prediction = prediction[:, top:bottom, left:right]
        self.confusion.update(prediction, mask)
        return prediction

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole validation set."""
        if self.teacher is not None:
            counts_CC = self.student_confusion.compute().cpu()
            self.student_confusion.reset()
            self.log("val/student_miou", Scores.of(counts_CC, self.absent).miou)
        self._log_scores("val")

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Count the pixels by ``self.inference``, and return the class of each pixel, (B, H, W)."""
        return self._count(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the whole test set."""
        self._log_scores("test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the class of each pixel by ``self.inference``, (B, H, W).

        Args:
            batch: Images (B, C, H, W) with values as stored, a tuple that starts with them, or ``{"image": images}``.
            batch_idx: Number of the batch.

        Raises:
            UserError: If there are no images, or the first ones are scaled.
        """
        image = image_of(batch)
        if batch_idx == 0:
            require_image_values(image, self.segmentor.mean_C11)
        return self.inference.label(self.network, image)

    def configure_optimizers(self) -> Any:
        """Build the optimizer, and the decay of its learning rates over the training's steps.

        Raises:
            UserError: If the number of steps is unknown, unless the learning rate is constant.
        """
        optimizer = self._build_optimizer()
        if self.teacher is not None:
            optimizer.register_step_post_hook(self._update_teacher)
        options = {key: self.hparams[key] for key in ("decay", "power", "warmup_steps")}
        constant = options["decay"] == "poly" and not options["power"]
        steps = 1 if constant else self.length().required_steps()
        factor = lr_schedule(steps, late=self.method.late_schedule, **options)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _build_optimizer(self) -> torch.optim.Optimizer:
        rates = (self.hparams[key] for key in ("lr", "lr_multi", "layer_decay"))
        return build_optimizer(self.hparams["optimizer"], self.segmentor.encoder, self.segmentor.decoder, *rates)

    def _update_teacher(self, *_: Any) -> None:
        assert self.teacher is not None
        self.teacher.update(self.segmentor, self.own_step - 1 if self._trainer is None else self.global_step)

    def set_length(self, steps: int, epochs: int) -> None:
        """Set the length of training without a Trainer, with Fabric or your own loop.

        The module then counts its training steps in ``own_step``, which seeds their random draws. Set ``own_step`` too
        when you resume. A Trainer ignores both.

        Args:
            steps: Total number of training steps.
            epochs: Total number of epochs, each with the same number of steps.

        Raises:
            UserError: If there is not at least one step per epoch.

        Example:
            >>> module = MLPMatch(num_classes=3, backbone="test_resnet", decoder={"channels": 16})
            >>> module.set_length(steps=100, epochs=10)
            >>> module.own_step = 50
            >>> module.volatile_weight()
            0.125
        """
        if not 1 <= epochs <= steps:
            raise UserError(
                f"expected at least one epoch with at least one step each, but got {steps} steps and {epochs} epochs"
            )
        self.own_length = TrainingLength(steps, epochs)

    def length(self) -> TrainingLength:
        """Return the length of training, as far as it is known."""
        return self.own_length if self._trainer is None else TrainingLength.of(self._trainer)

    def volatile_weight(self) -> float:
        """Return lambda at the current step; 0 without network perturbation.

        Raises:
            UserError: If its schedule needs an unknown length.
        """
        if not self.method.network_perturbation or not self.method.lambda_max:
            return 0.0
        length = self.length()
        step, epoch = self.global_step, self.current_epoch
        if self._trainer is None:
            step = self.own_step
            epoch = step * (length.epochs or 0) // (length.steps or 1)
        return volatile_weight(
            self.method.lambda_schedule,
            self.method.lambda_max,
            epoch=epoch,
            epochs=length.epochs,
            step=step,
            steps=length.steps,
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the architecture of a checkpoint before it is loaded."""
        check_architecture(checkpoint.get("hyper_parameters", {}), self.hparams)

    def deactivated_blocks(self, batch_idx: int) -> frozenset[int]:
        """Return the indices of the encoder's blocks that a training step deactivates."""
        return self.step.deactivated_blocks(self.draw_step(batch_idx))

    def draw_step(self, batch_idx: int) -> int:
        """Return the number that seeds the random draws of a training step."""
        if self._trainer is None:
            return self.own_step
        # Batches accumulated into one optimizer step have draws of their own.
        accumulated = self.trainer.accumulate_grad_batches
        return self.global_step * accumulated + batch_idx % accumulated

    def _log_scores(self, stage: str) -> None:
        counts_CC = self.confusion.compute()
        self.confusion.reset()
        if self._trainer is None or not self.trainer.sanity_checking:
            scores = Scores.of(counts_CC.cpu(), self.absent).as_dict(self.class_names)
            self.log_dict({f"{stage}/{key}": value for key, value in scores.items()})
            self.last_counts_CC = counts_CC.cpu()


def _check_given_network(network: Any, hparams: Mapping[str, Any]) -> None:
    """Refuse the name that a checkpoint has instead of a network, and options that need a timm encoder."""
    if isinstance(network, str):
        raise UserError(
            f"expected the network of the checkpoint, a {network}; pass it as "
            "MLPMatch.load_from_checkpoint(path, segmentor=network)"
        )
    for key in ("frozen", "compile_blocks", "activation_checkpointing"):
        if hparams[key]:
            raise UserError(f"expected {key}=False for a network of your own, but got True; set it up in the network")


def _check_ranges(hparams: Mapping[str, Any]) -> None:
    for key in ("lr", "lr_multi", "power", "warmup_steps"):
        if not 0 <= hparams[key] < math.inf:
            raise UserError(f"expected {key} as a number of at least 0, but got {hparams[key]}")
    if not 0 < hparams["layer_decay"] <= 1:
        raise UserError(f"expected layer_decay from above 0 to 1, but got {hparams['layer_decay']}")
    check_decay(hparams["decay"])
    if not 0 <= hparams["confidence_threshold"] <= 1:
        raise UserError(f"expected confidence_threshold from 0 to 1, but got {hparams['confidence_threshold']}")
    if min(hparams["std"], default=1) <= 0:
        raise UserError(f"expected std with values above 0, but got {list(hparams['std'])}; check prints them")
