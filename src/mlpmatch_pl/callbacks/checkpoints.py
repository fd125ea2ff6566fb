"""The two checkpoints of a run: best.ckpt and last.ckpt."""

from lightning.pytorch.callbacks import ModelCheckpoint


def best_and_last(dirpath: str, monitor: str = "val/miou") -> list[ModelCheckpoint]:
    """Keep the best checkpoint by a metric, and the last one.

    Two callbacks, so that last.ckpt is written after every epoch, whether or not it was the best.

    Args:
        dirpath: Folder to write to.
        monitor: Metric to maximise.
    """
    best = ModelCheckpoint(
        dirpath=dirpath, filename="best", monitor=monitor, mode="max", save_top_k=1, enable_version_counter=False
    )
    last = ModelCheckpoint(
        dirpath=dirpath,
        filename="last",
        monitor=None,
        save_top_k=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    return [best, last]
