"""Checks of 02_recurrence."""

import torch
import torch.nn.functional as F
from torch import nn

from . import attempt, checks, expect, expect_close, expect_gradients, expect_raises, expect_shape, reference


@checks("RMSNorm")
def rms_norm(RMSNorm):
    norm, x = RMSNorm(8), 3 * torch.randn(2, 5, 8)
    expect(
        isinstance(getattr(norm, "weight", None), nn.Parameter) and norm.weight.shape == (8,),
        "RMSNorm(8) should hold a parameter called weight, one number per channel.",
    )
    expect(bool((norm.weight == 1).all()), "The weights should start at one, so that a new norm only scales.")
    given = x.clone()
    norm(x)
    expect(torch.equal(x, given), "x has changed: make a new tensor, x / …, and do not write to what was given.")
    mean_square = x.square().mean(-1, keepdim=True)
    centred = x - x.mean(-1, keepdim=True)
    expect_close(
        norm(x),
        F.rms_norm(x, (8,), eps=1e-6),
        "Divide each token by the root of its mean square, over the last dimension only.",
        mistakes={
            "You divide by the mean square itself: take its root.": x / mean_square,
            "You divide by the length, the root of the sum: take the root of the mean.": F.normalize(x, dim=-1),
            "That is a layer norm: RMSNorm does not subtract the mean.": centred / centred.square().mean(-1, keepdim=True).sqrt(),
            "You take the mean over all tokens: each token is scaled by itself, over the last dimension.": x / x.square().mean().sqrt(),
            "You multiply by the root mean square: divide by it.": x * mean_square.sqrt(),
        },
    )
    tiny = torch.full((1, 8), 1e-4)
    expect_close(
        norm(tiny),
        F.rms_norm(tiny, (8,), eps=1e-6),
        "On very small inputs the result is off: add eps to the mean square, inside the root.",
    )
    expect(bool(torch.isfinite(norm(torch.zeros(1, 8))).all()), "A token of zeros gives nan: add eps to the mean square, inside the root.")
    expect_close(RMSNorm(8, eps=0.1)(x), F.rms_norm(x, (8,), eps=0.1), "eps has no effect: add the one that was given.")
    with torch.no_grad():
        norm.weight.mul_(2)
    expect_close(norm(x), 2 * F.rms_norm(x, (8,), eps=1e-6), "The learned weight has no effect: multiply the scaled token by it.")
    more = sorted(norm.state_dict().keys() - {"weight"})
    expect(not more, f"{', '.join(more)} would be stored with the weights: keep eps as a number, or register_buffer(…, persistent=False).")
    ours = reference("recurrence").RMSNorm(8)
    ours.load_state_dict(norm.state_dict())
    expect_gradients(norm, ours, x)
    large = torch.full((1, 8), 300.0, dtype=torch.float16)
    half = RMSNorm(8).half()(large)
    expect(
        half.dtype == torch.float16 and bool((half - 1).abs().max() < 0.01),
        "In float16 a token of 300s comes out wrong: its squares overflow, so take them in float32, and hand back the dtype that came in.",
    )
    five = torch.randn(2, 5)
    expect_close(RMSNorm(5)(five), F.rms_norm(five, (5,), eps=1e-6), "With five channels the result is off: use dim, no number of your own.")
    many = torch.randn(500, 8).bfloat16()
    got = RMSNorm(8).bfloat16()(many)
    expect(got.dtype == torch.bfloat16, f"bfloat16 came in and {str(got.dtype)[6:]} went out: hand back the dtype that came in.")
    off = (got.float() / F.rms_norm(many.float(), (8,), eps=1e-6) - 1).abs().max()
    expect(bool(off < 0.0045), "In bfloat16 the result is off: take squares and mean in float32, and round once.")


