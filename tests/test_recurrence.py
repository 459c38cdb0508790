"""mythoslab.recurrence: the parts of a block, the loop, and the checks of the notebook that builds them."""

import copy
import resource
import signal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mythoslab.questions import ForestBatch, two_chains
from mythoslab.recurrence import (
    Attention,
    Block,
    ForestModel,
    Loop,
    RMSNorm,
    accuracy_by_depth,
    forest_loss,
    load_forest,
    rotary_angles,
    rotate,
    save_forest,
    train_forest,
)
from tests.mistakes import edited, mistakes_are_named


@given(scale=st.floats(0.1, 1e4), seed=st.integers(0, 99))
def test_norm_does_not_depend_on_scale(scale, seed):
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    norm = RMSNorm(16, eps=0.0).double()
    assert torch.allclose(norm(scale * x), norm(x))


def test_norm_keeps_zero_finite_in_value_and_gradient():
    x = torch.zeros(2, 4, requires_grad=True)
    RMSNorm(4)(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@given(shift=st.integers(0, 40), distance=st.integers(0, 20), seed=st.integers(0, 99))
def test_rotated_products_depend_on_distance_alone(shift, distance, seed):
    query, key = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))
    angles = rotary_angles(64, 8)
    queries, keys = rotate(query.expand(64, 8), angles), rotate(key.expand(64, 8), angles)
    assert torch.allclose(queries[distance] @ keys[0], queries[distance + shift] @ keys[shift], atol=1e-4)


def test_rotation_keeps_lengths_and_leaves_position_zero():
    x = torch.randn(3, 10, 8)
    turned = rotate(x, rotary_angles(10, 8))
    assert torch.allclose(turned.norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert torch.equal(turned[:, 0], x[:, 0])


def test_causal_attention_never_looks_ahead():
    attention, x = Attention(16, 4), torch.randn(2, 7, 16)
    changed = x.clone()
    changed[:, 4:] = torch.randn(2, 3, 16)
    assert torch.allclose(attention(changed)[:, :4], attention(x)[:, :4], atol=1e-6)
    assert not torch.allclose(attention(changed)[:, 4:], attention(x)[:, 4:], atol=1e-2)


def test_attention_without_positions_does_not_care_about_order():
    attention, x = Attention(16, 4, causal=False, rope_theta=None), torch.randn(2, 7, 16)
    order = torch.randperm(7)
    assert torch.allclose(attention(x[:, order]), attention(x)[:, order], atol=1e-6)


def test_block_gradients_are_exact():
    block = Block(4, 2, 6).double()
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, x)


@given(n_blocks=st.integers(1, 4), n_passes=st.integers(1, 9))
def test_loop_runs_block_r_modulo_their_number_and_adds_the_inputs(n_blocks, n_passes):
    loop = Loop([nn.Linear(4, 4) for _ in range(n_blocks)], 4)
    inputs = torch.randn(1, 2, 4)
    state = inputs
    states = loop(inputs, n_passes)
    for index in range(n_passes):
        state = loop.blocks[index % n_blocks](F.rms_norm(state, (4,), eps=1e-6) + inputs)
        assert torch.allclose(states[index], state, atol=1e-5)
    assert states.shape == (n_passes, 1, 2, 4)


def test_more_passes_begin_with_the_same_states():
    loop, inputs = Loop([Block(16, 2, 32)], 16), torch.randn(2, 5, 16)
    assert torch.equal(loop(inputs, 9)[:4], loop(inputs, 4))


def test_untrained_loop_stays_bounded_and_a_naive_one_grows():
    torch.manual_seed(0)
    block, inputs = Block(32, 4, 64, causal=False, rope_theta=None), torch.randn(4, 6, 32)
    states = Loop([block], 32)(inputs, 128).detach()
    size = states.square().mean((1, 2, 3)).sqrt()
    assert size[-1] < 2 * size[3]
    naive = inputs
    for _ in range(128):
        naive = block(naive).detach()
    assert naive.square().mean().sqrt() > 3 * size[-1]


