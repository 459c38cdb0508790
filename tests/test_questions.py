"""mythoslab.questions: exact and balanced questions, text that does not leak, and their notebook's checks."""

import json
import math
import os
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mythoslab.classroom.checks import check, reference
from mythoslab.questions import (
    PASSAGE,
    Tokenizer,
    bits_per_byte,
    climb,
    forest,
    read_text,
    reference_documents,
    reference_text,
    split,
    text_batches,
    two_chains,
    without_repeats,
)
from tests.mistakes import edited


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def walk(parent_of, node):
    links = 0
    while parent_of[node] != node:
        node, links = parent_of[node], links + 1
    return node, links


def assert_exact(batch):
    """Answer and depth of every fact are what a walk in plain Python finds."""
    for node, parent, colour, answer, depth in zip(*(field.tolist() for field in batch)):
        assert len(set(node)) == len(node)
        parent_of, colour_of = dict(zip(node, parent)), dict(zip(node, colour))
        for n, a, d in zip(node, answer, depth):
            root, links = walk(parent_of, n)
            assert (colour_of[root], links) == (a, d)
            assert (colour_of[n] > 0) == (parent_of[n] == n)


sizes = st.fixed_dictionaries(
    dict(
        n_nodes=st.integers(2, 24),
        n_colours=st.integers(2, 6),
        max_depth=st.integers(0, 8),
        root_share=st.floats(0, 1),
    )
)


@given(size=sizes, extra_labels=st.integers(0, 20), seed=st.integers(0, 2**31))
@settings(max_examples=60)
def test_forests_are_exact_for_any_size(size, extra_labels, seed):
    n_labels = size["n_nodes"] + extra_labels
    batch = forest(5, **size, n_labels=n_labels, generator=seeded(seed))
    assert_exact(batch)
    for field in batch:
        assert field.shape == (5, size["n_nodes"]) and field.dtype == torch.int64
    assert batch.depth.max() <= size["max_depth"]
    assert 0 <= batch.node.min() and batch.node.max() < n_labels
    assert 1 <= batch.answer.min() and batch.answer.max() <= size["n_colours"]
    for colours in batch.colour:
        assert len(set(colours.tolist()) - {0}) >= 2


@given(length=st.integers(1, 12), n_colours=st.integers(2, 6), seed=st.integers(0, 2**31))
@settings(max_examples=40)
def test_two_chains_are_exact_and_balanced_for_any_length(length, n_colours, seed):
    batch = two_chains(5, length=length, n_colours=n_colours, generator=seeded(seed))
    assert_exact(batch)
    for depth in range(length):
        assert ((batch.depth == depth).sum(1) == 2).all()
    for answer in batch.answer:
        assert answer.unique(return_counts=True)[1].tolist() == [length, length]
    assert torch.equal(batch.node.sort(1).values, torch.arange(2 * length).expand(5, -1))


def test_every_depth_up_to_the_limit_is_trained_on():
    depth = forest(2000, n_nodes=20, n_colours=4, max_depth=5, generator=seeded()).depth
    share = torch.bincount(depth.flatten()) / depth.numel()
    assert len(share) == 6 and share.min() > 0.01


def test_root_share_is_the_share_of_roots_after_the_first_two():
    batch = forest(4000, n_nodes=12, n_colours=3, max_depth=4, root_share=0.3, generator=seeded())
    share = ((batch.depth == 0).sum().item() / 4000 - 2) / 10
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 40_000)


def test_parents_are_drawn_evenly_from_the_earlier_nodes():
    """Two nodes below two roots share a root half the time."""
    batch = forest(10_000, n_nodes=4, n_colours=2, max_depth=1, root_share=0.0, generator=seeded())
    below = batch.answer[batch.depth == 1].view(-1, 2)
    assert abs((below[:, 0] == below[:, 1]).float().mean() - 0.5) < 4 * 0.5 / 100


