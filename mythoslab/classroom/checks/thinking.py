"""Checks of 10_thinking."""

import importlib
import math

import torch

from . import attempt, checks, expect, expect_close, expect_raises, reference


def _model(**changes):
    small = dict(vocab_size=9, dim=8, n_heads=2, hidden_dim=8, n_passes=2, context_length=6, halting="settled")
    model = importlib.import_module("mythoslab.model")
    return model.Mythos(model.MythosConfig(**{**small, **changes}))


@checks("Stopper")
def stopper(Stopper):
    model = _model()
    with torch.no_grad():
        for weight in model.halting.parameters():
            weight.normal_(0, 0.3)
    states = torch.randn(4, 8) + 0.8 * torch.randn(6, 4, 8)  # six passes of four tokens
    at = torch.tensor([0, 1, 1, 0]), torch.tensor([2, 0, 2, 1])

    def verdicts(kind, rule, threshold):
        part = kind(model, rule, threshold, (2, 3))
        given = states.clone()
        told = [part.stops(after, before, at) for before, after in zip(given, given[1:])]
        expect(
            torch.equal(given, states),
            f"With {rule!r} stops changes the states that it was handed: make new tensors, state - before and not state -= before.",
        )
        expect(told[0] is not None, "The result of stops is None: is a return missing?")
        expect(
            all(said.dtype == torch.bool for said in told),
            f"stops should give True or False for each token: with {rule!r} yours gives {told[0].dtype}.",
        )
        return torch.stack(told)

    halts = torch.stack([model.halting.step(after, before) for before, after in zip(states, states[1:])])
    passed = 1 - (1 - halts).cumprod(0)
    moved = (states[1:] - states[:-1]).norm(dim=-1)
    share = moved / states[1:].norm(dim=-1)
    typical = share.flatten().sort().values[9:11].mean().item()
    middle = halts.flatten().sort().values[9:11].mean().item()  # half of them stop
    swapped = torch.stack([model.halting.step(before, after) for before, after in zip(states, states[1:])])
    cases = {
        "settled": (
            middle,
            "'settled' stops where the head's probability is above the threshold.",
            {
                "'settled' stops where the head is unsure: it says 1 where the answer will not change.": halts < middle,
                "The head gets the two states the wrong way round: first the one after the pass.": swapped > middle,
                "'settled' looks at one pass alone: nothing adds up.": passed > middle,
            },
        ),
        "accumulate": (
            0.8,
            "'accumulate' stops where acc ← acc + p · (1 − acc) reaches the threshold.",
            {
                "'accumulate' adds only what is left: p · (1 − acc), not p.": halts.cumsum(0) >= 0.8,
                "'accumulate' forgets what earlier passes gave: keep it for every token.": halts >= 0.8,
            },
        ),
        "act": (
            1.2,
            "'act' stops where the sum of the probabilities reaches the threshold.",
            {"'act' adds the probabilities themselves, not p · (1 − acc).": passed >= 1.2},
        ),
        "ponder": (
            0.7,
            "'ponder' stops where acc reaches the threshold, which is a half if no other is given.",
            {
                "'ponder' is 'accumulate' with another threshold: p · (1 − acc) adds up.": halts.cumsum(0) >= 0.7,
                "'ponder' ignores its threshold: one half is what holds if none is given.": passed >= 0.5,
            },
        ),
        "converge": (
            typical,
            "'converge' stops where the length of the change, state − before, is below threshold times the length of the state after it.",
            {
                "'converge' compares the change itself: divide by the size of the state.": moved < typical,
                "'converge' stops where much has changed: it should be little.": share >= typical,
                "'converge' compares with the state before the pass: take that after it.": moved / states[:-1].norm(dim=-1) < typical,
            },
        ),
        "none": (None, "'none' never stops.", {}),
    }
    for rule, (threshold, sentence, mistakes) in cases.items():
        expect_close(
            verdicts(Stopper, rule, threshold).float(),
            verdicts(reference("thinking").Stopper, rule, threshold).float(),
            sentence,
            mistakes={cause: wrong.float() for cause, wrong in mistakes.items()},
        )
    elsewhere = torch.tensor([1, 0, 1, 0]), torch.tensor([1, 0, 0, 1])  # two of them as before, two for the first time

    def moving(kind):
        part = kind(model, "accumulate", 0.8, (2, 3))
        places = (at, at, elsewhere, elsewhere, at)
        return torch.stack([part.stops(after, before, here) for before, after, here in zip(states, states[1:], places)])

    expect_close(
        moving(Stopper).float(),
        moving(reference("thinking").Stopper).float(),
        "Tokens are mixed up when others are asked about at the next pass: keep what each has at its row and position, at, and leave the rest.",
    )
    new = _model()  # its head says 1/2 of everything
    level = lambda rule, threshold: bool(Stopper(new, rule, threshold, (2, 3)).stops(states[1], states[0], at).all())  # noqa: E731
    expect(
        level("accumulate", 0.5) and level("ponder", 0.5) and level("act", 0.5), "Where the threshold is just reached a token stops: compare with >=."
    )
    expect(not level("settled", 0.5), "'settled' must pass its threshold: compare with >.")
    still = torch.tensor([[2.0, *[0.0] * 7]])
    expect(
        not bool(Stopper(model, "converge", 0.5, (1, 1)).stops(still, still / 2, (at[0][:1], at[0][:1]))),
        "'converge' must undercut its threshold: compare with <.",
    )
    told = _model()
    told.halting.step = lambda after, before: after[..., 0]
    for rule, usual in reference("thinking").RULES.items():
        if rule == "none":
            continue
        two = torch.zeros(2, 8)
        two[:, 0] = torch.tensor([usual - 0.005, usual + 0.005])  # just below, and just above
        before = torch.zeros(2, 8)
        if rule == "converge":
            two, before = torch.ones(2, 8), (1 - two[:, :1]).expand(2, 8)
        said = Stopper(told, rule, None, (1, 2)).stops(two, before, (torch.tensor([0, 0]), torch.tensor([0, 1])))
        expect(
            said.tolist() == [rule == "converge", rule != "converge"],
            f"Without a threshold that of RULES should hold, {usual} for {rule!r}: ask 'is None'.",
        )
    heads = ("settled", "accumulate", "ponder")
    bads = [(rule, bad) for rule in (*heads, "converge") for bad in (1.5, 1.0, 0.0, -0.5, math.nan)]
    for rule, bad in (*bads, ("act", 0.0), ("act", -1.0), ("act", math.inf), ("act", math.nan)):
        expect_raises(ValueError, lambda: Stopper(model, rule, bad, (1, 1)), f"A threshold of {bad:g} for {rule!r} should raise a ValueError.")
    Stopper(model, "act", 1.5, (1, 1))
    headless = _model(halting="none")
    Stopper(headless, "converge", None, (1, 1)), Stopper(headless, "none", None, (1, 1))
    expect_raises(ValueError, lambda: Stopper(model, "never", None, (1, 1)), "An unknown rule should raise a ValueError.")
    for rule in (*heads, "act"):
        for kind in ("none", "converge"):
            expect_raises(
                ValueError,
                lambda: Stopper(_model(halting=kind), rule, None, (1, 1)),
                f"{rule!r} reads the head, and should raise a ValueError where the model has none: with halting={kind!r} model.halting is None.",
            )


