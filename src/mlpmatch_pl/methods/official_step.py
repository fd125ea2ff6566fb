"""The training step with the authors' separate passes."""

import torch
from torch import Tensor

from mlpmatch_pl.methods.step import MultiLevelStep, StrongPass, WeakPass
from mlpmatch_pl.segmentor import Features


class OfficialStep(MultiLevelStep):
    """The authors' separate passes, for the preset ``mlpmatch_official``.

    Computes the same terms as `MultiLevelStep`, but features of the labeled images are perturbed too (their
    predictions are discarded, but contribute to the decoder's BatchNorm), and the deactivated network runs a full pass.
    """

    def weak_pass(self, labeled_B3HW: Tensor, unlabeled_B3HW: Tensor, step: int) -> WeakPass:
        """Predict the labeled and unlabeled weak views, plain and with dropped feature channels."""
        features = self.segmentor.encode(torch.cat([labeled_B3HW, unlabeled_B3HW]))
        dropped = [Features(drop(features.levels, step)) for drop in self.feature_perturbations.values()]
        logits = self.segmentor.decode(Features.cat([features, *dropped]), labeled_B3HW.shape[2:])
        x, u, *rest = torch.split(logits, [len(labeled_B3HW), len(unlabeled_B3HW)] * (1 + len(dropped)))
        return WeakPass(x, u, dict(zip(self.feature_perturbations, rest[1::2], strict=True)), {})

    def network_pass(
        self, labeled_B3HW: Tensor, unlabeled_B3HW: Tensor, weak: WeakPass, strong: StrongPass, step: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run a full pass of the deactivated network, after the strong views."""
        images, x_logits, u_logits = torch.cat([labeled_B3HW, unlabeled_B3HW]), {}, {}
        for name, perturbation in self.network_perturbations.items():
            deactivated = perturbation.draw(self.segmentor.encoder.stages, step)
            with self.perturbed_context():
                features = self.segmentor.encode(images, deactivated)
            x_logits[f"x_{name}"], u_logits[f"u_{name}"] = self._decode_pair(features, labeled_B3HW)
        return x_logits, u_logits
