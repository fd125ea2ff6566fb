"""The training step with all perturbations of unlabeled images in one stream."""

from torch import Tensor

from mlpmatch_pl.methods.losses import Criterion
from mlpmatch_pl.methods.method import Method
from mlpmatch_pl.methods.partner import Batch
from mlpmatch_pl.methods.pseudo_labels import PseudoLabels
from mlpmatch_pl.methods.step import MultiLevelStep, StepResult, mix_views
from mlpmatch_pl.methods.teacher import Teacher
from mlpmatch_pl.perturbation.network import Unit, block_of
from mlpmatch_pl.segmentor import Segmentor


class StreamStep(MultiLevelStep):
    """Deactivates blocks in the strong views instead of in a pass of their own.

    The teacher labels the weak views, so the student's weak pass has labeled images only. The volatile term, if its
    weight is above 0, forks from it as usual. See `MultiLevelStep` for the arguments.
    """

    def __init__(
        self, segmentor: Segmentor, criterion: Criterion, method: Method, threshold: float, seed: int, teacher: Teacher
    ) -> None:
        super().__init__(segmentor, criterion, method, threshold, seed, teacher)
        self.labels = teacher
        if not method.lambda_max:
            self.forks = {}

    def __call__(self, labeled: Batch, unlabeled: Batch, step: int) -> StepResult:
        """Return ``x``, the terms of the strong views and, with volatile learning, ``x_np``; see `MultiLevelStep`."""
        self.validate_batch(labeled, unlabeled)
        size = labeled["image"].shape[2:]
        features, perturbed = self.encode_forked(labeled["image"], step)
        labeled_logits = {"x": self.segmentor.decode(features, size)}
        with self.perturbed_context():
            labeled_logits |= {f"x_{name}": self.segmentor.decode(part, size) for name, part in perturbed.items()}
        pseudo = PseudoLabels.from_logits(self.labels(unlabeled["weak"]), unlabeled["valid"])
        strong_images, targets = mix_views(unlabeled, pseudo, self.partner(unlabeled, step))
        strong_logits = self.strong_pass(strong_images, step)
        terms = {name: self.criterion(logits, labeled["mask"]) for name, logits in labeled_logits.items()}
        return StepResult(terms | self.strong_terms(strong_logits, targets), pseudo)

    def strong_pass(self, views: list[Tensor], step: int) -> list[Tensor]:
        """Predict each strong view with other blocks deactivated."""
        logits = []
        with self.perturbed_context():
            for number, images in enumerate(views):
                features = self.segmentor.encode(images, self._draw(step, number))
                logits.append(self.segmentor.decode(features, images.shape[2:]))
        return logits

    def deactivated_blocks(self, step: int) -> frozenset[int]:
        """Return the indices of the blocks that are deactivated in at least one strong view."""
        return frozenset(block_of(unit) for view in range(self.views) for unit in self._draw(step, view))

    def _draw(self, step: int, view: int) -> frozenset[Unit]:
        stages = self.segmentor.encoder.stages
        draws = [perturbation.draw(stages, step, view) for perturbation in self.network_perturbations.values()]
        return frozenset().union(*draws)
