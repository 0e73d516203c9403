"""Several codes a position: residual quantization, its training, VILA-U's vision tower."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_ext import vq
from megatron_ext.errors import UserError
from megatron_ext.vq import dictionary_training
from megatron_ext.vq.alignment import Alignment
from megatron_ext.vq.codebook import residual_codes
from megatron_ext.vq.dictionary_training import train_dictionary
from megatron_ext.vq.image_decoder import CROP, SQUASH, PillowDecoder
from megatron_ext.vq.pixels import from_bytes, to_bytes
from megatron_ext.vq.residual_codebook import EPSILON, ResidualCodebook
from megatron_ext.vq.training import _Trainer, train
from megatron_ext.vq.training_config import DictionaryConfig, VQTrainingConfig
from support.images import encoded, picture, two_colored_pictures
from support.vila_u import write_vision_tower


def brute_force(latents: torch.Tensor, book: torch.Tensor, depth: int) -> torch.Tensor:
    residuals, codes = latents.double(), []
    for _ in range(depth):
        codes.append((residuals[:, None] - book.double()).square().sum(2).argmin(1))
        residuals = residuals - book.double()[codes[-1]]
    return torch.stack(codes, 1)


def test_residual_codes_are_those_of_a_search_in_float64():
    random = torch.Generator().manual_seed(0)
    latents, book = torch.randn(300, 12, generator=random), torch.randn(40, 12, generator=random)
    assert torch.equal(residual_codes(latents, book, 4), brute_force(latents, book, 4))


def test_each_round_moves_the_book_that_the_next_one_uses():
    random = torch.Generator().manual_seed(0)
    latents, start = torch.randn(50, 3, generator=random), torch.randn(6, 3, generator=random)
    codebook = ResidualCodebook(start.clone(), 2, 0.9, None, restart=False)
    sums = codebook.quantize(latents)
    book, counts, totals = start, torch.zeros(6), start.clone()
    residuals, quantized = latents, torch.zeros_like(latents)
    for round_sums in sums:
        codes = brute_force(residuals, book, 1)[:, 0]
        chosen = torch.nn.functional.one_hot(codes, 6).float()
        quantized = quantized + book[codes]
        torch.testing.assert_close(round_sums, quantized)
        counts = 0.9 * counts + 0.1 * chosen.sum(0)
        totals = 0.9 * totals + 0.1 * chosen.T @ residuals
        residuals = residuals - book[codes]
        book = totals / (counts.sum() * (counts + EPSILON) / (counts.sum() + 6 * EPSILON))[:, None]
    torch.testing.assert_close(codebook.vectors, book)


def test_a_code_that_nothing_chooses_restarts_at_a_residual():
    latents = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    book = torch.tensor([[0.5, 0.5], [900.0, 900.0], [-900.0, 900.0]])
    codebook = ResidualCodebook(book, 1, 0.5, torch.Generator().manual_seed(0))
    codebook.counts += 100  # all are in use
    codebook.quantize(latents)
    assert (codebook.counts > 1).all()
    codebook.counts[1:] = 0
    codebook.quantize(latents)
    for vector in codebook.vectors[1:]:
        assert (vector - latents).abs().sum(1).min() < 1e-3


def test_a_code_in_use_does_not_restart_where_a_batch_has_few_latents_for_each():
    codebook = ResidualCodebook(torch.eye(40), 1, 0.9, torch.Generator().manual_seed(0))
    latents = torch.eye(40)[:20] * 1.1
    codebook.counts.fill_(0.5)  # one latent for two codes
    codebook.sums *= 0.5
    codebook.quantize(latents)
    assert (codebook.vectors.argmax(1) == torch.arange(40)).all()


def test_a_book_with_room_for_all_patches_loses_nothing(tmp_path):
    pictures = two_colored_pictures(40)  # their quarters have four colors
    numbers = train_dictionary(pictures, tmp_path, DictionaryConfig(16, 2, 5, held_out=8, depth=3))
    assert numbers["distinct_patches"] == 4 and min(numbers["psnr_by_depth"]) > 70
    tokenizer = vq.load(tmp_path)
    assert torch.equal(to_bytes(tokenizer.decode(tokenizer.encode(from_bytes(pictures)))), pictures)


def test_least_squares_find_the_best_vectors_for_the_codes_chosen(monkeypatch):
    monkeypatch.setattr(dictionary_training, "PATCHES_AT_ONCE", 7)
    random = torch.Generator().manual_seed(0)
    patches, vectors = torch.randn(60, 4, generator=random), torch.zeros(5, 4)
    codes, counts = torch.randint(5, (60, 2), generator=random), torch.randint(1, 4, (60,), generator=random).float()
    chosen = torch.nn.functional.one_hot(codes, 5).sum(1).double() * counts[:, None].sqrt()
    best = torch.linalg.lstsq(chosen, patches.double() * counts[:, None].sqrt()).solution.float()
    solution = dictionary_training._to_least_squares(patches, counts, vectors, codes)
    torch.testing.assert_close(solution, best, rtol=0, atol=3e-3)  # it keeps a little weight on where the vectors are


def noisy_pictures(count: int) -> torch.Tensor:
    """uint8 [count, 3, 8, 8] that no small dictionary holds."""
    return torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_more_codes_a_position_show_pictures_better(tmp_path):
    pictures, config = noisy_pictures(150), DictionaryConfig(8, 4, 32, held_out=50)
    one = train_dictionary(pictures, tmp_path / "one", config)
    four = train_dictionary(pictures, tmp_path / "four", replace(config, depth=4))
    assert four["psnr"] > one["psnr"] + 3 and four["codebook_size"] == one["codebook_size"]
    assert four["psnr_by_depth"] == sorted(four["psnr_by_depth"]) and len(four["psnr_by_depth"]) == 4
    assert four["psnr_by_depth"][-1] == pytest.approx(four["psnr"])
    assert not {"psnr_by_depth", "depth"} & {*one, *one["settings"]}
    tokenizer = vq.load(tmp_path / "four")
    assert tokenizer.metadata["depth"] == 4 and "depth" not in vq.load(tmp_path / "one").metadata
    codes = tokenizer.encode(from_bytes(pictures[:3]))
    assert codes.shape == (3, 4 * 4 * 4)
    patches = tokenizer.vectors[codes.view(3, 4, 4, 4)].sum(3).view(3, 4, 4, 3, 2, 2)
    expected = patches.permute(0, 3, 1, 4, 2, 5).reshape(3, 3, 8, 8).clamp(-1, 1)
    torch.testing.assert_close(tokenizer.decode(codes), expected)


def test_captions_find_the_latents_that_they_were_trained_with():
    torch.manual_seed(0)
    captions = [f"A {color} {shape}." for color in ("red", "blue", "green") for shape in ("star", "heart")] * 2
    latents = torch.randn(6, 4, 3, 3).repeat(2, 1, 1, 1)
    alignment = Alignment(captions, 4, 9)
    ids = alignment.ids(captions)
    optimizer = torch.optim.Adam(alignment.parameters(), 1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = alignment.loss(latents + 0.1 * torch.randn(latents.shape), ids)
        loss.backward()
        optimizer.step()
    assert alignment.retrieval(latents, ids) == {"retrieval": 100, "retrieval_by_chance": pytest.approx(100 / 6)}
    other = alignment.ids(["A RED star"]), alignment.ids(["A unknown star and more than there is room for"])
    assert torch.equal(other[0][0], ids[0]) and not torch.equal(other[1][0], ids[0])


def test_a_network_of_four_codes_is_trained_with_captions_and_read(tmp_path):
    pictures = two_colored_pictures(30)
    captions = [f"Number {red}." for red in pictures[:, 0, 0, 0].tolist()]
    config = VQTrainingConfig(image_size=16, grid=4, codebook_size=32, steps=12, batch_size=4, held_out=8, depth=4)
    trainer = _Trainer(config, captions)
    trainer.train_step(pictures)
    for module in (trainer.network, trainer.alignment):
        assert torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None]) < 1.01
    trainer.save(tmp_path / "other" / "state.pt")
    with pytest.raises(UserError, match=r"state.pt: a training with other settings or captions was interrupted here"):
        _Trainer(config, captions[::-1]).resume(tmp_path / "other" / "state.pt")
    numbers = train(pictures, tmp_path, config, captions=captions)
    assert 0 <= numbers["retrieval"] <= 100 and len(numbers["bfloat16_agreement_by_depth"]) == 4
    tokenizer = vq.load(tmp_path)
    assert (tokenizer.kind, tokenizer.depth, tokenizer.fingerprint) == ("residual_vqgan", 4, numbers["fingerprint"])
    codes = tokenizer.encode(from_bytes(pictures[:8])).view(-1, 4)
    assert torch.equal(codes, brute_force(tokenizer.latents(from_bytes(pictures[:8])), tokenizer.vectors, 4))
    assert (codes[:, 0] != codes[:, 1]).any()


def test_the_tower_of_vila_u_is_read(tmp_path):
    tensors = write_vision_tower(tmp_path / "vision_tower")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vila_u_llama"}))
    tower = vq.load(tmp_path)  # the folder around it
    assert (tower.depth, tower.codebook_size, tower.grid, tower.image_size) == (4, 24, (8, 8), (32, 32))
    assert torch.equal(tower.vectors, tensors["rqvaesiglip.quantizer.codebooks.0.weight"][:24])
    assert tower.fingerprint == vq.load(tmp_path / "vision_tower").fingerprint
    pictures = noisy_pictures(32).view(2, 3, 32, 32)
    codes = tower.encode(from_bytes(pictures))
    assert codes.shape == (2, 256) and len(codes.unique()) == 24
    decoded = tower._decoded(tower.quantized(codes).view(2, 8, 8, 32).permute(0, 3, 1, 2))
    truncated = ((decoded + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    assert torch.equal(to_bytes(tower.decode(codes)), truncated)


def test_a_tower_that_is_not_whole_or_has_a_book_for_each_depth_is_refused(tmp_path):
    lost, book = "siglip_model.vision_model.encoder.layers.0.mlp.fc2.bias", "quantizer.codebooks.2.weight"
    write_vision_tower(tmp_path, changes={f"rqvaesiglip.{lost}": None})
    with pytest.raises(UserError, match=f"the weight rqvaesiglip.{lost} is missing"):
        vq.load(tmp_path)
    write_vision_tower(tmp_path, changes={f"rqvaesiglip.{book}": torch.ones(25, 32)})
    with pytest.raises(UserError, match=rf"{book} differs from .*codebooks.0.weight; a codebook for each depth"):
        vq.load(tmp_path)
    write_vision_tower(tmp_path, changes={f"rqvaesiglip.{book.replace('2', '4')}": torch.ones(25, 32)})
    with pytest.raises(UserError, match=r"'rqvaesiglip.code_shape' tells 4 codes a position, but .*codebooks.4.weight"):
        vq.load(tmp_path)
    first, padded = book.replace("2", "0"), torch.zeros(25, 32)
    for stored, found in ((padded[1:], "24 rows"), (padded + 1, "another last row")):
        write_vision_tower(tmp_path, changes={f"rqvaesiglip.{first}": stored})
        with pytest.raises(UserError, match=rf"{first} has {found}, expected 'rqvaesiglip.n_embed' \+ 1 = 25 rows"):
            vq.load(tmp_path)
    write_vision_tower(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["rqvaesiglip"]["decoder_latent_shape"] = [4, 4]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"'rqvaesiglip.decoder_latent_shape' \[4, 4\] .* \[16, 16\] pixels"):
        vq.load(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config.json: not found"):
        vq.load(tmp_path)


@pytest.mark.parametrize("width, height, box", [(31, 24, (4, 0, 28, 24)), (24, 31, (0, 0, 24, 24))])
def test_vila_u_crops_portraits_from_the_top_and_squashes_what_is_asked_about(width, height, box):
    from megatron_ext.vq.vila_u import VilaUVisionTower

    preparation = VilaUVisionTower.preparation
    assert (preparation.understanding, preparation.generation) == (SQUASH, CROP)
    image, bicubic = picture(3, height, width), Image.Resampling.BICUBIC
    cropped, squashed = image.crop(box).resize((16, 16), bicubic), image.resize((16, 16), bicubic)
    for resize, expected in ((CROP, cropped), (SQUASH, squashed)):
        decoder = PillowDecoder((16, 16), resize, 1, preparation)
        (pixels,) = decoder([encoded(3, height=height, width=width)])
        decoder.close()
        assert np.array_equal(pixels.numpy(), np.array(expected))
