"""The same numbers as implementations nobody here wrote, copied weight for weight."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from mythoslab.recurrence import Block, RMSNorm


def test_norm_equals_torch_and_llama():
    x, weight = torch.randn(2, 5, 24), torch.rand(24)
    ours, theirs = RMSNorm(24, eps=1e-5), LlamaRMSNorm(24, eps=1e-5)
    ours.load_state_dict({"weight": weight})
    theirs.load_state_dict({"weight": weight})
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert torch.allclose(ours(x), F.rms_norm(x, (24,), weight, 1e-5), atol=1e-6)


@pytest.mark.parametrize("dim, n_heads, hidden_dim, n_positions, theta", [(32, 4, 48, 9, 10000.0), (48, 2, 40, 33, 500.0)])
def test_block_equals_llama_in_outputs_and_gradients(dim, n_heads, hidden_dim, n_positions, theta):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=dim,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        intermediate_size=hidden_dim,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        attn_implementation="sdpa",
    )
    theirs = LlamaDecoderLayer(config, 0)
    ours = Block(dim, n_heads, hidden_dim, rope_theta=theta)
    with torch.no_grad():
        for norm in (theirs.input_layernorm, theirs.post_attention_layernorm):
            norm.weight.uniform_(0.5, 1.5)
        attention, mlp = theirs.self_attn, theirs.mlp
        ours.attention.qkv.weight.copy_(
            torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight))
        )
        for mine, yours in (
            (ours.attention.out, attention.o_proj),
            (ours.ffn.gate, mlp.gate_proj),
            (ours.ffn.up, mlp.up_proj),
            (ours.ffn.down, mlp.down_proj),
            (ours.attention_norm, theirs.input_layernorm),
            (ours.ffn_norm, theirs.post_attention_layernorm),
        ):
            mine.weight.copy_(yours.weight)

    x = torch.randn(2, n_positions, dim, requires_grad=True)
    positions = torch.arange(n_positions)[None]
    rotary = LlamaRotaryEmbedding(config)(x, positions)
    output = theirs(x, position_embeddings=rotary, position_ids=positions)
    output = output[0] if isinstance(output, tuple) else output
    assert torch.allclose(ours(x), output, atol=1e-5)

    upstream = torch.randn_like(output)
    mine, yours = (torch.autograd.grad(result, x, upstream)[0] for result in (ours(x), output))
    assert torch.allclose(mine, yours, atol=1e-4)
