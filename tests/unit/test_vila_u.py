"""A published VILA-U as the start of a run: every part computes what it does there, or is named as left out."""

import dataclasses
import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext import config_file
from megatron_ext.checkpoints.checkpointer import Checkpointer
from megatron_ext.config import Config
from megatron_ext.conversion.vila_u import convert_vila_u, left_out_by_kind
from megatron_ext.data.batch import Batch
from megatron_ext.errors import UserError
from megatron_ext.export_hf.vila_u import export_vila_u
from megatron_ext.generation.checkpoint import load
from megatron_ext.routing.plan import Plan
from megatron_ext.routing.route import Route
from megatron_ext.training.run import identity_of
from megatron_ext.transformer.resolved import resolve
from megatron_ext.vocabulary import Vocabulary
from support.vila_u import write_vila_u

TOOLS = Path(__file__).parents[2] / "tools"
LENGTH, DEPTH, CODES, HEADS = 301, 4, 24, 4


def run_tool(name: str, *arguments) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(TOOLS / name))["main"]()


class Imported:
    """A folder in VILA-U's layout and what the tool made of it."""

    def __init__(self, folder: Path):
        self.folder, self.out = folder / "vila-u", folder / "start"
        self.llm = write_vila_u(self.folder)
        run_tool("convert_hf.py", "--vila-u", self.folder, "--out", self.out, "--json", folder / "numbers.json")
        self.numbers = json.loads((folder / "numbers.json").read_text())
        self.vocabulary = Vocabulary(self.out / "vocabulary")

    def tensors(self, part: str) -> dict[str, torch.Tensor]:
        return tensors(self.folder / part)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    return Imported(tmp_path_factory.mktemp("vila-u"))


@pytest.fixture
def model(one_process, imported):
    return load(imported.out / "iter_0000000", []).model