def test_training_follows_links_and_one_pass_does_not():
    torch.manual_seed(0)
    model = ForestModel(n_labels=8)
    losses = train_forest(model, n_passes=4, length=4, n_steps=150)
    facts = two_chains(256, length=4, n_colours=4, n_labels=8, generator=torch.Generator().manual_seed(1))
    by_pass = accuracy_by_depth(model, facts, 4)
    assert by_pass.shape == (4, 4)
    assert losses[-1] < 0.5 * losses[0]
    assert (by_pass[-1] > 0.9).all()
    assert by_pass[0, 2:].max() < 0.65


def test_training_is_reproducible():
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(train_forest(ForestModel(dim=16, hidden_dim=16), n_passes=range(2, 5), n_steps=5, seed=7))
    assert runs[0] == runs[1]


def test_training_lowers_the_loss_it_is_given():
    seen = []

    def last_pass(model, facts, n_passes):
        seen.append(n_passes)
        return F.cross_entropy(model(facts, n_passes)[-1].flatten(0, 1), facts.answer.flatten() - 1)

    torch.manual_seed(3)
    model = ForestModel(dim=16, hidden_dim=16)
    losses = train_forest(model, loss=last_pass, n_passes=range(2, 5), n_steps=8, seed=7)
    torch.manual_seed(3)
    other = train_forest(ForestModel(dim=16, hidden_dim=16), n_passes=range(2, 5), n_steps=8, seed=7)
    assert len(losses) == len(seen) == 8 and set(seen) == {2, 3, 4}
    assert losses[0] != other[0]


def test_the_loss_of_every_pass_is_their_mean():
    torch.manual_seed(0)
    model, facts = ForestModel(dim=16, hidden_dim=16), two_chains(4, length=3, n_colours=4, n_labels=24, generator=torch.Generator())
    answer = facts.answer.flatten() - 1
    passes = [F.cross_entropy(logits.flatten(0, 1), answer) for logits in model(facts, 3)]
    assert torch.allclose(forest_loss(model, facts, 3), torch.stack(passes).mean())


def on_cuda(module):
    """Weights of the same shapes on a GPU that need not exist: inside FakeTensorMode."""
    return {name: torch.empty(weight.shape, device="cuda") for name, weight in module.named_parameters()}


def test_forest_model_runs_on_fake_cuda_without_mixing_devices():
    with torch.device("meta"):
        model, block = ForestModel(n_labels=6), Block(16, 2, 16)
    with FakeTensorMode():
        facts = ForestBatch(*(torch.zeros(2, 6, dtype=torch.long, device="cuda") for _ in ForestBatch._fields))
        logits = torch.func.functional_call(model, on_cuda(model), (facts, 3))
        mixed = torch.func.functional_call(block, on_cuda(block), torch.empty(1, 5, 16, device="cuda"))
    assert logits.device.type == mixed.device.type == "cuda"


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda: Attention(10, 4), "n_heads=4"),
        (lambda: rotary_angles(4, 7), "got 7"),
        (lambda: Loop([nn.Identity()], 4)(torch.zeros(1, 1, 4), 0), "got 0"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


# Mistakes that learners make, and a word of the sentence that names each.


class DividesByMeanSquare(RMSNorm):
    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class DividesByLength(RMSNorm):
    def forward(self, x):
        return F.normalize(x, dim=-1) * self.weight


class SubtractsTheMean(RMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class NormsTheBatch(RMSNorm):
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean() + self.eps) * self.weight


class EpsOutsideTheRoot(RMSNorm):
    def forward(self, x):
        return x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps) * self.weight


class ForgetsTheWeight(RMSNorm):
    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def from_position_one(n_positions, head_dim, theta=10000.0):
    return rotary_angles(n_positions + 1, head_dim, theta)[1:]


def grows(n_positions, head_dim, theta=10000.0):
    return rotary_angles(n_positions, head_dim, 1 / theta)


def ignores_theta(n_positions, head_dim, theta=10000.0):
    return rotary_angles(n_positions, head_dim)


def half_the_exponent(n_positions, head_dim, theta=10000.0):
    return rotary_angles(n_positions, head_dim, theta**0.5)


def turns_back(x, angles):
    return rotate(x, -angles)


def pairs_neighbours(x, angles):
    halves = torch.cat((x[..., ::2], x[..., 1::2]), -1)
    return torch.stack(rotate(halves, angles).chunk(2, -1), -1).flatten(-2)


