"""A plain training step of UniMatch and MLPMatch with the authors' passes, timed by benchmarks/step.py.

Written from docs/method.md, independently of `mlpmatch_pl.methods`; only the network is shared, so that the weights
are the same. Like the authors' code, it has float32 images from the loader, a separate pass in eval mode over the
CutMix partners, boolean indexing, unused feature-perturbed predictions for the labeled images, a full pass with the
deactivated network, a whole softmax for the confidence, and denominators that synchronize with the device.

Letters: B images, C classes, D feature channels, H and W pixels.
"""

import random
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlpmatch_pl.segmentor import Segmentor

IGNORE = 255
STAGES = ("layer1", "layer2", "layer3", "layer4")
WEIGHTS = {  # of the unlabeled terms; the labeled ones have 1 - lambda and lambda
    "unimatch": {"s1": 0.25, "s2": 0.25, "fp": 0.5},
    "mlpmatch": {"s1": 0.25, "s2": 0.25, "fp": 0.25, "u_np": 0.25},
}


class ReferenceStep:
    """Compute the loss terms of a batch.

    Args:
        segmentor: The network, with a ResNet as encoder.
        method: ``unimatch`` or ``mlpmatch``.
        threshold: Minimum confidence of a pseudo-label.
        draw_blocks: Returns the blocks to deactivate; by default, each stage with probability 0.25.
        drop_channels: Feature perturbation of feature maps; by default, Dropout2d.
        labeled_loss: Loss for labeled images; by default, cross entropy.
    """

    def __init__(
        self,
        segmentor: Segmentor,
        method: str,
        threshold: float = 0.95,
        draw_blocks: Callable[[], frozenset[int]] | None = None,
        drop_channels: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None,
        labeled_loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.segmentor, self.method, self.threshold = segmentor, method, threshold
        self.draw_blocks = draw_blocks or self.draw_stages
        self.labeled_loss = labeled_loss or partial(F.cross_entropy, ignore_index=IGNORE)
        dropout = nn.Dropout2d(0.5)
        self.drop_channels = drop_channels or (lambda levels: tuple(dropout(level) for level in levels))

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the terms by name: x, s1, s2, fp, and for MLPMatch x_np and u_np."""
        partner_label, partner_confidence = self.label_partners(batch)
        for view in ("s1", "s2"):
            inside = batch[f"box_{view}"][:, None].expand(batch[view].shape) == 1
            batch[view][inside] = batch[f"partner_{view}"][inside]

        num_labeled, num_unlabeled = len(batch["x"]), len(batch["u"])
        images = torch.cat([batch["x"], batch["u"]])
        levels = self.segmentor.encoder(images).levels
        both = tuple(torch.cat(pair) for pair in zip(levels, self.drop_channels(levels), strict=True))
        plain, dropped = self.decode(both, images).chunk(2)
        x, u = plain.split([num_labeled, num_unlabeled])
        fp = dropped[num_labeled:]
        s1, s2 = self.predict(torch.cat([batch["s1"], batch["s2"]])).chunk(2)

        u = u.detach()
        label, confidence, ignore = u.argmax(dim=1), u.softmax(dim=1).max(dim=1)[0], batch["ignore"]
        terms = {"x": self.labeled_loss(x, batch["mask"])}
        for view, logits in (("s1", s1), ("s2", s2)):
            mixed = [label.clone(), confidence.clone(), ignore.clone()]
            inside = batch[f"box_{view}"] == 1
            for own, pasted in zip(mixed, (partner_label, partner_confidence, batch["partner_ignore"]), strict=True):
                own[inside] = pasted[inside]
            terms[view] = self.unlabeled_term(logits, *mixed)
        terms["fp"] = self.unlabeled_term(fp, label, confidence, ignore)
        if self.method == "mlpmatch":
            levels = self.encode_deactivated(images, self.draw_blocks())
            x_np, u_np = self.decode(levels, images).split([num_labeled, num_unlabeled])
            terms["x_np"] = self.labeled_loss(x_np, batch["mask"])
            terms["u_np"] = self.unlabeled_term(u_np, label, confidence, ignore)
        return terms

    def total(self, terms: Mapping[str, Tensor], lambda_np: float) -> Tensor:
        """Sum the weighted terms: ``1/2 [(1 - lambda) Lx + lambda Lx_np + sum of the weighted unlabeled terms]``."""
        loss = terms["x"]
        if self.method == "mlpmatch":
            loss = (1 - lambda_np) * terms["x"] + lambda_np * terms["x_np"]
        for name, weight in WEIGHTS[self.method].items():
            loss = loss + weight * terms[name]
        return loss / 2

    def label_partners(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Predict labels and confidences of the partners in eval mode, without gradient."""
        with torch.no_grad():
            self.segmentor.eval()
            logits = self.predict(batch["partner_u"])
            confidence, label = logits.softmax(dim=1).max(dim=1)[0], logits.argmax(dim=1)
        self.segmentor.train()
        return label, confidence

    def unlabeled_term(self, logits_BCHW: Tensor, label: Tensor, confidence: Tensor, ignore: Tensor) -> Tensor:
        """Sum the cross entropy of confident pixels and divide by the number of pixels that are not padding."""
        loss = F.cross_entropy(logits_BCHW, label, reduction="none")
        loss = loss * ((confidence >= self.threshold) & (ignore != IGNORE))
        return loss.sum() / (ignore != IGNORE).sum().item()

    def predict(self, images: Tensor) -> Tensor:
        return self.decode(self.segmentor.encoder(images).levels, images)

    def decode(self, levels: tuple[Tensor, ...], images: Tensor) -> Tensor:
        """Run the layers of the decoder one by one, each convolution with its whole kernel."""
        decoder, (low, high) = self.segmentor.decoder, levels
        branches = [convolve(branch, high) for branch in decoder.aspp.branches]
        pooled = convolve(decoder.aspp.pooling, high.mean((2, 3), keepdim=True))
        branches.append(F.interpolate(pooled, size=high.shape[2:], mode="bilinear", align_corners=True))
        high = decoder.aspp.project(torch.cat(branches, dim=1))
        high = F.interpolate(high, size=low.shape[2:], mode="bilinear", align_corners=True)
        logits = decoder.classifier(decoder.fuse(torch.cat([decoder.reduce(low), high], dim=1)))
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=True)

    def draw_stages(self, rng: Any = random) -> frozenset[int]:
        """Deactivate each of the four stages with probability 0.25."""
        drawn, first = set(), 0
        for stage in STAGES:
            blocks = len(self.segmentor.encoder.model.get_submodule(stage))
            if rng.random() < 0.25:
                drawn |= set(range(first, first + blocks))
            first += blocks
        return frozenset(drawn)

    def encode_deactivated(self, images: Tensor, deactivated: frozenset[int]) -> tuple[Tensor, ...]:
        """Run the whole encoder; a deactivated block returns ``relu(shortcut)``."""
        model = self.segmentor.encoder.model
        x = model.maxpool(model.act1(model.bn1(model.conv1(images))))
        levels, index = {}, 0
        for stage in STAGES:
            for block in model.get_submodule(stage):
                shortcut = block.downsample or nn.Identity()
                x = F.relu(shortcut(x)) if index in deactivated else block(x)
                index += 1
            levels[stage] = x
        return levels["layer1"], levels["layer4"]