@pytest.mark.parametrize(
    "draw",
    [
        lambda g: forest(6000, n_nodes=10, n_colours=4, max_depth=5, generator=g),
        lambda g: two_chains(6000, length=5, n_colours=4, generator=g),
    ],
    ids=["forest", "two_chains"],
)
def test_neither_label_nor_position_tells_depth_or_colour(draw):
    batch = draw(seeded())
    position = torch.arange(10).expand_as(batch.node)
    for where in (batch.node, position):
        for about in (batch.depth, batch.colour):
            for value in about.unique():
                chosen = about == value
                mean = where[chosen].float().mean()
                # Places are uniform on 0 … 9, whose variance is (10² − 1) / 12.
                assert abs(mean - 4.5) < 4.5 * math.sqrt(99 / 12 / chosen.sum())


def test_the_parents_fact_stands_anywhere():
    batch = two_chains(5000, length=4, n_colours=2, generator=seeded())
    parent_at = batch.node.argsort(1).gather(1, batch.parent)
    later = (parent_at > torch.arange(8))[batch.depth > 0].float().mean()
    assert abs(later - 0.5) < 4 * 0.5 / math.sqrt(5000)


def test_questions_repeat_with_their_seed_and_leave_the_global_generator_alone():
    for draw in (
        lambda g: forest(8, n_nodes=9, n_colours=3, max_depth=4, generator=g),
        lambda g: two_chains(8, length=5, n_colours=3, generator=g),
    ):
        before = torch.get_rng_state()
        first, again, other = draw(seeded(1)), draw(seeded(1)), draw(seeded(2))
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        assert not torch.equal(first.node, other.node)


def test_a_batch_of_forests_takes_milliseconds():
    def seconds():
        start = time.process_time()
        forest(256, n_nodes=20, n_colours=4, max_depth=5, generator=seeded())
        return time.process_time() - start

    assert min(seconds() for _ in range(10)) < 0.03


FOREST = dict(n_nodes=6, n_colours=3, max_depth=2)


@pytest.mark.parametrize(
    "draw, bad, words",
    [
        (forest, dict(FOREST, batch_size=0), "batch_size is 0; it must be at least 1"),
        (forest, dict(FOREST, batch_size=1, n_nodes=1), "n_nodes is 1; it must be at least 2"),
        (forest, dict(FOREST, batch_size=1, n_colours=1), "n_colours is 1; it must be at least 2"),
        (forest, dict(FOREST, batch_size=1, max_depth=-1), "max_depth is -1; it must be at least 0"),
        (forest, dict(FOREST, batch_size=1, root_share=1.5), "root_share is 1.5; it must be between 0 and 1"),
        (forest, dict(FOREST, batch_size=1, root_share=math.nan), "root_share is nan"),
        (
            forest,
            dict(FOREST, batch_size=1, n_labels=5),
            "n_labels is 5; it must be at least the number of nodes, 6",
        ),
        (two_chains, dict(batch_size=0, length=3, n_colours=3), "batch_size is 0"),
        (two_chains, dict(batch_size=1, length=0, n_colours=3), "length is 0; it must be at least 1"),
        (two_chains, dict(batch_size=1, length=3, n_colours=1), "n_colours is 1; it must be at least 2"),
        (two_chains, dict(batch_size=1, length=3, n_colours=2, n_labels=5), "n_labels is 5"),
    ],
)
def test_impossible_questions_are_refused_by_name(draw, bad, words):
    with pytest.raises(ValueError, match=words):
        draw(**bad, generator=seeded())


@given(n_nodes=st.integers(1, 70), seed=st.integers(0, 999))
@settings(max_examples=40)
def test_climb_agrees_with_a_walk(n_nodes, seed):
    score = torch.rand(3, n_nodes, generator=seeded(seed))
    parent = (score * (torch.arange(n_nodes) + 1)).long()  # each at or before its node
    root, depth = climb(parent)
    for row in range(3):
        for node in range(n_nodes):
            assert walk(parent[row].tolist(), node) == (root[row, node], depth[row, node])


