"""Checks of 01_questions."""

import math
from collections.abc import Iterator

import torch

from . import Mistake, Steps, checks, expect, expect_close, expect_raises, expect_shape, reference


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@checks("climb")
def climb(climb):
    chains = torch.arange(20).sub(1).clamp(min=0)
    star = torch.tensor([4, 4, 4, 4, 4, 5, 5, 5] + [0] * 6 + [8] * 6)
    parent = torch.stack([chains, star])
    before = parent.clone()
    with Steps("It does not come to an end: let every pointer move in every round, and stop after log2(n) rounds, rounded up."):
        found = climb(parent)
    expect(
        torch.equal(parent, before),
        "The argument parent has changed: climb on a copy, without an operation in place.",
    )
    expect(
        isinstance(found, tuple) and len(found) == 2,
        "Return two tensors: the index of each root, and the depth.",
    )
    root, depth = found
    true_root, true_depth = reference("questions").climb(parent)
    expect_shape(root, parent.shape, "The first result, root,")
    expect_shape(depth, parent.shape, "The second result, depth,")
    for name, numbers in (("root", root), ("depth", depth)):
        dtype = str(numbers.dtype)[6:]
        expect(numbers.dtype == torch.int64, f"The {name} is a whole number, int64, and yours is {dtype}: sums of bool stay bool, so begin with .long().")
    if torch.equal(root, true_root) and torch.equal(depth, true_depth):
        chain = torch.arange(5000).sub(1).clamp(min=0)
        chain = torch.stack((torch.zeros_like(chain), chain))
        with Steps("The numbers are right, and you climb link by link: let every node jump to where its pointer points, in log2(n) rounds.", 200):
            far = climb(chain)[1].max()
        expect(int(far) == 4999, "On a chain of 5000 nodes, in the second row, not all arrive: the rounds must grow with the number of nodes, log2(n) rounded up.")
        return
    chain, true_chain = depth[0].tolist(), true_depth[0].tolist()
    first_row = torch.equal(root[0], true_root[0]) and chain == true_chain
    mistakes = [
        (
            torch.equal(root, true_depth) and torch.equal(depth, true_root),
            "The two results are swapped: return the root first, then the depth.",
        ),
        (
            torch.equal(depth, true_depth + 1),
            "A root counts as depth 1: depth counts links, not nodes, so start it at 0 there.",
        ),
        (
            first_row,
            "Only the first row is right: each row is a forest of its own, so gather along dimension 1.",
        ),
        (
            chain == true_chain,
            "The depth is right and the root is not: return the node reached at the end, not the parent.",
        ),
        (
            torch.equal(depth, _jumping_first(parent)),
            "You jump first and then add: read the depth before you move the pointer.",
        ),
        (
            max(chain) > 1 and chain == [min(links, max(chain)) for links in true_chain],
            "Nodes far from the root have not arrived: a chain of n nodes needs log2(n) rounds, rounded up.",
        ),
        (
            max(chain) < max(true_chain),
            "The depths grow too slowly: a jump covers as many links as the node it lands on has counted, "
            "so add that node's depth, not 1.",
        ),
        (
            len(set(chain)) == 1,
            "All nodes of a chain have one depth: a root points to itself, over no link, so start its depth at 0 and that of the others at 1.",
        ),
        (
            max(chain) > max(true_chain),
            "Some depths are too large: add the depth of the node you point to before you point further.",
        ),
    ]
    for made, sentence in mistakes:
        expect(not made, sentence)
    raise Mistake(
        "Root or depth is wrong: compare with a walk from parent to parent on a chain of three nodes."
    )


def _jumping_first(parent):
    """The depths of a learner who has swapped the two lines of a round."""
    depth = (parent != torch.arange(parent.shape[1])).long()
    reached = parent
    for _ in range((parent.shape[1] - 1).bit_length()):
        reached = reached.gather(1, reached)
        depth = depth + depth.gather(1, reached)
    return depth


