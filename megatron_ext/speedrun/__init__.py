"""The synergy speedrun: how cheap unified training becomes before the tasks stop helping each other (docs/speedrun.md).

::

    frozen.py        what is the same for all: world, model, tokens, evaluation, caps
    submission.py    a YAML of open keys -> a configuration, a digest, seeds
    commit.py        the code that a row is about
    origin.py        commit, code and data of a row
    questions.py     questions and captions of a round
    experiment.py    the runs, by megatron_ext.study; FLOPs and time
    figures.py       answers and pictures -> figures above chance
    score.py         figures relative to dense -> a score
    leaderboard.py   rows and their table
    speedrun.py      all of it, in order
"""