def two_minuses(x, angles):
    (a, b), cos, sin = x.chunk(2, -1), angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, a * sin - b * cos), -1)


def joined_the_wrong_way(x, angles):
    return torch.cat(rotate(x, angles).chunk(2, -1)[::-1], -1)


class Unscaled(Attention):
    def forward(self, x):
        scaled = copy.deepcopy(self)
        with torch.no_grad():
            scaled.qkv.weight[: x.shape[-1]] *= (x.shape[-1] / self.n_heads) ** 0.5
        return Attention.forward(scaled, x)


class AlwaysCausal(Attention):
    def __init__(self, dim, n_heads, *, causal=True, rope_theta=10000.0):
        super().__init__(dim, n_heads, causal=True, rope_theta=rope_theta)


class NeverCausal(Attention):
    def __init__(self, dim, n_heads, *, causal=True, rope_theta=10000.0):
        super().__init__(dim, n_heads, causal=False, rope_theta=rope_theta)


class NoPositions(Attention):
    def __init__(self, dim, n_heads, *, causal=True, rope_theta=10000.0):
        super().__init__(dim, n_heads, causal=causal, rope_theta=None)


class ForgetsTheOutput(Attention):
    def forward(self, x):
        bare = copy.deepcopy(self)
        with torch.no_grad():
            bare.out.weight.copy_(torch.eye(x.shape[-1]))
        return Attention.forward(bare, x)


class ShowsInputsOnce(Loop):
    def forward(self, inputs, n_passes):
        state, states = inputs, []
        for index in range(n_passes):
            state = self.blocks[index % len(self.blocks)](self.norm(state))
            states.append(state)
        return torch.stack(states)


class NormsNothing(Loop):
    def forward(self, inputs, n_passes):
        state, states = inputs, []
        for index in range(n_passes):
            state = self.blocks[index % len(self.blocks)](state + inputs)
            states.append(state)
        return torch.stack(states)


class RunsTheFirstOnly(Loop):
    def forward(self, inputs, n_passes):
        first = Loop([self.blocks[0]], inputs.shape[-1])
        first.norm = self.norm
        return first(inputs, n_passes)


class BeginsWithTheSecond(Loop):
    def forward(self, inputs, n_passes):
        turned = Loop([*self.blocks[1:], self.blocks[0]], inputs.shape[-1])
        turned.norm = self.norm
        return turned(inputs, n_passes)


class ReturnsTheLast(Loop):
    def forward(self, inputs, n_passes):
        return super().forward(inputs, n_passes)[-1]


class CountsTheStart(Loop):
    def forward(self, inputs, n_passes):
        return torch.cat((inputs[None], super().forward(inputs, n_passes)))


class PlainList(Loop):
    def __init__(self, blocks, dim):
        super().__init__(blocks, dim)
        del self.blocks
        self.blocks = list(blocks)


def test_positions_are_told_apart_whatever_the_default_dtype():
    expected = rotary_angles(600, 8)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(rotary_angles(600, 8), expected)
    finally:
        torch.set_default_dtype(torch.float32)


