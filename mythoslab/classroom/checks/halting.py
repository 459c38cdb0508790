"""Checks of 04_halting."""

import math

import torch

from . import attempt, checks, expect, expect_close, expect_gradients, expect_raises, expect_shape, reference


_CHANGED = "halt_prob has changed: work on a copy, for training goes back through the numbers that were given."


def _refuses_bad_shares(function, name):
    expect_raises(ValueError, lambda: function(torch.zeros(0, 3)), f"{name} without a single pass should raise a ValueError.")
    for bad in (math.nan, -0.1, 1.1):
        numbers = torch.tensor([[0.2], [bad], [0.5]])
        expect_raises(ValueError, lambda: function(numbers), f"{name} with {bad} should raise a ValueError: shares lie between 0 and 1.")


def _edges(function, ours, *threshold):
    """Other shapes, shares of exactly 0 and 1, one pass alone, and the precision of other dtypes."""
    edge = torch.tensor([[0.0, 1.0, 0.3], [0.5, 0.2, 1.0], [1.0, 0.0, 0.4], [0.3, 0.4, 0.0]])
    expect_close(
        function(edge, *threshold).double(),
        ours(edge, *threshold).double(),
        "With shares of exactly 0 and 1 the result is wrong: do not divide by 1 − halt_prob, nor take its logarithm, and refuse neither.",
    )
    alone = edge[:1]
    expect_close(
        function(alone, *threshold).double(),
        ours(alone, *threshold).double(),
        "With a single pass the result is wrong: the first is the last, and takes all.",
    )
    for shape in ((4,), (4, 2, 3), (3, 1, 5)):
        other = torch.rand(shape) * 0.9
        sentence = f"For halt_prob of shape {shape} the result is wrong: passes lie on dimension 0, and any number of dimensions follows."
        expect_close(attempt(lambda: function(other, *threshold).double(), sentence), ours(other, *threshold).double(), sentence)


def _sums_to_one(function):
    for dtype, allowed in ((torch.float64, 1e-12), (torch.float16, 4e-3)):
        for halt_prob in (torch.rand(30, 8, dtype=torch.float64) * 0.2, torch.full((400, 1), 0.0015, dtype=torch.float64)):
            shares = function(halt_prob.to(dtype))
            expect(shares.dtype == dtype, f"{str(dtype)[6:]} came in and {str(shares.dtype)[6:]} went out: hand back the dtype that came in.")
            off = (shares.double().sum(0) - 1).abs().max().item()
            expect(off < allowed, f"In {str(dtype)[6:]} the shares miss one by {off:.2g}: compute in float32 at least, and leave float64 as it is.")
    shares = function(torch.cat((torch.rand(6, 500), torch.ones(1, 500), torch.rand(1, 500))))
    expect(bool((shares >= 0).all()), f"A share is {shares.min().item():.2g}, by rounding: none may be negative, so clamp the rest, or multiply.")


def _refuses_bad_thresholds(function):
    for bad in (0.0, 1.5, math.nan):
        expect_raises(
            ValueError,
            lambda: function(torch.full((3, 2), 0.5), bad),
            f"A threshold of {bad:g} should raise a ValueError: it must be above 0 and at most 1.",
        )


