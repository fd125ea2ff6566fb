"""Choose the step of a method."""

from mlpmatch_pl.methods.losses import Criterion
from mlpmatch_pl.methods.method import Method, resolve_method
from mlpmatch_pl.methods.official_step import OfficialStep
from mlpmatch_pl.methods.step import BurnInStep, MultiLevelStep, SupervisedStep
from mlpmatch_pl.methods.teacher import Teacher
from mlpmatch_pl.segmentor import Segmentor

Step = SupervisedStep | MultiLevelStep | BurnInStep


def build_step(
    segmentor: Segmentor,
    criterion: Criterion,
    method: Method,
    threshold: float,
    seed: int,
    teacher: Teacher | None = None,
) -> Step:
    """Return the training step of a method; see `MultiLevelStep` for the arguments."""
    if not method.uses_unlabeled:
        return SupervisedStep(segmentor, criterion, method)
    labeling = teacher if method.pseudo_labels == "teacher" else None
    step = OfficialStep if method.passes == "official" else MultiLevelStep
    main = step(segmentor, criterion, method, threshold, seed, labeling)
    if not method.burn_in:
        return main
    return BurnInStep(SupervisedStep(segmentor, criterion, resolve_method("supervised")), main)
