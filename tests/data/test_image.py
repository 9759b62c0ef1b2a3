"""Pictures are read upright and in RGB, whatever is in the file."""

import numpy as np
import pytest
from PIL import Image
from synthetic import image
from transformers.image_utils import load_image

from linmu_hf.data.image import image_size, open_image


pytestmark = pytest.mark.core_training


def pixels(source):
    return np.asarray(open_image(source))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_by_exif(tmp_path, orientation):
    file = tmp_path / "phone.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    image(6, 10).save(file, exif=exif)
    for source in (str(file), file, {"path": str(file), "bytes": None}, file.read_bytes(), Image.open(file)):
        assert np.array_equal(pixels(source), np.asarray(load_image(str(file))))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_is_white(tmp_path, mode):
    picture = Image.new("RGBA", (4, 2), (200, 0, 0, 0))
    picture.paste((10, 10, 10, 255), (2, 0, 4, 2))
    picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
    picture.save(tmp_path / "a.png")
    read = pixels(str(tmp_path / "a.png"))
    assert (read[:, :2] == 255).all() and np.abs(read[:, 2:].astype(int) - 10).max() <= 1


def test_16_bits_are_scaled(tmp_path):
    Image.fromarray((np.arange(8, dtype=np.uint16) * 8192).reshape(2, 4)).save(tmp_path / "a.png")
    assert pixels(str(tmp_path / "a.png"))[..., 0].ravel().tolist() == [32 * i for i in range(8)]


@pytest.mark.parametrize(
    ("values", "dtype", "read"),
    [
        ([0, 0.5, 1], np.float32, [0, 128, 255]),
        ([0, 128, 255], np.float32, [0, 128, 255]),
        ([0, 7, 255], np.int32, [0, 7, 255]),
        ([0, 1000, 65535], np.uint16, [0, 3, 255]),
        ([0, 3, 1000], np.int32, "from 0 to 1000 in 32 bits"),
        ([-1, 0, 1], np.float32, "from -1 to 1 in 32 bits"),
        ([0, 1, np.nan], np.float32, "from nan to nan in 32 bits"),
    ],
)
def test_values_of_a_known_range(tmp_path, values, dtype, read):
    Image.fromarray(np.array([values], dtype)).save(tmp_path / "a.tiff")
    if isinstance(read, str):
        with pytest.raises(ValueError, match=rf"a\.tiff has values {read}.*: save it with 8 or 16 bits"):
            open_image(str(tmp_path / "a.tiff"))
    else:
        assert pixels(str(tmp_path / "a.tiff"))[0, :, 0].tolist() == read


def test_grey_of_16_bits_that_pillow_widens(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5\n2 1\n1000\n" + np.array([0, 1000], ">u2").tobytes())
    assert pixels(str(tmp_path / "a.pgm"))[0, :, 0].tolist() == [0, 255]


@pytest.mark.parametrize("empty", [Image.new("RGB", (0, 5)), np.zeros((3, 0, 8)), np.zeros((0, 0))])
def test_pictures_without_pixels(empty):
    for read in (open_image, image_size):
        with pytest.raises(ValueError, match="pixels: leave it out"):
            read(empty)


def test_cmyk_and_grey(tmp_path):
    Image.new("CMYK", (2, 2), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    assert np.abs(pixels(str(tmp_path / "a.jpg")).astype(int) - [255, 0, 0]).max() <= 3
    Image.new("L", (2, 2), 7).save(tmp_path / "b.png")
    assert (pixels(str(tmp_path / "b.png")) == 7).all()


def test_sizes_of_arrays():
    assert image_size(image(3, 8)) == image_size(np.zeros((3, 8, 3))) == image_size(np.zeros((3, 3, 8))) == (3, 8)
    with pytest.raises(ValueError, match="is not an image"):
        image_size(np.zeros((2, 3, 4, 3)))
