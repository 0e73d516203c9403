"""What a run needs on given devices: memory, messages and time of every layout, and the layouts that fit.

``workload.py`` counts the tokens of sampled rows; ``memory.py`` gives the bytes of each rank, ``traffic.py`` those of
its messages, ``kernels.py`` the seconds of its products and ``step_time.py`` those of a step, for a configuration on
some number of ``devices.py``. ``search.py`` goes through the layouts, ``report.py`` prints them, ``calibration.py``
measures the device that it runs on. All but the last compute with plain numbers.
"""
