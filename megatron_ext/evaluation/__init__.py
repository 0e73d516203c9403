"""Benchmarks: readers of the released files and pure scorers, independent of the model that answers.

``benchmark.read(folder)`` returns the questions as :class:`~.benchmark.Item`. A model's answers are a file of lines
``{"id": ..., "answer": ...}`` (:mod:`.answers`). ``benchmark.score(items, answers)`` turns both into
:class:`~.benchmark.Scores`, and :mod:`.score_table` shows several of them side by side::

    pope = benchmark_named("pope")                 # registry.py: gqa, mme, pope, seed
    items = pope.read(Path("data/pope"))
    scores = pope.score(items, read_answers("answers.jsonl").answers)

Scoring needs neither a model nor a GPU. Missing and unreadable answers are wrong and counted as such, never left out,
so that scores of models that fail in different ways stay comparable.

Generated pictures: :mod:`.mjhq` (prompts), :mod:`.picture_scorer` (all scores of a folder), :mod:`.fid`, :mod:`.clip`,
:mod:`.scene_check`, :mod:`.faithfulness` and :mod:`.detected_files` (whether pictures of the picture world show their
captions); :mod:`.edits` (whether edited pictures show their instructions, and what they should keep).
:mod:`.kinds` counts right answers by kind of question, beside chance.
:mod:`.answer_generation` and :mod:`.picture_generation` ask a model.
"""
