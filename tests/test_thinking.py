"""mythoslab.thinking: only the passes that are needed, the same numbers, writing with cache and early exit, and its checks."""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mythoslab import thinking
from mythoslab.classroom.checks import reference
from mythoslab.model import CHOICES, Mythos, MythosConfig
from mythoslab.model import generate as generate_by_passes
from mythoslab.questions import Tokenizer
from mythoslab.thinking import (
    RULES,
    Gathered,
    Reader,
    Stopper,
    Written,
    generate,
    nucleus,
    plain_loop,
    strip_html,
    strip_terminal,
    think,
    write_text,
)
from tests.mistakes import edited, mistakes_are_named

SMALL = MythosConfig(vocab_size=31, dim=16, n_heads=4, hidden_dim=24, n_passes=2, context_length=24, halting="settled")
COUNTS = torch.tensor([11, 3, 7, 11, 1])

configs = st.builds(
    lambda **kinds: replace(SMALL, n_kv_heads=2, expert_dim=8, n_routed_experts=4, lora_rank=2, **kinds),
    n_prelude=st.integers(0, 2),
    n_core=st.integers(1, 2),
    n_coda=st.integers(0, 2),
    core_positions=st.sampled_from(CHOICES["core_positions"]),
    token_shift=st.booleans(),
    attention=st.sampled_from(("mha", "gqa", "mla")),
    kv_lora_rank=st.just(6),
    qk_nope_head_dim=st.just(3),
    qk_rope_head_dim=st.just(2),
    v_head_dim=st.sampled_from((4, 5)),
    qk_norm=st.booleans(),
    ffn=st.sampled_from(CHOICES["ffn"]),
    injection=st.sampled_from(CHOICES["injection"]),
    pass_adapter=st.sampled_from(CHOICES["pass_adapter"]),
)
rules = st.sampled_from([("settled", 0.6), ("accumulate", 0.99), ("act", 0.99), ("ponder", 0.5), ("converge", 0.4), ("none", None)])


def lively(config, seed=0):
    """A model in float64 whose tokens differ, and stop after different numbers of passes."""
    torch.manual_seed(seed)
    model = Mythos(config).double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 1.5) if "halting" in name else weight.mul_(1.5)
    return model


@settings(max_examples=40)
@given(configs, rules, st.integers(0, 99))
def test_only_the_passes_that_are_needed_give_the_numbers_of_all_passes(config, rule, seed):
    model, tokens = lively(config, seed), torch.randint(31, (5, 11))
    thought = think(model, tokens, max_passes=5, rule=rule[0], threshold=rule[1], counts=COUNTS)
    real = torch.arange(11) < COUNTS.unsqueeze(1)
    together = think(model, tokens, max_passes=5, rule=rule[0], threshold=rule[1])  # none filled up: gathered only when some stop
    with torch.inference_mode():
        slowly = model(tokens, together.passes)
    assert torch.allclose(together.logits, slowly.logits, atol=1e-9)
    if rule[0] == "settled":  # each stops where its head is sure for the first time
        sure = slowly.halt_prob > RULES["settled"] if rule[1] is None else slowly.halt_prob > rule[1]
        assert torch.equal(together.passes, torch.where(sure.any(0), sure.int().argmax(0) + 1, 5))
    assert (thought.passes[real] >= 1).all() and (thought.passes <= 5).all() and (thought.passes[~real] == 0).all()
    with torch.inference_mode():
        masked = model(tokens, thought.passes.clamp(min=1)).logits
    assert torch.allclose(thought.logits[real], masked[real], atol=1e-9)


