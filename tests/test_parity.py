"""The same numbers as an implementation nobody here wrote: DeepSeek's layers in the `transformers` library."""

import inspect

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers.cache_utils import DynamicCache
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

from mythoslab.mla import MultiHeadLatentAttention
from mythoslab.moe import MixtureOfExperts

TOLERANCE = dict(atol=1e-5, rtol=1e-5)
YARN = dict(
    rope_type="yarn",
    factor=4.0,
    beta_fast=32,
    beta_slow=1,
    mscale=0.7,
    mscale_all_dim=0.7,
    original_max_position_embeddings=512,
)
SHAPES = {
    "small": dict(hidden_size=32, num_attention_heads=2, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
    "uneven": dict(hidden_size=48, num_attention_heads=3, kv_lora_rank=20, qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=14),
    "wide": dict(hidden_size=64, num_attention_heads=4, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=32, v_head_dim=16),
}
KINDS = {
    "V2": (DeepseekV2Config, v2.DeepseekV2Attention, v2.DeepseekV2RotaryEmbedding, {}),
    "V3": (DeepseekV3Config, v3.DeepseekV3Attention, v3.DeepseekV3RotaryEmbedding, {}),
    "V3, not interleaved": (
        DeepseekV3Config,
        v3.DeepseekV3Attention,
        v3.DeepseekV3RotaryEmbedding,
        {"rope_interleave": False},
    ),
}


class Theirs:
    """An attention of transformers with random weights, and what its forward needs."""

    def __init__(self, kind, shape, *, q_lora_rank, yarn, seed=0):
        torch.manual_seed(seed)
        make_config, make_attention, make_rotary, options = KINDS[kind]
        sizes = SHAPES[shape]
        if yarn:
            options = {**options, "rope_parameters": {**YARN, "rope_theta": 10000.0}}
        self.config = make_config(
            **sizes,
            q_lora_rank=q_lora_rank,
            num_key_value_heads=sizes["num_attention_heads"],
            max_position_embeddings=2048,
            attn_implementation="eager",
            **options,
        )
        self.attention = make_attention(self.config, layer_idx=0).eval()
        with torch.no_grad():
            for name, weight in self.attention.named_parameters():
                weight.uniform_(0.5, 1.5) if "norm" in name else weight.normal_(0, weight.shape[1] ** -0.5)
        self.rotary = make_rotary(self.config)

    def __call__(self, x, *, cache=None, start=0):
        positions = self.rotary(x, torch.arange(start, start + x.shape[1])[None])
        seen = torch.ones(x.shape[1], start + x.shape[1], dtype=torch.bool).tril(start)
        mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]
        name = "cache" if "cache" in inspect.signature(self.attention.forward).parameters else "past_key_values"  # as it was called once
        return self.attention(x, attention_mask=mask, position_embeddings=positions, **{name: cache})[0]


@pytest.fixture(params=[f"{kind}-{shape}" for kind in KINDS for shape in SHAPES])
def kind_and_shape(request):
    return request.param.split("-")


@pytest.mark.parametrize("q_lora_rank", [None, 14])
@pytest.mark.parametrize("yarn", [False, True], ids=["plain", "yarn"])
def test_attention_gives_the_same_outputs_and_gradients(kind_and_shape, q_lora_rank, yarn):
    theirs = Theirs(*kind_and_shape, q_lora_rank=q_lora_rank, yarn=yarn)
    ours = MultiHeadLatentAttention.from_deepseek(theirs.config, theirs.attention.state_dict())
    x = torch.randn(2, 600 if yarn else 40, theirs.config.hidden_size)  # longer than the context YaRN stretches
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [attend(part) for attend, part in zip((theirs, ours), inputs)]
    assert torch.allclose(*outputs, **TOLERANCE)
    weigh = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weigh).sum().div(x.shape[1]).backward()
    assert torch.allclose(inputs[0].grad, inputs[1].grad, **TOLERANCE)
    for name, weight in theirs.attention.named_parameters():
        own = dict(ours.named_parameters())[name].grad
        if theirs.config.__dict__.get("rope_interleave", True):
            own = _as_published(ours, name, own)
        assert torch.allclose(weight.grad, own, **TOLERANCE), name


def _as_published(attention, name, gradient):
    """A gradient in the published order of rotated channels: that of a weight which holds it."""
    holder = MultiHeadLatentAttention(
        attention.o_proj.out_features,
        attention.n_heads,
        q_lora_rank=attention.q_lora_rank,
        kv_lora_rank=attention.kv_lora_rank,
        qk_nope_head_dim=attention.qk_nope_head_dim,
        qk_rope_head_dim=attention.qk_rope_head_dim,
        v_head_dim=attention.v_head_dim,
    )
    with torch.no_grad():
        dict(holder.named_parameters())[name].copy_(gradient)
    return holder.to_deepseek()[name]


