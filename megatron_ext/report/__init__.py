"""A finished or running training run as one page: what it is, how it went, what to do next.

::

    run folder, VQ folder -> gather.Facts -> content.sections: plain blocks -> html.render      one file
                                                                            -> markdown.write   pictures beside it
"""
