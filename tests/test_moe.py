"""mythoslab.moe: the router, three ways to run experts, balance, and the checks of the notebook that builds them."""

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from mythoslab.mla import ONE_DNN, learns_by_one_dnn
from mythoslab.moe import (
    FeedForward,
    MixtureOfExperts,
    Routing,
    balance_bias,
    few_pairs,
    gather_experts,
    grouped_product,
    loop_over_experts,
    route,
    sequence_balance_loss,
    sort_and_group,
)
from mythoslab.recurrence import SwiGLU
from tests.mistakes import mistakes_are_named

WAYS = [loop_over_experts, sort_and_group, gather_experts]
seeds = st.integers(0, 999)


def experts(seed=0, **options):
    torch.manual_seed(seed)
    sizes = dict(n_routed_experts=6, n_experts_per_token=2, n_shared_experts=1)
    return MixtureOfExperts(8, 5, **{**sizes, **options})


@given(seed=seeds, n_experts=st.integers(1, 12), data=st.data())
def test_the_bias_chooses_and_never_weighs(seed, n_experts, data):
    n_chosen = data.draw(st.integers(1, n_experts))
    torch.manual_seed(seed)
    logits, bias = torch.randn(20, n_experts), torch.randn(n_experts)
    routing = route(logits, bias, n_chosen)
    for token in range(20):
        chosen = routing.experts[token].tolist()
        assert len(set(chosen)) == n_chosen
        choice = logits[token].sigmoid() + bias
        assert min(choice[chosen]) >= max([c for e, c in enumerate(choice) if e not in chosen], default=torch.tensor(-torch.inf))
        scores = logits[token].sigmoid()[chosen]
        assert torch.allclose(routing.weights[token], scores / scores.sum())


