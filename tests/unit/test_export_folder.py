"""Exported folders: text and pictures as this project's own programs make them, through transformers alone."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_decoder import full_logits
from test_export_tokenizer import VOCABULARIES
from test_vq import published

from megatron_ext import distributed, vq
from megatron_ext.checkpoints.stored_weights import StoredWeights
from megatron_ext.config import Config
from megatron_ext.errors import UserError
from megatron_ext.export_hf import tokenizer_files
from megatron_ext.export_hf.own_code import processing_unified, vq_unified
from megatron_ext.export_hf.write import export
from megatron_ext.generation import prompts
from megatron_ext.generation.checkpoint import load
from megatron_ext.generation.request import Request
from megatron_ext.generation.sampling import Sampling
from megatron_ext.generation.session import Session
from megatron_ext.hugging_face.folder import ModelFolder
from megatron_ext.hugging_face.loading import require_same_text
from megatron_ext.hugging_face.weights import parameters_of
from megatron_ext.token_classes import Task
from megatron_ext.vq.image_decoder import CROP, PillowDecoder
from support.exported import llama_vocabulary, write_checkpoint
from support.programs import ROOT
from support.tiny_vq import make_vq

PLAN = ["plan.preset=himix_hmgen_share_partial", "model.max_image_tokens=16"]
ASKED = "What is on the table?"  # in the READMEs of exported folders
QUESTIONS = ["what colour is it?", "is it 3 blue squares left of 4 red circles", "it?"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with a vocabulary, a VQ tokenizer, a run, and the run's own-code form under ``hf``."""
    folder = tmp_path_factory.mktemp("run")
    distributed.initialize(Config())
    write_checkpoint(folder / "run", llama_vocabulary(folder / "vocabulary"), *PLAN)
    make_vq(folder / "vq")
    export(folder / "run", folder / "hf", folder / "vq", shard_size=300_000)
    yield folder
    distributed.shut_down()


@pytest.fixture(scope="module")
def session(run) -> Session:
    return Session(load(run / "run", []), run / "vq", batch_size=8, report=lambda line: None)


@pytest.fixture(scope="module", autouse=True)
def no_network(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("code")))
        yield


@pytest.fixture(scope="module")
def model(run):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(run / "hf", trust_remote_code=True).eval()


@pytest.fixture(scope="module")
def processor(run):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(run / "hf", trust_remote_code=True)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 50, 3), dtype=np.uint8))


def asked(processor, picture, questions=QUESTIONS):
    """Inputs that a generic client makes of questions about a picture."""
    parts = [[{"type": "image"}, {"type": "text", "text": question}] for question in questions]
    text = [processor.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True) for p in parts]
    return processor(text=text, images=[[picture]] * len(text), videos=[], audios=[], padding=True, return_tensors="pt")


def continuations(model, inputs, **options) -> list[list[int]]:
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


def test_prompts_and_answers_are_this_project_s(run, session, model, processor, picture):
    inputs, vocabulary = asked(processor, picture), session.trained.vocabulary
    picture.save(run / "picture.png")
    codes = session.encode(run / "picture.png")
    requests = [prompts.answer(vocabulary, codes, question, 8) for question in QUESTIONS]
    filled = model.fill_placeholders(inputs["input_ids"], inputs["pixel_values"])
    for ids, mask, request in zip(filled, inputs["attention_mask"], requests):
        assert ids[mask.bool()].tolist() == request.tokens
    expected = session.generator(requests, Sampling(temperature=0))
    answers = continuations(model, inputs, max_new_tokens=8, do_sample=False)
    for answer, wanted in zip(answers, expected):
        assert answer[: len(wanted)] == wanted
    assert continuations(model, inputs, max_new_tokens=8, use_cache=False) == answers


def test_beams_with_a_cache_are_those_without(model, processor, picture):
    inputs = asked(processor, picture)
    beams = continuations(model, inputs, max_new_tokens=6, num_beams=3)
    assert beams == continuations(model, inputs, max_new_tokens=6, num_beams=3, use_cache=False)
    assert beams != continuations(model, inputs, max_new_tokens=6)
    alone = [continuations(model, asked(processor, picture, [q]), max_new_tokens=6, num_beams=3)[0] for q in QUESTIONS]
    assert alone == beams