@checks("two_chains")
def two_chains(two_chains):
    length, n_colours, n_lists = 6, 4, 400

    def draw(seed=0, **changed):
        options = {"length": length, "n_colours": n_colours, "generator": seeded(seed)}
        return two_chains(n_lists, **{**options, **changed})

    batch = draw()
    fields = reference("questions").ForestBatch._fields
    expect(getattr(batch, "_fields", None) == fields, "Return a ForestBatch, as forest does.")
    for name, values in batch._asdict().items():
        expect_shape(values, (n_lists, 2 * length), f"The field {name}")
        expect(values.dtype == torch.int64, f"The field {name} should be int64, and it is {str(values.dtype)[6:]}.")
    is_root = batch.node == batch.parent
    expect(
        (is_root.sum(1) == 2).all(),
        f"A list has {is_root[0].sum()} roots and not two: "
        "each chain begins with a node that is its own parent.",
    )
    expect(
        (batch.colour[~is_root] == 0).all(),
        "Nodes that are no root show a colour: give them 0, or no link need be read.",
    )
    colour = batch.colour[is_root].view(-1, 2)
    expect(
        bool((colour >= 1).all() and (colour <= n_colours).all()),
        f"Root colours run from {colour.min()} to {colour.max()}: they count from 1 to n_colours.",
    )
    expect(
        (colour[:, 0] != colour[:, 1]).all(),
        "Both roots of a list have the same colour: draw two different ones.",
    )
    expect(
        all(((batch.depth == depth).sum(1) == 2).all() for depth in range(length)),
        f"With length {length} the deepest node has depth {batch.depth.max()}, or a depth occurs "
        "more than twice: both chains have exactly `length` nodes, each the child of the one before.",
    )
    pairs, possible = len(set(map(tuple, colour.tolist()))), n_colours * (n_colours - 1)
    expect(pairs > 2, "The same few pairs of colours come up in every list: draw them anew for each list.")
    expect(pairs == possible, f"In 400 lists only {pairs} of {possible} pairs of colours come up: any two different ones should be equally likely.")
    position = torch.arange(2 * length).expand_as(batch.node)
    for what, where in (("label", batch.node), ("position in the list", position)):
        mean = torch.stack([where[batch.depth == depth].float().mean() for depth in range(length)])
        expect(
            (mean - (length - 0.5)).abs().max() < 1.2,
            f"A node's {what} tells its depth: shuffle labels and positions with two independent draws.",
        )
    expect(
        all(torch.equal(again, first) for again, first in zip(draw(), batch)),
        "The same seed gave another batch: draw everything from `generator`, nothing from the global one.",
    )
    expect(
        not torch.equal(draw(1).colour, batch.colour),
        "Another seed gave the same batch: draw everything from `generator`.",
    )
    expect(
        int(draw(n_labels=40).node.max()) >= 2 * length,
        "With n_labels=40 the labels still come from the first few: pass n_labels on.",
    )
    many = two_chains(12_000, length=2, n_colours=4, generator=seeded(0))
    met = many.colour[many.node == many.parent].view(-1, 2) @ torch.tensor([5, 1])
    share = torch.bincount(met, minlength=25)[[5 * a + b for a in range(1, 5) for b in range(1, 5) if a != b]] / 1000
    expect(
        bool(((share - 1).abs() < 0.15).all()),
        "Some pairs of colours come up more often than others: all should be equally likely, so do not mend a second colour that equals the first.",
    )
    for size, colours in ((1, 2), (4, 7)):
        other = two_chains(200, length=size, n_colours=colours, generator=seeded(0))
        expect_shape(other.node, (200, 2 * size), f"With length={size} each field")
        right = bool(((other.depth == size - 1).sum(1) == 2).all()) and other.answer.unique().tolist() == list(range(1, colours + 1))
        expect(right, f"With length={size} and n_colours={colours} depths or colours are wrong: use the arguments, no sizes of your own.")
    generator, state = seeded(0), torch.get_rng_state()
    one, two = (two_chains(20, length=4, n_colours=4, generator=generator).node for _ in range(2))
    expect(not torch.equal(one, two), "Two draws from one generator are the same: use `generator` itself, not a copy of it or its seed.")
    expect(torch.equal(state, torch.get_rng_state()), "The global generator has changed: draw everything from `generator`.")
    same = lambda answer: (answer[:, 1:] == answer[:, :-1]).float().mean().item()  # noqa: E731
    by_label = batch.answer.gather(1, batch.node.argsort(1))
    expect(
        all(abs(same(answer) - (length - 1) / (2 * length - 1)) < 0.05 for answer in (batch.answer, by_label))
        and (batch.node == position).float().mean().item() < 0.2,
        "A chain lies together, or the list is in the order of its labels: shuffle labels and positions with two independent draws over both chains.",
    )
    answer_of_root = [dict(zip(n, c)) for n, c in zip(batch.node.tolist(), batch.colour.tolist())]
    parents = [dict(zip(n, p)) for n, p in zip(batch.node.tolist(), batch.parent.tolist())]
    for i in range(20):
        for node, answer in zip(batch.node[i].tolist(), batch.answer[i].tolist()):
            for _ in range(length):
                node = parents[i][node]
            expect(
                answer_of_root[i][node] == answer,
                "An answer is not the colour of the root its node leads to.",
            )
    expect_raises(ValueError, lambda: two_chains(0, length=2, n_colours=2, generator=seeded(0)), "batch_size=0 should raise a ValueError.")
    for wrong in (dict(length=0), dict(n_colours=1), dict(n_labels=2 * length - 1)):
        ((name, value),) = wrong.items()
        expect_raises(
            ValueError,
            lambda: draw(**wrong),
            f"{name}={value} should raise a ValueError that says what is needed.",
        )


