"""What a signal to the whole process group means to the processes that load images."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from ctypes import c_bool
from functools import cache, partial
from multiprocessing import util
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset, Sampler

from mlpmatch_pl.data.bad_images import SkippedImages, bad_image_policy, collate
from mlpmatch_pl.data.base import ImageSource, SegmentationData
from mlpmatch_pl.data.cache import fill_cache, with_cache
from mlpmatch_pl.data.dataset import EvalDataset, LabeledDataset, UnlabeledDataset
from mlpmatch_pl.data.sampler import ShardSampler, StreamSampler, current_place
from mlpmatch_pl.data.transforms.strong import UNIMATCH, StrongView
from mlpmatch_pl.data.transforms.weak import WeakView
from mlpmatch_pl.data.validation import validate_dataset
from mlpmatch_pl.methods.method import Method, resolve_method
from mlpmatch_pl.perturbation import CutMix
from mlpmatch_pl.utils.cpu import usable_cores
from mlpmatch_pl.utils.errors import UserError


def outlive_signals() -> Callable[[int], None]:
    """Return what lets a loading process outlive Ctrl-C and SIGTERM: the main process needs it for its last step.

    Terminals and clusters send them to all processes at once. The main process tells its workers to end itself; at its
    own end it sends SIGTERM to those that are left and waits for them, and then, only then, it ends them.

    Returns:
        A `worker_init_fn` for a `torch.utils.data.DataLoader` of this process.
    """
    return partial(_outlive, _ending(os.getpid()))


@cache
def _ending(pid: int) -> Any:
    """Return a flag, shared with the workers, which this process sets when it ends. A forked child needs its own."""
    flag = multiprocessing.RawValue(c_bool, False)
    # Finalizers of this priority run before multiprocessing sends SIGTERM, which an `atexit` function does not do in
    # a process that multiprocessing started itself.
    util.Finalize(None, setattr, args=(flag, "value", True), exitpriority=100)
    return flag


def _outlive(ending: Any, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, partial(_end_with_main, ending))


def _end_with_main(ending: Any, signum: int, frame: FrameType | None) -> None:
    if ending.value:
        os._exit(0)  # as PyTorch's own handler does


MOST_WORKERS = 16  # more seldom load faster, and each costs memory


def build_loader(
    dataset: Dataset[Any],
    batch_size: int,
    sampler: Sampler[Any],
    workers: int,
    context: str | None = None,
    *,
    pinned: bool = False,
    **options: Any,
) -> DataLoader[Any]:
    """Build a loader whose processes stay, and do not end before the main process.

    Args:
        dataset: Samples.
        batch_size: Samples in a batch.
        sampler: Which samples, and when.
        workers: Processes; 0 loads in the main process.
        context: How processes are started; the platform's default if left out.
        pinned: Whether batches go to memory that a GPU reads directly.
        options: Further ones of torch's DataLoader.
    """
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context=context if workers else None,
        pin_memory=pinned,
        worker_init_fn=outlive_signals(),
        **options,
    )


def free_workers(processes: int) -> int:
    """Return how many workers each of the training processes on this machine may have, so that cores are left."""
    return min(max(usable_cores() // processes - 1, 0), MOST_WORKERS)


def share_workers(total: int, loaders: int) -> dict[str, int]:
    """Share workers out to one or two loaders: an unlabeled sample costs about three times a labeled one.

    Example:
        >>> share_workers(8, 2), share_workers(1, 2), share_workers(8, 1)
        ({'labeled': 2, 'unlabeled': 6}, {'labeled': 0, 'unlabeled': 1}, {'labeled': 8})
    """
    if loaders == 1:
        return {"labeled": total}
    labeled = max(total // 4, 1) if total > 1 else 0
    return {"labeled": labeled, "unlabeled": total - labeled}


def check_share(name: str, source: ImageSource, world_size: int) -> None:
    """Refuse fewer images to evaluate than there are processes.

    Raises:
        UserError: With the name of the set.
    """
    if len(source) < world_size:
        raise UserError(
            f"expected at least {world_size} {name} images, one a process, but got {len(source)}; use fewer devices"
        )


class SemiSupervisedDataModule(LightningDataModule):
    """Training batches of ``{"labeled": ..., "unlabeled": ...}``, and whole images for evaluation.

    An epoch is one pass over the longer of the two streams; the shorter one is passed over again, reshuffled each
    time. Both streams and all views are functions of (seed, epoch, draw).

    Args:
        data: The dataset, from `mlpmatch_pl.folder`, `mlpmatch_pl.shapes` or your own sources.
        method: What the batches are for, as the module takes it, or the module's ``method`` itself: it says how many
            strong views there are, which boxes CutMix draws, and whether every unlabeled image comes with a second view
            to paste from. One without strong views gets labeled images only, ``unlabeled_batch_size`` more of them, so
            that a step sees as many images and an epoch has as many steps as with unlabeled images.
        crop_size: Height and width of the training views in pixels.
        batch_size: Labeled images in a batch, a device.
        unlabeled_batch_size: Unlabeled images in a batch, a device; as many as labeled ones if left out.
        scale: Smallest and largest factor of the long side, in the weak view.
        strong: Pixel transforms of albumentations for the strong views, see
            `mlpmatch_pl.data.transforms.strong.StrongView`; an empty list for none.
        eval_batch_size: Images in an evaluation batch; more than 1 only if all have the same size.
        num_workers: Worker processes in all; as many as there are free cores if left out.
        multiprocessing_context: ``fork``, ``spawn`` or ``forkserver``; the platform's default if left out.
        cache: Folder for decoded images, see `mlpmatch_pl.data.cache.with_cache`; none if left out.
        on_bad_image: ``raise`` or ``skip``: whether a training image or mask that cannot be read ends the training, or
            is replaced by another draw and counted in ``skipped``. Evaluation never skips: scores are of whole sets.
        seed: Seed of the streams and the views.

    Raises:
        UserError: If a value is out of range, or there are no unlabeled images for a method that needs them.

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
        data: SegmentationData,
        *,
        method: str | Mapping[str, Any] | Method = "mlpmatch",
        crop_size: int = 321,
        batch_size: int = 8,
        unlabeled_batch_size: int | None = None,
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
        self.data, self.seed, self.method = data, seed, resolve_method(method)
        self.batch_size, self.crop_size = batch_size, crop_size
        self.unlabeled_batch_size = batch_size if unlabeled_batch_size is None else unlabeled_batch_size
        self.eval_batch_size, self.num_workers = eval_batch_size, num_workers
        self.multiprocessing_context = multiprocessing_context
        self.skipped, policy = SkippedImages(), bad_image_policy(on_bad_image)
        self._skips = on_bad_image == "skip"
        if min(self.batch_size, self.unlabeled_batch_size, eval_batch_size) < 1 or (num_workers or 0) < 0:
            raise UserError(
                f"expected batch sizes of at least 1 and workers of at least 0, but got {batch_size} labeled, "
                f"{self.unlabeled_batch_size} unlabeled, {eval_batch_size} for evaluation, {num_workers} workers"
            )
        if self.method.uses_unlabeled and not data.unlabeled:
            raise UserError(
                f"expected unlabeled images beside the {len(data.labeled.names)} labeled ones, but there are none; "
                "label fewer (dataset.labeled), add images without mask, or use method=supervised"
            )
        weak = WeakView(crop_size, (scale[0], scale[1]), ignore_index=data.ignore_index)
        num_classes = len(data.class_names)
        self._labeled = LabeledDataset(data.train, data.labeled_indices, num_classes, weak, seed, policy)
        self._unlabeled = UnlabeledDataset(
            data.train,
            data.unlabeled,
            weak,
            StrongView(strong, data.in_chans, data.bit_depth),
            CutMix(**{key: _pair(value) for key, value in self.method.cutmix.items()}),
            len(self.method.strong_weights),
            self.method.partner == "same_image",
            seed,
            policy,
        )
        self._checked = self._cached = False
        self.cache = cache
        self._resume = (0, 0)  # epoch and batch to go on with

    def __repr__(self) -> str:
        """Say what it is for, and how many images it has."""
        data = self.data
        return (
            f"{type(self).__name__}(method={self.method.name!r}, crop_size={self.crop_size}, "
            f"batch_size={self.batch_size}, unlabeled_batch_size={self.unlabeled_batch_size}; "
            f"{len(data.labeled.names)} labeled, {len(data.unlabeled)} unlabeled, {len(data.val)} validation and "
            f"{len(data.test or ())} test images)"
        )

    __str__ = __repr__  # Lightning's own asks loaders for their lengths, and fails at two in one

    @property
    def images_per_step(self) -> int:
        """Images in a batch, labeled and unlabeled, a device."""
        return self.batch_size + self.unlabeled_batch_size

    def steps_per_epoch(self, world_size: int = 1) -> int:
        """Return the number of batches in an epoch."""
        labeled = math.ceil(len(self._labeled) / (self.batch_size * world_size))
        unlabeled = math.ceil(len(self._unlabeled) / (self.unlabeled_batch_size * world_size))
        return max(labeled, unlabeled)

    def check_world_size(self, world_size: int) -> None:
        """Refuse more processes than there are images to evaluate: one without a batch keeps the others waiting.

        Args:
            world_size: Number of processes.

        Raises:
            UserError: If there are fewer validation or test images.
        """
        for name, source in (("validation", self.data.val), ("test", self.data.test)):
            if source:
                check_share(name, source, world_size)

    def prepare_data(self) -> None:
        """Validate the files with `validation.validate_dataset` and build the cache, once per machine."""
        if self._checked:
            return
        sizes = validate_dataset(self.data, self.crop_size, self._skips)
        if self.eval_batch_size > 1 and len(sizes) > 1:
            raise UserError(
                f"expected evaluation images of one size for loader.eval_batch_size={self.eval_batch_size}, "
                f"but got {len(sizes)} sizes; use loader.eval_batch_size=1"
            )
        if self.cache is not None:
            fill_cache(self.data, Path(self.cache), self.method.uses_unlabeled, self._skips)
        self._checked = True

    def setup(self, stage: str) -> None:
        """Open the cache, in every process."""
        if self.cache is not None and not self._cached:
            self.data = with_cache(self.data, Path(self.cache))
            self._labeled.source = self._unlabeled.source = self.data.train
            self._cached = True

    def train_dataloader(self) -> CombinedLoader:
        """Return the paired loader; the first epoch after a resume starts where the run stopped."""
        (epoch, batch), self._resume = self._resume, (0, 0)
        if not self.method.uses_unlabeled:
            sizes: dict[str, tuple[LabeledDataset | UnlabeledDataset, int]]
            sizes = {"labeled": (self._labeled, self.images_per_step)}
        else:
            sizes = {
                "labeled": (self._labeled, self.batch_size),
                "unlabeled": (self._unlabeled, self.unlabeled_batch_size),
            }
        workers = self._workers(len(sizes))
        loaders = {
            name: self._stream(dataset, size, name, epoch, batch, workers[name])
            for name, (dataset, size) in sizes.items()
        }
        return CombinedLoader(loaders, "min_size")

    def val_dataloader(self) -> DataLoader[Any]:
        """Return whole validation images, each exactly once over all ranks."""
        return self._whole("validation", self.data.val)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return whole test images, or the validation images where there are no others."""
        return self._whole("test", self.data.test or self.data.val)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Take note of the images that were left out on the way to a training batch."""
        return {name: self.skipped.take(part) if isinstance(part, dict) else part for name, part in batch.items()}

    def state_dict(self) -> dict[str, int]:
        """Return how far the training stream has been read (saved in every checkpoint); nothing if it was not."""
        loop: Any = self.trainer.fit_loop  # type: ignore[union-attr]
        if math.isinf(loop.max_batches):  # as after trainer.validate alone
            return {}
        return {
            # Not "processed", which is raised before the checkpoint of a finished epoch is written.
            "epoch": loop.epoch_progress.current.ready - 1,
            "batch": loop.epoch_loop.batch_progress.current.ready,
            "batches": int(loop.max_batches),
        }

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on where the checkpoint was written. Lightning calls this before it asks for loaders."""
        if not state_dict:
            return
        epoch, batch = state_dict["epoch"], state_dict["batch"]
        self._resume = (epoch + 1, 0) if batch >= state_dict["batches"] else (epoch, batch)

    def _stream(
        self,
        dataset: LabeledDataset | UnlabeledDataset,
        batch_size: int,
        name: str,
        epoch: int,
        batch: int,
        workers: int,
    ) -> DataLoader[Any]:
        rank, world_size = self._place()
        num_samples = self.steps_per_epoch(world_size or current_place()[1]) * batch_size
        sampler = StreamSampler(len(dataset), num_samples, rank, world_size, seed=_stream_seed(self.seed, name))
        sampler.set_epoch(epoch)
        sampler.start = batch * batch_size
        return self._loader(dataset, batch_size, sampler, workers, drop_last=True, collate_fn=collate)

    def _whole(self, name: str, source: ImageSource) -> DataLoader[Any]:
        rank, world_size = self._place()
        check_share(name, source, world_size or current_place()[1])
        sampler = ShardSampler(len(source), rank, world_size)
        workers = self._workers(1)["labeled"]
        dataset = EvalDataset(source, len(self.data.class_names), self.data.ignore_index)
        return self._loader(dataset, self.eval_batch_size, sampler, workers)

    def _loader(
        self, dataset: Dataset[Any], batch_size: int, sampler: Sampler[Any], workers: int, **options: Any
    ) -> DataLoader[Any]:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return build_loader(
            dataset, batch_size, sampler, workers, self.multiprocessing_context, pinned=on_gpu, **options
        )

    def _place(self) -> tuple[int, int] | tuple[None, None]:
        return (None, None) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _workers(self, loaders: int) -> dict[str, int]:
        """Return how many workers each loader gets."""
        processes = 1 if self.trainer is None else self.trainer.num_devices  # on this machine
        total = free_workers(processes) if self.num_workers is None else self.num_workers
        return share_workers(total, loaders)


def _stream_seed(seed: int, name: str) -> int:
    return 2 * seed + (name == "unlabeled")


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, Sequence) else value
