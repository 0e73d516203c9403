"""Steps of Megatron-Core's pipeline schedules, for pipeline_balance.py.

rows.py          packed rows of drawn documents, and what each part of the model costs for them
compositions.py  which rows of a step share a replica and a micro-batch, in order and composed
ranks.py         small worlds of forked gloo ranks
schedule.py      Megatron-Core's schedule over chunks that call back instead of computing
sleeping.py      the same with chunks that sleep for what layers cost
computing.py     the real model, its passes timed
"""
