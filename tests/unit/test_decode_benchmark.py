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
