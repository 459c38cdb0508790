"""Checks of 08_model."""

import math
import sys
from dataclasses import replace

import torch

from . import attempt, checks, expect, expect_close, expect_raises, expect_shape, reference


def beside(learners, name: str, topic: str):
    """What an object of the learner finds under a name in its own module or notebook; else the reference's."""
    return getattr(sys.modules[learners.__module__], name, None) or getattr(reference(topic), name)


def _config(learners, **changes):
    small = dict(
        vocab_size=11,
        dim=8,
        n_heads=2,
        hidden_dim=12,
        n_passes=3,
        context_length=6,
        rope_theta=50.0,
        expert_dim=5,
    )
    return beside(learners, "MythosConfig", "model")(**{**small, **changes})


@checks("Core")
def core(Core):
    for adapter in ("none", "lora"):
        config = _config(Core, pass_adapter=adapter, lora_rank=2)
        needed, held = (
            {name: tuple(weight.shape) for name, weight in kind(config).state_dict().items()} for kind in (reference("model").Core, Core)
        )
        expect(
            needed == held,
            f'With pass_adapter="{adapter}" the core should hold norm, injection and blocks under these names, and nothing else: {_first_apart(held, needed)}.',
        )
    config = _config(Core, n_core=2, injection="lti", pass_adapter="embedding")
    ours, theirs = reference("model").Core(config), Core(config)
    names = {name: tuple(weight.shape) for name, weight in ours.state_dict().items()}
    got = {name: tuple(weight.shape) for name, weight in theirs.state_dict().items()}
    expect(
        names == got,
        f'With pass_adapter="embedding" the core should hold norm, injection, embedding, one for all blocks, and n_core blocks: {_first_apart(got, names)}.',
    )
    with torch.no_grad():
        for weight in ours.parameters():
            weight.normal_(0, 0.4) if weight.dim() == 2 else weight.uniform_(0.5, 1.5)
    theirs.load_state_dict(ours.state_dict())
    inputs = torch.randn(2, 5, 8)
    states = theirs(inputs, 4)
    expect_shape(states, (4, 2, 5, 8), "What the core returns after 4 passes over 2 × 5 tokens")
    expect_close(
        states,
        ours(inputs, 4),
        "The states are off: norm the state, inject the inputs, then run all blocks, and again.",
        mistakes={sentence: _run_core(ours, inputs, **wrong) for sentence, wrong in _CORE_MISTAKES.items()},
    )
    expect_close(theirs.one_pass(inputs, inputs, 0), states[0], "one_pass should give the state after one more pass: notebook 10 runs it alone.")
    each = torch.tensor([[1, 4, 2, 3, 4], [4, 1, 1, 2, 3]])
    expect_close(
        theirs(inputs, each),
        ours(inputs, each),
        "Tokens with passes of their own are off: pass r runs for those with each > r, and the others keep their state.",
        mistakes={
            "All tokens run all passes: a token that has had its own keeps its state.": ours(inputs, 4),
            "A token stops one pass early: pass_index counts from 0, so it thinks while each > pass_index.": _stop(
                Core, ours, inputs, each - 1
            ),
            "A token stops one pass late: pass_index counts from 0, so it thinks while each > pass_index.": _stop(
                Core, ours, inputs, each + 1
            ),
            "Tokens that have stopped write anew: tell every memory who is thinking, and where shown is None make a Shown for each block.": _stop(
                Core, ours, inputs, each, tell=False
            ),
            "Tokens that have stopped go on changing: show what they wrote last, and keep their state too.": _stop(
                Core, ours, inputs, each, freeze=False
            ),
            "Only one token decides: compare pass_index with the passes of each.": _stop(
                Core, ours, inputs, each[:, :1].expand_as(each)
            ),
        },
    )
    expect_close(
        _gradient(theirs, inputs, 1),
        _gradient(ours, inputs, 1),
        "With n_backward=1 gradients should go through the last pass alone: run the others without them.",
        mistakes={
            "n_backward has no effect: run the passes before the last n_backward without gradients.": _gradient(
                ours, inputs, None
            ),
            "One pass too many has gradients: of n_passes those from n_passes - n_backward on, counted from 0.": _gradient(
                ours, inputs, 2
            ),
            "No pass has gradients: with n_backward=1 the last one does.": torch.zeros_like(inputs),
        },
        atol=1e-4,
    )
    expect_close(
        _gradient(theirs, inputs, 2),
        _gradient(ours, inputs, 2),
        "With n_backward=2 gradients should go through the last two passes.",
        mistakes={
            "Gradients always go through one pass: of n_passes those from n_passes - n_backward on have them.": _gradient(
                ours, inputs, 1
            ),
            "The last pass has no gradients: all from n_passes - n_backward on have them.": torch.zeros_like(
                inputs
            ),
        },
        atol=1e-4,
    )
    leaf = inputs.clone().requires_grad_()
    expect(
        not _keeps(theirs, leaf),
        "The passes before the last n_backward still keep what a gradient needs: run them under torch.no_grad(); detaching the state is not enough.",
    )
    kept = []
    theirs.blocks[0].register_forward_hook(lambda block, read, out: kept.append(out.requires_grad))
    with torch.no_grad():
        theirs(inputs, 2, n_backward=1)
    expect(
        not any(kept),
        "You switch gradients on where the caller switched them off: ask torch.is_grad_enabled() too.",
    )
    _core_memory(Core, ours, theirs, inputs)
    expect_raises(ValueError, lambda: theirs(inputs, 0), "Zero passes should raise a ValueError.")
    expect_raises(
        ValueError,
        lambda: theirs(inputs, torch.zeros_like(each)),
        "Zero passes should raise a ValueError when each token has its own number, too.",
    )
    expect_raises(
        ValueError, lambda: theirs(inputs, 2, n_backward=0), "n_backward=0 should raise a ValueError."
    )
    expect_raises((ValueError, TypeError), lambda: theirs(inputs, each[:, :1]), "Passes of another shape than the tokens should raise a ValueError, not be spread over them.")