@pytest.mark.parametrize("q_lora_rank", [None, 14])
def test_cached_decoding_gives_the_same_outputs(kind_and_shape, q_lora_rank):
    theirs = Theirs(*kind_and_shape, q_lora_rank=q_lora_rank, yarn=False)
    ours = MultiHeadLatentAttention.from_deepseek(theirs.config, theirs.attention.state_dict())
    x = torch.randn(2, 40, theirs.config.hidden_size)
    their_cache, cache = DynamicCache(config=theirs.config), ours.new_cache(2, 40)
    with torch.no_grad():
        for n_new in (30, 1, 1, 1, 6, 1):
            piece = x[:, cache.length : cache.length + n_new]
            expected = theirs(piece, cache=their_cache, start=cache.length)
            assert torch.allclose(ours(piece, cache), expected, **TOLERANCE)
            cache.advance(n_new)


@pytest.mark.parametrize("q_lora_rank", [None, 14])
@pytest.mark.parametrize("kind", ["V2", "V3"])
def test_weights_go_there_and_back(kind, q_lora_rank):
    ours = MultiHeadLatentAttention(
        32, 2, q_lora_rank=q_lora_rank, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
    )
    theirs = Theirs(kind, "small", q_lora_rank=q_lora_rank, yarn=False)
    theirs.attention.load_state_dict(ours.to_deepseek())
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        assert torch.allclose(theirs(x), ours(x), **TOLERANCE)
    back = MultiHeadLatentAttention.from_deepseek(theirs.config, ours.to_deepseek())
    assert all(torch.equal(weight, back.state_dict()[name]) for name, weight in ours.state_dict().items())


PUBLISHED = {  # as in a published config.json, at a hundredth of its size
    "hidden_size": 72,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "rope_theta": 10000,
    "rope_scaling": {**{k: v for k, v in YARN.items() if k != "rope_type"}, "type": "yarn"},
}


def published_layer():
    names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return MultiHeadLatentAttention(72, 2, **{name: PUBLISHED[name] for name in names}).to_deepseek()


def test_a_published_config_and_its_full_names_are_read():
    weights = {f"model.layers.3.self_attn.{name}": weight.bfloat16() for name, weight in published_layer().items()}
    weights["model.layers.3.input_layernorm.weight"] = torch.ones(72)
    attention = MultiHeadLatentAttention.from_deepseek(PUBLISHED, weights)
    assert attention.o_proj.weight.dtype == torch.bfloat16
    assert attention.scale > 12**-0.5  # YaRN's factor
    assert attention.frequency[0] == 1.0 and attention.frequency[-1] < 0.01