CAPTIONS = ["red circles", "3 blue squares left of 4 red circles"]


@pytest.mark.parametrize("options", [{"temperature": 0.8, "top_k": 20}, {"top_p": 0.7}, {"temperature": 0.0}])
def test_pictures_are_those_of_the_same_seed_and_number(session, model, processor, options):
    vocabulary = session.trained.vocabulary
    requests = [prompts.picture(vocabulary, caption, number) for caption, number in zip(CAPTIONS, (4, 7))]
    inputs = processor(text=CAPTIONS, generation_mode="image")
    for ids, mask, request in zip(inputs["input_ids"], inputs["attention_mask"], requests):
        assert ids[mask.bool()].tolist() == request.tokens
    expected = session.generator(requests, Sampling(**options, guidance=3.0, seed=5))
    tokens = model.generate(**inputs, generation_mode="image", guidance_scale=3.0, seed=5, numbers=[4, 7], **options)
    assert [[*row, vocabulary.eoi] for row in tokens.tolist()] == expected
    (first, second) = processor.post_process_multimodal_output(
        model.decode_image_tokens(tokens), generation_mode="image"
    )
    ours = session.pictures(session.codes(expected))
    assert first.tobytes() == ours[0].tobytes() and second.tobytes() == ours[1].tobytes()


@torch.no_grad()
def test_a_guided_picture_is_that_of_two_prompts_by_hand(model, processor):
    config = model.config
    condition = processor(text=CAPTIONS[:1], generation_mode="image")["input_ids"]
    null, uses = torch.tensor([[config.bos_token_id, config.boi_token_id]]), 1
    tokens = model.generate(condition, generation_mode="image", guidance_scale=2.0, do_sample=False)[0].tolist()
    for token in tokens:
        logits = [
            model(ids, token_uses=torch.full_like(ids, uses), use_cache=False).logits[0, -1]
            for ids in (condition, null)
        ]
        guided = logits[1] + 2.0 * (logits[0] - logits[1])
        codes = guided[config.image_offset : config.image_offset + config.codebook_size]
        assert token == config.image_offset + int(codes.argmax())
        condition, null = (torch.cat([ids, torch.tensor([[token]])], 1) for ids in (condition, null))


def test_text_and_pictures_in_turn_are_this_project_s(session, model, processor):
    vocabulary = session.trained.vocabulary
    texts = [[vocabulary.bos, *vocabulary.encode("it")], [vocabulary.bos, *vocabulary.encode("red circles")]]
    requests = [Request(ids, Task.UNDERSTANDING, text_tokens=9, images=2, number=i) for i, ids in enumerate(texts)]
    expected = session.generator(requests, Sampling(seed=2))
    inputs = processor.tokenizer.pad({"input_ids": texts}, padding_side="left", return_tensors="pt")
    options = {"images": 2, "max_new_tokens": 9, "seed": 2}
    for row, wanted in zip(continuations(model, inputs, generation_mode="interleaved", **options), expected):
        assert row[: len(wanted)] == wanted and set(row[len(wanted) :]) <= {vocabulary.pad}
        assert wanted.count(vocabulary.boi) == 2


def test_edited_pictures_are_this_project_s(run, session, model, processor, picture):
    """Given images are to be understood, drawn ones generated; without their condition the images stay."""
    vocabulary = session.trained.vocabulary
    picture.save(run / "picture.png")
    codes, instructions = session.encode(run / "picture.png"), ["left of 3 blue squares", "red"]
    other = list(range(16))  # drawn, and not what its picture would be encoded to
    requests = [prompts.edit(vocabulary, [codes, other][:turn], instructions[:turn], turn) for turn in (1, 2)]
    expected = session.generator(requests, Sampling(guidance=2.0, seed=1))
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": instructions[0]}]},
        {"role": "assistant", "content": [{"type": "image"}]},
        {"role": "user", "content": [{"type": "text", "text": instructions[1]}]},
    ]
    texts = [processor.apply_chat_template(turns[:n], add_generation_prompt=True) for n in (1, 3)]
    images = [[picture], [picture, picture]]
    inputs = processor(text=texts, images=images, generation_mode="image", drawn=[[], [1]])
    codes = model.get_image_tokens(inputs.pop("pixel_values"))
    codes[2] = model.config.image_offset + torch.tensor(other)
    inputs["input_ids"][inputs["input_ids"] == model.config.image_token_id] = codes.flatten()
    tokens = model.generate(**inputs, generation_mode="image", guidance_scale=2.0, seed=1, numbers=torch.tensor([1, 2]))
    assert [[*row, vocabulary.eoi] for row in tokens.tolist()] == expected
    inputs["token_uses"][:] = 0
    others = model.generate(**inputs, generation_mode="image", guidance_scale=2.0, seed=1, numbers=[1, 2])
    assert torch.equal(others[0], tokens[0]) and not torch.equal(others[1], tokens[1])


