"""Extensions of Megatron-Core's Transformer: the layer, its module specs, and the model with the unified vocabulary."""