def _first_apart(got: dict, needed: dict) -> str:
    """Of two collections of weights, the first name that is missing, or too many, or of another shape."""
    for name in needed:
        if name not in got:
            return f"{name} is missing"
        if got[name] != needed[name]:
            return f"{name} should have the shape {needed[name]}, and it has {got[name]}"
    return f"{next((name for name in got if name not in needed), None)} should not be there"


def _keeps(core, inputs) -> bool:
    """Whether the first of four passes has gradients when only the last two should."""
    learns = []
    hook = core.blocks[0].register_forward_hook(lambda block, read, out: learns.append(out.requires_grad))
    core(inputs, 4, n_backward=2)
    hook.remove()
    return any(learns[:2])


_CORE_MISTAKES = {
    "The state is not normed: norm comes before the injection.": dict(norm=False),
    "The inputs are left out of the passes: inject them every time.": dict(inject=False),
    "Only the first block runs: a pass runs all of them.": dict(n_blocks=1),
    "Every pass is told that it is the first: hand pass_index on.": dict(index=0),
    "pass_index counts from 0, and yours from 1.": dict(shift=1),
    "The state starts at zero: it starts as the inputs.": dict(zero=True),
}


def _run_core(core, inputs, *, norm=True, inject=True, n_blocks=None, index=None, shift=0, zero=False):
    """Four passes with something left out."""
    state, states = torch.zeros_like(inputs) if zero else inputs, []
    for pass_index in range(4):
        told = pass_index + shift if index is None else index
        x = core.norm(state) if norm else state
        x = core.embedding(core.injection(x, inputs) if inject else x, told)
        for block in core.blocks[:n_blocks]:
            x = block(x, told)
        states.append(state := x)
    return torch.stack(states)


def _stop(Core, core, inputs, each, *, tell=True, freeze=True):
    """Four passes in which each token has its own, or is only half stopped."""
    shown = [beside(Core, "Shown", "model")() for _ in core.blocks]
    state, states = inputs, []
    for pass_index in range(4):
        thinking = each > pass_index
        for memory in shown:
            memory.thinking = thinking if tell else None
        new = core.one_pass(state, inputs, pass_index, shown)
        state = torch.where(thinking.unsqueeze(-1), new, state) if freeze else new
        states.append(state)
    return torch.stack(states)


def _gradient(core, inputs, n_backward):
    """Of the last state with respect to the inputs; zero where there is none."""
    leaf = inputs.clone().requires_grad_()
    last = core(leaf, 4, n_backward=n_backward)[-1].sum()
    if not last.requires_grad:
        return torch.zeros_like(inputs)
    gradient = torch.autograd.grad(last, leaf, allow_unused=True)[0]
    return torch.zeros_like(inputs) if gradient is None else gradient


