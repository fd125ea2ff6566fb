"""Training batches of random images."""

from typing import Any

import torch


def make_batch(
    labeled: int = 2,
    unlabeled: int = 3,
    views: int = 2,
    size: tuple[int, int] = (33, 41),
    classes: int = 4,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, dict[str, Any]]:
    """Return a batch for any method with this number of strong views, partners included; 0 for labeled images only.

    Masks have ignored pixels, all but one unlabeled image have padding, and one view has no CutMix box.
    """
    rng = torch.Generator().manual_seed(seed)

    def images(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, (*shape, 3, *size), dtype=torch.uint8, generator=rng).to(device)

    valid_UHW = torch.ones(unlabeled, *size, dtype=torch.bool)
    for image in range(unlabeled):
        valid_UHW[image, size[0] - 8 * image :] = False
        valid_UHW[image, :, size[1] - 9 * image :] = False

    mask_BHW = torch.randint(0, classes, (labeled, *size), dtype=torch.uint8, generator=rng)
    mask_BHW[:, :5] = 255
    batch = {"image": images(labeled), "mask": mask_BHW.to(device), "index": torch.arange(labeled)}
    if not views:
        return {"labeled": batch}
    corners_UV2 = torch.randint(0, 15, (unlabeled, views, 2), generator=rng)
    boxes_UV4 = torch.cat([corners_UV2, corners_UV2 + torch.randint(4, 18, corners_UV2.shape, generator=rng)], dim=2)
    boxes_UV4[0, -1] = 0
    own, partner = (
        {"weak": images(unlabeled), "strong": images(unlabeled, views), "valid": valid.to(device)}
        for valid in (valid_UHW, valid_UHW.flip(0))
    )
    rest = {"boxes": boxes_UV4.to(device), "index": torch.arange(unlabeled), "partner": partner}
    return {"labeled": batch, "unlabeled": {**own, **rest}}
