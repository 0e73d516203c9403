class FusibleOperation:
    pass


Sequential = FusibleOperation
