"""Networks in folders of weights, configuration and model card, as the Hugging Face Hub keeps them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Self, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
from safetensors.torch import load_file, save_file

from mlpmatch_pl.utils.errors import UserError

WEIGHTS, CONFIG = "model.safetensors", "config.json"
STUDENT, TEACHER = "segmentor.", "teacher.network."


class HubMixin(ModelHubMixin):
    """Adds ``save_pretrained``, ``push_to_hub`` and ``from_pretrained`` to a LightningModule of plain arguments.

    The folder holds ``model.safetensors``, ``config.json`` with the module's hyperparameters, and the model card
    ``README.md``. Nothing in it is executed.
    """

    def _save_pretrained(self, save_directory: Path) -> None:
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}  # type: ignore[attr-defined]
        save_file(state, save_directory / WEIGHTS)
        (save_directory / WEIGHTS).chmod(0o644)  # save_file makes it readable for the owner only
        arguments = json.dumps(dict(self.hparams), indent=2)  # type: ignore[attr-defined]
        (save_directory / CONFIG).write_text(arguments + "\n", encoding="utf-8")

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **model_kwargs: Any,
    ) -> Self:
        folder = Path(model_id)
        if not folder.is_dir():
            options: dict[str, Any] = {"cache_dir": cache_dir, "force_download": force_download, "token": token}
            options |= {"revision": revision, "local_files_only": local_files_only}
            hf_hub_download(model_id, CONFIG, **options)
            folder = Path(hf_hub_download(model_id, WEIGHTS, **options)).parent
        content = read_folder(folder)
        module: Any = cls(**content["hyper_parameters"] | model_kwargs)
        state = content["state_dict"]
        if module.teacher is not None and not any(name.startswith(TEACHER) for name in state):  # starts as the student
            state |= {TEACHER + name.removeprefix(STUDENT): value for name, value in state.items()}
        module.load_state_dict(state)
        return cast(Self, module.eval())

    def generate_model_card(
        self,
        *,
        data: str | None = None,
        split: str | None = None,
        unlabeled: int | None = None,
        scores: Mapping[str, float] | None = None,
        splits: Mapping[str, str] | None = None,
        license: str | None = None,
        pictures: Sequence[str] = (),
        run: Mapping[str, Any] | None = None,
    ) -> ModelCard:
        """Describe the network for people and for the Hub.

        Args:
            data: Name of the dataset.
            split: The labeled images, with the hash of their list.
            unlabeled: Number of unlabeled images.
            scores: Metrics by name, fractions: ``val/miou``, ``test/miou``, ``test/iou/<class>``.
            splits: The images that were scored, with the hash of their list, by ``val`` and ``test``.
            license: License of the weights, as the Hub names licenses.
            pictures: Names of image files in the folder.
            run: Further facts about the training by name.
        """
        hparams, scores = self.hparams, dict(scores or {})  # type: ignore[attr-defined]
        result = partial(EvalResult, "image-segmentation", data or "unknown", data or "unknown", "mean_iou")
        parts = {"validation": "val/miou", "test": "test/miou"}
        results = [result(scores[key], dataset_split=part) for part, key in parts.items() if key in scores]
        card_data = ModelCardData(
            library_name="mlpmatch_pl", pipeline_tag="image-segmentation", license=license,
            tags=["semantic-segmentation", "semi-supervised-learning", "mlpmatch"],
            model_name=f"{hparams['backbone']} for {data or 'semantic segmentation'}", eval_results=results or None,
        )  # fmt: skip
        template = files("mlpmatch_pl.utils").joinpath("model_card.jinja").read_text(encoding="utf-8")
        card: ModelCard = ModelCard.from_template(
            card_data, template_str=template, title=card_data.model_name, hparams=dict(hparams),
            classes=self.class_names, data=data, split=split, unlabeled=unlabeled, scores=scores,  # type: ignore[attr-defined]
            splits=dict(splits or {}), weights_license=license, pictures=list(pictures), run=dict(run or {}),
            pseudo_labels=self.method.uses_unlabeled and unlabeled != 0,  # type: ignore[attr-defined]
        )  # fmt: skip
        return card


def read_folder(folder: Path) -> dict[str, Any]:
    """Read such a folder as `mlpmatch_pl.utils.checkpoint.read_checkpoint` reads a checkpoint.

    Returns:
        ``hyper_parameters`` and ``state_dict``.

    Raises:
        UserError: If a file is missing or damaged.
    """
    try:
        arguments = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return {"hyper_parameters": dict(arguments), "state_dict": load_file(folder / WEIGHTS)}
    except Exception as error:  # a damaged file makes safetensors raise errors of its own
        raise UserError(
            f"expected a folder with {CONFIG} and {WEIGHTS}, as format=hub writes it, but {folder} cannot be read as "
            f"one ({type(error).__name__}); name a checkpoint file, or export one with format=hub"
        ) from error
