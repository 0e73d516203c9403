"""A published model in Hugging Face's format as the start of a run: Llama, Mistral, Qwen2, Qwen3.

``config_json.py`` its shape; ``folder.py`` its files; ``weights.py`` from its tensors to this model's parameters, by
slices; ``loading.py`` the parameters of every rank of a run, and the rows of tokens that it does not have.
"""