def _core_memory(Core, ours, theirs, inputs):
    """With a cache of five slots, two passes fill all five."""
    slots = []
    for part in (ours, theirs):
        width = reference("model").kept_width(_config(Core))
        caches = [beside(Core, "LatentCache", "mla")(2, 5, width, n_slots=5) for _ in range(2)]
        with torch.no_grad():
            part(inputs, 2, [beside(Core, "Shown", "model")(cache) for cache in caches])
        slots.append(torch.stack([cache.memory for cache in caches]))
    expect(bool(slots[1][:, 0].any()), "The memories stay empty: hand each block its own of those in shown.")
    expect_close(
        slots[1][:, :2],
        slots[0][:, :2],
        "What was written to the memories is off: each block has its own, and each pass its slot.",
        mistakes={
            "All passes write to the first slot: hand pass_index on to the blocks.": torch.stack(
                (slots[0][:, 1], torch.zeros_like(slots[0][:, 1])), 1
            ),
        },
    )
    later = slots[0][:, 2:]
    expect_close(
        slots[1][:, 2:],
        later,
        "What the slots after the last pass hold is off: call keep_showing(n_passes) on every memory.",
        mistakes={
            "After the last pass the later slots are empty: call keep_showing on every memory.": torch.zeros_like(
                later
            ),
            "Only the first block's memory is filled up: call keep_showing on every one.": torch.stack(
                (later[0], torch.zeros_like(later[1]))
            ),
            "One slot stays empty: passes count from 0, so the first one that is left is n_passes.": torch.cat(
                (torch.zeros_like(later[:, :1]), later[:, 1:]), 1
            ),
        },
    )
    each, stopped = torch.tensor([[1, 4, 2, 3, 4], [4, 1, 1, 2, 3]]), []
    for part in (ours, theirs):
        caches = [beside(Core, "LatentCache", "mla")(2, 5, width, n_slots=5) for _ in range(2)]
        with torch.no_grad():
            part(inputs, each, [beside(Core, "Shown", "model")(cache) for cache in caches])
        stopped.append(torch.stack([cache.memory for cache in caches]))
    expect_close(stopped[1], stopped[0], "Memories that are handed in are not told who is thinking: set thinking on them, not only on those that you make.")


@checks("count_parameters")
def count_parameters(count_parameters):
    base = _config(count_parameters, dim=24, n_heads=3, hidden_dim=20, n_passes=5)  # sizes that other formulas seldom make
    configs = [
        base,
        replace(base, tie_embeddings=False, n_core=3),
        replace(base, n_prelude=0, n_coda=4, n_passes=7),
    ]
    counts = [count_parameters(config) for config in configs]
    expect(
        all(isinstance(count, int) for count in counts),
        "A number of weights is a whole number: return an int.",
    )

    def variant(*, runs=False, norms=2, matrices=3, attention=4, last=4, untied=2):
        return torch.tensor(
            [
                (c.n_prelude + c.n_core * (c.n_passes if runs else 1) + c.n_coda)
                * (attention * c.dim**2 + matrices * c.dim * c.hidden_dim + norms * c.dim)
                + (1 if c.tie_embeddings else untied) * c.vocab_size * c.dim
                + last * c.dim
                for c in configs
            ]
        )

    expect_close(
        torch.tensor(counts),
        variant(),
        "The count is off: print the names and shapes of Mythos(config).named_parameters() and add them up.",
        mistakes={
            "You count the core once for each pass: passes cost no weights.": variant(runs=True),
            "The norms are missing: two in every block, and four around them.": variant(norms=0, last=0),
            "The norms inside the blocks are missing: two of dim each.": variant(norms=0),
            "The four norms outside the blocks are missing: of embedding, prelude, loop and coda.": variant(
                last=0
            ),
            "The feed-forward part has three matrices: gate, up and down.": variant(matrices=2),
            "Attention has four matrices: query, key, value and output.": variant(attention=3),
            "Without tie_embeddings there are two matrices of tokens: embedding and head.": variant(untied=1),
        },
        atol=0,
        rtol=0,
    )
    wide = _config(
        count_parameters, attention="mla", q_lora_rank=3, ffn="moe", n_routed_experts=6, n_shared_experts=1
    )
    for changes, sentence in _SWITCHED:
        config = replace(base, n_core=2, **changes)
        counted = sum(weight.numel() for weight in reference("model").Mythos(config).parameters())
        expect(count_parameters(config) == counted, sentence)
    narrow = replace(base, dim=8, n_heads=2, halting="settled")
    counted = sum(weight.numel() for weight in reference("model").Mythos(narrow).parameters())
    expect(count_parameters(narrow) == counted, "The halting head of a narrow model is counted wrong: look at StopHead(8), which is not half as wide.")
    unused = 4 * 3 * wide.dim * wide.expert_dim * wide.n_core
    expect(
        count_parameters(wide) - count_parameters(wide, active=True) == unused,
        "With active=True count of the routed experts only those that serve a token.",
    )
    for adapter in ("lora", "embedding"):
        adapted = replace(base, pass_adapter=adapter, lora_rank=2)
        others = [
            count(adapted) - count(adapted, active=True)
            for count in (count_parameters, reference("model").count_parameters)
        ]
        expect(others[0] == others[1], f'With active=True count the adapters of one pass only, also with pass_adapter="{adapter}".')


