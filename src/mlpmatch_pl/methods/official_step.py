"""The training step with the authors' passes one by one."""

from collections.abc import Mapping

import torch
from torch import Tensor

from mlpmatch_pl.methods.step import MultiLevelStep, WeakPass
from mlpmatch_pl.segmentor import Features


class OfficialStep(MultiLevelStep):
    """The authors' passes one by one, for the faithful preset.

    The same terms as `MultiLevelStep`, but the feature-perturbed half holds the labeled images too (their
    predictions are thrown away, yet enter the decoder's BatchNorm), and the deactivated network runs a full pass.
    """

    def weak_pass(self, images_B3HW: Tensor, sizes: list[int], step: int) -> WeakPass:
        """Predict the weak views, plain and with dropped feature channels, both for labeled and unlabeled images."""
        features = self.segmentor.encode(images_B3HW)
        dropped = [Features(drop(features.levels, step)) for drop in self.feature_perturbations.values()]
        logits = self.segmentor.decode(Features.cat([features, *dropped]), images_B3HW.shape[2:])
        x, u, *rest = torch.split(logits, sizes * (1 + len(dropped)))
        return WeakPass(x, u, dict(zip(self.feature_perturbations, rest[1::2], strict=True)), {})

    def network_pass(
        self, images_B3HW: Tensor, sizes: list[int], perturbed: Mapping[str, Features], step: int
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Run the deactivated network in full, after the strong views."""
        pairs = {}
        for name, perturbation in self.network_perturbations.items():
            deactivated = perturbation.draw(self.segmentor.encoder.stages, step)
            with self.perturbed_context():
                features = self.segmentor.encode(images_B3HW, deactivated)
                pairs[name] = self._decode_pair(features, images_B3HW, sizes)
        return pairs