@checks("rotary_angles")
def rotary_angles(rotary_angles):
    expected = reference("recurrence").rotary_angles(6, 8, 500.0)
    position, pair = torch.arange(6), torch.arange(0, 8, 2)
    expect_close(
        rotary_angles(6, 8, 500.0),
        expected,
        "Pair i turns by theta ** (-2 i / head_dim) radians at every position, counted from 0.",
        mistakes={
            "You count positions from 1: the first stands at 0 and does not turn.": torch.outer(position + 1, 500.0 ** (-pair / 8)),
            "The angles grow from pair to pair: the exponent is negative, so later pairs turn more slowly.": torch.outer(
                position, 500.0 ** (pair / 8)
            ),
            "The exponent is half of what it should be: pair i has the exponent -2 i / head_dim.": torch.outer(position, 500.0 ** (-pair / 16)),
            "The exponent is twice what it should be: divide by head_dim, not by the number of pairs.": torch.outer(position, 500.0 ** (-pair / 4)),
            "theta is not used: the base of the wavelengths is an argument.": reference("recurrence").rotary_angles(6, 8),
        },
    )
    for sizes in ((300, 6), (2, 16)):
        got, needed = rotary_angles(*sizes), reference("recurrence").rotary_angles(*sizes)
        expect_shape(got, needed.shape, "rotary_angles({}, {})".format(*sizes))
        expect_close(
            torch.cat((got.cos(), got.sin())).float(),
            torch.cat((needed.cos(), needed.sin())),
            "With {} positions, {} channels and theta left out the angles are off: use the arguments, and keep positions exact.".format(*sizes),
            atol=1e-3,
        )
    expect_raises(ValueError, lambda: rotary_angles(6, 7), "Channels turn in pairs: an odd head_dim should raise a ValueError.")


@checks("rotate")
def rotate(rotate):
    angles = reference("recurrence").rotary_angles(6, 8)
    x = torch.randn(2, 6, 8)
    given = x.clone()
    rotate(x, angles)
    expect(torch.equal(x, given), "x has changed: put both halves into a new tensor, torch.cat, and do not write to what was given.")
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    even, odd = x[..., ::2], x[..., 1::2]
    expect_close(
        rotate(x, angles),
        reference("recurrence").rotate(x, angles),
        "Turn channel i with channel i + half: first · cos − second · sin, then first · sin + second · cos.",
        mistakes={
            "You turn the wrong way round: the minus belongs to the first half, first · cos − second · sin.": torch.cat(
                (first * cos + second * sin, second * cos - first * sin), -1
            ),
            "You pair neighbours (0 with 1): here channel i turns with channel i + half.": torch.stack(
                (even * cos - odd * sin, even * sin + odd * cos), -1
            ).flatten(-2),
            "The second half should be first · sin + second · cos: yours has a minus too, so lengths change.": torch.cat(
                (first * cos - second * sin, first * sin - second * cos), -1
            ),
            "Sine and cosine have changed places: at position 0 nothing should turn.": torch.cat(
                (first * sin - second * cos, first * cos + second * sin), -1
            ),
            "The halves are joined in the wrong order.": torch.cat((first * sin + second * cos, first * cos - second * sin), -1),
        },
    )
    for shape in ((2, 3, 6, 8), (6, 8), (2, 6, 4)):
        other, turn = torch.randn(shape), reference("recurrence").rotary_angles(6, shape[-1])
        sentence = f"A tensor of shape {shape} is turned wrong: halve the last dimension, x.chunk(2, -1), whatever stands before it."
        expect_close(attempt(lambda: rotate(other, turn), sentence), reference("recurrence").rotate(other, turn), sentence)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        got = rotate(x.to(dtype), angles)
        expect(got.dtype == dtype, f"{str(dtype)[6:]} came in and {str(got.dtype)[6:]} went out: bring cosines and sines to the dtype of x.")
    expect_gradients(lambda x: rotate(x, angles), lambda x: reference("recurrence").rotate(x, angles), x)


