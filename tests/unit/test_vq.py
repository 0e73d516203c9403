"""VQ tokenizers: adapters against transformers' own networks, and the training of a small one."""

import json
import shutil
import tarfile
from dataclasses import replace

import pytest
import torch
import transformers
from PIL import Image

from megatron_ext import vq
from megatron_ext.errors import UserError
from megatron_ext.vq.trained_folder import quality
from megatron_ext.vq.training import train
from megatron_ext.vq.training_config import VQTrainingConfig
from megatron_ext.vq.training_images import load_captioned, load_images
from support.images import encoded, two_colored_pictures

COMMON = {"embed_dim": 8, "latent_channels": 32, "base_channels": 32, "num_res_blocks": 1}
JANUS = {**COMMON, "num_embeddings": 64, "channel_multiplier": [1, 1, 1], "num_patches": 8}
EMU3 = {"codebook_size": 64, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1}
EMU3 |= {"attn_resolutions": [1], "hidden_size": 32, "temporal_downsample_factor": 2, "image_size": [32, 16]}
CHAMELEON = {**COMMON, "num_embeddings": 64, "channel_multiplier": [1, 1, 1], "resolution": 32}


def published(kind: str):
    torch.manual_seed(0)
    if kind == "janus":
        janus = transformers.JanusVQVAE(transformers.JanusVQVAEConfig(**JANUS))
        weight = janus.quantize.embedding.weight
        weight.data = torch.nn.functional.normalize(weight.data, dim=1)
        return janus.eval()
    if kind == "emu3":
        return transformers.Emu3VQVAE(transformers.Emu3VQVAEConfig(**EMU3)).eval()
    return transformers.ChameleonVQVAE(transformers.ChameleonVQVAEConfig(**CHAMELEON)).eval()


@torch.no_grad()
def codes_of(kind: str, network, images: torch.Tensor) -> torch.Tensor:
    if kind == "emu3":
        return torch.stack(network.encode(images, torch.tensor([[32, 16]] * len(images))).image_tokens).flatten(1)
    return network.encode(images).image_tokens.view(len(images), -1)


@pytest.mark.parametrize("kind, grid", [("janus", (8, 8)), ("emu3", (16, 8)), ("chameleon", (8, 8))])
def test_codes_and_pictures_equal_those_of_the_published_network(tmp_path, kind, grid):
    network = published(kind)
    network.save_pretrained(tmp_path)
    adapter = vq.load(tmp_path)
    assert (adapter.codebook_size, adapter.grid) == (64, grid)
    images = torch.rand(3, 3, *adapter.image_size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = adapter.encode(images)
    assert codes.shape == (3, grid[0] * grid[1]) and codes.dtype == torch.int64
    expected = codes_of(kind, network, images)
    if kind != "janus":  # its latents are compared at unit length here, as LlamaGen's are
        assert torch.equal(codes, expected)
    if kind == "chameleon":
        with pytest.raises(UserError, match="without a decoder"):
            adapter.decode(codes)
        return
    pictures = adapter.decode(codes)
    with torch.no_grad():
        expected_pictures = network.decode(codes) if kind == "janus" else network.decode(codes.view(3, *grid))
    assert pictures.shape == images.shape
    torch.testing.assert_close(pictures, expected_pictures.clamp(-1, 1).view_as(pictures), atol=1e-4, rtol=1e-4)


def test_the_fingerprint_follows_the_weights_and_not_their_storage(tmp_path):
    network = published("janus")
    network.save_pretrained(tmp_path / "whole")
    network.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    network.quant_conv.bias.data[0] += 1
    network.save_pretrained(tmp_path / "changed")
    whole, in_shards, changed = (vq.load(tmp_path / name).fingerprint for name in ("whole", "shards", "changed"))
    assert whole == in_shards != changed


def test_the_codebook_stays_float32_under_bfloat16(tmp_path):
    published("janus").save_pretrained(tmp_path)
    exact, half = vq.load(tmp_path), vq.load(tmp_path, dtype=torch.bfloat16)
    assert half.network.encoder.conv_in.weight.dtype == torch.bfloat16
    assert torch.equal(half.network.quantize.embedding.weight, exact.network.quantize.embedding.weight)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config.json: not found"):
        vq.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="'llama' is not a known VQ tokenizer"):
        vq.load(tmp_path)
    published("janus").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="cannot be read as a JanusVQVAE"):
        vq.load(tmp_path)


def test_wrong_sizes_are_refused(tmp_path):
    published("janus").save_pretrained(tmp_path)
    adapter = vq.load(tmp_path)
    with pytest.raises(ValueError, match="expected"):
        adapter.encode(torch.zeros(1, 3, 16, 32))
    with pytest.raises(ValueError, match="expected"):
        adapter.decode(torch.zeros(1, 63, dtype=torch.int64))


