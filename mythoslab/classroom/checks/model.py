"""Checks of 08_model."""

import sys
from dataclasses import replace

import torch
from torch import nn

from . import checks, expect, expect_close, expect_raises, expect_shape, reference


def beside(learners, name: str, topic: str):
    """What an object of the learner finds under a name in its own module or notebook; else the reference's."""
    return getattr(sys.modules[learners.__module__], name, None) or getattr(reference(topic), name)


def _config(learners, **changes):
    small = dict(
        vocab_size=11, dim=8, n_heads=2, hidden_dim=12, n_passes=3, context_length=6, rope_theta=50.0
    )
    return beside(learners, "MythosConfig", "model")(**{**small, **changes})


@checks("Mythos")
def mythos(Mythos):
    config = _config(Mythos, tie_embeddings=False, n_prelude=2, n_core=2)
    ours, theirs = reference("model").Mythos(config), Mythos(config)
    names = {name: tuple(weight.shape) for name, weight in ours.state_dict().items()}
    got = {name: tuple(weight.shape) for name, weight in theirs.state_dict().items()}
    missing = sorted({name.split(".")[0] for name in names.keys() - got.keys()})
    expect(
        not missing,
        f"The weights of {', '.join(missing)} are missing or of another number: keep names and block counts.",
    )
    expect(
        names == got,
        "The model holds other weights than the text says: compare names and shapes in __init__.",
    )
    tied = Mythos(_config(Mythos))
    expect(
        tied.head.weight is tied.embedding.weight,
        "With tie_embeddings=True head and embedding should share one weight: head.weight = embedding.weight.",
    )
    expect(
        theirs.head.weight is not theirs.embedding.weight,
        "With tie_embeddings=False head and embedding should have a weight each: yours share one.",
    )
    expect(
        float(theirs.embedding.weight.detach().std()) < 0.1,
        "The starting weights are PyTorch's own: call initialise(self) once all parts are there.",
    )
    with torch.no_grad():
        for weight in ours.parameters():
            weight.normal_(0, 0.4) if weight.dim() == 2 else weight.uniform_(0.5, 1.5)
    theirs.load_state_dict(ours.state_dict())
    tokens = torch.randint(11, (2, 6))
    states = ours.think(tokens, 5)
    expect_shape(theirs(tokens), (2, 6, 11), "What the model returns for 2 × 6 tokens of 11 kinds")
    later = tokens.clone()
    later[:, -1] = (later[:, -1] + 1) % 11
    expect(
        torch.allclose(theirs(tokens)[:, :-1], theirs(later)[:, :-1], atol=1e-5),
        "A change of the last token changes earlier ones: build the blocks with causal=True.",
    )
    expect_close(
        theirs(tokens, 5),
        ours(tokens, 5),
        "The logits are off: embed, norm, prelude, norm, loop, then coda, norm and head on the last state.",
        mistakes=_mythos_mistakes(ours, tokens, states),
    )
    expect_close(theirs(tokens), ours(tokens), "Without n_passes the configured number of passes should run.")
    expect_close(
        theirs.think(tokens, 5),
        states,
        "think should return the state after every pass, as the loop hands them out.",
    )
    expect_raises(
        ValueError,
        lambda: theirs(tokens, 0),
        "Zero passes should raise a ValueError: 'n_passes or …' takes 0 for not given, so ask 'is None'.",
    )
    expect_raises(
        ValueError,
        lambda: theirs(torch.zeros(1, 7, dtype=torch.long)),
        "7 tokens in a context of 6 should raise a ValueError.",
    )


def _mythos_mistakes(ours, tokens, states):
    embedded = ours.embedding_norm(ours.embedding(tokens))
    inputs = ours.prelude(embedded)
    loop = lambda inputs: ours.read(ours.core(inputs, 5)[-1])  # noqa: E731
    other = reference("model").Mythos(replace(ours.config, rope_theta=10000.0))
    other.load_state_dict(ours.state_dict())
    return {
        "n_passes has no effect: hand it to the core.": ours(tokens, ours.config.n_passes),
        "You read the state after the first pass: take the last one, [-1].": ours.read(states[0]),
        "You average the states of all passes: read the last one alone.": ours.read(states.mean(0)),
        "The prelude is left out: it comes before the loop.": loop(ours.prelude_norm(embedded)),
        "What the prelude made is not normed: prelude_norm comes before the loop.": loop(inputs),
        "Embeddings are not normed: embedding_norm comes before the prelude.": loop(
            ours.prelude_norm(ours.prelude(ours.embedding(tokens)))
        ),
        "The coda is left out: it comes between the loop and the last norm.": ours.head(
            ours.norm(states[-1])
        ),
        "The last norm is left out: it comes between coda and head.": ours.head(ours.coda(states[-1])),
        "rope_theta has no effect: hand it to every block.": other(tokens, 5),
    }


