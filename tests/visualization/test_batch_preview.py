import numpy as np
import torch
from PIL import Image

from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.data.datasets.shapes import shapes
from mlpmatch_pl.methods.method import resolve_method
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.visualization.batch_preview import WIDTH, batch_preview
from mlpmatch_pl.visualization.panels import MARGIN, TITLE

SIZE = 56  # a quarter of a panel's width


def batch_of(method="mlpmatch"):
    data = shapes(labeled=4, train=12, val=1, test=1, size=64)
    loader = {"crop_size": SIZE, "batch_size": 3, "unlabeled_batch_size": 4, "num_workers": 0}
    spec = {"name": method, "cutmix": {"p": 1.0}}
    return data, next(iter(SemiSupervisedDataModule(data, method=spec, **loader).train_dataloader()))[0]


def panel(sheet, row, column):
    x, y = MARGIN + column * (WIDTH + MARGIN), row * (TITLE + WIDTH + MARGIN) + TITLE
    return np.asarray(sheet)[y : y + WIDTH, x : x + WIDTH]


def enlarged(image_CHW):
    picture = Image.fromarray(image_CHW.permute(1, 2, 0).numpy())
    return np.asarray(picture.resize((WIDTH, WIDTH), Image.Resampling.NEAREST))


def strong_images_of_a_step(batch, method):
    """Return the strong images that a training step passes to the network, for both views."""
    module = MLPMatch(6, method=method, backbone="test_resnet", output_stride=8, decoder={"channels": 8})
    seen, encode = [], module.segmentor.encode
    module.segmentor.encode = lambda images, *others: (seen.append(images.clone()), encode(images, *others))[1]
    module.step(batch["labeled"], batch["unlabeled"], 0)
    return next(images for images in reversed(seen) if len(images) == 2 * len(batch["unlabeled"]["weak"])).chunk(2)


def test_panels_are_the_views_that_the_step_passes_to_the_network():
    for partner, method in (("batch", "mlpmatch"), ("same_image", "mlpmatch_official")):
        data, batch = batch_of(method)
        sheet = batch_preview(batch, data, seed=0)
        mixed = strong_images_of_a_step(batch, {"name": method})
        assert resolve_method(method).partner == partner
        for number in range(4):
            row, unlabeled = 2 + number, batch["unlabeled"]
            views = [unlabeled["weak"][number]]
            for view in range(2):
                views += [unlabeled["strong"][number, view], mixed[view][number]]
            for column, image in enumerate(views):
                assert (panel(sheet, row, column) == enlarged(image)).all(), (partner, number, column)
            assert not torch.equal(views[1], views[2])  # a box was drawn for every image


def test_two_labeled_images_with_their_masks_fill_a_row():
    data, batch = batch_of()
    sheet = batch_preview(batch, data, seed=0)
    colors = np.array([*data.colors], np.uint8)
    for number in range(3):
        mask = batch["labeled"]["mask"][number].numpy()
        expected = np.where((mask == 255)[..., None], 255, colors[np.minimum(mask, 5)]).astype(np.uint8)
        row, column = number // 2, 3 * (number % 2)
        assert (panel(sheet, row, column) == enlarged(batch["labeled"]["image"][number])).all()
        assert (panel(sheet, row, column + 1) == enlarged(torch.from_numpy(expected).permute(2, 0, 1))).all()
