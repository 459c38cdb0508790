"""mythoslab.model: the configuration, the model and its memory, what it costs, how it writes, and its checks."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mythoslab.classroom.checks import reference
from mythoslab.mla import LatentCache, MultiHeadLatentAttention
from mythoslab.model import (
    CHOICES,
    PRESETS,
    Core,
    KeyValueAttention,
    Mythos,
    MythosBlock,
    MythosConfig,
    Shown,
    StopHead,
    ThoughtCache,
    TokenShift,
    cache_bytes_per_token,
    count_parameters,
    flops_per_token,
    generate,
    initialise,
    kept_width,
    linear_layers,
    make_attention,
    make_injection,
    preset,
    sample,
)
from mythoslab.recurrence import rotary_angles, rotate
from mythoslab.stability import LTIInjection
from tests.mistakes import edited, mistakes_are_named

SMALL = MythosConfig(
    vocab_size=31,
    dim=16,
    n_heads=2,
    hidden_dim=24,
    n_passes=3,
    context_length=12,
    kv_lora_rank=6,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=6,
    expert_dim=8,
    n_routed_experts=4,
)
KINDS = [(attention, ffn) for attention in CHOICES["attention"] for ffn in CHOICES["ffn"]]


@st.composite
def configs(draw):
    """Any small configuration."""
    small = lambda least, most: draw(st.integers(least, most))  # noqa: E731
    sizes = {name: draw(st.sampled_from(choices)) for name, choices in CHOICES.items()}
    heads, experts = small(1, 4), small(1, 4)
    key_heads = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    if sizes["core_positions"] == "half" and sizes["attention"] != "mla":
        heads, key_heads = 2 * heads, 2 * key_heads
    dim = small(2, 9) if sizes["attention"] == "mla" else 2 * heads * small(1, 2)
    flags = ("token_shift", "tie_embeddings", "qk_norm")
    return MythosConfig(
        vocab_size=small(1, 50),
        dim=dim,
        n_heads=heads,
        n_kv_heads=key_heads,
        hidden_dim=small(1, 9),
        n_prelude=small(0, 2),
        n_core=small(1, 2),
        n_coda=small(0, 2),
        n_passes=small(1, 4),
        context_length=small(2, 9),
        rope_theta=draw(st.floats(1.5, 1e6)),
        q_lora_rank=small(0, 3),
        kv_lora_rank=small(1, 5),
        qk_nope_head_dim=small(1, 4),
        qk_rope_head_dim=2 * small(1, 2),
        v_head_dim=small(1, 4),
        expert_dim=small(1, 4),
        n_routed_experts=experts,
        n_experts_per_token=small(1, experts),
        n_shared_experts=small(0, 2),
        lora_rank=1,
        **sizes,
        **{flag: draw(st.booleans()) for flag in flags},
    )


def lively(config: MythosConfig, seed: int = 0) -> Mythos:
    """A model in float64 that has left its start: no adapter is zero, no injection the identity."""
    torch.manual_seed(seed)
    model = Mythos(config).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return model


def text(config: MythosConfig, batch_size: int = 2, length: int | None = None) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch_size, length or config.context_length))


def passes_of_each(tokens: torch.Tensor, most: int) -> torch.Tensor:
    return torch.randint(1, most + 1, tokens.shape)


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


# The configuration.


@given(configs())
def test_config_survives_json(config):
    assert MythosConfig.from_json(config.to_json()) == config
    assert set(json.loads(config.to_json())) == {field.name for field in fields(MythosConfig)}


@pytest.mark.parametrize("field", [field.name for field in fields(MythosConfig)])
@pytest.mark.parametrize("wrong", [0.5, -1, "12", None, math.nan])
def test_a_wrong_field_is_named_with_what_was_got(field, wrong):
    unchecked = reference("model").MythosConfig  # without the type checker of the tests, as users have it
    with pytest.raises(ValueError) as error:
        unchecked(**{**asdict(SMALL), field: wrong})
    assert field in str(error.value) and repr(wrong) in str(error.value) and "must be" in str(error.value)


@pytest.mark.parametrize(
    "changes, named",
    [
        (dict(dim=18, n_heads=4), "dim is 18; it must be divisible by 2 · n_heads, 8"),
        (dict(attention="gqa", n_heads=4, n_kv_heads=3), "n_kv_heads is 3.*a divisor of n_heads, 4"),
        (dict(attention="mla", qk_rope_head_dim=3), "qk_rope_head_dim is 3.*even"),
        (dict(ffn="moe", n_experts_per_token=5), "n_experts_per_token is 5.*n_routed_experts, 4"),
        (dict(pass_adapter="lora", lora_rank=17), "lora_rank is 17.*at most 16"),
        (dict(pass_adapter="lora", lora_rank=5, ffn="moe"), "lora_rank is 5.*at most 4"),
        (dict(attention="gqa", core_positions="half"), "core_positions is 'half'.*the key heads, 1, have no halves"),
        (dict(rope_theta=1), "rope_theta is 1;"),
        (dict(rope_theta=math.inf), "rope_theta is inf"),
        (dict(halting="sometimes"), "halting is 'sometimes'.*none, settled"),
    ],
)
def test_fields_that_do_not_fit_each_other_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        replace(SMALL, **changes)


def test_what_a_kind_does_not_use_is_not_in_its_way():
    replace(SMALL, attention="mla", dim=7, n_heads=2)
    replace(SMALL, n_kv_heads=3, qk_rope_head_dim=3, n_experts_per_token=99, lora_rank=99)


@pytest.mark.parametrize(
    "text, named",
    [
        ("{", "not JSON"),
        ("[]", "a JSON object"),
        ('{"vocab_size": 9, "n_experts": 4}', "n_experts"),
        ("{}", "vocab_size is 'missing'"),
        ('{"vocab_size": 9, "n_core": true}', "n_core is True"),
        ('{"vocab_size": 9, "dim": 18, "n_heads": 4}', "dim is 18"),
        ('{"vocab_size": 9, "token_shift": 1}', "token_shift is 1"),
    ],
)
def test_damaged_json_is_named(text, named):
    with pytest.raises(ValueError, match=named):
        reference("model").MythosConfig.from_json(text)


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="'huge'.*tiny"):
        preset("huge")
    assert all(preset(name) is config for name, config in PRESETS.items())


def test_unrolled_twin_computes_as_much_and_stores_more():
    twin = SMALL.unrolled()
    assert flops_per_token(twin) == flops_per_token(SMALL)
    block = sum(weight.numel() for weight in MythosBlock(SMALL, core=True).parameters())
    assert count_parameters(twin) - count_parameters(SMALL) == 2 * block
    assert count_parameters(replace(SMALL, n_passes=50)) == count_parameters(SMALL)
    assert cache_bytes_per_token(twin) == cache_bytes_per_token(SMALL)


# What it costs.


@settings(max_examples=60)
@given(configs(), st.integers(1, 4))
def test_any_valid_config_builds_a_model_of_the_predicted_weights_and_operations(config, n_passes):
    model = Mythos(config).double()
    assert count_parameters(config) == sum(weight.numel() for weight in model.parameters())
    tokens = text(config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        logits, passes, _ = model(tokens, n_passes)
    assert logits.shape == (*tokens.shape, config.vocab_size) and passes.unique().tolist() == [n_passes]

    dim, per_token = config.dim, 0  # what the formula leaves out, as its docstring says
    if config.has_head:
        hidden = max(8, dim // 2)
        per_token += 2 * n_passes * (2 * dim + 1) * hidden
    if config.ffn == "moe":
        per_token += 2 * n_passes * config.n_core * config.n_experts_per_token * dim
    merged = 0
    if config.pass_adapter == "lora":
        layers = linear_layers(config, core=True).values()
        merged = 2 * n_passes * config.n_core * config.lora_rank * sum(rows * columns for rows, columns in layers)
    predicted = (flops_per_token(config, n_passes) + per_token) * tokens.numel() + merged
    assert counter.get_total_flops() == predicted


@settings(max_examples=40)
@given(configs())
def test_active_weights_leave_out_the_experts_and_adapters_that_do_not_serve(config):
    unused = 0
    for name, weight in Mythos(config).named_parameters():
        if ".ffn.gate_up" in name or (".ffn.down" in name and weight.dim() == 3):
            unused += weight[config.n_experts_per_token :].numel()
        if ".adapters." in name or "core.embedding." in name:
            unused += weight[1:].numel()  # one row a pass
    assert count_parameters(config) - count_parameters(config, active=True) == unused


@settings(max_examples=40)
@given(configs())
def test_linear_layers_of_a_block_are_predicted_by_name_and_shape(config):
    for core in (True, False):
        block = MythosBlock(config, core=core)
        built = {name: part.weight.shape for name, part in block.named_modules() if isinstance(part, nn.Linear)}
        assert built == linear_layers(config, core=core)


@settings(max_examples=40)
@given(configs(), st.integers(1, 5), st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_cache_takes_the_predicted_bytes(config, n_slots, dtype):
    cache = Mythos(config).to(dtype).new_cache(3, n_slots=n_slots)
    predicted = cache_bytes_per_token(config, n_slots, bytes_per_number=dtype.itemsize)
    assert cache.bytes_per_token == predicted
    counted = sum(part.memory.nbytes for part in cache)
    assert counted == predicted * 3 * config.context_length
    assert Mythos(config).new_cache().bytes_per_token == cache_bytes_per_token(config)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_on_the_meta_device_with_the_predicted_weights(name):
    with torch.device("meta"):
        model = Mythos(preset(name))
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    assert sum(weight.numel() for weight in model.parameters()) == count_parameters(preset(name))


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("openmythos")])
def test_a_size_of_openmythos_has_nearly_the_weights_of_its_name(name):
    number, unit = name.removeprefix("openmythos-")[:-1], name[-1]
    assert count_parameters(preset(name)) == pytest.approx(float(number) * {"b": 1e9, "t": 1e12}[unit], rel=0.1)


# The same numbers, however it is read.


@settings(max_examples=60)
@given(configs(), st.data())
def test_read_in_pieces_with_a_cache_gives_what_reading_at_once_gives(config, data):
    model, most = lively(config), 5
    tokens = text(config)
    each = passes_of_each(tokens, most)
    length = tokens.shape[1]
    cuts = sorted({0, length, *data.draw(st.lists(st.integers(1, length), max_size=3))})
    with torch.no_grad():
        at_once = model(tokens, each)
        cache = model.new_cache(2, n_slots=data.draw(st.integers(most, most + 2)))
        pieces = [model(tokens[:, a:b], each[:, a:b], cache=cache) for a, b in zip(cuts, cuts[1:])]
    assert largest_difference(torch.cat([piece.logits for piece in pieces], 1), at_once.logits) < 1e-9
    assert torch.equal(torch.cat([piece.passes for piece in pieces], 1), each) and torch.equal(at_once.passes, each)
    assert cache.length == length and torch.equal(cache.tokens, tokens)


@settings(max_examples=40)
@given(configs(), st.integers(1, 9))
def test_a_sequence_alone_gives_what_it_gives_in_a_batch_padded_or_not(config, own):
    model, tokens = lively(config), text(config, 3)
    each, own = passes_of_each(tokens, 5), min(own, config.context_length)
    with torch.no_grad():
        together, alone = model(tokens, each).logits, model(tokens[1:2, :own], each[1:2, :own]).logits
    assert largest_difference(together[1:2, :own], alone) < 1e-9


@settings(max_examples=40)
@given(configs(), st.integers(1, 6))
def test_one_number_of_passes_is_that_number_for_every_token(config, n_passes):
    model, tokens = lively(config), text(config)
    with torch.no_grad():
        one, all_of_it = model(tokens, n_passes), model(tokens, torch.full_like(tokens, n_passes))
        given, default = model(tokens, config.n_passes), model(tokens)
    assert largest_difference(one.logits, all_of_it.logits) < 1e-9
    assert torch.equal(one.passes, all_of_it.passes)
    assert torch.equal(given.logits, default.logits) and torch.equal(given.passes, default.passes)


@settings(max_examples=40)
@given(configs(), st.integers(1, 8))
def test_a_later_token_changes_nothing_earlier(config, position):
    model, tokens = lively(config), text(config)
    position = min(position, config.context_length - 1)
    each, changed = passes_of_each(tokens, 5), tokens.clone()
    changed[:, position:] = (changed[:, position:] + 1) % config.vocab_size
    each_changed = torch.cat((each[:, :position], passes_of_each(tokens[:, position:], 5)), 1)
    with torch.no_grad():
        before, after = model(tokens, each).logits, model(changed, each_changed).logits
    assert largest_difference(before[:, :position], after[:, :position]) < 1e-9


@pytest.mark.parametrize("n_passes", [1, 2, 5, 16])
@pytest.mark.parametrize("attention, ffn", KINDS)
def test_a_changed_token_changes_all_after_it(attention, ffn, n_passes):
    model, tokens = lively(replace(SMALL, attention=attention, ffn=ffn)), text(SMALL, 2, 9)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 31
    with torch.no_grad():
        before, after = model(tokens, n_passes).logits, model(changed, n_passes).logits
    assert largest_difference(before[:, :5], after[:, :5]) < 1e-9
    assert (before[:, 5:] - after[:, 5:]).abs().amax(-1).min() > 1e-6


def test_a_cropped_cache_reads_on_from_there():
    config = replace(SMALL, token_shift=True, attention="gqa")
    model, tokens = lively(config), text(config, 2)
    with torch.no_grad():
        at_once, cache = model(tokens).logits, model.new_cache(2)
        model((tokens[:, :9] + 5) % 31, cache=cache)
        cache.crop(0)
        model(torch.cat((tokens[:, :4], tokens[:, 7:9]), 1), cache=cache)
        cache.crop(4)
        assert largest_difference(model(tokens[:, 4:], cache=cache).logits, at_once[:, 4:]) < 1e-9
    with pytest.raises(ValueError, match="length is 13; it must be from 0 to 12"):
        cache.crop(13)


def test_passes_beyond_the_slots_share_the_last():
    model, tokens = lively(SMALL), text(SMALL)
    with torch.no_grad():
        cache = model.new_cache(2, n_slots=2)
        alone = [model(tokens[:, :1], 2, cache=cache).logits, model(tokens[:, 1:], 2, cache=cache).logits]
        assert largest_difference(torch.cat(alone, 1), model(tokens, 2).logits) < 1e-9
        cache = model.new_cache(2, n_slots=2)
        model(tokens[:, :6], 5, cache=cache)
        later = model(tokens[:, 6:], 5, cache=cache).logits
    assert later.isfinite().all() and largest_difference(later, model(tokens, 5).logits[:, 6:]) > 1e-6


# Tokens that stop.


def naive_passes(core: Core, inputs: torch.Tensor, each: torch.Tensor) -> torch.Tensor:
    """Each block reads, of a token that has stopped, what it read of it last: no memory needed."""
    state, states, read = inputs, [], [None] * len(core.blocks)
    for pass_index in range(int(each.max())):
        thinking = (each > pass_index).unsqueeze(-1)
        x = core.injection(core.norm(state), inputs)
        if core.embedding is not None:
            x = core.embedding(x, pass_index)
        for number, block in enumerate(core.blocks):
            read[number] = x if read[number] is None else torch.where(thinking, x, read[number])
            x = block(read[number], pass_index)
        state = torch.where(thinking, x, state)
        states.append(state)
    return torch.stack(states)


@pytest.mark.parametrize("attention, ffn", KINDS)
@pytest.mark.parametrize("adapter", ["none", "embedding"])
def test_a_token_that_stopped_shows_what_it_wrote_last(attention, ffn, adapter):
    config = replace(SMALL, attention=attention, ffn=ffn, pass_adapter=adapter, n_core=2, injection="lti")
    core, inputs = lively(config).core, torch.randn(2, 8, 16, dtype=torch.float64)
    each = passes_of_each(torch.zeros(2, 8), 5)
    with torch.no_grad():
        assert largest_difference(core(inputs, each), naive_passes(core, inputs, each)) < 1e-9
        assert largest_difference(core(inputs, each), core(inputs, int(each.max()))) > 1e-3


def test_a_token_that_stopped_keeps_its_state_and_the_others_go_on():
    core, inputs = lively(SMALL).core, torch.randn(2, 8, 16, dtype=torch.float64)
    each = torch.tensor([[1, 2, 3, 4, 5, 5, 2, 1], [5, 1, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        states = core(inputs, each)  # (pass, batch, position, dim)
    moved = (states.diff(dim=0) != 0).any(-1)
    for pass_index in range(1, 5):
        assert torch.equal(moved[pass_index - 1], each > pass_index)


def test_shown_keeps_the_last_of_those_that_do_not_think_and_all_where_everybody_does():
    memory, new = Shown(), lambda number: torch.full((1, 2, 1), float(number))
    memory.thinking = torch.tensor([[False, True]])
    assert memory.write(new(1), 0).flatten().tolist() == [1, 1]  # before the first pass there is nothing to go on showing
    assert memory.write(new(2), 1).flatten().tolist() == [1, 2]
    memory.thinking = None
    assert memory.write(new(3), 2).flatten().tolist() == [3, 3]


def test_shown_writes_to_the_slot_of_the_pass_behind_what_is_filled_and_fills_the_rest_in_the_end():
    cache = LatentCache(1, 3, 1, n_slots=4)
    cache.write(torch.full((1, 1, 1), 7.0), 0)
    cache.advance(1)
    memory = Shown(cache)
    assert memory.length == 1
    assert memory.write(torch.full((1, 2, 1), 1.0), 0).flatten().tolist() == [7, 1, 1]
    memory.thinking = torch.tensor([[True, False]])
    assert memory.write(torch.full((1, 2, 1), 2.0), 1).flatten().tolist() == [0, 2, 1]
    memory.keep_showing(2)
    assert cache.memory.flatten().tolist() == [7, 1, 1, 0, 2, 1, 0, 2, 1, 0, 2, 1]


def test_later_tokens_that_think_longer_see_what_the_earlier_showed_last():
    model, tokens = lively(SMALL), text(SMALL)
    each = torch.tensor([[1, 2, 1, 2, 6, 5] * 2]).expand(2, -1)
    with torch.no_grad():
        at_once, cache = model(tokens, each).logits, model.new_cache(2, n_slots=6)
        first = model(tokens[:, :4], each[:, :4], cache=cache).logits  # two passes, and six slots
        filled = [part.memory[:, :, :4].abs().amax((1, 2, 3)).min() for part in cache.core]
        second = model(tokens[:, 4:], each[:, 4:], cache=cache).logits
    assert min(filled) > 0
    assert largest_difference(torch.cat((first, second), 1), at_once) < 1e-9


# The model.


def test_every_pass_is_the_core_on_the_normed_state_and_what_the_prelude_read():
    model = lively(replace(SMALL, n_core=2, n_prelude=2, n_coda=2, token_shift=True))
    tokens = text(SMALL, 1, 7)
    x = model.embedding_norm(model.embedding(tokens))
    x = x + F.pad(model.token_shift.before(x)[:, :-1], (0, 0, 1, 0))
    for block in model.prelude:
        x = block(x)
    state = inputs = model.prelude_norm(x)
    assert largest_difference(inputs, model.inputs(tokens)) < 1e-12
    for thought in model.think(tokens, 4):
        state = model.core.norm(state) + inputs
        for block in model.core.blocks:
            state = block(state)
        assert largest_difference(thought, state) < 1e-9
    for block in model.coda:
        state = block(state)
    logits = model(tokens, 4).logits
    assert largest_difference(logits, model.head(model.norm(state))) < 1e-9
    some = torch.tensor([[True, False, True, False, False, False, True]])
    assert torch.allclose(model.read(model.think(tokens, 4)[-1], at=some), logits[some])


@pytest.mark.parametrize("attention, ffn", KINDS)
def test_a_block_adds_its_attention_and_then_its_ffn(attention, ffn):
    block = lively(replace(SMALL, attention=attention, ffn=ffn)).core.blocks[0]
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        after = x + block.attention(block.attention_norm(x))
        assert largest_difference(block(x), after + block.ffn(block.ffn_norm(after))) < 1e-12


def test_experts_count_the_load_of_each_pass_apart():
    model = Mythos(replace(SMALL, ffn="moe")).train()
    model(text(SMALL, 2, 7), 3)
    assert model.core.blocks[0].ffn.load_by_pass.sum(1).tolist() == [2 * 7 * 2] * 3


@pytest.mark.parametrize("attention, ffn", KINDS)
def test_an_adapter_changes_the_pass_it_belongs_to_and_those_beyond_the_last(attention, ffn):
    config = replace(SMALL, attention=attention, ffn=ffn, pass_adapter="lora", lora_rank=2)
    core = Mythos(config).double().core
    block, x = core.blocks[0], torch.randn(2, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        plain = block.block(x)
        assert all(largest_difference(block(x, pass_index), plain) < 1e-12 for pass_index in range(3))
        for row in (1, 2):
            for adapter in block.adapters:
                adapter.lora_b[row] = row
        changed = [block(x, pass_index) for pass_index in range(5)]
    assert largest_difference(changed[0], plain) < 1e-12
    assert largest_difference(changed[1], plain) > 1e-3 and largest_difference(changed[2], changed[1]) > 1e-3
    assert torch.equal(changed[3], changed[2]) and torch.equal(changed[4], changed[2])


def test_an_injection_makes_of_state_and_inputs_what_its_name_says():
    state, inputs = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    of = {kind: make_injection(replace(SMALL, injection=kind)) for kind in CHOICES["injection"]}
    assert torch.equal(of["add"](state, inputs), state + inputs)
    assert torch.equal(of["none"](state, inputs), state)
    assert isinstance(of["lti"], LTIInjection)
    assert torch.allclose(of["linear"](state, inputs), state + inputs, atol=1e-6)  # at the start
    nn.init.normal_(of["linear"].both.weight)
    of_state, of_inputs = of["linear"].both.weight.chunk(2, 1)
    assert torch.allclose(of["linear"](state, inputs), state @ of_state.mT + inputs @ of_inputs.mT, atol=1e-5)


@pytest.mark.parametrize("halting", CHOICES["halting"])
def test_a_thought_says_its_passes_and_a_new_head_is_undecided(halting):
    model, tokens = Mythos(replace(SMALL, halting=halting)), text(SMALL)
    thought = model(tokens, 5)
    assert thought.passes.tolist() == [[5] * 12] * 2
    if halting in ("none", "converge"):
        assert thought.halt_prob is None and not model.config.has_head
    else:
        assert thought.halt_prob.shape == (5, 2, 12) and thought.halt_prob.unique().tolist() == [0.5]


def test_the_head_sees_the_state_and_what_the_last_pass_changed():
    head, states = StopHead(6).double(), torch.randn(4, 2, 3, 6, dtype=torch.float64)
    nn.init.normal_(head.halt.weight)
    all_passes = head(states)
    for pass_index, before in enumerate((torch.zeros_like(states[0]), *states[:-1])):
        assert torch.allclose(all_passes[pass_index], head.step(states[pass_index], before))
    assert not torch.allclose(head.step(states[1], states[1]), all_passes[1])


def test_token_shift_mixes_in_the_one_before_and_is_given_what_stands_before_the_first():
    shift, x, first = TokenShift(4), torch.randn(2, 5, 4), torch.randn(2, 1, 4)
    with torch.no_grad():
        mixed = shift(x, first) - x
    assert torch.allclose(mixed[:, :1], shift.before(first)) and torch.allclose(mixed[:, 1:], shift.before(x[:, :-1]))


@pytest.mark.parametrize("attention, ffn", KINDS)
def test_without_core_positions_order_reaches_the_core_through_the_prelude_alone(attention, ffn):
    kinds = dict(attention=attention, ffn=ffn, n_heads=4, n_kv_heads=2, n_prelude=0, n_coda=0)
    tokens = text(SMALL, 1, 8)
    swapped = tokens[:, [1, 0, *range(2, 8)]]
    for core_positions in CHOICES["core_positions"]:
        model = lively(replace(SMALL, core_positions=core_positions, **kinds))
        with torch.no_grad():
            difference = largest_difference(model(tokens, 1).logits[:, 2:], model(swapped, 1).logits[:, 2:])
        assert (difference > 1e-9) == (core_positions != "none")


@pytest.mark.parametrize("kinds", [dict(attention="mha"), dict(attention="gqa", n_kv_heads=2)])
def test_half_of_the_positions_are_in_the_first_half_of_the_heads(kinds):
    attention = make_attention(replace(SMALL, n_heads=4, **kinds), positions="half").double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    with torch.no_grad():
        attention.o_proj.weight.copy_(torch.eye(16))  # the heads as they are, side by side
        change = (attention(x) - attention(x[:, [1, 0, *range(2, 6)]]))[:, 2:].abs().amax((0, 1))  # (channel)
    assert change[:8].min() > 1e-9 > change[8:].max()


@pytest.mark.parametrize("attention", CHOICES["attention"])
def test_attention_keeps_as_many_numbers_as_predicted(attention):
    config = replace(SMALL, attention=attention)
    part, memory = make_attention(config), Shown()
    part(torch.randn(2, 5, 16), memory)
    assert memory.last.shape == (2, 5, kept_width(config))


def test_positions_that_heads_cannot_have_are_named():
    with pytest.raises(ValueError, match="positions is 'hafl'; it must be one of all, half, none"):
        KeyValueAttention(32, 4, 2, positions="hafl")
    with pytest.raises(ValueError, match="n_kv_heads is 1; it must be even, for half of them to have positions"):
        KeyValueAttention(32, 4, 1, positions="half")


def test_attention_reads_from_a_bare_cache_as_from_one_that_is_shown():
    torch.manual_seed(0)
    attention, x = KeyValueAttention(32, 4, 2), torch.randn(2, 6, 32)
    memory = LatentCache(2, 6, attention.width)
    with torch.no_grad():
        first = attention(x[:, :4], memory)
        memory.advance(4)
        assert torch.allclose(torch.cat((first, attention(x[:, 4:], memory)), 1), attention(x), atol=1e-6)


def one_head_after_the_other(attention: nn.Module, x: torch.Tensor, config: MythosConfig, positions: str) -> torch.Tensor:
    """Attention as it is written on paper: each head alone, with the key and value of its group."""
    heads, group = config.n_heads, config.n_heads // config.kv_heads
    size, length = config.dim // heads, x.shape[1]
    angles = rotary_angles(length, size, config.rope_theta)
    later = torch.ones(length, length).triu(1).bool()
    mixed = []
    for head in range(heads):
        turn = positions == "all" or (positions == "half" and head < heads // 2)
        rows, of_group = ((number * size, number * size + size) for number in (head, head // group))
        query = F.linear(x, attention.q_proj.weight[slice(*rows)])
        key, value = (F.linear(x, layer.weight[slice(*of_group)]) for layer in (attention.k_proj, attention.v_proj))
        if config.qk_norm:
            query, key = attention.q_norm(query), attention.k_norm(key)
            query = query * math.exp(attention.sharpness[head])
        if turn:
            query, key = rotate(query, angles), rotate(key, angles)
        scores = query @ key.mT / math.sqrt(size)
        mixed.append(scores.masked_fill(later, -math.inf).softmax(-1) @ value)
    return F.linear(torch.cat(mixed, -1), attention.o_proj.weight)


@pytest.mark.parametrize("positions", CHOICES["core_positions"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kinds", [dict(attention="mha"), dict(attention="gqa", n_kv_heads=2)])
def test_attention_is_that_of_one_head_after_the_other(kinds, qk_norm, positions):
    config = replace(SMALL, n_heads=4, rope_theta=20.0, qk_norm=qk_norm, **kinds)
    attention, x = make_attention(config, positions=positions).double(), torch.randn(2, 7, 16, dtype=torch.float64)
    with torch.no_grad():
        for weight in attention.parameters():
            weight.add_(torch.rand_like(weight))
        assert largest_difference(attention(x), one_head_after_the_other(attention, x, config, positions)) < 1e-9


class Filled(Shown):
    """A memory in which everything stands already, for tokens at any places."""

    def __init__(self, kept: torch.Tensor, places: torch.Tensor):
        super().__init__()
        self.kept, self.places = kept, places

    def write(self, new, pass_index):
        rows = torch.arange(len(new)).unsqueeze(1)
        assert largest_difference(self.kept[rows, self.places], new) < 1e-9
        return self.kept


@pytest.mark.parametrize("positions", CHOICES["core_positions"])
@pytest.mark.parametrize("attention", CHOICES["attention"])
def test_a_few_tokens_at_their_places_attend_as_they_do_among_all(attention, positions):
    config = replace(SMALL, n_heads=4, n_kv_heads=2, attention=attention)
    part, x = make_attention(config, positions=positions).double(), torch.randn(2, 7, 16, dtype=torch.float64)
    places = torch.tensor([[2, 5, 0], [6, 3, 1]])
    rows = torch.arange(2).unsqueeze(1)
    with torch.no_grad():
        memory = Shown()
        among_all = part(x, memory)
        assert largest_difference(part(x[rows, places], Filled(memory.last, places)), among_all[rows, places]) < 1e-9


def test_latent_attention_has_the_sizes_and_the_theta_of_the_configuration():
    config = replace(SMALL, attention="mla", rope_theta=20.0, q_lora_rank=5)
    torch.manual_seed(0)
    ours = make_attention(config)
    sizes = dict(q_lora_rank=5, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=6, rope_theta=20.0)
    theirs = MultiHeadLatentAttention(16, 2, **sizes)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 16)
    assert torch.equal(ours(x), theirs(x))


def test_qk_norm_takes_the_scale_of_queries_and_keys_away():
    attention, x = make_attention(replace(SMALL, qk_norm=True)), torch.randn(1, 6, 16)
    with torch.no_grad():
        plain = attention(x)
        attention.q_proj.weight.mul_(100)
        attention.k_proj.weight.mul_(100)
        assert torch.allclose(attention(x), plain, atol=1e-3)
    assert make_attention(SMALL).sharpness is None


# Its start.


@pytest.mark.parametrize("seed", range(3))
def test_a_new_model_is_undecided(seed):
    torch.manual_seed(seed)
    model = Mythos(replace(SMALL, vocab_size=400, dim=64, hidden_dim=128))
    loss = F.cross_entropy(model(torch.randint(400, (4, 12))).logits.flatten(0, 1), torch.randint(400, (48,)))
    assert abs(loss - math.log(400)) < 0.15


@pytest.mark.parametrize("injection", CHOICES["injection"])
@pytest.mark.parametrize("attention, ffn", KINDS)
def test_at_the_start_the_variance_of_the_state_stays_within_a_factor_of_two(attention, ffn, injection):
    kinds = dict(attention=attention, ffn=ffn, injection=injection)
    config = MythosConfig(512, 64, 2, 128, n_passes=3, context_length=64, **kinds)
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            variance = Mythos(config).think(text(config, 2, 32), 64).var((1, 2, 3))  # (pass,)
        assert variance.max() < 2 * variance.min()


@pytest.mark.parametrize("ffn", CHOICES["ffn"])
def test_what_adds_to_the_stream_starts_smaller_the_more_blocks_run(ffn):
    wide = replace(SMALL, dim=64, hidden_dim=96, expert_dim=32, ffn=ffn)
    few, many = (Mythos(replace(wide, n_passes=n_passes)).requires_grad_(False).core.blocks[0] for n_passes in (1, 30))
    for adds in (lambda block: block.attention.o_proj.weight, lambda block: getattr(block.ffn.down, "weight", block.ffn.down)):
        assert math.isclose(adds(few).std() / adds(many).std(), math.sqrt(32 / 3), rel_tol=0.1)
        assert math.isclose(adds(few).std(), adds(few).shape[-1] ** -0.5 / math.sqrt(6), rel_tol=0.1)
    for reads in (lambda block: block.attention.q_proj.weight, lambda block: block.attention.v_proj.weight):
        assert math.isclose(reads(many).std(), 1 / 8, rel_tol=0.1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dim", [32, 128, 768, 2048])
def test_a_new_model_of_any_width_gives_every_token_nearly_the_same_chance(dim, tied):
    torch.manual_seed(0)
    model = Mythos(MythosConfig(300, dim, 4, 32, n_passes=2, context_length=16, tie_embeddings=tied))
    tokens = torch.randint(300, (8, 17))
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).item()
    own = logits.softmax(-1).gather(2, tokens[:, :-1, None]).mean().item()
    assert abs(loss - math.log(300)) < 0.25 and own < 0.06 and logits.std() > 0.1


def test_initialise_leaves_norms_injection_adapters_and_head_at_the_start_of_their_own():
    model = Mythos(replace(SMALL, injection="lti", pass_adapter="lora", halting="settled", qk_norm=True))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    initialise(model)
    drawn = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert drawn and all(before[name].dim() > 1 for name in drawn)
    assert not any(part in name for name in drawn for part in ("norm", "injection", "adapters", "halting", "sharpness"))
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.2)


# How it learns.


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention, ffn", KINDS)
def test_every_weight_learns(attention, ffn, tied):
    for adapter, injection in (("lora", "lti"), ("embedding", "linear")):
        kinds = dict(attention=attention, ffn=ffn, pass_adapter=adapter, injection=injection)
        model = lively(replace(SMALL, tie_embeddings=tied, halting="act", token_shift=True, qk_norm=True, **kinds))
        thought = model(text(SMALL, 4))
        (F.cross_entropy(thought.logits.flatten(0, 1), torch.randint(31, (48,))) + thought.halt_prob.sum()).backward()
        assert (model.head.weight is model.embedding.weight) == tied
        still = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
        assert still == []


def gradients(output: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(output, list(model.parameters()), allow_unused=True)
    return {name: grad for (name, _), grad in zip(model.named_parameters(), found) if grad is not None}


@pytest.mark.parametrize("n_backward", [1, 2, 3, 7])
@pytest.mark.parametrize("own", [False, True])
def test_n_backward_gives_the_gradients_of_a_run_whose_earlier_passes_are_detached(n_backward, own):
    model = lively(replace(SMALL, injection="lti", pass_adapter="embedding", token_shift=True))
    tokens, aim = text(SMALL), torch.randn(2, 12, 31, dtype=torch.float64)
    n_passes = 5
    each = passes_of_each(tokens, n_passes).clamp(min=1)
    each[0, 0] = n_passes
    truncated = model.read(model.think(tokens, each if own else n_passes, n_backward=n_backward)[-1])

    inputs, core = model.inputs(tokens), model.core
    state, shown = inputs, [Shown()]
    for pass_index in range(n_passes):
        detached = pass_index < n_passes - n_backward
        shown[0].thinking = each > pass_index if own else None
        new = core.one_pass(state, inputs.detach() if detached else inputs, pass_index, shown)
        state = torch.where(shown[0].thinking.unsqueeze(-1), new, state) if own else new
        if detached:
            state, shown[0].last = state.detach(), shown[0].last.detach()
    whole = model.read(state)
    assert largest_difference(truncated, whole) < 1e-9
    got, wanted = (gradients((logits * aim).sum(), model) for logits in (truncated, whole))
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert torch.allclose(got[name], wanted[name], rtol=1e-7, atol=1e-10), name


def test_no_gradient_is_kept_where_the_caller_wants_none():
    model, kept = lively(SMALL), []
    model.core.blocks[0].register_forward_hook(lambda block, read, out: kept.append(out.requires_grad))
    model.think(text(SMALL), 3, n_backward=1)
    with torch.no_grad():
        model.think(text(SMALL), 3, n_backward=1)
    assert kept == [False, False, True, False, False, False]


@pytest.mark.parametrize("attention, ffn", KINDS)
def test_gradients_are_those_of_finite_differences_in_float64(attention, ffn):
    config = MythosConfig(
        vocab_size=5,
        dim=4,
        n_heads=2,
        hidden_dim=3,
        n_passes=2,
        context_length=4,
        kv_lora_rank=3,
        q_lora_rank=2,
        qk_nope_head_dim=2,
        qk_rope_head_dim=2,
        v_head_dim=3,
        expert_dim=2,
        n_routed_experts=3,
        token_shift=True,
        qk_norm=True,
        attention=attention,
        ffn=ffn,
        injection="lti" if ffn == "moe" else "linear",
        pass_adapter="lora" if ffn == "moe" else "embedding",
        lora_rank=1,
        halting="settled",
    )
    model, tokens, each = lively(config, seed=3), text(config), torch.tensor([[1, 3, 2, 3], [2, 1, 3, 1]])
    names, weights = zip(*model.named_parameters())

    def run(*weights):
        thought = torch.func.functional_call(model, dict(zip(names, weights)), (tokens, each))
        return thought.logits, thought.halt_prob

    assert torch.autograd.gradcheck(run, [weight.detach().requires_grad_() for weight in weights], fast_mode=True)


# Where it runs.


def move_to_fake(model: nn.Module, device: str) -> None:
    """Inside a FakeTensorMode: give every weight and buffer of a model on meta a place on a device that need not exist."""
    for part in model.modules():
        for name, weight in list(part._parameters.items()):
            if weight is not None:
                part._parameters[name] = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype, device=device))
        for name, buffer in list(part._buffers.items()):
            part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    if isinstance(model, Mythos) and model.config.tie_embeddings:
        model.head.weight = model.embedding.weight


def everything(attention: str, ffn: str) -> Mythos:
    """On meta, with all parts; experts in bfloat16, as fake kernels know their grouped product in no other."""
    kinds = dict(attention=attention, ffn=ffn, injection="lti", pass_adapter="lora", lora_rank=2)
    with torch.device("meta"):
        model = Mythos(replace(SMALL, halting="settled", token_shift=True, qk_norm=True, **kinds))
    return model.bfloat16() if ffn == "moe" else model


@pytest.mark.parametrize("attention, ffn", KINDS)
def test_it_runs_on_fake_cuda_without_mixing_devices(attention, ffn):
    model = everything(attention, ffn).eval()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=False):
        move_to_fake(model, "cuda")
        tokens = torch.zeros(2, 12, dtype=torch.long, device="cuda")
        thought = model(tokens)
        assert {part.device.type for part in thought} == {"cuda"} and thought.logits.shape == (2, 12, 31)


# A CPU build of PyTorch has no guard for CUDA devices, and ends the process where backward asks for one. It has one for
# "lazy", and fake tensors there behave the same: they are not on the CPU, and refuse to be mixed with what is.
OTHER = "cuda" if torch.cuda.is_available() else "lazy"


@pytest.mark.parametrize("attention, ffn", KINDS)
def test_a_training_step_runs_on_another_fake_device_without_mixing(attention, ffn):
    model = everything(attention, ffn)
    with FakeTensorMode(allow_non_fake_inputs=False):
        move_to_fake(model, f"{OTHER}:0")
        optimiser = torch.optim.AdamW(model.parameters())
        tokens = torch.zeros(2, 12, dtype=torch.long, device=f"{OTHER}:0")
        logits, _, halt_prob = model(tokens)
        (F.cross_entropy(logits.flatten(0, 1), tokens.flatten()) + halt_prob.mean()).backward()
        assert {weight.grad.device.type for weight in model.parameters()} == {OTHER}
        optimiser.step()
        truncated = model.read(model.think(tokens, 4, n_backward=2)[-1])
        truncated.sum().backward()
        cache = model.eval().new_cache(2)
        with torch.no_grad():
            for piece in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:]):
                assert model(piece, cache=cache).logits.device.type == OTHER
        with pytest.raises(Exception, match=rf"{OTHER}(:0)?(,| and) cpu|cpu(,| and) {OTHER}"):
            model(torch.zeros(2, 12, dtype=torch.long, device="cpu"))


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("attention, ffn", KINDS)
def test_under_autocast_it_gives_the_same_within_bfloat16_also_with_a_cache_of_any_dtype(attention, ffn, qk_norm):
    kinds = dict(attention=attention, ffn=ffn, qk_norm=qk_norm, injection="lti", token_shift=True, halting="settled")
    config = replace(SMALL, n_experts_per_token=4, **kinds)  # all experts: no choice that rounding could turn
    torch.manual_seed(0)
    model, tokens = Mythos(config), text(config)
    each = passes_of_each(tokens, 4)
    with torch.no_grad():
        whole = model(tokens, each).logits
        with torch.autocast("cpu", torch.bfloat16):
            results = [model(tokens, each).logits]
            for dtype in (torch.float32, torch.bfloat16):
                cache = ThoughtCache(config, 2, 12, n_slots=4, dtype=dtype)
                pieces = [model(tokens[:, a:b], each[:, a:b], cache=cache).logits for a, b in ((0, 5), (5, 6), (6, 12))]
                results.append(torch.cat(pieces, 1))
    size = whole.abs().max()
    for half in results:
        assert half.isfinite().all() and (half.float() - whole).abs().max() < 0.03 * size
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, each).logits.float().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


@pytest.mark.parametrize("attention", CHOICES["attention"])
def test_a_cache_may_round_what_it_keeps(attention):
    config = replace(SMALL, attention=attention)
    torch.manual_seed(0)
    model, tokens = Mythos(config), text(config)
    with torch.no_grad():
        whole, cache = model(tokens).logits, ThoughtCache(config, 2, 12, dtype=torch.bfloat16)
        halves = torch.cat([model(tokens[:, a:b], cache=cache).logits for a, b in ((0, 5), (5, 12))], 1)
    assert halves.dtype == torch.float32 and 0 < largest_difference(halves, whole) < 0.03 * whole.abs().max()


COMPILED = """
import sys
from dataclasses import replace
import torch
from mythoslab.model import CHOICES, MythosBlock, MythosConfig
torch.set_num_threads(1)
config = MythosConfig(31, 16, 2, 24, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=6, expert_dim=8)
for attention in CHOICES["attention"]:
    torch.manual_seed(0)
    block, x = MythosBlock(replace(config, attention=attention), core=True), torch.randn(2, 9, 16)
    backend = sys.argv[1] if attention == "mla" else "aot_eager"
    plain, compiled = block(x, 1), torch.compile(block, backend=backend, fullgraph=True)(x, 1)
    assert torch.allclose(plain, compiled, atol=1e-5), (plain - compiled).abs().max()
    plain, compiled = (torch.autograd.grad(out.square().sum(), block.parameters(), allow_unused=True) for out in (plain, compiled))
    for one, other in zip(plain, compiled):
        assert torch.allclose(one, other, atol=1e-4)
