"""One confusion matrix, every metric derived from it, and inference at the image's size."""

from mlpmatch_pl.evaluation.confusion import ConfusionMatrix, Scores, confusion_matrix
from mlpmatch_pl.evaluation.sliding_window import confidence_and_class, predict_logits

__all__ = ["ConfusionMatrix", "Scores", "confidence_and_class", "confusion_matrix", "predict_logits"]
