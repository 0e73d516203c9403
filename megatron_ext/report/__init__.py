"""A page about a finished or running training run: what the model can do, what it cost, how it was trained, what next.

::

    run folder, VQ folder, benchmarks -> gather.RunData -> content.content: numbers, rows, charts -> templates/

    scores.py                 answers by kind of question, pictures fact by fact (results.py: their rows)
    evaluation.py             the same from evaluations during training, for a run without scores
    costs.py                  FLOPs per token of the plan and of others
    documents.py, cards.py    pictures with a text each

    templates/content.j2      the words and their order, in HTML and in Markdown
    templates/blocks.html.j2  headings, tables, figures ... in HTML (page.html.j2 around them, page.css)
    templates/blocks.md.j2    the same in Markdown
    templates/*.svg.j2        charts and the roles of a plan (svg.css: colours, chart.mplstyle: the lines of charts)
"""