# Experts: in bfloat16 by a grouped product, which PyTorch's compiler knows in no other, and in float32 one by one.
for dtype, expert_dim, atol in ((torch.bfloat16, 8, 0.05), (torch.float32, 8, 1e-5), (torch.float32, 5, 1e-5)):
    torch.manual_seed(0)
    block = MythosBlock(replace(config, ffn="moe", expert_dim=expert_dim), core=True).to(dtype).eval()
    x = torch.randn(2, 9, 16, dtype=dtype)
    with torch.no_grad():
        assert torch.allclose(block(x, 1), torch.compile(block, backend="aot_eager")(x, 1), atol=atol)
print("the same numbers by", sys.argv[1])
"""


def test_a_compiled_block_gives_the_same_numbers():
    # In a process of its own: the shape checks of these tests do not compile.
    backend = "inductor" if any(map(shutil.which, ("c++", "g++", "clang++"))) else "aot_eager"
    ran = subprocess.run([sys.executable, "-c", COMPILED, backend], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0 and ran.stdout == f"the same numbers by {backend}\n", ran.stderr


# Saving and sharing.


@pytest.fixture
def offline(monkeypatch):
    """No way to the net: a connection would fail the test."""

    def refuse(*address):
        raise AssertionError(f"the net was asked for {address}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_saved_model_comes_back_in_its_dtype(dtype, tmp_path, offline):
    model = lively(replace(SMALL, ffn="moe")).to(dtype)
    model.save_pretrained(tmp_path)
    loaded, kept = Mythos.from_pretrained(tmp_path), model.state_dict()
    assert loaded.embedding.weight.dtype == dtype
    assert all(torch.equal(tensor, kept[name]) and tensor.dtype == kept[name].dtype for name, tensor in loaded.state_dict().items())


def test_a_wrapped_part_is_refused_when_saved_and_one_compiled_in_place_is_not(tmp_path, offline):
    model = lively(SMALL)
    model.core.blocks[0].compile()
    model.save_pretrained(tmp_path)
    assert torch.equal(Mythos.from_pretrained(tmp_path).embedding.weight, model.embedding.weight)
    model.core.blocks[0] = torch.compile(model.core.blocks[0])
    with pytest.raises(ValueError, match="parts wrapped by torch.compile.; it must be plain, or compiled in place"):
        model.save_pretrained(tmp_path / "other")


def test_a_model_is_in_training_as_before_whatever_happens_while_it_writes():
    model = lively(SMALL).train()
    model.prelude.eval()
    before = [part.training for part in model.modules()]
    next(generate(model, torch.tensor([1, 2]), 3))
    assert before == [part.training for part in model.modules()]
    model.read = model.think = None  # so that it fails in the midst of it
    with pytest.raises(TypeError):
        next(generate(model, torch.tensor([1, 2]), 3))
    assert before == [part.training for part in model.modules()]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention, ffn", KINDS)
def test_a_saved_model_comes_back_whole(attention, ffn, tied, tmp_path, offline):
    kinds = dict(attention=attention, ffn=ffn, tie_embeddings=tied, halting="settled", pass_adapter="embedding")
    model = lively(replace(SMALL, **kinds)).float()
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    loaded = Mythos.from_pretrained(tmp_path)
    assert isinstance(loaded.config, MythosConfig) and loaded.config == model.config
    assert MythosConfig.from_json((tmp_path / "config.json").read_text()) == model.config
    assert (loaded.head.weight is loaded.embedding.weight) == tied
    weights = model.state_dict()
    assert weights.keys() == loaded.state_dict().keys()
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())
    assert torch.equal(loaded(torch.arange(9)[None]).logits, model(torch.arange(9)[None]).logits)


class Trap:
    """Runs code when a pickle of it is loaded."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


