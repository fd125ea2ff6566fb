"""Choose the step of a method."""

from mlpmatch_pl.methods.method import Method
from mlpmatch_pl.methods.official_step import OfficialStep
from mlpmatch_pl.methods.step import Criterion, MultiLevelStep, SupervisedStep
from mlpmatch_pl.segmentor import Segmentor


def build_step(
    segmentor: Segmentor, criterion: Criterion, method: Method, threshold: float, seed: int
) -> SupervisedStep | MultiLevelStep:
    """Return the training step of a method; see `MultiLevelStep` for the arguments."""
    if not method.uses_unlabeled:
        return SupervisedStep(segmentor, criterion, method)
    step = {"forked": MultiLevelStep, "official": OfficialStep}[method.passes]
    return step(segmentor, criterion, method, threshold, seed)