@settings(max_examples=25)
@given(configs, rules, st.integers(0, 99))
def test_a_sequence_thinks_and_writes_the_same_alone_and_in_a_batch(config, rule, seed):
    model, tokens = lively(config, seed), torch.randint(31, (5, 11))
    options = dict(max_passes=4, rule=rule[0], threshold=rule[1])
    together = think(model, tokens, counts=COUNTS, **options)
    prompts = [row[:count] for row, count in zip(tokens, COUNTS.tolist())]
    drawing = dict(temperature=0.9, top_k=20, top_p=0.9, seed=3)
    written = list(generate(model, prompts, 5, **options, **drawing))
    for number, prompt in enumerate(prompts):
        alone = think(model, prompt.unsqueeze(0), **options)
        assert torch.equal(alone.passes[0], together.passes[number, : len(prompt)])
        assert torch.allclose(alone.logits[0], together.logits[number, : len(prompt)], atol=1e-9)
        steps = list(generate(model, prompt, 5, **options, **drawing))
        assert [step[0] for step in steps] == [step[number] for step in written]


@settings(max_examples=25)
@given(configs, rules, st.integers(0, 99))
def test_writing_with_a_cache_thinks_what_reading_anew_thinks(config, rule, seed):
    model, text = lively(config, seed), torch.randint(31, (4,)).tolist()
    options = dict(max_passes=4, rule=rule[0], threshold=rule[1])
    for (written,) in generate(model, torch.tensor(text), 8, temperature=0, **options):
        anew = think(model, torch.tensor([text]), **options)
        assert written.token == anew.logits[0, -1].argmax() and written.passes == anew.passes[0, -1]
        text.append(written.token)


def test_slots_are_filled_as_deep_as_a_token_has_thought_so_far():
    model, tokens = lively(SMALL), torch.randint(31, (2, 12), generator=torch.Generator().manual_seed(0))
    reader, deepest, opened = Reader(model, 2, max_passes=6, rule="converge", threshold=0.4), 1, set()
    for some in (tokens[:, :4], *tokens[:, 4:].split(1, 1)):
        deepest = max(deepest, int(reader.read(some).passes.max()))
        assert reader.n_open == deepest
        for cache in reader.cache.core:
            assert not cache.memory[deepest:].any() and cache.memory[:deepest, :, : int(reader.lengths.max())].abs().sum(-1).all()
        opened.add(deepest)
    assert len(opened) > 1  # some were opened after tokens had been read


def test_reading_in_the_midst_of_training_counts_no_load_and_goes_on_training():
    model = lively(replace(SMALL, ffn="moe", expert_dim=8, n_routed_experts=4)).train()
    think(model, torch.randint(31, (2, 9)), max_passes=4)
    plain_loop(model, torch.randint(31, (2, 9)), 4)
    list(generate(model, torch.randint(31, (5,)), 3, max_passes=4))
    assert all(part.training for part in model.modules())
    assert not model.core.blocks[0].ffn.load_by_pass.any()


def test_without_a_rule_every_token_has_all_passes_and_writes_as_in_notebook_08():
    torch.manual_seed(0)
    model = Mythos(SMALL).eval()
    thought = think(model, torch.randint(31, (2, 9)), max_passes=3, rule="none")
    assert (thought.passes == 3).all()
    ours = [step[0].token for step in generate(model, torch.tensor([1, 2]), 9, max_passes=2, rule="none", temperature=0)]
    assert ours == list(generate_by_passes(model, torch.tensor([1, 2]), 9, temperature=0))


@settings(max_examples=10)
@given(configs, st.integers(1, 5), st.integers(0, 99))
def test_the_plain_loop_is_the_model_with_one_number_of_passes(config, n_passes, seed):
    model, tokens = lively(config, seed), torch.randint(31, (3, 9))
    at = torch.rand(3, 9) < 0.4
    with torch.inference_mode():
        logits = model(tokens, n_passes).logits
    assert torch.allclose(plain_loop(model, tokens, n_passes), logits, atol=1e-9)
    assert torch.allclose(plain_loop(model, tokens, n_passes, at=at), logits[at], atol=1e-9)


