"""The attributes of objects and backgrounds, and the names of places."""

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "moon")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
COMPOSED_SHAPES = ("circle", "square", "heart", "moon", "diamond", "star")
COMPOSED_COLORS = ("orange", "blue", "green", "pink", "yellow", "purple")
"""Those of the compositional world."""
SIZES = ("small", "large")
PLACES = (
    ("top left", "top center", "top right"),
    ("center left", "center", "center right"),
    ("bottom left", "bottom center", "bottom right"),
)
"""Names of the grid's cells, by row and column."""
BACKGROUND_COLORS = ("gray", "beige", "mint", "lavender", "navy")
BACKGROUND_PATTERNS = ("plain", "striped", "checkered", "dotted", "shaded")
