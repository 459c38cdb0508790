"""mythoslab.mla: shared key heads, the latent and its cache, two ways to attend, and the checks of the notebook."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mythoslab import mla
from mythoslab.classroom.checks import check
from mythoslab.mla import (
    GroupedQueryAttention,
    LatentCache,
    MultiHeadLatentAttention,
    Projection,
    absorbed_attention,
    causal_attention,
    expanded_attention,
    learns_by_one_dnn,
    project,
)
from mythoslab.recurrence import Attention, rotary_angles, rotate
from tests.mistakes import mistakes_are_named

SMALL = dict(q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
seeds = st.integers(0, 999)


def small(seed=0, **sizes):
    torch.manual_seed(seed)
    attention = MultiHeadLatentAttention(16, 3, **{**SMALL, **sizes})
    with torch.no_grad():
        for name, weight in attention.named_parameters():
            weight.uniform_(0.5, 1.5) if "norm" in name else weight.mul_(2)
    return attention.requires_grad_(False)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_grouped_queries_are_multi_head_attention_with_repeated_keys(n_kv_heads):
    torch.manual_seed(0)
    grouped, whole = GroupedQueryAttention(32, 4, n_kv_heads), Attention(32, 4)
    repeat = lambda weight: weight.unflatten(0, (n_kv_heads, -1)).repeat_interleave(4 // n_kv_heads, 0).flatten(0, 1)  # noqa: E731
    with torch.no_grad():
        parts = grouped.q_proj.weight, repeat(grouped.k_proj.weight), repeat(grouped.v_proj.weight)
        whole.qkv.weight.copy_(torch.cat(parts))
        whole.out.weight.copy_(grouped.o_proj.weight)
    x = torch.randn(2, 7, 32)
    assert torch.allclose(grouped(x), whole(x), atol=1e-6)
    key, value = grouped.keys_and_values(x)
    assert key.shape == value.shape == (2, n_kv_heads, 7, 8)


def test_grouped_queries_never_look_ahead():
    grouped, x = GroupedQueryAttention(16, 4, 2), torch.randn(2, 7, 16)
    changed = x.clone()
    changed[:, 4] += 1
    before, after = grouped(x), grouped(changed)
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("n_query, n_key", [(1, 1), (1, 70), (64, 64), (65, 65), (128, 150), (130, 130)])
@pytest.mark.parametrize("v_dim", [4, 6])
def test_runs_of_queries_are_attention_by_the_book(n_query, n_key, v_dim):
    torch.manual_seed(0)
    query = torch.randn(2, 3, n_query, 6, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 3, n_key, 6, dtype=torch.float64, requires_grad=True)
    value = torch.randn(2, 3, n_key, v_dim, dtype=torch.float64, requires_grad=True)
    scores = (query @ key.mT * 0.3).masked_fill(torch.ones(n_query, n_key).tril(n_key - n_query) == 0, -torch.inf)
    wanted, got = scores.softmax(-1) @ value, causal_attention(query, key, value, 0.3)
    assert torch.allclose(got, wanted, atol=1e-12)
    weigh = torch.randn_like(wanted)
    for mine, theirs in zip(*(torch.autograd.grad((out * weigh).sum(), (query, key, value)) for out in (got, wanted))):
        assert torch.allclose(mine, theirs, atol=1e-12)


@pytest.fixture(params=["one_dnn", "mkl"])
def library(request, monkeypatch):
    monkeypatch.setattr(mla, "BY_ONE_DNN", request.param == "one_dnn" and mla.ONE_DNN is not None)
    return request.param


@pytest.mark.parametrize("shape", [(33,), (3, 40), (2, 3, 16), (5,), ()], ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_a_projection_has_the_numbers_and_gradients_of_a_linear_layer(shape, strided, library):
    torch.manual_seed(0)
    weight = torch.randn(17, 24)
    whole = torch.randn(*shape, 30)
    x = whole[..., 3:27] if strided else whole[..., :24].clone()
    results = []
    for multiply, dtype in ((project, torch.float32), (nn.functional.linear, torch.float64)):
        inputs = [part.detach().to(dtype).requires_grad_() for part in (x, weight)]
        out = multiply(*inputs)
        weigh = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        gradients = torch.autograd.grad((out * weigh).sum(), inputs, create_graph=True)
        results.append((out, *gradients, *torch.autograd.grad(gradients[0].square().sum(), inputs[1])))
    for own, exact in zip(*results):
        assert torch.allclose(own.double(), exact, atol=1e-4, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_projection_is_a_linear_layer_to_whoever_asks():
    torch.manual_seed(0)
    own = Projection(6, 4)
    torch.manual_seed(0)
    theirs = nn.Linear(6, 4, bias=False)
    assert isinstance(own, nn.Linear) and torch.equal(own.weight, theirs.weight) and own.bias is None
    x = torch.randn(2, 40, 6)
    assert torch.allclose(torch.func.vmap(own)(x), theirs(x), atol=1e-6)
    jacobian = torch.func.jacrev(lambda x: own(x).sum(0))(x[0])
    assert torch.allclose(jacobian, theirs.weight[:, None].expand(-1, 40, -1), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert own(x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "told, wide",
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 97", False),  # Zen 4
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2", True),  # Zen 5
        ("vendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143", False),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 26", False),
        ("AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD", False),  # as Windows tells it
        ("AMD64 Family 26 Model 68 Stepping 0, AuthenticAMD", True),
        ("AuthenticAMD", False),
        ("arm", False),
        ("", False),
    ],
)
def test_the_processors_that_gain_by_one_dnn_are_known(told, wide, monkeypatch, tmp_path):
    assert mla.BY_ONE_DNN == (mla.ONE_DNN is not None and mla._wider_than_mkl_knows())
    (tmp_path / "cpuinfo").write_text(told)
    monkeypatch.setattr(mla, "Path", lambda _: tmp_path / "cpuinfo")
    assert mla._wider_than_mkl_knows() == wide
    monkeypatch.setattr(mla, "Path", lambda _: tmp_path / "missing")
    monkeypatch.setattr(mla.platform, "processor", lambda: told)
    assert mla._wider_than_mkl_knows() == wide


def test_only_training_in_plain_float32_goes_to_one_dnn(monkeypatch):
    monkeypatch.setattr(mla, "BY_ONE_DNN", True)
    monkeypatch.setattr(mla, "ONE_DNN", lambda *arguments: pytest.fail("asked, not called"))
    x, weight = torch.randn(40, 6, requires_grad=True), torch.randn(4, 6)
    assert learns_by_one_dnn(x, weight) and not learns_by_one_dnn(x.detach(), weight)
    assert not learns_by_one_dnn(x.double(), weight.double()) and not learns_by_one_dnn(x.bfloat16(), weight.bfloat16())
    assert not learns_by_one_dnn(x.to("meta"), weight.to("meta"))
    with torch.no_grad():
        assert not learns_by_one_dnn(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not learns_by_one_dnn(x, weight)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert not learns_by_one_dnn(torch.randn(40, 6, requires_grad=True), weight)
    monkeypatch.setattr(mla, "BY_ONE_DNN", False)
    assert not learns_by_one_dnn(x, weight)


@given(
    seed=seeds,
    n_query=st.integers(1, 9),
    more=st.integers(0, 9),
    n_heads=st.integers(1, 4),
    n_nope=st.integers(1, 6),
    n_rope=st.integers(1, 6),
    n_value=st.integers(1, 6),
    rank=st.integers(1, 9),
)
def test_absorbed_is_expanded(seed, n_query, more, n_heads, n_nope, n_rope, n_value, rank):
    torch.manual_seed(seed)
    query = torch.randn(2, n_heads, n_query, n_nope + n_rope)
    kept, up = torch.randn(2, n_query + more, rank + n_rope), torch.randn(n_heads, n_nope + n_value, rank)
    one, other = (attend(query, kept, up, 0.3) for attend in (expanded_attention, absorbed_attention))
    assert one.shape == other.shape == (2, n_heads, n_query, n_value)
    assert torch.allclose(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attend", [expanded_attention, absorbed_attention])
def test_gradients_are_right(attend):
    torch.manual_seed(0)
    shapes = (1, 2, 2, 5), (1, 3, 5), (2, 5, 3)
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *tensors: attend(*tensors, 0.4), inputs)


@pytest.mark.parametrize("squeezed", [12, None])
def test_it_is_multi_head_attention_with_keys_and_values_unpacked_from_the_latent(squeezed):
    """Head by head and query by query, in the paper's words (DeepSeek-AI 2024, DeepSeek-V2, eq. 37 to 47)."""
    part, x = small(q_lora_rank=squeezed).double(), torch.randn(5, 16, dtype=torch.float64)
    normed = lambda v, layer: v / (v.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight  # noqa: E731
    frequency = 10000.0 ** -(torch.arange(2, dtype=torch.float64) / 2)

    def turn(v, place):  # channel pairs (i, i + half)
        pairs = torch.complex(v[:2], v[2:]) * torch.polar(torch.ones(2, dtype=torch.float64), place * frequency)
        return torch.cat((pairs.real, pairs.imag))

    if squeezed is None:
        queries = x @ part.q_proj.weight.T
    else:
        queries = normed(x @ part.q_a_proj.weight.T, part.q_a_layernorm) @ part.q_b_proj.weight.T
    latent, key_rope = (x @ part.kv_a_proj_with_mqa.weight.T).split((10, 4), -1)
    unpacked = normed(latent, part.kv_a_layernorm) @ part.kv_b_proj.weight.T
    mixed = torch.zeros(5, 18, dtype=torch.float64)
    for head in range(3):
        query, key, value = queries[:, 12 * head : 12 * head + 12], unpacked[:, 14 * head : 14 * head + 8], unpacked[:, 14 * head + 8 : 14 * head + 14]
        for at in range(5):
            scores = [query[at, :8] @ key[j] + turn(query[at, 8:], at) @ turn(key_rope[j], j) for j in range(at + 1)]
            chances = (torch.stack(scores) / 12**0.5).softmax(0)
            mixed[at, 6 * head : 6 * head + 6] = chances @ value[: at + 1]
    assert torch.allclose(part(x.unsqueeze(0))[0], mixed @ part.o_proj.weight.T, atol=1e-6)



@given(
    seed=seeds, pieces=st.lists(st.integers(1, 9), min_size=1, max_size=5), squeezed=st.booleans(), rank=st.integers(2, 40)
)
def test_cached_is_uncached_however_it_is_cut(seed, pieces, squeezed, rank):
    attention = small(seed, q_lora_rank=12 if squeezed else None, kv_lora_rank=rank)
    x = torch.randn(2, sum(pieces), 16)
    cache, results = attention.new_cache(2, sum(pieces)), []
    for n_new in pieces:
        results.append(attention(x[:, cache.length : cache.length + n_new], cache))
        cache.advance(n_new)
    assert torch.allclose(torch.cat(results, 1), attention(x), atol=1e-5)


def test_both_ways_are_taken_and_agree_on_a_long_text():
    attention = small(kv_lora_rank=10)  # 2 · 10 − 8 − 6 = 6 more products a pair, 10 · 14 to unpack: up to 23 queries
    assert attention.absorbs(23, 10**6) and not attention.absorbs(24, 10**6)
    assert attention.absorbs(18, 80) and not attention.absorbs(19, 80)  # carrying over 18 queries: 10 · 14 more for each
    x, cache = torch.randn(1, 60, 16), attention.new_cache(1, 60)
    results = []
    for n_new in (24, 23, 1, 12):
        results.append(attention(x[:, cache.length : cache.length + n_new], cache))
        cache.advance(n_new)
    assert torch.allclose(torch.cat(results, 1), attention(x), atol=1e-5)
    wide = small(kv_lora_rank=3)  # a latent so short that absorbing is always cheaper
    assert wide.absorbs(10**6, 10**6)
    assert not any(attention.absorbs(n_tokens, n_tokens) for n_tokens in range(1, 100))  # a prompt into an empty cache


def test_a_token_never_hears_of_later_ones_or_of_other_sequences():
    attention, x = small(), torch.randn(3, 8, 16)
    changed = x.clone()
    changed[:, 5] += 1
    changed[1] += 1
    before, after = attention(x), attention(changed)
    assert torch.allclose(before[[0, 2], :5], after[[0, 2], :5], atol=1e-6)
    assert torch.allclose(attention(x[1:2]), before[1:2], atol=1e-6)
    assert not torch.allclose(before[0, 5:], after[0, 5:])


def test_the_cache_holds_exactly_the_latent_and_the_rotated_key():
    attention = small()
    for n_slots in (1, 5):
        cache = attention.new_cache(3, 7, n_slots=n_slots)
        assert cache.memory.shape == (n_slots, 3, 7, 10 + 4)
        assert cache.bytes_per_token == 4 * n_slots * (10 + 4)
    assert attention.bfloat16().new_cache(1, 1).memory.dtype == torch.bfloat16


def test_writing_keeps_the_memory_where_it_is_and_slots_apart():
    cache = LatentCache(2, 8, 3, n_slots=3)
    place = cache.memory.data_ptr()
    written = torch.randn(5, 2, 4, 3)
    for pass_index in range(5):
        assert torch.equal(cache.write(written[pass_index], pass_index), written[pass_index])
    cache.advance(4)
    assert cache.memory.data_ptr() == place
    for slot, pass_index in ((0, 0), (1, 1), (2, 4)):  # passes 2, 3 and 4 share the last slot
        assert torch.equal(cache.memory[slot, :, :4], written[pass_index])
    assert not cache.memory[:, :, 4:].any()
    new = torch.randn(2, 1, 3)
    assert torch.equal(cache.write(new, 7), torch.cat((written[4], new), 1))


def test_crop_and_take_go_on_from_what_is_left():
    attention, x = small(), torch.randn(3, 9, 16)
    cache = attention.new_cache(3, 9)
    attention(x, cache)
    cache.advance(9)
    cache.crop(4)
    cache.take([2, 0])
    assert cache.memory.shape[1] == 2
    assert torch.allclose(attention(x[[2, 0], 4:], cache), attention(x)[[2, 0], 4:], atol=1e-5)


def test_passes_through_slots_of_their_own_are_uncached():
    attention, x = small(), torch.randn(2, 6, 16)

    def loop(x, cache=None):
        state = x
        for pass_index in range(3):
            state = state + attention(state, cache, pass_index)
        return state

    whole, cache, results = loop(x), attention.new_cache(2, 6, n_slots=3), []
    for position in range(6):
        results.append(loop(x[:, position : position + 1], cache))
        cache.advance(1)
    assert torch.allclose(torch.cat(results, 1), whole, atol=1e-4)


def cache_of(length=0):
    cache = LatentCache(2, 6, 3)
    cache.length = length
    return cache


BAD = [
    (lambda: small(qk_rope_head_dim=3), "qk_rope_head_dim is 3; it must be even"),
    (lambda: small(qk_rope_head_dim=0), "qk_rope_head_dim is 0; it must be at least 1"),
    (lambda: small(kv_lora_rank=0), "kv_lora_rank is 0; it must be at least 1"),
    (lambda: small(q_lora_rank=0), "q_lora_rank is 0; it must be at least 1"),
    (lambda: MultiHeadLatentAttention(16, 0, **SMALL), "n_heads is 0; it must be at least 1"),
    (lambda: GroupedQueryAttention(18, 4, 2), "dim is 18; it must be divisible by n_heads, 4"),
    (lambda: GroupedQueryAttention(16, 4, 3), "n_kv_heads is 3; it must be a divisor of n_heads, 4"),
    (lambda: GroupedQueryAttention(12, 4, 2), "the size of a head is 3; it must be even"),
    (lambda: LatentCache(0, 6, 3), r"\(n_slots, batch_size, max_positions, width\) is \(1, 0, 6, 3\)"),
    (lambda: cache_of(5).write(torch.zeros(2, 2, 3)), "the number of new positions is 2; it must be at most 1: 5 of 6 are filled"),
    (lambda: cache_of().write(torch.zeros(1, 2, 3)), r"the shape of new is \(1, 2, 3\); it must be \(2, 2, 3\)"),
    (lambda: cache_of().write(torch.zeros(2, 2, 4)), r"the shape of new is \(2, 2, 4\); it must be \(2, 2, 3\)"),
    (lambda: cache_of().write(torch.zeros(2, 2, 3, dtype=torch.float64)), "the dtype and device of new is .*float64"),
    (lambda: cache_of().write(torch.zeros(2, 2, 3, device="meta")), "the dtype and device of new is .*meta"),
    (lambda: cache_of().write(torch.zeros(2, 2, 3), -1), "pass_index is -1; it must be at least 0"),
    (lambda: cache_of().advance(7), "n_positions is 7; it must be from 0 to 6"),
    (lambda: cache_of(3).crop(4), "length is 4; it must be from 0 to 3"),
    (lambda: cache_of().take([2]), r"rows is \[2\]; it must be from 0 to 1"),
    (lambda: small()(torch.zeros(2, 7, 16), small().new_cache(2, 6)), "the number of new positions is 7; it must be at most 6"),
    (lambda: small()(torch.zeros(2, 7, 15)), r"the shape of x is \(2, 7, 15\); it must be \(batch, position, 16\)"),
]


@pytest.mark.parametrize("call, sentence", BAD, ids=[sentence.partition(";")[0] for _, sentence in BAD])
def test_bad_input_is_named(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize("squeezed", [True, False])
def test_it_runs_on_fake_cuda_without_mixing_devices(squeezed):
    sizes = {**SMALL, "q_lora_rank": 12 if squeezed else None}
    with torch.device("meta"):
        attention, grouped = MultiHeadLatentAttention(16, 3, **sizes), GroupedQueryAttention(16, 4, 2)
    with FakeTensorMode():
        x = torch.empty(2, 5, 16, device="cuda")
        weights = {name: torch.empty(weight.shape, device="cuda") for name, weight in attention.named_parameters()}
        call = lambda *inputs: torch.func.functional_call(attention, weights, inputs)  # noqa: E731
        assert call(x).device.type == "cuda"
        cache = LatentCache(2, 40, 14, n_slots=2, device="cuda")
        for n_new in (5, 1, 30):
            assert call(torch.empty(2, n_new, 16, device="cuda"), cache, 1).device.type == "cuda"
            cache.advance(n_new)
        cache.take([1])
        weights = {name: torch.empty(weight.shape, device="cuda") for name, weight in grouped.named_parameters()}
        assert torch.func.functional_call(grouped, weights, (x,)).device.type == "cuda"


def test_it_follows_autocast_and_half_precision():
    attention, x = small(), torch.randn(2, 6, 16)
    whole = attention(x)
    half = attention.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.allclose(half.float(), whole, atol=0.1)


# Mistakes that learners make, and a word of the sentence that names each.


class InTurn(GroupedQueryAttention):
    def forward(self, x):
        key, value = (part.repeat(1, 2, 1, 1) for part in self.keys_and_values(x))
        return self.finish(x, key, value)

    def finish(self, x, key, value, causal=True):
        query = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query = rotate(query, rotary_angles(x.shape[1], self.head_dim))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class SeesAhead(InTurn):
    def forward(self, x):
        key, value = (part.repeat_interleave(2, 1) for part in self.keys_and_values(x))
        return self.finish(x, key, value, causal=False)


class KeysStand(GroupedQueryAttention):
    def keys_and_values(self, x):
        return tuple(proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in (self.k_proj, self.v_proj))


class TurnsValues(GroupedQueryAttention):
    def keys_and_values(self, x):
        key, value = super().keys_and_values(x)
        return key, rotate(value, rotary_angles(x.shape[1], self.head_dim))


class SharesByKeyHeads(GroupedQueryAttention):
    """As many query heads share a key head as there are key heads."""

    def forward(self, x):
        query = rotate(self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2), rotary_angles(x.shape[1], self.head_dim))
        key, value = (part.repeat_interleave(part.shape[1], 1) for part in self.keys_and_values(x))
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class AllHeads(GroupedQueryAttention):
    def __init__(self, dim, n_heads, n_kv_heads):
        super().__init__(dim, n_heads, n_heads)


class AnyGroups(GroupedQueryAttention):
    def __init__(self, dim, n_heads, n_kv_heads):
        super().__init__(dim, n_heads, n_kv_heads if n_heads % n_kv_heads == 0 else 1)


class MovesOn(LatentCache):
    def write(self, new, pass_index=0):
        kept = super().write(new, pass_index)
        self.length += new.shape[1]
        return kept


class ReturnsNew(LatentCache):
    def write(self, new, pass_index=0):
        super().write(new, pass_index)
        return new


class ReturnsAll(LatentCache):
    def write(self, new, pass_index=0):
        super().write(new, pass_index)
        return self.memory[min(pass_index, len(self.memory) - 1)]


class OneSlot(LatentCache):
    def write(self, new, pass_index=0):
        return super().write(new, 0)


class StartsAgain(LatentCache):
    def write(self, new, pass_index=0):
        return super().write(new, pass_index % len(self.memory))


class AtTheStart(LatentCache):
    def write(self, new, pass_index=0):
        length, self.length = self.length, 0
        super().write(new, pass_index)
        self.length = length
        return self.memory[min(pass_index, len(self.memory) - 1)][:, : length + new.shape[1]]


class NewMemory(LatentCache):
    def write(self, new, pass_index=0):
        self.memory = self.memory.clone()
        return super().write(new, pass_index)


class InTheGraph(LatentCache):
    def write(self, new, pass_index=0):
        with torch.no_grad():
            kept = super().write(new, pass_index)
        return kept + 0 * new.sum() if new.requires_grad else kept


class Rounds(LatentCache):
    def write(self, new, pass_index=0):
        return super().write(new.to(self.memory.dtype), pass_index)


class Spreads(LatentCache):
    def write(self, new, pass_index=0):
        return super().write(new.expand(self.memory.shape[1], -1, -1), pass_index)


def written_out(**mistake):
    def attend(query, kept, up, scale):
        from mythoslab.classroom.checks.mla import _by_hand

        return _by_hand(query, kept, up, scale, **mistake)

    return attend


def latents_out(query, kept, up, scale):
    n_nope = query.shape[-1] - (kept.shape[-1] - up.shape[-1])
    return absorbed_attention(query, kept, torch.cat((up[:, :n_nope], torch.eye(up.shape[-1]).expand(len(up), -1, -1)), 1), scale)


class IgnoresDtype(LatentCache):
    def __init__(self, *sizes, dtype=None, **kind):
        super().__init__(*sizes, **kind)


class AxesSwapped(LatentCache):
    def __init__(self, batch_size, max_positions, width, *, n_slots=1, **kind):
        super().__init__(batch_size, max_positions, width, n_slots=n_slots, **kind)
        self.memory = self.memory.transpose(0, 1).contiguous()


class NoBytes(LatentCache):
    bytes_per_token = None


class NamedOtherwise(LatentCache):
    def __init__(self, *sizes, **kind):
        super().__init__(*sizes, **kind)
        self.kept = self.__dict__.pop("memory")


def by_a_square_mask(query, kept, up, scale):
    """Absorbed attention as written in formulas; its mask is that of all positions."""
    n_nope, rank = query.shape[-1] - (kept.shape[-1] - up.shape[-1]), up.shape[-1]
    key_up, value_up = up[:, :n_nope], up[:, n_nope:]
    carried = torch.einsum("bhqn,hnr->bhqr", query[..., :n_nope], key_up)
    scores = torch.einsum("bhqr,bkr->bhqk", torch.cat((carried, query[..., n_nope:]), -1), kept) * scale
    n_query, n_key = scores.shape[-2:]
    seen = torch.ones(n_key, n_key, dtype=torch.bool).tril()[n_key - n_query :]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkr,hvr->bhqv", weights, kept[..., :rank], value_up)


def test_check_accepts_absorbed_attention_with_a_mask_of_all_positions(capsys):
    by_a_square_mask.__name__ = "absorbed_attention"
    assert check(by_a_square_mask) is by_a_square_mask, capsys.readouterr().out


class AlwaysTenThousand(GroupedQueryAttention):
    def __init__(self, dim, n_heads, n_kv_heads, *, rope_theta=10000.0):
        super().__init__(dim, n_heads, n_kv_heads)


class CropsBy(LatentCache):
    def crop(self, length):
        super().crop(length)
        self.length = 4 - length


class TakesInTurn(LatentCache):
    def take(self, rows):
        if not all(0 <= row < self.memory.shape[1] for row in rows):
            raise ValueError("there is no such row")
        for place, row in enumerate(rows):
            self.memory[:, place] = self.memory[:, row]


class TakesInPlace(LatentCache):
    def take(self, rows):
        if not all(0 <= row < self.memory.shape[1] for row in rows):
            raise ValueError("there is no such row")
        self.memory[:] = self.memory[:, rows]


class CountsFromTheEnd(LatentCache):
    def take(self, rows):
        super().take([row % self.memory.shape[1] if row < 0 else row for row in rows])


class GoesBack(LatentCache):
    def advance(self, n_positions):
        if n_positions < 0:
            self.length += n_positions
        else:
            super().advance(n_positions)


class CropsBelowZero(LatentCache):
    def crop(self, length):
        super().crop(max(0, length))


def head_by_head(query, kept, up, scale):
    heads = [expanded_attention(query[:, head : head + 1], kept, up[head : head + 1], scale) for head in range(len(up))]
    return torch.cat(heads, 1)


def half_absorbed(query, kept, up, scale):
    """The keys stay latents, and the values of all positions are made."""
    rank, n_nope = up.shape[2], query.shape[3] - kept.shape[2] + up.shape[2]
    carried = torch.cat((query[..., :n_nope] @ up[:, :n_nope], query[..., n_nope:]), -1)
    scores = carried @ kept.mT.unsqueeze(1) * scale
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(scores.shape[-1] - scores.shape[-2])
    value = kept[:, None, :, :rank] @ up[:, n_nope:].mT
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value


def by_multiplying(query, kept, up, scale):
    """Keys and values of all positions, without a matrix product."""
    rank, n_nope = up.shape[2], query.shape[3] - kept.shape[2] + up.shape[2]
    unpacked = (kept[:, None, :, None, :rank] * up[None, :, None]).sum(-1)  # (batch, head, key, nope + v)
    rope_key = kept[:, None, :, rank:].expand(-1, len(up), -1, -1)
    key, value = torch.cat((unpacked[..., :n_nope], rope_key), -1), unpacked[..., n_nope:]
    return causal_attention(query, key, value, scale)


def in_halves(query, kept, up, scale):
    return written_out()(query, kept, torch.cat(up.chunk(2, 1), 1), scale) if up.shape[1] % 2 == 0 else query[..., : up.shape[1] // 2]


class AdvancesAnywhere(LatentCache):
    def advance(self, n_positions):
        self.length += n_positions


class AnySize(LatentCache):
    def __init__(self, batch_size, max_positions, width, **kind):
        super().__init__(max(1, batch_size), max_positions, width, **kind)


MISTAKES = [
    ("LatentCache", IgnoresDtype, "dtype that was asked for has no effect"),
    ("LatentCache", AxesSwapped, "memory, (slot, batch, position, width)"),
    ("LatentCache", NoBytes, "16 bytes per token"),
    ("LatentCache", NamedOtherwise, "keep its numbers in self.memory"),
    ("GroupedQueryAttention", InTurn, "dealt out in turn"),
    ("GroupedQueryAttention", SeesAhead, "sees later ones"),
    ("GroupedQueryAttention", KeysStand, "keys are not rotated"),
    ("GroupedQueryAttention", TurnsValues, "values are rotated too"),
    ("GroupedQueryAttention", SharesByKeyHeads, "neighbours share a key head"),
    ("GroupedQueryAttention", AllHeads, "2 heads × 4 channels"),
    ("GroupedQueryAttention", AnyGroups, "should raise a ValueError"),
    ("LatentCache", MovesOn, "leave it to advance"),
    ("LatentCache", ReturnsNew, "new positions alone"),
    ("LatentCache", ReturnsAll, "never filled"),
    ("LatentCache", OneSlot, "write over each other"),
    ("LatentCache", StartsAgain, "starts again at slot 0"),
    ("LatentCache", AtTheStart, "written at the start"),
    ("LatentCache", NewMemory, "makes new memory"),
    ("LatentCache", InTheGraph, "want a gradient should raise"),
    ("GroupedQueryAttention", AlwaysTenThousand, "rope_theta has no effect"),
    ("LatentCache", CropsBy, "crop(3) should leave three"),
    ("LatentCache", TakesInTurn, "changed places"),
    ("absorbed_attention", in_halves, "need not be as wide"),
    ("LatentCache", AdvancesAnywhere, "Advancing by three"),
    ("LatentCache", AnySize, "batch of zero"),
    ("LatentCache", TakesInPlace, "take([0])"),
    ("LatentCache", CountsFromTheEnd, "take([0, -1]) of two"),
    ("LatentCache", GoesBack, "crop goes back"),
    ("LatentCache", CropsBelowZero, "Cropping to −1"),
    ("LatentCache", Rounds, "rounded without a word"),
    ("LatentCache", Spreads, "spread over the batch"),
    *(
        (name, written_out(**mistake), cause)
        for name in ("expanded_attention", "absorbed_attention")
        for mistake, cause in (
            (dict(causal=None), "not causal"),
            (dict(causal="first"), "counts from the first key"),
            (dict(rope=False), "rotated key is left out"),
            (dict(rope_first="query"), "rotated channels of the query to come first"),
            (dict(rope_first="kept"), "rotated key to come first in kept"),
            (dict(swapped=True), "changed places"),
            (dict(key_scale=1.0), "scale is left out"),
        )
    ),
    ("absorbed_attention", latents_out, "should have the shape"),
    ("absorbed_attention", lambda *arguments: expanded_attention(*arguments), "on the way"),
    ("absorbed_attention", head_by_head, "on the way"),
    ("absorbed_attention", by_multiplying, "on the way"),
    ("absorbed_attention", half_absorbed, "on the way"),
]

PARTS = [GroupedQueryAttention, LatentCache, expanded_attention, absorbed_attention]
test_check_names_the_cause, test_check_accepts_the_finished_code = mistakes_are_named(MISTAKES, PARTS)