def test_a_pickle_is_refused_and_never_opened(tmp_path, offline, monkeypatch):
    Mythos(SMALL).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(Trap(), tmp_path / "pytorch_model.bin")
    opened = []
    monkeypatch.setattr("torch.load", lambda *args, **kwargs: opened.append(args))
    with pytest.raises(ValueError, match="there is no model.safetensors: a pickled model can run code"):
        Mythos.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a pickled model can run code"):  # the way that a download would take
        Mythos._load_as_pickle(Mythos(SMALL), str(tmp_path / "pytorch_model.bin"), "cpu", False)
    assert opened == []


def test_what_is_missing_or_does_not_belong_together_is_named(tmp_path, offline):
    Mythos(SMALL).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(replace(SMALL, n_core=2).to_json())
    with pytest.raises(ValueError, match="core.blocks.1"):  # not half a model in silence
        Mythos.from_pretrained(tmp_path)
    config.write_text(SMALL.to_json().replace('"n_core": 1', '"n_core": 0'))
    with pytest.raises(ValueError, match="n_core is 0"):
        Mythos.from_pretrained(tmp_path)
    config.write_text(SMALL.to_json().replace("rope_theta", "rope_thetaa"))
    with pytest.raises(ValueError, match="a field of the configuration is 'rope_thetaa'; it must be one of vocab_size"):
        Mythos.from_pretrained(tmp_path)
    config.unlink()
    with pytest.raises(ValueError, match="config.json is 'missing'"):
        Mythos.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=re.escape(f"there is no model.safetensors in {tmp_path}")):
        Mythos.from_pretrained(tmp_path)
    for gone in (tmp_path / "gone", Path("runs/gone"), "a/b/gone", "./gone", config.parent / "README.md"):
        with pytest.raises(ValueError, match=re.escape(f"the folder is {str(Path(gone))!r}; it must be one that is there, or the name of a model on the hub")):
            Mythos.from_pretrained(gone)


