"""Checks of 05_depth_lora."""

import copy
from functools import partial

import torch
from torch import nn

from . import attempt, checks, expect, expect_close, expect_raises, expect_shape, reference


def _parameters(module):
    return {name: tuple(weight.shape) for name, weight in module.named_parameters()}


@checks("PassEmbedding")
def pass_embedding(PassEmbedding):
    theirs = PassEmbedding(3, 4)
    expect(
        _parameters(theirs) == {"vectors": (3, 4)},
        "PassEmbedding(3, 4) should hold one parameter called vectors, (3, 4): a vector of 4 channels for each of 3 passes.",
    )
    expect(not theirs.vectors.any(), "The vectors should be zero at the start, so that a trained block is not disturbed.")
    vectors, x = torch.randn(3, 4), 1 + torch.rand(2, 5, 4)
    with torch.no_grad():
        theirs.vectors.copy_(vectors)
    given = x.clone()
    theirs(x, 0)
    expect(torch.equal(x, given), "x has changed: make a new tensor, x + vector; x += vector writes to what was given.")
    for index in range(3):
        expect_close(
            theirs(x, index),
            x + vectors[index],
            "Add the vector of the pass to every position.",
            mistakes={
                "You return the vector alone: add it to x.": vectors[index].expand(2, 5, 4),
                "You multiply by the vector: add it.": x * vectors[index],
                "Every pass gets the same vector: take the one of pass_index.": x + vectors[0],
                "Passes are counted from 0 here: pass_index 0 has the first vector.": x + vectors[index - 1],
                "You add all vectors: take the one of pass_index.": x + vectors.sum(0),
                "x comes back as it was: a pass below n_passes has a vector.": x,
            },
        )
    out = theirs(x, 1).sum()
    expect(out.requires_grad, "No gradient reaches the vectors: leave out no_grad and detach, they are to be trained.")
    (gradient,) = torch.autograd.grad(out, theirs.vectors)
    expect(bool((gradient[1] == 10).all()), "The vector of a pass should have the gradient of what it was added to.")
    held, free = theirs, PassEmbedding(3, 4, beyond="none")
    with torch.no_grad():
        free.vectors.copy_(vectors)
    expect_close(
        held(x, 7),
        x + vectors[-1],
        "Beyond the last pass, 'hold' goes on with the last vector.",
        mistakes={
            "Beyond the last pass you start again at the first: 'hold' goes on with the last vector.": x + vectors[7 % 3],
            "Beyond the last pass you add nothing: that is the rule 'none'.": x,
        },
    )
    expect_close(held(x, 3), x + vectors[-1], "The first pass beyond is pass_index n_passes, since they count from 0: hold from there on.")
    for index in (3, 7):
        expect_close(free(x, index), x, "Beyond the last pass, with beyond='none', x comes back as it was.")
    held.beyond = "none"
    expect_close(held(x, 7), x, "The rule was changed and nothing happens: keep it as self.beyond, and look at it in every pass.")
    expect_raises(ValueError, lambda: theirs(x, -1), "A pass_index of −1 should raise a ValueError, not count from the end.")
    expect_raises(ValueError, lambda: PassEmbedding(0, 4), "Zero passes should raise a ValueError.")
    expect_raises(ValueError, lambda: PassEmbedding(3, 0), "Zero channels should raise a ValueError.")
    expect_raises(ValueError, lambda: PassEmbedding(3, 4, beyond="repeat"), "An unknown rule should raise a ValueError.")
    expect_raises(ValueError, lambda: theirs(x[..., :1], 0), "One channel in place of four should raise a ValueError, not be spread.")


