"""The data module: paired labeled and unlabeled batches for training, and whole images for evaluation."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence, Sized
from ctypes import c_bool
from functools import cache, partial
from multiprocessing import util
from pathlib import Path
from types import FrameType
from typing import Any, cast

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset, Sampler

from mlpmatch_pl.data.base import ImageSource, SegmentationData
from mlpmatch_pl.data.cache import fill_cache, with_cache
from mlpmatch_pl.data.dataset import (
    EvalDataset,
    LabeledDataset,
    OnBadImage,
    SkippedImages,
    TrainDataset,
    UnlabeledDataset,
    collate,
)
from mlpmatch_pl.data.datasets.named import resolve_dataset
from mlpmatch_pl.data.sampler import BurnIn, ShardSampler, StreamSampler, rank_and_world_size
from mlpmatch_pl.data.transforms.strong import UNIMATCH, StrongView
from mlpmatch_pl.data.transforms.weak import WeakView
from mlpmatch_pl.data.validation import validate_dataset
from mlpmatch_pl.methods.method import Method, resolve_method
from mlpmatch_pl.perturbation import CutMix
from mlpmatch_pl.utils.cpu import usable_cores
from mlpmatch_pl.utils.errors import UserError, require_choice

MAX_WORKERS = 16  # more workers rarely load faster, and each needs memory


class SemiSupervisedDataModule(LightningDataModule):
    """Training batches of ``{"labeled": ..., "unlabeled": ...}``, and whole images for evaluation.

    An epoch is one pass over the longer of the two streams. The shorter one repeats, reshuffled for each pass. Both
    streams and all views are functions of (seed, epoch, draw).

    Attributes:
        max_batches: Limit of the batches in an epoch, so that a training of a given number of steps can end with one:
            each epoch then has other images. Default: None, whole passes.

    Args:
        data: The dataset, from `mlpmatch_pl.folder`, `mlpmatch_pl.shapes` or custom sources; or a mapping of its name
            and arguments, such as ``{"name": "folder", "root": "my_images", "classes": ["road", "sky"]}``.
        method: The method that the batches are for: a preset's name, options as the module takes them, or the module's
            ``method``. It determines the number of strong views, the CutMix boxes, and whether each unlabeled image has
            a second view to paste from. A method without strong views gets labeled images only,
            ``unlabeled_batch_size`` more of them, so that a step sees as many images and an epoch has as many steps as
            with unlabeled images. During burn-in (which needs a Trainer of known length) batches are like these.
        crop_size: Height and width of the training views in pixels.
        batch_size: Labeled images in a batch of one device, or in an optimizer step, see ``batch_per``.
        unlabeled_batch_size: Unlabeled images likewise. Default: ``batch_size``.
        batch_per: Whether the batch sizes are those of one ``device``, or of an optimizer ``step``: then devices and
            accumulated batches share them.
        scale: Smallest and largest factor of the long side, in the weak view.
        strong: Pixel transforms of albumentations for the strong views, see
            `mlpmatch_pl.data.transforms.strong.StrongView`; an empty list for none.
        eval_batch_size: Images in an evaluation batch. More than 1 requires images of equal size.
        num_workers: Worker processes of one device, over all its loaders. Default: one fewer than the device's share of
            the cores, at most 16.
        multiprocessing_context: ``fork``, ``spawn`` or ``forkserver``. Default: the platform's.
        cache: Folder for decoded images, see `mlpmatch_pl.data.cache`. Default: no cache.
        on_bad_image: Whether a training image or mask that cannot be read stops the training (``raise``), or is
            replaced by another one and counted in ``skipped`` (``skip``). Evaluation images are never skipped.
        seed: Seed of the streams and the views.

    Raises:
        UserError: If a value is out of range, or the method needs unlabeled images and there are none.

    Example:
        >>> from mlpmatch_pl.data.datasets.shapes import shapes
        >>> data = shapes(labeled=4, train=16)
        >>> datamodule = SemiSupervisedDataModule(data, crop_size=64, batch_size=2, num_workers=0)
        >>> batch = next(iter(datamodule.train_dataloader()))[0]
        >>> tuple(batch["labeled"]["image"].shape), tuple(batch["unlabeled"]["strong"].shape)
        ((2, 3, 64, 64), (2, 2, 3, 64, 64))
    """

    def __init__(
        self,
        data: SegmentationData | Mapping[str, Any],
        *,
        method: str | Mapping[str, Any] | Method = "mlpmatch",
        crop_size: int = 321,
        batch_size: int = 8,
        unlabeled_batch_size: int | None = None,
        batch_per: str = "device",
        scale: tuple[float, float] = (0.5, 2.0),
        strong: Sequence[Mapping[str, Any]] = UNIMATCH,
        eval_batch_size: int = 1,
        num_workers: int | None = None,
        multiprocessing_context: str | None = None,
        cache: str | None = None,
        on_bad_image: str = "raise",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.data = data = resolve_dataset(data)
        self.seed, self.method = seed, resolve_method(method)
        self._batch_size, self.crop_size, self.batch_per = batch_size, crop_size, batch_per
        self.unlabeled_batch_size = batch_size if unlabeled_batch_size is None else unlabeled_batch_size
        self._shares = 1  # that a step is divided into
        self.max_batches: int | None = None
        self.eval_batch_size, self.num_workers = eval_batch_size, num_workers
        self.multiprocessing_context = multiprocessing_context
        self.skipped = SkippedImages()
        require_choice("loader.batch_per", batch_per, ("device", "step"))
        bad = cast(OnBadImage, require_choice("loader.on_bad_image", on_bad_image, ("raise", "skip")))
        self._skip_bad = bad == "skip"
        if min(self.batch_size, self.unlabeled_batch_size, eval_batch_size) < 1 or (num_workers or 0) < 0:
            raise UserError(
                f"expected batch sizes of at least 1 and workers of at least 0, but got {batch_size} labeled, "
                f"{self.unlabeled_batch_size} unlabeled, {eval_batch_size} for evaluation, {num_workers} workers"
            )
        require_unlabeled(data, self.method)
        weak = WeakView(crop_size, (scale[0], scale[1]), ignore_index=data.ignore_index)
        num_classes = len(data.class_names)
        self._labeled = LabeledDataset(data.train, data.labeled_indices, num_classes, weak, seed, bad)
        self._unlabeled = UnlabeledDataset(
            data.train,
            data.unlabeled,
            weak,
            StrongView(strong, data.in_chans, data.bit_depth),
            CutMix(**{key: _pair(value) for key, value in self.method.cutmix.items()}),
            len(self.method.strong_weights),
            self.method.partner == "same_image",
            seed,
            bad,
        )
        self._checked = self._cached = False
        self.cache = cache
        self._resume = (0, 0)  # epoch and batch to start from

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trainer": None}  # a Trainer holds loaders, which cannot be pickled

    def __repr__(self) -> str:
        """Return the main options and the numbers of images."""
        data = self.data
        return (
            f"{type(self).__name__}(method={self.method.name!r}, crop_size={self.crop_size}, "
            f"batch_size={self.batch_size}, unlabeled_batch_size={self.unlabeled_batch_size}; "
            f"{len(data.labeled.names)} labeled, {len(data.unlabeled)} unlabeled, {len(data.val)} validation and "
            f"{len(data.test or ())} test images)"
        )

    __str__ = __repr__  # Lightning's __str__ fails for a CombinedLoader

    @property
    def batch_size(self) -> int:
        """Number of labeled images in a batch of one device; the unlabeled ones follow in proportion when it is set."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self.unlabeled_batch_size = max(round(self.unlabeled_batch_size * value / self._batch_size), 1)
        self._batch_size = value

    @property
    def images_per_step(self) -> int:
        """Number of images in a batch of one device, labeled and unlabeled."""
        return self.batch_size + self.unlabeled_batch_size

    @property
    def batch_sizes(self) -> dict[str, int]:
        """Number of images of each stream in a batch of one device, after burn-in."""
        return {name: size for name, (_, size) in self._streams().items()}

    def steps_per_epoch(self, world_size: int = 1) -> int:
        """Return the number of batches in an epoch."""
        labeled = math.ceil(len(self._labeled) / (self.batch_size * world_size))
        unlabeled = math.ceil(len(self._unlabeled) / (self.unlabeled_batch_size * world_size))
        steps = max(labeled, unlabeled)
        return steps if self.max_batches is None else min(steps, self.max_batches)

    def share_batches(self, devices: int, accumulated: int) -> None:
        """Divide batch sizes per step among devices and accumulated batches; `setup` does so with a Trainer's.

        Raises:
            UserError: If there is a remainder.
        """
        shares = devices * accumulated
        if self.batch_per == "device" or shares == self._shares:
            return
        labeled, unlabeled = self.batch_size * self._shares, self.unlabeled_batch_size * self._shares
        if labeled % shares or unlabeled % shares:
            raise UserError(
                f"expected {devices} devices and {accumulated} accumulated batches to share {labeled} labeled and "
                f"{unlabeled} unlabeled images of an optimizer step equally (loader.batch_per=step), but there is a "
                "remainder; change trainer.devices, trainer.accumulate_grad_batches or loader.batch_size"
            )
        self.batch_size, self.unlabeled_batch_size, self._shares = labeled // shares, unlabeled // shares, shares

    def check_world_size(self, world_size: int) -> None:
        """Refuse more processes than evaluation images: a process without a batch would block the others.

        Raises:
            UserError: If there are fewer validation or test images than processes.
        """
        for name, source in (("validation", self.data.val), ("test", self.data.test)):
            if source:
                _require_images(name, source, world_size)

    def prepare_data(self) -> None:
        """Validate the files with `mlpmatch_pl.data.validation`, and fill the cache, once per machine."""
        if self._checked:
            return
        sizes = validate_dataset(self.data, self.crop_size, self._skip_bad)
        if self.eval_batch_size > 1 and len(sizes) > 1:
            raise UserError(
                f"expected evaluation images of one size for loader.eval_batch_size={self.eval_batch_size}, "
                f"but got {len(sizes)} sizes; use loader.eval_batch_size=1"
            )
        if self.cache is not None:
            fill_cache(self.data, Path(self.cache), self.method.uses_unlabeled, self._skip_bad)
        self._checked = True

    def setup(self, stage: str) -> None:
        """Use the cache and this device's share of a step, in every process."""
        if self.trainer is not None:
            self.share_batches(self.trainer.world_size, self.trainer.accumulate_grad_batches)
        if self.cache is not None and not self._cached:
            self.data = with_cache(self.data, Path(self.cache))
            self._labeled.source = self._unlabeled.source = self.data.train
            self._cached = True

    def train_dataloader(self) -> CombinedLoader:
        """Return the paired loader. The first epoch after a resume starts at the batch where the run stopped."""
        (epoch, batch), self._resume = self._resume, (0, 0)
        rank, world_size = self._rank_and_world_size()
        steps = self.steps_per_epoch(world_size or rank_and_world_size()[1])
        streams = self._streams()
        burn_in, workers = self._burn_in_batches(steps), share_workers(self._workers(), len(streams))
        loaders = {}
        for name, (dataset, size) in streams.items():
            during = self.images_per_step if name == "labeled" else 0
            drawn = max(size, during) if burn_in else size
            sampler = StreamSampler(
                len(dataset), steps * drawn, rank, world_size, 2 * self.seed + (name == "unlabeled"),
                BurnIn(burn_in, drawn, during, size) if burn_in else None,
            )  # fmt: skip
            sampler.set_epoch(epoch)
            sampler.start = batch * drawn
            loaders[name] = self._loader(dataset, drawn, sampler, workers[name], drop_last=True, collate_fn=collate)
        return CombinedLoader(loaders, "min_size")

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the loader of whole validation images, each exactly once over all ranks."""
        return self.eval_loader("validation", self._whole(self.data.val))

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of whole test images, or of the validation images if there are no test images."""
        return self.eval_loader("test", self._whole(self.data.test or self.data.val))

    def eval_loader(self, name: str, dataset: EvalDataset) -> DataLoader[Any]:
        """Return a loader of evaluation images, each exactly once over all ranks.

        Args:
            name: What they are, for messages.
            dataset: The images.
        """
        rank, world_size = self._rank_and_world_size()
        _require_images(name, dataset, world_size or rank_and_world_size()[1])
        return self._loader(
            dataset, self.eval_batch_size, ShardSampler(len(dataset), rank, world_size), self._workers()
        )

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader of `test_dataloader`."""
        return self.test_dataloader()

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Remove the list of skipped images from a training batch, and count them."""
        return {name: self.skipped.pop_from(part) if isinstance(part, dict) else part for name, part in batch.items()}

    def state_dict(self) -> dict[str, int]:
        """Return the position in the training streams, saved in every checkpoint; empty without a training."""
        loop: Any = self.trainer.fit_loop  # type: ignore[union-attr]
        if math.isinf(loop.max_batches):  # as after trainer.validate alone
            return {}
        return {
            # "processed" is already incremented when the checkpoint of a finished epoch is written.
            "epoch": loop.epoch_progress.current.ready - 1,
            "batch": loop.epoch_loop.batch_progress.current.ready,
            "batches": int(loop.max_batches),
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from the position in a checkpoint. Lightning calls this before it asks for loaders."""
        if not state_dict:
            return
        epoch, batch = state_dict["epoch"], state_dict["batch"]
        self._resume = (epoch + 1, 0) if batch >= state_dict["batches"] else (epoch, batch)

    def _streams(self) -> dict[str, tuple[TrainDataset, int]]:
        """Return the dataset of each stream, and its images in a batch."""
        if not self.method.uses_unlabeled:
            return {"labeled": (self._labeled, self.images_per_step)}
        labeled = self.images_per_step if self.method.full_labeled_batch else self.batch_size
        return {"labeled": (self._labeled, labeled), "unlabeled": (self._unlabeled, self.unlabeled_batch_size)}

    def _burn_in_batches(self, steps_per_epoch: int) -> int:
        """Return the number of batches of the burn-in; 0 without a Trainer, which knows the length of the training."""
        trainer = self.trainer
        if not self.method.burn_in or trainer is None:
            return 0
        if trainer.max_epochs is not None and trainer.max_epochs > 0:
            total = trainer.max_epochs * steps_per_epoch
        elif trainer.max_steps > 0:
            total = trainer.max_steps * trainer.accumulate_grad_batches
        else:
            raise UserError(
                f"expected a known length of training for method.burn_in={self.method.burn_in}, but the Trainer is "
                "endless; set its max_epochs or max_steps"
            )
        return round(self.method.burn_in * total)

    def _whole(self, source: ImageSource) -> EvalDataset:
        return EvalDataset(source, len(self.data.class_names), self.data.ignore_index)

    def _loader(
        self, dataset: Dataset[Any], batch_size: int, sampler: Sampler[Any], workers: int, **options: Any
    ) -> DataLoader[Any]:
        _use_known_start_method()
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context=self.multiprocessing_context if workers else None,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            worker_init_fn=ignore_signals(),
            **options,
        )

    def _rank_and_world_size(self) -> tuple[int, int] | tuple[None, None]:
        return (None, None) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _workers(self) -> int:
        """Return the number of workers of this process; one core stays free for the process itself."""
        if self.num_workers is not None:
            return self.num_workers
        processes = 1 if self.trainer is None else self.trainer.num_devices  # on this machine
        return min(max(usable_cores() // processes - 1, 0), MAX_WORKERS)


def require_unlabeled(data: SegmentationData, method: Method) -> None:
    """Raise a `UserError` for a dataset without the unlabeled images that a method trains on."""
    if method.uses_unlabeled and not data.unlabeled:
        raise UserError(
            f"expected unlabeled images beside the {len(data.labeled.names)} labeled ones, but there are none; "
            "label fewer (dataset.labeled), add images without mask, or use method=supervised"
        )


def share_workers(total: int, loaders: int) -> dict[str, int]:
    """Distribute workers over one or two loaders: an unlabeled sample costs about three times as much as a labeled one.

    Example:
        >>> share_workers(8, 2), share_workers(1, 2), share_workers(8, 1)
        ({'labeled': 2, 'unlabeled': 6}, {'labeled': 0, 'unlabeled': 1}, {'labeled': 8})
    """
    if loaders == 1:
        return {"labeled": total}
    labeled = max(total // 4, 1) if total > 1 else 0
    return {"labeled": labeled, "unlabeled": total - labeled}


def _use_known_start_method() -> None:
    """Use the platform's start method in the processes of joblib, whose own one cannot start workers."""
    known = multiprocessing.get_all_start_methods()
    if multiprocessing.get_start_method(allow_none=True) not in (None, *known):
        multiprocessing.set_start_method(known[0], force=True)


def ignore_signals() -> Callable[[int], None]:
    """Return a `worker_init_fn` that keeps workers alive on Ctrl-C and SIGTERM.

    Terminals and clusters send these signals to all processes at once, but the main process finishes its step first,
    and needs their batches. When it exits itself, it sends SIGTERM to the remaining workers; only then do they exit.
    When it is killed, they exit too: workers of a forkserver would keep it, and it them, alive.
    """
    return partial(_ignore_signals, _exit_flag(os.getpid()))


@cache
def _exit_flag(pid: int) -> Any:
    """Return a flag, shared with the workers, that this process sets when it exits. A forked child needs its own."""
    flag = multiprocessing.RawValue(c_bool, False)
    # Finalizers with this priority run before multiprocessing sends SIGTERM. `atexit` functions do not run before it in
    # a process that multiprocessing started itself.
    util.Finalize(None, setattr, args=(flag, "value", True), exitpriority=100)
    return flag


def _ignore_signals(exiting: Any, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, partial(_exit_with_main, exiting))
    threading.Thread(target=_exit_after_main, daemon=True).start()


def _exit_after_main() -> None:
    main = multiprocessing.parent_process()
    assert main is not None  # this is a worker
    main.join()
    os._exit(1)


def _exit_with_main(exiting: Any, signum: int, frame: FrameType | None) -> None:
    if exiting.value:
        os._exit(0)  # as PyTorch's own handler does


def _require_images(name: str, source: Sized, world_size: int) -> None:
    if len(source) < world_size:
        raise UserError(
            f"expected at least {world_size} {name} images, one per process, but got {len(source)}; use fewer devices"
        )


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) else value