@given(seed=seeds, scoring_func=st.sampled_from(["sigmoid", "softmax"]), topk_group=st.integers(1, 3))
def test_a_token_uses_its_best_groups_only(seed, scoring_func, topk_group):
    torch.manual_seed(seed)
    logits, bias = torch.randn(20, 12), 0.2 * torch.randn(12)
    routing = route(logits, bias, 3, scoring_func=scoring_func, n_group=4, topk_group=topk_group)
    scores = logits.sigmoid() if scoring_func == "sigmoid" else logits.softmax(-1)
    for token in range(20):
        groups = (scores[token] + bias).view(4, 3)
        by_best = groups.sort(descending=True).values[:, : 2 if scoring_func == "sigmoid" else 1].sum(-1)
        allowed = by_best.topk(topk_group).indices.tolist()
        assert {expert // 3 for expert in routing.experts[token].tolist()} <= set(allowed)


@given(
    seed=seeds,
    n_tokens=st.integers(1, 30),
    n_experts=st.integers(1, 9),
    dim=st.integers(1, 9),
    expert_dim=st.integers(1, 9),
    skew=st.floats(0.0, 9.0),
    data=st.data(),
)
def test_three_ways_one_result_however_uneven_the_load(seed, n_tokens, n_experts, dim, expert_dim, skew, data):
    n_chosen = data.draw(st.integers(1, n_experts))
    torch.manual_seed(seed)
    x, gate_up, down = torch.randn(n_tokens, dim), torch.randn(n_experts, 2 * expert_dim, dim), torch.randn(n_experts, dim, expert_dim)
    routing = route(torch.randn(n_tokens, n_experts), skew * torch.randn(n_experts), n_chosen)
    results = [way(x, routing, gate_up, down) for way in WAYS]
    for result in results[1:]:
        assert torch.allclose(result, results[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_gradients_are_right(way):
    torch.manual_seed(0)
    x, gate_up, down = (torch.randn(*shape, dtype=torch.float64) for shape in ((4, 3), (3, 4, 3), (3, 3, 2)))
    logits, bias = torch.randn(4, 3, dtype=torch.float64), torch.zeros(3)

    def forward(x, logits, gate_up, down):
        return way(x, route(logits, bias, 2), gate_up, down)

    inputs = [part.requires_grad_() for part in (x, logits, gate_up, down)]
    assert torch.autograd.gradcheck(forward, inputs)


def test_the_grouped_product_has_the_gradients_of_the_loop():
    torch.manual_seed(0)
    parts = [torch.randn(*shape) for shape in ((30, 8), (30, 6), (6, 8, 8), (6, 8, 4))]
    inputs = [[part.clone().requires_grad_() for part in parts] for _ in range(2)]
    for (x, logits, gate_up, down), run in zip(inputs, (sort_and_group, loop_over_experts)):
        run(x, route(logits, torch.tensor([9.0, 0, 0, 0, 0, -9.0]), 2), gate_up, down).square().sum().backward()
    for one, other in zip(*inputs):
        assert torch.allclose(one.grad, other.grad, atol=1e-4)


@pytest.mark.parametrize("one_dnn", [True, False])
@pytest.mark.parametrize("loads", [[200, 0, 5, 0], [0, 0, 0, 130], [130, 1, 0, 0], [31, 33, 32, 47], [40, 40, 40, 8]], ids=str)
def test_grouped_products_are_products_of_each_group_in_training(loads, one_dnn, monkeypatch):
    monkeypatch.setattr("mythoslab.mla.BY_ONE_DNN", one_dnn and ONE_DNN is not None)
    torch.manual_seed(0)
    rows, weights = torch.randn(sum(loads), 8, requires_grad=True), torch.randn(4, 12, 8, requires_grad=True)
    ends = torch.tensor(loads).cumsum(0).int()
    got = grouped_product(rows, weights, ends)
    assert ("OneDNN" in type(got.grad_fn).__name__) == learns_by_one_dnn(rows, weights)
    exact = torch.cat([part @ weight.mT for part, weight in zip(rows.double().split(loads), weights.double().unbind())])
    weigh = torch.randn_like(exact)
    assert torch.allclose(got.double(), exact, atol=1e-5)
    for own, theirs in zip(*(torch.autograd.grad((out * weigh).sum(), (rows, weights)) for out in (got, exact))):
        assert torch.allclose(own, theirs, atol=1e-4, rtol=1e-5)


@given(seed=seeds)
def test_a_token_does_not_depend_on_the_rest_of_the_batch(seed):
    part = experts(seed).eval()
    x = torch.randn(3, 7, 8)
    together = part(x)
    assert torch.allclose(part(x[1:2]), together[1:2], atol=1e-5)
    assert torch.allclose(part(x[:, 3:4]), together[:, 3:4], atol=1e-5)


@pytest.mark.parametrize("n_experts, most", [(8, 2), (64, 4)])  # tokens, with two experts each
def test_both_ways_are_taken_by_the_rule_and_agree(monkeypatch, n_experts, most):
    taken = []
    for way in (sort_and_group, gather_experts):
        monkeypatch.setattr(f"mythoslab.moe.{way.__name__}", lambda *inputs, way=way: taken.append(way) or way(*inputs))
    part = experts(n_routed_experts=n_experts, n_experts_per_token=2).eval()
    assert few_pairs(n_experts) == 2 * most
    x = torch.randn(1, most + 1, 8)
    longer, shorter = part(x), part(x[:, :most])
    assert taken == [sort_and_group, gather_experts]
    assert torch.allclose(longer[:, :most], shorter, atol=1e-5)


def test_shared_experts_serve_every_token():
    part = experts().eval()
    x = torch.randn(2, 4, 8)
    with_them, shared = part(x), part.shared(x)
    part.shared = None
    assert torch.allclose(with_them, part(x) + shared, atol=1e-6)
    assert experts(n_shared_experts=0).shared is None
    assert experts(n_shared_experts=3).shared.gate.weight.shape == (15, 8)


def test_what_is_hung_on_a_shared_expert_has_its_effect():
    part, x, called = experts(), torch.randn(2, 3, 8), []
    before = part(x)
    part.shared.up.register_forward_hook(lambda layer, inputs, output: called.append(1) or 2 * output)
    assert not torch.allclose(part(x), before) and called


def test_no_tokens_are_no_answers():
    for n_experts in (6, 64):
        part = experts(n_routed_experts=n_experts, sequence_balance=0.1)
        assert part(torch.zeros(0, 5, 8)).shape == (0, 5, 8) and part(torch.zeros(2, 0, 8)).shape == (2, 0, 8)
        assert part.balance_loss == 0.0 and part.load.sum() == 0
        for way in WAYS:
            assert way(torch.zeros(0, 8), part.route(torch.zeros(0, 8)), part.gate_up, part.down).shape == (0, 8)


def test_a_copy_between_a_step_and_the_update_is_no_part_of_the_graph():
    part = experts(sequence_balance=0.1)
    part(torch.randn(2, 5, 8))
    again = copy.deepcopy(part)
    assert again.balance_loss == 0.0 and part.balance_loss.requires_grad
    assert torch.equal(again.load, part.load) and again.load.sum() == 20
    assert torch.equal(again.gate_up, part.gate_up)


def test_load_is_counted_by_pass_in_training_only():
    part = experts(n_passes=3)
    x = torch.randn(2, 4, 8)
    for pass_index in (0, 1, 2, 3):  # pass 3 counts with the last
        part(x, pass_index)
    assert part.load_by_pass.sum(1).tolist() == [16, 16, 32]
    assert part.load.sum() == 64
    counted = F.one_hot(part.route(x.flatten(0, 1)).experts, 6).sum((0, 1))
    assert torch.equal(part.load_by_pass[0], counted)
    part.eval()(x)
    assert part.load.sum() == 64


def test_load_counts_past_what_half_precision_can():
    part = experts(n_routed_experts=1, n_experts_per_token=1).bfloat16()
    part(torch.randn(1, 700, 8, dtype=torch.bfloat16))
    part(torch.randn(1, 1, 8, dtype=torch.bfloat16))
    assert part.load.tolist() == [701]


def whole_sized(**options):
    torch.manual_seed(0)
    return MixtureOfExperts(32, 16, n_routed_experts=4, n_experts_per_token=2, **options)


def test_the_bias_stays_in_float32_when_all_else_is_rounded():
    part = experts()
    part.bias.copy_(torch.linspace(4.0, 4.02, 6))
    exact = part.bias.clone()
    for change in ("bfloat16", "half", "float"):
        part = getattr(part, change)()
        assert torch.equal(part.bias, exact) and part.down.dtype == getattr(torch, change)
    part.load_by_pass[0, 0] = 9
    before = part.bfloat16().bias.clone()
    part.update_bias(0.001)
    assert (part.bias[1:] > before[1:]).all() and part.bias[0] < before[0]
    assert part.double().bias.dtype == torch.float64


def test_autocast_routes_as_without_it_and_runs():
    part, x = whole_sized(), torch.randn(4, 50, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(part.route(x).weights, part.route(x.clone()).weights) and part.route(x).weights.dtype == torch.float32
        inside, mixed = part.route(x), part(x.bfloat16())
    outside = part.route(x)
    assert torch.equal(inside.experts, outside.experts) and torch.equal(inside.weights, outside.weights)
    assert torch.allclose(mixed.float(), part(x.bfloat16().float()), atol=0.05)


def test_the_sequence_loss_is_there_in_training_when_asked_for():
    part, x = experts(sequence_balance=0.1), torch.randn(2, 4, 8)
    part(x, 0)
    part(x, 1)
    assert part.balance_loss.item() == pytest.approx(2 * 0.1 * sequence_balance_loss(part.route(x)).item())
    part.balance_loss.backward()
    assert part.router.weight.grad.any() and part.gate_up.grad is None
    part.update_bias(0.01)
    assert part.balance_loss == 0.0
    part.eval()(x)
    assert part.balance_loss == 0.0
    plain = experts()
    plain(x)
    assert plain.balance_loss == 0.0


def test_updating_the_bias_levels_the_load():
    part = experts(n_shared_experts=0)
    with torch.no_grad():
        part.router.weight[0] += 0.5  # a favourite
    x = 1 + torch.randn(8, 32, 8)
    violations = []
    for _ in range(150):
        part(x)
        violations.append((part.load.max() / part.load.mean() - 1).item())
        part.update_bias(0.01)
        assert not part.load.any()
    assert violations[0] > 0.5 and violations[-1] < violations[0] / 3
    assert part.bias[0] == part.bias.min()


def test_the_bias_gets_no_gradient_and_is_saved():
    part = experts()
    part.update_bias(0.5)
    assert "bias" in part.state_dict() and "load_by_pass" not in part.state_dict()
    assert "bias" not in dict(part.named_parameters())
    part(torch.randn(2, 4, 8)).sum().backward()
    assert part.router.weight.grad.any() and part.gate_up.grad.any() and part.down.grad.any()


@given(seed=seeds, n_experts=st.integers(2, 8), data=st.data())
def test_sequence_loss_is_one_when_level_and_that_of_a_plain_computation(seed, n_experts, data):
    n_chosen = data.draw(st.integers(1, n_experts))
    torch.manual_seed(seed)
    routing = route(torch.randn(2, 6, n_experts), torch.zeros(n_experts), n_chosen)
    total = 0.0
    for sequence in range(2):
        for expert in range(n_experts):
            load = sum(expert in chosen for chosen in routing.experts[sequence].tolist()) * n_experts / (n_chosen * 6)
            share = sum(scores[expert] / sum(scores) for scores in routing.scores[sequence].tolist()) / 6
            total += load * share / 2
    assert sequence_balance_loss(routing).item() == pytest.approx(total, rel=1e-4)
    level = Routing(torch.arange(n_experts).view(1, n_experts, 1), torch.ones(1, n_experts, 1), torch.ones(1, n_experts, n_experts))
    assert sequence_balance_loss(level).item() == pytest.approx(1.0)


BAD = [
    (dict(n_experts_per_token=7), "n_experts_per_token is 7; it must be from 1 to 6, the experts in reach"),
    (dict(n_experts_per_token=0), "n_experts_per_token is 0"),
    (dict(n_group=4), "n_group is 4; it must be a divisor of the number of experts, 6"),
    (dict(n_group=3, topk_group=4), "topk_group is 4; it must be from 1 to n_group, 3"),
    (dict(n_group=3, topk_group=1, n_experts_per_token=3), "n_experts_per_token is 3; it must be from 1 to 2"),
    (dict(scoring_func="tanh"), "scoring_func is 'tanh'; it must be 'sigmoid' or 'softmax'"),
    (dict(n_routed_experts=0), "n_routed_experts is 0; it must be at least 1"),
    (dict(n_shared_experts=-1), "n_shared_experts is -1; it must be at least 0"),
    (dict(n_passes=0), "n_passes is 0; it must be at least 1"),
    (dict(sequence_balance=-1.0), "sequence_balance is -1.0; it must be at least 0"),
]


@pytest.mark.parametrize("options, sentence", BAD, ids=[sentence.partition(";")[0] for _, sentence in BAD])
def test_bad_sizes_are_named(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        experts(**options)


def test_other_bad_input_is_named():
    with pytest.raises(ValueError, match="pass_index is -1; it must be at least 0"):
        experts()(torch.zeros(1, 1, 8), -1)
    with pytest.raises(ValueError, match="the last size of x is 7; it must be dim, 8"):
        experts()(torch.zeros(1, 1, 7))
    with pytest.raises(ValueError, match="the dtype and device of x is .*float64"):
        experts()(torch.zeros(1, 1, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match="rate is -1; it must be at least 0"):
        balance_bias(torch.zeros(2), torch.zeros(2), -1)
    logits, bias = torch.zeros(3, 6), torch.zeros(6)
    with pytest.raises(ValueError, match="scoring_func is 'Sigmoid'; it must be 'sigmoid' or 'softmax'"):
        route(logits, bias, 2, scoring_func="Sigmoid")
    with pytest.raises(ValueError, match="n_group is 4; it must be a divisor of the number of experts, 6"):
        route(logits, bias, 2, n_group=4)
    with pytest.raises(ValueError, match="n_experts_per_token is 3; it must be from 1 to 2, the experts in reach"):
        route(logits, bias, 3, n_group=3, topk_group=1)


@pytest.mark.parametrize("n_tokens", [1, 4000])
def test_it_runs_on_fake_cuda_without_mixing_devices(n_tokens):
    with torch.device("meta"):
        part = MixtureOfExperts(8, 8, n_routed_experts=8, n_experts_per_token=2, n_group=4, topk_group=2)
    part.eval()
    with FakeTensorMode():
        state = {**dict(part.named_parameters()), **dict(part.named_buffers())}
        on_cuda = {name: torch.empty(weight.shape, dtype=torch.bfloat16 if name != "bias" else None, device="cuda") for name, weight in state.items()}
        x = torch.empty(1, n_tokens, 8, dtype=torch.bfloat16, device="cuda")
        out = torch.func.functional_call(part, on_cuda, (x,))
    assert out.device.type == "cuda" and out.shape == x.shape


# Mistakes that learners make, and a word of the sentence that names each.


def changed(change):
    def wrong(logits, bias, n_experts_per_token, **options):
        return change(logits, bias, n_experts_per_token, options, route(logits, bias, n_experts_per_token, **options))

    return wrong


def again(routing, bias, experts=None, weights=None):
    experts = routing.experts if experts is None else experts
    weights = routing.scores.gather(-1, experts) if weights is None else weights
    return Routing(experts, weights / weights.sum(-1, keepdim=True), routing.scores)


def closed_by_zero(logits, bias, n_chosen, options):
    if "n_group" not in options:
        return route(logits, bias, n_chosen, **options)
    n_group, topk_group = options["n_group"], options["topk_group"]
    choice = (logits.sigmoid() + bias).unflatten(-1, (n_group, -1))
    best = choice.topk(2, -1).values.sum(-1).topk(topk_group, -1).indices
    opened = torch.zeros(choice.shape[:-1]).scatter(-1, best, 1.0).unsqueeze(-1)
    chosen = (choice * opened).flatten(-2).topk(n_chosen, -1).indices
    return again(Routing(None, None, logits.sigmoid()), bias, experts=chosen)


def test_the_feed_forward_part_is_the_swiglu_of_notebook_02():
    plain, ours = SwiGLU(16, 24), FeedForward(16, 24)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(3, 5, 16)
    assert torch.allclose(plain(x), ours(x), atol=1e-6)


def test_what_experts_cannot_be_given_is_named():
    experts = MixtureOfExperts(16, 8, n_routed_experts=4, n_experts_per_token=2)
    with pytest.raises(ValueError, match=r"the shape of x is \(5, 16\)"):
        inspect.unwrap(MixtureOfExperts.forward)(experts, torch.randn(5, 16))
    with pytest.raises(ValueError, match="n_group is 0"):
        route(torch.randn(3, 4), torch.zeros(4), 1, n_group=0)


def best_two_of_softmax(logits, bias, n_chosen, options):
    """Groups count by their two best also where scores are a softmax."""
    if options.get("scoring_func") != "softmax" or "n_group" not in options:
        return route(logits, bias, n_chosen, **options)
    scores = logits.softmax(-1)
    groups = (scores + bias).unflatten(-1, (options["n_group"], -1))
    best = groups.topk(2, -1).values.sum(-1).topk(options["topk_group"], -1).indices
    opened = torch.zeros(groups.shape[:-1]).scatter(-1, best, 1.0).bool().unsqueeze(-1)
    chosen = groups.masked_fill(~opened, -torch.inf).flatten(-2).topk(n_chosen, -1).indices
    return Routing(chosen, scores.gather(-1, chosen), scores)


def count_of_group(logits, bias, n_chosen, options, count):
    """Groups with sigmoid scores count by this."""
    if options.get("scoring_func") == "softmax" or "n_group" not in options:
        return route(logits, bias, n_chosen, **options)
    route(logits, bias, n_chosen, **options)  # for what it refuses
    groups = (logits.sigmoid() + bias).unflatten(-1, (options["n_group"], -1))
    best = count(groups).topk(options["topk_group"], -1).indices
    opened = torch.zeros(groups.shape[:-1]).scatter(-1, best, 1.0).bool().unsqueeze(-1)
    chosen = groups.masked_fill(~opened, -torch.inf).flatten(-2).topk(n_chosen, -1).indices
    return again(Routing(None, None, logits.sigmoid()), bias, experts=chosen)


def over_dimension_one(logits, routing):
    if logits.dim() < 2:
        raise IndexError("Dimension out of range (expected to be in range of [-1, 0], but got 1)")
    return routing


def beyond_reach(logits, bias, n_experts_per_token, **options):
    """Experts of closed groups, too, where the open ones have too few."""
    try:
        return route(logits, bias, n_experts_per_token, **options)
    except ValueError as error:
        if "n_group" not in options or "experts in reach" not in str(error):
            raise
        return route(logits, bias, n_experts_per_token)


ROUTERS = {
    "only the two best count": lambda l, b, k, o, r: count_of_group(l, b, k, o, lambda groups: groups.sum(-1)),
    "no two to add": lambda l, b, k, o, r: count_of_group(l, b, k, o, lambda groups: groups.topk(2, -1).values.sum(-1)),
    "scales softmax scores, too": lambda l, b, k, o, r: r._replace(weights=r.scores.gather(-1, r.experts)) if o.get("scoring_func") == "softmax" else r,
    "use −1, not 1": lambda l, b, k, o, r: over_dimension_one(l, r),
    "in the weights": lambda l, b, k, o, r: again(r, b, weights=(r.scores + b).gather(-1, r.experts)),
    "left out of the choice": lambda l, b, k, o, r: route(l, torch.zeros_like(b), k, **o),
    "not scaled": lambda l, b, k, o, r: r._replace(weights=r.scores.gather(-1, r.experts)),
    "scores of all experts": lambda l, b, k, o, r: r._replace(weights=r.scores.gather(-1, r.experts) / r.scores.sum(-1, keepdim=True)),
    "is subtracted": lambda l, b, k, o, r: route(l, -b, k, **o),
    "softmax of the chosen": lambda l, b, k, o, r: r._replace(weights=r.scores.gather(-1, r.experts).softmax(-1)),
    "these are a softmax": lambda l, b, k, o, r: route(l, b, k, **{**o, "scoring_func": "softmax"}),
    "have the bias in them": lambda l, b, k, o, r: r._replace(scores=r.scores + b),
    "has no effect": lambda l, b, k, o, r: route(l, b, k, **{**o, "routed_scaling_factor": 1.0}),
    "which is more than a negative choice": lambda l, b, k, o, r: closed_by_zero(l, b, k, o),
    "cut off from the logits": lambda l, b, k, o, r: r._replace(scores=r.scores.detach()),
    "router cannot learn": lambda l, b, k, o, r: r._replace(weights=r.weights.detach()),
    "single best expert, score plus bias": lambda l, b, k, o, r: best_two_of_softmax(l, b, k, o),
    "groups are left out": lambda l, b, k, o, r: route(l, b, k, **{**o, "n_group": 1, "topk_group": 1}),
}


def sorted_wrongly(*, weigh=True, weights_in_order=False, swapped=False, silu=True, put_back=None):
    def wrong(x, routing, gate_up, down):
        n_choices, pairs = routing.experts.shape[1], routing.experts.flatten()
        order = pairs.argsort(stable=True)
        gate, up = torch.einsum("pod,pd->po", gate_up[pairs], x.repeat_interleave(n_choices, 0)).chunk(2, -1)
        gate, up = (up, gate) if swapped else (gate, up)
        answers = torch.einsum("pdo,po->pd", down[pairs], (F.silu(gate) if silu else gate) * up)
        if put_back is not None:
            answers = put_back(answers[order], order)
        answers = answers.view(len(x), n_choices, -1)
        weights = routing.weights if weigh else torch.ones_like(routing.weights)
        if weights_in_order:
            weights = weights.flatten()[order].view(weights.shape)
        return (weights.unsqueeze(1) @ answers).squeeze(1)

    return wrong


def weights_sorted_too(x, routing, gate_up, down):
    """Answers and weights both stay in the order of the experts."""
    order = routing.experts.flatten().argsort(stable=True)
    in_order = routing._replace(weights=routing.weights.flatten()[order].view(routing.weights.shape))
    return sorted_wrongly(put_back=lambda answers, order: answers)(x, in_order, gate_up, down)


def not_learned(x, routing, gate_up, down):
    return inspect.unwrap(sort_and_group)(x, routing, gate_up.detach(), down)


def two_choices(x, routing, gate_up, down):
    few = routing._replace(experts=routing.experts[:, :2], weights=routing.weights[:, :2])
    return inspect.unwrap(sort_and_group)(x, few, gate_up, down)


def in_float32(x, routing, gate_up, down):
    return inspect.unwrap(sort_and_group)(x.float(), routing, gate_up.float(), down.float())


BIASES = {
    "sign is turned": lambda bias, load, rate: 2 * bias - balance_bias(bias, load, rate),
    "grows with the load": lambda bias, load, rate: bias + rate * (load.mean() - load),
    "relative load": lambda bias, load, rate: bias + rate * (1 - load / load.mean()),
    "old bias is lost": lambda bias, load, rate: balance_bias(torch.zeros_like(bias), load, rate),
    "has changed": lambda bias, load, rate: bias.copy_(balance_bias(bias, load, rate)),
    "rate is left out": lambda bias, load, rate: balance_bias(bias, load, 1.0),
    "negative rate": lambda bias, load, rate: bias + rate * (load.mean() - load).sign(),
}


def loss_with(*, over=1, relative=True, scaled=True, mean_first=True, total=True):
    def wrong(routing):
        chosen = torch.zeros_like(routing.scores).scatter(-1, routing.experts, 1.0)
        share = routing.scores / routing.scores.sum(-1, keepdim=True) if scaled else routing.scores
        factor = share.shape[-1] / routing.experts.shape[-1] if relative else 1.0
        if not mean_first:
            return (chosen * factor * share).sum(-1).mean()
        product = chosen.mean(over) * factor * share.mean(over)
        return (product.sum(-1) if total else product).mean()

    return wrong


def counts_the_best(routing):
    best = routing.scores.topk(routing.experts.shape[-1], -1).indices
    return inspect.unwrap(sequence_balance_loss)(routing._replace(experts=best))


def cut_off_sum(routing):
    chosen = torch.zeros_like(routing.scores).scatter(-1, routing.experts, 1.0)
    share = routing.scores / routing.scores.sum(-1, keepdim=True).detach()
    return (chosen.mean(1) * share.shape[-1] / routing.experts.shape[-1] * share.mean(1)).sum(-1).mean()


MISTAKES = [
    *(("route", changed(change), cause) for cause, change in ROUTERS.items()),
    ("sort_and_group", sorted_wrongly(weigh=False), "weights are left out"),
    ("sort_and_group", sorted_wrongly(weights_in_order=True), "follow the sorted order"),
    ("sort_and_group", sorted_wrongly(swapped=True), "changed places"),
    ("sort_and_group", sorted_wrongly(silu=False), "SiLU is left out"),
    ("sort_and_group", sorted_wrongly(put_back=lambda answers, order: answers), "they lie in that of the experts"),
    ("sort_and_group", sorted_wrongly(put_back=lambda answers, order: answers[order]), "sorted once more"),
    ("sort_and_group", weights_sorted_too, "not put back"),
    ("sort_and_group", lambda *arguments: inspect.unwrap(loop_over_experts)(*arguments), "each expert or pair must have its own"),
    ("sort_and_group", not_learned, "gradient does not reach"),
    ("sort_and_group", two_choices, "Three experts for a token"),
    ("sort_and_group", in_float32, "answer in bfloat16"),
    ("route", beyond_reach, "no more are in reach"),
    ("sort_and_group", lambda x, *others: inspect.unwrap(sort_and_group)(x.detach(), *others), "come back to the tokens"),
    *(("balance_bias", lambda bias, load, rate, f=f: f(bias, load, rate), cause) for cause, f in BIASES.items()),
    ("balance_bias", lambda bias, load, rate: balance_bias(bias, load, rate) if rate else bias + 1, "rate of 0"),
    ("sequence_balance_loss", counts_the_best, "count the best by score"),
    ("sequence_balance_loss", cut_off_sum, "through the sum"),
    ("sequence_balance_loss", loss_with(over=(0, 1)), "over the whole batch"),
    ("sequence_balance_loss", loss_with(relative=False), "not relative"),
    ("sequence_balance_loss", loss_with(scaled=False), "scores are not scaled"),
    ("sequence_balance_loss", loss_with(mean_first=False), "for each token before the mean"),
    ("sequence_balance_loss", loss_with(total=False), "mean over the experts"),
]

# The checks hand over the reference's own Routing, which the shape checks of these tests take for another class.
PARTS = [route, inspect.unwrap(sort_and_group), balance_bias, inspect.unwrap(sequence_balance_loss)]
test_check_names_the_cause, test_check_accepts_the_finished_code = mistakes_are_named(MISTAKES, PARTS)
