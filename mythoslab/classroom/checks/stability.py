"""Checks of 03_stability."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import checks, expect, expect_close, expect_gradients, expect_raises, expect_shape, reference


class _Finite(TorchDispatchMode):
    """Refuse nan and infinity to torch.linalg, whose library may end the whole process over them."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "linalg" in function.name() and not args[0].isfinite().all():
            raise RuntimeError("nan or infinity")
        return function(*args, **(kwargs or {}))


@checks("spectral_radius")
def spectral_radius(spectral_radius):
    symmetric = torch.tensor([[2.0, 1.0], [1.0, -3.0]])
    turning = torch.tensor([[0.5, -2.0], [1.0, 0.25]])
    mixed = torch.linalg.qr(torch.randn(4, 4))[0]
    general = mixed @ torch.block_diag(turning, torch.tensor([[-1.0]]), torch.tensor([[0.2]])) @ mixed.T
    for matrix in (general, symmetric, torch.tensor([[0.5, 10.0], [0.0, 0.25]])):
        got = spectral_radius(matrix)
        values = torch.linalg.eigvals(matrix)
        expect_close(
            got,
            values.abs().max(),
            "Take the largest absolute value of the eigenvalues.",
            mistakes={
                "You take the largest singular value: that bounds one pass, the eigenvalues tell of many.": torch.linalg.svdvals(matrix)[0],
                "You take the largest real part: a complex eigenvalue stretches by its absolute value.": values.real.max(),
                "You take the absolute value of the real part: a complex eigenvalue has an imaginary one too.": values.real.abs().max(),
                "You take the smallest eigenvalue: the largest wins in the long run.": values.abs().min(),
                "You take the Frobenius norm: ask for the eigenvalues.": matrix.norm(),
                "You look at the diagonal: those are the eigenvalues only if nothing stands below it or above it.": matrix.diagonal().abs().max(),
            },
        )
    many = torch.stack((symmetric, turning))
    expect_shape(spectral_radius(many), (2,), "The radius of two matrices")
    for batch in (torch.randn(3, 2, 2), torch.randn(2, 3, 4, 4)):
        expect_close(
            spectral_radius(batch),
            torch.linalg.eigvals(batch).abs().amax(-1),
            f"Of matrices in the shape {tuple(batch.shape)} the radii are wrong: one each, over the last dimension of the eigenvalues.",
        )
    for diagonal in ([0.5, -0.9], [0.9, -0.5, 0.1]):
        expect_close(
            spectral_radius(torch.tensor(diagonal)),
            torch.tensor(0.9),
            "A vector is the diagonal of a matrix: its radius is the largest absolute value.",
        )
    barely = torch.tensor([[1 - 1e-9, 1.0], [0.0, 0.5]], dtype=torch.float64)
    expect(
        bool(spectral_radius(barely) < 1), "In float64 a radius of 1 − 1e-9 comes out as 1: leave float64 as it is, and widen only narrower dtypes."
    )
    expect_raises(ValueError, lambda: spectral_radius(torch.zeros(2, 3)), "A matrix that is not square has no eigenvalues: raise a ValueError.")
    expect_raises(ValueError, lambda: spectral_radius(torch.zeros(3, 2, 3)), "Matrices that are not square have no eigenvalues: raise a ValueError.")
    for shape, name in (((2, 2), "matrix"), ((3, 2, 2), "batch"), ((2,), "diagonal")):
        for value, what in ((float("nan"), "with nan"), (float("inf"), "with infinity")):
            bad = torch.ones(shape)
            bad[(-1,) * len(shape)] = value
            with _Finite():
                expect_raises(
                    ValueError, lambda: spectral_radius(bad), f"A {name} {what} should raise a ValueError, before the eigenvalues are asked for."
                )
    for shape in ((0, 0), (0,)):
        expect_raises(ValueError, lambda: spectral_radius(torch.zeros(shape)), f"The shape {shape} is empty: raise a ValueError.")
    for dtype in (torch.int64, torch.complex64):
        for shape, name in (((2, 2), "matrix"), ((2,), "diagonal")):
            expect_raises(
                ValueError, lambda: spectral_radius(torch.ones(shape, dtype=dtype)), f"A {name} of {str(dtype)[6:]} should raise a ValueError."
            )
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        for matrix in (symmetric, symmetric[0]):
            half = spectral_radius(matrix.to(dtype))
            expect(half.dtype == dtype, f"{str(dtype)[6:]} came in and {str(half.dtype)[6:]} went out: hand back the dtype that came in.")


