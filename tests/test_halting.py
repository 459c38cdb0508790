"""mythoslab.halting: four rules to stop by, what a pass costs, and the checks of the notebook that builds them."""

import inspect
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mythoslab.halting import (
    HaltingHead,
    accumulate,
    act,
    act_weights,
    at_exit,
    converge,
    exit_pass,
    expected_passes,
    halting_distribution,
    output_change,
    ponder,
    ponder_kl,
    ponder_loss,
    ponder_net_loss,
)
from tests.mistakes import edited, mistakes_are_named

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
RULES = [act, accumulate, ponder]
seeds = st.integers(0, 999)
thresholds = st.floats(0.0, 1.0, exclude_min=True)


def shares(seed, n_passes, *tokens, dtype=torch.float64):
    """Halting probabilities, some of them exactly 0 and 1."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.rand(tokens, generator=draw, dtype=torch.float64)  # some tokens hesitate, others do not
    halt_prob = torch.rand((n_passes, *tokens), generator=draw, dtype=torch.float64) * spread
    edge = torch.rand(n_passes, *tokens, generator=draw)
    return halt_prob.masked_fill(edge < 0.05, 0.0).masked_fill(edge > 0.97, 1.0).to(dtype)


def rounding(dtype):
    return 4 * torch.finfo(dtype).eps


@given(seed=seeds, n_passes=st.integers(1, 70), threshold=thresholds, dtype=st.sampled_from(DTYPES))
def test_weights_sum_to_one_for_any_threshold_passes_and_dtype(seed, n_passes, threshold, dtype):
    halt_prob = shares(seed, n_passes, 7, dtype=dtype)
    for weights in (halting_distribution(halt_prob), *(rule(halt_prob, threshold).weights for rule in RULES)):
        assert weights.dtype == dtype and weights.shape == halt_prob.shape
        assert bool((weights >= 0).all())
        assert (weights.double().sum(0) - 1).abs().max() < rounding(dtype)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_sum_to_one_at_the_edges(value, dtype):
    halt_prob = torch.full((9, 2), value, dtype=dtype)
    for rule in RULES:
        weights, leaves = rule(halt_prob)
        assert weights.double().sum(0).tolist() == pytest.approx([1, 1], abs=rounding(dtype))
        assert leaves.tolist() == ([1, 1] if value == 1 else [9, 9] if value < 0.5 else leaves.tolist())


@given(seed=seeds, n_passes=st.integers(1, 12))
def test_distribution_is_that_of_a_walk_that_stops_by_chance(seed, n_passes):
    halt_prob = shares(seed, n_passes)
    going, walked = 1.0, []
    for index, stop in enumerate(halt_prob.tolist()):
        stop = 1.0 if index == n_passes - 1 else stop
        walked.append(going * stop)
        going *= 1 - stop
    assert halting_distribution(halt_prob).tolist() == pytest.approx(walked)


@given(seed=seeds, n_passes=st.integers(1, 20), threshold=thresholds)
def test_the_accumulator_is_the_cumulative_distribution_and_leaves_at_its_quantile(seed, n_passes, threshold):
    halt_prob = shares(seed, n_passes, 5)
    accumulator, leaves = torch.zeros(5, dtype=torch.float64), torch.full((5,), n_passes)
    cumulative = halting_distribution(halt_prob).cumsum(0)
    for index in range(n_passes - 1):
        accumulator = accumulator + halt_prob[index] * (1 - accumulator)
        assert torch.allclose(accumulator, cumulative[index])
        near = (accumulator - threshold).abs() < 1e-12  # where rounding decides, either answer is right
        leaves = torch.where((accumulator >= threshold) & (leaves == n_passes) & ~near, index + 1, leaves)
        leaves = torch.where(near & (leaves == n_passes), exit_pass(halt_prob, threshold), leaves)
    assert torch.equal(exit_pass(halt_prob, threshold), leaves)


@given(seed=seeds, n_passes=st.integers(1, 12), threshold=thresholds)
def test_act_counts_what_is_asked_for_and_pays_the_remainder(seed, n_passes, threshold):
    halt_prob = shares(seed, n_passes)
    total, expected = 0.0, [0.0] * n_passes
    for index, wanted in enumerate(halt_prob.tolist()):
        if total + wanted >= threshold or index == n_passes - 1:
            expected[index] = 1 - total
            break
        expected[index], total = wanted, total + wanted
    weights, leaves = act(halt_prob, threshold)
    assert weights.tolist() == pytest.approx(expected) and leaves == index + 1
    assert torch.equal(weights, act_weights(halt_prob, threshold))


@given(seed=seeds, n_passes=st.integers(2, 12), low=thresholds, high=thresholds)
def test_a_higher_threshold_never_stops_earlier(seed, n_passes, low, high):
    halt_prob = shares(seed, n_passes, 6)
    low, high = sorted((low, high))
    for rule in RULES:
        assert bool((rule(halt_prob, low).exit_pass <= rule(halt_prob, high).exit_pass).all())


@given(seed=seeds, n_passes=st.integers(1, 12))
def test_nothing_counts_after_the_exit_except_in_ponder(seed, n_passes):
    halt_prob = shares(seed, n_passes, 6)
    number = torch.arange(1, n_passes + 1).view(-1, 1)
    for rule in (act, accumulate):
        weights, leaves = rule(halt_prob)
        assert not weights[number > leaves].any()
    assert torch.equal(ponder(halt_prob).weights, halting_distribution(halt_prob))
    median = halting_distribution(halt_prob).cumsum(0)
    assert bool((median.gather(0, ponder(halt_prob).exit_pass[None] - 1) > 0.5 - 1e-9).all())


@given(seed=seeds, n_passes=st.integers(1, 9), rate=st.floats(0.01, 0.99), beta=st.floats(0.0, 2.0))
def test_ponder_net_loss_is_that_of_a_plain_computation(seed, n_passes, rate, beta):
    halt_prob, loss = shares(seed, n_passes, 3), shares(seed + 1, n_passes, 3)
    prior = [rate * (1 - rate) ** index for index in range(n_passes)]
    prior = [share / sum(prior) for share in prior]
    total = 0.0
    for token in range(3):
        going = 1.0
        for index in range(n_passes):
            stop = halt_prob[index, token].item() if index < n_passes - 1 else 1.0
            share, going = going * stop, going * (1 - stop)
            total += share * loss[index, token].item()
            if share > 0:
                total += beta * share * (math.log(share) - math.log(prior[index]))
    got = ponder_net_loss(loss, halting_distribution(halt_prob), beta=beta, prior_rate=rate)
    assert got.item() == pytest.approx(total / 3, rel=1e-9, abs=1e-9)


@given(rate=st.floats(0.01, 0.99), n_passes=st.integers(1, 30))
def test_divergence_is_zero_for_the_prior_alone(rate, n_passes):
    prior = (1 - rate) ** torch.arange(n_passes, dtype=torch.float64)
    prior = prior / prior.sum()
    assert abs(ponder_kl(prior, rate).item()) < 1e-9
    if n_passes > 1:
        assert ponder_kl(prior.flip(0).roll(1), rate).item() > -1e-9
        assert ponder_kl(torch.eye(n_passes, dtype=torch.float64)[-1], rate).item() == pytest.approx(-prior[-1].log().item())


def test_price_is_expected_loss_and_expected_passes():
    weights = torch.tensor([[0.5, 0.0], [0.25, 0.0], [0.25, 1.0]])
    loss = torch.tensor([[4.0, 9.0], [2.0, 9.0], [0.0, 1.0]])
    assert expected_passes(weights).tolist() == [1.75, 3.0]
    assert ponder_loss(loss, weights, 0.1).item() == pytest.approx((2.5 + 0.175 + 1.0 + 0.3) / 2)


def test_gradients_are_right():
    halt_prob = (0.1 + 0.5 * torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    loss = torch.rand(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    gradcheck = torch.autograd.gradcheck
    assert gradcheck(halting_distribution, (halt_prob,))
    assert gradcheck(lambda p: act_weights(p, 0.8), (halt_prob,))
    assert gradcheck(lambda p: accumulate(p, 0.8).weights, (halt_prob,))
    assert gradcheck(lambda p: expected_passes(halting_distribution(p)), (halt_prob,))
    assert gradcheck(lambda p: ponder_kl(halting_distribution(p), 0.3), (halt_prob,))
    assert gradcheck(lambda p, x: ponder_loss(x, halting_distribution(p), 0.1), (halt_prob, loss))


def test_a_higher_price_pulls_the_halting_probabilities_up():
    halt_prob = torch.full((4, 2), 0.3, requires_grad=True)
    ponder_loss(torch.ones(4, 2), halting_distribution(halt_prob), 0.1).backward()
    assert bool((halt_prob.grad[:-1] < 0).all())
    assert not halt_prob.grad[-1].any()  # the last pass has no say


def test_divergence_has_finite_gradients_where_a_share_is_zero():
    halt_prob = torch.tensor([[0.0], [1.0], [0.5]], requires_grad=True)
    ponder_kl(halting_distribution(halt_prob), 0.3).sum().backward()
    assert halt_prob.grad.isfinite().all()


def test_convergence_waits_for_the_answer_to_settle():
    shares = torch.tensor([[0.5, 0.5], [0.6, 0.4], [0.9, 0.1], [0.9, 0.1], [0.9, 0.1]])
    change = output_change(shares.log().view(5, 1, 2))
    plain = [sum(b * math.log(b / n) for b, n in zip(before, now)) for before, now in zip(shares.tolist(), shares[1:].tolist())]
    assert change[0].isinf() and change[1:, 0].tolist() == pytest.approx(plain, abs=1e-6)
    weights, leaves = converge(shares.log().view(5, 1, 2))
    assert leaves.item() == 4 and weights[:, 0].tolist() == [0, 0, 0, 1, 0]
    assert converge(shares[:3].log().view(3, 1, 2)).exit_pass.item() == 3
    assert converge(shares[:1].log().view(1, 1, 2)).exit_pass.item() == 1


@given(seed=seeds, scale=st.floats(-50, 50))
def test_convergence_does_not_depend_on_a_shift_of_the_logits(seed, scale):
    logits = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert torch.allclose(output_change(logits)[1:], output_change(logits + scale)[1:])
    assert bool((output_change(logits)[1:] > -1e-12).all())


def test_at_exit_hands_back_what_each_token_had():
    values, leaves = torch.arange(4 * 2 * 3).view(4, 2, 3).float(), torch.tensor([[1, 2, 3], [4, 1, 4]])
    picked = at_exit(values, leaves)
    assert picked.tolist() == [[0, 7, 14], [21, 4, 23]]
    deep = values.unsqueeze(-1).expand(4, 2, 3, 5)
    assert torch.equal(at_exit(deep, leaves), picked.unsqueeze(-1).expand(2, 3, 5))


def test_head_is_undecided_at_the_start_and_does_not_look_at_the_length():
    head = HaltingHead(8)
    states = torch.randn(3, 2, 5, 8)
    assert torch.equal(head(states), torch.full((3, 2, 5), 0.5))
    nn.init.normal_(head.halt.weight)
    assert torch.allclose(head(states), head(1000 * states), atol=1e-5)
    assert bool(((head(states) > 0) & (head(states) < 1)).all())


FUNCTIONS = [halting_distribution, exit_pass, act_weights, act, accumulate, ponder, lambda x: ponder_kl(x, 0.3)]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bad", [math.nan, -0.01, 1.01, math.inf])
def test_shares_that_are_none_are_named(function, bad):
    numbers = torch.tensor([[0.5], [bad], [0.25]])
    with pytest.raises(ValueError, match="(halt_prob|distribution), from lowest to highest, is .*; it must be between 0 and 1, without nan"):
        function(numbers)


@pytest.mark.parametrize("function", [halting_distribution, exit_pass, act_weights])
def test_no_pass_and_whole_numbers_are_named(function):
    with pytest.raises(ValueError, match=r"the shape of halt_prob is \(0, 3\); it must be \(pass, …\), with at least one pass"):
        function(torch.zeros(0, 3))
    plain = inspect.unwrap(function)
    with pytest.raises(ValueError, match=r"the shape of halt_prob is \(\);"):
        plain(torch.tensor(0.5))
    with pytest.raises(ValueError, match="the dtype of halt_prob is torch.int64; it must be a floating-point one"):
        plain(torch.ones(3, 2, dtype=torch.int64))


@pytest.mark.parametrize("function", [exit_pass, act_weights, *RULES])
@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.01, math.nan])
def test_thresholds_outside_are_named(function, threshold):
    with pytest.raises(ValueError, match="threshold is .*; it must be above 0 and at most 1"):
        function(torch.full((3, 2), 0.5), threshold)


def test_other_bad_input_is_named():
    with pytest.raises(ValueError, match="prior_rate is 1.0; it must be above 0 and below 1"):
        ponder_kl(torch.ones(1, 2), 1.0)
    with pytest.raises(ValueError, match="the sum of distribution over the passes is 0.5; it must be one"):
        ponder_kl(torch.full((1, 2), 0.5), 0.3)
    with pytest.raises(ValueError, match="threshold is 0; it must be above 0"):
        converge(torch.zeros(2, 1, 3), 0)
    with pytest.raises(ValueError, match="at least one pass"):
        converge(torch.zeros(0, 1, 3))
    with pytest.raises(ValueError, match="dim is 0; it must be at least 1"):
        HaltingHead(0)
    with pytest.raises(ValueError, match="the last size of states is 5; it must be dim, 4"):
        HaltingHead(4)(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"the shape of weights is \(3, 2\); it must be that of loss, \(3, 1\)"):
        inspect.unwrap(ponder_loss)(torch.zeros(3, 1), torch.full((3, 2), 1 / 3), 0.1)
    with pytest.raises(ValueError, match=r"exit_pass is \(1, 4\); it must be from 1 to 3"):
        at_exit(torch.zeros(3, 2), torch.tensor([1, 4]))
    with pytest.raises(ValueError, match=r"the shape of exit_pass is \(5,\); it must be that of the tokens of values, \(2,\)"):
        at_exit(torch.zeros(3, 2), torch.tensor([1] * 5))


def everything(head, states, logits, loss):
    halt_prob = head(states)
    rules = [rule(halt_prob) for rule in RULES] + [converge(logits)]
    answers = [at_exit(logits, leaves) for _, leaves in rules]
    price = ponder_net_loss(loss, rules[2].weights, beta=0.1, prior_rate=0.3) + ponder_loss(loss, rules[0].weights, 0.1)
    return price, torch.stack(answers)


def test_it_runs_on_fake_cuda_without_mixing_devices():
    with torch.device("meta"):
        head = HaltingHead(4)
    with FakeTensorMode():
        weights = {name: torch.empty(weight.shape, device="cuda") for name, weight in head.named_parameters()}
        functional = lambda states: torch.func.functional_call(head, weights, (states,))  # noqa: E731
        price, answers = everything(
            functional,
            torch.empty(5, 2, 3, 4, device="cuda"),
            torch.empty(5, 2, 3, 7, device="cuda"),
            torch.empty(5, 2, 3, device="cuda"),
        )
    assert price.device.type == answers.device.type == "cuda" and answers.shape == (4, 2, 3, 7)


@given(seed=seeds)
def test_tokens_do_not_hear_of_each_other(seed):
    halt_prob = shares(seed, 6, 4)
    for rule in RULES:
        together, alone = rule(halt_prob), [rule(halt_prob[:, index]) for index in range(4)]
        assert torch.equal(together.weights, torch.stack([weights for weights, _ in alone], 1))
        assert torch.equal(together.exit_pass, torch.stack([leaves for _, leaves in alone]))


COMPILED = """
import torch
from mythoslab.halting import accumulate, act, ponder