def convolve(layers: nn.Sequential, x: Tensor) -> Tensor:
    convolution, norm, activation = layers
    x = F.conv2d(x, convolution.weight, padding=convolution.padding, dilation=convolution.dilation)
    return activation(norm(x))


def reference_batch(labeled: Mapping[str, Any], unlabeled: Mapping[str, Any], segmentor: Segmentor) -> dict[str, Any]:
    """Convert a batch of this package to that of the authors' loader: normalized float tensors."""

    def normalized(images: Tensor) -> Tensor:
        return (images.to(segmentor.mean_C11.dtype) - segmentor.mean_C11) / segmentor.std_C11

    def padding(valid_BHW: Tensor) -> Tensor:
        return torch.zeros_like(valid_BHW, dtype=torch.long).masked_fill(~valid_BHW, IGNORE)

    partner = unlabeled["partner"]
    batch = {
        "x": normalized(labeled["image"]),
        "mask": labeled["mask"].long(),
        "u": normalized(unlabeled["weak"]),
        "ignore": padding(unlabeled["valid"]),
        "partner_u": normalized(partner["weak"]),
        "partner_ignore": padding(partner["valid"]),
    }
    for view, name in enumerate(("s1", "s2")):
        batch[name] = normalized(unlabeled["strong"][:, view])
        batch[f"partner_{name}"] = normalized(partner["strong"][:, view])
        batch[f"box_{name}"] = torch.zeros_like(unlabeled["valid"], dtype=torch.float32)
        for image, (y0, x0, y1, x1) in enumerate(unlabeled["boxes"][:, view].tolist()):
            batch[f"box_{name}"][image, y0:y1, x0:x1] = 1
    return batch
