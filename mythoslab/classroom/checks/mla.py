"""Checks of 06_mla."""

import torch
from torch.utils._pytree import tree_leaves

from . import attempt, checks, expect, expect_close, expect_gradients, expect_raises, expect_shape, reference


@checks("GroupedQueryAttention")
def grouped_query_attention(GroupedQueryAttention):
    recurrence = reference("recurrence")
    theirs = GroupedQueryAttention(16, 4, 2)
    shapes = {name: tuple(weight.shape) for name, weight in theirs.named_parameters()}
    needed = {"q_proj.weight": (16, 16), "k_proj.weight": (8, 16), "v_proj.weight": (8, 16), "o_proj.weight": (16, 16)}
    expect(
        shapes == needed,
        "GroupedQueryAttention(16, 4, 2) should hold q_proj, k_proj, v_proj and o_proj without biases, with keys and values of 2 heads × 4 channels.",
    )
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.mul_(3)  # sharp enough that every mistake shows
        result = theirs(x)
        heads = lambda proj: proj(x).unflatten(-1, (-1, 4)).transpose(1, 2)  # noqa: E731
        query, key, value = heads(theirs.q_proj), heads(theirs.k_proj), heads(theirs.v_proj)
        turn = lambda part: recurrence.rotate(part, recurrence.rotary_angles(6, 4))  # noqa: E731
        by_group = lambda part: part.repeat_interleave(2, 1)  # noqa: E731
        in_turn = lambda part: part.repeat(1, 2, 1, 1)  # noqa: E731

        def attend(query, key, value, causal=True):
            mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
            return theirs.o_proj(mixed.transpose(1, 2).flatten(2))

        key_, value_ = by_group(key), by_group(value)
        expect_shape(result, (2, 6, 16), "The output")
        expect_close(
            result,
            attend(turn(query), turn(key_), value_),
            "Rotate queries and keys, let query heads 0 and 1 read key head 0 and heads 2 and 3 head 1, mask the future, project.",
            mistakes={
                "Key heads are dealt out in turn, 0 1 0 1: neighbours share one, 0 0 1 1.": attend(turn(query), turn(in_turn(key)), in_turn(value)),
                "It is not causal: a position sees later ones.": attend(turn(query), turn(key_), value_, causal=False),
                "Nothing is rotated: turn queries and keys by their positions.": attend(query, key_, value_),
                "The keys are not rotated.": attend(turn(query), key_, value_),
                "The queries are not rotated.": attend(query, turn(key_), value_),
                "The values are rotated too: positions belong to the scores alone.": attend(turn(query), turn(key_), turn(value_)),
            },
        )
        kept = theirs.keys_and_values(x)
        expect(isinstance(kept, tuple) and len(kept) == 2, "keys_and_values should return two tensors.")
        expect_close(
            kept[0],
            turn(key),
            "A cache should keep keys that are rotated already, of the shared heads only.",
            mistakes={"The kept keys are not rotated: then each would have to be rotated again at every step.": key},
        )
        expect_close(kept[1], value, "A cache should keep the values of the shared heads, as they are.")
    ours = reference("mla").GroupedQueryAttention(16, 4, 2)
    ours.load_state_dict(theirs.state_dict(), strict=False)  # buffers of theirs are welcome
    expect_gradients(theirs, ours, x)
    for dim, n_heads, n_kv_heads in ((48, 6, 2), (24, 4, 1), (24, 4, 4)):
        which = f"GroupedQueryAttention({dim}, {n_heads}, {n_kv_heads})"
        ours, other = (kind(dim, n_heads, n_kv_heads) for kind in (reference("mla").GroupedQueryAttention, GroupedQueryAttention))
        expect(
            all(getattr(other, name).weight.shape == getattr(ours, name).weight.shape for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
            f"{which} should have n_kv_heads × (dim // n_heads) = {n_kv_heads} × {dim // n_heads} channels of keys and of values.",
        )
        other.load_state_dict(ours.state_dict(), strict=False)
        inputs = 3 * torch.randn(1, 5, dim)
        sentence = f"{which} is off: a head has dim // n_heads channels, n_heads // n_kv_heads neighbours share a key head, and scores are divided by the root of the channels of a head."
        with torch.no_grad():
            got, needed = (attempt(lambda: (part(inputs), *part.keys_and_values(inputs)), sentence) for part in (other, ours))
        for part, right in zip(got, needed):
            expect_close(part, right, sentence)
    expect_raises(ValueError, lambda: GroupedQueryAttention(16, 4, 3), "3 key heads for 4 query heads should raise a ValueError.")
    expect_raises(ValueError, lambda: GroupedQueryAttention(18, 4, 2), "18 channels for 4 heads should raise a ValueError.")
    slow = reference("mla").GroupedQueryAttention(16, 4, 2, rope_theta=20.0)
    theirs = GroupedQueryAttention(16, 4, 2, rope_theta=20.0)
    theirs.load_state_dict(slow.state_dict(), strict=False)
    with torch.no_grad():
        for kept, needed in zip((theirs(x), *theirs.keys_and_values(x)), (slow(x), *slow.keys_and_values(x))):
            expect_close(kept, needed, "rope_theta has no effect: hand it to rotary_angles, for queries and keys.")


@checks("LatentCache")
def latent_cache(LatentCache):
    theirs = LatentCache(2, 6, 3, n_slots=2)
    first, second, third = torch.randn(3, 2, 4, 3)
    memory = getattr(theirs, "memory", None)
    expect(memory is not None, "LatentCache should keep its numbers in self.memory, (slot, batch, position, width).")
    expect_shape(memory, (2, 2, 6, 3), "memory, (slot, batch, position, width),")
    place = memory.data_ptr()
    got = theirs.write(first)
    expect(hasattr(theirs, "length"), "LatentCache should say in self.length how many positions are filled.")
    expect(theirs.length == 0, "write moves the length on: other passes have yet to write at the same positions, so leave it to advance.")
    expect(
        got is not None and tuple(got.shape) != (2, 6, 3),
        "write returns positions that were never filled: return those up to the new ones.",
    )
    expect_close(got, first, "write should return what it has just kept, when nothing was kept before.")
    theirs.write(second, 1)
    theirs.advance(4)
    expect(theirs.length == 4, f"advance(4) should make the length 4, and it is {theirs.length}.")
    new = torch.randn(2, 1, 3)
    got = theirs.write(new)
    expect(tuple(got.shape) != (2, 1, 3), "write returns the new positions alone: return the earlier ones of the pass too.")
    expect_close(
        got,
        torch.cat((first, new), 1),
        "New positions follow those that are filled, in the slot of the pass.",
        mistakes={
            "The passes write over each other: each slot has memory of its own.": torch.cat((second, new), 1),
            "New positions are written at the start: write after those that are filled.": torch.cat((new, first[:, 1:], torch.zeros(2, 1, 3)), 1),
        },
    )
    one, two, three = torch.randn(3, 2, 1, 3)
    theirs.write(one, 0)
    theirs.write(two, 1)
    expect_close(
        theirs.write(three, 2),
        torch.cat((second, three), 1),
        "Pass 2 of a cache with two slots uses the last one, slot 1.",
        mistakes={
            "Pass 2 of a cache with two slots starts again at slot 0: the last passes share the last slot, min(pass_index, n_slots − 1).": torch.cat(
                (first, three), 1
            )
        },
    )
    expect_close(theirs.write(one, 0), torch.cat((first, one), 1), "What pass 2 writes should leave slot 0 alone.")
    expect(theirs.memory.data_ptr() == place, "write makes new memory: copy into what is there, so that a token costs a token.")
    grown = torch.ones(2, 1, 3, requires_grad=True)
    expect_raises(ValueError, lambda: theirs.write(grown), "New positions that want a gradient should raise a ValueError: none would come back.")
    expect_raises(ValueError, lambda: theirs.write(torch.ones(2, 3, 3)), "Three new positions where two are free should raise a ValueError.")
    expect_raises(
        ValueError, lambda: theirs.write(torch.ones(1, 1, 3)), "Another batch size should raise a ValueError, not be spread over the batch."
    )
    expect_raises(ValueError, lambda: theirs.write(new.double()), "Another dtype should raise a ValueError, not be rounded without a word.")
    expect_raises(ValueError, lambda: theirs.write(new, -1), "A pass_index of −1 should raise a ValueError.")
    expect_raises(ValueError, lambda: theirs.advance(3), "Advancing by three where two are free should raise a ValueError.")
    expect_raises(ValueError, lambda: theirs.advance(-1), "Advancing by −1 should raise a ValueError: crop goes back.")
    for row in (2, -1):
        expect_raises(ValueError, lambda: theirs.take([0, row]), f"take([0, {row}]) of two sequences, which count from 0, should raise a ValueError.")
    expect_raises(ValueError, lambda: LatentCache(0, 6, 3), "A batch of zero should raise a ValueError.")
    theirs.crop(3)
    expect(theirs.length == 3, f"crop(3) should leave three of the four positions, and the length is {theirs.length}.")
    expect_close(theirs.write(new), torch.cat((first[:, :3], new), 1), "After crop(3) new positions follow the first three.")
    expect_raises(ValueError, lambda: theirs.crop(-1), "Cropping to −1 should raise a ValueError.")
    expect_raises(ValueError, lambda: theirs.crop(5), "Cropping to more than is filled should raise a ValueError.")
    half = LatentCache(3, 5, 4, n_slots=2, dtype=torch.bfloat16)
    expect_shape(half.memory, (2, 3, 5, 4), "memory, (slot, batch, position, width),")
    expect(half.memory.dtype == torch.bfloat16, "The dtype that was asked for has no effect: hand dtype and device to torch.zeros.")
    expect(half.bytes_per_token == 16, f"Two slots of 4 numbers in bfloat16 are 16 bytes per token, and bytes_per_token is {half.bytes_per_token}.")
    theirs.take([1, 0])
    expect_close(
        theirs.write(new), torch.cat((first[[1, 0], :3], new), 1), "After take([1, 0]) the two sequences have changed places: pick all rows at once."
    )
    theirs.take([1, 1])
    expect_close(theirs.write(new), torch.cat((first[[0, 0], :3], new), 1), "After take([1, 1]) both sequences are what the second was.")
    for rows in ([0], [0, 0, 0]):
        theirs.take(rows)
        expect_shape(theirs.memory, (2, len(rows), 6, 3), f"memory after take({rows})")


def _by_hand(query, kept, up, scale, *, causal="last", rope=True, swapped=False, key_scale=None, rope_first=""):
    """Latent attention with every multiplication written out, and the mistakes one can make in it."""
    rank = up.shape[2]
    if rope_first == "kept":
        kept = kept.roll(rank - kept.shape[2], 2)
    latent, rope_key = kept[..., :rank], kept[..., rank:]
    n_nope, n_query, n_key = query.shape[3] - rope_key.shape[2], query.shape[2], kept.shape[1]
    if rope_first == "query":
        query = query.roll(n_nope, 3)
    up_key, up_value = up[:, :n_nope], up[:, n_nope:]
    if swapped:
        up_key, up_value = up_value, up_key
    scores = torch.einsum("bhqn,hnr,bkr->bhqk", query[..., :n_nope], up_key, latent)
    if rope:
        scores = scores + torch.einsum("bhqn,bkn->bhqk", query[..., n_nope:], rope_key)
    scores = scores * (scale if key_scale is None else key_scale)
    if causal is not None:
        shift = n_key - n_query if causal == "last" else 0
        seen = torch.ones(n_query, n_key, dtype=torch.bool).tril(shift)
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("bhqk,bkr,hvr->bhqv", scores.softmax(-1), latent, up_value)


def _check_attention(attend, sentence):
    query, kept, up = torch.randn(2, 3, 4, 12), 2 * torch.randn(2, 9, 14), torch.randn(3, 16, 10)
    arguments = query, kept, up, 0.4
    given = [part.clone() for part in arguments[:3]]
    got = attend(*arguments)
    expect(all(map(torch.equal, given, arguments)), "You change what was handed in: make new tensors, query * scale and not query *= scale.")
    expect_shape(got, (2, 3, 4, 8), "The output, (batch, head, query, v),")
    expect_close(
        got,
        _by_hand(*arguments),
        sentence,
        mistakes={
            "It is not causal: of four queries at the end, the first should not see the last three keys.": _by_hand(*arguments, causal=None),
            "The mask counts from the first key: the queries are the *last* positions, so query i sees n_key − n_query more keys than i + 1.": _by_hand(
                *arguments, causal="first"
            ),
            "The rotated key is left out of the scores.": _by_hand(*arguments, rope=False),
            "You take the rotated channels of the query to come first: they come last, after those without position.": _by_hand(
                *arguments, rope_first="query"
            ),
            "You take the rotated key to come first in kept: the latent does, and the rotated key is the rest.": _by_hand(
                *arguments, rope_first="kept"
            ),
            "Keys and values have changed places: in up, the rows of the key come first.": _by_hand(*arguments, swapped=True),
            "The scale is left out.": _by_hand(*arguments, key_scale=1.0),
            "The scale is that of the query's width: use the one that was given.": _by_hand(*arguments, key_scale=12**-0.5),
            "The scale divides the scores: multiply by it.": _by_hand(*arguments, key_scale=1 / 0.4),
        },
        atol=1e-4,
    )
    expect_gradients(attend, _by_hand, *arguments)
    narrow = query, kept, up[:, :13], 0.4
    halves = (
        "A value need not be as wide as a key without position: divide the rows of `up` after as many as the query has channels that are not rotated."
    )
    try:
        got = attend(*narrow)
    except (RuntimeError, IndexError):
        got = None
    expect(got is not None and got.shape == (2, 3, 4, 5) and torch.allclose(got, _by_hand(*narrow), atol=1e-4), halves)
    other = torch.randn(1, 2, 4, 7), torch.randn(1, 6, 8), torch.randn(2, 9, 5), 0.4  # rank 5, rotated 3, 4 + 5 rows
    expect_close(
        attend(*other),
        _by_hand(*other),
        "With other numbers of heads and channels it is off: read them from the shapes of query, kept and up.",
        atol=1e-4,
    )
    alone = query[:, :, -1:], kept, up, 0.4
    expect_close(attend(*alone), _by_hand(*alone), "A single query, the last position, should see every key.", atol=1e-4)
    square = torch.randn(2, 3, 9, 12), kept, up, 0.4
    expect_close(attend(*square), _by_hand(*square), "As many queries as keys: each should see itself and what is before.", atol=1e-4)


@checks("expanded_attention")
def expanded_attention(expanded_attention):
    _check_attention(
        expanded_attention, "Score the queries with the unpacked keys and the rotated one, mask the future, and mix the unpacked values."
    )


@checks("absorbed_attention")
def absorbed_attention(absorbed_attention):
    _check_attention(
        absorbed_attention,
        "Carry the query without position over to the latents, add both scores before you scale them, mask the future, mix the latents alone, and unpack the mean to a value.",
    )
    query, kept, up = torch.randn(1, 4, 1, 40), torch.randn(1, 2000, 24), torch.randn(4, 64, 16)
    made = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal made
            result = function(*args, **(kwargs or {}))
            given = {part.untyped_storage().data_ptr() for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)}
            for part in tree_leaves(result):
                if isinstance(part, torch.Tensor) and part.untyped_storage().data_ptr() not in given and list(part.shape).count(2000) < 2:
                    made += part.numel()  # views are free, and a mask of all positions may be large
            return result

    with Watch():
        absorbed_attention(query, kept, up, 0.2)
    expect(
        made < 250_000,  # numbers: of all heads' keys alone, or values, there are 256,000
        "The numbers are right, and keys or values of all positions were made on the way: carry the query to the latents' side instead.",
    )