@checks("halting_distribution")
def halting_distribution(halting_distribution):
    halt_prob = 0.1 + 0.6 * torch.rand(5, 3)
    still_going = (1 - halt_prob).cumprod(0)
    reached = torch.cat((torch.ones(1, 3), still_going[:-1]))
    share = halt_prob * reached
    across = torch.cat((torch.ones(1, 3), (1 - halt_prob[:-1]).cumprod(1)))
    given = halt_prob.clone()
    got = halting_distribution(halt_prob)
    expect(torch.equal(halt_prob, given), _CHANGED)
    expect_close(
        got,
        torch.cat((share[:-1], reached[-1:])),
        "Multiply the halting probability of a pass by the probability to have reached it: ∏ (1 − halt_prob) of the passes before.",
        mistakes={
            "The last pass must take all that is left, whatever its own halting probability: now the shares sum to less than one.": share,
            "You count the pass itself among those that went on: the product runs over the passes before it.": halt_prob * still_going,
            "You return the halting probabilities: weigh each by the probability that its pass is reached.": halt_prob,
            "You return the probability to have stopped by then: that is the cumulative sum of what is asked for.": 1 - still_going,
            "You return the probability to be still going: multiply it, before each pass, by the halting probability.": still_going,
            "You return the probability that each pass is reached: multiply it by the halting probability.": reached,
            "You scale the shares to sum to one: that changes the early passes too. Only the last takes what is left.": share / share.sum(0),
            "That is a softmax over the passes: halting probabilities are chances to stop, given that a pass is reached.": halt_prob.softmax(0),
            "You multiply over the tokens: the passes lie on dimension 0.": torch.cat(((halt_prob * across)[:-1], across[-1:])),
        },
    )
    expect_gradients(halting_distribution, reference("halting").halting_distribution, halt_prob)
    expect_shape(halting_distribution(torch.rand(4, 2, 3)), (4, 2, 3), "The distribution of four passes of 2 × 3 tokens")
    expect_shape(halting_distribution(torch.rand(4)), (4,), "The distribution of four passes of one token")
    many = halting_distribution(torch.full((64, 8), 0.0015, dtype=torch.bfloat16))
    expect(many.dtype == torch.bfloat16, f"bfloat16 came in and {str(many.dtype)[6:]} went out: hand back the dtype that came in.")
    off = (many.double().sum(0) - 1).abs().max().item()
    expect(off < 0.02, f"In bfloat16 the shares of 64 passes miss one by {off:.2g}: multiply and add in float32, and round once.")
    _refuses_bad_shares(halting_distribution, "halt_prob")
    _edges(halting_distribution, reference("halting").halting_distribution)
    _sums_to_one(halting_distribution)
    sure = torch.tensor([[0.3], [1.0], [0.5], [0.2]], requires_grad=True)
    (slope,) = torch.autograd.grad(halting_distribution(sure).square().sum(), sure)
    expect(bool(slope.isfinite().all()), "At a halting probability of 1 the gradient is nan: multiply up what is left, without logarithms or divisions.")


@checks("exit_pass")
def exit_pass(exit_pass):
    halt_prob = torch.tensor([[0.05, 0.4, 0.5], [0.5, 0.4, 0.97], [0.45, 0.4, 0.1], [0.9, 0.4, 0.2], [0.2, 0.4, 0.9]])
    halt_prob = torch.cat((halt_prob, torch.full((5, 1), 0.5)), 1)
    threshold = 0.9
    expected = torch.tensor([4, 5, 2, 4])
    first = lambda holds: holds.int().argmax(0) + 1  # noqa: E731
    or_last = lambda holds: torch.where(holds.any(0), first(holds), 5)  # noqa: E731
    given = halt_prob.clone()
    got = exit_pass(halt_prob, threshold)
    expect(torch.equal(halt_prob, given), _CHANGED)
    expect_shape(got, (4,), "The exit pass of four tokens")
    expect(got.dtype == torch.int64, f"A number of passes is an int64, and this is {str(got.dtype)[6:]}.")
    expect_close(
        got,
        expected,
        "Find the first pass after which the accumulator, 1 − ∏ (1 − halt_prob), is at the threshold.",
        mistakes={
            "You count from 0: the first pass is number 1.": expected - 1,
            "You add the halting probabilities up: pour each into the room that is left, acc + halt_prob · (1 − acc).": first(
                halt_prob.cumsum(0) >= threshold
            ),
            "You look at one pass at a time: the accumulator remembers the passes before.": first(halt_prob >= threshold),
            "You look at one pass at a time, or take the last: the accumulator remembers the passes before.": or_last(halt_prob >= threshold),
            "You compare the room that is left: the accumulator is one minus it.": first((1 - halt_prob).cumprod(0) >= threshold),
            "You count one pass too many: the exit is the pass that reaches the threshold.": expected + 1,
        },
    )
    never = exit_pass(torch.full((6, 1), 0.1), 0.99)
    expect(
        never.item() != 7,
        "A token that never reaches the threshold leaves after the last pass, 6, and here after 7: there is none, so go no further than the last.",
    )
    expect(
        never.item() == 6,
        f"A token that never reaches the threshold leaves after the last pass, 6, and here after {never.item()}: where nothing holds, argmax is 0.",
    )
    level = exit_pass(torch.full((6, 1), 0.5), 0.75)
    expect(level.item() == 2, f"Half, and half of the rest, is 0.75: at the threshold means ≥, and here the exit is {level.item()} instead of 2.")
    slow = exit_pass(torch.full((300, 1), 0.01, dtype=torch.bfloat16), 0.9).item()
    needed = reference("halting").exit_pass(torch.full((300, 1), 0.01, dtype=torch.bfloat16), 0.9).item()
    expect(slow == needed, f"In bfloat16 a token that gives 0.01 a pass leaves after {slow} passes in place of {needed}: accumulate in float32.")
    small = torch.full((300, 1), 0.01, dtype=torch.float16)
    slow, needed = exit_pass(small, 0.9).item(), reference("halting").exit_pass(small, 0.9).item()
    expect(slow == needed, f"In float16 a token that gives 0.01 a pass leaves after {slow} passes in place of {needed}: accumulate in float32.")
    whole = exit_pass(torch.tensor([[0.5], [0.995], [1.0], [0.2]]), 1.0).item()
    expect(whole == 3, f"A threshold of 1 is reached where a halting probability is 1, here after pass 3, and yours leaves after {whole}.")
    for limit in (0.9, 1.0):
        _edges(exit_pass, reference("halting").exit_pass, limit)
    _refuses_bad_shares(exit_pass, "halt_prob")
    _refuses_bad_thresholds(exit_pass)