def test_a_picture_needs_a_prompt_that_opens_it(model, processor):
    with pytest.raises(ValueError, match="every prompt must end in <boi>"):
        model.generate(**processor(text="red"), generation_mode="image")
    with pytest.raises(ValueError, match="1 times <image> in the text, but 0 images"):
        processor(text="<image>what")
    with pytest.raises(ValueError, match="text is missing: a prompt, with <image> for each image"):
        processor(images=[])
    with pytest.raises(ValueError, match=r"drawn=\[0\]: the prompt has 0 images"):
        processor(text="red", drawn=[0])
    with pytest.raises(ValueError, match=r"drawn=\[\[\], \[\]\]: lists for 2 prompts, but there are 1"):
        processor(text="red", drawn=[[], []])
    with pytest.raises(ValueError, match="model_kwargs"):
        model.generate(**processor(text="red"), no_such_option=3)


@pytest.mark.parametrize("mode", ["image", "interleaved"])
def test_settings_that_pictures_would_ignore_are_refused(model, processor, mode):
    inputs, generation_config = processor(text="red", generation_mode="image"), model.generation_config
    for name, value in {
        "guidence": 3,
        "num_beams": 2,
        "num_return_sequences": 2,
        "generation_config": generation_config,
        "repetition_penalty": 1.5,
    }.items():
        with pytest.raises(ValueError, match=f"pictures are drawn without the arguments .'{name}'.: leave them out"):
            model.generate(**inputs, generation_mode=mode, **{name: value})
    with pytest.raises(ValueError, match="2 numbers for 1 prompts"):
        model.generate(**inputs, generation_mode=mode, numbers=[0, 1])
    with pytest.raises(ValueError, match="draws one picture for each prompt: leave out .'images', 'max_new_tokens'."):
        model.generate(**inputs, generation_mode="image", images=2, max_new_tokens=3)
    unset = dict.fromkeys(("temperature", "top_k", "top_p"))
    pictures = [
        model.generate(**inputs, generation_mode=mode, seed=0, **options) for options in ({}, {"num_beams": 1, **unset})
    ]
    assert torch.equal(*pictures)


@torch.no_grad()
def test_labels_with_placeholders_are_the_codes_and_losses_of_parts_add_up(model, processor, picture):
    inputs = processor(text="<image>red", images=[picture])
    ids = model.fill_placeholders(inputs["input_ids"], inputs["pixel_values"])
    loss = model(ids, labels=ids).loss
    assert torch.equal(model(**inputs, labels=inputs["input_ids"]).loss, loss)
    part = model(ids, labels=ids, num_items_in_batch=4 * (ids.shape[1] - 1)).loss
    torch.testing.assert_close(4 * part, loss)


