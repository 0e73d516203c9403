"""A page about a finished or running training run: its settings, its course, commands to try next.

::

    run folder, VQ folder -> gather.RunData -> content.content: numbers, rows, charts -> templates/

    templates/content.j2      the words and their order, in HTML and in Markdown
    templates/blocks.html.j2  headings, tables, figures ... in HTML (page.html.j2 around them, page.css)
    templates/blocks.md.j2    the same in Markdown
    templates/*.svg.j2        charts and the roles of a plan (svg.css: colours, chart.mplstyle: the lines of charts)
"""