@pytest.mark.parametrize("n_nodes", [1, 2, 3, 16, 17, 33, 64, 65])
def test_climb_reaches_the_far_end_of_a_chain(n_nodes):
    root, depth = climb(torch.arange(n_nodes).sub(1).clamp(min=0)[None])
    assert root[0].tolist() == [0] * n_nodes and depth[0].tolist() == list(range(n_nodes))


def test_the_reference_text_is_real_large_and_free_of_repeats():
    text = reference_text()
    assert len(text.encode()) > 1_200_000
    assert 'The "while" statement' in text
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n") if p.strip()]
    assert len(paragraphs) == len(set(paragraphs))


def test_the_reference_text_is_the_same_in_another_process_and_runs_no_module():
    code = (
        "import hashlib, sys; from mythoslab.questions import reference_text; "
        "digest = hashlib.sha256(reference_text().encode()).hexdigest(); "
        "print(digest, 'antigravity' in sys.modules, 'this' in sys.modules)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1] and runs[0].split()[1:] == ["False", "False"]


def test_the_reference_text_needs_only_files_that_parse(tmp_path, monkeypatch):
    (tmp_path / "good.py").write_text('"""Kept."""\ndef f():\n    """Kept as well."""\n', encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b'"""caf\xe9"""')
    (tmp_path / "broken.py").write_text('"""Lost."""\ndef f(:\n', encoding="utf-8")
    (tmp_path / "raises.py").write_text('"""Read, not run."""\nraise SystemExit\n', encoding="utf-8")
    (tmp_path / "tkinter").mkdir()
    (tmp_path / "tkinter" / "optional.py").write_text('"""Not everywhere."""', encoding="utf-8")
    module = sys.modules[split.__module__]
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    documents = reference_documents.__wrapped__()
    assert list(documents[-2:]) == ["Kept.\n\nKept as well.", "Read, not run."]


def runs(text, length):
    text = " ".join(text.lower().split())
    return {text[i : i + length] for i in range(len(text) - length + 1)}


def test_held_out_reference_text_shares_no_passage_with_training_text():
    training, held_out = split(reference_documents())
    assert runs(held_out, PASSAGE).isdisjoint(runs(training, PASSAGE))
    assert runs(held_out, 24) & runs(training, 24)
    assert 0.01 < len(held_out) / len(training) < 0.20


words = st.sampled_from("alpha beta gamma delta epsilon zeta eta theta iota kappa".split())
paragraph = st.lists(words, min_size=1, max_size=25).map(" ".join)
document = st.lists(paragraph, min_size=1, max_size=6).map("\n\n".join)


@given(documents=st.lists(document, min_size=2, max_size=12), quoted=st.integers(0, 99))
@settings(max_examples=150)
def test_no_text_leaks_however_often_it_quotes_itself(documents, quoted):
    documents += [documents[quoted % len(documents)].upper().replace(" ", "\n") + " and more"]
    try:
        training, held_out = split(documents, held_out_share=0.4)
    except ValueError:
        return
    assert training and held_out
    assert runs(held_out, PASSAGE).isdisjoint(runs(training, PASSAGE))


def test_what_closes_up_after_a_removal_does_not_leak_either():
    """Without the middle paragraph, the first and the third spell a passage of the training text."""
    first, third = "the quick brown fox of the first half", "jumps over the lazy dog of the second"
    leak = "This sentence stands in both documents, letter by letter, and so it has to go."
    training = f"{first} {third}\n\nAs they say: {leak}"
    for salt in range(1000):
        held_out = f"Number {salt}.\n\n{first}\n\n{leak}\n\n{third}"
        if split([training, held_out], 1e-9)[0] == training:
            break
    _, kept = split([training, held_out], 1e-9)
    assert kept == f"Number {salt}.\n\n{third}"


def test_a_document_stays_on_its_side_when_others_come_and_go():
    documents = [f"Document {i} says something of its own, namely {i * i}." for i in range(200)]
    held_out = set(split(documents)[1].split("\n\n\n"))
    fewer = set(split(documents[::-1][:150])[1].split("\n\n\n"))
    assert fewer == held_out.intersection(documents[50:])


def test_a_single_text_is_split_by_paragraph_or_line_and_keeps_its_form():
    for joint in ("\n\n", "\n"):
        lines = [f"line {i} of a text, different from line {i + 7 * i}" for i in range(100)]
        training, held_out = split(joint.join(lines))
        assert sorted(training.split(joint) + held_out.split(joint)) == sorted(lines)


@pytest.mark.parametrize("joint", ["\n\n", "\n"])
def test_a_single_text_keeps_what_it_says_twice(joint):
    text = joint.join(f"{word}{joint}    return 1" for word in "one two three four five six seven eight".split())
    training, held_out = split(text)
    assert sorted(training.split(joint) + held_out.split(joint)) == sorted(text.split(joint))
    assert set(training.split(joint)).isdisjoint(held_out.split(joint))


@pytest.mark.parametrize("text", ["", "  \n\n ", "one line only", "same\n\nsame\n\nsame"])
def test_a_text_that_cannot_be_split_is_refused(text):
    with pytest.raises(ValueError, match="different paragraphs or lines"):
        split(text)


def test_a_split_without_a_held_out_or_a_training_side_is_refused():
    quote = "It is a truth universally acknowledged that a passage of this length is known."
    with pytest.raises(ValueError, match="repeats itself"):
        split([quote + " One.", quote + " Two."])
    with pytest.raises(ValueError, match="no training text is left"):
        split(["first", "second"], held_out_share=0.999999)
    for share in (0, 1, math.nan):
        with pytest.raises(ValueError, match="held_out_share"):
            split(["first", "second"], share)


def test_repeated_paragraphs_stay_where_they_come_first():
    assert without_repeats(["a\n\nb\n\na", "b", "c\n \n  b  \n\nd"]) == ["a\n\nb", "c\n\nd"]


def test_own_text_is_read_or_refused_in_one_sentence(tmp_path):
    good, empty, latin = (tmp_path / name for name in ("good.txt", "empty.txt", "latin.txt"))
    good.write_bytes("\ufeffnaïve text".encode())
    empty.write_text(" \n")
    latin.write_bytes("naïve".encode("latin-1"))
    assert read_text(good) == "naïve text"
    missing = tmp_path / "missing.txt"
    for path, words in ((empty, "is empty"), (latin, "see byte 2"), (missing, "cannot be read")):
        with pytest.raises(ValueError, match=words) as error:
            read_text(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(split(reference_documents())[0][:300_000], vocab_size=700)


confusing = st.sampled_from(["<|endoftext|>", "</s>", "Ġ", "Ċ", "👩‍👩‍👧", "\r\n", " "])


@given(text=st.text() | st.lists(confusing).map("".join))
@settings(max_examples=200)
def test_any_text_comes_back_exactly(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokens.dtype == torch.int64 and tokens.dim() == 1
    assert tokenizer.decode(tokens) == tokenizer.decode(tokens.tolist()) == text


def test_every_token_is_used_for_at_least_one_byte(tokenizer):
    text = reference_text()[:50_000]
    tokens = tokenizer.encode(text)
    assert tokenizer.vocab_size == 700
    assert len(tokens) < len(text.encode()) / 2
    assert tokens.min() >= 0 and tokens.max() < 700


def test_the_same_text_gives_the_same_tokenizer_in_every_process():
    code = (
        "from mythoslab.questions import Tokenizer, reference_text; "
        "print(Tokenizer.train(reference_text()[:100_000], vocab_size=500).bpe.to_str())"
    )
    one, two = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)
    )
    assert one == two and len(json.loads(one)["model"]["merges"]) == 500 - 256


def test_a_saved_tokenizer_is_json_and_loads_to_the_same(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert len(json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]) == 700
    text = reference_text()[1000:3000]
    assert torch.equal(Tokenizer.load(path).encode(text), tokenizer.encode(text))


def test_what_is_no_tokenizer_or_no_text_is_refused(tokenizer, tmp_path):
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"version": "1.0"')
    for path in (damaged, tmp_path / "missing.json"):
        with pytest.raises(ValueError, match="is no tokenizer"):
            Tokenizer.load(path)
    with pytest.raises(ValueError, match="vocab_size is 255"):
        Tokenizer.train("text", vocab_size=255)
    with pytest.raises(ValueError, match="half a character at position 2"):
        tokenizer.encode("ab\ud800")
    for token in (-1, 700):
        with pytest.raises(ValueError, match=f"a token id is {token}"):
            tokenizer.decode([token])


@given(
    n_more=st.integers(1, 70),
    context_length=st.integers(1, 20),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 999),
)
@settings(max_examples=100)
def test_windows_cover_the_text_evenly_and_targets_come_next(n_more, context_length, batch_size, seed):
    n_tokens = context_length + n_more
    options = dict(batch_size=batch_size, context_length=context_length)
    batches = text_batches(torch.arange(n_tokens), **options, generator=seeded(seed))
    again = text_batches(torch.arange(n_tokens), **options, generator=seeded(seed))
    starts = []
    for _ in range(20):
        inputs, targets = next(batches)
        assert inputs.shape == targets.shape == (batch_size, context_length)
        assert torch.equal(targets, inputs + 1)
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(context_length))
        assert torch.equal(inputs, next(again)[0])
        starts += inputs[:, 0].tolist()
    while starts:  # epoch by epoch: windows end to end, none twice, none missing
        offset = starts[0] % context_length
        epoch = range(offset, n_tokens - context_length, context_length)
        drawn, starts = starts[: len(epoch)], starts[len(epoch) :]
        assert len(set(drawn)) == len(drawn) and set(drawn) <= set(epoch)


