"""tools/show_data.py: the tree, decoded rows with their learnt tokens, and the numbers."""

import json
import subprocess
import sys

from megatron_ext.data.format import ANSWER, IMAGE, TEXT
from megatron_ext.data.writer import DatasetWriter
from support.programs import ROOT
from support.vocabularies import make_vocabulary


def test_the_tool_shows_the_documents_of_a_row_and_what_is_learnt(tmp_path):
    sentences = ["how many shapes are there", "two"] * 20
    vocabulary = make_vocabulary(tmp_path / "vocabulary", codes=64, sentences=sentences)
    with DatasetWriter(
        tmp_path / "answers", vocabulary.fingerprint, {"fingerprint": "vq", "grid": [2, 3], "codebook_size": 64}, {}
    ) as writer:
        question, answer = vocabulary.encode("how many shapes are there"), vocabulary.encode("two")
        image = [int(vocabulary.image_ids(code)) for code in (9, 8, 7, 6, 5, 4)]
        writer.add([(IMAGE, image), (TEXT, question), (ANSWER, answer)])
    length = 1 + 8 + len(question) + len(answer) + 1
    command = [
        *(sys.executable, "tools/show_data.py", f"data.vocabulary={vocabulary.folder}", "--verify"),
        f"data.train=[{{path: {tmp_path / 'answers'}, task: understanding}}]",
        f"data.sequence_length={2 * length + 5}",
        *("--sample", "10", "--json", tmp_path / "numbers.json"),
    ]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"└── understanding: {tmp_path / 'answers'}" in shown
    assert f"row 0: {2 * length} tokens, 5 padding" in shown
    assert f"{length} tokens, {len(answer) + 1} learnt" in shown
    assert "<bos> <boi> (6 codes: 9 8 7 6 ...) <eoi> how many shapes are there [[two <eod>]]" in shown
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert numbers["documents_per_row"] == 2
    assert numbers["padding"] * (2 * length + 5) == 5