@checks("Attention")
def attention(Attention):
    expect_raises(ValueError, lambda: Attention(10, 4), "10 channels do not divide among 4 heads: raise a ValueError.")
    x = torch.randn(2, 6, 16)
    for causal, theta, what in ((False, None, "all-seeing"), (True, None, "causal"), (True, 500.0, "causal, rotary")):
        theirs = Attention(16, 2, causal=causal, rope_theta=theta)
        expect(
            {name: tuple(weight.shape) for name, weight in theirs.named_parameters()} == {"qkv.weight": (48, 16), "out.weight": (16, 16)},
            "Attention(16, 2) should hold two linear maps without bias: qkv from 16 to 48 channels, out from 16 to 16.",
        )
        ours = reference("recurrence").Attention(16, 2, causal=causal, rope_theta=theta)
        more = sorted(theirs.state_dict().keys() - ours.state_dict().keys())
        expect(
            not more,
            f"{', '.join(more)} would be stored with the weights, and models stored without cannot be loaded: register_buffer(…, persistent=False).",
        )
        ours.load_state_dict(theirs.state_dict())
        got = theirs(x)
        expect_shape(got, (2, 6, 16), "The output")
        if causal:
            later = x.clone()
            later[:, -1] += 1
            expect(
                torch.allclose(theirs(later)[:, :-1], got[:, :-1], atol=1e-6),
                "With causal=True a change of the last token changes earlier ones: hand is_causal to the attention.",
            )
        expect_close(
            got,
            ours(x),
            f"The numbers of {what} attention are off: check how heads are split, scaled by the root of head_dim, and joined.",
            mistakes=_attention_mistakes(ours, x),
        )
        expect_gradients(theirs, ours, x)
        kept = [getattr(theirs, name, "missing") for name in ("n_heads", "causal", "rope_theta")]
        more, less = Attention(12, 3, causal=causal, rope_theta=theta), reference("recurrence").Attention(12, 3, causal=causal, rope_theta=theta)
        less.load_state_dict(more.state_dict())
        for shape in ((1, 5, 12), (1, 300, 12), (2, 1, 12), (2, 7, 12)):
            other = torch.randn(shape)
            expect_close(
                more(other),
                less(other),
                f"Attention(12, 3) is wrong for the shape {shape}, after other shapes: keep nothing from call to call, no fixed sizes, no squeeze.",
            )
        expect_close(
            more(20 * other),
            less(20 * other),
            "Where scores are large, hidden tokens shine through, or scores overflow: mask with −infinity, before the softmax.",
        )
        expect(kept == [2, causal, theta], "Attention should keep n_heads, causal and rope_theta under these names: notebook 05 reads them.")


def _attention_mistakes(ours, x):
    query, key, value = ours.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
    plain = query, key
    if ours.rope_theta is not None:
        angles = reference("recurrence").rotary_angles(6, 8, ours.rope_theta)
        query, key = (reference("recurrence").rotate(part, angles) for part in (query, key))

    def finish(query=query, key=key, value=value, causal=ours.causal, **scale):
        return ours.out(F.scaled_dot_product_attention(query, key, value, is_causal=causal, **scale).transpose(1, 2).flatten(2))

    per_head = F.scaled_dot_product_attention(query, key, value, is_causal=ours.causal)
    by_head = ours.qkv.weight.view(2, 3, 8, 16).transpose(0, 1).reshape(48, 16)
    return {
        "Heads come first in your qkv: stored models have all queries first, then keys, then values; split by 3, then by head.": (
            torch.func.functional_call(ours, {"qkv.weight": by_head}, x)
        ),
        "Scores are not divided by the root of head_dim.": finish(scale=1.0),
        "The softmax runs over the queries: let it run over the keys, the last dimension of the scores.": ours.out(
            ((query @ key.mT / 8**0.5).masked_fill(torch.ones(6, 6).triu(1).bool() & ours.causal, -torch.inf).softmax(-2) @ value)
            .transpose(1, 2)
            .flatten(2)
        ),
        "Scores are divided by the root of dim: each head has only head_dim channels.": finish(scale=16**-0.5),
        "With causal=False every token should see every other: yours hides later ones.": finish(causal=True),
        "rope_theta has no effect: rotate queries and keys before they meet.": finish(*plain),
        "Queries turn and keys do not (or the reverse): rotate both.": finish(query=query, key=plain[1]),
        "Values are rotated too: positions belong to queries and keys alone.": finish(
            value=reference("recurrence").rotate(value, reference("recurrence").rotary_angles(6, 8, ours.rope_theta or 500.0))
        ),
        "Heads are joined before they are put behind the positions: transpose(1, 2), then flatten(2).": ours.out(per_head.reshape(2, 6, 16)),
        "The output projection is missing.": per_head.transpose(1, 2).flatten(2),
    }