class WritesToItsInput(RMSNorm):
    def forward(self, x):
        x /= (x.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return x * self.weight


def writes_back(x, angles):
    x.copy_(rotate(x, angles))
    return x


class StoresItsMask(Attention):
    def __init__(self, dim, n_heads, *, causal=True, rope_theta=10000.0):
        super().__init__(dim, n_heads, causal=causal, rope_theta=rope_theta)
        self.register_buffer("mask", torch.ones(4, 4))


class HeadsFirst(Attention):
    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (self.n_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        if self.rope_theta is not None:
            angles = rotary_angles(x.shape[1], query.shape[-1], self.rope_theta)
            query, key = rotate(query, angles), rotate(key, angles)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_of_large_numbers_in_half_precision(dtype):
    x = torch.tensor([[300.0, -600.0, 900.0, 0.0]], dtype=dtype)
    got = RMSNorm(4).to(dtype)(x)
    assert got.dtype == dtype
    assert torch.allclose(got.float(), F.rms_norm(x.float(), (4,)), atol=0.02)


def test_a_loop_without_blocks_and_attention_without_heads_are_refused():
    with pytest.raises(ValueError, match="blocks must hold one"):
        Loop([], 4)
    with pytest.raises(ValueError, match="n_heads=0"):
        Attention(8, 0)


class RunsAll(Loop):
    def forward(self, inputs, n_passes):
        state, states = inputs, []
        for _ in range(n_passes):
            for block in self.blocks:
                state = block(self.norm(state) + inputs)
            states.append(state)
        return torch.stack(states)


class OwnNames(Attention):
    def __init__(self, dim, n_heads, *, causal=True, rope_theta=10000.0):
        super().__init__(dim, n_heads, causal=causal, rope_theta=rope_theta)
        self._kept = self.n_heads, self.causal, self.rope_theta
        del self.n_heads, self.causal, self.rope_theta

    def forward(self, x):
        self.n_heads, self.causal, self.rope_theta = self._kept
        answer = super().forward(x)
        del self.n_heads, self.causal, self.rope_theta
        return answer


class AlwaysTenThousand(Attention):
    def forward(self, x):
        kept, self.rope_theta = self.rope_theta, self.rope_theta and 10000.0
        answer = super().forward(x)
        self.rope_theta = kept
        return answer


class OwnEps(RMSNorm):
    def __init__(self, dim, eps=1e-6):
        super().__init__(dim, 1e-6)


def widening(x, angles):
    return rotate(x.float(), angles)


class CutBetweenPasses(Loop):
    def forward(self, inputs, n_passes):
        state, states = inputs, []
        for index in range(n_passes):
            state = self.blocks[index % len(self.blocks)](self.norm(state.detach()) + inputs)
            states.append(state)
        return torch.stack(states)


class CutOff(Attention):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class StaysWide(RMSNorm):
    def forward(self, x):
        return super().forward(x.float())


class StoresEps(RMSNorm):
    def __init__(self, dim, eps=1e-6):
        super().__init__(dim, eps)
        self.register_buffer("eps_", torch.tensor(eps))


class NormsInHalf(RMSNorm):
    def forward(self, x):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


class StaysAtTheLast(Loop):
    def forward(self, inputs, n_passes):
        state, states = inputs, []
        for index in range(n_passes):
            state = self.blocks[min(index, len(self.blocks) - 1)](self.norm(state) + inputs)
            states.append(state)
        return torch.stack(states)


class OddAndEven(Loop):
    def forward(self, inputs, n_passes):
        if n_passes < 1:
            raise ValueError("no pass")
        state, states = inputs, []
        for index in range(n_passes):
            state = self.blocks[-(index % 2)](self.norm(state) + inputs)
            states.append(state)
        return torch.stack(states)


class OfCopies(Loop):
    def __init__(self, blocks, dim):
        super().__init__(copy.deepcopy(blocks), dim)


class HidesSomewhat(Attention):
    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.rope_theta is not None:
            angles = rotary_angles(x.shape[1], query.shape[-1], self.rope_theta)
            query, key = rotate(query, angles), rotate(key, angles)
        scores = query @ key.mT * query.shape[-1] ** -0.5
        if self.causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -20.0)
        return self.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


class OneAtATime(Attention):
    def forward(self, x):
        return super().forward(x).squeeze(0)


MISTAKES = [
    ("Loop", StaysAtTheLast, "yours stays at the last"),
    ("Loop", OddAndEven, "the order is wrong"),
    ("Loop", OfCopies, "blocks holds copies"),
    ("Attention", HidesSomewhat, "mask with −infinity"),
    ("Attention", OneAtATime, "should have the shape (1, 5, 12), and it has (5, 12)"),
    ("rotate", edited("recurrence", "rotate", ("x.chunk(2, -1)", "(x[:, :, : x.shape[-1] // 2], x[:, :, x.shape[-1] // 2 :])")), "halve the last dimension"),
    ("rotate", lambda x, angles: rotate(x.float(), angles).to(torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32), "float16 came in"),
    ("rotary_angles", lambda n_positions, head_dim, theta=500.0: rotary_angles(n_positions, head_dim, theta), "theta left out"),
    ("RMSNorm", WritesToItsInput, "x has changed"),
    ("rotate", writes_back, "x has changed"),
    ("Attention", StoresItsMask, "persistent=False"),
    ("Attention", HeadsFirst, "Heads come first"),
    ("RMSNorm", DividesByMeanSquare, "take its root"),
    ("RMSNorm", DividesByLength, "root of the mean"),
    ("RMSNorm", SubtractsTheMean, "does not subtract the mean"),
    ("RMSNorm", NormsTheBatch, "over all tokens"),
    ("RMSNorm", EpsOutsideTheRoot, "inside the root"),
    ("RMSNorm", ForgetsTheWeight, "learned weight"),
    ("rotary_angles", from_position_one, "from 1"),
    ("rotary_angles", grows, "negative"),
    ("rotary_angles", ignores_theta, "theta is not used"),
    ("rotary_angles", half_the_exponent, "half of what"),
    ("rotate", turns_back, "wrong way round"),
    ("rotate", pairs_neighbours, "pair neighbours"),
    ("rotate", two_minuses, "lengths change"),
    ("rotate", joined_the_wrong_way, "wrong order"),
    ("Attention", Unscaled, "not divided by the root of head_dim"),
    ("Attention", AlwaysCausal, "hides later ones"),
    ("Attention", NeverCausal, "changes earlier ones"),
    ("Attention", NoPositions, "rope_theta has no effect"),
    ("Attention", ForgetsTheOutput, "output projection is missing"),
    ("Loop", ShowsInputsOnce, "then forgotten"),
    ("Loop", NormsNothing, "not normed"),
    ("Loop", RunsTheFirstOnly, "first block only"),
    ("Loop", BeginsWithTheSecond, "begins with the second block"),
    ("Loop", ReturnsTheLast, "first dimension"),
    ("Loop", CountsTheStart, "without the state at the start"),
    ("Loop", PlainList, "never trained"),
    ("Loop", RunsAll, "runs all blocks"),
    ("Attention", OwnNames, "under these names"),
    ("Attention", AlwaysTenThousand, "split, scaled"),
    ("RMSNorm", OwnEps, "eps has no effect"),
    ("rotate", widening, "dtype of x"),
    ("Loop", CutBetweenPasses, "cannot be learned from"),
    ("Attention", CutOff, "cannot be learned from"),
    ("RMSNorm", NormsInHalf, "squares overflow"),
    ("RMSNorm", StaysWide, "hand back the dtype"),
    ("RMSNorm", StoresEps, "eps_ would be stored"),
    ("rotate", lambda x, angles: rotate(x, angles).detach(), "cannot be learned from"),
]

test_check_names_the_cause, test_check_accepts_the_finished_code = mistakes_are_named(
    MISTAKES, [RMSNorm, rotary_angles, rotate, Attention, Loop]
)


def test_saved_model_comes_back_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "new" / "model.safetensors"
    model = ForestModel(dim=16, hidden_dim=16, n_labels=8)
    save_forest(model, path, command="by hand")
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]
    facts = two_chains(2, length=4, n_colours=4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_forest(path)(facts, 3), model(facts, 3))

    with pytest.raises(ValueError, match="there is no model"):
        load_forest(tmp_path / "none.safetensors")
    whole = path.read_bytes()
    with pytest.raises(ValueError, match="no whole forest model"):
        load_forest(tmp_path)
    for damaged in (whole[:-10], b"", b"{}" * 40, whole.replace(b'\\"dim\\": 16', b'\\"dim\\": 32')):
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="no whole forest model"):
            load_forest(path)


def test_a_disk_that_is_full_is_told_and_leaves_the_model_that_was_there(tmp_path):
    path, model = tmp_path / "model.safetensors", ForestModel(dim=16, hidden_dim=16, n_labels=8)
    save_forest(model, path)
    before, limit = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    told = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"model.safetensors cannot be written \(.*\): make room, or choose another folder"):
            save_forest(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, told)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"] and path.read_bytes() == before


class KnowsOneLinkMoreEachPass(ForestModel):
    def forward(self, facts, n_passes):
        known = [facts.depth <= index + 1 for index in range(n_passes)]
        says = torch.stack([torch.where(at, facts.answer, facts.answer % 4 + 1) for at in known])
        return F.one_hot(says - 1, 4).float()


def test_accuracy_is_counted_pass_by_pass_and_depth_by_depth():
    facts = two_chains(8, length=4, n_colours=4, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]])
    assert torch.equal(accuracy_by_depth(KnowsOneLinkMoreEachPass(), facts, 3), expected)