# How it writes.


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda model: model(torch.zeros(1, 13, dtype=torch.long)), "13 tokens.*12"),
        (lambda model: model(torch.zeros(1, 3, dtype=torch.long), 0), "n_passes is 0; it must be a whole number of at least 1"),
        (lambda model: model(torch.zeros(1, 3, dtype=torch.long), True), "n_passes is True"),
        (lambda model: model(torch.zeros(1, 3, dtype=torch.long), torch.tensor([[1, 0, 2]])), "n_passes is 0"),
        (lambda model: model.think(torch.zeros(1, 3, dtype=torch.long), 2, n_backward=0), "n_backward is 0"),
        (lambda model: generate(model, torch.zeros(0, dtype=torch.long), 3), "prompt tokens is 0"),
        (lambda model: generate(model, torch.zeros(13, dtype=torch.long), 3), "prompt tokens is 13.*1 to 12"),
        (lambda model: generate(model, torch.zeros(3, dtype=torch.long), -1), "n_new is -1"),
        (lambda model: generate(model, torch.zeros(3, dtype=torch.long), 1, n_passes=0), "n_passes is 0"),
        (lambda model: generate(model, torch.zeros(3, dtype=torch.long), 1, temperature=-1.0), "temperature is -1"),
        (lambda model: generate(model, torch.zeros(3, dtype=torch.long), 1, top_k=0), "top_k is 0"),
        (lambda model: sample(torch.zeros(4), temperature=math.nan), "temperature is nan"),
    ],
)
def test_bad_input_is_named_at_once(call, named):
    with pytest.raises(ValueError, match=named):
        call(Mythos(SMALL))