@pytest.mark.parametrize(
    "config, change, sentence",
    [
        (PUBLISHED, lambda weights: {}, "the number of layers in state_dict is 0; it must be 1"),
        (PUBLISHED, lambda weights: {**weights, "other.kv_b_proj.weight": weights["kv_b_proj.weight"]}, "the number of layers in state_dict is 2"),
        (PUBLISHED, lambda weights: {**weights, "o_proj.bias": torch.zeros(72)}, r"state_dict is \['o_proj.bias'\]; it must be without biases"),
        (PUBLISHED, lambda weights: {**weights, "o_proj.weight": torch.zeros(3, 3)}, r"what config needs\) is .*o_proj.weight.*\(3, 3\)"),
        (PUBLISHED, lambda weights: {name: w for name, w in weights.items() if "o_proj" not in name}, r"o_proj.weight': \(None, "),
        ({**PUBLISHED, "rope_scaling": {"type": "linear"}}, dict, "the kind of rotary positions is 'linear'; it must be 'default' or 'yarn'"),
        ({**PUBLISHED, "rope_scaling": {**PUBLISHED["rope_scaling"], "mscale": 1.0}}, dict, "mscale is 1.0; it must be that of mscale_all_dim, 0.7"),
    ],
)
def test_what_is_no_published_layer_is_named(config, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        MultiHeadLatentAttention.from_deepseek(config, change(published_layer()))


MOE_SHAPES = {
    "plain": dict(n_routed_experts=6, num_experts_per_tok=2, n_group=1, topk_group=1),
    "groups": dict(n_routed_experts=12, num_experts_per_tok=3, n_group=4, topk_group=2),
    "one in groups": dict(n_routed_experts=8, num_experts_per_tok=1, n_group=2, topk_group=1),
    "two shared": dict(n_routed_experts=6, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=2),
}


def their_experts(version, shape, *, norm_topk_prob=True, seed=0):
    """A layer of experts of transformers with random weights, and its config."""
    torch.manual_seed(seed)
    options = {"n_shared_experts": 1, **MOE_SHAPES[shape]}
    if version == "V2":
        options["topk_method"] = "group_limited_greedy" if options["n_group"] > 1 else "greedy"
        make_config, make_experts = DeepseekV2Config, v2.DeepseekV2Moe
    else:
        options["norm_topk_prob"] = norm_topk_prob
        make_config, make_experts = DeepseekV3Config, v3.DeepseekV3MoE
    config = make_config(
        hidden_size=32, moe_intermediate_size=16, routed_scaling_factor=2.5, experts_implementation="eager", **options
    )
    experts = make_experts(config).eval()
    with torch.no_grad():
        for name, weight in experts.named_parameters():
            weight.normal_(0, weight.shape[-1] ** -0.5)
        if version == "V3":
            experts.gate.e_score_correction_bias.normal_(0, 0.2)
    return config, experts


@pytest.mark.parametrize("shape", MOE_SHAPES)
@pytest.mark.parametrize("version", ["V2", "V3", "V3, not scaled"])
@pytest.mark.parametrize("n_tokens", [1, 70], ids=["few", "many"])
def test_experts_give_the_same_outputs_and_gradients(version, shape, n_tokens):
    version, _, scaled = version.partition(",")
    config, theirs = their_experts(version, shape, norm_topk_prob=not scaled)
    ours = MixtureOfExperts.from_deepseek(config, theirs.state_dict()).eval()
    x = torch.randn(2, n_tokens, 32)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [experts(part) for experts, part in zip((theirs, ours), inputs)]
    assert torch.allclose(*outputs, **TOLERANCE)
    weigh = torch.randn_like(x) / n_tokens
    for output in outputs:
        (output * weigh).sum().backward()
    assert torch.allclose(inputs[0].grad, inputs[1].grad, **TOLERANCE)
    assert torch.allclose(theirs.gate.weight.grad, ours.router.weight.grad, **TOLERANCE)
    assert torch.allclose(theirs.experts.gate_up_proj.grad, ours.gate_up.grad, **TOLERANCE)
    assert torch.allclose(theirs.experts.down_proj.grad, ours.down.grad, **TOLERANCE)
    for part, layer in (("gate", ours.shared.gate), ("up", ours.shared.up), ("down", ours.shared.down)):
        expected = getattr(theirs.shared_experts, f"{part}_proj").weight.grad
        assert torch.allclose(expected, layer.weight.grad, **TOLERANCE)


@pytest.mark.parametrize("version", ["V2", "V3"])
def test_experts_go_there_and_back(version):
    config, theirs = their_experts(version, "groups")
    first = MixtureOfExperts.from_deepseek(config, theirs.state_dict())
    with torch.no_grad():
        for weight in first.parameters():
            weight.normal_(0, 0.2)
    published = first.to_deepseek()
    stacked = {name: weight for name, weight in published.items() if ".0." not in name and not name.startswith("experts.")}
    numbers = range(config.n_routed_experts)
    of = lambda part: [published[f"experts.{expert}.{part}_proj.weight"] for expert in numbers]  # noqa: E731
    stacked["experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(of("gate"), of("up"))])
    stacked["experts.down_proj"] = torch.stack(of("down"))
    theirs.load_state_dict(stacked)
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        assert torch.allclose(theirs(x), first.eval()(x), **TOLERANCE)
    full_names = {f"model.layers.3.mlp.{name}": weight for name, weight in published.items()}
    back = MixtureOfExperts.from_deepseek(config.to_dict(), full_names)
    assert all(torch.equal(weight, back.state_dict()[name]) for name, weight in first.state_dict().items())


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda weights: {}, "the number of layers with experts in state_dict is 0; it must be 1"),
        (
            lambda weights: {f"{layer}.{name}": weight for layer in "ab" for name, weight in weights.items()},
            "the number of layers with experts in state_dict is 2; it must be 1",
        ),
        (lambda weights: {n: w for n, w in weights.items() if n != "gate.weight"}, "state_dict has no gate.weight, which the config needs"),
        (lambda weights: {**weights, "gate.weight": torch.zeros(3, 3)}, r"what config needs\) is .*router.weight.*\(3, 3\)"),
        (lambda weights: {**weights, "gate.bias": torch.zeros(3)}, r"state_dict is \['gate.bias'\]; .*no place for"),
    ],
)
def test_what_is_no_published_layer_of_experts_is_named(change, sentence):
    config, theirs = their_experts("V3", "plain")
    with pytest.raises(ValueError, match=sentence):
        MixtureOfExperts.from_deepseek(config, change(theirs.state_dict()))


def test_a_size_that_a_config_lacks_is_named():
    config, theirs = their_experts("V3", "plain")
    sizes = config.to_dict() | {"moe_intermediate_size": None}
    with pytest.raises(ValueError, match="moe_intermediate_size in config is 'missing'; it must be given"):
        MixtureOfExperts.from_deepseek(sizes, theirs.state_dict())