def test_tokens_that_stop_are_not_computed():
    model = lively(SMALL)
    rows = []
    one_pass = model.core.one_pass
    model.core.one_pass = lambda state, *rest: rows.append(state.shape[0] * state.shape[1]) or one_pass(state, *rest)
    thought = think(model, torch.randint(31, (4, 12)), max_passes=6, rule="settled", threshold=0.6)
    assert len(rows) == thought.passes.max() and rows[0] == 48
    thinking = [(thought.passes > number).sum(1) for number in range(len(rows))]
    assert rows == [int((some > 0).sum() * some.max()) for some in thinking] and min(rows) < 48


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.integers(1, 200))
def test_rows_are_grouped_so_that_no_cut_would_save_much(counts, worth):
    counts = torch.tensor(counts)
    groups = list(thinking._alike(counts, worth))
    assert sorted(torch.cat(groups).tolist() if groups else []) == torch.where(counts > 0)[0].tolist()
    for group in groups:
        assert group.tolist() == sorted(group.tolist())  # a whole batch is in order, and not copied
        some = counts[group].sort(descending=True).values
        saved = [(some[0] - some[cut]) * (len(some) - cut) for cut in range(len(some))]
        assert max(saved) < worth


@pytest.mark.parametrize("rule", [("settled", 0.6), ("act", 0.99)])
def test_rows_in_groups_think_what_they_think_together(monkeypatch, rule):
    model, tokens = lively(SMALL), torch.randint(31, (5, 11))
    kind = dict(max_passes=5, rule=rule[0], threshold=rule[1], counts=COUNTS)
    together = think(model, tokens, **kind)
    calls, one_pass = [], model.core.one_pass
    model.core.one_pass = lambda *given: calls.append(1) or one_pass(*given)
    monkeypatch.setattr(Reader, "worth", 1)
    apart = think(model, tokens, **kind)
    assert len(calls) > together.passes.max()
    assert torch.equal(apart.passes, together.passes)
    real = torch.arange(11) < COUNTS.unsqueeze(1)
    assert torch.allclose(apart.logits[real], together.logits[real], atol=1e-9)


def test_a_full_context_forgets_its_older_half_and_goes_on():
    model = lively(SMALL)
    text = torch.randint(31, (20,)).tolist()
    steps = [step[0] for step in generate(model, torch.tensor(text), 12, max_passes=3, temperature=0)]
    window = list(text)
    for number, written in enumerate(steps):
        if number and len(window) > 24:
            window = window[-12:]
        anew = think(model, torch.tensor([window]), max_passes=3)
        assert written.token == anew.logits[0, -1].argmax()
        window.append(written.token)
    assert len(steps) == 12


def test_a_full_context_of_one_sequence_changes_nothing_for_the_others():
    model = lively(SMALL)
    prompts = [torch.randint(31, (count,)) for count in (22, 15, 3)]
    together = list(generate(model, prompts, 14, max_passes=3, seed=2))
    for number, prompt in enumerate(prompts):
        alone = list(generate(model, prompt, 14, max_passes=3, seed=2))
        assert [step[0] for step in alone] == [step[number] for step in together]


def test_logits_can_be_had_for_some_tokens_alone():
    model, tokens = lively(SMALL), torch.randint(31, (5, 11))
    at = torch.rand(5, 11) < 0.3
    some, all_of_them = (think(model, tokens, max_passes=4, counts=COUNTS, at=where) for where in (at, None))
    assert torch.equal(some.passes, all_of_them.passes)
    assert torch.allclose(some.logits, all_of_them.logits[at], atol=1e-9)


def test_a_long_prompt_is_refused_or_trimmed_on_request():
    model, prompt = lively(SMALL), torch.randint(31, (30,))
    with pytest.raises(ValueError, match="prompt tokens is 30.*1 to 24.*trim"):
        generate(model, prompt, 3)
    trimmed = [step[0] for step in generate(model, prompt, 3, temperature=0, trim=True)]
    assert trimmed == [step[0] for step in generate(model, prompt[-24:], 3, temperature=0)]


def test_the_seed_decides_and_nothing_else():
    model, prompt = lively(SMALL), torch.tensor([1, 2, 3])

    def written(seed):
        return [step[0].token for step in generate(model, prompt, 12, seed=seed, temperature=2.0)]

    assert written(1) == written(1) != written(2)


