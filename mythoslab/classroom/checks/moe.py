"""Checks of 07_moe."""

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from . import attempt, checks, expect, expect_close, expect_gradients, expect_raises, expect_shape, reference


def _scatter(routing, n_experts):
    """Shares of all experts, so that the order of the chosen ones does not matter."""
    return torch.zeros(*routing.experts.shape[:-1], n_experts).scatter(-1, routing.experts, routing.weights)


@checks("route")
def route(route):
    ours = reference("moe").route
    logits, bias, none = 2 * torch.randn(40, 8), 0.3 * torch.randn(8), torch.zeros(8)
    got = route(logits, bias, 3)
    expect(hasattr(got, "experts") and hasattr(got, "weights") and hasattr(got, "scores"), "Return a Routing: experts, weights and scores.")
    expect_shape(got.experts, (40, 3), "The chosen experts")
    expect_shape(got.weights, (40, 3), "The weights")
    expect(got.experts.dtype == torch.int64, f"Numbers of experts are int64, and these are {str(got.experts.dtype)[6:]}.")
    scores = logits.sigmoid()
    choice = scores + bias
    expect_close(
        got.scores,
        scores,
        "The scores are the sigmoid of the logits, of all experts and without the bias.",
        mistakes={
            "The scores handed back have the bias in them: it is for the choice only.": choice,
            "By default a score is a sigmoid, and these are a softmax.": logits.softmax(-1),
            "The scores handed back are the logits: take their sigmoid.": logits,
        },
    )
    top = lambda numbers: numbers.topk(3, -1).indices  # noqa: E731
    weigh = lambda experts, by: by.gather(-1, experts) / by.gather(-1, experts).sum(-1, keepdim=True)  # noqa: E731
    spread = lambda experts, weights: torch.zeros(40, 8).scatter(-1, experts, weights)  # noqa: E731
    right = top(choice)
    expect_close(
        _scatter(got, 8),
        spread(right, weigh(right, scores)),
        "Choose by score plus bias, weigh the chosen by their scores, scaled to sum to one.",
        mistakes={
            "The bias is in the weights: it decides who is chosen, and how much they count is for the scores alone.": spread(
                right, weigh(right, choice)
            ),
            "The bias is left out of the choice.": spread(top(scores), weigh(top(scores), scores)),
            "The weights are not scaled: divide the chosen scores by their sum.": spread(right, scores.gather(-1, right)),
            "The weights are scaled by the scores of all experts: divide by the sum of the chosen ones.": spread(
                right, scores.gather(-1, right) / scores.sum(-1, keepdim=True)
            ),
            "The bias is subtracted: add it.": spread(top(scores - bias), weigh(top(scores - bias), scores)),
            "That takes the softmax of the chosen scores: divide them by their sum.": spread(right, scores.gather(-1, right).softmax(-1)),
            "You choose the lowest scores.": spread(top(-choice), weigh(top(-choice), scores)),
        },
    )
    plain = dict(norm_topk_prob=False)
    expect_close(
        _scatter(route(logits, none, 3, **plain), 8),
        _scatter(ours(logits, none, 3, **plain), 8),
        "With norm_topk_prob=False the scores are the weights.",
    )
    scaled = dict(routed_scaling_factor=2.5)
    expect_close(
        _scatter(route(logits, none, 3, **scaled), 8),
        2.5 * _scatter(ours(logits, none, 3), 8),
        "routed_scaling_factor multiplies the weights after they are scaled to sum to one.",
        mistakes={"The routed_scaling_factor has no effect.": _scatter(ours(logits, none, 3), 8)},
    )
    soft = dict(scoring_func="softmax", norm_topk_prob=False)
    expect_close(
        _scatter(route(logits, none, 3, **soft), 8),
        _scatter(ours(logits, none, 3, **soft), 8),
        "With scoring_func='softmax' the scores are a softmax over all experts.",
    )
    groups = dict(n_group=4, topk_group=2)

    def by_groups(count, bias=bias, closed=float("-inf")):
        in_groups = (scores + bias).unflatten(-1, (4, 2))
        best = count(in_groups).topk(2, -1).indices
        opened = torch.zeros(40, 4).scatter(-1, best, 1.0).bool().unsqueeze(-1)
        chosen = top(in_groups.masked_fill(~opened, closed).flatten(-2))
        return spread(chosen, weigh(chosen, scores))

    expect_close(
        _scatter(route(logits, bias, 3, **groups), 8),
        by_groups(lambda g: g.sum(-1)),
        "A token may use the topk_group groups whose two best experts have the largest sum of score plus bias.",
        mistakes={
            "The groups are left out: a token may use only topk_group of them.": spread(right, weigh(right, scores)),
            "A group counts by its single best expert: with sigmoid scores take the sum of the two best.": by_groups(lambda g: g.amax(-1)),
        },
    )
    low = bias - 2  # every choice is below zero
    expect_close(
        _scatter(route(logits, low, 3, **groups), 8),
        by_groups(lambda g: g.sum(-1), low),
        "A bias that lowers all experts alike should change no choice.",
        mistakes={
            "Experts of closed groups get a 0, which is more than a negative choice: give them −inf.": by_groups(lambda g: g.sum(-1), low, 0.0)
        },
    )
    expect_close(
        _scatter(route(logits, bias, 3, **soft, **groups), 8),
        _scatter(ours(logits, bias, 3, **soft, **groups), 8),
        "With softmax scores a group counts by its single best expert, score plus bias.",
    )
    for options, sentence in (
        (dict(n_group=2, topk_group=1), "Of a group of four, too, only the two best count: take topk(2), not all."),
        (dict(n_group=8, topk_group=4), "A group of a single expert counts by that one: there are no two to add."),
        (dict(scoring_func="softmax"), "norm_topk_prob scales softmax scores, too."),
    ):
        got = attempt(lambda: _scatter(route(logits, bias, 3, **options), 8), sentence)  # a topk may have no two
        expect(torch.allclose(got, _scatter(ours(logits, bias, 3, **options), 8), atol=1e-5), sentence)
    for shape in ((5, 8, 8), (8,)):
        given = logits.flatten()[: torch.Size(shape).numel()].view(shape)
        for options in ({}, groups):
            last = "The last dimension counts the experts, whatever stands before it: use −1, not 1."
            got = attempt(lambda: _scatter(route(given, bias, 3, **options), 8), last)
            expect(torch.allclose(got, _scatter(ours(given, bias, 3, **options), 8), atol=1e-5), last)
    expect_gradients(
        lambda numbers: _scatter(route(numbers, bias, 3), 8),
        lambda numbers: _scatter(ours(numbers, bias, 3), 8),
        logits,
        sentence="The router cannot learn: a gradient must come back through the weights to the logits, so leave the scores in the graph.",
    )
    expect_gradients(
        lambda numbers: route(numbers, bias, 3).scores,
        lambda numbers: ours(numbers, bias, 3).scores,
        logits,
        sentence="The scores that are handed back are cut off from the logits: a balance loss is to teach the router through them.",
    )
    for wrong in (dict(scoring_func="relu"), dict(n_group=3), dict(n_group=4, topk_group=5)):
        expect_raises(ValueError, lambda: route(logits, bias, 3, **wrong), f"{wrong} with eight experts should raise a ValueError.")
    for count in (0, 9):
        expect_raises(ValueError, lambda: route(logits, bias, count), f"{count} of eight experts for a token should raise a ValueError.")
    expect_raises(
        ValueError,
        lambda: route(logits, bias, 3, n_group=4, topk_group=1),
        "Three experts out of one group of two should raise a ValueError: no more are in reach.",
    )