@checks("text_batches")
def text_batches(text_batches):
    tokens, options = torch.arange(100), dict(batch_size=4, context_length=6)
    batches = text_batches(tokens, **options, generator=seeded(0))
    expect(isinstance(batches, Iterator), "Return an iterator of pairs: inputs and targets.")
    drawn = []
    for _ in range(40):
        with Steps("No batch ever comes: the loop goes round without enough windows."):
            pair = next(batches, None)
        expect(pair is not None, "The batches end: after an epoch, lay the windows anew and go on forever.")
        drawn.append(pair)
    for inputs, targets in drawn:
        expect_shape(inputs, (4, 6), "The inputs")
        expect_shape(targets, (4, 6), "The targets")
        expect(inputs.dtype == targets.dtype == torch.int64, "The inputs and targets should be int64, as the tokens are.")
    inputs = torch.cat([inputs for inputs, _ in drawn])
    targets = torch.cat([targets for _, targets in drawn])
    expect(
        torch.equal(inputs, inputs[:, :1] + torch.arange(6)),
        "The tokens of a window do not follow one another in the text.",
    )
    expect(
        not torch.equal(targets, inputs),
        "The targets are the inputs themselves: they are the tokens one place later.",
    )
    expect(
        not torch.equal(targets, inputs - 1),
        "The targets are one token earlier than the inputs, and should be one later.",
    )
    expect(
        torch.equal(targets, inputs + 1),
        "The targets should be the tokens one place after the inputs, here inputs + 1.",
    )
    first = inputs[:12].flatten().tolist()
    expect(
        len(set(first)) == len(first),
        "A token was read twice within one epoch: lay the windows end to end, context_length apart, and draw "
        "without replacement.",
    )
    starts = inputs[:, 0]
    expect(
        bool(((starts[:12] - starts[0]) % 6 == 0).all()),
        "The windows of an epoch are not context_length apart: lay them end to end, so that the last target of one is the first input of the next.",
    )
    for seed in range(3):
        sevens = text_batches(tokens, batch_size=7, context_length=6, generator=seeded(seed))
        begins = torch.cat([next(sevens)[0][:, 0] for _ in range(3)])
        epoch = begins[: len(range(int(begins[0]) % 6, 94, 6))]  # 15 or 16 windows, which sevens do not fill
        expect(
            len(set(epoch.tolist())) == len(epoch) and bool(((epoch - epoch[0]) % 6 == 0).all()),
            "Windows that are left when an epoch cannot fill another batch are lost: let the batch go on in the next epoch.",
        )
    expect(
        (starts[1:13] < starts[:12]).any(),
        "The windows come in the order of the text: shuffle them in each epoch.",
    )
    expect(
        len(set((starts % 6).tolist())) > 1,
        "Every epoch cuts the text at the same places: draw a new offset below context_length for each.",
    )
    again = text_batches(tokens, **options, generator=seeded(0))
    expect(
        all(torch.equal(a, b) for (a, _), (b, _) in zip(drawn, again)),
        "The same seed gave other batches: draw everything from `generator`, nothing from the global one.",
    )
    try:
        with Steps(
            "With a text of context_length + 1 tokens no batch ever comes, though it holds exactly one window: the last start is the "
            "number of tokens minus context_length minus 1, and a batch that an epoch cannot fill goes on in the next."
        ):
            shortest = next(text_batches(torch.arange(7), **options, generator=seeded(0)), None)
    except RuntimeError as error:
        raise Mistake(f"A text of context_length + 1 tokens raises '{str(error).splitlines()[0]}': an offset behind the last start leaves no window.") from None
    except ValueError:
        shortest = None
    expect(
        shortest is not None and shortest[1].max() == 6,
        "A text of context_length + 1 tokens holds exactly one window: the last start is the number of "
        "tokens minus context_length minus 1.",
    )
    first_inputs = drawn[0][0]
    other = next(text_batches(tokens, **options, generator=seeded(1)))[0]
    expect(not torch.equal(other, first_inputs), "Another seed gave the same batches: draw everything from `generator`, not from one of your own.")
    elsewhere = next(text_batches(tokens + 500, **options, generator=seeded(0)))[0]
    expect(torch.equal(elsewhere, first_inputs + 500), "You hand out the places of the tokens: read what stands there, tokens[places].")
    more = text_batches(tokens, batch_size=100, context_length=6, generator=seeded(0))
    places = torch.cat([next(more)[0][:, 0] for _ in range(16)])
    expect(len(set((places % 6).tolist())) == 6, "Some offsets below context_length never come: draw from all of 0 … context_length − 1.")
    single = text_batches(torch.arange(9), batch_size=8, context_length=1, generator=seeded(0))
    epochs = [next(single)[0].flatten() for _ in range(3)]
    expect(all(epoch.sort().values.tolist() == list(range(8)) for epoch in epochs), "With context_length=1 not every token but the last is read once in an epoch.")
    expect(not torch.equal(epochs[0], epochs[1]), "Every epoch comes in the same order: shuffle anew in each.")
    expect_shape(shortest[0], (4, 6), "A batch from a text of one window: lay epochs until it is full (while, not if); it")
    expect_raises(
        ValueError,
        lambda: text_batches(torch.arange(6), **options, generator=seeded(0)),
        "Too short a text should raise a ValueError at once: a function with `yield` runs nothing before the "
        "first next(), so check outside of it.",
    )
    expect_raises(ValueError, lambda: text_batches(torch.arange(3), **options, generator=seeded(0)), "A text shorter than a context should raise a ValueError.")
    for bad in (dict(batch_size=0), dict(context_length=0), dict(batch_size=-1), dict(context_length=-1)):
        ((name, value),) = bad.items()
        expect_raises(ValueError, lambda: text_batches(tokens, **{**options, **bad}, generator=seeded(0)), f"{name}={value} should raise a ValueError.")


