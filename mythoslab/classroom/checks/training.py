"""Checks of 09_training."""

import copy
import math
import weakref

import torch
import torch.nn.functional as F
from torch import nn

from . import attempt, checks, expect, expect_close, expect_raises, reference
from .model import beside


def _model(learners, **changes):
    shape = dict(vocab_size=13, dim=8, n_heads=2, hidden_dim=12, n_passes=2, context_length=6) | changes
    config = beside(learners, "MythosConfig", "model")(**shape)
    model = beside(learners, "Mythos", "model")(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(0, 0.5)
    return model


@checks("held_out_bits")
def held_out_bits(held_out_bits):
    model, tokens, n_bytes = _model(held_out_bits), torch.randint(13, (30,)), 71
    bits = held_out_bits(model, tokens, n_bytes, n_passes=4)
    expect(bits is not None, "The result is None: is a return missing?")
    expect(isinstance(bits, float), f"Return a float: yours is a {type(bits).__name__}.")
    expect(model.embedding.weight.grad is None, "Measuring should leave no gradients: keep @torch.no_grad().")
    first = math.log(13)

    def of(nats):
        return torch.tensor(nats / math.log(2) / n_bytes)

    right = _nats(model, tokens, stride=3)
    expect_close(
        torch.tensor(bits),
        of(first + right),
        "The number is off: add up the nats of every token once, then divide by log(2) and by the bytes.",
        mistakes={
            "That is nats: divide by log(2) for bits.": of((first + right) * math.log(2)),
            "That is bits per token: divide by the number of bytes, not of tokens.": of(
                (first + right) * n_bytes / 30
            ),
            "The first token is missing: it has no context, and counts as one of vocab_size equals.": of(
                right
            ),
            "Your windows do not overlap: move on by half a context, so that tokens have something before them.": of(
                first + _nats(model, tokens, stride=6)
            ),
            "Tokens in the overlap of two windows count twice: count only those not yet predicted.": of(
                first + _nats(model, tokens, stride=3, twice=True)
            ),
            "Your last window is cut short: move it back, so that it is a whole context and ends with the last token.": of(
                first + _nats(model, tokens, stride=3, cut=True)
            ),
            "The end of the text is missing: the last window ends with the last token.": of(
                first + _nats(model, tokens[:28], stride=3)
            ),
            "Your windows hold one context, and predict one token fewer: read a whole context, and let it predict as many tokens, the last one behind it.": of(
                first + _nats(model, tokens, stride=3, context=5)
            ),
            "n_passes has no effect: hand it to the model.": of(
                first + _nats(model, tokens, stride=3, n_passes=2)
            ),
        },
        rtol=1e-5,
    )
    short = tokens[:4]
    expect_close(
        torch.tensor(held_out_bits(model, short, n_bytes, n_passes=4)),
        of(first + _nats(model, short, stride=3)),
        "A text shorter than one context should be read in one window.",
    )
    expect_close(
        torch.tensor(held_out_bits(model, tokens, n_bytes)),
        of(first + _nats(model, tokens, stride=3, n_passes=2)),
        "Without n_passes the configured number holds: hand None on to the model.",
        rtol=1e-5,
    )
    for length, sentence in (
        (28, "With windows that end with the text of their own accord the number is off: the last one belongs to them."),
        (7, "A text of one context and a token is one window, and the number is off."),
        (80, "A long text, of more than sixteen windows, is off: every token counts once there, too."),
    ):
        some = torch.randint(13, (length,))
        expect_close(
            torch.tensor(held_out_bits(model, some, n_bytes, n_passes=4)),
            of(first + _nats(model, some, stride=3)),
            sentence,
            rtol=1e-5,
        )
    other = _model(held_out_bits, context_length=9)
    expect_close(
        torch.tensor(held_out_bits(other, tokens, n_bytes, n_passes=4)),
        of(first + _nats(other, tokens, stride=4, context=9)),
        "With another context_length the number is off: windows move on by context // 2.",
        rtol=1e-5,
    )
    expect_raises(ValueError, lambda: held_out_bits(model, tokens[:1], n_bytes), "A single token should raise a ValueError: there is nothing to predict.")


@torch.no_grad()
def _nats(model, tokens, *, stride, twice=False, cut=False, n_passes=4, context=6):
    last = max(0, len(tokens) - 1 - context)
    total, done = 0.0, 1
    for start in range(0, len(tokens) - 1, stride) if cut else [*range(0, last, stride), last]:
        window = tokens[start : start + context + 1]
        losses = F.cross_entropy(model(window[None, :-1], n_passes).logits[0], window[1:], reduction="none")
        total += losses[0 if twice else done - start - 1 :].sum().item()
        done = start + 1 + len(losses)
    return total


@checks("schedule")
def schedule(schedule):
    TrainConfig = beside(schedule, "TrainConfig", "training")
    plan = TrainConfig(n_steps=20, warm_up=0.2, decay=0.5)
    steps = torch.arange(20.0)
    rise, fall, hold = (steps + 1) / 4, (20 - steps) / 10, torch.ones(20)
    got = [schedule(step, plan) for step in range(20)]
    expect(None not in got, "The result is None: is a return missing?")
    expect_close(
        torch.tensor([float(share) for share in got]),
        torch.minimum(torch.minimum(rise, fall), hold),
        "The shape is off: the smallest of the rising line, the falling line and one.",
        mistakes={
            "The first step has the rate 0 and is lost: count from step + 1.": torch.minimum(
                torch.minimum(steps / 4, fall), hold
            ),
            "It does not rise: the first warm_up · n_steps steps are smaller.": torch.minimum(fall, hold),
            "It does not fall: the last decay · n_steps steps become smaller.": torch.minimum(rise, hold),
            "It exceeds one: take the smallest of both lines and one.": torch.minimum(rise, fall),
            "It falls from the start: it should hold, and fall in the last decay · n_steps steps alone.": torch.minimum(
                torch.minimum(rise, 1 - steps / 20), hold
            ),
            "The last step has the rate 0 and is lost: the falling line is (n_steps − step) / (decay · n_steps).": torch.minimum(
                torch.minimum(rise, (19 - steps) / 10), hold
            ),
            "You return a learning rate: return the share of the highest, 0 to 1.": torch.minimum(
                torch.minimum(rise, fall), hold
            )
            * plan.learning_rate,
            "warm_up and decay are shares of the steps: multiply them by n_steps.": torch.minimum(
                torch.minimum((steps + 1) / 0.2, (20 - steps) / 0.5), hold
            ),
        },
    )
    uneven = TrainConfig(n_steps=20, warm_up=0.125, decay=0.375)
    expect_close(
        torch.tensor([float(schedule(step, uneven)) for step in range(20)]),
        torch.minimum(torch.minimum((steps + 1) / 2.5, (20 - steps) / 7.5), hold),
        "warm_up · n_steps need not be whole: divide by it as it is, without rounding.",
    )
    longer, many = TrainConfig(n_steps=50, warm_up=0.1, decay=0.9), torch.arange(50.0)
    expect_close(
        torch.tensor([float(schedule(step, longer)) for step in range(50)]),
        torch.minimum((many + 1) / 5, (50 - many) / 45).clamp(max=1),
        "With another n_steps, and a fall right after the rise, the share is off.",
    )
    expect(not isinstance(got[0], torch.Tensor), "Return a float, not a tensor.")
    flat = TrainConfig(n_steps=20, warm_up=0.0, decay=0.0)
    try:
        level = [schedule(step, flat) for step in (0, 19)]
    except ZeroDivisionError:
        level = None
    expect(
        level == [1, 1],
        "With warm_up=0 and decay=0 the share should be one at every step, and nothing divided by zero.",
    )
    for only, line in ((dict(warm_up=0.0, decay=0.5), fall), (dict(warm_up=0.2, decay=0.0), rise)):
        zero = min(only, key=only.get)
        sentence = f"With {zero}=0 alone the other line should still hold, and nothing be divided by zero."
        shares = attempt(lambda: [float(schedule(step, TrainConfig(n_steps=20, **only))) for step in range(20)], sentence)
        expect_close(torch.tensor(shares), torch.minimum(line, hold), sentence)


@checks("training_step")
def training_step(training_step):
    start = _model(training_step)
    inputs, targets = torch.randint(13, (2, 3, 6))
    # what an earlier step leaves behind
    F.cross_entropy(start(inputs.flip(0)).logits.flatten(0, 1), inputs.flatten()).backward()

    def losses(model):
        def of(first, last, weight):
            logits = model(inputs[first:last], 3).logits
            return weight * F.cross_entropy(logits.flatten(0, 1), targets[first:last].flatten())

        return [lambda: of(0, 2, 1.0), lambda: of(2, 3, 0.5)]

    def after(step, **options):
        model = copy.deepcopy(start)
        for weight, old in zip(model.parameters(), start.parameters()):
            weight.grad = old.grad.clone()
        values = step(model, losses(model), _optimisers(model), **options)
        return nn.utils.parameters_to_vector(model.parameters()).detach(), values

    weights, values = after(training_step, clip=0.3)
    expect(values is not None, "The losses are None: is a return missing?")
    expect(
        isinstance(values, list) and all(isinstance(value, float) for value in values),
        "Return the losses as a list of floats, loss.item() each: a tensor keeps the whole step in memory.",
    )
    expected, expected_values = after(reference("training").training_step, clip=0.3)
    at_start = nn.utils.parameters_to_vector(start.parameters()).detach()
    expect_close(
        weights,
        expected,
        "The step is off: zero the gradients, backward for each loss, clip, and let every optimiser step, in this order.",
        mistakes={
            "Nothing has changed: let the optimisers step.": at_start,
            "Gradients of the step before are still there: zero_grad comes before the first backward.": after(
                _variant(zero=False), clip=0.3
            )[0],
            "Gradients of the first loss are lost: zero_grad comes once, before all of them.": after(
                _variant(zero_each=True), clip=0.3
            )[0],
            "Only the first loss counts: go backward for every one of them.": after(_variant(n_losses=1), clip=0.3)[0],
            "The gradient is not clipped: clip between backward and step.": after(_variant(clips=False), clip=0.3)[0],
            "Only the first optimiser steps: there are several.": after(_variant(first_only=True), clip=0.3)[0],
            "clip has no effect: yours always clips to one.": after(_variant(), clip=1.0)[0],
            "The step goes uphill: the loss should become smaller.": 2 * at_start - expected,
            "You step after every loss: step once, when all gradients are there.": after(
                _variant(step_each=True), clip=0.3
            )[0],
        },
        atol=1e-6,
    )
    expect(len(values) == 2, "Return one number for each of the losses.")
    expect_close(
        torch.tensor(values),
        torch.tensor(expected_values),
        "Return the losses of this step, as they were before the update.",
    )
    unclipped = after(reference("training").training_step, clip=1e6)[0]
    expect_close(
        after(training_step, clip=1e6)[0],
        unclipped,
        "The step is off where the gradient is not clipped: it goes along the sum of the losses' gradients.",
        mistakes={"You take the mean of the losses: their gradients add up.": (at_start + unclipped) / 2},
        atol=1e-6,
    )
    graded, kept, alive = copy.deepcopy(start), [], []

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor

    def pack(tensor):
        part = Kept(tensor)
        kept.append(weakref.ref(part))
        return part

    def noting(compute):
        def loss():
            alive.append(sum(part() is not None for part in kept))  # what forward kept of the losses before
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda part: part.tensor):
                return compute()

        return loss

    thrice = [noting(compute) for compute in (*losses(graded), losses(graded)[0])]
    expect(
        len(training_step(graded, thrice, _optimisers(graded))) == len(alive) == 3,
        "Each loss, however many there are, should be computed once: keep what the function gave, it costs a forward.",
    )
    expect(
        not any(alive),
        "The numbers are right, and what forward kept of one loss is still there when the next is computed: call backward on each before you compute the next, without retain_graph, or all are in memory at once.",
    )
    broken = copy.deepcopy(start)
    with torch.no_grad():
        broken.head.weight[0, 0] = torch.nan
    before = broken.prelude[0].ffn.up.weight.detach().clone()
    expect_raises(
        ValueError,
        lambda: training_step(broken, losses(broken), _optimisers(broken)),
        "A loss that is not a number should raise a ValueError: ask torch.isfinite(loss).",
    )
    expect(
        torch.equal(broken.prelude[0].ffn.up.weight, before),
        "A loss that is not a number reaches the weights: look at it before the optimisers step.",
    )
    second = copy.deepcopy(start)
    expect_raises(
        ValueError,
        lambda: training_step(second, [losses(second)[0], lambda: losses(second)[1]() * torch.nan], _optimisers(second)),
        "Only the first loss is looked at: ask torch.isfinite of each.",
    )
    endless = copy.deepcopy(start)
    expect_raises(
        ValueError,
        lambda: training_step(endless, [lambda: losses(endless)[0]() + torch.inf], _optimisers(endless)),
        "A loss can be infinite and its gradient finite: ask torch.isfinite of the loss, too, not isnan.",
    )
    steep = copy.deepcopy(start)
    steep.prelude[0].ffn.up.weight.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    before = steep.head.weight.detach().clone()
    expect_raises(
        ValueError,
        lambda: training_step(steep, losses(steep), _optimisers(steep)),
        "The loss can be finite and its gradient not: clip_grad_norm_ hands back the length, ask torch.isfinite of it too.",
    )
    expect(
        torch.equal(steep.head.weight, before),
        "A gradient that is not finite reaches the weights: look at its length before the optimisers step.",
    )


def _optimisers(model):
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    others = [weight for weight in model.parameters() if weight.dim() != 2]
    return [torch.optim.SGD(matrices, lr=0.5), torch.optim.SGD(others, lr=0.5)]


def _variant(*, zero=True, zero_each=False, n_losses=None, clips=True, first_only=False, step_each=False):
    def step(model, losses, optimisers, *, clip=1.0):
        values = []
        if zero:
            model.zero_grad()
        for compute in losses[:n_losses]:
            if zero_each:
                model.zero_grad()
            loss = compute()
            loss.backward()
            values.append(loss.item())
            if step_each:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
                for optimiser in optimisers:
                    optimiser.step()
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        for optimiser in [] if step_each else optimisers[:1] if first_only else optimisers:
            optimiser.step()
        return values

    return step