@checks("Loop")
def loop(Loop):
    ours = reference("recurrence").Loop([nn.Linear(8, 8), nn.Linear(8, 8)], 8)
    with torch.no_grad():
        ours.norm.weight.mul_(1.5)
    first, second = ours.blocks
    theirs = Loop([first, second], 8)
    expect(
        sorted(theirs.state_dict()) == sorted(ours.state_dict()),
        "Loop should hold blocks (an nn.ModuleList) and norm (an RMSNorm), under these names; what lies in a plain list is never trained.",
    )
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 3, 8)
    states = theirs(x, 5)
    expect(
        isinstance(states, torch.Tensor) and states.dim() == 4 and len(states) == 5,
        "Return the state after every pass, stacked: 5 passes make a first dimension of 5, without the state at the start.",
    )
    expect_shape(states, (5, 2, 3, 8), "Loop(blocks, 8)(inputs, 5)")

    def run(step, order=(0, 1, 0, 1, 0), start=x):
        state, collected = start, []
        for index in order:
            state = step(ours.blocks[index], state)
            collected.append(state)
        return torch.stack(collected)

    expect_close(
        states,
        ours(x, 5),
        "Each pass is state = block(norm(state) + inputs), and the first starts at the inputs.",
        mistakes={
            "The inputs are shown once and then forgotten: add them at every pass.": run(lambda block, s: block(ours.norm(s))),
            "The state is not normed before the inputs are added.": run(lambda block, s: block(s + x)),
            "You norm the sum: norm the state alone, then add the inputs.": run(lambda block, s: block(ours.norm(s + x))),
            "The inputs are added after the block: the block should read them.": run(lambda block, s: block(ours.norm(s)) + x),
            "The inputs are normed and the state is not: it is the state that grows.": run(lambda block, s: block(s + ours.norm(x))),
            "The first pass should run blocks[0]: yours begins with the second block.": run(
                lambda block, s: block(ours.norm(s) + x), order=(1, 0, 1, 0, 1)
            ),
            "Pass r should run block r % len(blocks): yours runs the first block only.": run(
                lambda block, s: block(ours.norm(s) + x), order=(0,) * 5
            ),
            "After the last block comes the first again: yours stays at the last.": run(
                lambda block, s: block(ours.norm(s) + x), order=(0, 1, 1, 1, 1)
            ),
            "Every pass runs all blocks: pass r runs one, r % len(blocks).": run(lambda block, s: second(ours.norm(first(ours.norm(s) + x)) + x)),
            "The state starts at zero: start it at the inputs.": run(lambda block, s: block(ours.norm(s) + x), start=torch.zeros_like(x)),
        },
    )
    expect_gradients(theirs, ours, x, 5)
    expect(theirs.blocks[0] is first, "blocks holds copies: put the given modules into the nn.ModuleList.")
    for n_blocks in (1, 3):
        ours = reference("recurrence").Loop([nn.Linear(8, 8) for _ in range(n_blocks)], 8)
        theirs = Loop(list(ours.blocks), 8)
        theirs.load_state_dict(ours.state_dict())
        for n_passes in (1, 7):
            expect_close(
                theirs(x, n_passes),
                ours(x, n_passes),
                f"With {n_blocks} block{'s' * (n_blocks > 1)} and {n_passes} passes the order is wrong: pass r runs blocks[r % len(blocks)], r from 0.",
            )
    for n_passes in (0, -1):
        expect_raises(ValueError, lambda: theirs(x, n_passes), f"{n_passes} passes make no answer: raise a ValueError.")
    expect_raises(ValueError, lambda: Loop([], 8), "A loop without a block should raise a ValueError.")