@checks("LTIInjection")
def lti_injection(LTIInjection):
    ours, theirs = reference("stability").LTIInjection(4), LTIInjection(4)
    expect(
        {name: tuple(weight.shape) for name, weight in theirs.named_parameters()} == {"log_rate": (4,), "inputs.weight": (4, 4)},
        "LTIInjection(4) should hold log_rate, one number per channel, and a linear map called inputs, without bias.",
    )
    alike = torch.allclose(theirs.log_rate, ours.log_rate) and torch.equal(theirs.inputs.weight, ours.inputs.weight)
    expect(alike, "log_rate should start evenly from −2 to 1, so that channels remember for different times, and inputs as the identity.")
    with torch.no_grad():
        ours.log_rate.copy_(torch.tensor([-2.0, -1.0, 0.0, 0.5]))
        ours.inputs.weight.add_(0.3 * torch.randn(4, 4))
    more = sorted(theirs.state_dict().keys() - ours.state_dict().keys())
    expect(not more, f"{', '.join(more)} would be stored with the weights: register_buffer(…, persistent=False), or keep a number.")
    theirs.load_state_dict(ours.state_dict())
    rate = ours.log_rate.exp()
    wide_ours, wide_theirs = reference("stability").LTIInjection(3), LTIInjection(3)
    with torch.no_grad():
        for part in (wide_ours, wide_theirs):
            part.log_rate.copy_(torch.tensor([-12.0, -5.0, 4.0]))
    expect_close(
        theirs.decay(),
        ours.decay(),
        "The decay is exp(−rate), and the rate is exp(log_rate).",
        mistakes={
            "You return the rate: the decay is exp(−rate).": rate,
            "You use log_rate as the rate: take its exponential first, so that it is positive.": torch.exp(-ours.log_rate),
            "The sign is missing: exp(rate) grows, exp(−rate) decays.": torch.exp(rate),
            "That is a sigmoid of log_rate: a decay too, and another one than the hold gives.": ours.log_rate.sigmoid(),
            "That is a first-order step, 1 − rate: it leaves the circle for large rates. Solve exactly, exp(−rate).": 1 - rate,
            "You return 1 − decay.": 1 - ours.decay(),
        },
    )
    logs = wide_theirs.decay().double().log() / wide_ours.decay().double().log()
    expect(
        bool(((logs - 1).abs() < 0.02).all()),
        "At log rates of −12, −5 and 4, which float32 can hold, the decay is another one: clamp only at what the dtype cannot tell from 1 and from 0.",
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for value in (-1e4, -20.0, 10.0, 1e4):
            extreme = LTIInjection(4).to(dtype)
            nn.init.constant_(extreme.log_rate, value)
            decay = extreme.decay()
            expect(
                bool(((decay > 0) & (decay < 1)).all()),
                f"With log_rate at {value:g} the decay is {decay[0].item():g} in {str(dtype)[6:]}, and it must stay inside (0, 1): "
                "clamp log_rate before both exponentials, between what the dtype can tell from 1 and from 0"
                + (", and compute in float64 here." if dtype == torch.float64 else "."),
            )
            expect(decay.dtype == dtype, f"The decay of {str(dtype)[6:]} parameters is {str(decay.dtype)[6:]}: hand back their dtype.")
            slopes = torch.autograd.grad(decay.sum(), extreme.log_rate, allow_unused=True) if decay.requires_grad else [None]
            expect(
                slopes[0] is None or bool(slopes[0].isfinite().all()),
                f"With log_rate at {value:g} its gradient is nan: the exponential overflows before you clamp it, so clamp log_rate itself.",
            )
            if abs(value) == 1e4:
                expect(
                    slopes[0] is None or not slopes[0].any(),
                    f"With log_rate at {value:g} a gradient comes through: beyond the limits there should be none, as a clamp has it.",
                )
    state, inputs = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    decay, seen = ours.decay(), ours.inputs(inputs)
    given = state.clone(), inputs.clone()
    got = theirs(state, inputs)
    expect(
        torch.equal(state, given[0]) and torch.equal(inputs, given[1]),
        "state or inputs have changed: make a new tensor, and do not write to what was given.",
    )
    expect_close(
        got,
        ours(state, inputs),
        "One pass is decay · state + (1 − decay) · B · inputs.",
        mistakes={
            "The inputs are not weighed by 1 − decay: the fixed point moves away from B · inputs.": decay * state + seen,
            "B is not used: send the inputs through the linear map.": decay * state + (1 - decay) * inputs,
            "B is applied to the state: it belongs to the inputs.": decay * ours.inputs(state) + (1 - decay) * inputs,
            "Decay and gain have changed places.": (1 - decay) * state + decay * seen,
            "The state is forgotten: add decay · state.": (1 - decay) * seen,
            "The inputs are forgotten: add (1 − decay) · B · inputs.": decay * state,
        },
    )
    expect_gradients(theirs, ours, state, inputs)
    for value in (-1e4, 1e4):
        far_ours, far_theirs = reference("stability").LTIInjection(4), LTIInjection(4)
        for part in (far_ours, far_theirs):
            nn.init.constant_(part.log_rate, value)
        expect_gradients(
            far_theirs,
            far_ours,
            state,
            inputs,
            sentence=f"With log_rate at {value:g} a pass has another gradient: call decay(), which clamps, in forward too.",
        )
    single = LTIInjection(3)
    expect_shape(single(state[0, 0, :3], inputs[0, 0, :3]), (3,), "One pass of a state of shape (3,)")
    expect_raises(ValueError, lambda: theirs(state, inputs[:, :1]), "State and inputs of different shapes should raise a ValueError.")
    expect_raises(ValueError, lambda: theirs(state, inputs[:1]), "State and inputs of different shapes should raise a ValueError.")
    wide = torch.randn(2, 3, 5)
    expect_raises(ValueError, lambda: theirs(wide, wide), "Five channels for an injection of four should raise a ValueError.")
    expect_raises(ValueError, lambda: LTIInjection(0), "Zero channels should raise a ValueError.")


def _linear_parts():
    """An injection and a block that tell every order of calls apart, and a state and inputs for them."""
    from_state, from_inputs, of_block = torch.randn(3, 4, 4)
    state, inputs = torch.randn(2, 2, 3, 4)
    return (lambda state, inputs: state @ from_state + inputs @ from_inputs), (lambda x: (x @ of_block).tanh()), state, inputs


@checks("inject_then_block")
def inject_then_block(inject_then_block):
    injection, block, state, inputs = _linear_parts()
    given = state.clone(), inputs.clone()
    got = inject_then_block(injection, block, state, inputs)
    expect(
        torch.equal(state, given[0]) and torch.equal(inputs, given[1]),
        "state or inputs have changed: hand on what the injection returns, and write to neither.",
    )
    expect_close(
        got,
        block(injection(state, inputs)),
        "The injection reads state and inputs, and the block reads what it returns.",
        mistakes={
            "You run the block first: inject, and then run the block.": injection(block(state), inputs),
            "You add what was injected to the block's answer: the block has its own residual path, and returns the new state.": (
                injection(state, inputs) + block(injection(state, inputs))
            ),
            "You put the block beside the injection: that is the other update.": injection(state, inputs) + block(state + inputs),
            "The block does not run: hand it what the injection returns.": injection(state, inputs),
            "The injection is left out: the block should not read the state itself.": block(state),
            "The inputs are added instead of injected: call the injection.": block(state + inputs),
            "State and inputs have changed places.": block(injection(inputs, state)),
        },
    )
    expect_gradients(lambda *given: inject_then_block(injection, block, *given), lambda *given: block(injection(*given)), state, inputs)


@checks("inject_beside_block")
def inject_beside_block(inject_beside_block):
    injection, block, state, inputs = _linear_parts()
    given = state.clone(), inputs.clone()
    got = inject_beside_block(injection, block, state, inputs)
    expect(torch.equal(state, given[0]) and torch.equal(inputs, given[1]), "state or inputs have changed: make a new tensor, state + inputs.")
    expect_close(
        got,
        injection(state, inputs) + block(state + inputs),
        "Add what the injection returns to what the block returns for state + inputs.",
        mistakes={
            "The block reads the state alone: it should read state + inputs.": injection(state, inputs) + block(state),
            "The block reads the inputs alone: it should read state + inputs.": injection(state, inputs) + block(inputs),
            "You run the block on what was injected: that is the other update.": block(injection(state, inputs)),
            "The block reads what was injected: beside means that it reads state + inputs.": (
                injection(state, inputs) + block(injection(state, inputs))
            ),
            "The block reads state and inputs one after the other: let it read their sum, once.": injection(state, inputs)
            + block(state)
            + block(inputs),
            "The block is left out: add block(state + inputs).": injection(state, inputs),
            "The injection is left out: add injection(state, inputs).": block(state + inputs),
            "The state is added once more: the injection carries it already.": state + injection(state, inputs) + block(state + inputs),
        },
    )
    expect_gradients(
        lambda *given: inject_beside_block(injection, block, *given),
        lambda state, inputs: injection(state, inputs) + block(state + inputs),
        state,
        inputs,
    )