_SWITCHED = (
    (
        dict(attention="gqa"),
        "Grouped queries are counted wrong: the keys and values of kv_heads heads are narrower; linear_layers knows.",
    ),
    (
        dict(attention="mla", q_lora_rank=3),
        "Latent attention is counted wrong: its layers are in linear_layers, and its two norms are as wide as its ranks.",
    ),
    (
        dict(attention="mla", qk_norm=True),
        'qk_norm does nothing with "mla": its norms are those of the latents.',
    ),
    (
        dict(qk_norm=True),
        "qk_norm is counted wrong: two norms as wide as a head, and one number for each head.",
    ),
    (
        dict(ffn="moe", n_routed_experts=6, n_shared_experts=1),
        "Experts are counted wrong: each has three matrices, dim × expert_dim, and the core alone has them.",
    ),
    (
        dict(injection="lti"),
        'The injection is counted wrong: "lti" has a matrix, dim × dim, and a rate for each channel.',
    ),
    (
        dict(injection="linear"),
        'The injection is counted wrong: "linear" has one matrix from 2 · dim channels to dim.',
    ),
    (
        dict(pass_adapter="embedding"),
        "The pass embedding is counted wrong: a vector of dim for each pass.",
    ),
    (
        dict(pass_adapter="lora", lora_rank=2),
        "Adapters are counted wrong: rank · (out + in) for each layer of the core, for each pass.",
    ),
    (
        dict(ffn="moe", n_routed_experts=6, n_shared_experts=1, pass_adapter="lora", lora_rank=2),
        "Adapters of a block with experts are counted wrong: every layer that linear_layers names has them, the router, too.",
    ),
    (dict(token_shift=True), "The token shift is counted wrong: one matrix, dim × dim."),
    (
        dict(halting="settled"),
        "The halting head is counted wrong: print the names and shapes of StopHead(dim).named_parameters().",
    ),
    (dict(halting="converge"), "A rule without a head has no weights: ask config.has_head."),
)


