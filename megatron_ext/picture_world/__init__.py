"""The picture world: procedural scenes with captions and questions, for training and testing on a laptop.

* Content: :mod:`.attributes`, :mod:`.splits` (with the held-out combinations), :mod:`.world` (scenes), :mod:`.render`
  (their pixels).
* Text: :mod:`.captions`, :mod:`.questions`, :mod:`.multiple_choice`, :mod:`.conversations`.
* Files: :mod:`.split_files` (data sets in the formats of real data), :mod:`.benchmark_files` (in the formats of real
  benchmarks), :mod:`.contact_sheet`.
* Checking generated pictures: :mod:`.detection` (objects from pixels), :mod:`.facts` (facts of a caption),
  :mod:`.check` (one against the other).
"""