def test_over_many_epochs_every_token_is_read_and_predicted():
    batches = text_batches(torch.arange(30), batch_size=2, context_length=7, generator=seeded())
    drawn = [next(batches) for _ in range(200)]
    assert {t for inputs, _ in drawn for t in inputs.flatten().tolist()} == set(range(29))
    assert {t for _, targets in drawn for t in targets.flatten().tolist()} == set(range(1, 30))


@pytest.mark.parametrize(
    "n_tokens, options, words",
    [
        (
            8,
            dict(batch_size=1, context_length=8),
            "number of tokens is 8; it must be more than context_length, 8",
        ),
        (0, dict(batch_size=1, context_length=1), "number of tokens is 0"),
        (9, dict(batch_size=0, context_length=1), "batch_size is 0"),
        (9, dict(batch_size=1, context_length=0), "context_length is 0"),
    ],
)
def test_impossible_batches_are_refused_before_the_first_one(n_tokens, options, words):
    with pytest.raises(ValueError, match=words):
        text_batches(torch.arange(n_tokens), **options, generator=seeded())


def test_guessing_bytes_evenly_costs_eight_bits_per_byte():
    assert math.isclose(bits_per_byte(math.log(256), n_tokens=1000, n_bytes=1000), 8)
    assert math.isclose(bits_per_byte(math.log(2048), n_tokens=100, n_bytes=400), 11 / 4)
    with pytest.raises(ValueError, match="n_bytes is 0"):
        bits_per_byte(1.0, 1, 0)