@pytest.mark.parametrize(
    "options, named",
    [
        (dict(max_passes=0), "max_passes is 0"),
        (dict(rule="soon"), "rule is 'soon'.*settled"),
        (dict(threshold=0.0), "threshold is 0.0"),
        (dict(max_passes=2.5), "max_passes is 2.5; it must be a whole number"),
        (dict(n_new=-1), "n_new is -1"),
        (dict(n_new=2.5), "n_new is 2.5; it must be a whole number"),
        (dict(tokens=torch.zeros(2, 3, dtype=torch.long)), r"shape of a prompt is \(2, 3\).*a list"),
        (dict(temperature=-1.0), "temperature is -1"),
        (dict(top_k=0), "top_k is 0"),
        (dict(top_k=2.5), "top_k is 2.5; it must be a whole number"),
        (dict(top_p=0.0), "top_p is 0"),
        (dict(top_p=1.1), "top_p is 1.1"),
        (dict(seed=-1), "seed is -1"),
        (dict(tokens=[]), "number of prompts is 0"),
        (dict(tokens=torch.zeros(0, dtype=torch.long)), "prompt tokens is 0"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(options, named):
    arguments = {"tokens": torch.tensor([1, 2]), "n_new": 3, **options}
    with pytest.raises(ValueError, match=named):
        reference("thinking").generate(lively(SMALL), **arguments)  # as for users, for whom no types are checked


WRONG_KINDS = """
import math
import subprocess
import sys
import torch
from mythoslab.model import Mythos, MythosConfig
from mythoslab.thinking import generate, think
model = Mythos(MythosConfig(vocab_size=8, dim=8, n_heads=2, hidden_dim=8, halting="settled"))
tokens = torch.zeros(3, 3, dtype=torch.long)
for call in (
    lambda: generate(model, [1, 2], 1),
    lambda: generate(model, tokens[0].float(), 1),
    lambda: generate(model, tokens[0] + 8, 1),
    lambda: generate(model, tokens[0], 1, seed=1.5),
    lambda: generate(model, tokens[0], 1, temperature=math.inf),
    lambda: think(model, tokens[0], max_passes=2),
    lambda: think(model, tokens - 1, max_passes=2),
    lambda: think(model, tokens, max_passes=2, counts=torch.full((3,), 2.5)),
    lambda: think(model, tokens, max_passes=2, at=tokens),
):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_the_wrong_kind_of_argument_is_named():
    """In a process of its own: here, tests check all types before the model can."""
    run = subprocess.run([sys.executable, "-c", WRONG_KINDS], capture_output=True, text=True)
    assert run.stdout.splitlines() == [
        "a prompt is 1; it must be a tensor of tokens",
        "the dtype of tokens is torch.float32; it must be torch.int64",
        "(the least, the greatest) of tokens is (8, 8); it must be of the vocabulary, 0 to 7",
        "seed is 1.5; it must be a whole number of at least 0, and below 2**63",
        "temperature is inf; it must be at least 0, and finite",
        "the shape of tokens is (3,); it must be (batch, position), with a token at least",
        "(the least, the greatest) of tokens is (-1, -1); it must be of the vocabulary, 0 to 7",
        "the dtype of counts is torch.float32; it must be one of whole numbers",
        "at is ((3, 3), torch.int64); it must be bool, of the shape of tokens, (3, 3)",
    ], run.stderr


def test_a_plain_loop_without_a_pass_is_refused():
    for count in (0, -3):
        with pytest.raises(ValueError, match=f"n_passes is {count}"):
            plain_loop(Mythos(SMALL), torch.ones(1, 2, dtype=torch.int64), count)


def test_a_strip_of_nothing_is_empty_and_one_of_unequal_lists_refused():
    assert strip_terminal([], []) == "" and "span" not in strip_html([], [])
    for strip in (strip_html, strip_terminal):
        with pytest.raises(ValueError):
            strip(["a", "b"], [1])


def test_it_thinks_under_autocast_too():
    model, tokens = Mythos(replace(SMALL, injection="linear")).eval(), torch.randint(SMALL.vocab_size, (2, 6))
    counts = torch.tensor([6, 3])
    with torch.autocast("cpu", torch.bfloat16):
        half = think(model, tokens, max_passes=3, rule="none", counts=counts)
    whole = think(model, tokens, max_passes=3, rule="none", counts=counts)
    assert torch.allclose(half.logits[1, :3].float(), whole.logits[1, :3], atol=0.05)


def test_a_rule_that_reads_a_head_is_refused_without_one():
    with pytest.raises(ValueError, match="'settled'.*no halting head"):
        think(Mythos(replace(SMALL, halting="none")), torch.zeros(1, 2, dtype=torch.long), max_passes=2, rule="settled")


@pytest.mark.parametrize("halting", CHOICES["halting"])
def test_the_rule_is_the_models_own_unless_another_is_given(halting):
    model, tokens = lively(replace(SMALL, halting=halting)), torch.randint(31, (2, 9))
    own, given = think(model, tokens, max_passes=6), think(model, tokens, max_passes=6, rule=halting)
    assert torch.equal(own.passes, given.passes) and torch.equal(own.logits, given.logits)
    most = max(step[0].passes for step in generate(model, tokens[0], 12))
    assert most == SMALL.n_passes if halting == "none" else 1 <= most <= 4 * SMALL.n_passes


@pytest.mark.parametrize("rule", ["settled", "accumulate", "ponder"])
def test_a_threshold_that_no_probability_reaches_is_refused(rule):
    with pytest.raises(ValueError, match="threshold is 1.5; it must be above 0 and below 1"):
        think(lively(SMALL), torch.zeros(1, 2, dtype=torch.long), max_passes=2, rule=rule, threshold=1.5)


@pytest.mark.parametrize("lengths", [(6, 6), (6, 3)])
def test_a_reader_names_what_its_memory_cannot_hold(lengths):
    reader, tokens = Reader(lively(SMALL), 2, max_passes=2, max_positions=8), torch.zeros(2, 6, dtype=torch.long)
    reader.read(tokens, torch.tensor(lengths))
    with pytest.raises(ValueError, match="number of tokens is 10; it must be at most 8, the context or max_positions"):
        reader.read(tokens[:, :4])


def test_a_reader_names_more_tokens_than_there_are_and_a_second_reading_that_was_not_planned():
    tokens = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="largest of counts is 4; it must be at most 3"):
        think(lively(SMALL), tokens, max_passes=2, counts=torch.tensor([4, 1]))
    reader = Reader(lively(SMALL), 2, max_passes=2, goes_on=False)
    reader.read(tokens)
    with pytest.raises(ValueError, match="goes_on is False; it must be true, to read more than once"):
        reader.read(tokens)


@pytest.mark.parametrize(
    "tokens, counts, named",
    [
        (torch.zeros(3, 4, dtype=torch.long), None, r"shape of tokens is \(3, 4\); it must be \(batch, position\), with a batch of 2"),
        (torch.zeros(4, dtype=torch.long), None, r"shape of tokens is \(4,\)"),
        (torch.zeros(2, 4, dtype=torch.long), torch.tensor([4]), r"shape of counts is \(1,\); it must be \(2,\)"),
    ],
)
def test_a_reader_names_tokens_and_counts_of_another_batch(tokens, counts, named):
    with pytest.raises(ValueError, match=named):
        reference("thinking").Reader(lively(SMALL), 2, max_passes=2).read(tokens, counts)


def test_a_context_of_one_token_can_be_written_in():
    model = lively(replace(SMALL, context_length=1))
    assert len(list(generate(model, torch.tensor([3]), 4))) == 4


def test_tokens_beyond_the_context_are_named():
    reader = Reader(lively(SMALL), max_passes=2)
    reader.read(torch.zeros(1, 20, dtype=torch.long))
    with pytest.raises(ValueError, match="number of tokens is 25.*24"):
        reader.read(torch.zeros(1, 5, dtype=torch.long))


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9), st.floats(0.01, 1.0))
def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p(numbers, top_p):
    logits = torch.tensor(numbers, dtype=torch.float64)
    left = nucleus(logits, top_p)
    chances, kept = logits.softmax(-1), left.isfinite()
    assert kept.any() and torch.equal(left[kept], logits[kept])
    assert chances[kept].sum() >= top_p - 1e-9
    assert chances[kept].sum() - chances[kept].min() < top_p + 1e-9
    assert not (~kept).any() or chances[~kept].max() <= chances[kept].min() + 1e-12


def test_the_nucleus_is_taken_of_the_chances_at_the_temperature(monkeypatch):
    seen = []
    monkeypatch.setattr(thinking, "nucleus", lambda row, top_p: seen.append(row) or row)
    for temperature in (1.0, 2.0):
        next(generate(lively(SMALL), torch.tensor([1, 2, 3]), 1, max_passes=3, temperature=temperature, top_p=0.5))
    assert torch.allclose(seen[0], 2 * seen[1])


def test_all_chances_leave_every_token_even_those_that_rounding_loses():
    logits = torch.tensor([30.0, 0.0, -5.0])
    assert torch.equal(nucleus(logits, 1.0), logits)


def test_text_comes_in_whole_characters_and_ends_before_a_stop_string():
    text = "ab cd ä ; ef gh " * 40
    tokenizer = Tokenizer.train(text, 280)
    model = lively(replace(SMALL, vocab_size=tokenizer.vocab_size))
    pieces = list(write_text(model, tokenizer, "ab cd", 12, seed=1))
    told = "".join(piece.text for piece in pieces)
    tokens = [step[0] for step in generate(model, tokenizer.encode("ab cd"), 12, seed=1)]
    assert told == tokenizer.decode([written.token for written in tokens])
    assert sum((piece.passes for piece in pieces), []) == [written.passes for written in tokens]
    stop = told[len(told) // 2 : len(told) // 2 + 2]
    cut = "".join(piece.text for piece in write_text(model, tokenizer, "ab cd", 12, seed=1, stop=[stop]))
    assert cut == told[: told.index(stop)]
    begun = told[-1] + "never"  # held back to the end, and then written with what it cost
    held = list(write_text(model, tokenizer, "ab cd", 12, seed=1, stop=[begun]))
    assert "".join(piece.text for piece in held) == told and all(piece.passes for piece in held)
    assert sum((piece.passes for piece in held), []) == [written.passes for written in tokens]


def test_a_stop_string_is_seen_before_a_character_that_was_not_finished(monkeypatch):
    tokenizer = Tokenizer.train("endä endö endü endß " * 60, 262)
    token = tokenizer.encode("endä").tolist()[0]
    assert tokenizer.decode([token]) == "end�"
    monkeypatch.setattr(thinking, "generate", lambda *given, **options: iter([(Written(token, 1),)]))
    told = [list(write_text(lively(SMALL), tokenizer, "e", 1, stop=stop)) for stop in ([], ["end"], ["nd"], ["x", "d�"])]
    assert told == [[("end�", [1])], [], [("e", [1])], [("en", [1])]]


@pytest.mark.parametrize("stop", ["end", [""], ["a", ""]])
def test_stop_strings_are_a_list_and_none_is_empty(stop):
    tokenizer = Tokenizer.train("ab cd " * 40, 280)
    with pytest.raises(ValueError, match="stop is .*a list of strings, none of them empty"):
        write_text(lively(replace(SMALL, vocab_size=tokenizer.vocab_size)), tokenizer, "ab", 3, stop=stop)


def test_strips_show_every_piece_and_darken_with_the_passes():
    pieces, passes = ["a<b", " c\n", "d"], [1, 5, 9]
    shown = strip_html(pieces, passes)
    assert "a&lt;b" in shown and "⏎<br>" in shown and 'title="passes: 5"' in shown
    light = [int(part.split("%)")[0]) for part in shown.split("85% ")[1:]]
    assert light == sorted(light, reverse=True) and len(set(light)) == 3
    assert "106%" not in strip_html(["x", "y"], [0, 2]) and "270" not in strip_terminal(["x", "y"], [0, 2])  # zero is as light as one
    assert all(piece in strip_terminal(pieces, passes) for piece in pieces)


# Mistakes that learners make, and a word of the sentence that names each.


class Fearless(Stopper):
    def stops(self, state, before, at):
        return ~super().stops(state, before, at) if self.rule == "settled" else super().stops(state, before, at)


class LooksBack(Stopper):
    def stops(self, state, before, at):
        return super().stops(before, state, at) if self.rule == "settled" else super().stops(state, before, at)


class Forgets(Stopper):
    def stops(self, state, before, at):
        verdict = super().stops(state, before, at)
        self.paid.zero_()
        return verdict


class AddsAll(Stopper):
    def stops(self, state, before, at):
        rule, self.rule = self.rule, "act" if self.rule == "accumulate" else self.rule
        verdict = super().stops(state, before, at)
        self.rule = rule
        return verdict


class PaysForAll(Stopper):
    def stops(self, state, before, at):
        verdict = super().stops(state, before, at)
        if self.rule == "accumulate":
            others = torch.ones_like(self.paid)
            others[at] = 0
            self.paid = self.paid + 0.3 * others
        return verdict


class AbsoluteChange(Stopper):
    def stops(self, state, before, at):
        if self.rule == "converge":
            return (state - before).norm(dim=-1) < self.threshold
        return super().stops(state, before, at)


class ZeroThreshold(Stopper):
    def __init__(self, model, rule, threshold, shape):
        super().__init__(model, rule, threshold or 0.5, shape)


class StopsAbove(Stopper):
    def stops(self, state, before, at):
        if self.rule in ("settled", "converge", "none"):
            return super().stops(state, before, at)
        super().stops(state, before, at)
        return self.paid[at] > self.threshold


class SettlesAt(Stopper):
    def stops(self, state, before, at):
        if self.rule == "settled":
            return self.model.halting.step(state, before) >= self.threshold
        return super().stops(state, before, at)


def keeps_ties(logits, top_p):
    left = nucleus(logits, top_p)
    return logits.masked_fill(logits < left[left.isfinite()].min(), -math.inf)


class AnyThreshold(Stopper):
    def __init__(self, model, rule, threshold, shape):
        super().__init__(model, rule, None, shape)
        self.threshold = self.threshold if threshold is None else threshold


class NoCarry(Gathered):
    def carry(self, pass_index, rows, places):
        pass


class CarriesAll(Gathered):
    def carry(self, pass_index, rows, places):
        self.slot(pass_index).copy_(self.slot(pass_index - 1))


class OneSlot(Gathered):
    def slot(self, pass_index):
        return self.memory[0]


class AllRows(Gathered):
    def write(self, new, pass_index):
        super().write(new, pass_index)
        return self.slot(pass_index)[:, : self.n_seen]


class NeverShares(Gathered):
    def slot(self, pass_index):
        return self.memory[pass_index % len(self.memory)] if len(self.memory) > 1 else self.memory[pass_index]


def too_few(logits, top_p):
    ordered, order = logits.sort(descending=True)
    out = ordered.softmax(-1).cumsum(-1) >= top_p
    return torch.empty_like(logits).scatter(-1, order, ordered.masked_fill(out, -math.inf))


def keeps_zeros(logits, top_p):
    left = nucleus(logits, top_p)
    return torch.where(left.isfinite(), left, 0.0)


def stays_sorted(logits, top_p):
    return nucleus(logits, top_p).sort(descending=True).values


def hands_back_chances(logits, top_p):
    return torch.where(nucleus(logits, top_p).isfinite(), logits.softmax(-1), -math.inf)


def takes_anything(logits, top_p):
    return nucleus(logits, min(max(top_p, 1e-6), 1.0))


class AlwaysOneHalf(Stopper):
    def __init__(self, model, rule, threshold, shape):
        super().__init__(model, rule, threshold, shape)
        if rule == "ponder":
            self.threshold = 0.5


class TellsNumbers(Stopper):
    def stops(self, *given):
        return super().stops(*given).float()


class TakesTurns(Gathered):
    def slot(self, pass_index):
        return self.memory[pass_index % len(self.memory)]


class PlacesOfTheFirst(Gathered):
    def carry(self, pass_index, rows, places):
        super().carry(pass_index, rows, places[:1].expand_as(places))


class OneDtype(Gathered):
    def write(self, new, pass_index):
        slot = self.slot(pass_index)
        slot[self.rows.unsqueeze(1), self.places] = new
        return slot[self.rows, : self.n_seen]


MISTAKES = [
    ("Stopper", AlwaysOneHalf, "'ponder' ignores its threshold"),
    ("Stopper", TellsNumbers, "True or False"),
    ("Gathered", TakesTurns, "later ones share the last"),
    ("Gathered", PlacesOfTheFirst, "What is kept is off"),
    ("Gathered", OneDtype, "may be in another dtype"),
    ("nucleus", edited("thinking", "nucleus", ("ordered.softmax(-1)", "ordered.exp() / ordered.exp().sum()")), "Large logits overflow"),
    ("nucleus", edited("thinking", "nucleus", ("require(0 < top_p <= 1,", "require(top_p != 0 and not top_p > 1,")), "top_p below 0"),
    ("nucleus", edited("thinking", "nucleus", ("- chances >= top_p", "- chances > top_p")), "you leave three"),
    ("Stopper", Fearless, "head is unsure"),
    ("Stopper", LooksBack, "wrong way round"),
    ("Stopper", Forgets, "forgets what earlier passes gave"),
    ("Stopper", AddsAll, "adds only what is left"),
    ("Stopper", PaysForAll, "are mixed up"),
    ("Stopper", AbsoluteChange, "divide by the size of the state"),
    ("Stopper", ZeroThreshold, "ask 'is None'"),
    ("Stopper", StopsAbove, "compare with >="),
    ("Stopper", SettlesAt, "compare with >."),
    ("nucleus", keeps_ties, "that are alike"),
    ("Stopper", AnyThreshold, "threshold of 1.5 for 'settled'"),
    ("Gathered", NoCarry, "carry copies what they showed before"),
    ("Gathered", CarriesAll, "copies earlier tokens too"),
    ("Gathered", OneSlot, "writes to the same slot"),
    ("Gathered", AllRows, "nobody thinks are returned too"),
    ("Gathered", NeverShares, "IndexError"),
    ("nucleus", too_few, "One token too few"),
    ("nucleus", keeps_zeros, "use minus infinity"),
    ("nucleus", stays_sorted, "sorted order"),
    ("nucleus", hands_back_chances, "Chances come back"),
    ("nucleus", takes_anything, "top_p=0 leaves no token"),
]

test_check_names_the_cause, test_check_accepts_the_finished_code = mistakes_are_named(
    MISTAKES, [Stopper, Gathered, nucleus]
)


def test_every_rule_has_a_threshold_and_the_reference_knows_it():
    assert set(RULES) >= {"settled", "accumulate", "act", "ponder", "converge", "none"}
    assert reference("thinking").RULES == RULES


@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_pieces_of_unequal_length_are_read_as_alone_up_to_the_end_of_the_context(attention):
    kinds = dict(kv_lora_rank=6, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=4)
    model = lively(replace(SMALL, attention=attention, token_shift=True, **kinds))
    tokens = torch.randint(31, (2, 24))
    reader = Reader(model, 2, max_passes=4, rule="settled", threshold=0.6)
    read = torch.tensor([0, 0])
    for counts in (torch.tensor([20, 3]), torch.tensor([3, 10]), torch.tensor([1, 6])):  # the first fills its context
        new = torch.stack([torch.nn.functional.pad(row, (0, 24))[start : start + 10 + 10] for row, start in zip(tokens, read)])
        thought, read = reader.read(new[:, : int(counts.max())], counts), read + counts
        for row in range(2):
            alone = think(model, tokens[row : row + 1, : read[row]], max_passes=4, threshold=0.6)
            got = thought.logits[row, : counts[row]]
            assert torch.allclose(got, alone.logits[0, -counts[row] :], atol=1e-9)


def test_a_sequence_without_a_new_token_is_named():
    with pytest.raises(ValueError, match="counts is 0"):
        think(lively(SMALL), torch.zeros(2, 3, dtype=torch.long), max_passes=2, counts=torch.tensor([3, 0]))
