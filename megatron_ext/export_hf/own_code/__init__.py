"""Files that go into an exported folder as they are: they import torch, Pillow and transformers alone."""