@checks("DepthLoRA")
def depth_lora(DepthLoRA):
    theirs = DepthLoRA(6, 4, rank=2, n_passes=3)
    got, needed = _parameters(theirs), {"lora_a": (3, 2, 6), "lora_b": (3, 4, 2)}
    sentence = "DepthLoRA(6, 4, 2, 3) should hold lora_a, (pass, rank, in) = (3, 2, 6), and lora_b, (pass, out, rank) = (3, 4, 2)."
    if got == {"lora_a": (2, 6), "lora_b": (4, 2)}:
        sentence = "All passes share one A and one B: give each pass its own, on a first dimension of n_passes."
    expect(got == needed, sentence)
    expect(not theirs.lora_b.any(), "lora_b should be zero at the start, so that all passes start as one.")
    expect(
        bool(theirs.lora_a.any()),
        "lora_a is zero at the start, as lora_b is: then neither ever gets a gradient. Draw it at random.",
    )
    expect(bool((theirs.lora_a[0] != theirs.lora_a[1]).any()), "Each pass should draw an A of its own.")
    for n_in, n_out in ((400, 100), (100, 400)):
        for start in DepthLoRA(n_in, n_out, rank=64, n_passes=2).lora_a.detach() * n_in**0.5:
            size, rank = start.std().item(), torch.linalg.matrix_rank(start).item()
            expect(0.8 < size < 1.25, "lora_a should start so that lora_a @ x is about as large as x: deviation 1 / √in_features.")
            expect(abs(start.mean().item()) < 0.1, "lora_a should start around zero, and its mean is not.")
            expect(
                rank == 64,
                f"The rows of lora_a are not independent at the start: of rank 64 only {rank} could ever be used. Draw every entry by itself.",
            )
    with torch.no_grad():
        theirs.lora_b.normal_()
    a, b = theirs.lora_a.detach(), theirs.lora_b.detach()
    weight, x = torch.randn(4, 6), torch.randn(2, 5, 6)
    kept = weight.clone()
    for index in range(3):
        change = b[index] @ a[index]
        merged = theirs.merged(weight, index)
        expect(torch.equal(weight, kept), "merged changes the weight it is given: hand back a new one, and leave the layer's as it is.")
        expect_close(
            merged,
            weight + change,
            "The merged weight is weight + lora_b[pass] @ lora_a[pass].",
            mistakes={
                "merged returns the change alone: add it to the weight.": change,
                "merged uses the same pass every time: take that of pass_index.": weight + b[0] @ a[0],
                "merged scales by the rank: here no scale is used.": weight + change / 2,
                "merged subtracts the change.": weight - change,
                "merged returns the weight as it was.": weight,
                "merged adds the changes of all passes: take that of pass_index.": weight + (b @ a).sum(0),
                "Passes are counted from 0 here: pass_index 0 has the first change.": weight + b[index - 1] @ a[index - 1],
            },
        )
        forward = theirs(x, index)
        expect(tuple(getattr(forward, "shape", ())) != (2, 5, 2), "The forward stops after lora_a: go on with lora_b.")
        expect_close(
            forward,
            x @ change.mT,
            "The forward returns lora_b[pass] @ lora_a[pass] @ x for every position: what the layer's output changes by.",
            mistakes={
                "The forward uses the same pass every time: take that of pass_index.": x @ (b[0] @ a[0]).mT,
                "The forward scales by the rank, and merged does not: the two must give the same numbers.": x @ change.mT / 2,
            },
        )
    for name, out in (("merged", theirs.merged(weight, 1)), ("The forward", theirs(x, 1))):
        expect(
            out.requires_grad and all(bool(part[1].any()) for part in torch.autograd.grad(out.sum(), (theirs.lora_a, theirs.lora_b))),
            f"{name} lets no gradient through to lora_a and lora_b: leave out no_grad and detach, they are to be trained.",
        )
    free = DepthLoRA(6, 4, rank=2, n_passes=3, beyond="none")
    with torch.no_grad():
        free.lora_b.normal_()
    expect_close(
        theirs.merged(weight, 7),
        weight + b[-1] @ a[-1],
        "Beyond the last pass, 'hold' goes on with the last change.",
        mistakes={
            "Beyond the last pass you start again at the first: 'hold' goes on with the last change.": weight + b[7 % 3] @ a[7 % 3],
            "Beyond the last pass you change nothing: that is the rule 'none'.": weight,
        },
    )
    expect_close(theirs(x, 7), x @ (b[-1] @ a[-1]).mT, "Beyond the last pass, the forward should hold the last change, as merged does.")
    expect_close(theirs.merged(weight, 3), weight + b[-1] @ a[-1], "The first pass beyond is pass_index n_passes: hold from there on.")
    expect_close(free.merged(weight, 3), weight, "The first pass beyond is pass_index n_passes: from there on 'none' changes nothing.")
    expect_close(free.merged(weight, 7), weight, "Beyond the last pass, with beyond='none', the weight is as it was.")
    expect_close(free(x, 7), torch.zeros(2, 5, 4), "Beyond the last pass, with beyond='none', the forward adds zeros.")
    theirs.beyond = "none"
    expect_close(theirs.merged(weight, 7), weight, "The rule was changed and nothing happens: keep it as self.beyond, and look at it in every pass.")
    theirs.beyond = "hold"
    for bad in (dict(rank=0), dict(n_passes=0), dict(beyond="repeat")):
        ((name, value),) = bad.items()
        call = partial(DepthLoRA, 6, 4, **{**dict(rank=2, n_passes=3), **bad})
        expect_raises(ValueError, call, f"{name}={value!r} should raise a ValueError.")
    expect_raises(ValueError, lambda: theirs(x[..., :5], 0), "Five channels for a layer that reads six should raise a ValueError.")
    for sizes in ((6, 4), (4, 6)):
        too_large = partial(DepthLoRA, *sizes, rank=5, n_passes=3)
        expect_raises(ValueError, too_large, "A rank above the smaller side of the layer should raise a ValueError.")
    for call in (lambda: theirs.merged(weight, -1), lambda: theirs(x, -1)):
        expect_raises(ValueError, call, "A pass_index of −1 should raise a ValueError, not count from the end.")
    expect_raises(ValueError, lambda: theirs.merged(weight.mT, 0), "A weight of another shape should raise a ValueError.")