learners = partial(edited, "questions")

MISTAKES = {
    "climb": [
        ("On a chain of 5000 nodes", ("(n_nodes - 1).bit_length()", "12")),
        ("link by link", ("(n_nodes - 1).bit_length()", "math.isqrt(n_nodes) + 1")),
        (
            "in the second row",
            (
                "for _ in range((n_nodes - 1).bit_length()):",
                "while not torch.equal(reached[0], reached[0].gather(0, reached[0])):",
            ),
        ),
        ("come to an end", ("for _ in range((n_nodes - 1).bit_length()):", "while True:")),
        ("link by link", ("(n_nodes - 1).bit_length()", "n_nodes")),
        ("begin with .long()", (".long()", "")),
        ("has changed", ("depth = (parent", "parent[:, -1] += 1\n    depth = (parent")),
        ("two tensors", ("return reached, depth", "return depth")),
        ("swapped", ("return reached, depth", "return depth, reached")),
        ("counts links, not nodes", ("return reached, depth", "return reached, depth + 1")),
        ("not the parent", ("return reached, depth", "return parent, depth")),
        (
            "forest of its own",
            ("reached = parent\n", "parent = parent[:1].expand_as(parent)\n    reached = parent\n"),
        ),
        ("log2(n) rounds", ("(n_nodes - 1).bit_length()", "2")),
        ("start its depth at 0", ("(parent != torch.arange(n_nodes, device=parent.device)).long()", "torch.ones_like(parent)")),
        ("not all arrive", ("(n_nodes - 1).bit_length()", "5")),
        (
            "not 1",
            (
                "depth = depth + depth.gather(1, reached)",
                "depth = depth + (reached != reached.gather(1, reached)).long()",
            ),
        ),
        (
            "before you move the pointer",
            (
                "depth = depth + depth.gather(1, reached)\n        reached = reached.gather(1, reached)",
                "reached = reached.gather(1, reached)\n        depth = depth + depth.gather(1, reached)",
            ),
        ),
        (
            "before you point further",
            (
                "depth = depth + depth.gather(1, reached)\n        reached = reached.gather(1, reached)",
                "reached = reached.gather(1, reached)\n        depth = depth + depth.gather(1, reached) + 1",
            ),
        ),
    ],
    "two_chains": [
        ("no sizes of your own", ("torch.rand(batch_size, n_colours", "torch.rand(batch_size, 4")),
        ("not a copy of it", ("draw = dict", "copied = torch.Generator()\n    copied.set_state(generator.get_state())\n    generator = copied\n    draw = dict")),
        (
            "ForestBatch",
            ("return _shuffled_facts(parent, colour, n_labels, generator)", "return parent, colour"),
        ),
        (
            "1 roots and not two",
            ("torch.cat([chain, chain + length])", "torch.arange(2 * length).sub(1).clamp(min=0)"),
        ),
        ("they count from 1", ("[:, :2] + 1", "[:, :2]")),
        ("same colour", (".argsort(1)[:, :2] + 1", ".argsort(1)[:, :1] + 1")),
        (
            "no root show a colour",
            ("colour[:, [0, length]] =", "colour[:, 1:] = 1\n    colour[:, [0, length]] ="),
        ),
        ("deepest node", ("sub(1).clamp(min=0)  #", "sub(1).clamp(min=0) * 0  #")),
        (
            "anew for each list",
            ("torch.rand(batch_size, n_colours, **draw)", "torch.rand(1, n_colours, **draw)"),
        ),
        (
            "nothing from the global",
            ("torch.rand(batch_size, n_colours, **draw)", "torch.rand(batch_size, n_colours)"),
        ),
        ("pass n_labels on", ("n_labels, generator)\n", "None, generator)\n")),
        ("length=0", ('require(length >= 1, "length", length, "at least 1")', "")),
        (
            "n_colours=1",
            ('require(n_colours >= 2, "n_colours", n_colours, "at least 2")', "n_colours = max(n_colours, 2)"),
        ),
    ],
    "text_batches": [
        ("A batch from a text of one window", ("while len(starts) < batch_size", "if len(starts) < batch_size")),
        ("the places of the tokens", ("tokens[starts[:batch_size, None] + window]", "starts[:batch_size, None] + window")),
        ("Another seed gave the same batches", ("def forever():", "generator = torch.Generator().manual_seed(0)\n\n    def forever():")),
        ("Some offsets below context_length never come", ("torch.randint(min(context_length, end)", "torch.randint(max(1, min(context_length, end) - 1)")),
        ("should be int64", ("yield windows[:, :-1], windows[:, 1:]", "yield windows[:, :-1].int(), windows[:, 1:].int()")),
        ("inputs themselves", ("windows[:, 1:]", "windows[:, :-1]")),
        (
            "one token earlier",
            ("yield windows[:, :-1], windows[:, 1:]", "yield windows[:, 1:], windows[:, :-1]"),
        ),
        ("batches end", ("while True", "for _ in range(3)")),
        (
            "twice within one epoch",
            ("epoch = torch.arange(offset, end, context_length)", "epoch = torch.arange(offset, end)"),
        ),
        ("order of the text", ("epoch[torch.randperm(len(epoch), generator=generator)]", "epoch")),
        ("same places", ("torch.randint(min(context_length, end), (), generator=generator).item()", "0")),
        (
            "nothing from the global",
            ("torch.randperm(len(epoch), generator=generator)", "torch.randperm(len(epoch))"),
        ),
        (
            "holds exactly one window",
            ("len(tokens) - context_length  #", "len(tokens) - context_length - 1  #"),
        ),
        ("are lost", ("starts = torch.cat([starts, epoch", "starts = torch.cat([starts[:0], epoch")),
        ("check outside of it", ("return forever()", "yield from forever()")),
    ],
    "bits_per_byte": [
        ("in its last digits", ("math.log(2)", "0.69315")),
        ("Return a float", ("nats_per_token / math.log(2) * n_tokens / n_bytes", "torch.tensor(nats_per_token / math.log(2) * n_tokens / n_bytes)")),
        ("n_bytes=-1 should raise", ("n_bytes >= 1", "n_bytes != 0")),
        ("still in nats", (" / math.log(2)", "")),
        ("multiply by ln 2", ("/ math.log(2)", "* math.log(2)")),
        ("bits per token", (" * n_tokens / n_bytes", "")),
        ("wrong way round", ("* n_tokens / n_bytes", "* n_bytes / n_tokens")),
        ("The mean loss is per token", (" * n_tokens", "")),
        ("do not take its log2", ("nats_per_token / math.log(2)", "math.log2(nats_per_token)")),
        ("n_bytes=0", ('require(n_bytes >= 1, "n_bytes", n_bytes, "at least 1")', "n_bytes = max(n_bytes, 1)")),
    ],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_right_code_passes_its_check(name, capsys):
    right = learners(name)
    assert check(right) is right
    assert capsys.readouterr().out == f"{name}: right.\n"


@pytest.mark.parametrize(
    "name, cause, change", [(name, cause, change) for name in MISTAKES for cause, change in MISTAKES[name]]
)
def test_checks_name_the_cause_of_a_mistake(name, cause, change, capsys):
    assert check(learners(name, change)) is getattr(reference("questions"), name)
    line = capsys.readouterr().out
    assert line.startswith(f"{name}: not yet. ") and cause in line and line.count("\n") == 1


@pytest.mark.parametrize(
    "draw, cause",
    [
        (
            "torch.rand(batch_size, n_labels, **draw).argsort(1)[:, :n_nodes]",
            "A node's label tells its depth",
        ),
        ("torch.rand(batch_size, n_nodes, **draw).argsort(1)", "position in the list tells its depth"),
    ],
)
def test_facts_that_are_not_shuffled_are_named(draw, cause, capsys):
    unshuffled = learners("_shuffled_facts", (draw, "torch.arange(n_nodes).repeat(batch_size, 1)"))
    two_chains = learners("two_chains")
    two_chains.__globals__["_shuffled_facts"] = unshuffled
    assert check(two_chains) is reference("questions").two_chains
    assert cause in capsys.readouterr().out