halt_prob = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
for rule in (act, accumulate, ponder):
    plain, compiled = rule(halt_prob), torch.compile(rule, backend="eager", fullgraph=True)(halt_prob)
    assert torch.equal(compiled.weights, plain.weights) and torch.equal(compiled.exit_pass, plain.exit_pass)
"""


def test_it_compiles_whole_to_the_same_numbers():
    # In a process of its own: the shape checks of these tests do not compile.
    subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=300)


# Mistakes that learners make, and a word of the sentence that names each.


def reach(halt_prob):
    return torch.cat((torch.ones_like(halt_prob[:1]), (1 - halt_prob[:-1]).cumprod(0)))


def forgets_the_rest(halt_prob):
    return halt_prob * reach(halt_prob)


def counts_itself(halt_prob):
    return halt_prob * (1 - halt_prob).cumprod(0)


def unweighted(halt_prob):
    return halt_prob


def cumulative(halt_prob):
    return 1 - (1 - halt_prob).cumprod(0)


def scaled(halt_prob):
    share = forgets_the_rest(halt_prob)
    return share / share.sum(0)


def over_passes_softmax(halt_prob):
    return halt_prob.softmax(0)


def over_tokens(halt_prob):
    reached = torch.cat((torch.ones_like(halt_prob[:1]), (1 - halt_prob[:-1]).cumprod(-1)))
    return torch.cat(((halt_prob * reached)[:-1], reached[-1:]))


def all_in_the_dtype(halt_prob):
    reached = reach(halt_prob)
    return torch.cat(((halt_prob * reached)[:-1], reached[-1:]))


def unchecked(halt_prob):
    share = halt_prob.float() * reach(halt_prob.float())
    share[-1] = 1 - share[:-1].sum(0)
    return share.to(halt_prob.dtype)


def leaves_at(halt_prob, holds):
    last = torch.ones_like(holds[-1:])
    return torch.cat((holds[:-1], last)).int().argmax(0) + 1


def from_zero(halt_prob, threshold=0.99):
    return exit_pass(halt_prob, threshold) - 1


def added_up(halt_prob, threshold=0.99):
    return leaves_at(halt_prob, halt_prob.cumsum(0) >= threshold)


def one_at_a_time(halt_prob, threshold=0.99):
    return (halt_prob >= threshold).int().argmax(0) + 1


def room_left(halt_prob, threshold=0.99):
    return ((1 - halt_prob).cumprod(0) >= threshold).int().argmax(0) + 1


def never_is_first(halt_prob, threshold=0.99):
    return (1 - (1 - halt_prob).cumprod(0) >= threshold).int().argmax(0) + 1


def strictly_above(halt_prob, threshold=0.99):
    return leaves_at(halt_prob, 1 - (1 - halt_prob).cumprod(0) > threshold)


def floating(halt_prob, threshold=0.99):
    return exit_pass(halt_prob, threshold).float()


def exit_of(halt_prob, threshold):
    number, leaves = torch.arange(1, len(halt_prob) + 1).view(-1, 1), added_up(halt_prob, threshold)
    return number < leaves, number == leaves, torch.where(number < leaves, halt_prob, 0)


def leaves_at_once(halt_prob, threshold=0.99):
    """Where the threshold is never reached, argmax finds the first pass."""
    exit_pass = (halt_prob.cumsum(0) >= threshold).int().argmax(0)
    number = torch.arange(len(halt_prob)).view(-1, *[1] * (halt_prob.dim() - 1))
    paid = torch.where(number < exit_pass, halt_prob, 0)
    return torch.where(number == exit_pass, 1 - paid.sum(0), paid)


def no_remainder(halt_prob, threshold=0.99):
    before, at, _ = exit_of(halt_prob, threshold)
    return torch.where(before | at, halt_prob, 0)


def goes_on(halt_prob, threshold=0.99):
    _, at, paid = exit_of(halt_prob, threshold)
    return torch.where(at, 1 - paid.sum(0), halt_prob)


def late_remainder(halt_prob, threshold=0.99):
    _, at, paid = exit_of(halt_prob, threshold)
    return torch.where(at, (1 - halt_prob.cumsum(0)).clamp(min=0), paid)


def up_to_the_threshold(halt_prob, threshold=0.99):
    _, at, paid = exit_of(halt_prob, threshold)
    return torch.where(at, threshold - paid.sum(0), paid)


def last_pays_nothing(halt_prob, threshold=0.99):
    before, at, paid = exit_of(halt_prob, threshold)
    reached = at & (halt_prob.cumsum(0) >= threshold)
    return torch.where(reached, 1 - paid.sum(0), torch.where(before | at, halt_prob, 0))


def multiplied(halt_prob, threshold=0.99):
    return halting_distribution(halt_prob)


def divided(halt_prob, threshold=0.99):
    weights = no_remainder(halt_prob, threshold)
    return weights / weights.sum(0)


def prior_of(distribution, rate):
    cut = rate * (1 - rate) ** torch.arange(len(distribution)).view(-1, 1).to(distribution)
    return cut, cut / cut.sum(0)


def other_direction(distribution, prior_rate):
    prior = prior_of(distribution, prior_rate)[1]
    return (prior * (prior / distribution).log()).sum(0)


def not_scaled(distribution, prior_rate):
    return (distribution * (distribution / prior_of(distribution, prior_rate)[0]).log()).sum(0)


def rest_at_the_end(distribution, prior_rate):
    cut = prior_of(distribution, prior_rate)[0]
    prior = torch.cat((cut[:-1], 1 - cut[:-1].sum(0, keepdim=True)))
    return (distribution * (distribution / prior).log()).sum(0)


def cross_entropy(distribution, prior_rate):
    return -(distribution * prior_of(distribution, prior_rate)[1].log()).sum(0)


def negative(distribution, prior_rate):
    return -ponder_kl(distribution, prior_rate)


def mean_over_passes(distribution, prior_rate):
    return ponder_kl(distribution, prior_rate) / len(distribution)


def in_bits(distribution, prior_rate):
    return ponder_kl(distribution, prior_rate) / math.log(2)


def naive_logarithm(distribution, prior_rate):
    return (distribution * (distribution / prior_of(distribution, prior_rate)[1]).log()).sum(0)


def one_number(distribution, prior_rate):
    return ponder_kl(distribution, prior_rate).mean()


def test_a_choice_that_is_ruled_out_changes_no_exit():
    logits = torch.randn(1, 2, 5).expand(8, 2, 5).clone()
    logits[..., 3] = -math.inf
    assert converge(logits).exit_pass.tolist() == [2, 2]
    assert output_change(logits)[1:].abs().max() == 0


def writes_to_its_input(function):
    def changed(halt_prob, *threshold):
        result = function(halt_prob, *threshold)
        halt_prob[-1] = 1
        return result

    return changed


def in_its_dtype(halt_prob, threshold=0.99):
    if halt_prob.dtype == torch.float32:
        return exit_pass(halt_prob, threshold)
    acc, leaves = torch.zeros_like(halt_prob[0]), torch.full(halt_prob.shape[1:], len(halt_prob))
    for number, share in enumerate(halt_prob, 1):
        acc = acc + share * (1 - acc)
        leaves = torch.where((acc >= threshold) & (leaves == len(halt_prob)), number, leaves)
    return leaves


def one_or_the_last(halt_prob, threshold=0.99):
    exit_pass(halt_prob, threshold)  # refuses what it should
    holds = halt_prob >= threshold
    return torch.where(holds.any(0), holds.int().argmax(0) + 1, len(halt_prob))


def by_xlogy(distribution, prior_rate):
    ponder_kl(distribution.detach(), prior_rate)
    prior = prior_rate * (1 - prior_rate) ** torch.arange(len(distribution)).view(-1, *[1] * (distribution.dim() - 1))
    return (torch.xlogy(distribution, distribution) - distribution * (prior / prior.sum(0)).log()).sum(0)


def remainder_cut_off(halt_prob, threshold=0.99):
    weights = act_weights(halt_prob, threshold)
    return torch.where(weights == halt_prob, weights, weights.detach())


def shares_of_the_rest(halt_prob):
    halting_distribution(halt_prob)
    wide = halt_prob if halt_prob.dtype == torch.float64 else halt_prob.float()
    reached = torch.cat((torch.ones_like(wide[:1]), (1 - wide[:-1]).cumprod(0)))
    shares = (wide * reached)[:-1]
    return torch.cat((shares, 1 - shares.sum(0, keepdim=True))).to(halt_prob.dtype)


def divides_out(halt_prob):
    halting_distribution(halt_prob)
    wide = halt_prob if halt_prob.dtype == torch.float64 else halt_prob.float()
    reached = (1 - wide).cumprod(0) / (1 - wide)
    return torch.cat(((wide * reached)[:-1], reached[-1:])).to(halt_prob.dtype)


def last_set_to_one(halt_prob, threshold=0.99):
    exit_pass(halt_prob, threshold)
    halt_prob[-1] = 1
    return exit_pass(halt_prob, threshold)


def of_two_dimensions(halt_prob, threshold=0.99):
    exit_pass(halt_prob, threshold)
    return torch.tensor([exit_pass(halt_prob[:, token], threshold) for token in range(halt_prob.shape[1])])


def wraps_around(halt_prob, threshold=0.99):
    weights = act_weights(halt_prob, threshold)
    first = halt_prob[0] >= threshold
    return torch.where(first & (torch.arange(len(halt_prob)) == 0).view(-1, *[1] * (halt_prob.dim() - 1)), 1 - halt_prob.sum(0), weights)


MISTAKES = [
    ("halting_distribution", shares_of_the_rest, "none may be negative"),
    ("halting_distribution", divides_out, "do not divide by 1 − halt_prob"),
    ("halting_distribution", lambda halt_prob: halting_distribution(halt_prob.float()).to(halt_prob.dtype), "leave float64 as it is"),
    ("exit_pass", last_set_to_one, "halt_prob has changed"),
    ("exit_pass", of_two_dimensions, "passes lie on dimension 0"),
    ("exit_pass", lambda halt_prob, threshold=0.99: exit_pass(halt_prob, 0.99 if threshold == 1 else threshold), "A threshold of 1 is reached"),
    ("act_weights", wraps_around, "its remainder is one"),
    ("ponder_kl", edited("halting", "ponder_kl", ("torch.finfo(wide.dtype).tiny", "1e-2")), "the result is wrong"),
    ("ponder_kl", edited("halting", "ponder_kl", (".sum(0).flatten()", ".sum(0).mean().view(1)")), "each token's own sum"),
    ("halting_distribution", writes_to_its_input(halting_distribution), "halt_prob has changed"),
    ("act_weights", writes_to_its_input(act_weights), "halt_prob has changed"),
    ("halting_distribution", edited("halting", "halting_distribution", ("(1 - wide).cumprod(0)", "(1 - wide).log().cumsum(0).exp()")), "gradient is nan"),
    ("act_weights", lambda halt_prob, threshold=0.99: act_weights(halt_prob), "do not use the threshold"),
    ("halting_distribution", forgets_the_rest, "last pass must take all that is left"),
    ("halting_distribution", counts_itself, "count the pass itself"),
    ("halting_distribution", unweighted, "return the halting probabilities"),
    ("halting_distribution", cumulative, "to have stopped by then"),
    ("halting_distribution", reach, "each pass is reached"),
    ("halting_distribution", scaled, "scale the shares"),
    ("halting_distribution", over_passes_softmax, "softmax"),
    ("halting_distribution", over_tokens, "over the tokens"),
    ("halting_distribution", all_in_the_dtype, "in float32, and round once"),
    ("halting_distribution", unchecked, "raise a ValueError"),
    ("exit_pass", from_zero, "count from 0"),
    ("exit_pass", added_up, "add the halting probabilities up"),
    ("exit_pass", one_at_a_time, "one pass at a time"),
    ("exit_pass", room_left, "room that is left"),
    ("exit_pass", never_is_first, "after the last pass, 6, and here after 1"),
    ("exit_pass", strictly_above, "means ≥"),
    ("exit_pass", floating, "is an int64"),
    ("act_weights", no_remainder, "exit counts what it asks for"),
    ("act_weights", goes_on, "Passes after the exit"),
    ("act_weights", late_remainder, "before the exit"),
    ("act_weights", up_to_the_threshold, "up to the threshold"),
    ("act_weights", last_pays_nothing, "never reaches the threshold"),
    ("act_weights", leaves_at_once, "argmax is 0"),
    ("act_weights", multiplied, "halting distribution"),
    ("act_weights", divided, "scale the weights"),
    ("act_weights", lambda halt_prob, threshold=0.99: act_weights(halt_prob, threshold).float(), "hand back the dtype"),
    ("exit_pass", in_its_dtype, "accumulate in float32"),
    ("exit_pass", one_or_the_last, "or take the last"),
    ("ponder_kl", by_xlogy, "its gradient at a share of 0"),
    ("act_weights", remainder_cut_off, "cannot be learned from"),
    ("halting_distribution", lambda halt_prob: halting_distribution(halt_prob.detach()), "cannot be learned from"),
    ("ponder_kl", lambda distribution, rate: ponder_kl(distribution.detach(), rate), "cannot be learned from"),
    ("ponder_kl", other_direction, "KL(prior ‖ distribution)"),
    ("ponder_kl", not_scaled, "prior is not scaled"),
    ("ponder_kl", rest_at_the_end, "takes all the rest"),
    ("ponder_kl", cross_entropy, "cross-entropy"),
    ("ponder_kl", negative, "sign is turned"),
    ("ponder_kl", mean_over_passes, "mean over the passes"),
    ("ponder_kl", in_bits, "in bits"),
    ("ponder_kl", naive_logarithm, "keep the logarithm finite"),
    ("ponder_kl", one_number, "should have the shape (4,)"),
]

test_check_names_the_cause, test_check_accepts_the_finished_code = mistakes_are_named(
    MISTAKES, [halting_distribution, exit_pass, act_weights, ponder_kl]
)
