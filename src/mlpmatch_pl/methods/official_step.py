"""The training step with the authors' separate passes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mlpmatch_pl.methods.step import MultiLevelStep, WeakPass
from mlpmatch_pl.segmentor import Features


class OfficialStep(MultiLevelStep):
    """The authors' separate passes, for the preset ``mlpmatch_official``.

    Computes the same terms as `MultiLevelStep`, but features of the labeled images are perturbed too (their
    predictions are discarded, but contribute to the decoder's BatchNorm), and the deactivated network runs a full pass.
    """

    def weak_pass(self, images_B3HW: Tensor, sizes: list[int], step: int) -> WeakPass:
        """Predict the labeled and unlabeled weak views, plain and with dropped feature channels."""
        features = self.segmentor.encode(images_B3HW)
        dropped = [Features(drop(features.levels, step)) for drop in self.feature_perturbations.values()]
        logits = self.segmentor.decode(Features.cat([features, *dropped]), images_B3HW.shape[2:])
        x, u, *rest = torch.split(logits, sizes * (1 + len(dropped)))
        return WeakPass(x, u, dict(zip(self.feature_perturbations, rest[1::2], strict=True)), {})

    def network_pass(
        self, images_B3HW: Tensor, sizes: list[int], perturbed: Mapping[str, Features], step: int
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Run a full pass of the deactivated network, after the strong views."""
        pairs = {}
        for name, perturbation in self.network_perturbations.items():
            deactivated = perturbation.draw(self.segmentor.encoder.stages, step)
            with self.perturbed_context():
                features = self.segmentor.encode(images_B3HW, deactivated)
                pairs[name] = self._decode_pair(features, images_B3HW, sizes)
        return pairs
