"""Feature perturbation: channel dropout on the decoder's inputs, in a stream of its own or in the strong views."""

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
        self.p, self.seed = _checked(p), seed

    def __call__(self, features: tuple[Tensor, ...], step: int) -> tuple[Tensor, ...]:
        """Drop channels of each feature map (B, D, H, W), independently."""
        generator = _generator(features[0].device, self.seed, "feature", step)
        return tuple(self._drop(feature_BDHW, generator) for feature_BDHW in features)

    def _drop(self, feature_BDHW: Tensor, generator: torch.Generator) -> Tensor:
        keep_BD11 = feature_BDHW.new_empty(*feature_BDHW.shape[:2], 1, 1).bernoulli_(1 - self.p, generator=generator)
        return feature_BDHW * keep_BD11.div_(1 - self.p)


class StrongDropout:
    """Drops feature channels inside the strong views, except of half of the images (UniMatch V2, arXiv 2410.10777).

    Maps with the same number of channels, as those of a transformer, share their draw. The draw is a function of
    (seed, step, rank), as that of `FeaturePerturbation`.

    Args:
        complementary: Whether a channel that is dropped in one of the two views is kept in the other, which needs
            ``p=0.5``. Otherwise the views' draws are independent.
        p: Probability of dropping a channel, in [0, 1).
        seed: Seed of all random draws.

    Raises:
        UserError: If p is outside [0, 1).

    Example:
        >>> dropout, features = StrongDropout(), (torch.ones(4, 6, 2, 2),)  # of two images, the first views first
        >>> (dropped,) = dropout(features, step=0)
        >>> torch.equal(dropped[:2] + dropped[2:], torch.full((2, 6, 2, 2), 2.0))
        True
    """

    def __init__(self, complementary: bool = True, p: float = 0.5, seed: int = 0) -> None:
        self.complementary, self.p, self.seed = complementary, _checked(p), seed

    def __call__(self, features: tuple[Tensor, ...], step: int, views: int = 2) -> tuple[Tensor, ...]:
        """Drop channels of each feature map, (views * B, D, H, W)."""
        batch, generator = len(features[0]) // views, _generator(features[0].device, self.seed, "strong", step)
        whole_B1 = torch.randperm(batch, generator=generator, device=generator.device)[:, None] < batch // 2
        factors = {}
        for width in dict.fromkeys(level.shape[1] for level in features):
            drawn = 1 if self.complementary else views
            keep_VBD = features[0].new_empty(drawn, batch, width).bernoulli_(1 - self.p, generator=generator)
            if self.complementary:
                keep_VBD = torch.cat([keep_VBD, 1 - keep_VBD])
            factors[width] = torch.where(whole_B1, 1.0, keep_VBD / (1 - self.p)).flatten(0, 1)[:, :, None, None]
        return tuple(level * factors[level.shape[1]] for level in features)


def _checked(p: float) -> float:
    if not 0 <= p < 1:
        raise UserError(f"expected a feature dropout of at least 0 and less than 1, but got {p}")
    return p


def _generator(device: torch.device, seed: int, purpose: str, step: int) -> torch.Generator:
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return torch.Generator(device).manual_seed(derive_seed(seed, purpose, step, rank))
