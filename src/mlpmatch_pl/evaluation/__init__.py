"""The confusion matrix, the metrics derived from it, boundary IoU, and inference at the image's size."""

from mlpmatch_pl.evaluation.confusion import ConfusionMatrix, Scores, confusion_matrix
from mlpmatch_pl.evaluation.sliding_window import SlidingWindowInference, confidence_and_class, predict_logits

__all__ = [
    "ConfusionMatrix", "Scores", "SlidingWindowInference", "confidence_and_class", "confusion_matrix", "predict_logits",
]  # fmt: skip
