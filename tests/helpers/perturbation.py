"""How outputs move with inputs, of a layer or a whole decoder."""

import tiny
import torch

from linmu_hf.modeling.layout.token_layout import TokenLayout


def moved(function, embeds):
    """[t, t]: by how much each output row moves when one input row is replaced; a batch of one sequence."""
    t = embeds.shape[1]
    inputs = embeds.repeat(t + 1, 1, 1)
    inputs[torch.arange(t), torch.arange(t)] += torch.randn(t, embeds.shape[2], dtype=embeds.dtype)
    with torch.no_grad():
        outputs = function(inputs)
    return (outputs[:t] - outputs[t]).abs().amax(-1).T


def layer_function(layer_idx, positions, layout, mask, **options):
    model = tiny.model(**options).model.language_model

    def function(x):
        b, t, _ = x.shape
        rope = model.rotary_emb(x, positions.expand(3, b, -1))
        tokens = TokenLayout.build(model.config, b, t, x.device, mask.expand(b, -1), layout.expand(b, -1, -1))
        return model.layers[layer_idx].mixer(x, rope, tokens)

    return function
