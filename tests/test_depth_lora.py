"""mythoslab.depth_lora: passes that differ, a stack poured into a loop, and the checks of the notebook that builds them."""

import copy
import inspect
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mythoslab.depth_lora import (
    AdaptedBlock,
    DepthLoop,
    DepthLoRA,
    EmbeddedBlock,
    PassEmbedding,
    fold_norms,
    loop_from_stack,
    low_rank,
)
from mythoslab.recurrence import Block, ForestModel, Loop, train_forest
from tests.mistakes import mistakes_are_named

seeds = st.integers(0, 999)
sizes = st.integers(1, 7)


def numbers(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_block(seed=0):
    torch.manual_seed(seed)
    block = Block(16, 2, 24, causal=False, rope_theta=None)
    with torch.no_grad():
        block.attention_norm.weight.uniform_(0.5, 2.0)
        block.ffn_norm.weight.uniform_(0.5, 2.0)
    return block


def trained(module):
    """As after some training: nothing is zero any more."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "lora_b" in name or "vectors" in name:
                weight.normal_(0.0, 0.5)
    return module


@given(seed=seeds, n_in=sizes, n_out=sizes, n_passes=st.integers(1, 5), pass_index=st.integers(0, 12), data=st.data())
def test_merged_is_unmerged(seed, n_in, n_out, n_passes, pass_index, data):
    rank = data.draw(st.integers(1, min(n_in, n_out)))
    beyond = data.draw(st.sampled_from(["hold", "none"]))
    torch.manual_seed(seed)
    lora = trained(DepthLoRA(n_in, n_out, rank, n_passes, beyond).double())
    weight, x = numbers(seed, n_out, n_in), numbers(seed + 1, 2, 3, n_in)
    assert torch.allclose(x @ lora.merged(weight, pass_index).mT, x @ weight.mT + lora(x, pass_index))
    change = lora.merged(weight, pass_index) - weight
    assert bool((torch.linalg.svdvals(change)[rank:] < 1e-9).all())


@given(n_passes=st.integers(1, 5), pass_index=st.integers(0, 12), beyond=st.sampled_from(["hold", "none"]))
def test_nothing_changes_before_training(n_passes, pass_index, beyond):
    x, weight = numbers(0, 2, 6, dtype=torch.float32), numbers(1, 4, 6, dtype=torch.float32)
    assert torch.equal(PassEmbedding(n_passes, 6, beyond)(x, pass_index), x)
    lora = DepthLoRA(6, 4, 2, n_passes, beyond)
    assert torch.equal(lora.merged(weight, pass_index), weight)
    assert not lora(x, pass_index).any()


def test_beyond_the_trained_passes_hold_keeps_the_last_and_none_adds_nothing():
    x, weight = torch.randn(2, 6), torch.randn(4, 6)
    embedding, lora = trained(PassEmbedding(3, 6)), trained(DepthLoRA(6, 4, 2, 3))
    for later in (3, 10):
        assert torch.equal(embedding(x, later), embedding(x, 2))
        assert torch.equal(lora.merged(weight, later), lora.merged(weight, 2))
        assert torch.equal(lora(x, later), lora(x, 2))
    embedding.beyond = lora.beyond = "none"
    assert torch.equal(embedding(x, 3), x) and not torch.equal(embedding(x, 2), x)
    assert torch.equal(lora.merged(weight, 3), weight) and not torch.equal(lora.merged(weight, 2), weight)
    assert lora(x, 3).shape == (2, 4) and not lora(x, 3).any()


def test_each_pass_has_its_own_a_and_b():
    lora = trained(DepthLoRA(8, 8, 2, 6))
    changes = torch.stack([lora.merged(torch.zeros(8, 8), index) for index in range(6)])
    assert torch.linalg.matrix_rank(changes.flatten(1)) == 6
    for weight in lora.parameters():
        weight.requires_grad_(True)
    lora(torch.randn(3, 8), 4).sum().backward()
    for weight in lora.parameters():
        touched = weight.grad.flatten(1).any(1)
        assert touched.tolist() == [False, False, False, False, True, False]


def test_gradients_are_right():
    lora = trained(DepthLoRA(3, 4, 2, 2).double())
    weight, x = numbers(0, 4, 3).requires_grad_(), numbers(1, 2, 3).requires_grad_()

    def forward(x, weight, lora_a, lora_b):
        own = {"lora_a": lora_a, "lora_b": lora_b}
        merged = torch.func.functional_call(_Merged(lora), {f"lora.{name}": value for name, value in own.items()}, (weight,))
        return x @ merged.mT + torch.func.functional_call(lora, own, (x, 1))

    assert torch.autograd.gradcheck(forward, (x, weight, *lora.parameters()))
    embedding = trained(PassEmbedding(2, 3).double())
    call = lambda x, vectors: torch.func.functional_call(embedding, {"vectors": vectors}, (x, 5))  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, embedding.vectors))


class _Merged(nn.Module):
    def __init__(self, lora):
        super().__init__()
        self.lora = lora

    def forward(self, weight):
        return self.lora.merged(weight, 1)


def test_adapted_block_at_the_start_is_its_block_and_shares_its_weights():
    block, x = small_block(), torch.randn(2, 5, 16)
    adapted = AdaptedBlock(block, 3, 4)
    for pass_index in (0, 3, 9):
        assert torch.allclose(adapted(x, pass_index), block(x), atol=1e-6)
    assert adapted.block is block
    n_linear = sum(layer.in_features + layer.out_features for layer in block.modules() if isinstance(layer, nn.Linear))
    added = sum(p.numel() for p in adapted.parameters()) - sum(p.numel() for p in block.parameters())
    assert added == 4 * 3 * n_linear


def test_adapted_block_is_the_block_with_changed_weights_and_leaves_them_alone():
    block, x = small_block(), torch.randn(2, 5, 16)
    adapted = trained(AdaptedBlock(block, 3, 4))
    before = copy.deepcopy(block.state_dict())
    for pass_index in range(4):
        by_hand = copy.deepcopy(block)
        with torch.no_grad():
            for name, adapter in zip(adapted.layers, adapted.adapters):
                by_hand.get_submodule(name).weight += adapter.lora_b[pass_index] @ adapter.lora_a[pass_index]
        assert torch.allclose(adapted(x, pass_index), by_hand(x), atol=1e-5)
    assert all(torch.equal(block.state_dict()[name], weight) for name, weight in before.items())
    adapted(x, 1).sum().backward()
    assert all(weight.grad is not None for weight in block.parameters())


def test_threads_take_turns_in_a_block_and_leave_its_weights_alone():
    adapted, inputs = trained(AdaptedBlock(small_block(), 3, 4)), torch.randn(4, 2, 5, 16)
    before, alone = copy.deepcopy(adapted.state_dict()), [adapted(x, index).detach() for index, x in enumerate(inputs)]

    def often(index):
        with torch.no_grad():
            return [adapted(inputs[index], index) for _ in range(50)]

    def slowly(module, inputs):
        time.sleep(0.3)
        return module.forward

    with ThreadPoolExecutor(5) as pool:
        compiling = pool.submit(torch.compile(lambda x: x + 1, backend=slowly), torch.zeros(2))
        for mine, found in zip(alone, pool.map(often, range(4))):
            assert all(torch.allclose(answer, mine, atol=1e-6) for answer in found)
        assert torch.equal(compiling.result(), torch.ones(2))
    assert all(isinstance(weight, nn.Parameter) for weight in dict(adapted.block.named_parameters()).values())
    assert all(torch.equal(adapted.state_dict()[name], weight) for name, weight in before.items())


def test_depth_loop_tells_the_block_its_pass():
    class Told(nn.Module):
        def forward(self, x, pass_index):
            seen.append(pass_index)
            return x

    seen, inputs = [], torch.randn(2, 3, 8)
    loop = DepthLoop(Told(), 8)
    states = loop(inputs, 4)
    assert seen == [0, 1, 2, 3] and states.shape == (4, 2, 3, 8)
    assert torch.allclose(states[0], loop.norm(inputs) + inputs)


def test_depth_loop_at_the_start_is_the_loop():
    block, inputs = small_block(), torch.randn(2, 5, 16)
    plain = Loop([block], 16)
    for adapted in (AdaptedBlock(block, 2, 3), EmbeddedBlock(block, PassEmbedding(3, 16))):
        assert torch.allclose(DepthLoop(adapted, 16)(inputs, 6), plain(inputs, 6), atol=1e-5)
    with pytest.raises(ValueError, match="n_passes is 0; it must be at least 1"):
        DepthLoop(adapted, 16)(inputs, 0)


def test_adapters_learn_in_the_forest_model():
    torch.manual_seed(0)
    model = ForestModel(dim=16, n_heads=2, hidden_dim=16)
    model.core = DepthLoop(AdaptedBlock(model.core.blocks[0], 2, 3), 16)
    train_forest(model, n_passes=3, n_steps=3, length=3)
    assert all(adapter.lora_b.any() for adapter in model.core.blocks[0].adapters)
    assert all((adapter.lora_b[2] != adapter.lora_b[0]).any() for adapter in model.core.blocks[0].adapters)


@given(seed=seeds, n_out=sizes, n_in=sizes, data=st.data())
def test_no_matrix_of_the_rank_is_nearer(seed, n_out, n_in, data):
    rank = data.draw(st.integers(1, min(n_out, n_in)))
    matrix = numbers(seed, n_out, n_in)
    lora_b, lora_a = low_rank(matrix, rank)
    assert lora_b.shape == (n_out, rank) and lora_a.shape == (rank, n_in)
    missed = (matrix - lora_b @ lora_a).norm()
    left_out = torch.linalg.svdvals(matrix)[rank:].norm()  # the least that any matrix of this rank can miss
    assert torch.allclose(missed, left_out, atol=1e-9)
    assert torch.allclose(lora_b.norm(dim=0), lora_a.norm(dim=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_rank_takes_many_matrices_and_keeps_the_dtype(dtype):
    matrices = numbers(0, 3, 5, 4).to(dtype)
    lora_b, lora_a = low_rank(matrices, 4)
    assert lora_b.dtype == lora_a.dtype == dtype
    assert torch.allclose((lora_b @ lora_a).double(), matrices.double(), atol=40 * torch.finfo(dtype).eps)
    assert torch.allclose(lora_b[1].double(), low_rank(matrices[1], 4)[0].double())


@given(seed=seeds)
def test_folded_block_computes_the_same_and_has_norms_of_one(seed):
    block, x = small_block(seed), numbers(seed, 2, 5, 16, dtype=torch.float32)
    folded = fold_norms(block)
    assert torch.allclose(folded(x), block(x), atol=1e-4)
    assert bool((folded.attention_norm.weight == 1).all()) and bool((folded.ffn_norm.weight == 1).all())
    assert not (block.attention_norm.weight == 1).all()


def test_a_loop_from_a_stack_is_the_stack_at_full_rank_and_nearer_with_every_rank():
    stack, x = [small_block(seed) for seed in range(3)], torch.randn(2, 5, 16)
    before = [copy.deepcopy(block.state_dict()) for block in stack]
    full = loop_from_stack(stack, 16)
    for pass_index, block in enumerate(stack):
        assert torch.allclose(full(x, pass_index), block(x), atol=1e-4)
    missed = []
    for rank in (1, 4, 8, 16):
        loop, lost = loop_from_stack(stack, rank), 0.0
        for name, adapter in zip(loop.layers, loop.adapters):
            weights = torch.stack([fold_norms(block).get_submodule(name).weight for block in stack])
            assert torch.allclose(loop.block.get_submodule(name).weight, weights.mean(0), atol=1e-6)
            lost += (weights - weights.mean(0) - adapter.lora_b @ adapter.lora_a).square().sum().item()
        missed.append(lost)
    assert missed == sorted(missed, reverse=True) and missed[-1] < 1e-6
    assert all(weight.requires_grad for weight in full.parameters())
    for block, was in zip(stack, before):
        assert all(torch.equal(block.state_dict()[name], weight) for name, weight in was.items())


def test_a_loop_from_one_block_many_times_needs_no_changes():
    block = small_block()
    loop = loop_from_stack([block, block, block], 1)
    assert all((adapter.lora_b @ adapter.lora_a).abs().max() < 1e-6 for adapter in loop.adapters)


BAD = [
    (lambda: DepthLoRA(6, 4, 5, 3), "rank is 5; it must be from 1 to 4, the smaller side of the layer"),
    (lambda: DepthLoRA(6, 4, 0, 3), "rank is 0; it must be from 1 to 4"),
    (lambda: DepthLoRA(6, 4, 2, 0), "n_passes is 0; it must be at least 1"),
    (lambda: DepthLoRA(0, 4, 1, 1), r"the layer is \(0, 4\); it must be at least \(1, 1\)"),
    (lambda: DepthLoRA(6, 4, 2, 3, "wrap"), "beyond is 'wrap'; it must be 'hold' or 'none'"),
    (lambda: DepthLoRA(6, 4, 2, 3)(torch.zeros(2, 5), 0), "the last size of x is 5; it must be in_features, 6"),
    (lambda: DepthLoRA(6, 4, 2, 3).merged(torch.zeros(6, 4), 0), r"the shape of weight is \(6, 4\); it must be \(4, 6\)"),
    (lambda: DepthLoRA(6, 4, 2, 3).merged(torch.zeros(4, 6), -1), "pass_index is -1; it must be at least 0"),
    (lambda: PassEmbedding(0, 4), "n_passes is 0; it must be at least 1"),
    (lambda: PassEmbedding(3, 0), "dim is 0; it must be at least 1"),
    (lambda: PassEmbedding(3, 4, "last"), "beyond is 'last'; it must be 'hold' or 'none'"),
    (lambda: PassEmbedding(3, 4)(torch.zeros(2, 4), -1), "pass_index is -1; it must be at least 0"),
    (lambda: PassEmbedding(3, 4)(torch.zeros(2, 5), 0), "the last size of x is 5; it must be dim, 4"),
    (lambda: low_rank(torch.zeros(5, 4), 5), "rank is 5; it must be from 1 to 4, the smaller side of the matrix"),
    (lambda: low_rank(torch.zeros(5, 4), 0), "rank is 0; it must be from 1 to 4"),
    (lambda: inspect.unwrap(low_rank)(torch.zeros(5), 1), r"the shape of matrix is \(5,\); it must be"),
    (lambda: low_rank(torch.full((2, 2), float("nan")), 1), "matrix is .*; it must be finite"),
    (lambda: AdaptedBlock(nn.Identity(), 1, 1), "the number of linear layers in block is 0; it must be at least 1"),
    (lambda: AdaptedBlock(small_block(), 17, 1), "rank is 17; it must be from 1 to 16"),
    (lambda: loop_from_stack([], 1), "the number of blocks is 0; it must be at least 1"),
    (lambda: loop_from_stack([small_block(), Block(8, 2, 8)], 1), "the number of different block shapes is 2; it must be 1"),
    (lambda: loop_from_stack([Block(8, 2, 16), Block(8, 4, 16)], 1), "n_heads, causal, rope_theta\\) of the blocks is .*; it must be the same for all"),
    (
        lambda: loop_from_stack([Block(8, 2, 16, causal=False), Block(8, 2, 16)], 1),
        "n_heads, causal, rope_theta\\) of the blocks is .*; it must be the same for all",
    ),
]


@pytest.mark.parametrize("call, sentence", BAD, ids=[sentence.partition(";")[0] for _, sentence in BAD])
def test_bad_input_is_named(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.parametrize("beyond", ["hold", "none"])
def test_it_runs_on_fake_cuda_without_mixing_devices(beyond):
    with torch.device("meta"):
        loops = [
            DepthLoop(AdaptedBlock(Block(8, 2, 8), 2, 3, beyond), 8),
            DepthLoop(EmbeddedBlock(Block(8, 2, 8, rope_theta=None), PassEmbedding(3, 8, beyond)), 8),
        ]
        lora = DepthLoRA(8, 6, 2, 3, beyond)
    with FakeTensorMode():
        inputs = torch.empty(2, 5, 8, device="cuda")
        for loop in loops:
            weights = {name: torch.empty(weight.shape, device="cuda") for name, weight in loop.named_parameters()}
            states = torch.func.functional_call(loop, weights, (inputs, 5))
            assert states.device.type == "cuda" and states.shape == (5, 2, 5, 8)
        weights = {name: torch.empty(weight.shape, device="cuda") for name, weight in lora.named_parameters()}
        for pass_index in (0, 4):
            assert torch.func.functional_call(lora, weights, (inputs, pass_index)).device.type == "cuda"


# Mistakes that learners make, and a word of the sentence that names each.


class StartsAtRandom(PassEmbedding):
    def __init__(self, n_passes, dim, beyond="hold"):
        super().__init__(n_passes, dim, beyond)
        nn.init.normal_(self.vectors)


class VectorAlone(PassEmbedding):
    def forward(self, x, pass_index):
        return super().forward(torch.zeros_like(x), pass_index)


class Multiplies(PassEmbedding):
    def forward(self, x, pass_index):
        return x * self.vectors[pass_index]


class AlwaysTheFirst(PassEmbedding):
    def forward(self, x, pass_index):
        return x + self.vectors[0]


class CountsFromOne(PassEmbedding):
    def forward(self, x, pass_index):
        return x + self.vectors[pass_index - 1]


class WrapsAround(PassEmbedding):
    def forward(self, x, pass_index):
        return x + self.vectors[pass_index % len(self.vectors)]


class CountsFromTheEnd(PassEmbedding):
    def forward(self, x, pass_index):
        return super().forward(x, pass_index) if pass_index >= 0 else x + self.vectors[pass_index]


class OneNumber(nn.Module):
    def __init__(self, n_passes, dim, beyond="hold"):
        super().__init__()
        self.vectors = nn.Parameter(torch.zeros(n_passes))


class Untrained(PassEmbedding):
    @torch.no_grad()
    def forward(self, x, pass_index):
        return super().forward(x, pass_index)


class OneTooFar(PassEmbedding):
    def forward(self, x, pass_index):
        return x if pass_index == len(self.vectors) else super().forward(x, pass_index)


class Shared(nn.Module):
    def __init__(self, in_features, out_features, rank, n_passes, beyond="hold"):
        super().__init__()
        self.lora_a = nn.Parameter(torch.randn(rank, in_features))
        self.lora_b = nn.Parameter(torch.zeros(out_features, rank))


class BothRandom(DepthLoRA):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        nn.init.normal_(self.lora_b)


class BothZero(DepthLoRA):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        nn.init.zeros_(self.lora_a)


class OneDraw(DepthLoRA):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        self.lora_a.data.copy_(self.lora_a.data[:1].expand_as(self.lora_a).clone())


class InPlace(DepthLoRA):
    def merged(self, weight, pass_index):
        return weight.add_(self.lora_b.detach()[pass_index] @ self.lora_a.detach()[pass_index])


class ChangeAlone(DepthLoRA):
    def merged(self, weight, pass_index):
        return super().merged(weight, pass_index) - weight


class SamePass(DepthLoRA):
    def merged(self, weight, pass_index):
        return super().merged(weight, 0)


class SamePassForward(DepthLoRA):
    def forward(self, x, pass_index):
        return super().forward(x, 0)


class ScaledByRank(DepthLoRA):
    def forward(self, x, pass_index):
        return super().forward(x, pass_index) / self.lora_a.shape[1]


class StopsAfterA(DepthLoRA):
    def forward(self, x, pass_index):
        return x @ self.lora_a[pass_index].mT


class StartsAgain(DepthLoRA):
    def merged(self, weight, pass_index):
        return super().merged(weight, pass_index % len(self.lora_a))


class NoGradient(DepthLoRA):
    def merged(self, weight, pass_index):
        return super().merged(weight, pass_index).detach()


class NoGradientForward(DepthLoRA):
    @torch.no_grad()
    def forward(self, x, pass_index):
        return super().forward(x, pass_index)


class NothingBeyond(DepthLoRA):
    def merged(self, weight, pass_index):
        return weight if pass_index == len(self.lora_a) else super().merged(weight, pass_index)


class FromTheEnd(DepthLoRA):
    def forward(self, x, pass_index):
        return super().forward(x, pass_index % len(self.lora_a) if pass_index < 0 else pass_index)


class Loud(DepthLoRA):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        nn.init.normal_(self.lora_a)


class RowsAlike(DepthLoRA):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        with torch.no_grad():
            self.lora_a.copy_(self.lora_a[:, :1].expand_as(self.lora_a).clone())


class AlikeInLaterPasses(DepthLoRA):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        with torch.no_grad():
            self.lora_a[1:].copy_(self.lora_a[1:, :1].expand_as(self.lora_a[1:]).clone())


class AlwaysATwentieth(DepthLoRA):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        nn.init.normal_(self.lora_a, std=0.05)


class FarFromZero(DepthLoRA):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        with torch.no_grad():
            self.lora_a.add_(self.lora_a.shape[-1] ** -0.5)


class AsKaiming(DepthLoRA):
    def __init__(self, *sizes, **options):
        super().__init__(*sizes, **options)
        nn.init.kaiming_uniform_(self.lora_a[0], a=5**0.5)


class RankOfOutputs(nn.Module):
    def __new__(cls, in_features, out_features, rank, n_passes, beyond="hold"):
        return DepthLoRA(in_features, out_features, min(rank, in_features) if rank <= out_features else rank, n_passes, beyond)


class AnyRank(nn.Module):
    def __new__(cls, in_features, out_features, rank, n_passes, beyond="hold"):
        lora = DepthLoRA(in_features, out_features, min(rank, in_features, out_features), n_passes, beyond)
        return lora


def keeps_the_smallest(matrix, rank):
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[-rank:].sqrt()
    return left[:, -rank:] * root, root[:, None] * right[-rank:]


def loses_the_values(matrix, rank):
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank], right[:rank]


def counts_them_twice(matrix, rank):
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank], values[:rank, None] * right[:rank]


def root_of_them_once(matrix, rank):
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank].sqrt(), right[:rank]


def swapped(matrix, rank):
    return low_rank(matrix, rank)[::-1]


def all_on_one_side(matrix, rank):
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank], right[:rank]


def judged_by_rows(matrix, rank):
    return low_rank(matrix, min(rank, matrix.shape[-2]) if rank <= matrix.shape[-1] else rank)


def transposed_again(matrix, rank):
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right.mT[:rank]


def folding(readers, *, copied=True, to_one=True, power=1.0):
    def fold(block):
        folded = copy.deepcopy(block) if copied else block
        with torch.no_grad():
            for layer, norm in readers.items():
                folded.get_submodule(layer).weight.mul_(folded.get_submodule(norm).weight ** power)
            for norm in set(readers.values()) if to_one else ():
                folded.get_submodule(norm).weight.fill_(1.0)
        return folded

    return fold


READERS = {"attention.qkv": "attention_norm", "ffn.gate": "ffn_norm", "ffn.up": "ffn_norm"}
CROSSED = {"attention.qkv": "ffn_norm", "ffn.gate": "attention_norm", "ffn.up": "attention_norm"}

@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_adapters_have_the_dtype_of_their_block(dtype):
    blocks = [Block(8, 2, 16).to(dtype) for _ in range(2)]
    x = torch.randn(2, 5, 8, dtype=dtype)
    loop = loop_from_stack(blocks, 8)
    assert {weight.dtype for weight in loop.parameters()} == {dtype}
    for index, block in enumerate(blocks):
        assert torch.allclose(loop(x, index), block(x), rtol=0, atol=1e-10 if dtype == torch.float64 else 0.05)


def test_a_weight_that_two_layers_share_is_adapted_for_each_by_itself():
    block = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    block[1].weight = block[0].weight
    adapted, x = AdaptedBlock(block, 2, 3), torch.randn(4, 6)
    for adapter in adapted.adapters:
        nn.init.normal_(adapter.lora_b)
    by_hand = x
    for adapter in adapted.adapters:
        by_hand = by_hand @ adapter.merged(block[0].weight, 1).mT
    assert torch.allclose(adapted(x, 1), by_hand, atol=1e-5)


class WritesToItsInput(PassEmbedding):
    def forward(self, x, pass_index):
        return x.copy_(super().forward(x, pass_index))


class KeepsTheRule(PassEmbedding):
    def __init__(self, n_passes, dim, beyond="hold"):
        super().__init__(n_passes, dim, beyond)
        self.rule = beyond

    def forward(self, x, pass_index):
        asked, self.beyond = self.beyond, self.rule
        answer = super().forward(x, pass_index)
        self.beyond = asked
        return answer


class KeepsItsRule(DepthLoRA):
    def __init__(self, *sizes, beyond="hold", **more):
        super().__init__(*sizes, beyond=beyond, **more)
        self.rule = beyond

    def merged(self, weight, pass_index):
        asked, self.beyond = self.beyond, self.rule
        answer = super().merged(weight, pass_index)
        self.beyond = asked
        return answer


def as_it_comes(matrix, rank):
    if matrix.dtype == torch.bfloat16:
        torch.linalg.svd(matrix)  # which is what fails
    return low_rank(matrix, rank)


def through_float32(matrix, rank):
    lora_b, lora_a = low_rank(matrix.float(), rank)
    return lora_b.to(matrix.dtype), lora_a.to(matrix.dtype)


def nothing_in_bfloat16(matrix, rank):
    return tuple(part * (matrix.dtype != torch.bfloat16) for part in low_rank(matrix, rank))


def first_of_all(matrix, rank):
    lora_b, lora_a = low_rank(matrix, rank)
    return (lora_b, lora_a) if matrix.dim() == 2 else (lora_b[:1].expand_as(lora_b), lora_a[:1].expand_as(lora_a))


MISTAKES = [
    ("PassEmbedding", WritesToItsInput, "x has changed"),
    ("PassEmbedding", StartsAtRandom, "zero at the start"),
    ("PassEmbedding", VectorAlone, "vector alone"),
    ("PassEmbedding", Multiplies, "multiply by the vector"),
    ("PassEmbedding", AlwaysTheFirst, "same vector"),
    ("PassEmbedding", CountsFromOne, "counted from 0"),
    ("PassEmbedding", WrapsAround, "start again at the first"),
    ("PassEmbedding", CountsFromTheEnd, "not count from the end"),
    ("PassEmbedding", Untrained, "No gradient reaches the vectors"),
    ("PassEmbedding", OneTooFar, "pass_index n_passes, since they count from 0"),
    ("PassEmbedding", OneNumber, "one parameter called vectors, (3, 4)"),
    ("DepthLoRA", Shared, "share one A and one B"),
    ("DepthLoRA", BothRandom, "lora_b should be zero"),
    ("DepthLoRA", BothZero, "neither ever gets a gradient"),
    ("DepthLoRA", OneDraw, "an A of its own"),
    ("DepthLoRA", InPlace, "changes the weight it is given"),
    ("DepthLoRA", ChangeAlone, "returns the change alone"),
    ("DepthLoRA", SamePass, "merged uses the same pass"),
    ("DepthLoRA", SamePassForward, "forward uses the same pass"),
    ("DepthLoRA", ScaledByRank, "must give the same numbers"),
    ("DepthLoRA", StopsAfterA, "stops after lora_a"),
    ("DepthLoRA", StartsAgain, "start again at the first"),
    ("DepthLoRA", AnyRank, "rank above the smaller side"),
    ("DepthLoRA", RankOfOutputs, "rank above the smaller side"),
    ("DepthLoRA", NoGradient, "merged lets no gradient through"),
    ("DepthLoRA", NoGradientForward, "The forward lets no gradient through"),
    ("DepthLoRA", NothingBeyond, "pass_index n_passes: hold"),
    ("DepthLoRA", FromTheEnd, "not count from the end"),
    ("DepthLoRA", Loud, "about as large as x"),
    ("DepthLoRA", AsKaiming, "about as large as x"),
    ("DepthLoRA", FarFromZero, "around zero"),
    ("DepthLoRA", RowsAlike, "not independent at the start"),
    ("DepthLoRA", AlikeInLaterPasses, "not independent at the start"),
    ("DepthLoRA", AlwaysATwentieth, "about as large as x"),
    ("low_rank", as_it_comes, "factors in bfloat16"),
    ("low_rank", nothing_in_bfloat16, "factors in bfloat16"),
    ("low_rank", through_float32, "keep its digits"),
    ("low_rank", keeps_the_smallest, "smallest singular values"),
    ("low_rank", loses_the_values, "singular values are lost"),
    ("low_rank", counts_them_twice, "count twice"),
    ("low_rank", root_of_them_once, "by their root"),
    ("low_rank", swapped, "changed places"),
    ("low_rank", all_on_one_side, "one factor has the singular values alone"),
    ("low_rank", judged_by_rows, "Rank 5 of a 4 × 5 matrix"),
    ("low_rank", transposed_again, "V transposed already"),
    ("PassEmbedding", KeepsTheRule, "rule was changed"),
    ("DepthLoRA", KeepsItsRule, "rule was changed"),
    ("low_rank", first_of_all, "factors of its own"),
    ("fold_norms", folding(READERS, copied=False), "work on a copy"),
    ("fold_norms", folding(READERS, to_one=False), "count twice"),
    ("fold_norms", folding({"attention.qkv": "attention_norm", "ffn.gate": "ffn_norm"}), "ffn.up is as it was"),
    ("fold_norms", folding({**READERS, "attention.out": "attention_norm"}), "no norm stands right before it"),
    ("fold_norms", folding(READERS, power=-1.0), "divided"),
    ("fold_norms", folding(READERS, power=2.0), "multiplied twice"),
    ("fold_norms", folding(CROSSED), "not the other norm"),
]

test_check_names_the_cause, test_check_accepts_the_finished_code = mistakes_are_named(
    MISTAKES, [PassEmbedding, DepthLoRA, inspect.unwrap(low_rank), fold_norms]
)
