"""How Lightning writes and reads checkpoints: whole or not at all, and plain data only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from mlpmatch_pl.checkpoint_files import write_checkpoint


class DurableCheckpointIO(TorchCheckpointIO):
    """A plugin for the Trainer: ``Trainer(plugins=[DurableCheckpointIO()])``.

    Files are written as `mlpmatch_pl.checkpoint_files.write_checkpoint` does, and never unpickled into code.

    Attributes:
        adapt: What to change in a checkpoint after it has been read, by its path; nothing if left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.adapt: dict[str, Callable[[dict[str, Any]], None]] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; a full disk is a UserError and leaves the file before."""
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint with ``weights_only=True``, whatever is asked for."""
        content = super().load_checkpoint(path, map_location, weights_only=True)
        if str(path) in self.adapt:
            self.adapt[str(path)](content)
        return content
