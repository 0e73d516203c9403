from enum import Enum


class Format(Enum):
    E4M3 = "E4M3"
    HYBRID = "HYBRID"


class Recipe:
    def __init__(self, **ignored):
        pass

    def delayed(self) -> bool:
        return isinstance(self, DelayedScaling)


class DelayedScaling(Recipe):
    amax_history_len = 4

    def __repr__(self) -> str:
        return "DelayedScaling"


class Float8CurrentScaling(Recipe):
    pass


class Float8BlockScaling(Recipe):
    pass


class MXFP8BlockScaling(Recipe):
    pass


class NVFP4BlockScaling(Recipe):
    pass
