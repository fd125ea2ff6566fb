import itertools
import pickle
import random
import re
import struct
import zlib
from importlib.util import find_spec

import cv2
import numpy as np
import pytest
import tifffile
from helpers import compose_train
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from mlpmatch_pl.data.readers.image import ImageReader
from mlpmatch_pl.data.readers.mask import MaskReader
from mlpmatch_pl.engine.schema import checked_target
from mlpmatch_pl.utils.errors import UserError

SHAPE = (13, 21)
PALETTE = ((0, 0, 0), (128, 0, 0), (0, 128, 0))


def noise(*shape, bits=8, most=None, seed=0):
    most = (1 << bits) - 1 if most is None else most
    return np.random.default_rng(seed).integers(0, most, shape, f"uint{bits}", endpoint=True)


@pytest.fixture
def save(tmp_path):
    """Write an array as a picture file by PIL, and return its path."""

    def save(name, pixels, **options):
        Image.fromarray(pixels).save(tmp_path / name, **options)
        return tmp_path / name

    return save


def sentence(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


# Images ---------------------------------------------------------------------------------------------------------------


def write_tiff(path, pixels, layout, **options):
    """Write (H, W, channels) interleaved, as planes, or a page for each channel."""
    gray = pixels.shape[2] == 1
    if layout == "interleaved" or gray:
        array = pixels[..., 0] if gray else pixels
        options |= {} if gray else {"planarconfig": "contig"}
    else:
        array = np.ascontiguousarray(pixels.transpose(2, 0, 1))
        options |= {"planarconfig": "separate"} if layout == "planar" else {}
    color = pixels.shape[2] in (3, 4) and layout != "pages"
    tifffile.imwrite(path, array, photometric="rgb" if color else "minisblack", **options)


@pytest.mark.parametrize("options", [{}, {"compression": "deflate"}, {"compression": "deflate", "predictor": 2}])
@pytest.mark.parametrize("layout", ["interleaved", "planar", "pages"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 12])
def test_tiff_files_of_every_layout_hold_the_pixels_that_were_written(tmp_path, channels, bits, layout, options):
    pixels = noise(*SHAPE, channels, bits=bits)
    write_tiff(tmp_path / "a.tif", pixels, layout, **options)
    image = ImageReader(channels, bits)(tmp_path / "a.tif")
    assert image.dtype == pixels.dtype
    assert image.flags.c_contiguous
    assert (image == pixels).all()


@pytest.mark.parametrize("layout", ["interleaved", "planar", "pages"])
@pytest.mark.parametrize("options", [{"tile": (16, 16)}, {"bigtiff": True}, {"byteorder": ">"}, {"metadata": None}])
def test_tiff_files_may_be_tiled_large_big_endian_or_plain(tmp_path, layout, options):
    pixels = noise(*SHAPE, 5, bits=16)
    write_tiff(tmp_path / "a.TIFF", pixels, layout, **options)
    image = ImageReader(5, 16)(tmp_path / "a.TIFF")
    assert image.dtype == np.uint16
    assert (image == pixels).all()


@pytest.mark.parametrize("height_width", [(1, 1), (1, 30), (30, 1), (3, 3), (5, 5), (4, 3)])
def test_channels_are_told_from_height_and_width_in_tiny_files(tmp_path, height_width):
    pixels = noise(*height_width, 5)
    for layout in ("interleaved", "planar"):
        write_tiff(tmp_path / "a.tif", pixels, layout)
        assert (ImageReader(5)(tmp_path / "a.tif") == pixels).all()


@pytest.mark.parametrize(("written", "channels"), [(1, 1), (1, 3), (3, 3)])
def test_tiff_files_with_lzw_are_read(save, written, channels):
    pixels = noise(*SHAPE, written)
    image = ImageReader(channels)(save("a.tif", pixels.squeeze(), compression="tiff_lzw"))
    assert image.shape == (*SHAPE, channels)
    assert (image == pixels).all()


@pytest.mark.parametrize("channels", [3, 4])
def test_tiff_files_with_lzw_and_alpha_are_never_read_wrongly(save, channels):
    pixels = noise(*SHAPE, 4)
    path = save("a.tif", pixels, compression="tiff_lzw")
    if find_spec("imagecodecs"):
        assert (ImageReader(channels)(path) == pixels[..., :channels]).all()
    else:
        assert "pip install imagecodecs" in sentence(ImageReader(channels), path)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_come_in_rgb_order_whatever_wrote_them(tmp_path, channels, bits, suffix):
    pixels = noise(*SHAPE, channels, bits=bits)
    path = tmp_path / f"a.{suffix}"
    options = [cv2.IMWRITE_TIFF_COMPRESSION, 1] if suffix == "tif" else []  # none; OpenCV's own choice is LZW
    cv2.imwrite(str(path), pixels if channels == 1 else pixels[..., [2, 1, 0, 3][:channels]], options)  # it takes BGR
    image = ImageReader(channels, bits)(path)
    assert (image.shape, image.dtype) == (pixels.shape, pixels.dtype)
    assert (image == pixels).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bits", [8, 16])
def test_three_channels_read_grey_as_rgb(tmp_path, bits, suffix):
    gray = noise(*SHAPE, bits=bits)
    Image.fromarray(gray).save(tmp_path / f"a.{suffix}")
    assert (ImageReader(3, bits)(tmp_path / f"a.{suffix}") == np.stack([gray] * 3, axis=2)).all()


@pytest.mark.parametrize(("suffix", "bits"), [("png", 8), ("png", 16), ("tif", 8), ("tif", 16), ("webp", 8)])
def test_three_channels_leave_out_alpha_and_keep_the_colors(tmp_path, suffix, bits):
    pixels = noise(*SHAPE, 4, bits=bits)
    pixels[:5, ..., 3] = 0  # wholly transparent
    path = tmp_path / f"a.{suffix}"
    if bits == 8:
        Image.fromarray(pixels).save(path, **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    elif suffix == "tif":
        tifffile.imwrite(path, pixels, photometric="rgb", extrasamples=["unassalpha"])
    else:
        cv2.imwrite(str(path), pixels[..., [2, 1, 0, 3]])
    assert (ImageReader(3, bits)(path) == pixels[..., :3]).all()
    assert (ImageReader(4, bits)(path) == pixels).all()


def test_a_fourth_channel_that_is_no_alpha_is_not_left_out(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", noise(*SHAPE, 4), photometric="rgb", extrasamples=["unspecified"])
    assert sentence(ImageReader(3), tmp_path / "a.tif").endswith(
        "has 4; set dataset.in_chans=4, choose bands, as in 'dataset.bands=[1,2,3]', or convert it"
    )
    assert (ImageReader(4)(tmp_path / "a.tif") == noise(*SHAPE, 4)).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_with_alpha_has_two_channels(save, suffix):
    pixels = noise(*SHAPE, 2)
    path = save(f"a.{suffix}", pixels)
    assert (ImageReader(2)(path) == pixels).all()
    assert sentence(ImageReader(1), path).endswith(
        "has 2; set dataset.in_chans=2, choose bands, as in 'dataset.bands=[1]', or convert it"
    )


def test_one_bit_and_palette_pictures_are_read_as_they_look(save):
    bits = noise(*SHAPE, most=1).astype(bool)
    assert (ImageReader(1)(save("bits.png", bits)) == bits[..., None] * 255).all()
    assert (ImageReader(3)(save("bits.png", bits)) == bits[..., None] * [255, 255, 255]).all()
    assert (ImageReader(3)(palette_picture(save, "a.png")) == np.array(PALETTE)[noise(*SHAPE, most=2)]).all()


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tif"])
def test_gray_levels_in_a_palette_are_one_channel(save, suffix):
    gray = noise(*SHAPE)
    with Image.fromarray(gray).convert("P") as file:
        file.save(path := save(f"a.{suffix}", gray))
    assert (ImageReader(1)(path)[..., 0] == gray).all()
    assert (ImageReader(3)(path) == gray[..., None]).all()
    message = sentence(ImageReader(1), palette_picture(save, f"a.{suffix}"))
    assert message.endswith("has 3; set dataset.in_chans=3, choose bands, as in 'dataset.bands=[1]', or convert it")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [8, 16])
def test_jpeg_2000_is_read(tmp_path, channels, bits):
    pixels = np.kron(noise(4, 5, channels, bits=bits), np.ones((16, 16, 1), f"uint{bits}"))
    path = tmp_path / "a.jp2"
    cv2.imwrite(str(path), pixels[..., ::-1], [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])
    image = ImageReader(channels, bits)(path)
    assert image.dtype == pixels.dtype
    assert (image == pixels).all()
    path.write_bytes(path.read_bytes()[:200])
    assert sentence(ImageReader(channels, bits), path).startswith(f"cannot read the image {path}")


def test_heic_photos_are_read(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    pixels = np.kron(noise(4, 5, 3), np.ones((16, 16, 1), np.uint8))
    heif.from_pillow(Image.fromarray(pixels)).save(tmp_path / "a.heic", quality=-1, chroma=444)
    assert np.abs(ImageReader()(tmp_path / "a.heic").astype(int) - pixels).max() <= 3
    (tmp_path / "a.heic").write_bytes(b"no photo")
    assert sentence(ImageReader(), tmp_path / "a.heic").startswith(f"cannot read the image {tmp_path / 'a.heic'}")


def test_the_first_frame_of_a_gif_is_read_in_color(save):
    path = palette_picture(save, "a.gif")
    assert (ImageReader()(path) == np.array(PALETTE)[noise(*SHAPE, most=2)]).all()


def palette_picture(save, name):
    path = save(name, noise(*SHAPE, most=2))
    with Image.open(path) as file:
        file.putpalette(sum(PALETTE, ()))  # ids stay
        file.save(path)
    return path


def test_tiff_pictures_of_other_color_models_are_read_as_they_look(save, tmp_path):
    gray = noise(*SHAPE)
    tifffile.imwrite(tmp_path / "a.tif", 255 - gray, photometric="miniswhite")
    assert (ImageReader(1)(tmp_path / "a.tif")[..., 0] == gray).all()
    assert (ImageReader(3)(tmp_path / "a.tif") == gray[..., None]).all()
    expected = np.array(PALETTE)[noise(*SHAPE, most=2)]
    assert (ImageReader(3)(palette_picture(save, "a.tif")) == expected).all()
    rgb = noise(*SHAPE, 3)
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "a.tif")
    assert np.abs(ImageReader(3)(tmp_path / "a.tif").astype(int) - rgb).max() <= 1


TURNS = {  # EXIF orientation: how the stored pixels become upright
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],
}


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_photos_are_turned_as_their_exif_tag_says(save, suffix, channels, orientation):
    pixels = np.kron(noise(3, 5, channels), np.ones((16, 16, 1), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(f"a.{suffix}", pixels.squeeze(), exif=exif, **({"quality": 100} if suffix == "jpg" else {}))
    image, expected = ImageReader(channels)(path), TURNS[orientation](pixels)
    assert image.shape == expected.shape
    # In the middle of each square, JPEG is exact but for the color model's rounding.
    difference = image[8::16, 8::16].astype(int) - expected[8::16, 8::16]
    assert np.abs(difference).max() <= (3 if suffix == "jpg" else 0)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("orientation", [3, 6])
def test_a_mask_is_turned_like_its_image(save, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"compression": "tiff_deflate"} if suffix == "tif" else {}
    ids = noise(*SHAPE, most=2)
    image = ImageReader(1)(save(f"image.{suffix}", ids, exif=exif, **options))
    mask = MaskReader()(save(f"mask.{suffix}", ids, exif=exif, **options))
    assert (image[..., 0] == mask).all()
    assert (mask == TURNS[orientation](ids)).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(("suffix", "options"), [("png", {}), ("tif", {}), ("tif", {"compression": "tiff_lzw"})])
def test_the_orientation_tag_is_applied_or_ignored(save, suffix, options, channels):
    if options and channels % 2 == 0:
        pytest.skip("needs imagecodecs")
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = noise(*SHAPE, channels)
    path = save(f"a.{suffix}", pixels.squeeze(), exif=exif, **options)
    assert (ImageReader(channels)(path) == TURNS[6](pixels)).all()
    assert (ImageReader(channels, orientation="ignore")(path) == pixels).all()
    if channels == 1:
        mask = save(f"m.{suffix}", IDS, exif=exif, **options)
        assert (MaskReader()(mask) == TURNS[6](IDS)).all()
        assert (MaskReader(orientation="ignore")(mask) == IDS).all()
    assert sentence(ImageReader, 3, 8, "turn") == "expected dataset.orientation as apply or ignore, but got 'turn'"


@pytest.mark.parametrize("layout", ["interleaved", "planar", "pages"])
@pytest.mark.parametrize("bands", [[4, 3, 2], [1], [5, 5, 1, 2, 3, 4]])
def test_bands_are_chosen_by_number(tmp_path, layout, bands):
    pixels = noise(*SHAPE, 5, bits=16)
    write_tiff(tmp_path / "a.tif", pixels, layout)
    image = ImageReader(len(bands), 16, bands=bands)(tmp_path / "a.tif")
    assert (image == pixels[..., [band - 1 for band in bands]]).all()
    message = sentence(ImageReader(2, 16, bands=[1, 6]), tmp_path / "a.tif")
    assert message == f"expected the bands [1, 6] of dataset.bands, but {tmp_path / 'a.tif'} has 5"


def test_bands_of_a_png_file_include_its_alpha_channel(save):
    pixels = noise(*SHAPE, 4)
    assert (ImageReader(3, bands=[4, 2, 1])(save("a.png", pixels)) == pixels[..., [3, 1, 0]]).all()
    assert (ImageReader(3, bands=[1, 1, 1])(save("g.png", pixels[..., 0])) == pixels[..., :1]).all()


@pytest.mark.parametrize("bands", [[1, 2], [0, 1, 2], [1, 2, "3"], "123", []])
def test_bands_that_make_no_sense_are_refused(bands):
    assert sentence(ImageReader, 3, 8, "apply", bands).startswith(
        "expected dataset.bands as 3 numbers from 1 (dataset.in_chans=3), as in [1, 2, 3], but got "
    )


def test_rows_are_not_taken_for_channels(tmp_path):
    pixels = noise(96, 80, 5)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, photometric="minisblack")  # 96 pages of 80 x 5 pixels
    for reader in (ImageReader(5), ImageReader(3)):
        assert sentence(reader, path) == (
            f"expected to know which axis of {path} is that of the channels, but it only says 96 x 80 x 5; set "
            "dataset.channel_axis=last (5 channels) or first (96 channels)"
        )
    assert (ImageReader(5, channel_axis="last")(path) == pixels).all()
    assert (ImageReader(3, channel_axis="last", bands=[5, 1, 2])(path) == pixels[..., [4, 0, 1]]).all()
    assert (ImageReader(96)(path) == pixels.transpose(1, 2, 0)).all()
    tifffile.imwrite(path, pixels, photometric="minisblack", metadata={"axes": "YXC"})
    assert (ImageReader(5)(path) == pixels).all()
    tifffile.imwrite(path, pixels.transpose(2, 0, 1), photometric="minisblack", metadata={"axes": "CYX"})
    assert (ImageReader(5)(path) == pixels).all()
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig")
    assert (ImageReader(5)(path) == pixels).all()


@pytest.mark.parametrize(("suffix", "options"), [("png", {}), ("tif", {}), ("webp", {"lossless": True, "exact": True})])
def test_transparent_pixels_of_images_are_told(save, suffix, options):
    pixels = noise(*SHAPE, 4)
    pixels[:5, ..., 3] = 0
    path = save(f"a.{suffix}", pixels, **options)
    assert (ImageReader().transparent(path) == (pixels[..., 3] == 0)).all()
    assert ImageReader(4).transparent(path) is None  # alpha is one of the channels
    assert ImageReader(3, bands=[4, 1, 2]).transparent(path) is None
    pixels[..., 3] = 255
    assert ImageReader().transparent(save(f"b.{suffix}", pixels, **options)) is None
    assert ImageReader().transparent(save(f"c.{suffix}", pixels[..., :3], **options)) is None


def test_a_transparent_color_of_a_palette_image_is_told(save, tmp_path):
    with Image.open(palette_picture(save, "a.png")) as file:
        file.save(tmp_path / "p.png", transparency=1)
    assert (ImageReader().transparent(tmp_path / "p.png") == (noise(*SHAPE, most=2) == 1)).all()


def add_chunk(path, name, data):
    """Insert a chunk into a PNG file before its pixels."""
    content = path.read_bytes()
    at = content.index(b"IDAT") - 4
    chunk = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(content[:at] + chunk + content[at:])


def test_transparency_is_told_behind_long_metadata(save):
    path = save("a.png", noise(*SHAPE, 3, most=1))
    add_chunk(path, b"tEXt", b"Comment\0" + b"x" * 2000)
    assert ImageReader().transparent(path) is None
    add_chunk(path, b"tRNS", struct.pack(">HHH", 1, 1, 1))
    assert (ImageReader().transparent(path) == (noise(*SHAPE, 3, most=1) == 1).all(2)).all()


FOUND = {"gray.png": 1, "rgb.png": 3, "rgba.png": 4, "la.png": 2, "gray.tif": 1, "rgb.tif": 3, "five.tif": 5}
REFUSED = [
    (name, channels)
    for name, found in FOUND.items()
    for channels in (1, 2, 3, 4, 5)
    if channels != found and not (channels == 3 and found != 5) and (name, channels) != ("la.png", 4)
]


@pytest.mark.parametrize(("name", "channels"), REFUSED)
def test_another_number_of_channels_is_named_with_the_key_to_set(tmp_path, name, channels):
    found, path = FOUND[name], tmp_path / name
    example = ",".join(map(str, range(1, channels + 1)))
    choice = f"choose bands, as in 'dataset.bands=[{example}]', " if found > channels else ""
    if name == "five.tif":
        write_tiff(path, noise(*SHAPE, 5), "pages")
    else:
        Image.fromarray(noise(*SHAPE, found).squeeze()).save(path)
    assert sentence(ImageReader(channels), path) == (
        f"expected an image of {channels} channel{'s' * (channels > 1)}, but {path} has {found}; set dataset.in_chans="
        f"{found}, {choice}or convert it"
    )


@pytest.mark.parametrize(
    ("suffix", "channels"), [("png", 1), ("png", 3), ("png", 4), ("tif", 1), ("tif", 3), ("tif", 5)]
)
@pytest.mark.parametrize(("bits", "found"), [(8, 16), (16, 8)])
def test_another_depth_is_named_with_the_key_to_set(tmp_path, suffix, channels, bits, found):
    pixels, path = noise(*SHAPE, channels, bits=found), tmp_path / f"a.{suffix}"
    if suffix == "png":
        cv2.imwrite(str(path), pixels)
    else:
        write_tiff(path, pixels, "interleaved")
    assert sentence(ImageReader(channels, bits), path) == (
        f"expected uint{bits} pixels (dataset.bit_depth={bits}), but {path} has uint{found}; "
        f"set dataset.bit_depth={found}, or convert it to {bits}-bit integers"
    )


@pytest.mark.parametrize("dtype", ["float32", "float64", "int16", "uint32", "int8"])
@pytest.mark.parametrize(("channels", "layout"), [(1, "interleaved"), (3, "interleaved"), (5, "planar"), (3, "pages")])
@pytest.mark.parametrize("bits", [8, 16])
def test_pixels_of_other_types_are_named(tmp_path, dtype, channels, layout, bits):
    path = tmp_path / "a.tif"
    write_tiff(path, noise(*SHAPE, channels, most=100).astype(dtype), layout)
    for in_chans in {channels, 3}:
        assert sentence(ImageReader(in_chans, bits), path) == (
            f"expected uint{bits} pixels (dataset.bit_depth={bits}), but {path} has {dtype}; "
            f"convert it to {bits}-bit integers"
        )


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("content", [None, b"", b"II*\0 this is no picture" * 20], ids=["missing", "empty", "broken"])
def test_files_that_cannot_be_read_are_named(tmp_path, content, suffix, channels):
    path = tmp_path / f"a.{suffix}"
    if content is not None:
        path.write_bytes(content)
    message = sentence(ImageReader(channels), path)
    assert message.startswith(f"cannot read the image {path}")
    assert message.endswith("; replace or remove it")
    assert "\n" not in message
    assert ("No such file" in message) == (content is None)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif"])
def test_files_that_were_cut_off_are_named(save, suffix, capfd):
    path = save(f"a.{suffix}", noise(200, 300, 3))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert sentence(ImageReader(), path).startswith(f"cannot read the image {path}")
    mask = save(f"m.{suffix}", noise(200, 300, most=2))
    mask.write_bytes(mask.read_bytes()[: mask.stat().st_size * 2 // 3])
    if suffix != "jpg":  # PIL fills up a cut JPEG, which is no format for masks
        assert sentence(MaskReader(), mask).startswith(f"cannot read the mask {mask} (")
    assert not re.search("ERROR|WARN", capfd.readouterr().err)  # OpenCV's own lines


@pytest.mark.parametrize(
    "reader", [ImageReader(1), ImageReader(3), ImageReader(4), MaskReader()], ids=["gray", "rgb", "rgba", "mask"]
)
@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_damaged_files_raise_nothing_but_the_users_error(save, reader, suffix):
    channels = getattr(reader, "in_chans", 1)
    path = save(f"a.{suffix}", noise(60, 80, channels).squeeze())
    content, rng, refused = path.read_bytes(), random.Random(0), 0
    for attempt in range(60):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[rng.randrange(200 if attempt % 2 else len(content))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            reader(path)
        except UserError:
            refused += 1
    assert refused > 5


@pytest.mark.parametrize(("in_chans", "bit_depth"), [(0, 8), (-1, 16), (3, 12), (3, 32), (3, 0)])
def test_readers_of_other_images_are_refused(in_chans, bit_depth):
    assert sentence(ImageReader, in_chans, bit_depth) == (
        f"expected dataset.in_chans of at least 1 and dataset.bit_depth of 8 or 16, but got {in_chans} and {bit_depth}"
    )


# Masks ----------------------------------------------------------------------------------------------------------------

IDS = noise(*SHAPE, most=2)


def test_gray_and_palette_files_contain_ids_unless_a_palette_is_declared(save):
    for path in (save("gray.png", IDS), palette_picture(save, "a.png"), palette_picture(save, "a.tif")):
        mask = MaskReader()(path)
        assert (mask.dtype, mask.shape) == (np.uint8, SHAPE)
        assert (mask == IDS).all()


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "gif"])
def test_palette_files_are_read_by_their_colors(save, suffix):
    path = palette_picture(save, f"a.{suffix}")
    assert (MaskReader(colors=PALETTE)(path) == IDS).all()
    assert (MaskReader(colors=PALETTE[::-1])(path) == 2 - IDS).all()
    ignoring = MaskReader(colors=PALETTE[:1], ignore_colors=PALETTE[1:], ignore_index=200)
    assert (ignoring(path) == np.where(IDS == 0, 0, 200)).all()
    assert (MaskReader({0: 0, 1: 1, 2: 1}, PALETTE[::-1])(path) == np.minimum(IDS, 1)).all()  # numbers are declared


def test_palette_files_with_another_order_of_the_colors_give_the_same_classes(save):
    colors = np.array(PALETTE, np.uint8)
    for order in itertools.permutations(range(3)):
        with Image.fromarray(np.array(order, np.uint8)[IDS]) as file:
            file.putpalette(colors[np.argsort(order)].tobytes())
            path = save("a.png", IDS)
            file.save(path)
        assert (MaskReader(colors=PALETTE)(path) == IDS).all()


def test_a_color_of_a_palette_file_that_is_not_listed_is_named(save):
    path = palette_picture(save, "a.png")
    assert sentence(MaskReader(colors=PALETTE[:2]), path) == (
        f"expected the colors of dataset.palette, but the mask {path} has [0, 128, 0]; add it to dataset.palette or "
        "dataset.ignore_colors"
    )
    with Image.open(path) as file:
        file.putpalette([level for level in range(256) for _ in range(3)])
        file.save(path)
    assert (MaskReader(colors=((9, 9, 9), *PALETTE[1:]))(path) == IDS).all()  # shown as gray levels, like a gray file


def png_of_few_bits(path, ids, bits):
    """Write a gray PNG file with 2 or 4 bits per pixel, which Pillow and OpenCV cannot."""
    padded = np.pad(ids, ((0, 0), (0, -ids.shape[1] % (8 // bits))))
    bytes_ = (padded.reshape(len(ids), -1, 8 // bits) << np.arange(8 - bits, -1, -bits)).sum(2).astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in bytes_)
    header = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], bits, 0, 0, 0, 0)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))


def tiff_of_few_bits(path, ids, bits, photometric):
    """Write an uncompressed TIFF file with 1, 2 or 4 bits per pixel."""
    padded = np.pad(ids, ((0, 0), (0, -ids.shape[1] % (8 // bits))))
    data = (padded.reshape(len(ids), -1, 8 // bits) << np.arange(8 - bits, -1, -bits)).sum(2).astype(np.uint8).tobytes()
    height, width = ids.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHI", b"II", 42, 8 + len(data) + len(data) % 2)
    path.write_bytes(head + data + b"\0" * (len(data) % 2) + struct.pack("<H", len(tags)) + entries + b"\0" * 4)


@pytest.mark.parametrize("bits", [2, 4])
def test_few_bits_are_not_spread_over_eight(tmp_path, bits):
    ids = IDS + 1
    png_of_few_bits(tmp_path / "a.png", ids, bits)
    assert (MaskReader()(tmp_path / "a.png") == ids).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("photometric", [0, 1])
def test_few_bits_of_a_tiff_file_are_its_ids(tmp_path, bits, photometric):
    ids = np.minimum(IDS, 2**bits - 1)
    tiff_of_few_bits(tmp_path / "a.tif", ids, bits, photometric)
    assert (MaskReader()(tmp_path / "a.tif") == ids).all()


DTYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"photometric": "miniswhite"}, {"byteorder": ">"}, {"compression": "deflate"}, {"bigtiff": True}],
    ids=str,
)
def test_tiff_masks_are_their_stored_numbers(tmp_path, dtype, options):
    tifffile.imwrite(tmp_path / "a.tif", IDS.astype(dtype), **options)
    assert (MaskReader()(tmp_path / "a.tif") == IDS).all()


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "zstd", "lzma"])
@pytest.mark.parametrize("photometric", [0, 1])
def test_tiff_masks_of_every_compression_are_their_stored_numbers(save, compression, photometric):
    path = save("a.tif", IDS, compression=compression)
    with tifffile.TiffFile(path, mode="r+b") as file:
        file.pages[0].tags[262].overwrite(photometric)
    assert (MaskReader()(path) == IDS).all()


@pytest.mark.parametrize("compression", ["group3", "group4", "tiff_lzw"])
def test_fax_masks_hold_zero_and_one(save, compression):
    assert (MaskReader()(save("a.tif", IDS > 1, compression=compression)) == (IDS > 1)).all()


@pytest.mark.parametrize("dtype", [*DTYPES, "bool"])
def test_npy_masks_are_their_numbers(tmp_path, dtype):
    ids = IDS > 0 if dtype == "bool" else IDS
    np.save(tmp_path / "a.npy", ids.astype(dtype))
    assert (MaskReader()(tmp_path / "a.npy") == ids).all()
    np.save(tmp_path / "b.npy", np.array([{}], object))
    assert sentence(MaskReader(), tmp_path / "b.npy").startswith(f"cannot read the mask {tmp_path / 'b.npy'} (")


def test_fractions_and_nan_are_no_ids(tmp_path):
    for value in (0.5, np.nan, np.inf):
        pixels = IDS.astype(np.float32)
        pixels[3, 4] = value
        tifffile.imwrite(tmp_path / "a.tif", pixels)
        message = sentence(MaskReader(), tmp_path / "a.tif")
        assert message.startswith(f"expected whole numbers as class ids, but {tmp_path / 'a.tif'} has {value}")


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "float32"])
def test_negative_and_large_values_can_be_mapped(tmp_path, dtype):
    pixels = IDS.astype(dtype)
    pixels[:4] = -9999
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    expected = IDS.copy()
    expected[:4] = 255
    for values in ({-9999: 255, 0: 0, 1: 1, 2: 2}, {0: 0, 1: 1, 2: 2, "other": 255}):
        assert (MaskReader(values)(tmp_path / "a.tif") == expected).all()
    assert sentence(MaskReader(), tmp_path / "a.tif").endswith(
        "has the value -9999; map the values to classes, as in 'dataset.mask_values={-9999:255,0:0,1:1}'"
    )
    if dtype in ("int32", "int64"):
        pixels[:4] = 2_000_000_000
        tifffile.imwrite(tmp_path / "a.tif", pixels)
        assert (MaskReader({2_000_000_000: 255, 0: 0, 1: 1, 2: 2})(tmp_path / "a.tif") == expected).all()


@pytest.mark.parametrize(("dtype", "nodata"), [("float32", -3.4028235e38), ("float64", -1.7976931348623157e308)])
def test_the_nodata_value_of_gis_is_covered(tmp_path, dtype, nodata):
    path = tmp_path / "a.tif"
    pixels = IDS.astype(dtype)
    pixels[:4] = nodata
    tifffile.imwrite(path, pixels)
    expected = IDS.copy()
    expected[:4] = 255
    for values in ({0: 0, 1: 1, 2: 2, "other": 255}, {nodata: 255, 0: 0, 1.0: 1, 2: 2}):
        assert (MaskReader(values)(path) == expected).all()
    assert f"but {path} has {np.dtype(dtype).type(nodata)!s};" in sentence(MaskReader({0: 0, 1: 1, 2: 2}), path)
    config = {"_target_": "mlpmatch_pl.data.datasets.folder.folder", "root": ".", "mask_values": {nodata: 255, 0: 0}}
    assert checked_target("dataset", config)["mask_values"] == {nodata: 255, 0: 0}
    advice = re.search(r"mask_values=\{(\S+):255,0:0,1:1\}'", sentence(MaskReader(), path))[1]
    assert (MaskReader({float(advice): 255, 0: 0, 1: 1, 2: 2})(path) == expected).all()


@pytest.mark.parametrize(
    ("suffix", "options", "name"),
    [
        ("jpg", {"quality": 90}, "JPEG"),
        ("webp", {"quality": 90}, "lossy WebP"),
        ("jp2", {"irreversible": True, "quality_layers": [20]}, "JPEG 2000, which may have changed them"),
        ("jp2", {"quality_mode": "rates", "quality_layers": [40]}, "JPEG 2000, which may have changed them"),
        ("tif", {"compression": "jpeg"}, "JPEG or another lossy TIFF"),
    ],
)
def test_lossy_masks_are_refused_with_the_share_of_changed_values(save, suffix, options, name):
    ids = np.kron(IDS, np.ones((3, 3), np.uint8))
    colors = np.array(PALETTE, np.uint8)[ids]
    path = save(f"a.{suffix}", colors, **options)
    message = sentence(MaskReader(colors=PALETTE), path)
    assert f"but {path} is {name}" in message
    if suffix != "tif":
        share = float(re.search(r"and ([\d.]+)% of its pixels have values that are not listed", message)[1])
        with Image.open(path) as file:
            found = np.array(file.convert("RGB"))
        wrong = ~(found[:, :, None] == np.array(PALETTE)).all(-1).any(-1)
        assert share == pytest.approx(100 * wrong.mean(), abs=0.06)


@pytest.mark.parametrize("profile", [None, bytes(3001)])  # of odd size: chunks are padded
def test_lossless_webp_is_read(save, profile):
    colors = np.array(PALETTE, np.uint8)[IDS]
    path = save("a.webp", colors, lossless=True, icc_profile=profile)
    assert (MaskReader(colors=PALETTE)(path) == IDS).all()
    lossy = save("b.webp", colors, icc_profile=profile and profile + b"VP8L")
    assert "is lossy WebP" in sentence(MaskReader(colors=PALETTE), lossy)


def test_values_of_lossy_rgb_masks_without_a_palette_are_counted(save):
    gray = np.dstack([np.kron(IDS, np.ones((3, 3), np.uint8)) * 100] * 3)
    path = save("a.jpg", gray)
    with Image.open(path) as file:
        found = np.array(file)
    wrong = ~((found == found[..., :1]).all(-1) & np.isin(found[..., 0], [0, 100, 200]))
    message = sentence(MaskReader({0: 0, 100: 1, 200: 2}), path)
    assert f"is JPEG, and {wrong.mean():.1%} of its pixels have values that are not listed;" in message
    assert "is JPEG, and 100.0% of its pixels" in sentence(
        MaskReader(num_classes=3), save("b.jpg", np.full((8, 8, 3), (200, 0, 0), np.uint8))
    )
    assert "is JPEG;" in sentence(MaskReader(), path)


def test_a_single_channel_of_an_npy_mask_is_removed_and_channels_may_come_first(tmp_path):
    path = tmp_path / "a.npy"
    for pixels in (IDS[..., None], IDS[None]):
        np.save(path, pixels)
        assert (MaskReader()(path) == IDS).all()
    np.save(path, np.stack([label == IDS for label in range(3)]))
    assert (MaskReader(class_channels=True, num_classes=3)(path) == IDS).all()
    assert f"but {path} has 3 pages or channels;" in sentence(MaskReader(), path)
    np.save(path, IDS[None] > 1)  # the second of two classes
    assert (MaskReader(class_channels=True, num_classes=2)(path) == (IDS > 1)).all()


def test_pages_and_frames_are_refused_unless_each_is_a_class(tmp_path, save):
    pages = np.stack([label == IDS for label in range(3)]).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric="minisblack")
    assert f"but {tmp_path / 'a.tif'} has 3 pages or channels;" in sentence(MaskReader(), tmp_path / "a.tif")
    np.save(tmp_path / "a.npy", pages.transpose(1, 2, 0))
    for path in (tmp_path / "a.tif", tmp_path / "a.npy", save("a.png", pages.transpose(1, 2, 0) * 255)):
        assert (MaskReader(class_channels=True, num_classes=3)(path) == IDS).all()
        assert "from" not in sentence(MaskReader(class_channels=True, num_classes=5), path)
    np.save(tmp_path / "a.npy", pages[1:].transpose(1, 2, 0))  # without the background
    assert (MaskReader(class_channels=True, num_classes=3)(tmp_path / "a.npy") == IDS).all()
    pages[:, 4, 5] = 1, 0, 1
    np.save(tmp_path / "a.npy", pages.transpose(1, 2, 0))
    message = sentence(MaskReader(class_channels=True, num_classes=3), tmp_path / "a.npy")
    assert message.startswith("expected one class at each pixel, but ")
    assert "has 2 at row 4, column 5" in message
    frames = [Image.fromarray(IDS), Image.fromarray(IDS[::-1])]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert f"but {tmp_path / 'a.gif'} has 2;" in sentence(MaskReader(), tmp_path / "a.gif")


def test_transparent_pixels_of_masks_are_ignored(save, tmp_path):
    hidden = IDS == 1
    expected = np.where(hidden, 255, IDS)
    colors = np.dstack([np.array(((0, 0, 0), (9, 9, 9), (0, 128, 0)), np.uint8)[IDS], np.where(hidden, 0, 255)])
    for name in ("a.png", "a.tif"):
        assert (MaskReader(colors=PALETTE)(save(name, colors.astype(np.uint8))) == expected).all()
    gray = save("la.png", np.dstack([IDS, np.where(hidden, 0, 200)]).astype(np.uint8))
    assert (MaskReader()(gray) == expected).all()
    with Image.open(palette_picture(save, "a.png")) as file:
        for transparency in (1, bytes([255, 0, 255])):
            file.save(tmp_path / "p.png", transparency=transparency)
            assert (MaskReader()(tmp_path / "p.png") == expected).all()
            assert (MaskReader(colors=PALETTE)(tmp_path / "p.png") == expected).all()


@pytest.mark.parametrize("hidden", [0, 1])
def test_a_transparent_level_of_a_one_bit_mask_is_ignored(save, hidden):
    path = save("a.png", IDS > 1)
    add_chunk(path, b"tRNS", struct.pack(">H", hidden))
    assert (MaskReader()(path) == np.where((IDS > 1) == hidden, 255, IDS > 1)).all()


def test_16_bit_colors_are_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), noise(*SHAPE, 3, bits=16, most=2))
    assert "has 16 bits per channel;" in sentence(MaskReader(colors=PALETTE), tmp_path / "a.png")


def test_one_bit_files_hold_zero_and_one(save):
    bits = IDS > 1
    for name in ("a.png", "a.tif"):
        path = save(name, bits)
        assert (MaskReader()(path) == bits).all()
        assert (MaskReader({0: 1, 1: 0})(path) == ~bits).all()
    assert sentence(MaskReader({0: 0, 255: 1}), path) == (
        f"expected the mask values 0, 255 of dataset.mask_values, but {path} has 1; add it, or 'other: 255' for all "
        "others"
    )


def test_ids_above_255_need_a_mapping(save):
    path = save("a.png", IDS.astype(np.uint16) * 30_000)
    assert sentence(MaskReader(), path) == (
        f"expected class ids from 0 to 255, but {path} has the value 60000; map the values to classes, as in "
        "'dataset.mask_values={60000:255,0:0,1:1}'"
    )
    assert (MaskReader({0: 2, 30_000: 1, 60_000: 0})(path) == 2 - IDS).all()
    assert (MaskReader({30_000: 1, "other": 0})(path) == (IDS == 1)).all()
    assert (MaskReader()(save("b.png", IDS.astype(np.uint16))) == IDS).all()


@pytest.mark.parametrize(("dtype", "wrong"), [("int32", -1), ("int16", -7), ("uint32", 70_000)])
def test_values_that_are_no_ids_are_named(tmp_path, dtype, wrong):
    pixels = IDS.astype(dtype)
    pixels[3, 4] = wrong
    tifffile.imwrite(tmp_path / "a.tif", pixels)
    assert f"from 0 to 255, but {tmp_path / 'a.tif'} has the value {wrong};" in sentence(
        MaskReader(), tmp_path / "a.tif"
    )
    assert f"but {tmp_path / 'a.tif'} has {wrong};" in sentence(MaskReader({0: 0, 1: 1, 2: 2}), tmp_path / "a.tif")


@pytest.mark.parametrize(
    "values",
    [
        {0: 0, 1: 1, 2: 2},
        {0: 2, 1: 0, 2: 1},
        {1: 0, "other": 255},
        {"other": 4},
        {0: 255, 1: 0, 2: 0, 77: 3},
        {"other": 255, 2: 1},
    ],
)
def test_a_mapping_does_what_a_loop_over_pixels_does(save, values):
    mask = MaskReader(values)(save("a.png", IDS))
    for row, column in itertools.product(range(SHAPE[0]), range(SHAPE[1])):
        value = int(IDS[row, column])
        assert mask[row, column] == (values[value] if value in values else values["other"])


@pytest.mark.parametrize("ignore", [255, 254])
def test_a_value_that_the_mapping_leaves_out_is_named(save, ignore):
    path = save("a.png", np.array([[0, 1, 9], [0, 0, 7]], np.uint8))
    assert sentence(MaskReader({0: 0, 1: 1}, ignore_index=ignore), path) == (
        f"expected the mask values 0, 1 of dataset.mask_values, but {path} has 9; add it, or 'other: {ignore}' for "
        "all others"
    )


def test_masks_of_zero_and_255_are_two_classes_though_255_means_ignore(save):
    pixels = (IDS > 0).astype(np.uint8) * 255
    reader = MaskReader({0: 0, 255: 1}, ignore_index=255)
    assert (reader(save("a.png", pixels)) == (IDS > 0)).all()
    pixels[4, 4] = 128
    assert MaskReader({0: 0, 255: 1, "other": 255})(save("a.png", pixels))[4, 4] == 255


@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_colors_become_the_classes_of_the_palette(save, suffix, alpha):
    pixels = np.array(PALETTE, np.uint8)[IDS]
    if alpha:
        pixels = np.dstack([pixels, noise(*SHAPE) | 1])
    path = save(f"a.{suffix}", pixels)
    mask = MaskReader(colors=PALETTE)(path)
    assert mask.dtype == np.uint8
    assert (mask == IDS).all()
    assert (MaskReader(colors=PALETTE[::-1])(path) == 2 - IDS).all()
    ignoring = MaskReader(colors=PALETTE[:1], ignore_colors=PALETTE[1:], ignore_index=200)
    assert (ignoring(path) == np.where(IDS == 0, 0, 200)).all()


def test_many_colors_are_told_apart(save):
    rng = np.random.default_rng(3)
    codes = rng.choice(1 << 24, 255, replace=False)
    colors = [(int(code) >> 16, int(code) >> 8 & 255, int(code) & 255) for code in codes]
    ids = rng.integers(0, 255, (40, 50), np.uint8)
    assert (MaskReader(colors=colors)(save("a.png", np.array(colors, np.uint8)[ids])) == ids).all()


def test_an_unknown_color_is_named(save):
    path = save("a.png", np.array([[PALETTE[0], (3, 2, 1), (9, 9, 9)]], np.uint8))
    assert sentence(MaskReader(colors=PALETTE), path) == (
        f"expected the colors of dataset.palette, but the mask {path} has [3, 2, 1]; add it to dataset.palette or "
        "dataset.ignore_colors"
    )


def test_two_classes_of_one_color_are_refused_in_masks_of_colors_only(save):
    reader = MaskReader(colors=[PALETTE[0], PALETTE[1], PALETTE[0]])
    assert (reader(save("gray.png", IDS)) == IDS).all()
    assert sentence(reader, save("a.png", np.zeros((4, 4, 3), np.uint8))) == (
        "expected a different color for each class, but classes 0 and 2 have [0, 0, 0]; correct dataset.palette or "
        "dataset.ignore_colors"
    )
    reader = MaskReader(colors=PALETTE, ignore_colors=[PALETTE[1]])
    assert "classes 1 and 255 have [128, 0, 0];" in sentence(reader, save("a.png", np.zeros((4, 4, 3), np.uint8)))


@pytest.mark.parametrize("channels", [3, 4])
def test_colors_without_a_palette_are_explained(save, channels):
    path = save("a.png", noise(*SHAPE, channels))
    assert sentence(MaskReader(), path) == (
        f"expected a mask with one channel of class ids, but {path} has 3 color channels; save class ids as a gray or "
        "palette PNG, or set dataset.palette to the color of each class, or dataset.class_channels=true if it has a "
        "channel for each class"
    )


def test_masks_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "a.png"
    assert sentence(MaskReader(), path) == (
        f"cannot read the mask {path} ([Errno 2] No such file or directory: '{path}'); replace or remove it"
    )
    for content in (b"", b"no picture"):
        path.write_bytes(content)
        assert sentence(MaskReader(), path) == (
            f"cannot read the mask {path}: it is damaged or not an image; replace or remove it"
        )


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"0": 0}, "{0: 0}"),
        ({"rest": 0}, "{rest: 0}"),
        ({None: 0}, "{None: 0}"),
        ({0.5: 0}, "{0.5: 0}"),
        ({0: -1}, "{0: -1}"),
        ({0: 256}, "{0: 256}"),
        ({0: 1.0}, "{0: 1.0}"),
        ({0: "1"}, "{0: 1}"),
        ({0: None}, "{0: None}"),
        ({0: 0, "other": 256}, "{other: 256}"),
        ({0: 0, "other": None}, "{other: None}"),
    ],
)
def test_mappings_that_make_no_sense_are_refused(values, found):
    assert sentence(MaskReader, values) == (
        "expected dataset.mask_values as {value in the files: class}, with integers (or other) as values and classes "
        f"from 0 to 255, but got {found}"
    )