@checks("sample")
def sample(sample):
    logits = torch.tensor([1.0, -0.5, 2.0, 0.5, -3.0])
    given = logits.clone()

    sample(logits, temperature=2.0, top_k=3)
    expect(torch.equal(logits, given), "You change the logits that were handed in: make new ones, logits / temperature and masked_fill.")

    def shares(**options):
        draw = torch.Generator().manual_seed(0)
        drawn = [sample(logits, generator=draw, **options) for _ in range(2000)]
        expect(
            all(isinstance(token, int) for token in drawn[:1]),
            "Return the token as an int: int(…) of the drawn tensor.",
        )
        return torch.tensor(drawn).bincount(minlength=5) / 2000

    best = sample(logits, temperature=0)
    expect(best == 2, "At temperature 0 take the most likely token: argmax, and no division by zero.")
    expect(isinstance(best, int), "Return the token as an int at temperature 0, too: int(…) of the argmax.")
    for top_k in (None, 3):
        first, second = (
            [sample(logits, temperature=2.0, top_k=top_k, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
            for _ in range(2)
        )
        expect(first == second, "The same seed gives different tokens: hand the generator to torch.multinomial, with top_k and without.")
    best = torch.eye(5)[2]
    expect_close(
        shares(temperature=2.0),
        (logits / 2).softmax(0),
        "The chances are off: softmax of logits divided by temperature, then one draw.",
        mistakes={
            "You multiply by the temperature: divide by it.": (logits * 2).softmax(0),
            "The temperature has no effect: divide the logits by it before the softmax.": logits.softmax(0),
            "You always take the most likely token: draw with torch.multinomial.": best,
            "You divide the chances, not the logits, by the temperature.": logits.softmax(0) / 2,
            "You return the place in the sorted row, not the token: look it up in the indices.": (logits / 2).softmax(0).sort(descending=True).values,
            "Every token has the same chance: draw from softmax(logits / temperature).": torch.full(
                (5,), 0.2
            ),
        },
        atol=0.035,
    )
    expect_close(
        shares(temperature=0.5),
        (logits * 2).softmax(0),
        "At a temperature below one the chances are off: only 0 itself always takes the most likely.",
        atol=0.035,
    )
    order = logits.argsort(descending=True)
    kept = torch.full((5,), -torch.inf).index_copy(0, order[:3], logits[order[:3]])
    zeros = torch.zeros(5).index_copy(0, order[:3], logits[order[:3]])
    lowest = torch.full((5,), -torch.inf).index_copy(0, order[2:], logits[order[2:]])
    fewer = torch.full((5,), -torch.inf).index_copy(0, order[:2], logits[order[:2]])
    expect_close(
        shares(top_k=3),
        kept.softmax(0),
        "With top_k=3 only the three most likely tokens should have a chance, in their old proportions.",
        mistakes={
            "top_k has no effect: give all but the k largest logits the chance 0.": logits.softmax(0),
            "You return the place among the best, not the token: look it up in the indices of topk.": torch.zeros(5).index_copy(
                0, torch.arange(3), logits[order[:3]].softmax(0)
            ),
            "You set the other logits to 0, which is a chance like any other: use minus infinity.": zeros.softmax(
                0
            ),
            "You keep the least likely tokens: topk gives the largest, mask what is below them.": lowest.softmax(
                0
            ),
            "One token too few is kept: mask what is below the k-th logit, not the k-th itself.": fewer.softmax(
                0
            ),
        },
        atol=0.035,
    )
    expect_close(
        shares(top_k=3, temperature=2.0),
        (kept / 2).softmax(0),
        "With top_k and a temperature both should count.",
        mistakes={
            "With top_k the temperature has no effect: divide what is left by it, too.": kept.softmax(0)
        },
        atol=0.035,
    )
    expect(
        torch.equal(logits, given),
        "You change the logits that were handed in: use masked_fill, not masked_fill_.",
    )
    alike, draw = torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.Generator().manual_seed(0)
    expect(
        len({sample(alike, top_k=2, generator=draw) for _ in range(100)}) == 2,
        "Of three tokens that are alike top_k=2 should keep two: go by the indices of topk, not by the k-th logit.",
    )
    with_top_k = "At temperature 0 take the most likely token with top_k, too."
    expect(attempt(lambda: sample(logits, temperature=0, top_k=3), with_top_k) == 2, with_top_k)
    for shift in (0, 1000):
        overflow = "Large logits, or those divided by a small temperature, go wrong: softmax does not overflow, exp does."
        expect(attempt(lambda: {sample(logits + shift, temperature=0.01) for _ in range(20)}, overflow) == {2}, overflow)
    for top_k in (4, 50):
        expect(
            len({sample(torch.zeros(4), top_k=top_k, generator=draw) for _ in range(200)}) == 4,
            "top_k as large as the vocabulary, or larger, leaves every token.",
        )
    expect(sample(logits, top_k=1) == 2, "With top_k=1 the most likely token alone is left.")
    expect_raises(
        ValueError,
        lambda: sample(logits, temperature=-1.0),
        "A temperature below 0 should raise a ValueError.",
    )
    expect_raises(ValueError, lambda: sample(logits, temperature=math.inf), "An infinite temperature should raise a ValueError.")
    expect_raises(ValueError, lambda: sample(logits, top_k=0), "top_k=0 leaves no token: raise a ValueError.")
    expect_raises(ValueError, lambda: sample(logits, top_k=-1), "A top_k below 1 should raise a ValueError.")
    expect_raises(ValueError, lambda: sample(logits, temperature=math.nan), "A temperature that is not a number should raise a ValueError: ask 0 <= temperature < math.inf.")