WRONG_KINDS = """
import torch
from mythoslab.model import Mythos, MythosConfig, generate
model, tokens = Mythos(MythosConfig(vocab_size=8, dim=8, n_heads=2, hidden_dim=8)), torch.zeros(3, 3, dtype=torch.long)
for call in (
    lambda: model(tokens, 2.5),
    lambda: model(tokens, torch.tensor([1, 2, 2])),
    lambda: model(tokens, torch.full((3, 3), 2.7)),
    lambda: model(tokens, torch.full((3, 3), True)),
    lambda: model.think(tokens, 2, n_backward=1.5),
    lambda: generate(model, tokens, 1),
    lambda: generate(model, tokens[0], 2.5),
    lambda: generate(model, tokens[0], 1, top_k=2.5),
    lambda: generate(model, [1, 2], 1),
    lambda: model(tokens[0]),
    lambda: model(tokens.int()),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_the_wrong_kind_of_number_is_named():
    """In a process of its own: here, tests check all types before the model can."""
    run = subprocess.run([sys.executable, "-c", WRONG_KINDS], capture_output=True, text=True)
    assert run.stdout.splitlines() == [
        "n_passes is 2.5; it must be a whole number of at least 1",
        "the shape of n_passes is (3,); it must be that of the tokens, (3, 3)",
        "the dtype of n_passes is torch.float32; it must be one of whole numbers",
        "the dtype of n_passes is torch.bool; it must be one of whole numbers",
        "n_backward is 1.5; it must be a whole number of at least 1, or None for all",
        "the shape of tokens is (3, 3); it must be that of one prompt, (position,)",
        "n_new is 2.5; it must be a whole number of at least 0",
        "top_k is 2.5; it must be a whole number of at least 1",
        "tokens is [1, 2]; it must be a tensor",
        "the shape of tokens is (3,); it must be (batch, position), with a token at least",
        "the dtype of tokens is torch.int32; it must be torch.int64",
    ], run.stderr


@pytest.mark.parametrize("stranger", [-1, SMALL.vocab_size])
def test_a_token_that_the_vocabulary_lacks_is_named(stranger):
    model, tokens = Mythos(SMALL).eval(), torch.tensor([[1, stranger, 2]])
    for call in (lambda: model(tokens), lambda: generate(model, tokens[0], 1)):
        with pytest.raises(ValueError, match=f"vocabulary, 0 to {SMALL.vocab_size - 1}"):
            call()


@pytest.mark.parametrize("changes", [{}, {"token_shift": True}, {"ffn": "moe", "expert_dim": 4, "n_routed_experts": 4}])
def test_no_tokens_are_refused_whatever_the_model(changes):
    model = Mythos(replace(SMALL, **changes))
    for empty in (torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match="with a token at least"):
            model(empty)
    with pytest.raises(ValueError, match="at least 1 each"):
        model.new_cache(1, 0)


@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_no_gradient_is_lost_in_a_cache_without_a_word(attention):
    config = replace(SMALL, attention=attention, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4)
    model, tokens = Mythos(config), torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="written under torch.no_grad"):
        model(tokens, cache=model.new_cache())


@pytest.mark.parametrize("n_chosen", [1, 2])
def test_a_router_learns_however_many_experts_it_chooses(n_chosen):
    config = replace(SMALL, ffn="moe", expert_dim=4, n_routed_experts=4, n_experts_per_token=n_chosen)
    torch.manual_seed(0)
    model, tokens = Mythos(config), torch.arange(SMALL.vocab_size).unsqueeze(0)[:, :6]
    F.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.flatten()).backward()
    part = model.core.blocks[0].ffn
    assert part.router.weight.grad.norm() > 1e-4 * part.gate_up.grad.norm()


def test_passes_of_a_thought_are_its_own():
    model, tokens, each = Mythos(SMALL).eval(), torch.ones(1, 3, dtype=torch.int64), torch.tensor([[1, 2, 3]])
    passes = model(tokens, each).passes
    each.zero_()
    assert passes.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("text, named", [("{", "not JSON"), ("[1]", "a JSON object"), ("{}", "vocab_size is 'missing'")])
def test_a_damaged_configuration_is_named_on_loading(text, named, tmp_path):
    Mythos(SMALL).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=named):
        Mythos.from_pretrained(tmp_path)


@pytest.mark.parametrize("harm", ["cut off", "of another model", "of another size"])
def test_weights_that_do_not_fit_are_named_on_loading(harm, tmp_path):
    Mythos(SMALL).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    if harm == "cut off":
        file.write_bytes(file.read_bytes()[:100])
    else:
        other = torch.nn.Linear(2, 2) if harm == "of another model" else Mythos(replace(SMALL, vocab_size=SMALL.vocab_size + 1))
        save_file({name: weight.clone() for name, weight in other.state_dict().items() if name != "head.weight"}, file)
    with pytest.raises(ValueError, match="model.safetensors does not hold the weights of a model of this configuration"):
        Mythos.from_pretrained(tmp_path)


def test_an_endless_temperature_is_refused():
    model, logits = Mythos(SMALL), torch.randn(5)
    with pytest.raises(ValueError, match="temperature is inf"):
        sample(logits, temperature=math.inf)
    with pytest.raises(ValueError, match="temperature is inf"):
        generate(model, torch.ones(2, dtype=torch.int64), 1, temperature=math.inf)
    assert sample(torch.tensor([10.0, 1.0, 2.0]).half(), temperature=1e-4) == 0


def test_writing_in_the_midst_of_training_counts_no_load_and_goes_on_training():
    model = Mythos(replace(SMALL, ffn="moe", expert_dim=4, n_routed_experts=4)).train()
    assert len(list(generate(model, torch.zeros(3, dtype=torch.long), 4))) == 4
    assert model.training and model.core.blocks[0].ffn.training
    assert model.core.blocks[0].ffn.load.sum() == 0
    assert not model.eval().training and list(generate(model, torch.zeros(3, dtype=torch.long), 1)) and not model.training


def test_a_cache_is_as_long_as_asked_and_says_when_it_is_full():
    model = Mythos(SMALL).eval()
    cache = model.new_cache(2, 5)
    assert {part.memory.shape[2] for part in cache} == {5}
    tokens = torch.randint(SMALL.vocab_size, (2, 5))
    with torch.no_grad():
        assert torch.allclose(model(tokens, cache=cache).logits, model(tokens).logits, atol=1e-5)
    with pytest.raises(ValueError, match="new positions is 1; it must be at most 0"):
        model(tokens[:, :1], cache=cache)


def test_a_full_cache_is_named_and_stays_as_it_was():
    model, cache = Mythos(SMALL), Mythos(SMALL).new_cache()
    with torch.no_grad():
        model(torch.zeros(1, 10, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="13 tokens, and the context holds 12"):
        model(torch.zeros(1, 3, dtype=torch.long), cache=cache)
    assert cache.length == 10 and {part.length for part in cache} == {10}


@given(
    logits=st.lists(st.floats(-5, 5), min_size=2, max_size=8),
    top_k=st.integers(1, 10),
    temperature=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_a_drawn_token_is_among_the_top_k(logits, top_k, temperature, seed):
    logits = torch.tensor(logits)
    token = sample(logits, top_k=top_k, temperature=temperature, generator=torch.Generator().manual_seed(seed))
    assert (logits > logits[token]).sum() < top_k
    if temperature == 0:
        assert logits[token] == logits.max()


@pytest.mark.parametrize("attention, ffn", KINDS)
def test_writing_slides_the_window_and_follows_seed_temperature_and_passes(attention, ffn):
    config = replace(SMALL, attention=attention, ffn=ffn, token_shift=True)
    model, prompt = lively(config, seed=1), torch.tensor([3, 1, 4])
    likeliest, text = list(generate(model, prompt, 20, temperature=0)), prompt.tolist()
    for token in likeliest:
        with torch.no_grad():
            assert token == model(torch.tensor([text[-12:]])).logits[0, -1].argmax()
        text.append(token)
    assert likeliest == list(generate(model, prompt, 20, top_k=1))

    draw, text = torch.Generator().manual_seed(5), prompt.tolist()
    for token in generate(model, prompt, 30, generator=torch.Generator().manual_seed(5)):
        with torch.no_grad():
            assert token == sample(model(torch.tensor([text[-12:]])).logits[0, -1].float(), generator=draw)
        text.append(token)

    def drawn(seed, **options):
        return list(generate(model, prompt, 20, generator=torch.Generator().manual_seed(seed), **options))

    assert drawn(5) == drawn(5) != drawn(6)
    assert drawn(5, n_passes=3) == drawn(5) != drawn(5, n_passes=1)
    assert list(generate(model, prompt, 0)) == [] and len(list(generate(model, torch.zeros(12).long(), 3, n_passes=7))) == 3


def test_it_writes_as_it_is_asked_to():
    model = lively(SMALL)
    writing = generate(model, torch.tensor([1]), 10**9)
    assert [next(writing) < 31 for _ in range(3)] == [True] * 3


# Mistakes that learners make, and a word of the sentence that names each.


class WrongCore(Core):
    """The core, with whatever a subclass changes."""

    norms = injects = freezes = tells = tells_all = keeps = asks = True
    n_blocks, shift, hands_memory = None, 0, True
    n_kept, late, refuses = None, 0, 0

    def told(self, pass_index):
        return pass_index + self.shift

    def thinks(self, each, pass_index):
        return each > pass_index

    def learns(self, pass_index, n_passes, n_backward):
        return n_backward is None or pass_index >= n_passes - n_backward

    def start(self, inputs):
        return inputs

    def one_pass(self, state, inputs, pass_index, shown=None):
        x = self.norm(state) if self.norms else state
        x = self.injection(x, inputs) if self.injects else x
        x = x if self.embedding is None else self.embedding(x, self.told(pass_index))
        for block, memory in list(zip(self.blocks, shown or [None] * len(self.blocks)))[: self.n_blocks]:
            x = block(x, self.told(pass_index), memory if self.hands_memory else None)
        return x

    def forward(self, inputs, n_passes, shown=None, n_backward=None):
        each = None if isinstance(n_passes, int) else n_passes
        n_passes = n_passes if each is None else int(each.max())
        if n_passes < 1 or (each is not None and each.min() < 1):
            raise ValueError("no pass")
        if n_backward == self.refuses:
            raise ValueError("no such passes")
        tells = self.tells and (self.tells_all or shown is None)
        if each is not None and shown is None:
            shown = [Shown() for _ in self.blocks]
        state, states = self.start(inputs), []
        for pass_index in range(n_passes):
            learns = self.learns(pass_index, n_passes, n_backward)
            with torch.set_grad_enabled(learns and (torch.is_grad_enabled() or not self.asks)):
                thinking = None if each is None else self.thinks(each, pass_index)
                for memory in shown or []:
                    memory.thinking = thinking if tells else None
                new = self.one_pass(state, inputs, pass_index, shown)
                state = new if thinking is None or not self.freezes else torch.where(thinking.unsqueeze(-1), new, state)
            states.append(state)
        for memory in (shown or [])[: self.n_kept] if self.keeps else []:
            memory.keep_showing(n_passes + self.late)
        return torch.stack(states)


def core_with(**changes) -> type[Core]:
    return type("Core", (WrongCore,), changes)


class OneBlock(WrongCore):
    def __init__(self, config):
        super().__init__(replace(config, n_core=1))


class LastStateOnly(WrongCore):
    def forward(self, *arguments, **options):
        return super().forward(*arguments, **options)[-1]


class NothingReturned(WrongCore):
    def forward(self, *arguments, **options):
        super().forward(*arguments, **options)


class AnyNumber(WrongCore):
    def forward(self, inputs, n_passes, *rest, **options):
        return super().forward(inputs, max(n_passes, 1) if isinstance(n_passes, int) else n_passes, *rest, **options)


class AlwaysEmbeds(WrongCore):
    def __init__(self, config):
        super().__init__(config)
        self.embedding = Core(replace(config, pass_adapter="embedding")).embedding


class NoAdapters(WrongCore):
    def __init__(self, config):
        super().__init__(replace(config, pass_adapter="none") if config.pass_adapter == "lora" else config)


class NoSinglePass(WrongCore):
    def __init__(self, config):
        super().__init__(config)
        self.config = config

    def one_pass(self, state, *arguments, **options):
        return torch.zeros_like(state)

    def forward(self, *arguments, **options):
        whole = WrongCore(self.config)
        whole.load_state_dict(self.state_dict())
        return whole(*arguments, **options)


class AnyNumberOfEach(WrongCore):
    def forward(self, inputs, n_passes, *rest, **options):
        return super().forward(inputs, n_passes if isinstance(n_passes, int) else n_passes.clamp(min=1), *rest, **options)


CORES = [
    (AlwaysEmbeds, 'embedding.vectors should not be there'),
    (NoAdapters, 'With pass_adapter="lora" the core should hold'),
    (NoSinglePass, "one_pass should give the state after one more pass"),
    (core_with(norms=False), "not normed"),
    (core_with(injects=False), "left out of the passes"),
    (core_with(n_blocks=1), "Only the first block runs"),
    (core_with(told=lambda self, pass_index: 0), "told that it is the first"),
    (core_with(shift=1), "counts from 0, and yours from 1"),
    (core_with(start=lambda self, inputs: torch.zeros_like(inputs)), "starts at zero"),
    (core_with(thinks=lambda self, each, pass_index: torch.ones_like(each).bool()), "All tokens run all passes"),
    (core_with(thinks=lambda self, each, pass_index: each > pass_index + 1), "stops one pass early"),
    (core_with(thinks=lambda self, each, pass_index: each >= pass_index), "stops one pass late"),
    (core_with(thinks=lambda self, each, pass_index: (each[:, :1] > pass_index).expand_as(each)), "Only one token decides"),
    (core_with(tells=False), "write anew"),
    (core_with(tells_all=False), "Memories that are handed in"),
    (core_with(freezes=False), "go on changing"),
    (core_with(hands_memory=False), "write anew"),
    (core_with(keeps=False), "call keep_showing"),
    (core_with(learns=lambda self, *numbers: True), "n_backward has no effect"),
    (core_with(learns=lambda self, index, n, k: k is None or index >= n - k - 1), "One pass too many"),
    (core_with(learns=lambda self, index, n, k: k is None or index > n - k), "No pass has gradients"),
    (core_with(learns=lambda self, index, n, k: k is None or index < k), "No pass has gradients"),
    (core_with(learns=lambda self, index, n, k: k is None or index >= n - 1), "always go through one pass"),
    (core_with(learns=lambda self, index, n, k: k is None or index == n - k), "The last pass has no gradients"),
    (core_with(n_kept=1), "Only the first block's memory"),
    (core_with(late=1), "One slot stays empty"),
    (core_with(refuses=-1), "n_backward=0"),
    (core_with(asks=False), "where the caller switched them off"),
    (OneBlock, "blocks.1.attention_norm.weight is missing"),
    (LastStateOnly, "should have the shape (4, 2, 5, 8)"),
    (NothingReturned, "is a return missing"),
    (AnyNumber, "Zero passes should raise"),
    (AnyNumberOfEach, "own number, too"),
]


def counts(change):
    """Weights of another configuration than the one that was asked for, or so many more."""

    def wrong(config, *, active=False):
        changed = change(config)
        if isinstance(changed, int):
            return count_parameters(config, active=active) + changed
        return count_parameters(changed, active=active)

    return wrong


def n_blocks(config):
    return config.n_prelude + config.n_core + config.n_coda


def halting_width(config):
    return StopHead(config.dim).hidden.out_features


COUNTS = [
    (counts(lambda c: replace(c, n_core=c.n_core * c.n_passes, n_passes=1)), "passes cost no weights"),
    (counts(lambda c: -(2 * n_blocks(c) + 4) * c.dim), "two in every block, and four around them"),
    (counts(lambda c: -2 * n_blocks(c) * c.dim), "inside the blocks are missing"),
    (counts(lambda c: -4 * c.dim), "four norms outside"),
    (counts(lambda c: -n_blocks(c) * c.dim * c.hidden_dim), "three matrices"),
    (counts(lambda c: -n_blocks(c) * c.dim**2), "four matrices"),
    (counts(lambda c: replace(c, tie_embeddings=True)), "two matrices of tokens"),
    (counts(lambda c: 1), "print the names and shapes"),
    (lambda config, *, active=False: count_parameters(config, active=active) / 1, "return an int"),
    (counts(lambda c: replace(c, attention="mha") if c.attention == "gqa" else c), "Grouped queries"),
    (counts(lambda c: replace(c, q_lora_rank=0)), "Latent attention"),
    (counts(lambda c: replace(c, qk_norm=False)), "qk_norm is counted wrong"),
    (counts(lambda c: replace(c, ffn="dense")), "Experts are counted wrong"),
    (counts(lambda c: replace(c, injection="linear") if c.injection == "lti" else c), '"lti" has a matrix'),
    (counts(lambda c: replace(c, injection="lti") if c.injection == "linear" else c), '"linear" has one matrix'),
    (counts(lambda c: -(c.n_passes - 1) * c.dim if c.pass_adapter == "embedding" else 0), "a vector of dim for each pass"),
    (counts(lambda c: replace(c, pass_adapter="none") if c.pass_adapter == "lora" else c), "rank · (out + in)"),
    (counts(lambda c: replace(c, token_shift=False)), "token shift is counted wrong"),
    (counts(lambda c: replace(c, halting="none")), "halting head is counted wrong"),
    (counts(lambda c: 16_512 if c.has_head else 0), "halting head is counted wrong"),
    (counts(lambda c: (c.hidden_dim - halting_width(c)) * (2 * c.dim + 2) if c.has_head else 0), "halting head is counted wrong"),
    (counts(lambda c: (c.dim // 2 - halting_width(c)) * (2 * c.dim + 2) if c.has_head else 0), "halting head of a narrow model"),
    (counts(lambda c: (c.n_passes - c.n_heads) * n_blocks(c) if c.qk_norm and c.attention != "mla" else 0), "qk_norm is counted wrong"),
    (counts(lambda c: (c.dim + c.n_heads - 2 * c.dim // c.n_heads - c.n_heads) * n_blocks(c) if c.qk_norm and c.attention != "mla" else 0), "qk_norm is counted wrong"),
    (counts(lambda c: -c.n_passes * c.lora_rank * (c.dim + c.n_routed_experts) if (c.ffn, c.pass_adapter) == ("moe", "lora") else 0), "the router, too"),
    (lambda config, *, active=False: count_parameters(config, active=active and config.pass_adapter != "embedding"), 'pass_adapter="embedding"'),
    (counts(lambda c: replace(c, halting="act") if c.halting == "converge" else c), "ask config.has_head"),
    (lambda config, *, active=False: count_parameters(config), "active=True"),
    (lambda config, *, active=False: count_parameters(config, active=active and config.pass_adapter == "none"), "adapters of one pass"),
    (counts(lambda c: replace(c, n_routed_experts=c.n_routed_experts // c.n_core) if c.ffn == "moe" else c), "Experts are counted"),
]


def drawn_by(change):
    """``sample`` with other arguments."""

    def wrong(logits, *, temperature=1.0, top_k=None, generator=None):
        return change(logits, temperature=temperature, top_k=top_k, generator=generator)

    return wrong


def multiplies(logits, *, temperature, **options):
    return sample(logits, temperature=1 / temperature if temperature > 0 else temperature, **options)


def ignores_temperature(logits, *, temperature, **options):
    return sample(logits, temperature=min(1.0, abs(temperature) * 1e9), **options)


def divides_the_chances(logits, *, temperature, top_k, generator):
    if temperature == 0:
        return int(logits.argmax())
    chances = logits.softmax(-1) / temperature
    return int(torch.multinomial(chances, 1, generator=generator))


def all_alike(logits, *, temperature, top_k, generator):
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.randint(len(logits), (), generator=generator))


def always_the_likeliest(logits, **options):
    return int(logits.argmax())


def masked(logits, *, top_k, temperature, generator, fill=-math.inf, offset=1, largest=True):
    if top_k is not None:
        last = logits.topk(max(1, min(top_k + 1 - offset, len(logits))), largest=largest).values[-1]
        logits = logits.masked_fill(logits < last if largest else logits > last, fill)
    return sample(logits, temperature=temperature, generator=generator)


def changes_the_logits(logits, *, top_k, temperature, generator):
    if top_k is not None:
        logits.masked_fill_(logits < logits.topk(min(top_k, len(logits))).values[-1], -math.inf)
    return sample(logits, temperature=temperature, top_k=top_k, generator=generator)


def one_or_the_other(logits, *, temperature, top_k, generator):
    temperature = temperature if top_k is None else min(temperature, 1.0)
    return sample(logits, temperature=temperature, top_k=top_k, generator=generator)


def divides_by_zero(logits, *, temperature, top_k, generator):
    chances = (logits / temperature).softmax(0)
    return int(torch.multinomial(chances, 1, generator=generator))


SAMPLES = [
    (drawn_by(multiplies), "divide by it"),
    (drawn_by(ignores_temperature), "temperature has no effect"),
    (drawn_by(lambda logits, *, top_k, **options: sample(logits, **options)), "top_k has no effect"),
    (drawn_by(lambda logits, *, generator, **options: sample(logits, **options)), "hand the generator"),
    (drawn_by(always_the_likeliest), "always take the most likely"),
    (drawn_by(all_alike), "Every token has the same chance"),
    (drawn_by(partial(masked, fill=0.0)), "use minus infinity"),
    (drawn_by(partial(masked, offset=2)), "One token too few"),
    (drawn_by(partial(masked, largest=False)), "keep the least likely"),
    (drawn_by(one_or_the_other), "With top_k the temperature"),
    (drawn_by(masked), "go by the indices of topk"),
    (drawn_by(changes_the_logits), "change the logits that were handed in"),
    (drawn_by(lambda logits, **options: torch.tensor(sample(logits, **options))), "Return the token as an int"),
    (drawn_by(divides_by_zero), "It raised RuntimeError"),
    (drawn_by(lambda logits, *, temperature, **options: sample(logits, temperature=abs(temperature), **options)), "below 0"),
    (drawn_by(lambda logits, *, top_k, **options: sample(logits, top_k=top_k or None, **options)), "top_k=0 leaves no token"),
]

MISTAKES = [
    (name, wrong, cause)
    for name, list_of in (("Core", CORES), ("count_parameters", COUNTS), ("sample", SAMPLES))
    for wrong, cause in list_of
]
MISTAKES += [
    ("sample", edited("model", "sample", *changes), cause)
    for cause, *changes in (
        ("as an int at temperature 0", ("return int(logits.argmax())", "return logits.argmax()")),
        ("with top_k and without", ("torch.multinomial(chances, 1, generator=generator)", "torch.multinomial(chances, 1, generator=None if top_k else generator)")),
        ("with top_k, too", ("temperature < 1e-6", "temperature < 1e-6 and top_k is None")),
        ("leaves every token", ("top_k < len(logits):", "top_k <= len(logits):"), ("logits.topk(top_k)", "logits.topk(min(top_k, len(logits) - 1))")),
        ("softmax does not overflow", ("(logits.float() / temperature).softmax(-1)", "(logits.float() / temperature).exp().clamp(max=3e38)")),
        ("A temperature that is not a number", ("require(0 <= temperature < math.inf,", "require(not temperature < 0 and temperature != math.inf,")),
    )
]

test_check_names_the_cause, test_check_accepts_the_finished_code = mistakes_are_named(
    MISTAKES, [Core, count_parameters, sample]
)
