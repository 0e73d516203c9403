"""Both sides of benchmarks/decode.py choose the same tokens, and a side that does not is refused."""

import pytest

import decode
from decoding import documents, sides
from megatron_ext.errors import UserError


@pytest.mark.parametrize("kind", decode.KINDS)
def test_hugging_face_and_decoding_without_a_cache_choose_the_same_tokens(one_process, monkeypatch, kind):
    monkeypatch.setattr(documents, "IMAGE", 4)
    monkeypatch.setattr(documents, "GRID", (2, 2))
    monkeypatch.setattr(documents, "ANSWER", 4)
    one_process()
    config = decode.configuration(layers=2, hidden_size=32, preset="dense")
    llama = sides.build_hugging_face(config)
    generator = sides.build_generator(config, llama)
    continued = {
        "dense": [sides.decode_cached(generator, kind, 2)],
        "Hugging Face": [sides.decode_hugging_face(llama, kind, 2)],
    }
    result = decode.against_others(kind, continued, generator, tokens=2)
    assert result["tokens_per_second"] > 0 and result["distinct_tokens"] > 1
    continued["dense"][0].tokens[1][1] ^= 1
    with pytest.raises(UserError, match="chooses other tokens"):
        decode.against_others(kind, continued, generator, tokens=2)
    continued["Hugging Face"] = continued["dense"]
    with pytest.raises(UserError, match="without a cache chooses [1-6] other tokens"):
        decode.against_others(kind, continued, generator, tokens=4)


def test_drawing_image_tokens_of_several_codes_is_set_against_its_flops(one_process, monkeypatch):
    monkeypatch.setattr(documents, "IMAGE", 4)
    monkeypatch.setattr(documents, "GRID", (2, 2))
    one_process()
    one, four = (decode.configuration(layers=2, hidden_size=32, preset="dense", depth=depth) for depth in (1, 4))
    generator = sides.build_several_codes(four)
    rounds = {
        "dense": [sides.decode_cached(sides.build_generator(one, sides.build_hugging_face(one)), "picture", 2)],
        decode.SEVERAL_CODES: [sides.decode_cached(generator, "picture", 2)],
    }
    assert [len(row) for row in rounds[decode.SEVERAL_CODES][0].tokens] == [4, 4]
    assert decode.several_codes(rounds, four, one)["per_token_flops"] > 1
    # Of 3 tokens: a projector of 16 -> 32 -> 32, and for a row of 4096 logits a head of one layer of 16 and 2048 codes.
    projector, head = 16 * 32 + 32 * 32, 32 * 16 + 3 * 16 * 16 + 12 * 4 * 16**2 + 16 * 4 * 5 + 4 * 16 * 2048
    more = decode.flops(four, "picture", 4)[1] - decode.flops(one, "picture", 4)[1]
    assert more == 2 * 3 * (projector + head - 32 * 4096)