@checks("low_rank")
def low_rank(low_rank):
    matrix = torch.randn(5, 4)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    nearest = lambda rank: left[:, :rank] * values[:rank] @ right[:rank]  # noqa: E731
    got = low_rank(matrix, 2)
    expect(isinstance(got, tuple) and len(got) == 2, "Return two factors, lora_b and lora_a.")
    lora_b, lora_a = got
    expect(
        tuple(lora_b.shape) != (2, 4) or tuple(lora_a.shape) != (5, 2),
        "The factors have changed places: lora_b comes first, so that lora_b @ lora_a is near the matrix.",
    )
    expect_shape(lora_b, (5, 2), "lora_b of a 5 × 4 matrix at rank 2")
    expect_shape(lora_a, (2, 4), "lora_a of a 5 × 4 matrix at rank 2")
    expect_close(
        lora_b @ lora_a,
        nearest(2),
        "Keep the two largest singular values and their vectors.",
        mistakes={
            "You keep the smallest singular values: they come largest first, so keep the first ones.": left[:, -2:] * values[-2:] @ right[-2:],
            "The singular values are lost: multiply the vectors by them, a root to each factor.": left[:, :2] @ right[:2],
            "The singular values count twice: give each factor their root.": left[:, :2] * values[:2].square() @ right[:2],
            "The singular values count by their root: give each factor a root, so that the product has them whole.": left[:, :2]
            * values[:2].sqrt()
            @ right[:2],
            "torch.linalg.svd returns V transposed already: take its first rows.": left[:, :2] * values[:2] @ right.mT[:2],
            "You keep one rank too few.": nearest(1),
        },
    )
    expect_close(
        lora_b.norm(dim=0),
        lora_a.norm(dim=1),
        "The product is right, and one factor has the singular values alone: give each their root, so that both learn at one pace.",
    )
    many = torch.randn(3, 5, 4)
    lora_b, lora_a = low_rank(many, 2)
    expect_shape(lora_b, (3, 5, 2), "lora_b of three matrices at once")
    ours = reference("depth_lora").low_rank(many, 2)
    expect_close(lora_b @ lora_a, ours[0] @ ours[1], "Of several matrices each has factors of its own.")
    for dtype, atol, sentence in (
        (torch.bfloat16, 0.1, "A matrix in bfloat16 should give factors in bfloat16: torch.linalg.svd wants float32, so go there and back."),
        (torch.float64, 1e-10, "A matrix in float64 should keep its digits: go to float32 only with what is narrower."),
    ):
        given = matrix.to(dtype)
        lora_b, lora_a = attempt(lambda: low_rank(given, 2), sentence)
        left, values, right = torch.linalg.svd(given.double(), full_matrices=False)
        needed = left[:, :2] * values[:2] @ right[:2]
        kept = lora_b.dtype == lora_a.dtype == dtype
        expect(kept and torch.allclose(lora_b.double() @ lora_a.double(), needed, atol=atol), sentence)
    for bad, given in ((0, matrix), (5, matrix), (5, matrix.mT)):
        shape = " × ".join(map(str, given.shape))
        expect_raises(ValueError, partial(low_rank, given, bad), f"Rank {bad} of a {shape} matrix should raise a ValueError.")
    for number in ("nan", "inf"):
        expect_raises(ValueError, lambda: low_rank(matrix * float(number), 2), f"A matrix with {number} should raise a ValueError.")
    expect_raises(ValueError, lambda: low_rank(matrix[0], 1), "A vector is no matrix: raise a ValueError.")