@pytest.mark.parametrize("values", [[0, 255], 3, "0:0"])
def test_what_is_no_mapping_is_refused(values):
    assert sentence(MaskReader, values) == (
        f"expected dataset.mask_values as {{value in the files: class}}, but got {values}"
    )


@pytest.mark.parametrize("color", [[1, 2], [1, 2, 3, 4], [1, 2, 256], [-1, 2, 3], [1.0, 2, 3], ["a", 2, 3], 7, "abc"])
@pytest.mark.parametrize("key", ["palette", "ignore_colors"])
def test_colors_that_are_none_are_refused(key, color):
    arguments = (None, [color], ()) if key == "palette" else (None, PALETTE, [color])
    assert sentence(MaskReader, *arguments) == (
        f"expected colors as [red, green, blue] from 0 to 255 in dataset.{key}, but got {color}"
    )


def test_readers_survive_pickling_and_tell_their_options_apart(save):
    readers = [
        MaskReader(),
        MaskReader({0: 0, 255: 1}),
        MaskReader({0: 0, 255: 2}),
        MaskReader(colors=PALETTE),
        MaskReader(colors=PALETTE[::-1]),
        MaskReader(colors=PALETTE[:2], ignore_colors=PALETTE[2:]),
        MaskReader(ignore_index=254),
        ImageReader(),
        ImageReader(1),
        ImageReader(3, 16),
        ImageReader(3, bands=[3, 2, 1]),
        ImageReader(orientation="ignore"),
    ]
    assert len({reader.describe() for reader in readers}) == len(readers)
    for reader in readers:
        assert pickle.loads(pickle.dumps(reader)).describe() == reader.describe()
    path = save("a.png", np.array(PALETTE, np.uint8)[IDS])
    assert (pickle.loads(pickle.dumps(readers[3]))(path) == IDS).all()


@pytest.mark.parametrize("other", [False, True])
def test_a_mapping_can_be_given_on_the_command_line(tmp_path, other):
    pixels = np.zeros((8, 8), np.uint8)
    pixels[4:] = 255
    pixels[0] = 9 if other else 0
    for folder, content in (("images", np.zeros((8, 8, 3), np.uint8)), ("masks", pixels)):
        (tmp_path / folder).mkdir()
        for index in range(3):
            Image.fromarray(content).save(tmp_path / folder / f"{index}.png")
    values = "{0:0,255:1,other:255}" if other else "{0:0,255:1}"
    cfg = compose_train(
        "dataset=folder",
        f"dataset.root={tmp_path}",
        "dataset.classes=[a,b]",
        f"dataset.mask_values={values}",
        output_dir=tmp_path,
    )
    config = OmegaConf.to_container(cfg, resolve=True)  # as the command does
    mask = instantiate(config["dataset"], _convert_="all").train.mask(0)
    expected = np.zeros((8, 8), np.uint8)
    expected[4:] = 1
    expected[0] = 255 if other else 0
    assert (mask == expected).all()
