"""Windows of TIFF files against the same part of the whole file."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from mlpmatch_pl.data.datasets.folder import folder
from mlpmatch_pl.data.readers import image as image_reader
from mlpmatch_pl.data.readers.image import ImageReader
from mlpmatch_pl.data.readers.mask import MaskReader
from mlpmatch_pl.data.readers.windows import Window, tiff_facts
from mlpmatch_pl.utils.errors import UserError

SIZE = (130, 101)
PARTS = [(0, 130, 0, 101), (13, 77, 40, 101), (64, 128, 32, 64), (129, 130, 0, 1)]
RGB, PLANES, PAGES = (*SIZE, 3), (5, *SIZE), (4, *SIZE)
LAYOUTS = {
    "strips": (RGB, {"photometric": "rgb", "compression": "zlib", "rowsperstrip": 7}),
    "one strip": (RGB, {"photometric": "rgb"}),
    "tiles": (RGB, {"photometric": "rgb", "tile": (32, 48), "compression": "zlib", "predictor": True}),
    "alpha": ((*SIZE, 4), {"photometric": "rgb", "tile": (32, 48), "extrasamples": ["unassalpha"]}),
    "planes": (PLANES, {"photometric": "minisblack", "tile": (32, 48), "planarconfig": "separate"}),
    "planes in strips": (PLANES, {"photometric": "minisblack", "rowsperstrip": 7, "planarconfig": "separate"}),
    "pages": (PAGES, {"photometric": "minisblack", "compression": "zlib"}),
    "gray as RGB": (SIZE, {"photometric": "minisblack", "tile": (32, 48)}),
    "white is zero": (SIZE, {"photometric": "miniswhite", "tile": (32, 48)}),
}


def windows():
    return [Window(slice(top, bottom), slice(left, right), SIZE) for top, bottom, left, right in PARTS]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_window_of_an_image_is_that_part_of_it(layout, dtype, tmp_path):
    shape, options = LAYOUTS[layout]
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", pixels, byteorder=">", **options)
    channels = {PLANES: 5, PAGES: 4}.get(shape, 3)
    reader = ImageReader(channels, 8 * np.dtype(dtype).itemsize)
    whole = reader(tmp_path / "a.tif")
    assert tiff_facts(tmp_path / "a.tif").size == whole.shape[:2] == SIZE
    for window in windows():
        np.testing.assert_array_equal(reader(tmp_path / "a.tif", window), whole[window.rows, window.columns])


@pytest.mark.parametrize("name", ["a.tif", "palette.tif", "a.png", "a.npy"])
def test_a_window_of_a_mask_is_that_part_of_it(name, tmp_path):
    mask = np.random.default_rng(0).integers(0, 3, SIZE).astype(np.uint8)
    reader = MaskReader({0: 0, 1: 1, 2: 255})
    if name.endswith(".tif"):
        colors = {"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)} if "palette" in name else {}
        tifffile.imwrite(tmp_path / name, mask, tile=(32, 48), compression="zlib", **colors)
    elif name.endswith(".npy"):
        np.save(tmp_path / name, mask)
    else:
        Image.fromarray(mask).save(tmp_path / name)
    expected = np.array([0, 1, 255], np.uint8)[mask]
    for window in windows():
        np.testing.assert_array_equal(reader(tmp_path / name, window), expected[window.rows, window.columns])
    with pytest.raises(UserError, match=rf"the image is 101 x 131 and .*{name} 101 x 130 pixels"):
        reader(tmp_path / name, windows()[0]._replace(size=(131, 101)))


def test_transparent_pixels_are_ignored_in_windows_too(tmp_path):
    pixels = np.full((*SIZE, 4), 255, np.uint8)
    pixels[20:70, 50:, 3] = 0
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    for name in ("a", "b"):
        tifffile.imwrite(tmp_path / f"images/{name}.tif", pixels, photometric="rgb", extrasamples=["unassalpha"])
        tifffile.imwrite(tmp_path / f"masks/{name}.tif", np.ones(SIZE, np.uint8))
    source = folder(str(tmp_path), ["a", "b"], val=1).val
    whole = source.mask(0)
    assert set(np.unique(whole)) == {1, 255}
    for window in windows():
        np.testing.assert_array_equal(source.mask(0, window), whole[window.rows, window.columns])


def test_the_limit_of_pixels_is_that_of_what_is_decoded_at_once(tmp_path, monkeypatch):
    pixels = np.zeros((*SIZE, 3), np.uint8)
    tifffile.imwrite(tmp_path / "tiles.tif", pixels, photometric="rgb", tile=(32, 48), compression="zlib")
    tifffile.imwrite(tmp_path / "strip.tif", pixels, photometric="rgb", rowsperstrip=130, compression="zlib")
    monkeypatch.setattr(image_reader, "MAX_PIXELS", 5000)
    reader, window = ImageReader(), windows()[2]
    with pytest.raises(UserError, match=r"5,000 pixels, but .*tiles.tif has more; evaluate and predict read windows"):
        reader(tmp_path / "tiles.tif")
    assert reader(tmp_path / "tiles.tif", window).shape == (64, 32, 3)
    with pytest.raises(UserError, match=r"but .*strip.tif has one strip of 101 x 130 pixels; save it with tiles"):
        reader(tmp_path / "strip.tif", window)


def test_files_that_cannot_be_read_in_windows_say_why(tmp_path):
    pixels, window = np.zeros((*SIZE, 3), np.uint8), windows()[0]
    tifffile.imwrite(tmp_path / "turned.tif", pixels, photometric="rgb", extratags=[(274, "H", 1, 6, True)])
    with pytest.raises(UserError, match=r"expected an upright file .* tag of .*turned.tif is 6"):
        ImageReader()(tmp_path / "turned.tif", window)
    tifffile.imwrite(tmp_path / "cmyk.tif", np.zeros((*SIZE, 4), np.uint8), photometric="separated")
    with pytest.raises(UserError, match=r"but .*cmyk.tif has other colors \(SEPARATED\); convert it"):
        ImageReader()(tmp_path / "cmyk.tif", window)
    (tmp_path / "broken.tif").write_bytes(b"II*\0")
    assert tiff_facts(tmp_path / "broken.tif") is None