@checks("fold_norms")
def fold_norms(fold_norms):
    block = reference("recurrence").Block(8, 2, 12)
    with torch.no_grad():
        for norm in (block.attention_norm, block.ffn_norm):
            norm.weight.uniform_(0.5, 2.0)
    before, x = copy.deepcopy(block.state_dict()), torch.randn(2, 5, 8)
    folded = fold_norms(block)
    expect(isinstance(folded, nn.Module), f"Return the folded block, not {type(folded).__name__}.")
    expect(
        all(torch.equal(block.state_dict()[name], weight) for name, weight in before.items()),
        "The block that was given has changed: work on a copy, copy.deepcopy(block).",
    )
    for name in ("attention_norm", "ffn_norm"):
        weight = getattr(folded, name).weight
        whole = isinstance(weight, torch.Tensor) and bool((weight == 1).all())
        expect(whole, f"The weight of {name} should become one: its scale is in the next layer now, and would count twice.")
    norms = {name: before[f"{name}.weight"] for name in ("attention_norm", "ffn_norm")}
    for layer, norm in (("attention.qkv", "attention_norm"), ("ffn.gate", "ffn_norm"), ("ffn.up", "ffn_norm")):
        weight, scale = before[f"{layer}.weight"], norms[norm]
        other = norms["ffn_norm" if norm == "attention_norm" else "attention_norm"]
        expect_close(
            folded.get_submodule(layer).weight,
            weight * scale,
            f"Column i of {layer} should be multiplied by weight i of {norm}.",
            mistakes={
                f"{layer} is as it was, and it reads what {norm} scaled: multiply its columns.": weight,
                f"{layer} is divided by the norm's weight: multiply by it.": weight / scale,
                f"{layer} reads what {norm} scaled, not the other norm.": weight * other,
                f"{layer} is multiplied twice.": weight * scale * scale,
            },
        )
    for layer in ("attention.out", "ffn.down"):
        same = torch.equal(folded.get_submodule(layer).weight, before[f"{layer}.weight"])
        expect(same, f"{layer} should stay as it was: no norm stands right before it.")
    expect_close(folded(x), block(x), "The folded block should compute what the block does.")
