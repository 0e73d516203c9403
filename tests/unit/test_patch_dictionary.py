"""Patch dictionaries: exact where the dictionary is complete, nearest patches elsewhere."""

import json
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from megatron_ext import vq
from megatron_ext.errors import UserError
from megatron_ext.vq.dictionary_training import distinct_patches, train_dictionary
from megatron_ext.vq.pixels import from_bytes, to_bytes
from megatron_ext.vq.training_config import DictionaryConfig
from support.programs import run_program

CONFIG = DictionaryConfig(image_size=12, grid=3, codebook_size=20, held_out=8)


def pictures(count: int, kinds: int, noise: int = 0) -> torch.Tensor:
    """uint8 [count, 3, 12, 12], of 9 patches each, of ``kinds`` kinds that differ in one pixel of each channel or more;
    the first kind is the most frequent."""
    random = torch.Generator().manual_seed(0)
    palette = torch.randint(0, 250, (kinds, 3, 4, 4), generator=random, dtype=torch.uint8)
    palette[1] = palette[0]
    palette[1, 0, 0, 0] += 1  # the least difference that there is
    selected = torch.randint(kinds, (count, 9), generator=random) * (torch.rand(count, 9, generator=random) < 0.8)
    cells = palette[selected].view(count, 3, 3, 3, 4, 4)  # n, row, column, channel, y, x
    cells = cells + torch.randint(0, noise + 1, cells.shape, generator=random, dtype=torch.uint8)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(count, 3, 12, 12).contiguous()


def test_a_complete_dictionary_loses_nothing(tmp_path):
    images = pictures(200, 20)
    numbers = train_dictionary(images, tmp_path, CONFIG)
    adapter = vq.load(tmp_path)
    assert (adapter.kind, adapter.image_size, adapter.grid) == ("patch_dictionary", (12, 12), (3, 3))
    assert adapter.codebook_size == numbers["codebook_size"] == numbers["distinct_patches"] == 20
    codes = adapter.encode(from_bytes(images))
    assert codes.shape == (200, 9) and codes.dtype == torch.int64 and len(codes.unique()) == 20
    assert torch.equal(to_bytes(adapter.decode(codes)), images)
    assert int(torch.bincount(codes.flatten()).argmax()) == 0  # the most frequent patch comes first
    assert json.loads((tmp_path / "training.json").read_text()) == numbers
    assert numbers["psnr"] > 70 and numbers["fingerprint"] == adapter.fingerprint
    assert Image.open(tmp_path / "reconstructions.png").size == (4 * 2 * 12, 2 * 12)


def test_distinct_patches_are_counted():
    images = pictures(50, 20)
    patches, counts = distinct_patches(images, 4)
    assert counts.sum() == 50 * 9 and counts[0] == counts.max()
    first = (images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(0, 2) == patches[0]).all(3)
    assert first.flatten(1).all(1).sum() == counts[0]


def test_a_smaller_dictionary_keeps_the_kinds_of_patches_and_its_own_codes(tmp_path):
    images = pictures(200, 20, noise=4)
    numbers = train_dictionary(images, tmp_path, DictionaryConfig(12, 3, 40, held_out=8))
    # The noise has a variance of two bytes squared (45 dB); random patches of this palette are at 8 dB.
    assert 40 < numbers["psnr"] < 60 and numbers["distinct_patches"] > 1000
    adapter = vq.load(tmp_path)
    codes = torch.arange(adapter.codebook_size)[: adapter.codebook_size // 9 * 9].view(-1, 9)
    assert torch.equal(adapter.encode(adapter.decode(codes)), codes)


def test_codes_are_the_nearest_patches(tmp_path):
    train_dictionary(pictures(200, 20), tmp_path, CONFIG)
    adapter = vq.load(tmp_path)
    image = torch.randint(0, 256, (1, 3, 12, 12), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    patches = image[0].unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 0, 3, 4).reshape(9, -1).double()
    entries = to_bytes(adapter.decode(torch.arange(18).view(2, 9)))
    entries = entries.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(18, -1).double()
    distances = torch.cdist(patches, entries, compute_mode="donot_use_mm_for_euclid_dist")
    codes = adapter.encode(from_bytes(image))[0]
    known = codes < 18
    assert known.sum() > 4 and torch.equal(codes[known], distances.argmin(1)[known])


def test_the_same_images_give_the_same_dictionary_and_the_dtype_changes_nothing(tmp_path):
    images = pictures(100, 20, noise=2)
    first, second, other = (
        train_dictionary(data, tmp_path / name, CONFIG)["fingerprint"]
        for name, data in (("first", images), ("second", images), ("other", images + 1))
    )
    assert first == second != other
    exact, half = vq.load(tmp_path / "first"), vq.load(tmp_path / "first", dtype=torch.bfloat16)
    codes = exact.encode(from_bytes(images))
    assert torch.equal(half.encode(from_bytes(images)), codes)
    assert torch.equal(half.decode(codes), exact.decode(codes))


def test_loading_a_dictionary_does_not_import_transformers(tmp_path):
    train_dictionary(pictures(20, 4), tmp_path, CONFIG)
    program = (
        f"import sys; from megatron_ext import vq; vq.load({str(tmp_path)!r}); print('transformers' in sys.modules)"
    )
    assert run_program([sys.executable, "-c", program]).stdout.strip() == "False"


def test_the_tool_fits_a_dictionary(tmp_path):
    for number, picture in enumerate(pictures(12, 4)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{number:02}.png")
    options = ["--image-size", 12, "--grid", 3, "--held-out", 4, "--dictionary"]
    tool = [sys.executable, "tools/train_vq.py", "--images", tmp_path, "--out", tmp_path / "vq", *options]
    output = run_program([*tool, "--codebook-size", 9]).stdout
    assert "PSNR 78.13 dB on 4 held-out images, 100 % of 4 codes in use" in output
    refused = run_program([*tool, "--steps", 9], check=False)
    assert refused.returncode == 1
    assert refused.stdout == "train_vq.py: --steps: a setting of networks; --dictionary has none of them\n"


@pytest.mark.parametrize(
    "config, patches, message",
    [
        ({"image_size": 12}, torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "config.json: patch_size is None"),
        ({"image_size": 12, "patch_size": 5}, torch.zeros(2, 3, 5, 5, dtype=torch.uint8), "not a multiple"),
        ({"image_size": 12, "patch_size": 4}, torch.zeros(2, 3, 4, 4), r"found torch.float32 \[2, 3, 4, 4\]"),
        ({"image_size": 12, "patch_size": 4}, torch.zeros(0, 3, 4, 4, dtype=torch.uint8), "found torch.uint8"),
        ({"image_size": 12, "patch_size": 4}, None, "model.safetensors: cannot be read"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(tmp_path, config, patches, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "patch_dictionary", **config}))
    if patches is not None:
        save_file({"patches": patches}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=message) as failure:
        vq.load(tmp_path)
    assert "\n" not in str(failure.value)


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match="must be a multiple of grid"):
        DictionaryConfig(image_size=54, grid=4)
    with pytest.raises(UserError, match="codebook size 0"):
        DictionaryConfig(codebook_size=0)
    with pytest.raises(UserError, match="8 images are too few"):
        train_dictionary(pictures(8, 4), tmp_path, CONFIG)
