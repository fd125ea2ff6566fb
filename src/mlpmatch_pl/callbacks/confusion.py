"""The confusion matrix of every validation and of the test, as a picture."""

from pathlib import Path

from lightning.pytorch import Callback, Trainer

from mlpmatch_pl.callbacks.showing import show
from mlpmatch_pl.confusion_picture import confusion_picture
from mlpmatch_pl.module import MLPMatch


class ConfusionPictures(Callback):
    """Draws the confusion matrix of the last validation and of the test, and shows each in W&B and TensorBoard.

    The first process writes ``confusion_val.png`` anew after every validation while training, and
    ``confusion_test.png`` after the test.

    Args:
        dirpath: Folder to write to.
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = Path(dirpath)

    def on_validation_end(self, trainer: Trainer, pl_module: MLPMatch) -> None:  # type: ignore[override]
        """Draw the validation's matrix while training."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._draw(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: MLPMatch) -> None:  # type: ignore[override]
        """Draw the test's matrix."""
        self._draw(trainer, pl_module, "test")

    def _draw(self, trainer: Trainer, module: MLPMatch, part: str) -> None:
        if trainer.is_global_zero:
            picture = confusion_picture(module.last_counts_CC.numpy(), module.class_names)
            self.dirpath.mkdir(parents=True, exist_ok=True)
            picture.save(self.dirpath / f"confusion_{part}.png")
            show(trainer, f"{part}/confusion", picture)