@checks("Gathered")
def gathered(Gathered):
    cache = importlib.import_module("mythoslab.mla").LatentCache

    def told(kind, n_slots=3):
        """Three passes of three sequences, of which fewer and fewer tokens think; what is told, and what is kept."""
        numbers = torch.Generator().manual_seed(0)
        store = cache(3, 5, 2, n_slots=n_slots)
        memory = kind(store)
        store.memory[:, :, 0] = torch.arange(1.0, n_slots + 1).view(n_slots, 1, 1)  # an earlier token, another at every pass
        store.memory[:, 1, 1] = store.memory[:, 1, 0] + 10  # the second sequence has read one token more
        memory.n_seen, answers = 4, []
        everybody = torch.tensor([[1, 2], [2, 3], [1, 2]])
        thinking = [([0, 1, 2], [[1, 2], [2, 3], [1, 2]]), ([0, 2], [[2], [1]]), ([2], [[1]])]
        for pass_index, (rows, places) in enumerate(thinking):
            if pass_index:
                memory.carry(pass_index, torch.tensor([[0], [1], [2]]), everybody)
            memory.rows, memory.places = torch.tensor(rows), torch.tensor(places)
            answers.append(memory.write(torch.randn(*memory.places.shape, 2, generator=numbers), pass_index).clone())
        return answers, store.memory.clone()

    class NoCarry(reference("thinking").Gathered):
        def carry(self, pass_index, rows, places):
            pass

    class CarriesAll(reference("thinking").Gathered):
        def carry(self, pass_index, rows, places):
            self.slot(pass_index).copy_(self.slot(pass_index - 1))

    class OneSlot(reference("thinking").Gathered):
        def slot(self, pass_index):
            return self.memory[0]

    class SeesAll(reference("thinking").Gathered):
        def write(self, new, pass_index):
            seen, self.n_seen = self.n_seen, self.memory.shape[2]
            answer = super().write(new, pass_index)
            self.n_seen = seen
            return answer

    answers, kept = told(Gathered)
    wanted, wanted_kept = told(reference("thinking").Gathered)
    wrong = {
        "Tokens that have stopped show nothing at later passes: carry copies what they showed before.": NoCarry,
        "carry copies earlier tokens too, which have slots of their own: copy at these rows and places alone.": CarriesAll,
        "Every pass writes to the same slot: pass r has slot r, and those beyond share the last.": OneSlot,
        "Positions that nobody has filled are shown: return the first n_seen.": SeesAll,
    }
    made = {cause: told(kind) for cause, kind in wrong.items()}
    expect_close(
        kept,
        wanted_kept,
        "What is kept is off: write at rows and places of this pass, in its own slot.",
        mistakes={cause: told_wrong[1] for cause, told_wrong in made.items()},
    )
    for number, (got, needed) in enumerate(zip(answers, wanted)):
        expect(len(got) == len(needed), "Sequences in which nobody thinks are returned too: return self.rows alone.")
        expect_close(
            got,
            needed,
            "What is shown is off: return these rows up to n_seen.",
            mistakes={cause: told_wrong[0][number] for cause, told_wrong in made.items()},
        )
    for n_slots in (1, 2):
        (few, kept), (needed, wanted_kept) = (told(kind, n_slots=n_slots) for kind in (Gathered, reference("thinking").Gathered))
        for got, right in zip((*few, kept), (*needed, wanted_kept)):
            expect_close(got, right, "With fewer slots than passes the later ones share the last: min(pass_index, slots − 1).")
    memory = Gathered(cache(1, 2, 2))
    expect(
        hasattr(memory, "places") and hasattr(memory, "length"),
        "The attention reads places and length of it, as of every Shown: keep (Shown) behind the name, and call super().__init__() first.",
    )
    memory = Gathered(cache(1, 2, 2, dtype=torch.bfloat16))
    memory.rows, memory.places, memory.n_seen = torch.tensor([0]), torch.tensor([[0]]), 1
    cast = "The memory may be in another dtype than new: write in that of the memory, and return that of new."
    got = attempt(lambda: memory.write(torch.ones(1, 1, 2), 0), cast)
    expect(got.dtype == torch.float32, cast)


