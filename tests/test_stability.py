"""mythoslab.stability: the spectral radius, the injection that stays inside the unit circle, and their checks."""

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mythoslab.classroom.checks import check
from mythoslab.recurrence import Block
from mythoslab.stability import (
    LTIInjection,
    inject_beside_block,
    inject_then_block,
    spectral_radius,
)
from tests.mistakes import edited, mistakes_are_named

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
seeds = st.integers(0, 999)


def numbers(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(seed=seeds, dim=st.integers(1, 6))
def test_radius_is_that_of_the_largest_eigenvalue_put_in(seed, dim):
    eigenvalues = numbers(seed, dim)
    basis = torch.linalg.qr(numbers(seed + 1, dim, dim))[0]
    matrix = basis @ torch.diag(eigenvalues) @ basis.T
    assert torch.allclose(spectral_radius(matrix), eigenvalues.abs().max())
    assert torch.allclose(spectral_radius(eigenvalues), spectral_radius(torch.diag(eigenvalues)))


@given(seed=seeds, scale=st.floats(0.0, 10.0))
def test_radius_grows_with_the_matrix_and_bounds_its_powers(seed, scale):
    matrix = numbers(seed, 4, 4)
    radius = spectral_radius(matrix)
    assert torch.allclose(spectral_radius(scale * matrix), scale * radius)
    inside = 0.9 * matrix / radius
    assert torch.linalg.matrix_power(inside, 2000).abs().max() < 1e-6


def test_radius_of_a_rotation_is_one_and_of_a_batch_one_each():
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    assert torch.allclose(spectral_radius(torch.stack((turn, 2 * turn, torch.zeros(2, 2)))), torch.tensor([1.0, 2.0, 0.0]))
    assert spectral_radius(turn.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("matrix", [torch.zeros(2, 3), torch.tensor(1.0), torch.zeros(0, 0), torch.zeros(0)])
def test_radius_refuses_what_is_not_square(matrix):
    with pytest.raises(ValueError, match=r"matrix must be square or a diagonal, got the shape \("):
        spectral_radius(matrix)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_radius_refuses_numbers_that_are_not_finite(value):
    with pytest.raises(ValueError, match="matrix must be finite"):
        spectral_radius(torch.full((2, 2), value))


@given(value=st.floats(-1e4, 1e4), dtype=st.sampled_from(DTYPES))
def test_decay_stays_inside_zero_and_one_for_any_parameters(value, dtype):
    injection = LTIInjection(3).to(dtype)
    nn.init.constant_(injection.log_rate, value)
    decay = injection.decay()
    assert decay.dtype == dtype and bool(((decay > 0) & (decay < 1)).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [-math.inf, -1e4, 1e4, math.inf])
def test_decay_stays_inside_at_the_ends(value, dtype):
    injection = LTIInjection(3).to(dtype)
    nn.init.constant_(injection.log_rate, value)
    decay = injection.decay()
    assert bool(((decay > 0) & (decay < 1)).all())
    decay.sum().backward()
    assert injection.log_rate.grad.isfinite().all()


@given(seed=seeds, rate=st.floats(0.01, 5.0))
def test_one_pass_is_the_exact_solution_of_the_leaky_equation(seed, rate):
    injection = LTIInjection(2).double()
    nn.init.constant_(injection.log_rate, math.log(rate))
    state, inputs = numbers(seed, 2, 2)
    target = injection.inputs(inputs)
    expected, n_steps = state, 200
    for _ in range(n_steps):  # the classical Runge–Kutta method, in steps of 1 / n_steps
        slope = lambda s: -rate * (s - target)  # noqa: E731
        first = slope(expected)
        second = slope(expected + first / n_steps / 2)
        third = slope(expected + second / n_steps / 2)
        fourth = slope(expected + third / n_steps)
        expected = expected + (first + 2 * second + 2 * third + fourth) / 6 / n_steps
    assert torch.allclose(injection(state, inputs), expected)


@given(seed=seeds)
def test_many_passes_settle_at_the_fixed_point_whatever_the_start(seed):
    injection = LTIInjection(4).double()
    nn.init.normal_(injection.inputs.weight)
    inputs, state = numbers(seed, 3, 4), 1000 * numbers(seed + 1, 3, 4)
    for _ in range(500):
        state = injection(state, inputs)
    assert torch.allclose(state, injection.inputs(inputs))


@given(seed=seeds)
def test_the_linear_part_is_the_decay(seed):
    injection = LTIInjection(4).double()
    nn.init.normal_(injection.log_rate)
    nn.init.normal_(injection.inputs.weight)
    state, inputs = numbers(seed, 2, 4)
    matrix = torch.func.jacrev(lambda s: injection(s, inputs))(state)
    assert torch.allclose(matrix, torch.diag(injection.decay()))
    assert spectral_radius(matrix) < 1


def test_gradients_are_right():
    injection = LTIInjection(3).double()
    state, inputs = numbers(0, 2, 3).requires_grad_(), numbers(1, 2, 3).requires_grad_()

    def forward(state, inputs, log_rate, weight):
        weights = {"log_rate": log_rate, "inputs.weight": weight}
        return torch.func.functional_call(injection, weights, (state, inputs))

    assert torch.autograd.gradcheck(forward, (state, inputs, *injection.parameters()))


def test_the_two_places_of_the_block_differ_by_where_it_reads():
    injection, block = LTIInjection(4), nn.Linear(4, 4)
    state, inputs = torch.randn(2, 2, 3, 4)
    mixed = injection.decay() * state + (1 - injection.decay()) * injection.inputs(inputs)
    assert torch.allclose(inject_then_block(injection, block, state, inputs), block(mixed))
    assert torch.allclose(inject_beside_block(injection, block, state, inputs), mixed + block(state + inputs))


@pytest.mark.parametrize("seed", range(3))
def test_injecting_before_a_normed_block_stays_bounded_and_beside_a_residual_one_does_not(seed):
    torch.manual_seed(seed)
    block, injection = Block(16, 2, 32, causal=False, rope_theta=None), LTIInjection(16)
    inputs = torch.randn(2, 5, 16)
    lengths = {}
    with torch.no_grad():
        for update in (inject_then_block, inject_beside_block):
            state, lengths[update] = inputs, []
            for _ in range(128):
                state = update(injection, block, state, inputs)
                lengths[update].append(state.norm())
    assert lengths[inject_then_block][127] < 1.1 * lengths[inject_then_block][63]
    assert lengths[inject_beside_block][127] > 1000 * lengths[inject_beside_block][63]


def test_shapes_that_differ_and_no_channels_are_named():
    with pytest.raises(ValueError, match=r"one shape, got \(2, 4\) and \(1, 4\)"):
        LTIInjection(4)(torch.zeros(2, 4), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="state and inputs must have 4 channels, got 5"):
        LTIInjection(4)(torch.zeros(2, 5), torch.zeros(2, 5))
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        LTIInjection(0)


def test_it_runs_on_fake_cuda_without_mixing_devices():
    with torch.device("meta"):
        injection = LTIInjection(4)
    with FakeTensorMode():
        weights = {name: torch.empty(weight.shape, device="cuda") for name, weight in injection.named_parameters()}
        state = torch.empty(2, 3, 4, device="cuda")
        after = torch.func.functional_call(injection, weights, (state, state))
    assert after.device.type == "cuda" and after.shape == (2, 3, 4)


# Mistakes that learners make, and a word of the sentence that names each.


def largest_stretch(matrix):
    return torch.linalg.matrix_norm(matrix, 2)


def real_part_only(matrix):
    return torch.linalg.eigvals(matrix).real.amax(-1)


def smallest(matrix):
    return torch.linalg.eigvals(matrix).abs().amin(-1)


def real_size_only(matrix):
    return torch.linalg.eigvals(matrix).real.abs().amax(-1)


def no_diagonals(matrix):
    return torch.linalg.eigvals(matrix).abs().amax(-1) if matrix.dim() > 1 else matrix.max()


class WithDecay(LTIInjection):
    def decay(self):
        return self.wrong(self.log_rate)


class ReturnsTheRate(WithDecay):
    wrong = staticmethod(torch.exp)


class TakesLogRateAsRate(WithDecay):
    wrong = staticmethod(lambda log_rate: torch.exp(-log_rate))


class Grows(WithDecay):
    wrong = staticmethod(lambda log_rate: torch.exp(torch.exp(log_rate)))


class Sigmoid(WithDecay):
    wrong = staticmethod(torch.sigmoid)


class FirstOrder(WithDecay):
    wrong = staticmethod(lambda log_rate: 1 - log_rate.exp())


class Unclamped(WithDecay):
    wrong = staticmethod(lambda log_rate: torch.exp(-torch.exp(log_rate)))


class FullGain(LTIInjection):
    def forward(self, state, inputs):
        return self.decay() * state + self.inputs(inputs)


class SkipsB(LTIInjection):
    def forward(self, state, inputs):
        return self.decay() * state + (1 - self.decay()) * inputs


class Swapped(LTIInjection):
    def forward(self, state, inputs):
        return (1 - self.decay()) * state + self.decay() * self.inputs(inputs)


class ForgetsTheState(LTIInjection):
    def forward(self, state, inputs):
        return (1 - self.decay()) * self.inputs(inputs)


class ForgetsTheInputs(LTIInjection):
    def forward(self, state, inputs):
        return self.decay() * state


def block_first(injection, block, state, inputs):
    return injection(block(state), inputs)


def adds_what_was_injected(injection, block, state, inputs):
    return injection(state, inputs) + block(injection(state, inputs))


def beside(injection, block, state, inputs):
    return injection(state, inputs) + block(state + inputs)


def without_the_block(injection, block, state, inputs):
    return injection(state, inputs)


def without_the_injection(injection, block, state, inputs):
    return block(state + inputs)


def block_reads_the_state(injection, block, state, inputs):
    return injection(state, inputs) + block(state)


def before(injection, block, state, inputs):
    return block(injection(state, inputs))


def state_once_more(injection, block, state, inputs):
    return state + injection(state, inputs) + block(state + inputs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_a_radius_of_other_than_real_numbers_is_refused(dtype):
    with pytest.raises(ValueError, match="floating-point dtype"):
        inspect.unwrap(spectral_radius)(torch.ones(2, 2, dtype=dtype))


class ClampsTheRate(LTIInjection):
    def decay(self):
        limits = torch.finfo(self.log_rate.dtype)
        rate = self.log_rate.double().exp().clamp(limits.eps, -math.log(limits.tiny) - 1)
        return torch.exp(-rate).to(self.log_rate.dtype)


def writes_to_the_state(injection, block, state, inputs):
    injected = injection(state, inputs)
    state += inputs
    return injected + block(state)


class StartsAlike(LTIInjection):
    def __init__(self, dim):
        super().__init__(dim)
        nn.init.zeros_(self.log_rate)


class FixedDecay(LTIInjection):
    def decay(self):
        return super().decay().detach()


def block_reads_each(injection, block, state, inputs):
    return injection(state, inputs) + block(state) + block(inputs)


class Stored(LTIInjection):
    def __init__(self, dim):
        super().__init__(dim)
        self.register_buffer("least", torch.tensor(1e-6))


class ClampsTooEarly(LTIInjection):
    def decay(self):
        return torch.exp(-self.log_rate.clamp(-3, 1).exp())


class StraightThrough(LTIInjection):
    def decay(self):
        limits = torch.finfo(self.log_rate.dtype)
        kept = self.log_rate.double().clamp(math.log(limits.eps), math.log(-math.log(limits.tiny) - 1))
        kept = self.log_rate + (kept - self.log_rate).detach()  # the gradient goes past the clamp
        return torch.exp(-kept.exp()).to(self.log_rate.dtype)


class ForwardOfItsOwn(LTIInjection):
    def forward(self, state, inputs):
        super().forward(state, inputs)
        decay = torch.exp(-torch.exp(self.log_rate))
        return decay * state + (1 - decay) * self.inputs(inputs)


MISTAKES = [
    ("spectral_radius", edited("stability", "spectral_radius", (".amax(-1)", ".amax(0)")), "should have the shape (3,), and it has (2,)"),
    ("spectral_radius", edited("stability", "spectral_radius", ("return matrix.abs().max()", "return matrix.min().abs()")), "largest absolute value"),
    ("spectral_radius", edited("stability", "spectral_radius", ("matrix if matrix.dtype == torch.float64 else matrix.float()", "matrix.float()")), "leave float64"),
    ("spectral_radius", edited("stability", "spectral_radius", ("if not matrix.isfinite().all():", "if False:")), "before the eigenvalues are asked for"),
    ("inject_then_block", lambda injection, block, state, inputs: block(injection(state.detach(), inputs)), "gradient"),
    ("inject_beside_block", block_reads_each, "let it read their sum, once"),
    ("LTIInjection", Stored, "least would be stored"),
    ("LTIInjection", ClampsTooEarly, "clamp only at what"),
    ("LTIInjection", StraightThrough, "a gradient comes through"),
    ("LTIInjection", ForwardOfItsOwn, "call decay(), which clamps"),
    ("LTIInjection", ClampsTheRate, "clamp log_rate itself"),
    ("inject_beside_block", writes_to_the_state, "have changed"),
    ("LTIInjection", StartsAlike, "evenly from −2 to 1"),
    ("LTIInjection", FixedDecay, "cannot be learned from"),
    ("spectral_radius", largest_stretch, "largest singular value"),
    ("spectral_radius", real_part_only, "largest real part"),
    ("spectral_radius", real_size_only, "absolute value of the real part"),
    ("spectral_radius", smallest, "smallest eigenvalue"),
    ("spectral_radius", no_diagonals, "diagonal of a matrix"),
    ("LTIInjection", ReturnsTheRate, "You return the rate"),
    ("LTIInjection", TakesLogRateAsRate, "log_rate as the rate"),
    ("LTIInjection", Grows, "The sign is missing"),
    ("LTIInjection", Sigmoid, "a sigmoid"),
    ("LTIInjection", FirstOrder, "first-order step"),
    ("LTIInjection", Unclamped, "clamp log_rate"),
    ("LTIInjection", FullGain, "not weighed by 1 − decay"),
    ("LTIInjection", SkipsB, "B is not used"),
    ("LTIInjection", Swapped, "changed places"),
    ("LTIInjection", ForgetsTheState, "state is forgotten"),
    ("LTIInjection", ForgetsTheInputs, "inputs are forgotten"),
    ("inject_then_block", block_first, "run the block first"),
    ("inject_then_block", adds_what_was_injected, "add what was injected"),
    ("inject_then_block", beside, "the other update"),
    ("inject_then_block", without_the_block, "block does not run"),
    ("inject_then_block", without_the_injection, "instead of injected"),
    ("inject_beside_block", block_reads_the_state, "reads the state alone"),
    ("inject_beside_block", before, "the other update"),
    ("inject_beside_block", adds_what_was_injected, "reads what was injected"),
    ("inject_beside_block", without_the_block, "block is left out"),
    ("inject_beside_block", without_the_injection, "injection is left out"),
    ("inject_beside_block", state_once_more, "once more"),
]

def by_name(injection, block, state, inputs):
    return block(injection(state=state, inputs=inputs))


def test_check_accepts_arguments_by_name(capsys):
    by_name.__name__ = "inject_then_block"
    assert check(by_name) is by_name, capsys.readouterr().out


test_check_names_the_cause, test_check_accepts_the_finished_code = mistakes_are_named(
    MISTAKES, [inspect.unwrap(spectral_radius), LTIInjection, inject_then_block, inject_beside_block]
)
