"""A vocabulary and a data set that take a second to write, and the configuration of a run over them."""

from pathlib import Path

import numpy as np
import sentencepiece
import yaml

from megatron_ext.data.format import ANSWER, IMAGE
from megatron_ext.data.writer import DatasetWriter
from megatron_ext.vocabulary import Vocabulary

WORDS = "is there a red green blue circle square left right of above below how many yes no one two"
CODES, IMAGE_TOKENS = 32, 16


def write_config(folder: Path, rehearsal: bool) -> Path:
    """Write the data and the configuration into ``folder`` and return the path of the configuration."""
    random = np.random.default_rng(0)
    sentences = [" ".join(random.choice(WORDS.split(), random.integers(4, 12))) for _ in range(400)]
    (folder / "text.txt").write_text("\n".join(sentences))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=40, minloglevel=2
    )
    vocabulary = Vocabulary.create(folder / "vocabulary", folder / "tokenizer.model", CODES)
    images = {"fingerprint": "none", "grid": [1, IMAGE_TOKENS], "codebook_size": CODES}
    with DatasetWriter(folder / "pairs", vocabulary.fingerprint, images, {"made_by": "gpu_check"}) as writer:
        for sentence in sentences:
            # Half of the codes follow from the length of the sentence: something to learn within a few steps.
            codes = random.integers(0, CODES, IMAGE_TOKENS)
            codes[::2] = len(sentence) % CODES
            answer = np.array(vocabulary.encode_segment(sentence), np.int32)
            writer.add([(IMAGE, vocabulary.image_ids(codes).astype(np.int32)), (ANSWER, answer)])
    shape = {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "num_query_groups": 2}
    tiny = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    config = {
        "model": {**(tiny if rehearsal else shape), "implementation": "local"},
        "plan": {"preset": "himix_hmgen_share_partial"},
        "data": {
            "vocabulary": str(folder / "vocabulary"),
            "train": [{"path": str(folder / "pairs"), "task": task} for task in ("understanding", "generation")],
            "sequence_length": 128 if rehearsal else 512,
            "loader": "plain",
            "workers": 0,
        },
        "training": {"micro_batch_size": 2, "global_batch_size": 4, "precision": "bf16"},
        "optimizer": {"lr": 2e-3, "warmup_iterations": 2},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"