@checks("sort_and_group")
def sort_and_group(sort_and_group):
    ours = reference("moe")
    x, gate_up, down = torch.randn(30, 8), torch.randn(6, 12, 8) / 2, torch.randn(6, 8, 6) / 2
    routing = ours.route(torch.randn(30, 6), torch.tensor([9.0, 0, 0, 0, 0, -9.0]), 2)  # one serves all, one nobody
    got = sort_and_group(x, routing, gate_up, down)
    expect_shape(got, (30, 8), "The output")

    def by_hand(weights, tokens=None, swapped=False, silu=F.silu):
        out = torch.zeros(30, 8)
        for token in range(30):
            for choice in range(2):
                expert = routing.experts[token, choice]
                gate, up = (gate_up[expert] @ x[token]).chunk(2)
                gate, up = (up, gate) if swapped else (gate, up)
                out[token if tokens is None else tokens[2 * token + choice]] += weights[token, choice] * (down[expert] @ (silu(gate) * up))
        return out

    def weighed(answers):
        return (routing.weights.unsqueeze(1) @ answers.view(30, 2, 8)).squeeze(1)

    order = routing.experts.flatten().argsort(stable=True)
    sorted_experts, sorted_rows = routing.experts.flatten()[order], x[order // 2]
    gate, up = (gate_up[sorted_experts] @ sorted_rows.unsqueeze(2)).squeeze(2).chunk(2, -1)
    sorted_answers = (down[sorted_experts] @ (F.silu(gate) * up).unsqueeze(2)).squeeze(2)
    ones = torch.ones_like(routing.weights)
    expect_close(
        got,
        by_hand(routing.weights),
        "The output of a token is the weighted sum of its experts: check that rows, answers and weights are in one order.",
        mistakes={
            "The weights are left out: multiply each answer by its share.": by_hand(ones),
            "The weights follow the sorted order, and the answers that of the tokens: bring both into one.": by_hand(
                routing.weights.flatten()[order].view(30, 2)
            ),
            "Gate and up have changed places: SiLU goes on the first half.": by_hand(routing.weights, swapped=True),
            "SiLU is left out: the gate is linear.": by_hand(routing.weights, silu=lambda gate: gate),
            "The answers are not put back in the order of the tokens.": by_hand(routing.weights, order.argsort() // 2),
            "The answers are not put back in the order of the tokens: they lie in that of the experts.": weighed(sorted_answers),
            "The answers are sorted once more: to put them back, index by order.argsort(), the inverse of order.": weighed(sorted_answers[order]),
            "The mean is taken over a token's experts: take the weighted sum.": by_hand(routing.weights) / 2,
        },
        atol=1e-4,
    )
    inputs = [part.clone().requires_grad_() for part in (x, gate_up, down)]
    sort_and_group(inputs[0], routing, *inputs[1:]).sum().backward()
    learned = inputs[1].grad is not None and bool(inputs[1].grad[0].any()) and not inputs[1].grad[5].any()
    expect(learned, "The gradient does not reach the experts that served, and only them.")
    expect_gradients(
        lambda x, weights: sort_and_group(x, routing._replace(weights=weights), gate_up, down),
        lambda x, weights: ours.loop_over_experts(x, routing._replace(weights=weights), gate_up, down),
        x,
        routing.weights,
        sentence="The gradient must come back to the tokens and to routing.weights, or what is below and the router cannot learn.",
    )

    three, half = ours.route(torch.randn(30, 6), torch.zeros(6), 3), [part.bfloat16() for part in (x, gate_up, down)]
    for (given, *weights), chosen, rounding, sentence in (
        ((x, gate_up, down), three, 1e-5, "Three experts for a token go wrong: routing.experts has their number, which need not be 2."),
        (half, routing, 0.03, "Tokens in bfloat16 should give an answer in bfloat16: bring the weights to the dtype of x."),
    ):
        got = attempt(lambda: sort_and_group(given, chosen, *weights), sentence)
        needed = ours.loop_over_experts(given.float(), chosen, *(weight.float() for weight in weights))
        kind = getattr(got, "shape", None), getattr(got, "dtype", None)
        same = kind == (given.shape, given.dtype) and (got.float() - needed).abs().max() < rounding * needed.abs().max()
        expect(bool(same), sentence)
    many = torch.randn(64, 16, 8), torch.randn(64, 8, 8), ours.route(torch.randn(30, 64), torch.zeros(64), 2)
    calls = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    with Watch():
        sort_and_group(x, many[2], *many[:2])
    expect(
        len(calls) < 5 * 64,
        "The numbers are right, and so many small steps run that each expert or pair must have its own: sort the pairs, and let grouped_product serve all experts.",
    )


@checks("balance_bias")
def balance_bias(balance_bias):
    bias, load = torch.tensor([0.1, -0.2, 0.0, 0.3]), torch.tensor([10.0, 2.0, 4.0, 4.0])
    kept = bias.clone()
    got = balance_bias(bias, load, 0.01)
    expect(torch.equal(bias, kept), "The bias that was given has changed: hand back a new one.")
    step = 0.01 * torch.tensor([-1.0, 1.0, 1.0, 1.0])
    expect_close(
        got,
        bias + step,
        "Lower the bias by the rate where the load is above its mean, and raise it by the rate where it is below.",
        mistakes={
            "The sign is turned: the busiest expert would become busier.": bias - step,
            "The step grows with the load: take its sign only, so that one wild batch does no harm.": bias + 0.01 * (load.mean() - load),
            "The step grows with the relative load: take its sign only.": bias + 0.01 * (1 - load / load.mean()),
            "The old bias is lost: add to it.": step,
            "The load is compared with its median: take the mean.": bias + 0.01 * (load.median() - load).sign(),
            "The rate is left out.": bias + step / 0.01,
            "Only the busy experts move: raise those with less than the mean too.": bias + step.clamp(max=0),
        },
    )
    expect_close(balance_bias(bias, torch.ones(4), 0.01), bias, "A level load leaves the bias as it is.")
    expect_close(balance_bias(bias, load, 0.0), bias, "A rate of 0 leaves the bias as it is.")
    expect_raises(ValueError, lambda: balance_bias(bias, load, -0.1), "A negative rate should raise a ValueError.")


@checks("sequence_balance_loss")
def sequence_balance_loss(sequence_balance_loss):
    ours = reference("moe")
    routing = ours.route(torch.randn(3, 12, 6) + torch.randn(3, 1, 6), torch.randn(6), 2)  # a bias: who served is not who scored best
    got = sequence_balance_loss(routing)
    expect_shape(got, (), "The loss, one number,")
    chosen = torch.zeros(3, 12, 6).scatter(-1, routing.experts, 1.0)
    share = routing.scores / routing.scores.sum(-1, keepdim=True)
    load = chosen.mean(1)
    best = torch.zeros(3, 12, 6).scatter(-1, routing.scores.topk(2, -1).indices, 1.0).mean(1)
    of_chosen = routing.scores / routing.scores.gather(-1, routing.experts).sum(-1, keepdim=True)
    afterwards = routing.scores.mean(1) / routing.scores.mean(1).sum(-1, keepdim=True)
    expect_close(
        got,
        (load * 3 * share.mean(1)).sum(-1).mean(),
        "Sum relative load × mean share over the experts, in each sequence, and take the mean over sequences.",
        mistakes={
            "Loads are taken over the whole batch: one sequence may make up for another there, so count each by itself.": (
                load.mean(0) * 3 * share.mean((0, 1))
            ).sum(),
            "The load is not relative: multiply by the number of experts over the number of choices, so that one is a fair share.": (
                load * share.mean(1)
            )
            .sum(-1)
            .mean(),
            "You count the best by score: count those that served, routing.experts.": (best * 3 * share.mean(1)).sum(-1).mean(),
            "The scores are divided by the sum of the chosen ones: divide by that of all experts.": (load * 3 * of_chosen.mean(1)).sum(-1).mean(),
            "The mean of the scores is scaled: scale each token's scores, then take the mean.": (load * 3 * afterwards).sum(-1).mean(),
            "The scores are not scaled: divide each token's scores by their sum.": (load * 3 * routing.scores.mean(1)).sum(-1).mean(),
            "The product is taken for each token before the mean: take the means of load and share first.": (chosen * 3 * share).sum(-1).mean(),
            "You take the mean over the experts: sum over them.": (load * 3 * share.mean(1)).mean(),
            "Loads count the tokens: take their share of the sequence.": (chosen.sum(1) * 3 * share.mean(1)).sum(-1).mean(),
            "The load is multiplied by the number of experts only: divide by the choices too.": (load * 6 * share.mean(1)).sum(-1).mean(),
        },
    )
    expect_gradients(
        lambda scores: sequence_balance_loss(routing._replace(scores=scores)),
        lambda scores: ours.sequence_balance_loss(routing._replace(scores=scores)),
        routing.scores,
        sentence="The gradient must reach the router through the scores, and through the sum that they are divided by.",
    )