SMALL = VQTrainingConfig(image_size=16, grid=4, codebook_size=32, steps=60, batch_size=8, held_out=8)


def test_a_trained_tokenizer_reconstructs_and_loads(tmp_path):
    pictures = two_colored_pictures(100)
    numbers = train(pictures, tmp_path, SMALL)
    mean = pictures[8:].float().mean((0, 2, 3), keepdim=True).round().to(torch.uint8).expand(8, 3, 16, 16)
    blind = quality(pictures[:8], mean, torch.zeros(8, 16, dtype=torch.int64), 32)
    assert numbers["psnr"] > blind["psnr"] + 6
    adapter = vq.load(tmp_path)
    assert (adapter.image_size, adapter.grid, adapter.codebook_size) == ((16, 16), (4, 4), 32)
    assert adapter.fingerprint == numbers["fingerprint"]
    assert json.loads((tmp_path / "training.json").read_text()) == numbers
    assert Image.open(tmp_path / "reconstructions.png").size == (4 * 2 * 16, 2 * 16)
    assert not list(tmp_path.glob(".*"))


def test_a_local_code_depends_on_its_own_patch(tmp_path):
    train(two_colored_pictures(100), tmp_path, replace(SMALL, local=True))
    adapter = vq.load(tmp_path)
    random = torch.Generator().manual_seed(1)
    pictures = torch.rand(4, 3, 16, 16, generator=random) * 2 - 1
    # The norms see the whole picture, but not in which order its patches lie.
    order = torch.randperm(16, generator=random)
    patches = torch.nn.functional.unfold(pictures, 4, stride=4)
    moved = torch.nn.functional.fold(patches[:, :, order], (16, 16), 4, stride=4)
    codes = adapter.encode(pictures)
    assert len(codes.unique()) > 1
    assert torch.equal(adapter.encode(moved), codes[:, order])


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    pictures = two_colored_pictures(60)
    whole = train(pictures, tmp_path / "whole", SMALL)
    from megatron_ext.vq import training as module

    step, calls = module._Trainer.train_step, []

    def fails_late(self, pictures):
        calls.append(None)
        if len(calls) > 45:
            raise KeyboardInterrupt
        return step(self, pictures)

    monkeypatch.setattr(module._Trainer, "train_step", fails_late)
    with pytest.raises(KeyboardInterrupt):
        train(pictures, tmp_path / "cut", SMALL, save_every=20)
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "config.json").exists()
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    assert train(pictures, tmp_path / "cut", SMALL, save_every=20)["fingerprint"] == whole["fingerprint"]
    with pytest.raises(UserError, match="other settings"):
        train(pictures, tmp_path / "other", replace(SMALL, lr=1e-3))


def test_impossible_settings_and_pictures_are_refused(tmp_path):
    with pytest.raises(UserError, match="power of two"):
        VQTrainingConfig(image_size=48, grid=8)
    with pytest.raises(UserError, match="local: image size / patch / grid must be 1, it is 2"):
        replace(SMALL, image_size=32, local=True)
    with pytest.raises(UserError, match="multiple of 32"):
        VQTrainingConfig(channels=48)
    with pytest.raises(UserError, match="codebook size 0: must be at least 1"):
        VQTrainingConfig(codebook_size=0)
    with pytest.raises(UserError, match="codebook size 65537: with depth 2 at most 65536"):
        VQTrainingConfig(codebook_size=65537, depth=2)
    with pytest.raises(UserError, match="held out"):
        train(two_colored_pictures(8), tmp_path, SMALL)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UserError, match="no image that can be decoded"):
        load_images([tmp_path], 16, 10)
    with pytest.raises(UserError, match=r"absent.tar: No such file"):
        load_images([tmp_path / "absent.tar"], 16, 10)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_captions_stand_beside_their_images_and_images_without_one_are_counted(tmp_path, capsys, mode):
    content = {"a.txt": b" red ", "a.png": encoded(0), "b.png": encoded(1), "c.png": encoded(2), "c.txt": b"blue"}
    folder = tmp_path / "folder"
    folder.mkdir()
    with tarfile.open(tmp_path / "images.tar", mode) as archive:
        for name, file in content.items():
            (folder / name).write_bytes(file)
            archive.add(folder / name, name)
    of_folder, _ = load_captioned([folder], 16, 10)
    images, captions = load_captioned([tmp_path / "images.tar"], 16, 10)
    assert captions == ["red", "blue"] and torch.equal(images, of_folder)
    assert capsys.readouterr().out.count("1 images without a caption (KEY.txt) were left out") == 2
    assert torch.equal(load_images([tmp_path / "images.tar"], 16, 10)[[0, 2]], images)
    (folder / "a.txt").write_bytes(b"r\xff")
    with pytest.raises(UserError, match=r"a\.txt: not UTF-8 \(byte 1\)"):
        load_captioned([folder], 16, 10)
