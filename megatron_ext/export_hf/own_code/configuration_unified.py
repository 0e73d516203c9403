"""Configuration of a unified vision-language model whose tokens have roles."""

from transformers import PreTrainedConfig

FULL, KV_ONLY, SKIP = "full", "kv_only", "skip"
"""Roles of a token in a layer. full: query, key, value, FFN. kv_only: key and value; its hidden state stays. skip: it
takes no part."""

UNDERSTANDING, GENERATION, TEXT = 0, 1, 2
"""Uses of a token: in a document that is to be understood (an image that was given), in one that is generated (an image
that is drawn), in plain text."""


class UnifiedConfig(PreTrainedConfig):
    """A Llama over text and VQ image tokens, with these settings beside Llama's own:

    Args:
        qkv_bias, qk_norm: biases of queries, keys and values (as in Qwen 2); norms of queries and keys (as in Qwen 3).
        roles: [layer][use][modality] of :data:`FULL`, :data:`KV_ONLY`, :data:`SKIP`; modality 0 is text, 1 image.
        projections: the matrices that image tokens have for themselves. ``components``: their names, none, ``image``,
            or ``understanding`` and ``generation``; ``modules``: the layers' linear layers that have them; ``rank``: of
            their differences from text's matrix, None where they are whole matrices.
        max_image_tokens: learned embeddings of a token's place in its image; 0: none.
        image_offset, codebook_size: VQ code c is the token ``image_offset`` + c.
        boi_token_id, eoi_token_id: stand before and after an image's codes.
        image_token_id: stands for a code until the model has encoded the picture.
        text_size: tokens of text are those below.
        grid, image_size: rows and columns of an image's codes; its height and width in pixels.
        vq_config: of the VQ network (None: the folder has none); ``vq_fingerprint`` identifies its weights.
    """

    model_type = "unified_vlm"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=None,
        head_dim=None,
        rms_norm_eps=1e-5,
        rope_parameters=None,
        max_position_embeddings=2048,
        qkv_bias=False,
        qk_norm=False,
        roles=None,
        projections=None,
        max_image_tokens=0,
        image_offset=260,
        codebook_size=252,
        boi_token_id=258,
        eoi_token_id=259,
        image_token_id=512,
        text_size=256,
        grid=(4, 4),
        image_size=(16, 16),
        vq_config=None,
        vq_fingerprint=None,
        use_cache=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        self.max_position_embeddings = max_position_embeddings
        self.qkv_bias, self.qk_norm = qkv_bias, qk_norm
        self.roles = roles or [[[FULL, FULL] for _ in range(3)] for _ in range(num_hidden_layers)]
        self.projections = projections or {"components": [], "modules": [], "rank": None}
        self.max_image_tokens = max_image_tokens
        self.image_offset, self.codebook_size = image_offset, codebook_size
        self.boi_token_id, self.eoi_token_id, self.image_token_id = boi_token_id, eoi_token_id, image_token_id
        self.text_size = text_size
        self.grid, self.image_size = list(grid), list(image_size)
        self.vq_config, self.vq_fingerprint = vq_config, vq_fingerprint
        self.use_cache = use_cache
        super().__init__(**kwargs)