@pytest.mark.parametrize("kind", ["janus", "chameleon", "emu3"])
def test_codes_and_pictures_are_the_adapters(tmp_path, kind):
    published(kind).save_pretrained(tmp_path)
    adapter = vq.load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    network = vq_unified.build_network(config, adapter.codebook_size).eval()
    network.load_state_dict(adapter.network.state_dict())
    images = torch.rand(3, 3, *adapter.image_size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = vq_unified.encode(network, images)
    assert torch.equal(codes, adapter.encode(images))
    if kind == "chameleon":
        with pytest.raises(ValueError, match="only encodes"):
            vq_unified.decode(network, codes, adapter.grid, adapter.image_size)
    else:
        assert torch.equal(vq_unified.decode(network, codes, adapter.grid, adapter.image_size), adapter.decode(codes))


def test_pictures_of_any_shape_become_training_s_pixels(run, picture):
    decoder = PillowDecoder((12, 30), CROP, 1)
    own = processing_unified.UnifiedImageProcessor((12, 30))
    for size in ((30, 12), (7, 50), (61, 33)):
        picture.resize(size).save(run / "resized.png")
        (pixels,) = decoder([(run / "resized.png").read_bytes()])
        expected = pixels.permute(2, 0, 1)[None] / 127.5 - 1
        assert torch.equal(own(str(run / "resized.png"))["pixel_values"], expected)
        assert torch.equal(own([np.array(picture.resize(size))])["pixel_values"], expected)


def test_the_folder_is_a_vq_folder(run, session):
    assert len(list((run / "hf").glob("model-*.safetensors"))) > 2
    exported = vq.load(run / "hf")
    assert exported.fingerprint == session.vq.fingerprint and exported.grid == session.vq.grid


def test_a_patch_dictionary_is_exported(run, tmp_path):
    from safetensors.torch import save_file
    from transformers import AutoModel

    patches = torch.randint(0, 256, (32, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_file({"patches": patches}, tmp_path / "model.safetensors")
    config = {"model_type": "patch_dictionary", "image_size": 16, "patch_size": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name, size in (("one file", 1 << 30), ("shards", 300_000)):
        export(run / "run", tmp_path / name, tmp_path, shard_size=size)
        adapter, exported = vq.load(tmp_path), vq.load(tmp_path / name)
        assert exported.fingerprint == adapter.fingerprint
        model = AutoModel.from_pretrained(tmp_path / name, trust_remote_code=True, dtype=torch.bfloat16)
        images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
        tokens = model.get_image_tokens(images)
        assert torch.equal(tokens - model.config.image_offset, adapter.encode(images))
        assert torch.equal(model.decode_image_tokens(tokens), adapter.decode(tokens - model.config.image_offset))


def test_codes_are_those_of_float32_in_a_model_loaded_in_bfloat16(run, session, model, processor, picture):
    from transformers import AutoModel

    rounded = AutoModel.from_pretrained(run / "hf", trust_remote_code=True, dtype=torch.bfloat16)
    assert rounded.lm_head.weight.dtype == torch.bfloat16
    pixels = processor.image_processor([picture, picture.rotate(90)])["pixel_values"]
    expected = session.vq.encode(pixels) + model.config.image_offset
    assert torch.equal(rounded.get_image_tokens(pixels.bfloat16().float()), rounded.get_image_tokens(pixels.bfloat16()))
    assert torch.equal(rounded.get_image_tokens(pixels), expected)
    assert continuations(rounded, asked(processor, picture), max_new_tokens=3)


def test_a_model_that_is_saved_again_is_the_same(model, processor, picture, tmp_path):
    from transformers import AutoModelForCausalLM, AutoProcessor

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    reloaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    before, after = asked(processor, picture), asked(reloaded, picture)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(model(**before).logits, again(**after).logits)


def run_readme(folder, monkeypatch, **names) -> dict:
    """The names that the code block of a folder's README leaves."""
    _, code, _ = re.split(r"^```.*\n", (folder / "README.md").read_text(), flags=re.MULTILINE)
    monkeypatch.chdir(folder)
    exec(code, names)
    return names


def test_the_readme_s_code_needs_nothing_of_this_project(run, session, model, processor, picture, monkeypatch):
    picture.save(run / "hf" / "photo.jpg", format="PNG")
    with monkeypatch.context() as patch:
        for name in list(sys.modules):
            if name.partition(".")[0] in ("megatron", "megatron_ext"):
                patch.setitem(sys.modules, name, None)
            elif name.startswith("transformers_modules"):
                patch.delitem(sys.modules, name)
        names = run_readme(run / "hf", patch)
    assert type(names["model"]) is not type(model)
    request = prompts.answer(session.trained.vocabulary, session.encode(run / "hf" / "photo.jpg"), ASKED, 32)
    inputs = processor(text=names["prompt"], images=picture)
    assert model.fill_placeholders(inputs["input_ids"], inputs["pixel_values"])[0].tolist() == request.tokens
    assert names["answer"].tolist() == continuations(model, inputs, max_new_tokens=32)
    inputs = processor(text="two red cubes", generation_mode="image")
    assert torch.equal(names["tokens"], model.generate(**inputs, generation_mode="image", guidance_scale=3.0, seed=0))
    assert Image.open(run / "hf" / "cubes.png").tobytes() == names["pictures"][0].tobytes()


def test_the_tokenizer_gives_sentencepiece_s_ids(run, session, processor):
    vocabulary, random = session.trained.vocabulary, np.random.default_rng(0)
    letters = list("abc redblue 3?\n\t  é中🙂<>s/")
    tokenizer = tokenizer_files.exported_tokenizer(vocabulary, with_images=True)
    for _ in range(300):
        text = "".join(random.choice(letters, random.integers(0, 30)))
        if "<s>" in text or "</s>" in text:
            continue
        ids = vocabulary.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids
        assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        assert processor.tokenizer.decode(ids) == vocabulary.decode(ids)
    names = {i: processor.tokenizer.convert_ids_to_tokens(i) for i in range(vocabulary.text_size, vocabulary.size + 1)}
    assert [names[i] for i in (vocabulary.pad, vocabulary.eod, vocabulary.boi, vocabulary.eoi)] == [
        "<pad>",
        "<eod>",
        "<boi>",
        "<eoi>",
    ]
    assert names[vocabulary.image_offset + 31] == "<vq_31>" and names[vocabulary.size] == "<image>"
    assert processor.tokenizer.eos_token_id == vocabulary.answer_end


@pytest.mark.parametrize(
    "settings, class_name",
    [
        ([], "LlamaForCausalLM"),
        (["model.rotary_scaling={factor: 8.0, original_max_position_embeddings: 32}"], "LlamaForCausalLM"),
        (["model.rotary_interpolation_factor=2"], "LlamaForCausalLM"),
        (["model.qkv_bias=true", "model.tie_embeddings=true"], "Qwen2ForCausalLM"),
        (["model.qk_norm=true", "model.head_size=12"], "Qwen3ForCausalLM"),
    ],
)
@torch.no_grad()
def test_a_dense_model_is_a_stock_class(run, tmp_path, settings, class_name):
    from transformers import AutoModelForCausalLM

    vocabulary = llama_vocabulary(tmp_path / "vocabulary")
    write_checkpoint(tmp_path / "run", vocabulary, *settings)
    assert export(tmp_path / "run", tmp_path / "hf")["class"] == class_name
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert type(stock).__name__ == class_name and stock.config.vocab_size == stock.lm_head.weight.shape[0]
    trained = load(tmp_path / "run", [])
    image = range(vocabulary.image_offset, vocabulary.size)
    rows = [[vocabulary.bos, *vocabulary.encode("red circles"), vocabulary.boi, *image]]
    (expected,) = full_logits(trained.model, trained.plan, rows, [Task.GENERATION])
    error = (stock(torch.tensor(rows)).logits[0] - expected).abs().max()
    assert error < 1e-5 * expected.abs().max()
    weights, folder = StoredWeights(tmp_path / "run" / "checkpoints" / "iter_0000000"), ModelFolder(tmp_path / "hf")
    require_same_text(folder, vocabulary)
    imported = parameters_of(folder)
    assert imported.keys() == weights.keys() and all(torch.equal(imported[name], weights[name]) for name in weights)
    assert folder.model.identity == trained.config.model.identity
    assert export(tmp_path / "run", tmp_path / "own", run / "vq", form="own")["form"] == "own"
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "own", trust_remote_code=True).eval()
    torch.testing.assert_close(own(torch.tensor(rows)).logits, stock(torch.tensor(rows)).logits, atol=1e-4, rtol=1e-4)


def test_the_readme_s_code_asks_as_this_project_with_a_chat_template(run, tmp_path, monkeypatch):
    vocabulary = VOCABULARIES["chatml"](tmp_path)
    write_checkpoint(tmp_path / "run", vocabulary)
    export(tmp_path / "run", tmp_path / "hf")
    prompt = run_readme(tmp_path / "hf", monkeypatch, codes=range(16))["prompt"]
    assert prompt["input_ids"].tolist() == [prompts.answer(vocabulary, range(16), ASKED, 1).tokens]


@torch.no_grad()
def test_stock_code_asks_and_draws_as_this_project(run, tmp_path, monkeypatch):
    """With two prompts, as the exported README says; log-probabilities differ from logits by a number per row."""
    from transformers import LogitsProcessorList

    vocabulary = llama_vocabulary(tmp_path / "vocabulary")
    write_checkpoint(tmp_path / "run", vocabulary)
    export(tmp_path / "run", tmp_path / "hf")
    names = run_readme(tmp_path / "hf", monkeypatch, codes=range(16))
    expected = prompts.answer(vocabulary, range(16), ASKED, 1).tokens
    assert names["prompt"]["input_ids"].tolist() == [expected]
    session = Session(load(tmp_path / "run", []), run / "vq", batch_size=8, report=lambda line: None)
    request = prompts.picture(vocabulary, CAPTIONS[0])
    (expected,) = session.generator([request], Sampling(temperature=0, guidance=2.0))

    def only_codes(ids, scores):
        other = torch.ones_like(scores, dtype=torch.bool)
        other[:, vocabulary.image_offset : vocabulary.size] = False
        return scores.masked_fill(other, -torch.inf)

    tokens = names["model"].generate(
        torch.tensor([request.tokens]),
        negative_prompt_ids=torch.tensor([[vocabulary.bos, vocabulary.boi]]),
        guidance_scale=2.0,
        logits_processor=LogitsProcessorList([only_codes]),
        min_new_tokens=16,
        max_new_tokens=16,
    )
    assert [*tokens[0, len(request.tokens) :].tolist(), vocabulary.eoi] == expected


def test_the_tool_exports_other_roles_and_types(run, tmp_path, monkeypatch, capsys):
    from safetensors import safe_open

    def run_tool(*arguments):
        monkeypatch.setattr(sys, "argv", ["export_hf.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "tools" / "export_hf.py"))["main"]()

    arguments = ["--checkpoint", run / "run", "--vq", run / "vq", "--out", tmp_path / "hf", "--dtype", "bfloat16"]
    run_tool(*arguments, "--shard-size", "0.2MB", "--json", tmp_path / "numbers.json", "plan.preset=himix")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    files = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert numbers["files"] == len(files) > 3 and numbers["form"] == "own" and "bfloat16" in capsys.readouterr().out
    types = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            types |= {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert types.keys() == index["weight_map"].keys() and numbers["tensors"] == len(types)
    assert {dtype for name, dtype in types.items() if not name.startswith("vqmodel.")} == {"BF16"}
    assert {dtype for name, dtype in types.items() if name.startswith("vqmodel.")} == {"F32"}
    roles = json.loads((tmp_path / "hf" / "config.json").read_text())["roles"]
    assert roles == [[["full", "kv_only"], ["full", "full"], ["full", "full"]]] * 4
    for size in ("5", "infGB", "nanGB", "0GB", "-1GB"):
        with pytest.raises(UserError, match=f"--shard-size {size}: expected a number above 0 with KB, MB or GB"):
            run_tool(*arguments, f"--shard-size={size}")


def test_what_cannot_be_exported_is_refused_in_a_line(run, tmp_path):
    with pytest.raises(
        UserError, match=r"--form plain: its plan \(himix_hmgen_share_partial\) has tokens that are not"
    ):
        export(run / "run", tmp_path / "a", form="plain")
    with pytest.raises(UserError, match="is exported with its VQ tokenizer; name its folder"):
        export(run / "run", tmp_path / "a")
    with pytest.raises(UserError, match="already holds a model"):
        export(run / "run", run / "hf", run / "vq")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: is a file; name a folder"):
        export(run / "run", tmp_path / "file", run / "vq")
    with pytest.raises(UserError, match="'plan.dense_share.evaluation' is 0.5: .* plan.dense_share.evaluation=0 or =1"):
        export(run / "run", tmp_path / "a", overrides=["plan.dense_share.of=image_tokens"])
    assert not (tmp_path / "a").exists()