@checks("nucleus")
def nucleus(nucleus):
    logits = torch.tensor([0.3, 2.0, -1.0, 1.2, 0.1])
    given = logits.clone()
    order = logits.argsort(descending=True)
    chances = logits.softmax(-1)

    def keeping(count):
        return torch.full((5,), -math.inf).index_copy(0, order[:count], logits[order[:count]])

    def finite(x):
        return torch.where(x.isfinite(), x, torch.full_like(x, -99.0))

    for top_p in (0.5, 0.7, 0.9, 1.0):
        sums = chances[order].cumsum(0)
        enough = int((sums < top_p - 1e-6).sum()) + 1
        got = nucleus(logits, top_p)
        zeros = torch.where(keeping(enough).isfinite(), logits, 0.0)
        expect_close(
            finite(got),
            finite(keeping(enough)),
            "Keep the fewest tokens whose chances reach top_p, and give the others minus infinity.",
            mistakes={
                "One token too few is left: the one that reaches top_p belongs to them.": finite(keeping(enough - 1)),
                "One token too many is left: stop with the one that reaches top_p.": finite(keeping(min(5, enough + 1))),
                "What is kept is counted in sorted order, and masked in the old one: scatter it to where it came from.": finite(
                    logits.masked_fill(torch.arange(5) >= enough, -math.inf)
                ),
                "The chances are added up in the order of the tokens: sort them first, the likeliest first.": finite(
                    logits.masked_fill(chances.cumsum(0) - chances >= top_p, -math.inf)
                ),
                "The logits come back in sorted order: scatter them to where they came from.": finite(keeping(enough)[order]),
                "The others get 0, which is a chance like any other: use minus infinity.": finite(zeros),
                "Chances come back in place of logits: leave what is kept as it was.": finite(
                    torch.where(keeping(enough).isfinite(), chances, -math.inf)
                ),
            },
        )
    expect(torch.equal(logits, given), "You change the logits that were handed in.")
    sure = nucleus(torch.tensor([9.0, 0.0, 0.0]), 0.1)
    alike = nucleus(torch.zeros(4), 0.5)
    expect(alike.isfinite().sum() != 3, "Of four tokens that are alike two reach 0.5, and you leave three: a sum that equals top_p is enough.")
    expect(
        alike.isfinite().sum() == 2,
        "Of four tokens that are alike two reach 0.5: go by their places when sorted, not by the chance of the last one kept.",
    )
    expect(sure.isfinite().sum() == 1, "The likeliest token is always left, however small top_p is.")
    large = nucleus(torch.tensor([5e6, 4.9e6, 0.0]), 0.5)  # as at a temperature of nearly 0
    expect(large.tolist() == [5e6, -math.inf, -math.inf], "Large logits overflow: softmax does not, exp does.")
    expect_close(
        finite(nucleus(torch.tensor([-math.inf, 1.0, 1.0, 0.0]), 0.6)),
        torch.tensor([-99.0, 1.0, 1.0, -99.0]),
        "Logits of minus infinity, as top-k leaves them, should stay so, and count nothing.",
    )
    expect_raises(ValueError, lambda: nucleus(logits, 0.0), "top_p=0 leaves no token: raise a ValueError.")
    expect_raises(ValueError, lambda: nucleus(logits, 1.5), "top_p above 1 should raise a ValueError.")
    expect_raises(ValueError, lambda: nucleus(logits, -0.5), "top_p below 0 should raise a ValueError.")
    expect_raises(ValueError, lambda: nucleus(logits, math.nan), "top_p=nan should raise a ValueError: ask 0 < top_p <= 1, and turn that round.")
