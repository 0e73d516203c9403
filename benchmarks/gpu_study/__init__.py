"""The study that ``benchmarks/gpu_study.sh`` runs on one GPU, and around it

study.yaml       what is compared: a study file of megatron_ext/study, which trains, evaluates, resumes and reports
rehearsal.yaml   laid over it: the same at tiny sizes
preparation.py   the data, packed to be carried to the machine with the GPU
sharing.py       how programs share the GPU, and how many at once
probe.py         what a forked process tries on the GPU
load.py          steps of a stand-in model, which sharing.py counts
rates.py         learning rates by method, from another study's search
order.py         the order of the runs, so that a study that is cut short has whole seeds
page.py          the results as one Markdown page
"""
