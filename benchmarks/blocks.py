"""How fast a block with latent attention and experts is, beside those of OpenMythos and of the transformers library.

Everything takes turns in one process, so that whatever else the machine does slows all; medians are compared.
"""

import importlib
import math
import statistics
import sys
from pathlib import Path

import torch
from torch import nn

from mythoslab import mla
from mythoslab.mla import MultiHeadLatentAttention
from mythoslab.moe import MixtureOfExperts
from mythoslab.recurrence import RMSNorm, SwiGLU

from .clock import in_turn

DIM, N_HEADS, BATCH, LENGTH, CONTEXT = 256, 8, 4, 256, 1024
ATTENTION = dict(q_lora_rank=128, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
EXPERTS = {"8 experts of 256, top-2": (8, 256, 2), "64 experts of 128, top-4": (64, 128, 4)}
ROUNDS, TOKENS = 15, 16
#: Where `make bench` installs OpenMythos, apart from everything else.
OPEN_MYTHOS = Path(__file__).parent.parent / ".venv" / "open-mythos"


class LatentBlock(nn.Module):
    """Pre-norm block of latent attention and experts."""

    def __init__(self, n_experts: int, expert_dim: int, n_chosen: int, n_shared: int = 1):
        super().__init__()
        self.attention_norm, self.ffn_norm = RMSNorm(DIM), RMSNorm(DIM)
        self.attention = MultiHeadLatentAttention(DIM, N_HEADS, **ATTENTION)
        self.experts = MixtureOfExperts(
            DIM, expert_dim, n_routed_experts=n_experts, n_experts_per_token=n_chosen, n_shared_experts=n_shared
        )

    def forward(self, x, cache=None):
        x = x + self.attention(self.attention_norm(x), cache)
        return x + self.experts(self.ffn_norm(x))


def open_mythos_block(n_experts: int, expert_dim: int, n_chosen: int):
    """The same settings in OpenMythos: a call on x, and one that decodes with its cache.

    Its one shared expert is as wide as all chosen ones together.
    """
    sys.path.append(str(OPEN_MYTHOS))
    open_mythos = importlib.import_module("open_mythos")
    sizes = dict(n_experts=n_experts, expert_dim=expert_dim, n_experts_per_tok=n_chosen, n_shared_experts=1)
    config = open_mythos.MythosConfig(dim=DIM, n_heads=N_HEADS, **ATTENTION, **sizes)
    block = open_mythos.TransformerBlock(config, use_moe=True)
    angles = open_mythos.precompute_rope_freqs(config.qk_rope_head_dim, CONTEXT + 1)
    mask = torch.full((LENGTH, LENGTH), -math.inf).triu(1)[None, None]
    return (
        block,
        lambda x: block(x, angles[: x.shape[1]], mask),
        lambda x, kept: block(x, angles[CONTEXT : CONTEXT + 1], None, kept),
    )


def transformers_block(n_experts: int, expert_dim: int, n_chosen: int):
    """The same settings in transformers' DeepSeek-V3, experts by grouped_mm."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

    config = DeepseekV3Config(
        hidden_size=DIM,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS,
        moe_intermediate_size=expert_dim,
        n_routed_experts=n_experts,
        num_experts_per_tok=n_chosen,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        attn_implementation="sdpa",
        experts_implementation="grouped_mm",
        **ATTENTION,
    )
    layer = v3.DeepseekV3DecoderLayer(config, layer_idx=0)
    with torch.no_grad():
        for weight in layer.parameters():
            if weight.dim() > 1:
                weight.normal_(0, weight.shape[-1] ** -0.5)  # the library leaves experts and router to its loader
    angles = v3.DeepseekV3RotaryEmbedding(config)(torch.empty(1), torch.arange(LENGTH)[None])

    def call(x):
        result = layer(x, position_embeddings=angles)
        return result[0] if isinstance(result, tuple) else result

    return layer, call


def flops_per_token(n_chosen: int, expert_dim: int, n_shared: int, block: LatentBlock) -> int:
    """Of a forward and backward pass: twice and four times the products of a weight or a score with a token."""
    attention = sum(weight.numel() for weight in block.attention.parameters() if weight.dim() > 1)
    experts = block.experts.router.weight.numel() + (n_chosen + n_shared) * 3 * DIM * expert_dim
    per_pair = sum(ATTENTION[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    scores = N_HEADS * LENGTH // 2 * per_pair  # half of the pairs are masked
    return 6 * (attention + experts + scores)


def main() -> None:
    torch.set_num_threads(1)
    factors = torch.randn(2, 1024, 1024)
    other_library = f"mythoslab, {'MKL' if mla.BY_ONE_DNN else 'oneDNN'}"
    for title, (n_experts, expert_dim, n_chosen) in EXPERTS.items():
        torch.manual_seed(0)
        ours = LatentBlock(n_experts, expert_dim, n_chosen)
        wide = LatentBlock(n_experts, expert_dim, n_chosen, n_shared=n_chosen)
        other, call_other, decode_other = open_mythos_block(n_experts, expert_dim, n_chosen)
        library, call_library = transformers_block(n_experts, expert_dim, n_chosen)
        dense = SwiGLU(DIM, (n_chosen + 1) * expert_dim)
        wide_dense = SwiGLU(DIM, 2 * n_chosen * expert_dim)
        x, weigh = torch.randn(2, BATCH, LENGTH, DIM)

        def training(module, call):
            def step():
                module.zero_grad(set_to_none=True)
                call(x.requires_grad_()).backward(weigh)
                x.grad = None

            return step

        def by_the_other(step):
            def run():
                chosen, mla.BY_ONE_DNN = mla.BY_ONE_DNN, not mla.BY_ONE_DNN
                step()
                mla.BY_ONE_DNN = chosen

            return run

        tasks = {
            "mythoslab": training(ours, ours),
            "transformers": training(library, call_library),
            "OpenMythos": training(other, call_other),
            "mythoslab, wide": training(wide, wide),
            "experts alone": training(ours.experts, ours.experts),
            "dense alone": training(dense, dense),
            "wide experts alone": training(wide.experts, wide.experts),
            "wide dense alone": training(wide_dense, wide_dense),
            "matrix product": lambda: factors[0] @ factors[1],
        }
        if mla.ONE_DNN is not None:
            tasks |= {other_library: by_the_other(training(ours, ours)), "by oneDNN": lambda: mla.one_dnn(*factors)}
        seconds = _medians(tasks, ROUNDS)
        peak = 2 * 1024**3 / seconds["matrix product"]
        print(f"\n{title}: a block forward and backward, {BATCH} × {LENGTH} tokens, one thread, median of {ROUNDS} in turn")
        print(f"{'':18}{'tokens/s':>12}{'GFLOP/s':>12}{'of the peak':>14}{'ours is':>12}")
        for name in filter(seconds.get, ("mythoslab", other_library, "transformers", "OpenMythos", "mythoslab, wide")):
            n_shared = n_chosen if name in ("OpenMythos", "mythoslab, wide") else 1
            rate = BATCH * LENGTH * flops_per_token(n_chosen, expert_dim, n_shared, ours) / seconds[name]
            ratio = seconds[name] / seconds["mythoslab"]
            print(f"{name:18}{BATCH * LENGTH / seconds[name]:12,.0f}{rate / 1e9:12,.1f}{rate / peak:14.0%}{ratio:11.2f}×")
        for name in filter(seconds.get, ("matrix product", "by oneDNN")):
            rate = 2 * 1024**3 / seconds[name]
            print(f"{name:18}{'':12}{rate / 1e9:12,.1f}{rate / peak:14.0%}")
        like = seconds["OpenMythos"] / seconds["mythoslab, wide"]
        print(f"OpenMythos' shared expert is as wide as the {n_chosen} chosen ones; with ours as wide, ours is {like:.2f}× as fast")
        for name, kind in (("", f"one shared expert of {expert_dim}"), ("wide ", f"a shared expert of {n_chosen * expert_dim}")):
            slower = seconds[f"{name}experts alone"] / seconds[f"{name}dense alone"]
            print(f"experts with {kind} take {slower:.2f} times a dense SwiGLU (by MKL) of the same active width")
        _decode(ours, wide, other, decode_other)


@torch.inference_mode()
def _decode(ours: LatentBlock, wide: LatentBlock, other: nn.Module, decode_other) -> None:
    ours.eval(), wide.eval(), other.eval()
    token = torch.randn(1, 1, DIM)
    cache = ours.attention.new_cache(1, CONTEXT + 1)
    cache.memory.normal_()
    cache.advance(CONTEXT)
    kept = {"c_kv": torch.randn(1, CONTEXT, 64), "k_rope": torch.randn(1, CONTEXT, N_HEADS, 16)}

    absorbs = ours.attention.absorbs

    def rebuilding():
        ours.attention.absorbs = lambda n_queries, n_keys: False
        for _ in range(TOKENS):
            ours(token, cache)
        ours.attention.absorbs = absorbs

    def repeated(call):
        return lambda: [call() for _ in range(TOKENS)]

    tasks = {
        "mythoslab": repeated(lambda: ours(token, cache)),
        "mythoslab, wide": repeated(lambda: wide(token, cache)),
        "OpenMythos": repeated(lambda: decode_other(token, {"default": kept})),
        "rebuilding keys": rebuilding,
    }
    seconds = _medians(tasks, ROUNDS)
    row = ", ".join(f"{name} {1e3 * taken / TOKENS:.2f} ms" for name, taken in seconds.items())
    print(f"one more token after {CONTEXT:,}, the block run {TOKENS} times in a row as a loop does: {row}")
    for name in ("OpenMythos", "rebuilding keys"):
        print(f"  ours is {seconds[name] / seconds['mythoslab']:.1f} times as fast as {name}")


def _medians(tasks, n_rounds: int) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in in_turn(tasks, n_rounds).items()}