@checks("bits_per_byte")
def bits_per_byte(bits_per_byte):
    nats, n_tokens, n_bytes = 2.0, 100, 250
    value = bits_per_byte(nats, n_tokens, n_bytes)
    expect(value is not None, "Nothing comes back: is a return missing?")
    mistakes = {
        nats * n_tokens / n_bytes: "This is still in nats: divide by ln 2 to get bits.",
        nats * math.log(2) * n_tokens / n_bytes: "You multiply by ln 2: a nat is more than a bit, so divide.",
        nats / math.log(2): "This is bits per token: spread the loss of all tokens over the bytes.",
        nats
        / math.log(2)
        * n_bytes
        / n_tokens: "Tokens and bytes are the wrong way round: tokens times loss, over bytes.",
        nats
        / math.log(2)
        / n_bytes: "The mean loss is per token: multiply it by the number of tokens before you divide.",
        math.log2(nats)
        * n_tokens
        / n_bytes: "The loss is a logarithm already: do not take its log2, divide it by ln 2.",
    }
    for wrong, sentence in mistakes.items():
        expect(not math.isclose(value, wrong, rel_tol=1e-6), sentence)
    expected = nats / math.log(2) * n_tokens / n_bytes
    expect(isinstance(value, float), f"Return a float, and not a {type(value).__name__}.")
    expect_close(
        torch.tensor(value, dtype=torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        "The number is wrong: nats per token, over ln 2, times tokens, over bytes.",
    )
    again = bits_per_byte(1.7, 30, 41)
    expect(math.isclose(again, 1.7 / math.log(2) * 30 / 41, rel_tol=1e-9), "The number is off in its last digits, or for other arguments: divide by math.log(2), and do not round.")
    for n_tokens, n_bytes in ((0, 0), (10, 0), (10, -1)):
        expect_raises(ValueError, lambda: bits_per_byte(1.0, n_tokens, n_bytes), f"n_bytes={n_bytes} should raise a ValueError that says what is needed.")
