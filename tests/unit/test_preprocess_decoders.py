"""Decoding: DALI and Pillow give the same pixels, and a bad file in a batch is found without harm to the others."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from megatron_ext.preprocess import dali_decoder
from megatron_ext.preprocess.encoding import ahead
from megatron_ext.vq.image_decoder import PillowDecoder, centred, evidently_whole
from support.images import encoded, picture

SIZE = (32, 48)


def all_decoders(resize):
    decoders = [PillowDecoder(SIZE, resize, workers=2)]
    if dali_decoder.available():
        decoders.append(dali_decoder.DaliDecoder(SIZE, resize, 2, 64, "cpu"))
    return decoders


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    """A JPEG whose pixels lie on their side, with the EXIF entry that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(picture(9, 70, 110), "JPEG", exif=exif)


FILES = {
    "jpeg": encoded(0, "JPEG", height=100, width=150),
    "tall": encoded(1, "JPEG", height=333, width=90),
    "wide": encoded(2, height=60, width=201),
    "small": encoded(3, height=9, width=11),
    "webp": encoded(4, "WEBP", height=75, width=64),
    "grey": saved(picture(5, 50, 70).convert("L"), "JPEG"),
    "alpha": saved(picture(6, 50, 70).convert("RGBA"), "PNG"),
    "palette": saved(picture(7, 50, 70).convert("P"), "PNG"),
    "gif": saved(picture(8, 50, 70).convert("P"), "GIF"),
    "rotated": rotated(),
}


def plain_crop(file: bytes) -> np.ndarray:
    """Scale so that the wanted size fits inside, then cut out the middle, with Pillow alone."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")
    return np.asarray(ImageOps.fit(image, SIZE[::-1], Image.Resampling.BILINEAR))


def plain_squash(file: bytes) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")
    return np.asarray(image.resize(SIZE[::-1], Image.Resampling.BILINEAR))


@pytest.mark.parametrize("resize, plain", [("crop", plain_crop), ("squash", plain_squash)])
def test_pixels_agree_with_pillow(resize, plain):
    for decoder in all_decoders(resize):
        for (name, file), pixels in zip(FILES.items(), decoder(list(FILES.values()))):
            assert pixels.shape == (*SIZE, 3) and pixels.dtype == torch.uint8, name
            difference = np.abs(pixels.numpy().astype(int) - plain(file))
            # Decoders of JPEG and WebP may differ by a few of 255 levels; a shift by half a pixel differs by far more.
            assert difference.mean() < 1 and np.quantile(difference, 0.99) <= 6, (decoder.name, name, difference.mean())
        decoder.close()


def test_crop_takes_the_middle():
    assert centred(100, 300, (32, 32)) == (100, 0, 200, 100)
    assert centred(300, 100, (32, 32)) == (0, 100, 100, 200)
    assert centred(64, 96, SIZE) == (0, 0, 96, 64)
    stripes = Image.fromarray(np.repeat(np.repeat(np.array([[255, 0, 255]], np.uint8), 100, 0), 100, 1)).convert("RGB")
    for decoder in all_decoders("crop"):
        [pixels] = decoder([saved(stripes, "PNG")])  # 100 x 300: white, black, white
        assert pixels[:, :7].min() == 255 and pixels[:, 9:39].max() == 0 and pixels[:, -7:].min() == 255
        decoder.close()


def flipped(file: bytes) -> bytes:
    content = bytearray(file)
    content[len(content) // 2] ^= 255
    return bytes(content)


BAD = {
    "truncated jpeg": FILES["jpeg"][:-700],
    "headless": FILES["jpeg"][40:],
    "truncated png": FILES["wide"][:-100],
    "altered png": flipped(FILES["wide"]),
    "png of nothing": FILES["wide"][:8] + FILES["wide"][-12:],
    "truncated webp": FILES["webp"][:-50],
    "text": b"hello" * 100,
    "empty": b"",
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_file_is_found_and_its_neighbours_are_as_before(bad):
    good = list(FILES.values())
    for decoder in all_decoders("crop"):
        before = decoder(good)
        *first, reason = decoder([*good[:5], BAD[bad]])
        after = decoder([BAD[bad], *good, BAD[bad]])
        assert isinstance(reason, str) and reason and "\n" not in reason
        assert isinstance(after[0], str) and isinstance(after[-1], str)
        for pixels, again in zip(before, after[1:-1]):
            assert torch.equal(pixels, again)
        assert all(torch.equal(a, b) for a, b in zip(before, first))
        decoder.close()


def test_whole_and_damaged_images_are_distinguished_without_decoding():
    assert all(evidently_whole(FILES[name]) for name in ("jpeg", "wide", "webp"))
    assert not any(evidently_whole(BAD[name]) for name in BAD if name not in ("altered png", "png of nothing"))
    assert evidently_whole(FILES["jpeg"] + b"appended by a camera")


def test_working_ahead_keeps_order_passes_errors_on_and_stops_when_closed():
    assert list(ahead(i for i in range(20))) == list(range(20))
    yielded, closed = [], []

    def endless():
        try:
            for i in range(10**9):
                yielded.append(i)
                yield i
        finally:
            closed.append(True)

    items = ahead(endless(), depth=2)
    assert next(items) == 0
    items.close()
    assert closed and len(yielded) < 10

    def failing():
        yield 1
        raise ValueError("of the thread")

    items = ahead(failing())
    assert next(items) == 1
    with pytest.raises(ValueError, match="of the thread"):
        next(items)
