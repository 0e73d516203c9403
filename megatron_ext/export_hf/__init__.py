"""A trained checkpoint as a Hugging Face folder.

``form.py`` which form a model can take: a stock class, or ``own_code/``, the model in plain torch, which goes into the
folder; ``weights.py`` parameters under Hugging Face's names; ``shards.py`` safetensors, written one tensor at a time;
``tokenizer_files.py`` the tokenizer with the special tokens and the chat template; ``vq_files.py`` the VQ tokenizer;
``write.py`` the whole folder.
"""
