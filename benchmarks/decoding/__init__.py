"""What ``benchmarks/decode.py`` times: the documents, and the sides that continue them."""