@checks("act_weights")
def act_weights(act_weights):
    ours = reference("halting")
    halt_prob = torch.tensor([[0.1, 0.3, 0.02], [0.3, 0.3, 0.1], [0.4, 0.5, 0.2], [0.5, 0.2, 0.1], [0.3, 0.6, 0.3]])
    threshold = 0.75
    expected = ours.act_weights(halt_prob, threshold)
    total = halt_prob.cumsum(0)
    leaves = torch.tensor([3, 3, 5])
    number = torch.arange(1, 6).view(-1, 1)
    before, at = number < leaves, number == leaves
    paid = torch.where(before, halt_prob, 0)
    given = halt_prob.clone()
    got = act_weights(halt_prob, threshold)
    expect(torch.equal(halt_prob, given), _CHANGED)
    expect_close(
        got,
        expected,
        "Each pass counts what it asks for until the sum is at the threshold; that pass counts the remainder to one, and later ones nothing.",
        mistakes={
            "The exit counts what it asks for: it should count the remainder to one, so that the weights sum to one.": torch.where(
                before | at, halt_prob, 0
            ),
            "You do not use the threshold: it is an argument, and here not 0.99.": ours.act_weights(halt_prob, 0.99),
            "Passes after the exit should count nothing.": torch.where(at, 1 - paid.sum(0), halt_prob),
            "You return what was asked for: stop at the threshold, and pay the remainder.": halt_prob,
            "A token that never reaches the threshold leaves after the last pass, which pays its remainder too.": torch.where(
                at & (total >= threshold), 1 - paid.sum(0), torch.where(before | at, halt_prob, 0)
            ),
            "A token that never reaches the threshold leaves after the last pass, and here after the first: where nothing holds, argmax is 0.": torch.where(
                total[-1] >= threshold, expected, torch.where(number == 1, 1.0, 0.0)
            ),
            "The remainder is what is missing before the exit: you have counted what the exit asks for as paid.": torch.where(
                at, (1 - total).clamp(min=0), paid
            ),
            "You pay the remainder up to the threshold: the weights should sum to one.": torch.where(at, threshold - paid.sum(0), paid),
            "That is the halting distribution: ACT takes the numbers as weights, without multiplying by what is left.": ours.halting_distribution(
                halt_prob
            ),
            "You scale the weights to sum to one: only the exit pays the remainder.": torch.where(before | at, halt_prob, 0)
            / torch.where(before | at, halt_prob, 0).sum(0),
        },
    )
    expect_gradients(act_weights, ours.act_weights, halt_prob, threshold)
    level = act_weights(torch.full((4, 1), 0.25), 0.5)
    expect_close(level, torch.tensor([[0.25], [0.75], [0.0], [0.0]]), "A sum that is exactly at the threshold stops: compare with ≥.")
    many = act_weights(torch.full((300, 2), 0.004, dtype=torch.bfloat16), 0.9)
    expect(many.dtype == torch.bfloat16, f"bfloat16 came in and {str(many.dtype)[6:]} went out: hand back the dtype that came in.")
    needed = ours.act_weights(torch.full((300, 2), 0.004, dtype=torch.bfloat16), 0.9)
    expect_close(many.float(), needed.float(), "In bfloat16 the weights of 300 small passes are off: add up in float32, and round once.")
    first = torch.tensor([[0.95], [0.3], [0.2]])
    expect_close(
        act_weights(first, 0.9),
        torch.tensor([[1.0], [0.0], [0.0]]),
        "A token that stops after the first pass has paid nothing before it: its remainder is one.",
    )
    for limit in (0.9, 1.0):
        _edges(act_weights, ours.act_weights, limit)
    _sums_to_one(act_weights)
    _refuses_bad_shares(act_weights, "halt_prob")
    _refuses_bad_thresholds(act_weights)


