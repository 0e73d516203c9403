"""The attributes of objects and backgrounds, and the names of places."""

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "moon")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
COMPOSED_SHAPES = ("star", "heart", "diamond", "moon")
COMPOSED_COLORS = ("purple", "green", "yellow", "pink")
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
