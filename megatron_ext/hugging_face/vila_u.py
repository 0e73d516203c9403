"""A published folder of VILA-U (arXiv 2409.04429) as ``save_pretrained`` of its own code writes it.

::

    config.json       model_type vila_u_llama
    llm/              a Llama, with tokenizer.model and added_tokens.json: four more tokens, <im_start> and the like
    mm_projector/     from code vectors to embeddings: two linear layers
    vision_tower/     the VQ tokenizer (:mod:`megatron_ext.vq.vila_u`) and, beside it, the depth head
"""

from pathlib import Path

from torch import Tensor

from megatron_ext.errors import UserError
from megatron_ext.files import read_json
from megatron_ext.hugging_face import vila_u_weights
from megatron_ext.hugging_face.folder import ModelFolder
from megatron_ext.hugging_face.tensor_files import TensorFiles
from megatron_ext.model_config import DepthHeadConfig, ImageCodesConfig
from megatron_ext.text_model import SENTENCEPIECE
from megatron_ext.transformer.initialization import shard
from megatron_ext.vocabulary import Vocabulary

MODEL_TYPE, LLM, PROJECTOR, TOWER = "vila_u_llama", "llm", "mm_projector", "vision_tower"
PROJECTOR_TYPE, ADDED_TOKENS = "mlp2x_gelu", "added_tokens.json"
IMAGE_TOKENS = ("<im_start>", "<im_end>")


class VilaUFolder(ModelFolder):
    """A VILA-U's shape, with several codes an image token, and its tensors by name, without the VQ tokenizer's.

    Attributes:
        root: the published folder; ``folder`` is its ``llm``.
        text_file: Llama's ``tokenizer.model``.
        added_tokens: id of each token that VILA-U added to Llama's.
        files: the tensors, by the name of the folder in ``root``.
    """

    def __init__(self, root: Path):
        """
        Raises:
            UserError: names a missing or damaged file, or a setting that this project's model cannot express.
        """
        self.root = Path(root)
        if not self.root.is_dir():
            raise UserError(f"{root}: not a folder of a published model")
        file = self.root / "config.json"
        if (kind := _value(file, "model_type")) != MODEL_TYPE:
            raise UserError(f"{file}: 'model_type' is {kind!r}, must be {MODEL_TYPE!r}")
        super().__init__(self.root / LLM)
        self.name = self.root.name
        file = self.root / PROJECTOR / "config.json"
        if (kind := _value(file, "mm_projector_type")) != PROJECTOR_TYPE:
            raise UserError(f"{file}: 'mm_projector_type' is {kind!r}, this model supports only {PROJECTOR_TYPE!r}")
        self.model.image_codes = self._image_codes()
        self.files = {name: TensorFiles(self.root / name) for name in (PROJECTOR, TOWER)} | {LLM: self._tensors}
        types = set()
        for name, shapes in vila_u_weights.tensor_shapes(self.model).items():
            types |= self.files[name].check(shapes)
        for part, prefix in ((PROJECTOR, ""), (TOWER, vila_u_weights.HEAD)):
            known = vila_u_weights.tensor_shapes(self.model)[part]
            for name in sorted(set(self.files[part]) - known.keys()):
                if name.startswith(prefix):
                    raise UserError(f"{self.files[part].file(name)}: has the parameter {name}, which is not known")
        if types != {"BF16"}:
            self.precision = "float32"
        self.text_file = self.folder / SENTENCEPIECE
        self.added_tokens = self._added_tokens()

    def parameter(self, name: str, rank: int, size: int) -> Tensor | None:
        whole = vila_u_weights.read_parameter(self.files, self.model.image_codes.head, name)
        return super().parameter(name, rank, size) if whole is None else shard(whole, name)

    def special_rows(self, vocabulary: Vocabulary) -> dict[int, int]:
        """``<pad>`` with that of ``<unk>``, which VILA-U pads with, and images between VILA-U's own tokens."""
        begin, end = (self.added_tokens[name] for name in IMAGE_TOKENS)
        return super().special_rows(vocabulary) | {
            vocabulary.pad: vocabulary.text.id("<unk>"),
            vocabulary.boi: begin,
            vocabulary.eoi: end,
        }

    def _image_codes(self) -> ImageCodesConfig:
        """The depth head's shape; what the VQ tokenizer says, its fingerprint, is left empty."""
        file = self.root / TOWER / "config.json"
        block = _value(file, "rqtransformer.block_size")
        if not isinstance(block, list) or len(block) != 3 or not all(type(n) is int and n > 0 for n in block):
            raise UserError(f"{file}: 'rqtransformer.block_size' is {block!r}, must be [rows, columns, codes]")
        codes = ImageCodesConfig(
            depth=block[-1],
            codebook=str(self.root / TOWER),
            codebook_size=_number(file, "rqtransformer.vocab_size", 1),
            width=_number(file, "rqtransformer.input_embed_dim_1", 1),
            head=DepthHeadConfig(
                num_layers=_number(file, "rqtransformer.head.n_layer", 1),
                hidden_size=_number(file, "rqtransformer.embed_dim", 1),
                num_attention_heads=_number(file, "rqtransformer.head.block.n_head", 1),
            ),
        )
        if (width := _value(file, "rqtransformer.input_embed_dim_2")) != self.model.hidden_size:
            raise UserError(
                f"{file}: 'rqtransformer.input_embed_dim_2' is {width}, the hidden size of {self.folder} is "
                f"{self.model.hidden_size}"
            )
        return codes

    def _added_tokens(self) -> dict[str, int]:
        if not self.text_file.is_file():
            raise UserError(f"{self.text_file}: not found")
        file = self.folder / ADDED_TOKENS
        around_images = {name: _number(file, name, 0) for name in IMAGE_TOKENS}
        for name, i in around_images.items():
            if i >= self.vocab_size:
                raise UserError(f"{file}: '{name}' is {i}, the embedding has {self.vocab_size} rows")
        others = {name: _number(file, name, 0) for name in read_json(file)}
        return {name: i for name, i in others.items() if i < self.vocab_size} | around_images


def _number(file: Path, key: str, least: int) -> int:
    """:func:`_value`, a whole number."""
    value = _value(file, key)
    if type(value) is not int or value < least:
        raise UserError(f"{file}: '{key}' is {value!r}, must be a whole number, at least {least}")
    return value


def _value(file: Path, key: str):
    """The value of a key, with dots for sections of sections, in a JSON file."""
    if not file.is_file():
        raise UserError(f"{file}: not found")
    value = read_json(file)
    for part in key.split("."):
        if not isinstance(value, dict) or value.get(part) is None:
            raise UserError(f"{file}: '{key}' is missing")
        value = value[part]
    return value