@checks("ponder_kl")
def ponder_kl(ponder_kl):
    distribution, rate = torch.rand(6, 4).softmax(0), 0.3
    cut = rate * (1 - rate) ** torch.arange(6.0).view(-1, 1)
    prior = cut / cut.sum()
    paid = torch.cat((cut[:-1], 1 - cut[:-1].sum(0, keepdim=True)))
    expected = (distribution * (distribution / prior).log()).sum(0)
    expect_close(
        ponder_kl(distribution, rate),
        expected,
        "Sum distribution · log(distribution / prior) over the passes, with a prior ∝ (1 − prior_rate) ** (pass − 1) that sums to one.",
        mistakes={
            "You measure KL(prior ‖ distribution): the source takes the distribution first.": (prior * (prior / distribution).log()).sum(0),
            "The prior is not scaled: cut off after the last pass it sums to less than one, so divide by its sum.": (
                distribution * (distribution / cut).log()
            ).sum(0),
            "The last pass of the prior takes all the rest: the prior should be cut off and scaled to one.": (
                distribution * (distribution / paid).log()
            ).sum(0),
            "The sign is turned: a divergence is never negative.": -expected,
            "That is in bits: use the natural logarithm.": expected / math.log(2),
            "You take the mean over the passes: a divergence is their sum.": expected / 6,
            "That is the cross-entropy: subtract the distribution's own entropy, −∑ p log p.": -(distribution * prior.log()).sum(0),
        },
    )
    expect_gradients(
        lambda part: ponder_kl(part.softmax(0), rate), lambda part: reference("halting").ponder_kl(part.softmax(0), rate), torch.randn(6, 4)
    )
    sure = torch.zeros(4, 1)
    sure[1] = 1
    sure.requires_grad_()
    result = ponder_kl(sure, 0.5)
    (slope,) = torch.autograd.grad(result.sum(), sure, allow_unused=True)
    expect(bool(result.isfinite().all()), "A pass with no share gives nan or infinity: 0 · log 0 counts as 0, so keep the logarithm finite.")
    finite = slope is not None and bool(slope.isfinite().all())
    expect(
        finite,
        "The value is right, and its gradient at a share of 0 is infinite or nan, as that of xlogy and kl_div is. Times the zero slope of a head that is "
        "sure, it gives nan. Keep the logarithm finite: clamp the share to the smallest normal number, torch.finfo(dtype).tiny, before you take it.",
    )
    expect_close(
        result.detach(),
        -torch.tensor([4 / 15]).log(),
        "For a sure distribution, [0, 1, 0, 0], the result is off: clamp inside the logarithm only, to the smallest normal number.",
    )
    expect_close(slope[1:2], 1 - torch.tensor([[4 / 15]]).log(), "For a sure distribution the gradient is wrong.")
    for bad in (0.0, 1.0):
        expect_raises(ValueError, lambda: ponder_kl(distribution, bad), f"A prior_rate of {bad:g} should raise a ValueError.")
    for factor in (torch.tensor([1.0, 1.0, 1.5, 0.5]), 1.5):
        expect_raises(
            ValueError,
            lambda: ponder_kl(distribution * factor, 0.3),
            "A token whose shares do not sum to one should raise a ValueError: look at each token's own sum, in both directions.",
        )
    expect_raises(ValueError, lambda: ponder_kl(distribution / 2, 0.3), "A distribution that does not sum to one should raise a ValueError.")
    for shape, prior_rate in (((1, 3), 0.01), ((9,), 0.9), ((5, 2, 3), 0.01), ((5, 2, 3), 0.9), ((64, 2), 0.1)):
        other = (2 * torch.randn(shape)).softmax(0)
        expect_close(
            ponder_kl(other, prior_rate),
            reference("halting").ponder_kl(other, prior_rate),
            f"For a distribution of shape {shape} and prior_rate={prior_rate} the result is wrong: passes lie on dimension 0, and any number of dimensions follows.",
            rtol=1e-3,
            atol=1e-4,
        )
    rounded = reference("halting").halting_distribution(torch.rand(40, 8).mul(0.1).bfloat16())
    expect(bool(ponder_kl(rounded, 0.3).isfinite().all()), "In bfloat16 the result is nan or infinite.")
