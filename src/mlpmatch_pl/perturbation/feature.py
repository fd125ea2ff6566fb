"""Feature perturbation: channel dropout on the decoder's inputs."""

import torch
from torch import Tensor

from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.seeding import derive_seed


class FeaturePerturbation:
    """Drops whole feature channels and scales the others by ``1 / (1 - p)`` (UniMatch, p = 0.5).

    The draw is a function of (seed, step, rank), so a resumed run repeats it and ranks differ. It neither uses the
    global generator nor synchronizes with the device.

    Args:
        p: Probability of dropping a channel of an image, in [0, 1).
        seed: Seed of all random draws.

    Raises:
        UserError: If p is outside [0, 1).

    Example:
        >>> perturbation = FeaturePerturbation(p=0.5, seed=0)
        >>> low, high = perturbation((torch.ones(2, 4, 8, 8), torch.ones(2, 6, 2, 2)), step=0)
        >>> sorted(set(low.flatten().tolist()))
        [0.0, 2.0]
    """

    def __init__(self, p: float = 0.5, seed: int = 0) -> None:
        if not 0 <= p < 1:
            raise UserError(f"expected a feature dropout of at least 0 and less than 1, but got {p}")
        self.p = p
        self.seed = seed

    def __call__(self, features: tuple[Tensor, ...], step: int) -> tuple[Tensor, ...]:
        """Drop channels of each feature map (B, D, H, W), independently."""
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        generator = torch.Generator(features[0].device)
        generator.manual_seed(derive_seed(self.seed, "feature", step, rank))
        return tuple(self._drop(feature_BDHW, generator) for feature_BDHW in features)

    def _drop(self, feature_BDHW: Tensor, generator: torch.Generator) -> Tensor:
        keep_BD11 = feature_BDHW.new_empty(*feature_BDHW.shape[:2], 1, 1).bernoulli_(1 - self.p, generator=generator)
        return feature_BDHW * keep_BD11.div_(1 - self.p)
