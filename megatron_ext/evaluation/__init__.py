"""Benchmarks: readers of the official files and pure scorers, apart from the model that answers.

The way of a score: ``benchmark.read(folder)`` gives the questions as :class:`~.items.Item`; a model's answers are a
file of lines ``{"id": ..., "answer": ...}`` (:mod:`.answers`), whoever wrote it; ``benchmark.score(items, answers)``
turns the two into numbers (:class:`~.items.Scores`), and :mod:`.table` lays several of them side by side::

    pope = benchmark_named("pope")                 # registry.py: gqa, mme, pope, seed
    items = pope.read(Path("data/pope"))
    scores = pope.score(items, read_answers("answers.jsonl").answers)

Nothing here needs a model or a GPU. An answer that is missing or cannot be read is wrong and is counted as such, never
left out, so that scores of models that fail in different ways stay comparable.
"""