@torch.no_grad()
def test_logits_of_text_are_llama_s_with_linear_scaling(model, imported):
    vocabulary = imported.vocabulary
    theirs = torch.randint(0, vocabulary.text_size, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    theirs[0, 5], theirs[0, 6] = vocabulary.text_size, vocabulary.text_size + 1
    ours = theirs.clone()
    ours[0, 5], ours[0, 6] = vocabulary.boi, vocabulary.eoi
    batch = Batch.zeros(1, LENGTH)
    batch.tokens, batch.positions = ours, torch.arange(LENGTH)[None]
    batch.codes = torch.zeros(1, LENGTH, DEPTH, dtype=torch.int32)
    route = Route.of(batch, Plan.of(Config().plan, 2), logit_mask=torch.ones(1, LENGTH, dtype=torch.bool))
    logits = model(route, hidden_rows=True)[0][:, 0]
    expected = imported.llm(theirs).logits[0]
    assert expected.std() > 0.1
    size = vocabulary.text_size
    torch.testing.assert_close(logits[:, :size], expected[:, :size], atol=1e-5, rtol=1e-5)
    # <pad> is <unk> there, <eod> is </s>, an image lies between VILA-U's own tokens.
    special = [vocabulary.pad, vocabulary.eod, vocabulary.boi, vocabulary.eoi]
    torch.testing.assert_close(logits[:, special], expected[:, [0, 2, size, size + 1]], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_projector_and_depth_head_are_plain_torch_over_the_published_tensors(model, imported):
    tower, projector = imported.tensors("vision_tower"), imported.tensors("mm_projector")
    codes = torch.randint(0, CODES, (7, DEPTH), generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(7, 64, generator=torch.Generator().manual_seed(2))
    book = tower["rqvaesiglip.quantizer.codebooks.0.weight"]

    mlp = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
    mlp.load_state_dict({name.removeprefix("layers."): tensor for name, tensor in projector.items()})
    expected = mlp(book[codes].sum(1))
    torch.testing.assert_close(model.projector(model.code_vectors(codes)), expected, atol=1e-5, rtol=1e-5)

    expected = plain_depth_transformer(tower, hidden, book[codes].cumsum(1)[:, :-1])
    logits = model.depth_head.logits(hidden, codes, model.code_vectors)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def plain_depth_transformer(tower: dict[str, torch.Tensor], hidden: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Logits [n, D, K] by torch's own layers, from hidden states [n, h] and sums of code vectors [n, D - 1, e]."""
    weights = {n.removeprefix("rqtransformer."): t for n, t in tower.items() if n.startswith("rqtransformer.")}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = torch.cat([linear("in_mlp_2", hidden)[:, None], linear("in_mlp_1", sums)], 1) + weights["pos_emb_d"]
    mask = torch.nn.Transformer.generate_square_subsequent_mask(DEPTH)
    for number in range(2):
        block = {n.split(f"blocks.{number}.")[1]: t for n, t in weights.items() if f"blocks.{number}." in n}
        layer = torch.nn.TransformerEncoderLayer(32, HEADS, 128, 0.0, "gelu", batch_first=True, norm_first=True)
        names = {
            "norm1": "ln1",
            "norm2": "ln2",
            "linear1": "mlp.0",
            "linear2": "mlp.2",
            "self_attn.out_proj": "attn.proj",
        }
        state = {
            f"{own}.{kind}": block[f"{there}.{kind}"] for own, there in names.items() for kind in ("weight", "bias")
        }
        for kind in ("weight", "bias"):
            state[f"self_attn.in_proj_{kind}"] = torch.cat(
                [block[f"attn.{x}.{kind}"] for x in ("query", "key", "value")]
            )
        layer.load_state_dict(state)
        x = layer(x, mask)
    norm = weights["classifier_mlp.layer_norm.weight"], weights["classifier_mlp.layer_norm.bias"]
    return linear("classifier_mlp.linear", torch.nn.functional.layer_norm(x, x.shape[-1:], *norm))


def test_every_tensor_and_row_is_used_or_named(imported):
    numbers = imported.numbers
    unused = numbers["left_out"]["tensors"]
    for part in ("llm", "mm_projector", "vision_tower"):
        names = imported.tensors(part)
        assert numbers["tensors"][part] == len(names) - len(set(unused) & names.keys())
    assert set(unused) <= imported.tensors("vision_tower").keys()
    kinds = (".text_model.", ".vision_model.head.", ".post_layernorm.", ".encoder.layers.1.", "logit_", "_ema")
    assert all(any(kind in name for kind in kinds) for name in unused)
    counts = left_out_by_kind(unused)
    assert sum(counts.values()) == len(unused) and counts["rqvaesiglip.quantizer.codebooks.N.embed_ema"] == DEPTH
    assert counts["rqvaesiglip.siglip_model.vision_model.encoder.layers.1"] == 16
    assert numbers["left_out"]["rows"] == ["<vi_start> (402)", "<vi_end> (403)"]
    assert numbers["rows"] == {"published": 404, "new": 0, "padding": 108, "left_out": 2}
    config = config_file.load(Config, [imported.out / "model.yaml"])
    assert config.model.rotary_interpolation_factor == 2.0
    assert config.model.image_codes.codebook == str(imported.folder / "vision_tower")


def test_the_written_shape_leaves_how_the_head_is_computed_to_the_run(imported, tmp_path):
    (tmp_path / "own.yaml").write_text("model: {image_codes: {head: {chunk: 7}}}")
    model = config_file.load(Config, [tmp_path / "own.yaml", imported.out / "model.yaml"]).model
    assert (model.image_codes.head.chunk, model.image_codes.head.hidden_size) == (7, 32)


def test_what_is_imported_is_exported_bit_for_bit(imported, tmp_path):
    out = tmp_path / "again"
    checkpoint = ("--checkpoint", imported.out / "iter_0000000")
    run_tool("export_hf.py", *checkpoint, "--vila-u", imported.folder, "--out", out)
    for part in ("llm", "mm_projector", "vision_tower"):
        published, exported = imported.tensors(part), tensors(out / part)
        assert exported.keys() == published.keys()
        assert all(torch.equal(exported[name], tensor) for name, tensor in published.items())
    files = {file.relative_to(imported.folder) for file in imported.folder.rglob("*.json")}
    files = {file for file in files if "index" not in file.name} | {Path("llm/tokenizer.model")}
    assert all((out / file).read_bytes() == (imported.folder / file).read_bytes() for file in files)
    with pytest.raises(UserError, match=f"^{out}: is not an empty folder"):
        run_tool("export_hf.py", *checkpoint, "--vila-u", imported.folder, "--out", out)
    with pytest.raises(SystemExit, match="2"):
        run_tool("export_hf.py", *checkpoint, "--vila-u", imported.folder, "--vq", imported.folder, "--out", out)


def test_what_was_trained_is_exported_and_the_rest_stays(one_process, imported, tmp_path):
    trained = load(imported.out / "iter_0000000", [])
    for parameter in trained.model.parameters():
        parameter.data.add_(1)
    state = {"progress": {}, "data": None, **identity_of(resolve(trained.config), imported.vocabulary)}
    state["config"] = dataclasses.asdict(trained.config)
    Checkpointer(tmp_path / "run" / "checkpoints", keep=0).save(1, [trained.model], None, state)
    export_vila_u(tmp_path / "run", imported.folder, tmp_path / "again")
    for part in ("llm", "mm_projector", "vision_tower"):
        exported = tensors(tmp_path / "again" / part)
        for name, published in imported.tensors(part).items():
            change = exported[name] - published
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                assert torch.equal(change[-2:], torch.zeros_like(change[-2:]))  # <vi_start>, <vi_end>
                change = change[:-2]
            expected = torch.zeros_like(change) if name.startswith("rqvaesiglip.") else torch.ones_like(change)
            torch.testing.assert_close(change, expected)

    export_vila_u(tmp_path / "run", imported.folder, tmp_path / "half", dtype="bfloat16")
    for part, key, name in (("llm", "dtype", "bfloat16"), (".", "model_dtype", "torch.bfloat16")):
        assert json.loads((tmp_path / "half" / part / "config.json").read_text())[key] == name
    assert {tensor.dtype for tensor in tensors(tmp_path / "half" / "llm").values()} == {torch.bfloat16}

    with pytest.raises(UserError, match="cannot take VILA-U's layout: its plan .himix. has tokens that are not FULL"):
        export_vila_u(tmp_path / "run", imported.folder, tmp_path / "other", overrides=["plan.preset=himix"])
    other = shutil.copytree(imported.folder, tmp_path / "vila-u")
    change_tensors(other / "vision_tower", lambda t: t.update({"rqvaesiglip.post_quant_conv.bias": torch.ones(32)}))
    with pytest.raises(UserError, match="its model.image_codes is .*; name the folder that it started from"):
        export_vila_u(tmp_path / "run", other, tmp_path / "other")


def test_one_type_of_numbers_stays(one_process, tmp_path):
    write_vila_u(tmp_path / "vila-u", torch.bfloat16)
    assert convert_vila_u(tmp_path / "vila-u", tmp_path / "start")["precision"] == "bf16"
    model = load(tmp_path / "start" / "iter_0000000", []).model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.code_vectors.weight.dtype == torch.float32


def change_json(file: Path, change) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def change_tensors(folder: Path, change) -> None:
    changed = tensors(folder)
    change(changed)
    save_file(changed, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            "config.json",
            lambda c: c.update(model_type="llava"),
            "'model_type' is 'llava', must be 'vila_u_",
        ),
        ("mm_projector/config.json", lambda c: c.update(mm_projector_type="linear"), "supports only 'mlp2x_gelu'"),
        ("mm_projector", lambda t: t.pop("layers.2.bias"), "mm_projector: lacks the parameter layers.2.bias"),
        ("mm_projector", lambda t: t.update({"layers.4.bias": torch.ones(2)}), "the parameter layers.4.bias, which is"),
        (
            "vision_tower/config.json",
            lambda c: c["rqtransformer"].pop("head"),
            "'rqtransformer.head.n_layer' is miss",
        ),
        (
            "vision_tower/config.json",
            lambda c: c["rqtransformer"].update(input_embed_dim_2=48),
            "'rqtransformer.input_embed_dim_2' is 48, the hidden size of .*llm is 64",
        ),
        (
            "vision_tower",
            lambda t: t.pop("rqtransformer.in_mlp_1.bias"),
            "lacks the parameter rqtransformer.in_mlp",
        ),
        (
            "vision_tower",
            lambda t: t.update({"rqtransformer.pos_emb_d": torch.ones(1, 3, 32)}),
            r"rqtransformer.pos_emb_d has the shape \[1, 3, 32\], by config.json it is \[1, 4, 32\]",
        ),
        (
            "vision_tower",
            lambda t: t.update({"rqvaesiglip.quantizer.codebooks.2.weight": torch.ones(25, 32)}),
            "codebooks.2.weight differs from",
        ),
        (
            "vision_tower/config.json",
            lambda c: c["rqtransformer"].update(block_size=4),
            r"'rqtransformer.block_size' is 4, must be \[rows, columns, codes\]",
        ),
        (
            "vision_tower/config.json",
            lambda c: c["rqtransformer"].update(embed_dim="32"),
            "'rqtransformer.embed_dim' is '32', must be a whole number",
        ),
        ("llm/added_tokens.json", lambda c: c.update({"<im_end>": "x"}), "'<im_end>' is 'x', must be a whole number"),
        ("llm/added_tokens.json", lambda c: c.pop("<im_end>"), "added_tokens.json: '<im_end>' is missing"),
        (
            "llm/added_tokens.json",
            lambda c: c.update({"<im_end>": 404}),
            "'<im_end>' is 404, the embedding has 404",
        ),
        ("llm/added_tokens.json", lambda c: c.update({"<im_end>": 7}), "has 400 tokens, but the ids of <im_start> and"),
    ],
)
def test_what_does_not_fit_is_named(imported, tmp_path, part, change, message):
    folder = shutil.copytree(imported.folder, tmp_path / "vila-u")
    (change_json if part.endswith(".json") else change_tensors)(folder / part, change)
    with pytest.raises(UserError, match=f"^{folder}/?.*{message}"):
        convert_vila_u(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
