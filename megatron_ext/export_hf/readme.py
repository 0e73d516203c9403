"""The README.md of an exported folder."""

from pathlib import Path

from megatron_ext.export_hf.form import STOCK_CLASSES, Exported
from megatron_ext.vq.model import VQModel


def text(exported: Exported, form: str, checkpoint: Path, vq: VQModel | None) -> str:
    """What the folder holds and how to use it."""
    vocabulary = exported.vocabulary
    head = (
        f"# A unified vision-language model\n\n"
        f"Exported from the checkpoint `{checkpoint.name}` by unified-megatron (plan `{exported.plan.name}`, "
        f"{exported.dtype}). It reads and writes text and VQ image tokens: code c is the token "
        f"{vocabulary.image_offset} + c, {vocabulary.codebook_size} codes, between `<boi>` ({vocabulary.boi}) and `<eoi>` "
        f"({vocabulary.eoi}). Documents begin with the token {vocabulary.bos}; answers end with {vocabulary.answer_end}.\n\n"
    )
    license = (
        "\n## License\n\nThe `*_unified.py` files are under Apache 2.0. The weights are under the licenses of what they "
        "were trained from: the language model, the VQ tokenizer and the training data. State them here before you "
        "publish this folder.\n"
        if form == "own"
        else "\n## License\n\nThe weights are under the licenses of what they were trained from: the language model and "
        "the training data. State them here before you publish this folder.\n"
    )
    return head + (_OWN if form == "own" else _plain(exported)) + license


def _plain(exported: Exported) -> str:
    class_name = STOCK_CLASSES[exported.model.qkv_bias, exported.model.qk_norm][1]
    return (
        f"The model is a stock `{class_name}`: transformers and engines for such models load it without any code of its "
        "own. Pictures go in and come out as token ids; the VQ tokenizer that makes and reads them is outside. The chat "
        "template writes prompts as in training.\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")\n'
        'prompt = tokenizer.apply_chat_template([{"role": "user", "content": "..."}], return_tensors="pt", '
        "return_dict=True)\n"
        'ids = model.generate(**prompt, max_new_tokens=32)[:, prompt["input_ids"].shape[1] :]\n'
        "print(tokenizer.batch_decode(ids, skip_special_tokens=True))\n"
        "```\n"
    )


_OWN = """\
Needs transformers >= 5.0, torch and Pillow. The model is in plain torch in `modeling_unified.py`, so loading it takes
`trust_remote_code=True`.

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(".", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(".", trust_remote_code=True)
question = [{"type": "image"}, {"type": "text", "text": "What is on the table?"}]
prompt = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
inputs = processor(text=prompt, images=[Image.open("photo.jpg")])
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=32)[:, inputs["input_ids"].shape[1] :],
                             skip_special_tokens=True))
inputs = processor(text=["two red cubes"], generation_mode="image")
tokens = model.generate(**inputs, generation_mode="image", guidance_scale=3.0, seed=0)
processor.post_process_multimodal_output(model.decode_image_tokens(tokens), generation_mode="image")[0].save("cubes.png")
```

`guidance_scale`, `temperature`, `top_k`, `top_p`, `seed` and `numbers` give the same pictures as this project's
`tools/generate.py`. `generation_mode="interleaved"` writes text and pictures in turn.
"""