@checks("count_parameters")
def count_parameters(count_parameters):
    base = _config(count_parameters)
    configs = [
        base,
        replace(base, tie_embeddings=False, n_core=3),
        replace(base, n_prelude=0, n_coda=4, n_passes=7),
    ]
    counts = [count_parameters(config) for config in configs]
    expect(
        all(isinstance(count, int) for count in counts),
        "A number of weights is a whole number: return an int.",
    )

    def variant(*, runs=False, norms=2, matrices=3, attention=4, last=4, untied=2):
        return torch.tensor(
            [
                (c.n_prelude + c.n_core * (c.n_passes if runs else 1) + c.n_coda)
                * (attention * c.dim**2 + matrices * c.dim * c.hidden_dim + norms * c.dim)
                + (1 if c.tie_embeddings else untied) * c.vocab_size * c.dim
                + last * c.dim
                for c in configs
            ]
        )

    expect_close(
        torch.tensor(counts),
        variant(),
        "The count is off: print the names and shapes of Mythos(config).named_parameters() and add them up.",
        mistakes={
            "You count the core once for each pass: passes cost no weights.": variant(runs=True),
            "The norms are missing: two in every block, and four around them.": variant(norms=0, last=0),
            "The norms inside the blocks are missing: two of dim each.": variant(norms=0),
            "The four norms outside the blocks are missing: of embedding, prelude, loop and coda.": variant(
                last=0
            ),
            "The feed-forward part has three matrices: gate, up and down.": variant(matrices=2),
            "Attention has four matrices: query, key, value and output.": variant(attention=3),
            "Without tie_embeddings there are two matrices of tokens: embedding and head.": variant(untied=1),
        },
        atol=0,
        rtol=0,
    )


@checks("sample")
def sample(sample):
    logits = torch.tensor([1.0, -0.5, 2.0, 0.5, -3.0])
    given = logits.clone()

    def shares(**options):
        draw = torch.Generator().manual_seed(0)
        drawn = [sample(logits, generator=draw, **options) for _ in range(2000)]
        expect(
            all(isinstance(token, int) for token in drawn[:1]),
            "Return the token as an int: int(…) of the drawn tensor.",
        )
        return torch.tensor(drawn).bincount(minlength=5) / 2000

    expect(
        sample(logits, temperature=0) == 2,
        "At temperature 0 take the most likely token: argmax, and no division by zero.",
    )
    first, second = (
        [sample(logits, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
        for _ in range(2)
    )
    expect(first == second, "The same seed gives different tokens: hand the generator to torch.multinomial.")
    best = torch.eye(5)[2]
    expect_close(
        shares(temperature=2.0),
        (logits / 2).softmax(0),
        "The chances are off: softmax of logits divided by temperature, then one draw.",
        mistakes={
            "You multiply by the temperature: divide by it.": (logits * 2).softmax(0),
            "The temperature has no effect: divide the logits by it before the softmax.": logits.softmax(0),
            "You always take the most likely token: draw with torch.multinomial.": best,
            "You divide the chances, not the logits, by the temperature.": logits.softmax(0) / 2,
            "Every token has the same chance: draw from softmax(logits / temperature).": torch.full(
                (5,), 0.2
            ),
        },
        atol=0.035,
    )
    order = logits.argsort(descending=True)
    kept = torch.full((5,), -torch.inf).index_copy(0, order[:3], logits[order[:3]])
    zeros = torch.zeros(5).index_copy(0, order[:3], logits[order[:3]])
    lowest = torch.full((5,), -torch.inf).index_copy(0, order[2:], logits[order[2:]])
    fewer = torch.full((5,), -torch.inf).index_copy(0, order[:2], logits[order[:2]])
    expect_close(
        shares(top_k=3),
        kept.softmax(0),
        "With top_k=3 only the three most likely tokens should have a chance, in their old proportions.",
        mistakes={
            "top_k has no effect: give all but the k largest logits the chance 0.": logits.softmax(0),
            "You set the other logits to 0, which is a chance like any other: use minus infinity.": zeros.softmax(
                0
            ),
            "You keep the least likely tokens: topk gives the largest, mask what is below them.": lowest.softmax(
                0
            ),
            "One token too few is kept: mask what is below the k-th logit, not the k-th itself.": fewer.softmax(
                0
            ),
        },
        atol=0.035,
    )
    expect(
        torch.equal(logits, given),
        "You change the logits that were handed in: use masked_fill, not masked_fill_.",
    )
    sample(logits, top_k=50)
    expect_raises(
        ValueError,
        lambda: sample(logits, temperature=-1.0),
        "A temperature below 0 should raise a ValueError.",
    )
    expect_raises(ValueError, lambda: sample(logits, top_k=0), "top_k=0 leaves no token: raise a ValueError.")
