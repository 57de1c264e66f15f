"""Small models of many families with random weights."""

import torch
import transformers
from torch import nn

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 160,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def small_model(model_type: str, dtype: torch.dtype = torch.float32, **more: object) -> nn.Module:
    config = transformers.AutoConfig.for_model(model_type, **{**SMALL, **more})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():  # norms begin at one: make them differ
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model.to(dtype).requires_grad_(False).eval()
