"""mythoslab.training: yardsticks, graded questions, losses, a run that survives whatever happens, the commands, and the checks."""

import copy
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from safetensors.torch import load_file, save_file

from mythoslab import cli, training
from mythoslab.classroom.checks import reference
from mythoslab.model import Mythos, MythosConfig, generate
from mythoslab.moe import MixtureOfExperts
from mythoslab.questions import Tokenizer
from mythoslab.training import (
    COLOURS,
    NAMES,
    Curriculum,
    QuestionBatch,
    Step,
    TrainConfig,
    Words,
    answers_right,
    chain_questions,
    checkpoints,
    choose_device,
    continuation,
    draw_questions,
    exception_facts,
    fact_questions,
    halting_loss,
    held_out_bits,
    join,
    load,
    load_checkpoint,
    lzma_bits,
    make_step,
    ngram_bits,
    optimisers,
    passes_late,
    question_loss,
    question_words,
    remove_run,
    save,
    schedule,
    settled,
    step_memory,
    sum_questions,
    text_loss,
    text_losses,
    train,
    train_halting,
    training_step,
)
from tests.mistakes import edited, mistakes_are_named

SHAPE = dict(dim=32, n_heads=2, hidden_dim=64, n_passes=2, context_length=32)
SMALL = dict(dim=16, n_heads=2, hidden_dim=24, n_passes=2, context_length=64)
PLAN = TrainConfig(n_steps=6, batch_size=2, question_batch=4, n_facts=(4, 6), n_asked=3, max_depth=3, save_every=2)


def real_text():
    """Real prose on every machine: a part of the Python reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)[:60])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def trained():
    """A tokenizer and a model after a short real training, the text it read and text it did not."""
    text = real_text()
    learnt, held_out = text[:-12_000], text[-12_000:]
    tokenizer = Tokenizer.train(learnt, 400)
    torch.manual_seed(0)
    model = Mythos(MythosConfig(vocab_size=400, **SHAPE))
    before = held_out_bits(model, tokenizer.encode(held_out), len(held_out.encode()))
    history = train(model, tokenizer.encode(learnt), TrainConfig(n_steps=150, batch_size=16))
    return tokenizer, model, history, before, learnt, held_out


@pytest.fixture(scope="module")
def words():
    return Words(Tokenizer.train(real_text()[:100_000] + question_words(), 512))


def new_model(words, **kind):
    torch.manual_seed(0)
    return Mythos(MythosConfig(vocab_size=words.tokenizer.vocab_size, **{**SMALL, **kind}))


@pytest.fixture(scope="module")
def data(words):
    return words.tokenizer.encode(real_text()[:30_000])


def without_seconds(history):
    return [step._replace(seconds=0.0) for step in history]


# A real run


def test_a_short_training_learns_real_text(trained):
    tokenizer, model, history, before, learnt, held_out = trained
    tokens, n_bytes = tokenizer.encode(held_out), len(held_out.encode())
    after = held_out_bits(model, tokens, n_bytes)
    assert [step.step for step in history] == list(range(1, 151))
    assert all(step.n_tokens == 16 * 32 and step.question_loss is step.right is step.depth is None for step in history)
    assert history[-1].loss < history[0].loss - 1.5
    counted = torch.bincount(tokenizer.encode(learnt), minlength=400) + 1
    unigram = -(counted / counted.sum()).log()[tokens].sum().item() / math.log(2) / n_bytes
    assert after < unigram - 0.2 and after < before / 1.4
    assert all(earlier.seconds < later.seconds for earlier, later in zip(history, history[1:]))


def test_more_passes_than_trained_do_no_harm_after_a_short_training(trained):
    tokenizer, model, *_, held_out = trained
    bits = {
        count: held_out_bits(model, tokenizer.encode(held_out), len(held_out.encode()), n_passes=count)
        for count in (2, 4)
    }
    assert bits[4] < bits[2] + 0.05


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(words, data):
    def run(seed):
        return without_seconds(train(new_model(words), data, replace(PLAN, n_steps=3, seed=seed), words=words))

    assert run(3) == run(3)
    assert [step.loss for step in run(3)] != [step.loss for step in run(4)]


def test_passes_are_drawn_from_those_given_and_otherwise_the_models_own():
    data = torch.randint(40, (500,))
    model = Mythos(MythosConfig(vocab_size=40, **SHAPE))
    steps = train(model, data, TrainConfig(n_steps=30, batch_size=1, n_passes=(1, 4)))
    assert {step.n_passes for step in steps} == {1, 4}
    assert [step.n_passes for step in train(model, data, TrainConfig(n_steps=2, batch_size=1))] == [2, 2]


def test_every_weight_is_trained_by_one_optimiser_and_hidden_matrices_by_muon():
    model = Mythos(MythosConfig(vocab_size=40, **SHAPE))
    muon, adam = optimisers(model, TrainConfig())
    by_muon, by_adam = (
        {id(weight) for group in optimiser.param_groups for weight in group["params"]}
        for optimiser in (muon, adam)
    )
    assert not by_muon & by_adam
    assert by_muon | by_adam == {id(weight) for weight in model.parameters()}
    assert by_muon == {
        id(weight) for name, weight in model.named_parameters() if "_proj." in name or "ffn." in name
    }


# Graded questions: what is written is read back here, and answered by hand


def rows_of(words, batch):
    """Each text as words, with what is asked: (text, {place: (path as words, difficulty)})."""
    for tokens, path, difficulty in zip(*batch):
        text = [words.tokenizer.decode([token]).strip() for token in tokens.tolist()]
        asked = torch.where(difficulty >= 0)[0].tolist()
        assert (path[difficulty < 0] == -1).all() and (path[asked] >= 0).all()
        yield text, {
            place: ([words.tokenizer.decode([token]).strip() for token in path[place].tolist()], difficulty[place].item())
            for place in asked
        }


def links(text):
    """What the facts of a text say, up to the first question, and the questions."""
    ask = text.index("?")
    facts, questions = text[:ask], text[ask:]
    assert len(facts) % 3 == 0 and all(end == ";" for end in facts[2::3])
    says = dict(zip(facts[0::3], facts[1::3]))
    assert len(says) == len(facts) // 3
    return says, questions


def walk(says, name):
    passed = [name]
    while passed[-1] in says:
        passed.append(says[passed[-1]])
    return passed


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    n_facts=st.one_of(st.none(), st.integers(2, 20)),
    max_depth=st.integers(1, 6),
    n_asked=st.integers(1, 10),
)
def test_chains_are_answered_right_link_by_link(words, seed, n_facts, max_depth, n_asked):
    count = 2 * (max_depth + 1) if n_facts is None else n_facts
    batch = chain_questions(3, words, max_depth=max_depth, n_facts=n_facts, n_asked=n_asked, generator=seeded(seed))
    assert batch.tokens.shape == (3, 3 * count + 2 * min(n_asked, count)) and batch.path.shape[2] == max_depth + 1
    for text, asked in rows_of(words, batch):
        says, questions = links(text)
        assert set(says) <= set(NAMES) and len(says) == count
        # no answer stands between the questions, and no name is asked twice
        assert questions[0::2] == ["?"] * (len(questions) // 2) and len(set(questions[1::2])) == len(questions) // 2
        assert list(asked) == list(range(3 * count + 1, len(text), 2))
        for place, (path, difficulty) in asked.items():
            passed = walk(says, text[place])
            assert passed[-1] in COLOURS and difficulty == len(passed) - 2 <= max_depth
            assert path == [passed[min(after, len(passed) - 1)] for after in range(1, max_depth + 2)]


def test_balanced_chains_are_of_equal_length_and_end_in_different_colours(words):
    batch = chain_questions(50, words, max_depth=4, n_asked=10, generator=seeded(0))
    for text, asked in rows_of(words, batch):
        says, _ = links(text)
        tops = {name: says[name] for name in says if says[name] in COLOURS}
        assert len(tops) == 2 and len(set(tops.values())) == 2
        lengths = defaultdict(int)
        for name in says:
            lengths[walk(says, name)[-1]] += 1
        assert set(lengths.values()) == {5}
        assert sorted(difficulty for _, difficulty in asked.values()) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("depth", range(5))
def test_only_the_depth_that_is_wanted_is_asked(words, depth):
    batch = chain_questions(60, words, max_depth=4, n_asked=7, depth=depth, generator=seeded(depth))
    assert ((batch.difficulty >= 0).sum(1) == 1).all()
    assert (batch.difficulty[batch.difficulty >= 0] == depth).all()
    with pytest.raises(ValueError, match="depth is 5; it must be found in every text"):
        chain_questions(60, words, max_depth=4, depth=5, generator=seeded(0))


def test_a_depth_that_a_random_forest_lacks_is_refused_and_not_replaced(words):
    with pytest.raises(ValueError, match="depth is 4"):
        chain_questions(60, words, max_depth=4, n_facts=3, depth=4, generator=seeded(0))


def test_the_wanted_depth_is_asked_even_if_its_chance_is_drawn_as_zero(words, monkeypatch):
    with monkeypatch.context() as patch:
        rand = torch.rand
        patch.setattr(training.torch, "rand", lambda *shape, **kind: rand(*shape, **kind) * 0)
        batch = chain_questions(20, words, max_depth=3, depth=3, generator=seeded(0))
    assert (batch.difficulty[batch.difficulty >= 0] == 3).all()


def columns_crossed(first, second):
    """By hand: for each digit of the sum, lowest first, over how many columns the carry into it came."""
    crossed, n_digits = [], len(first)
    for place in range(n_digits + 1):
        carry_from = None
        for start in reversed(range(place)):  # the nearest column that makes a carry, if all between hand it on
            total = int(first[-1 - start]) + int(second[-1 - start])
            if total >= 10:
                carry_from = start
                break
            if total < 9:
                break
        crossed.append(0 if carry_from is None else place - carry_from)
    return crossed


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), n_digits=st.integers(1, 5), more=st.integers(0, 40), data=st.data())
def test_sums_are_right_and_difficulty_is_the_columns_a_carry_crossed(words, seed, n_digits, more, data):
    length, chain = 3 * n_digits + 5 + more, data.draw(st.one_of(st.none(), st.integers(1, n_digits)))
    batch = sum_questions(3, words, n_digits=n_digits, length=length, chain=chain, generator=seeded(seed))
    assert batch.tokens.shape == (3, length)
    for text, asked in rows_of(words, batch):
        places = iter(asked)
        size = 3 * n_digits + 5
        for start in range(0, length - size + 1, size):
            one = text[start : start + size]
            question = "".join(one)
            assert question[0] == "?" and question[-1] == ";"
            left, result = question[1:-1].split("=")
            first, second = left.split("+")
            assert len(first) == len(second) == n_digits and int(first) + int(second) == int(result)
            crossed = columns_crossed(first, second)
            assert chain is None or max(crossed) >= chain
            for place, digit in enumerate(result):
                at = next(places)
                assert at == start + 2 * n_digits + 2 + place  # right before the digit
                path, difficulty = asked[at]
                assert path == [digit] == [text[at + 1]]
                assert difficulty == crossed[n_digits - place]
        assert next(places, None) is None and set(text[length // size * size :]) <= {";"}


def test_sums_that_do_not_fit_are_refused(words):
    with pytest.raises(ValueError, match="length is 10; it must be at least 11"):
        sum_questions(1, words, n_digits=2, length=10, generator=seeded(0))
    with pytest.raises(ValueError, match="chain is 3; it must be at most n_digits, 2"):
        sum_questions(1, words, n_digits=2, length=20, chain=3, generator=seeded(0))


def test_sums_have_carries_of_every_length_and_none(words):
    batch = sum_questions(300, words, n_digits=3, length=14, generator=seeded(0))
    assert set(batch.difficulty[batch.difficulty >= 0].tolist()) == {0, 1, 2, 3}


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), more=st.integers(0, 60))
def test_facts_say_what_python_says_and_ask_every_token_of_the_answer(words, seed, more):
    length = training.shortest_fact(words) + more
    batch = fact_questions(2, words, length=length, generator=seeded(seed))
    known = dict(exception_facts())
    for tokens, path, difficulty in zip(*batch):
        text = words.tokenizer.decode(tokens)
        facts = [fact.split() for fact in text.split(" ?")[1:]]
        assert facts
        answers = ""
        for fact in facts:
            kind, is_a, base, *ends = fact
            assert (is_a, known[kind]) == ("is", base) and set(ends) == {";"}
            answers += f" {base} ;"
        asked = torch.where(difficulty >= 0)[0]
        assert (difficulty[asked] == 0).all() and torch.equal(path[asked, 0], tokens[asked + 1])
        assert words.tokenizer.decode(path[asked, 0]) == answers


def test_facts_are_those_of_pythons_exceptions(words):
    facts = dict(exception_facts())
    assert facts["KeyError"] == "LookupError" and facts["ZeroDivisionError"] == "ArithmeticError"
    assert "BaseException" not in facts and len(facts) > 50
    shortest = training.shortest_fact(words)
    with pytest.raises(ValueError, match=f"length is {shortest - 1}; it must be at least {shortest}"):
        fact_questions(1, words, length=shortest - 1, generator=seeded(0))


def test_questions_of_all_kinds_join_into_one_batch(words):
    chains = chain_questions(2, words, max_depth=3, n_asked=2, generator=seeded(0))
    sums = sum_questions(2, words, n_digits=2, length=chains.tokens.shape[1], generator=seeded(0))
    both = join([chains, sums])
    assert both.path.shape == (4, chains.tokens.shape[1], 4)
    assert torch.equal(both.path[:2], chains.path) and torch.equal(both.path[2:], sums.path.expand(-1, -1, 4))
    assert torch.equal(both.targets(0), both.path[..., 0]) and torch.equal(both.targets(99), both.path[..., 3])


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    question_batch=st.integers(1, 9),
    fewest=st.integers(2, 6),
    n_asked=st.integers(1, 12),
    depth=st.integers(1, 5),
    more_passes=st.integers(1, 3),
)
def test_questions_of_a_step_are_right_also_at_the_smallest_lengths(
    words, seed, question_batch, fewest, n_asked, depth, more_passes
):
    config = TrainConfig(question_batch=question_batch, n_facts=(fewest, fewest), n_asked=n_asked, more_passes=more_passes)
    curriculum = Curriculum(5, depth=depth)
    batch, n_passes = draw_questions(words, config, curriculum, seeded(seed))
    assert len(batch.tokens) == question_batch and depth < n_passes <= depth + more_passes
    assert batch.tokens.shape[1] <= max(config.longest_question, training.shortest_fact(words))
    chains = (question_batch + 1) // 2
    for text, asked in rows_of(words, QuestionBatch(*(part[:chains] for part in batch))):
        says, _ = links(text)
        for place, (path, difficulty) in asked.items():
            passed = walk(says, text[place])
            assert difficulty == len(passed) - 2 <= depth and path[-1] == passed[-1]
    for row in range(chains, question_batch):  # sums and facts: what is asked comes next
        asked = torch.where(batch.difficulty[row] >= 0)[0]
        assert len(asked) and torch.equal(batch.path[row, asked, -1], batch.tokens[row, asked + 1])


def test_every_word_of_a_question_is_one_token_and_words_that_are_several_are_named(words):
    every = [*NAMES, *COLOURS, *map(str, range(10)), ";", "?", "+", "=", "is"]
    assert len(set(every)) == len(every)
    assert all(len(words.tokenizer.encode(f" {word}")) == 1 for word in every)
    numbers = torch.cat((words.names, words.colours, words.digits)).tolist() + [words.end, words.ask, words.plus, words.equals, words.is_a]
    assert [words.tokenizer.decode([number]) for number in numbers] == [f" {word}" for word in every]
    with pytest.raises(ValueError, match="the number of tokens of ' ann' is \\d; it must be 1: train the tokenizer with question_words"):
        Words(Tokenizer.train("some other text", 260))


def test_a_curriculum_goes_deeper_only_when_it_answers():
    curriculum = Curriculum(3)
    for _ in range(500):
        curriculum.update(0.94)  # not good enough, however long
    assert (curriculum.depth, curriculum.root_share) == (1, 0.4)
    n_right, depths = 0, [1]
    while curriculum.depth < 3:
        before = curriculum.depth
        curriculum.update(1.0)
        n_right += 1
        if curriculum.depth > before:
            depths.append(curriculum.depth)
            assert curriculum.running == 0.0  # the new depth is judged anew
    assert depths == [1, 2, 3] and 20 < n_right < 200
    assert math.isclose(curriculum.root_share, 0.26)
    for _ in range(500):
        curriculum.update(1.0)
    assert curriculum.depth == 3 and curriculum.all_answered  # never beyond what was planned
    easier = Curriculum(2, depth=2)
    for _ in range(500):
        easier.update(0.94)
    assert not easier.all_answered
    easier.update(0.94, enough=0.9)
    assert easier.all_answered
    deep = Curriculum(19)
    for _ in range(5000):
        deep.update(1.0)
    assert deep.depth == 19 and deep.root_share == 0.12


def test_a_text_too_short_to_count_in_is_named():
    with pytest.raises(ValueError, match="bytes of held-out text is 0; it must be at least 1"):
        training.ngram_bits("some text", "")
    with pytest.raises(ValueError, match="bytes of training text is 2; it must be at least 4"):
        training.ngram_bits("ab", "some text")
    with pytest.raises(ValueError, match="order is 7; it must be from 0 to 6"):
        training.ngram_bits("some text", "some text", 7)


# Losses and steps


def test_the_loss_of_text_is_the_cross_entropy_of_the_next_token_after_the_last_pass(words, data):
    model = new_model(words)
    inputs, targets = data[:64].view(2, 32), data[1:65].view(2, 32)
    for n_passes in (None, 1, 5):
        by_hand = F.cross_entropy(model(inputs, n_passes).logits.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(text_loss(model, inputs, targets, n_passes), by_hand)


def test_losses_by_passes_add_up_to_the_mean_over_windows_and_passes_are_drawn_for_each(words, data):
    model, config = new_model(words), replace(PLAN, n_passes=(1, 2, 3))
    inputs, targets = data[: 12 * 32].view(12, 32), data[1 : 12 * 32 + 1].view(12, 32)
    drawn = torch.tensor((1, 2, 3))[torch.randint(3, (12,), generator=seeded(5))]
    each = [text_loss(model, inputs[row : row + 1], targets[row : row + 1], int(count)) for row, count in enumerate(drawn)]
    together, most = text_losses(model, (inputs, targets), config, seeded(5))
    assert len(together) == 1 and most == drawn.max() and len(drawn.unique()) > 1
    torch.testing.assert_close(together[0](), torch.stack(each).mean())
    by_passes, most = text_losses(model, (inputs, targets), replace(config, n_backward=2), seeded(5))
    assert len(by_passes) == len(drawn.unique()) and most == drawn.max()
    torch.testing.assert_close(sum(loss() for loss in by_passes), torch.stack(each).mean())


def test_each_window_learns_through_its_own_last_passes(words, data):
    inputs, targets = data[: 6 * 32].view(6, 32), data[1 : 6 * 32 + 1].view(6, 32)
    drawn = torch.tensor((1, 2, 5))[torch.randint(3, (6,), generator=seeded(1))]
    assert len(drawn.unique()) == 3
    for n_backward in (0, 2):

        def gradient(losses):
            model = new_model(words)
            sum(loss() for loss in losses(model)).backward()
            return [weight.grad for weight in model.parameters() if weight.grad is not None]

        def one_by_one(model, last=n_backward or None):
            rows = enumerate(drawn.tolist())
            return [lambda row=row, count=count: text_loss(model, inputs[row : row + 1], targets[row : row + 1], count, last) / 6 for row, count in rows]

        config = replace(PLAN, n_passes=(1, 2, 5), n_backward=n_backward)
        drawn_together = gradient(lambda model, config=config: text_losses(model, (inputs, targets), config, seeded(1))[0])
        torch.testing.assert_close(drawn_together, gradient(one_by_one), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("n_backward", [1, 2, 3, 9])
def test_gradients_of_text_go_through_the_last_passes_alone(words, data, n_backward):
    inputs, targets = data[:64].view(2, 32), data[1:65].view(2, 32)

    def gradient(**options):
        model = new_model(words)
        loss = text_loss(model, inputs, targets, 3, **options)
        loss.backward()
        return loss.item(), model.core.blocks[0].ffn.up.weight.grad

    loss, whole = gradient()
    shorter_loss, shorter = gradient(n_backward=n_backward)
    assert loss == shorter_loss
    assert torch.allclose(whole, shorter) == (n_backward >= 3)
    model = new_model(words)
    by_config = text_losses(model, (inputs, targets), replace(PLAN, n_passes=(3,), n_backward=n_backward), seeded(0))[0]
    by_config[0]().backward()
    torch.testing.assert_close(model.core.blocks[0].ffn.up.weight.grad, shorter)


class Oracle(torch.nn.Module):
    """Stands for a model that says, after every pass, what it is told to say."""

    def __init__(self, says, n_tokens):  # says: (pass, batch, position)
        super().__init__()
        self.states = F.one_hot(says.clamp(min=0), n_tokens).float() * 100
        self.embedding = torch.nn.Embedding(1, 1)

    def think(self, tokens, n_passes):
        return self.states[:n_passes]

    def read(self, state, at=None):
        return state if at is None else state[at]


def test_the_loss_of_questions_asks_after_each_pass_for_what_is_so_many_links_away(words):
    n_tokens = words.tokenizer.vocab_size
    batch = chain_questions(8, words, max_depth=3, n_asked=8, generator=seeded(0))
    n_asked = int((batch.difficulty >= 0).sum())
    link_by_link = Oracle(torch.stack([batch.targets(index) for index in range(6)]), n_tokens)
    at_once = Oracle(batch.path[..., -1].expand(6, -1, -1), n_tokens)
    loss, right = reference("training").question_loss(link_by_link, batch, 6, [0, 2, 5])
    assert loss < 1e-6 and right.shape == (n_asked,) and right.all()
    loss, right = reference("training").question_loss(at_once, batch, 6, [5])
    assert loss < 1e-6 and right.all()
    # always the answer: wrong where it is still further away than the pass
    for index in range(4):
        far = (batch.difficulty > index).sum() / n_asked
        loss, right = reference("training").question_loss(at_once, batch, 6, [index, 5])
        assert math.isclose(loss, far * 100 / 2, rel_tol=1e-4, abs_tol=1e-6) and right.all()
    # too few passes: what is on the way is no answer
    _, right = reference("training").question_loss(link_by_link, batch, 2, [1])
    assert torch.equal(right, batch.difficulty[batch.difficulty >= 0] <= 1)


def test_answers_are_right_after_the_pass_that_reaches_them(words):
    batch = chain_questions(10, words, max_depth=3, n_asked=8, generator=seeded(0))
    model = new_model(words)
    says = Oracle(torch.stack([batch.targets(index) for index in range(6)]), words.tokenizer.vocab_size)
    right, difficulty = reference("training").answers_right(says, batch, 6)
    assert right.shape == (6, 80) and torch.equal(difficulty, batch.difficulty[batch.difficulty >= 0])
    for index in range(6):
        assert torch.equal(right[index], difficulty <= index)
    some, _ = reference("training").answers_right(says, batch, 6, after=[2, 6])
    assert torch.equal(some, right[[1, 5]])
    told = []
    says.think = lambda tokens, n_passes: told.append(n_passes) or says.states
    reference("training").answers_right(says, batch, 6, rest_after=2)
    assert torch.equal(told[0], torch.where(batch.difficulty >= 0, 6, 2))
    small, whole = answers_right(model, batch, 3, batch_size=3), answers_right(model, batch, 3)
    assert torch.equal(small[0], whole[0]) and torch.equal(small[1], whole[1])


def test_read_alone_the_coda_sees_one_token_and_no_other(words):
    batch, model = chain_questions(6, words, max_depth=2, n_asked=3, generator=seeded(0)), new_model(words)
    asked = batch.difficulty >= 0
    with torch.no_grad():
        for weight in model.coda.parameters():
            weight.mul_(8)  # so that what it sees decides
    right, _ = answers_right(model, batch, 3, alone=True, batch_size=4)
    with torch.no_grad():
        states = model.think(batch.tokens, 3)
        by_hand = [
            [model.read(state[row, place][None, None]).argmax() == batch.path[row, place, -1] for row, place in asked.nonzero()]
            for state in states
        ]
        whole = [model.read(state, at=asked) for state in states]
        single = [model.read(state[asked].unsqueeze(1)).squeeze(1) for state in states]
    assert torch.equal(right, torch.tensor(by_hand))
    assert (torch.stack(whole) - torch.stack(single)).abs().max() > 1e-3  # the coda does look around
    batch = batch._replace(path=batch.path.clone())
    batch.path[asked] = single[1].argmax(-1).unsqueeze(1)  # and what it reads alone is what counts
    assert answers_right(model, batch, 3, alone=True)[0][1].all() and not answers_right(model, batch, 3)[0][1].all()


def test_enough_is_read_after_one_pass_more_than_links(words, monkeypatch):
    def by_passes(model, questions, n_passes, *, after, **how):
        """As many right as passes, of a hundred."""
        return torch.stack([torch.arange(100) < count for count in after]), torch.zeros(100, dtype=torch.long)

    monkeypatch.setattr(training, "answers_right", by_passes)
    model = new_model(words)
    right = training.measure(model, words.tokenizer, "to learn from " * 50, "held out " * 20, max_depth=2)["right"]
    for kind in ("longer", "resting", "alone"):
        shares = right[kind]["enough"]
        assert len(shares) > 2 and len(set(shares)) > 2
        expected = [min(links + 1, 4 * model.config.n_passes) / 100 for links in range(len(shares))]
        assert torch.allclose(torch.tensor(shares), torch.tensor(expected))


def test_how_late_the_head_stops_is_counted_from_links_and_one(words):
    batch, model = chain_questions(4, words, max_depth=5, n_facts=None, n_asked=8, generator=seeded(0)), new_model(words, halting="settled")
    told = []
    think = model.think
    model.think = lambda tokens, n_passes: told.append(n_passes) or think(tokens, n_passes)
    links = batch.difficulty[batch.difficulty >= 0]

    class Says(torch.nn.Module):
        def forward(self, states):
            """Stops every token two passes after its answer is due."""
            due = torch.where(batch.difficulty >= 0, batch.difficulty + 1, 0)
            return (torch.arange(1, len(states) + 1).view(-1, 1, 1) >= due + 2) * 0.9

    model.halting = Says()
    assert torch.equal(passes_late(model, batch, 8), torch.full_like(links, 2))
    assert torch.equal(told[0], torch.where(batch.difficulty >= 0, 8, 2))
    assert torch.equal(passes_late(model, batch, 8, threshold=0.91), 7 - links)  # never: stopped at the end
    assert torch.equal(passes_late(model, batch, 8, threshold=0.0), -links)


def sgd(model):
    return [torch.optim.SGD(model.parameters(), lr=0.1)]


def test_a_step_on_several_losses_is_one_on_their_sum(words, data):
    inputs, targets = data[:64].view(2, 32), data[1:65].view(2, 32)

    def stepped(*parts):
        model = new_model(words)
        F.cross_entropy(model(inputs).logits.flatten(0, 1), inputs.flatten()).backward()  # left by a step before
        values = training_step(model, [lambda part=part: part(model) for part in parts], sgd(model), clip=0.5)
        return values, torch.nn.utils.parameters_to_vector(model.parameters())

    def first(model):
        return text_loss(model, inputs, targets, 1)

    def second(model):
        return 0.3 * text_loss(model, inputs, targets, 3)

    values, weights = stepped(first, second)
    total, at_once = stepped(lambda model: first(model) + second(model))
    torch.testing.assert_close(weights, at_once)
    assert len(values) == 2 and math.isclose(sum(values), total[0], rel_tol=1e-6)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_second_loss_that_is_no_number_leaves_the_weights_untouched(words, data, wrong):
    model = new_model(words)
    inputs, targets = data[:64].view(2, 32), data[1:65].view(2, 32)
    before = copy.deepcopy(model.state_dict())
    losses = [lambda: text_loss(model, inputs, targets), lambda: text_loss(model, inputs, targets) + wrong]
    with pytest.raises(ValueError, match="the loss is .*lower learning_rate"):
        training_step(model, losses, optimisers(model, PLAN))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_gradient_that_is_not_finite_leaves_the_weights_untouched_though_the_loss_is(words, data):
    model = new_model(words)
    inputs, targets = data[:64].view(2, 32), data[1:65].view(2, 32)
    before = copy.deepcopy(model.state_dict())
    model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(ValueError, match="the gradient is (inf|nan) long.*lower learning_rate"):
        training_step(model, [lambda: text_loss(model, inputs, targets)], optimisers(model, PLAN))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_loss_that_is_no_number_stops_training_and_says_what_to_do():
    model = Mythos(MythosConfig(vocab_size=40, **SHAPE))
    with torch.no_grad():
        model.norm.weight[0] = math.inf
    kept = model.core.blocks[0].ffn.up.weight.clone()
    with pytest.raises(ValueError, match="step 1 of 3: the loss is .*lower learning_rate"):
        train(model, torch.randint(40, (300,)), TrainConfig(n_steps=3))
    assert torch.equal(model.core.blocks[0].ffn.up.weight, kept)


def test_two_batches_accumulated_are_one_batch_of_both(words, data):
    def trained_with(**options):
        model = new_model(words)
        steps = train(model, data, TrainConfig(n_steps=2, learning_rate=1e-3, **options))
        return steps, torch.nn.utils.parameters_to_vector(model.parameters())

    halves, weights = trained_with(batch_size=3, accumulate=2)
    whole, at_once = trained_with(batch_size=6)
    torch.testing.assert_close(weights, at_once, rtol=1e-3, atol=1e-5)
    for one, other in zip(halves, whole):
        assert math.isclose(one.loss, other.loss, rel_tol=1e-5) and one.n_tokens == other.n_tokens == 6 * 64


def test_questions_are_accumulated_too(words):
    config = replace(PLAN, batch_size=0, accumulate=3)
    model, draw = new_model(words), seeded(1)
    step = make_step(model, config, None, words, Curriculum(3), draw)(sgd(model), 1)
    model, draw, values, n_tokens = new_model(words), seeded(1), [], 0
    for _ in range(3):
        questions, count = draw_questions(words, config, Curriculum(3), draw)
        reads = {count - 1, *torch.randperm(count, generator=draw).tolist()[:1]}
        values.append(question_loss(model, questions, count, sorted(reads))[0].item())
        n_tokens += questions.tokens.numel()
    assert math.isclose(step.question_loss, sum(values) / 3, rel_tol=1e-5)
    assert step.loss is None and step.n_tokens == n_tokens and 0 <= step.right <= 1 and step.depth == 1


def test_chains_come_first_with_every_pass_read_and_text_a_fiftieth_of_its_weight(words, data, monkeypatch):
    drawn, scaled, reads = [], [], []
    draw, take, noting = training.draw_questions, training.training_step, training._noting
    monkeypatch.setattr(training, "draw_questions", lambda *given, **kind: drawn.append(draw(*given, **kind)) or drawn[-1])
    monkeypatch.setattr(training, "training_step", lambda *given, **kind: scaled.append(take(*given, **kind)) or scaled[-1])
    monkeypatch.setattr(training, "_noting", lambda *given: reads.append(given[3:5]) or noting(*given))
    plan = replace(PLAN, n_steps=10, chains_first=0.4, n_read=2, more_passes=4)
    steps = train(new_model(words), data, plan, words=words)
    assert all(step.loss > 4 and step.question_loss > 0 and step.right is not None for step in steps)
    for step, values in zip(steps, scaled):  # what is lowered, and what is told
        weight = 0.02 if step.step <= 4 else 1.0
        assert math.isclose(sum(values), weight * step.loss + step.question_loss, rel_tol=1e-6)
    for number, (count, read) in enumerate(reads):
        assert list(read) == list(range(count)) if number < 4 else 1 <= len(read) <= 2 and read[-1] == count - 1
    sums = [(batch.tokens == words.plus).any(1).sum().item() for batch, _ in drawn]
    assert sums == [0] * 4 + [1] * 6
    for batch, _ in drawn[:4]:  # nothing but chains: all that is asked is a name after a question mark
        asked = batch.difficulty >= 0
        assert asked.any(1).all() and torch.isin(batch.tokens[asked], words.names).all()
        assert (batch.tokens.roll(1, 1)[asked] == words.ask).all()


def test_chains_come_first_no_longer_than_it_takes_to_answer_them(words, data, monkeypatch):
    alone = []
    make = training.make_step
    monkeypatch.setattr(training, "make_step", lambda *given, **kind: alone.append(kind["chains_alone"]) or make(*given, **kind))
    monkeypatch.setattr(training.Curriculum, "update", lambda self, right, enough: answered(self, enough))

    def answered(curriculum, enough):
        assert enough == (0.9 if alone[-1] else 0.95)
        curriculum.all_answered = len(alone) >= 3

    train(new_model(words), data, replace(PLAN, n_steps=6, chains_first=1.0), words=words)
    assert alone == [True] * 3 + [False] * 3


@pytest.mark.parametrize("name", ["chains_first", "resting"])
def test_chains_cannot_come_first_nor_tokens_rest_without_questions(name):
    with pytest.raises(ValueError, match=f"{name} is 0.5; it must be 0 if there are no questions"):
        TrainConfig(**{name: 0.5})


def test_what_is_asked_goes_on_while_all_else_rests(words):
    batch = chain_questions(4, words, max_depth=3, n_asked=8, generator=seeded(0))
    asked = batch.difficulty >= 0
    assert torch.equal(batch.passes_at_rest(7), torch.where(asked, 7, 2))
    assert torch.equal(batch.passes_at_rest(7, 3), torch.where(asked, 7, 3))
    assert (batch.passes_at_rest(1) == 1).all()  # nobody goes on for longer than what is asked
    told, says = [], Oracle(torch.stack([batch.targets(index) for index in range(6)]), words.tokenizer.vocab_size)
    says.think = lambda tokens, n_passes: told.append(n_passes) or says.states
    for rest in (False, True):
        reference("training").question_loss(says, batch, 6, [5], rest=rest)
    assert told[0] == 6 and torch.equal(told[1], batch.passes_at_rest(6))


def test_at_the_end_tokens_rest_in_half_of_the_batches(words, data, monkeypatch):
    drawn, thought, stages = [], [], []
    draw, make = training.draw_questions, training.make_step

    def draws(words, config, curriculum, *given, **kind):
        questions, count = draw(words, config, curriculum, *given, **kind)
        drawn.append((questions, count, count - curriculum.depth))
        return questions, count

    monkeypatch.setattr(training, "draw_questions", draws)
    monkeypatch.setattr(training, "make_step", lambda *given, **kind: stages.append(kind["resting"]) or make(*given, **kind))
    model = new_model(words)
    think = model.think
    monkeypatch.setattr(model, "think", lambda tokens, n_passes: thought.append(n_passes) or think(tokens, n_passes))
    plan = replace(PLAN, n_steps=40, resting=0.5, batch_size=0, accumulate=2)
    train(model, data, plan, words=words)
    assert stages == [False] * 20 + [True] * 20
    rests = []
    for (questions, count, _), passes in zip(drawn, thought, strict=True):
        rests.append(torch.is_tensor(passes))
        assert torch.equal(passes, questions.passes_at_rest(count)) if rests[-1] else passes == count
    assert not any(rests[:40]) and 12 <= sum(rests[40:]) <= 28
    more = [beyond for _, _, beyond in drawn]
    assert set(more[:40]) == {1, 2, 3, 4} and set(more[40:]) == set(range(1, 9))
    assert any(one != other for one, other in zip(rests[40::2], rests[41::2]))  # for each batch, not each step


def test_until_tokens_rest_a_run_is_the_one_without(words, data):
    """The die for resting is not thrown before it counts."""
    without, with_rest = (train(new_model(words), data, replace(PLAN, resting=resting), words=words) for resting in (0.0, 0.5))
    assert without_seconds(without)[:3] == without_seconds(with_rest)[:3] and len(with_rest) == 6
    assert without_seconds(without) != without_seconds(with_rest)


def test_the_bias_of_experts_moves_in_training_and_each_step_counts_anew(words, data):
    kind = dict(ffn="moe", expert_dim=8, n_routed_experts=4, n_experts_per_token=1)

    def biases(rate):
        model = new_model(words, **kind)
        train(model, data, replace(PLAN, n_steps=2, bias_rate=rate), words=words)
        experts = [part for part in model.modules() if isinstance(part, MixtureOfExperts)]
        assert experts and all((part.load == 0).all() for part in experts)
        return torch.cat([part.bias for part in experts])

    assert (biases(0.0) == 0).all()
    moved = biases(0.01).abs()
    assert moved.max() > 0 and ((moved / 0.01).round() <= 2).all()


MOE = dict(ffn="moe", expert_dim=8, n_routed_experts=4, n_experts_per_token=1)


def test_what_experts_served_before_a_step_does_not_count_in_it(words, data):
    """A model that was measured, or whose step was broken off, learns as if nothing had been."""

    def learnt(prepare):
        model = new_model(words, **MOE).train()
        prepare(model)
        history = train(model, data, replace(PLAN, n_steps=3, bias_rate=0.1), words=words)
        return without_seconds(history), torch.cat([part.bias for part in model.modules() if isinstance(part, MixtureOfExperts)])

    def measured(model):
        held_out_bits(model, data[:200], 600)
        assert any(part.load.any() for part in model.modules() if isinstance(part, MixtureOfExperts))

    (plain, bias), (after, other) = learnt(lambda model: None), learnt(measured)
    assert plain == after and torch.equal(bias, other) and bias.abs().max() > 0


def test_a_model_with_experts_is_read_whole_and_can_be_trained_on(words, data, tmp_path):
    model = new_model(words, **MOE)
    save(tmp_path / "kept", model, words.tokenizer)
    read, _ = load(tmp_path / "kept")
    assert not any(tensor.is_meta for tensor in (*read.buffers(), *read.parameters()))
    again, whole = (train(one, data, replace(PLAN, n_steps=2), words=words) for one in (read.to("cpu"), model))
    assert without_seconds(again) == without_seconds(whole)


# Halting


def test_settled_is_what_never_changes_again():
    answers = torch.tensor([[7, 7, 2, 4], [3, 7, 2, 4], [5, 7, 9, 1], [5, 7, 2, 4]])
    by_hand = [[(answers[later:, token] == answers[-1, token]).all().item() for token in range(4)] for later in range(4)]
    assert settled(answers).tolist() == by_hand
    assert settled(answers)[-1].all() and not settled(answers)[0, 0] and settled(answers)[0, 1]


def test_the_head_is_taught_to_stop_where_an_answer_is_settled_and_after_two_passes_where_nothing_is_asked(words):
    model = new_model(words, halting="settled")
    torch.nn.init.normal_(list(model.halting.parameters())[-1])
    tokens, asked = torch.randint(model.config.vocab_size, (3, 9), generator=seeded(0)), torch.rand(3, 9, generator=seeded(1)) < 0.3
    with torch.no_grad():
        states = model.think(tokens, 5)
        stop, answers = model.halting(states), torch.stack([model.read(state).argmax(-1) for state in states])
    kinds = {True: [], False: []}
    for row, place in itertools.product(range(3), range(9)):
        for count in range(5):
            mine = answers[:, row, place]
            should = (mine[count:] == mine[-1]).all().item() if asked[row, place] else count >= 1
            said = stop[count, row, place].item()
            kinds[asked[row, place].item()].append(-math.log(said if should else 1 - said))
    by_hand = {kind: sum(losses) / len(losses) for kind, losses in kinds.items()}
    assert math.isclose(halting_loss(model, tokens, asked, 5).item(), by_hand[True] + by_hand[False], rel_tol=1e-4)
    everywhere = halting_loss(model, tokens[asked][None], torch.ones(1, int(asked.sum()), dtype=torch.bool), 5)
    assert math.isfinite(everywhere.item())
    nowhere = halting_loss(model, tokens, torch.zeros_like(asked), 5)
    assert math.isfinite(nowhere.item())


def test_the_second_stage_touches_the_head_alone(words, data):
    model = new_model(words, halting="settled", ffn="moe", expert_dim=8, n_routed_experts=4)
    before = copy.deepcopy(model.state_dict())
    losses = train_halting(model, data, replace(PLAN, halting_steps=8), words=words, n_passes=4)
    assert len(losses) == 8 and all(map(math.isfinite, losses)) and math.isclose(losses[0], 3 * math.log(2), rel_tol=1e-4)  # text, questions, rest
    assert losses[-1] < losses[0]
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]) != (name.startswith("halting.") and weight.numel() > 0), name
    assert all(weight.grad is None for name, weight in model.named_parameters() if not name.startswith("halting."))


def test_the_second_stage_needs_a_head_and_words(words, data):
    with pytest.raises(ValueError, match="halting is 'none'; it must be a rule with a head"):
        train_halting(new_model(words), data, replace(PLAN, halting_steps=1), words=words)
    with pytest.raises(ValueError, match="words is None"):
        train_halting(new_model(words, halting="settled"), data, replace(PLAN, halting_steps=1))


# A run, its log and its checkpoints


def test_the_log_is_a_line_of_json_for_each_step(words, data, tmp_path):
    history = train(new_model(words), data, PLAN, words=words, folder=tmp_path)
    lines = (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [Step(**json.loads(line)) for line in lines] == history and len(lines) == 6
    assert set(json.loads(lines[0])) == set(Step._fields)


@pytest.fixture
def board(monkeypatch):
    """TensorBoard's writer, as far as it is used; what it was told."""
    told = []

    class SummaryWriter:
        def __init__(self, folder, purge_step=None):
            Path(folder).mkdir(parents=True, exist_ok=True)
            told.append(("opened", Path(folder).name, purge_step))

        def add_scalar(self, *scalar):
            told.append(scalar)

        def close(self):
            told.append(("closed",))

    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    return told


def test_tensorboard_is_written_if_it_is_installed_and_closed_in_the_end(words, data, tmp_path, board):
    history = train(new_model(words), data, replace(PLAN, n_steps=2), words=words, folder=tmp_path)
    assert board[0] == ("opened", "tensorboard", 1) and board[-1] == ("closed",)
    scalars = {(name, step): value for name, value, step in board[1:-1]}
    assert scalars["loss", 2] == history[1].loss and scalars["right", 1] == history[0].right
    assert ("step", 1) not in scalars
    board.clear()
    train(new_model(words), data, replace(PLAN, n_steps=2), words=words, folder=tmp_path, resume=True)
    assert board == [("opened", "tensorboard", 3), ("closed",)]


def test_without_tensorboard_a_run_goes_on(words, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    train(new_model(words), data, replace(PLAN, n_steps=1), words=words, folder=tmp_path)
    assert not (tmp_path / "tensorboard").exists() and (tmp_path / "log.jsonl").exists()


def test_two_checkpoints_are_kept_and_nothing_else_is_left(words, data, tmp_path):
    train(new_model(words), data, PLAN, words=words, folder=tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-0000006", "step-0000004"]
    assert {path.name for path in tmp_path.iterdir()} - {"tensorboard"} == {"step-0000006", "step-0000004", "log.jsonl"}


def test_a_new_run_replaces_none(words, data, interrupted):
    folder, _ = interrupted
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="a run that was begun lies in .*: --resume goes on with it; remove the folder to begin anew"):
        train(new_model(words), data, PLAN, words=words, folder=folder)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_does_not_begin_where_a_trained_model_lies(words, data, tmp_path):
    model = new_model(words)
    save(tmp_path / "kept", model, words.tokenizer, log='{"step": 1}\n')
    (tmp_path / "kept" / "tensorboard").mkdir()
    before = sorted((path, path.read_bytes()) for path in (tmp_path / "kept").rglob("*") if path.is_file())
    with pytest.raises(ValueError, match="a trained model lies in .*: give the run a folder of its own"):
        train(model, data, PLAN, words=words, folder=tmp_path / "kept")
    assert (tmp_path / "kept" / "tensorboard").is_dir()
    assert before == sorted((path, path.read_bytes()) for path in (tmp_path / "kept").rglob("*") if path.is_file())


def test_the_command_refuses_to_replace_a_run_before_it_prepares(small, monkeypatch, capsys):
    words, out = small
    Path(f"{out}.training", "step-0000002").mkdir(parents=True)
    monkeypatch.setattr(Tokenizer, "train", lambda *_: pytest.fail("it prepared first"))
    assert cli.main(words) == 2
    assert "--resume goes on with it" in capsys.readouterr().err and Path(f"{out}.training", "step-0000002").is_dir()


@pytest.fixture(scope="module")
def finished(words, data, tmp_path_factory):
    """A run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(new_model(words), data, PLAN, words=words, folder=folder)


@pytest.fixture
def interrupted(finished, tmp_path):
    """A copy of its folder, to be damaged."""
    shutil.copytree(finished[0], tmp_path / "run", dirs_exist_ok=True)
    steps = [tmp_path / "run" / f"step-000000{step}" for step in (2, 4, 6)]
    return tmp_path / "run", steps


def assert_same_end(*folders):
    """Two runs ended with the same weights, optimisers, dice and curriculum, to the last bit."""
    (state, tensors), (other_state, other_tensors) = map(load_checkpoint, folders)
    assert tensors.keys() == other_tensors.keys()
    assert all(torch.equal(tensor, other_tensors[name]) for name, tensor in tensors.items())
    assert state.pop("history") and other_state.pop("history") and state == other_state


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path, place=-50):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "truncated": lambda folder: cut(folder / "tensors.safetensors"),
    "a flipped bit of a weight": lambda folder: flip(folder / "tensors.safetensors"),
    "a flipped bit of the header": lambda folder: flip(folder / "tensors.safetensors", 20),
    "a flipped bit of the state": lambda folder: flip(folder / "state.json"),
    "empty": lambda folder: (folder / "tensors.safetensors").write_bytes(b""),
    "no weights": lambda folder: (folder / "tensors.safetensors").unlink(),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "no hash": lambda folder: (folder / "sha256").unlink(),
    "not JSON": lambda folder: (folder / "state.json").write_text("{", encoding="utf-8"),
    "a folder in place of a file": lambda folder: ((folder / "state.json").unlink(), (folder / "state.json").mkdir()),
    "an empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(
    interrupted, finished, words, data, capsys, damage
):
    folder, (_, before, newest) = interrupted
    DAMAGES[damage](newest)
    state, _ = load_checkpoint(folder)
    told = capsys.readouterr().err
    assert state["step"] == 4
    assert told.count("\n") == 1 and str(newest) in told and "damaged" in told and "the checkpoint before it is used" in told
    again = train(new_model(words), data, PLAN, words=words, folder=folder, resume=True)
    assert without_seconds(again) == without_seconds(finished[1])
    assert load_checkpoint(folder)[0]["step"] == 6


@pytest.mark.parametrize("damage", DAMAGES)
def test_if_all_are_damaged_one_sentence_says_so(interrupted, capsys, damage):
    folder, (_, *both) = interrupted
    for path in both:
        DAMAGES[damage](path)
    with pytest.raises(ValueError) as error:
        load_checkpoint(folder)
    sentence = str(error.value)
    assert "\n" not in sentence and all(str(path) in sentence for path in both) and sentence.endswith("remove the folder to begin anew")
    assert capsys.readouterr().err == ""


def test_damaged_checkpoints_do_not_push_out_whole_ones(interrupted, words, data, capsys):
    folder, (second, fourth, sixth) = interrupted
    flip(sixth / "state.json")
    # the run goes on from step 4, is stopped after step 5, and what is then written is damaged too
    with pytest.raises(KeyboardInterrupt):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "stopping_politely", lambda: stop_after(1))
            train(new_model(words), data, PLAN, words=words, folder=folder, resume=True)
    assert [path.name for path in checkpoints(folder)] == ["step-0000005", "step-0000004"]
    flip(folder / "step-0000005" / "state.json")
    assert load_checkpoint(folder)[0]["step"] == 4


def test_a_damaged_checkpoint_that_was_passed_over_does_not_count_later(interrupted, words, data):
    folder, (_, fourth, sixth) = interrupted
    flip(sixth / "state.json")
    train(new_model(words), data, replace(PLAN, save_every=1), words=words, folder=folder, resume=True)
    assert (folder / "damaged-step-0000006" / "state.json").exists()
    assert [path.name for path in checkpoints(folder)] == ["step-0000006", "step-0000005"]


def test_float16_is_refused_before_a_step(words, data):
    model = new_model(words).half()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match="the dtype of the weights is torch.float16; it must be torch.float32"):
        train(model, data, PLAN, words=words)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_bar_that_nobody_can_read_stops_nothing(words, data, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", Closed())
    bar = training.Bar(range(3), mininterval=0)
    assert list(bar) == [0, 1, 2]
    history = train(new_model(words), data, replace(PLAN, n_steps=2), words=words)
    assert len(history) == 2


def stop_after(n_steps):
    """Stands for ``stopping_politely``: Ctrl-C is pressed during a step."""

    @contextmanager
    def stopping():
        asked = []
        yield lambda: asked.append(1) or len(asked) >= n_steps

    return stopping()


@pytest.mark.parametrize("pressed_in", [1, 2, 3, 4, 5])
def test_ctrl_c_finishes_the_step_saves_it_and_says_how_to_go_on(finished, words, data, tmp_path, monkeypatch, pressed_in):
    with monkeypatch.context() as patch:
        patch.setattr(training, "stopping_politely", lambda: stop_after(pressed_in))
        with pytest.raises(KeyboardInterrupt, match=f"after step {pressed_in} of 6, saved in .*--resume goes on"):
            train(new_model(words), data, PLAN, words=words, folder=tmp_path)
    assert load_checkpoint(tmp_path)[0]["step"] == pressed_in
    again = train(new_model(words), data, PLAN, words=words, folder=tmp_path, resume=True)
    assert without_seconds(again) == without_seconds(finished[1])
    assert_same_end(tmp_path, finished[0])


@pytest.mark.parametrize("pressed_in", [3, 4, 5, 6])
def test_a_run_goes_on_into_the_steps_in_which_tokens_rest_and_within_them(words, data, tmp_path, monkeypatch, pressed_in):
    plan, whole, halves = replace(PLAN, n_steps=7, resting=0.4, accumulate=2), tmp_path / "whole", tmp_path / "halves"
    at_once = train(new_model(words), data, plan, words=words, folder=whole)
    with monkeypatch.context() as patch:
        patch.setattr(training, "stopping_politely", lambda: stop_after(pressed_in))
        with pytest.raises(KeyboardInterrupt, match=f"after step {pressed_in} of 7, saved in"):
            train(new_model(words), data, plan, words=words, folder=halves)
    again = train(new_model(words), data, plan, words=words, folder=halves, resume=True)
    assert len(again) == 7 and without_seconds(again) == without_seconds(at_once)
    assert_same_end(halves, whole)


@pytest.mark.parametrize("pressed_in", [6, 7])
def test_ctrl_c_in_the_last_step_or_while_it_is_written_is_heard(finished, words, data, tmp_path, monkeypatch, pressed_in):
    with monkeypatch.context() as patch:
        patch.setattr(training, "stopping_politely", lambda: stop_after(pressed_in))
        with pytest.raises(KeyboardInterrupt, match="stopped after step 6 of 6, saved in .*: the same command with --resume goes on"):
            train(new_model(words), data, PLAN, words=words, folder=tmp_path / "run")
    again = train(new_model(words), data, PLAN, words=words, folder=tmp_path / "run", resume=True)
    assert without_seconds(again) == without_seconds(finished[1])


def test_without_a_folder_ctrl_c_promises_nothing(words, data, monkeypatch):
    monkeypatch.setattr(training, "stopping_politely", lambda: stop_after(2))
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(new_model(words), data, PLAN, words=words)
    assert str(stopped.value) == "stopped after step 2 of 6"


def test_ctrl_c_is_noted_and_a_second_one_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with training.stopping_politely() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGHUP])
def test_being_told_to_end_is_noted_and_what_is_ignored_stays_so(kind):
    before = signal.signal(kind, signal.SIG_DFL)  # whatever nohup made of it
    try:
        with training.stopping_politely() as stopped:
            os.kill(os.getpid(), kind)
            assert stopped()
        assert signal.getsignal(kind) is signal.SIG_DFL
        signal.signal(kind, signal.SIG_IGN)
        with training.stopping_politely() as stopped:
            os.kill(os.getpid(), kind)
            assert not stopped()
    finally:
        signal.signal(kind, before)


OTHERS = {
    "n_steps is 7, and was 6": dict(plan=dict(n_steps=7)),
    "seed is 1, and was 0": dict(plan=dict(seed=1)),
    "n_facts is .*5.*, and was .*4": dict(plan=dict(n_facts=(5, 6))),
    "dim is 32, and was 16": dict(model=dict(dim=32)),
    "the text is not the one": dict(text=1),
}


@pytest.mark.parametrize("told", OTHERS)
def test_a_run_goes_on_only_as_the_same_run(interrupted, words, data, told):
    folder, other = interrupted[0], OTHERS[told]
    before = sorted((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file())
    with pytest.raises(ValueError, match=told) as error:
        model, plan = new_model(words, **other.get("model", {})), replace(PLAN, **other.get("plan", {}))
        train(model, data[other.get("text", 0) :], plan, words=words, folder=folder, resume=True)
    assert str(folder) in str(error.value) and str(error.value).endswith("or remove the folder to begin anew")
    assert before == sorted((path, path.read_bytes()) for path in folder.rglob("*") if path.is_file())


def test_a_run_goes_on_only_with_its_own_words_and_in_a_folder(interrupted, words, data):
    folder, _ = interrupted
    others = copy.copy(words)
    others.digits = words.digits.flip(0)
    with pytest.raises(ValueError, match="the words are not those of the run"):
        train(new_model(words), data, PLAN, words=others, folder=folder, resume=True)
    with pytest.raises(ValueError, match="folder is None; it must be given, to go on from it"):
        train(new_model(words), data, PLAN, words=words, resume=True)


def test_how_often_a_run_is_saved_may_change(interrupted, words, data):
    train(new_model(words), data, replace(PLAN, save_every=1), words=words, folder=interrupted[0], resume=True)


def test_a_second_run_into_a_folder_is_refused_and_costs_the_first_nothing(words, data, tmp_path):
    pytest.importorskip("fcntl", reason="this system has no locks to test")
    folder = tmp_path / "run"
    folder.mkdir()
    with training.alone_in(folder):
        (folder / "log.jsonl").write_text("of the first", encoding="utf-8")
        with pytest.raises(ValueError, match=f"another run is writing to {folder}"):
            train(new_model(words), data, PLAN, words=words, folder=folder)
        assert (folder / "log.jsonl").read_text(encoding="utf-8") == "of the first"
    assert len(train(new_model(words), data, PLAN, words=words, folder=folder)) == 6


def test_a_run_that_cannot_begin_leaves_no_folder(words, data, tmp_path):
    with pytest.raises(ValueError):
        train(new_model(words), data[:3], PLAN, words=words, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state["curriculum"].update(speed=3),
        lambda state: state["history"][0].append(1),
        lambda state: state.pop("history"),
        lambda state: state["config"].update(swing=2),
    ],
)
def test_a_run_of_another_version_is_refused_in_one_sentence(interrupted, words, data, change):
    folder, checkpoints = interrupted
    newest = checkpoints[-1]
    state = json.loads((newest / "state.json").read_text(encoding="utf-8"))
    change(state)
    (newest / "state.json").write_text(json.dumps(state), encoding="utf-8")
    contents = [(newest / name).read_bytes() for name in training.PARTS]
    (newest / "sha256").write_bytes(training._digest(contents))
    with pytest.raises(ValueError, match="remove the folder to begin anew$"):
        train(new_model(words), data, PLAN, words=words, folder=folder, resume=True)


def test_without_a_checkpoint_there_is_nothing_to_go_on_from(words, data, tmp_path):
    folder = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match="no checkpoint in .* to go on from: train without --resume"):
            train(new_model(words), data, PLAN, words=words, folder=folder, resume=True)
        if not folder.exists():
            folder.mkdir()  # as a run leaves it that was killed before its first checkpoint
            (folder / "log.jsonl").write_text("", encoding="utf-8")


def test_removing_a_run_leaves_what_others_put_there(interrupted):
    folder, _ = interrupted
    (folder / ".part-x").mkdir()
    (folder / "step-by-step").mkdir()
    (folder / "tensorboard").mkdir(exist_ok=True)
    (folder / "thesis.txt").write_text("years of work")
    remove_run(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["step-by-step", "thesis.txt"]
    (folder / "thesis.txt").unlink()
    (folder / "step-by-step").rmdir()
    remove_run(folder)
    assert not folder.exists()
    remove_run(folder)


@pytest.mark.parametrize("problem", [(28, "No space left on device"), (30, "Read-only file system")])
@pytest.mark.parametrize("write", ["tensors.safetensors", "state.json", "sha256", "mkdir", "rename", "log"])
def test_a_full_or_read_only_disk_leaves_the_newest_whole_checkpoint(
    words, data, finished, tmp_path, monkeypatch, problem, write
):
    write_bytes, rename, mkdtemp, dumps, take = Path.write_bytes, Path.rename, tempfile.mkdtemp, json.dumps, training_step
    taken = []

    def counted(*given, **options):
        taken.append(1)
        return take(*given, **options)

    def late():
        return len(taken) >= 6

    def half(path, content):
        if late() and path.name == write:
            write_bytes(path, content[: len(content) // 2])
            raise OSError(*problem)
        return write_bytes(path, content)

    def no_rename(path, target):
        if late() and write == "rename":
            raise OSError(*problem)
        return rename(path, target)

    def no_mkdtemp(*given, **options):
        if late() and write == "mkdir":
            raise OSError(*problem)
        return mkdtemp(*given, **options)

    def no_log(value, **options):
        if late() and write == "log" and isinstance(value, dict) and value.get("step") == 6 and "loss" in value:
            raise OSError(*problem)
        return dumps(value, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, "training_step", counted)
        patch.setattr(Path, "write_bytes", half)
        patch.setattr(Path, "rename", no_rename)
        patch.setattr(training.tempfile, "mkdtemp", no_mkdtemp)
        patch.setattr(training.json, "dumps", no_log)
        with pytest.raises(OSError, match=f"step 6 cannot be written to .*{problem[1]}.*make room.*--resume goes on"):
            train(new_model(words), data, PLAN, words=words, folder=tmp_path)
    assert load_checkpoint(tmp_path)[0]["step"] == 4
    assert not list(tmp_path.glob(".part-*"))
    again = train(new_model(words), data, PLAN, words=words, folder=tmp_path, resume=True)
    assert without_seconds(again) == without_seconds(finished[1])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("kept, goes_on", [(0, "begin anew"), (4, "the same command with --resume goes on")])
def test_a_log_on_a_full_disk_is_told_and_what_to_do(words, data, tmp_path, monkeypatch, kept, goes_on):
    """The line that does not fit stays in the buffer, so that closing the file fails once more."""
    if kept:
        with monkeypatch.context() as patch:
            patch.setattr(training, "stopping_politely", lambda: stop_after(kept))
            with pytest.raises(KeyboardInterrupt):
                train(new_model(words), data, PLAN, words=words, folder=tmp_path)
    monkeypatch.setattr(training, "open", lambda path, *how, **kind: open("/dev/full", *how, **kind), raising=False)
    problem = f"step {kept + 1} cannot be written to .*No space left on device.*: make room, then {goes_on}$"
    with pytest.raises(OSError, match=problem):
        train(new_model(words), data, PLAN, words=words, folder=tmp_path, resume=kept > 0)


LIVES = '''
"""One run, killed again and again: each life is a process of its own, ended by SIGKILL."""
import json, os, random, signal, sys, time, traceback
from pathlib import Path
import torch
from mythoslab import training
from mythoslab.model import Mythos, MythosConfig
from mythoslab.questions import Tokenizer

torch.set_num_threads(1)
folder, text, seed = Path(sys.argv[1]), Path(sys.argv[2]).read_text(encoding="utf-8"), int(sys.argv[3])
tokenizer = Tokenizer.train(text + training.question_words(), 512)
words, data = training.Words(tokenizer), tokenizer.encode(text)
plan = training.TrainConfig(n_steps=45, batch_size=2, question_batch=4, n_facts=(4, 6), n_asked=3, max_depth=3,
    n_passes=(1, 2), accumulate=2, bias_rate=0.01, save_every=3, chains_first=0.3, resting=0.2)
shape = MythosConfig(tokenizer.vocab_size, dim=16, n_heads=2, hidden_dim=24, n_passes=2, context_length=48, ffn="moe",
    expert_dim=8, n_routed_experts=4, halting="settled")
training.shortest_fact(words)
for optimiser in training.optimisers(Mythos(shape), plan):  # what this imports late is then there for every life
    optimiser.step()


def live(run, dies_at=None):
    """A life of the run, in a new process; with ``dies_at`` it kills itself at that point of writing a checkpoint."""
    pid = os.fork()
    if pid:
        return pid
    try:
        sys.stderr = open(os.devnull, "w")
        if dies_at is not None:
            arm(dies_at)
        torch.manual_seed(0)
        model = Mythos(shape)
        going_on = any(run.glob("step-*"))
        training.train(model, data, plan, words=words, folder=run, resume=going_on)
        os._exit(0)
    except BaseException:
        sys.stderr = sys.__stderr__
        traceback.print_exc()
        os._exit(1)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point):
    real = {"write": Path.write_bytes, "rename": Path.rename, "rmtree": training.shutil.rmtree}
    if point == "half a file":
        def write(path, content):
            real["write"](path, content[: len(content) // 2]), die()
        Path.write_bytes = write
    elif point == "between files":
        def write(path, content):
            real["write"](path, content), die()
        Path.write_bytes = write
    elif point == "before its place":
        Path.rename = die
    elif point == "at its place":
        def rename(path, target):
            real["rename"](path, target), die()
        Path.rename = rename
    elif point == "while an old one goes":
        def rmtree(path, *given, **kind):
            if Path(path).name.startswith("step-"):
                next(Path(path).iterdir()).unlink()
                die()
            real["rmtree"](path, *given, **kind)
        training.shutil.rmtree = rmtree


def n_lines(run):
    try:
        return (run / "log.jsonl").read_bytes().count(b"\\n")
    except FileNotFoundError:
        return 0


def ended(pid, wait=False):
    done, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
    return status if done else None


draw, kills, in_writing = random.Random(seed), [], 0
run = folder / "killed"
points = ["half a file", "between files", "before its place", "at its place", "while an old one goes"]
plans = [(lines, None) for lines in sorted(draw.sample(range(1, 40), 20))]
for point in points:
    plans.insert(draw.randrange(4, len(plans)), (None, point))
for lines, point in plans:
    pid = live(run, point)
    if point is None:
        inside = draw.random() < 0.4
        while n_lines(run) < lines and ended(pid) is None:
            time.sleep(0.0005)
        while inside and not any(run.glob(".part-*")) and n_lines(run) < lines + 3 and ended(pid) is None:
            time.sleep(0.0001)
        time.sleep(draw.random() * (0.003 if inside else 0.03))
        os.kill(pid, signal.SIGKILL)  # had it ended before, this would fail
    status = ended(pid, wait=True)
    in_writing += any(run.glob(".part-*"))
    kills.append({"killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == 9, "lines": n_lines(run), "point": point})
assert os.waitstatus_to_exitcode(ended(live(run), wait=True)) == 0, "the last life did not end well"
whole = folder / "whole"
assert os.waitstatus_to_exitcode(ended(live(whole), wait=True)) == 0
print(json.dumps({"kills": kills, "in_writing": in_writing}))
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")
@pytest.mark.parametrize("seed", [0])
def test_a_run_killed_at_any_moment_and_resumed_is_bit_identical_to_one_never_killed(tmp_path, seed):
    (tmp_path / "lives.py").write_text(LIVES, encoding="utf-8")
    (tmp_path / "text.txt").write_text(real_text()[:60_000], encoding="utf-8")
    words = [sys.executable, str(tmp_path / "lives.py"), str(tmp_path), str(tmp_path / "text.txt"), str(seed)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}  # a fork cannot use a GPU
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    by_others = [kill for kill in told["kills"] if kill["point"] is None]
    assert len(by_others) == 20 and all(kill["killed"] for kill in told["kills"]) and len(told["kills"]) == 25
    assert len({kill["lines"] for kill in by_others}) >= 10 and told["in_writing"] >= 3

    def log(name):
        lines = (tmp_path / name / "log.jsonl").read_text(encoding="utf-8").splitlines()
        return without_seconds(Step(**json.loads(line)) for line in lines)

    assert len(log("whole")) == 45 and log("killed") == log("whole")
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
    assert load_checkpoint(tmp_path / "whole")[0]["curriculum"]["running"] > 0
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
    assert len(checkpoints(tmp_path / "killed")) == 2


# Plans, yardsticks


@given(
    n_steps=st.integers(1, 300),
    warm_up=st.floats(0, 0.5),
    decay=st.floats(0, 0.5),
    batch_size=st.integers(1, 9),
)
def test_the_rate_rises_holds_and_falls_and_is_never_zero(n_steps, warm_up, decay, batch_size):
    config = TrainConfig(n_steps=n_steps, warm_up=warm_up, decay=decay, batch_size=batch_size)
    shares = [schedule(step, config) for step in range(n_steps)]
    assert all(0 < share <= 1 for share in shares)
    top = shares.index(max(shares))
    assert shares[: top + 1] == sorted(shares[: top + 1]) and shares[top:] == sorted(
        shares[top:], reverse=True
    )
    assert math.isclose(shares[-1], min(1, 1 / max(1, decay * n_steps), n_steps / max(1, warm_up * n_steps)))


@pytest.mark.parametrize(
    "field, wrong",
    [
        ("n_steps", 0),
        ("n_steps", 2.5),
        ("batch_size", -1),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("clip", 0.0),
        ("weight_decay", -0.1),
        ("warm_up", 1.5),
        ("decay", -0.5),
        ("chains_first", 1.5),
        ("chains_first", None),
        ("resting", -0.1),
        ("resting", True),
        ("n_passes", (1, 0)),
        ("n_passes", 3),
        ("learning_rate", "0.1"),
        ("clip", True),
        ("weight_decay", None),
        ("warm_up", None),
        ("decay", True),
        ("seed", -1),
        ("seed", 2**63),
        ("question_batch", -1),
        ("n_backward", -1),
        ("max_depth", 0),
        ("max_depth", 20),
        ("n_facts", (1, 6)),
        ("n_facts", (6, 4)),
        ("n_facts", (6, 41)),
        ("n_facts", (6,)),
        ("n_asked", 0),
        ("more_passes", 0),
        ("n_read", 0),
        ("n_digits", 0),
        ("accumulate", 0),
        ("halting_steps", -1),
        ("bias_rate", -0.1),
        ("save_every", 0),
    ],
)
def test_a_wrong_field_is_named_with_what_was_got(field, wrong):
    unchecked = reference("training").TrainConfig  # without the type checker of the tests, as users have it
    with pytest.raises(ValueError) as error:
        unchecked(**{field: wrong})
    assert str(error.value).startswith(f"{field} is {wrong!r}; it must be ")


def test_rise_and_fall_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="warm_up \\+ decay"):
        TrainConfig(warm_up=0.6, decay=0.6)


def test_a_step_without_anything_to_read_is_refused():
    with pytest.raises(ValueError, match="batch_size \\+ question_batch"):
        TrainConfig(batch_size=0, question_batch=0)


def test_a_plan_comes_back_from_json():
    plan = TrainConfig(n_passes=(1, 2), n_facts=(3, 7), seed=5)
    assert TrainConfig.from_json(json.loads(json.dumps(asdict(plan)))) == plan


def test_what_training_needs_is_asked_for_before_it_begins(words, data, tmp_path):
    with pytest.raises(ValueError, match="words is None"):
        train(new_model(words), data, PLAN, folder=tmp_path / "run")
    with pytest.raises(ValueError, match="the longest text of questions is 80; it must be at most context_length, 64"):
        train(new_model(words), data, replace(PLAN, n_facts=(6, 20), n_asked=10), words=words, folder=tmp_path / "run")
    with pytest.raises(ValueError, match="more than context_length"):
        train(new_model(words), data[:64], PLAN, words=words, folder=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [dict(max_depth=5, n_asked=12), dict(n_facts=(2, 12), max_depth=2, n_asked=9), dict(n_facts=(2, 3), n_asked=1)])
def test_the_longest_question_is_as_long_as_is_said(words, kind):
    config = TrainConfig(question_batch=1, **kind)
    lengths = set()
    for seed in range(80):
        curriculum = Curriculum(config.max_depth, depth=1 + seed % config.max_depth)
        lengths.add(draw_questions(words, config, curriculum, seeded(seed))[0].tokens.shape[1])
    assert max(lengths) == config.longest_question


def by_hand(training, held_out, order):
    """The model as its definition reads."""

    def chance(context, byte):
        shorter = chance(context[1:], byte) if context else 1 / 256
        places = range(len(context), len(training))
        followed = [training[place] for place in places if training[place - len(context) : place] == context]
        kinds = len(set(followed))
        return (followed.count(byte) + kinds * shorter) / (len(followed) + kinds) if followed else shorter

    text = training[len(training) - order :] + held_out
    return sum(
        -math.log2(chance(text[place - order : place], text[place])) for place in range(order, len(text))
    ) / len(held_out)


@given(st.text("abc é", min_size=7, max_size=60), st.text("abcd é", min_size=1, max_size=20), st.integers(0, 6))
def test_counted_bytes_are_what_the_definition_says(training, held_out, order):
    expected = by_hand(training.encode(), held_out.encode(), order)
    assert math.isclose(ngram_bits(training, held_out, order), expected, rel_tol=1e-9)


def test_order_three_knows_a_rule_of_three_bytes_and_gives_surprises_a_chance():
    training = "abcd" * 500
    assert ngram_bits(training, "abcd" * 50) < 0.05
    assert 3 < ngram_bits(training, "\x00\x01" * 20) < 40


def test_lzma_copies_from_anywhere_in_the_training_text():
    text = real_text()
    passage = text[1000:6000]
    assert lzma_bits(text, passage) < 0.1 < lzma_bits(text[6000:], passage)


def test_held_out_bits_of_a_fair_die_are_those_of_the_vocabulary():
    model = Mythos(MythosConfig(vocab_size=64, **SHAPE))
    with torch.no_grad():
        model.head.weight.zero_()
    for n_tokens in (2, 20, 33, 34, 100, 1000):
        assert math.isclose(
            held_out_bits(model, torch.randint(64, (n_tokens,)), 2 * n_tokens), 3.0, rel_tol=1e-5
        )


def test_held_out_bits_predict_each_token_once_with_half_a_context_before_it(trained):
    tokenizer, model, *_, held_out = trained
    tokens = tokenizer.encode(held_out)[:90]
    nats = math.log(400)
    with torch.no_grad():
        for place in range(1, 90):  # token by token, from the window that is the first to reach it
            starts = [*range(0, 57, 16), 57]
            start = next(start for start in starts if place <= start + 32)
            assert place - start > 16 or start in (0, 57)
            logits = model(tokens[None, start:place]).logits[0, -1]
            nats += F.cross_entropy(logits, tokens[place]).item()
    assert math.isclose(held_out_bits(model, tokens, 250), nats / math.log(2) / 250, rel_tol=1e-4)


# Models on disk


def test_a_saved_model_comes_back_whole(trained, tmp_path):
    tokenizer, model, *_ = trained
    save(tmp_path / "new" / "model", model, tokenizer)
    again, read = load(tmp_path / "new" / "model")
    tokens = torch.randint(400, (2, 20))
    assert torch.equal(again(tokens).logits, model(tokens).logits) and again.config == model.config
    assert read.encode("for x in y").tolist() == tokenizer.encode("for x in y").tolist()
    assert again.head.weight is again.embedding.weight
    assert sorted(file.name for file in tmp_path.rglob("*") if file.is_file()) == sorted(training.FILES)


def test_untied_weights_are_saved_too(tmp_path):
    tokenizer = Tokenizer.train("some text", 300)
    model = Mythos(MythosConfig(vocab_size=tokenizer.vocab_size, tie_embeddings=False, **SHAPE))
    save(tmp_path / "model", model, tokenizer)
    assert torch.equal(load(tmp_path / "model")[0].head.weight, model.head.weight)


def test_saving_again_replaces_the_old_model_and_a_failure_keeps_it(trained, tmp_path, monkeypatch):
    tokenizer, model, *_ = trained
    save(tmp_path / "model", model, tokenizer)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.norm.weight.fill_(3.0)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save", full)
        with pytest.raises(OSError):
            save(tmp_path / "model", changed, tokenizer)
    assert torch.equal(load(tmp_path / "model")[0].norm.weight, model.norm.weight)
    save(tmp_path / "model", changed, tokenizer)
    assert torch.equal(load(tmp_path / "model")[0].norm.weight, changed.norm.weight)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("before_rename", [1, 2])
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interruption_while_the_new_model_takes_its_place_keeps_the_old(
    trained, tmp_path, monkeypatch, before_rename, interruption
):
    tokenizer, model, *_ = trained
    save(tmp_path / "model", model, tokenizer)
    changed, rename, calls = copy.deepcopy(model), Path.rename, []
    with torch.no_grad():
        changed.norm.weight.fill_(3.0)

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == before_rename:
            raise interruption
        return rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises((KeyboardInterrupt, OSError)):
            save(tmp_path / "model", changed, tokenizer)
    assert torch.equal(load(tmp_path / "model")[0].norm.weight, model.norm.weight)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_folder_with_other_files_is_never_replaced(trained, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="thesis.txt"):
        save(tmp_path, trained[1], trained[0])
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", ["README.md", "config.json", "log.jsonl", "results.json", "tensorboard"])
def test_what_lies_where_no_model_does_is_somebodys_own(trained, tmp_path, name):
    (tmp_path / name).write_text("my notes")
    with pytest.raises(ValueError, match=f"what lies in .* is '{name}'"):
        save(tmp_path, trained[1], trained[0])
    assert (tmp_path / name).read_text() == "my notes"


def test_a_description_that_somebody_wrote_of_a_model_is_not_replaced(trained, tmp_path):
    save(tmp_path / "model", trained[1], trained[0])
    (tmp_path / "model" / "README.md").write_text("my notes")
    with pytest.raises(ValueError, match="README.md"):
        save(tmp_path / "model", trained[1], trained[0])


def test_a_folder_that_a_new_one_cannot_replace_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the folder to save to is .*; it must be neither the current folder nor a mount point"):
        training.can_save(".")
    with pytest.raises(ValueError, match="nor a mount point"):
        training.can_save(next(folder for folder in ("/proc", "/dev", "/") if os.path.ismount(folder)))


def with_nan(model):
    with torch.no_grad():
        model.norm.weight[0] = math.nan


def with_a_layer_more(model):
    model.extra = torch.nn.Linear(2, 2)


def with_a_head_of_its_own(model):
    model.head.weight = torch.nn.Parameter(model.head.weight.detach() + 1)


NOT_TO_BE_READ = [
    (with_nan, "the content of norm.weight is 'not finite"),
    (with_a_layer_more, r"extra.bias is \(2,\); it must be left out"),
    (with_a_head_of_its_own, "head.weight is 'other numbers than embedding.weight'"),
    (lambda model: model.norm.double(), "the dtypes of the weights"),
]


@pytest.mark.parametrize("change, sentence", NOT_TO_BE_READ)
def test_what_could_not_be_read_again_is_not_written(trained, tmp_path, change, sentence):
    save(tmp_path / "model", trained[1], trained[0])
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    model = copy.deepcopy(trained[1])
    change(model)
    with pytest.raises(ValueError, match=sentence):
        save(tmp_path / "model", model, trained[0])
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_a_model_whose_tie_was_loaded_apart_is_written(trained, tmp_path):
    model = copy.deepcopy(trained[1])
    model.load_state_dict(model.state_dict(), assign=True)
    assert model.head.weight is not model.embedding.weight
    save(tmp_path / "model", model, trained[0])
    assert torch.equal(load(tmp_path / "model")[0].head.weight, model.embedding.weight)


def test_a_vocabulary_that_is_not_that_of_the_tokenizer_is_not_written(trained, tmp_path):
    model = Mythos(MythosConfig(vocab_size=512, **SHAPE))
    with pytest.raises(ValueError, match="vocab_size is 512; it must be 400 as in the tokenizer"):
        save(tmp_path / "model", model, trained[0])
    assert list(tmp_path.iterdir()) == []


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, torch.nn.DataParallel, lambda model: torch.nn.DataParallel(compiled(model))])
def test_a_wrapped_model_is_sorted_and_saved_as_the_model_in_it(trained, tmp_path, wrap):
    inside = copy.deepcopy(trained[1])
    wrapped = wrap(inside)
    kinds = [[[id(weight) for weight in group["params"]] for group in optimiser.param_groups] for optimiser in optimisers(wrapped, PLAN)]
    assert kinds == [[[id(weight) for weight in group["params"]] for group in optimiser.param_groups] for optimiser in optimisers(inside, PLAN)]
    save(tmp_path / "model", wrapped, trained[0])
    again = load(tmp_path / "model")[0].state_dict()
    assert all(torch.equal(again[name], weight.cpu()) for name, weight in inside.state_dict().items())


COMPILED = """
import shutil, sys
import torch
from mythoslab.model import Mythos, MythosConfig
from mythoslab.training import TrainConfig, train
torch.set_num_threads(1)
def new():
    torch.manual_seed(0)
    return Mythos(MythosConfig(vocab_size=64, dim=16, n_heads=2, hidden_dim=16, context_length=16))
data, plan = torch.randint(64, (500,)), TrainConfig(n_steps=4, batch_size=2, save_every=2)
losses = [step.loss for step in train(new(), data, plan, folder="run")]
shutil.rmtree("run/step-0000004")
again = train(torch.compile(new(), backend="eager"), data, plan, folder="run", resume=True)
assert [step.loss for step in again] == losses
"""


def test_a_compiled_model_goes_on_where_a_plain_one_stopped(tmp_path):
    result = subprocess.run([sys.executable, "-c", COMPILED], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_model_is_saved_where_a_link_points(trained, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    save(tmp_path / "link", trained[1], trained[0])
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "model.safetensors").is_file()


def damage_config(folder):
    (folder / "config.json").write_text("{")


def damage_width(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_dim": 65}))


def damage_blocks(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_coda": 0}))


def damage_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_dim": 10**12}))


def damage_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-200])


def damage_encoding(folder):
    (folder / "config.json").write_bytes(b"\xff\xfe{")


def damage_tokenizer(folder):
    (folder / "tokenizer.json").write_text("[]")


def damage_vocabulary(folder):
    Tokenizer.train("short", 300).save(folder / "tokenizer.json")


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file({name: change(name, weight) for name, weight in weights.items()}, folder / "model.safetensors")


def damage_number(folder):
    change_weights(folder, lambda name, weight: weight.masked_fill(torch.arange(len(weight)).view(-1, *[1] * (weight.dim() - 1)) == 0, math.nan))


def damage_dtype(folder):
    change_weights(folder, lambda name, weight: weight.half() if "core" in name else weight)


def damage_whole(folder):
    change_weights(folder, lambda name, weight: weight.int())


@pytest.mark.parametrize(
    "damage",
    [
        damage_config,
        damage_number,
        damage_dtype,
        damage_whole,
        damage_width,
        damage_blocks,
        damage_weights,
        damage_size,
        damage_encoding,
        damage_tokenizer,
        damage_vocabulary,
    ],
)
def test_a_damaged_model_is_refused_in_one_sentence(trained, tmp_path, damage, capsys):
    save(tmp_path / "model", trained[1], trained[0])
    damage(tmp_path / "model")
    assert cli.main(["ask", "def", "--from", str(tmp_path / "model")]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert "damaged" in told.err and "train it again" in told.err


def test_nothing_is_unpickled(tmp_path, trained):
    save(tmp_path / "model", trained[1], trained[0])
    torch.save({"embedding.weight": torch.zeros(3)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        load(tmp_path / "model")


def test_a_continuation_streams_whole_characters_and_follows_its_seed(trained):
    tokenizer, model, *_ = trained
    pieces = list(continuation(model, tokenizer, "The for", 40, seed=1))
    assert len(pieces) > 5 and "".join(pieces) == "".join(
        continuation(model, tokenizer, "The for", 40, seed=1)
    )
    assert "".join(pieces) != "".join(continuation(model, tokenizer, "The for", 40, seed=2))
    tokens = list(generate(model, tokenizer.encode("The for"), 40, temperature=0))
    assert "".join(continuation(model, tokenizer, "The for", 40, temperature=0)) == tokenizer.decode(tokens)


def test_a_character_of_several_bytes_waits_until_it_is_whole(monkeypatch, trained):
    tokenizer = Tokenizer.train("plain", 256)
    text = "né€😀!"
    monkeypatch.setattr(training, "generate", lambda *_, **__: iter(tokenizer.encode(text).tolist()))
    assert [piece for piece in continuation(trained[1], tokenizer, "x") if piece] == list(text)


# Commands


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The commands on sizes that take no time; gives the words of `train` for it."""
    monkeypatch.setattr(training, "preset", lambda name: MythosConfig(512, halting="settled", **SMALL))
    monkeypatch.setitem(training.TRAINING, "tiny", replace(PLAN, halting_steps=2))
    text, out = tmp_path / "text.txt", tmp_path / "runs" / "mine"
    text.write_text(real_text()[:60_000], encoding="utf-8")
    return ["train", "--preset", "tiny", "--text", str(text), "--out", str(out)], out


def test_train_says_all_it_promises_and_ask_goes_on_from_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    text, out = tmp_path / "text.txt", tmp_path / "runs" / "mine"
    text.write_text(real_text()[:150_000], encoding="utf-8")
    train_ = ["train", "--preset", "tiny", "--text", str(text), "--out", str(out), "--steps", "2", "--seed", "3"]
    assert cli.main(train_) == 0
    printed = capsys.readouterr().out
    lines, passes = printed.splitlines(), load(out)[0].config.n_passes
    bits = lines[lines.index("bits per byte of the held-out text") + 1 :]
    counts = ("1 pass", f"{passes} passes, as configured", f"{2 * passes} passes", f"{4 * passes} passes")
    for line, name in zip(bits, (*counts, "order-3 bytes", "lzma")):
        assert line[2:36].strip() == name and 0 < float(line[36:]) < 10
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert training.told_results(results) in printed and results["run"]["n_steps"] == 2 and results["run"]["seed"] == 3
    assert set(results["right"]) == {"forests", "balanced", "sums", "facts", "longer", "resting", "alone"}
    assert set(results["right"]["alone"]) == {"enough"} and "late" not in results  # tiny has no halting head
    for kind, by_passes in results["right"].items():
        if kind == "alone":
            continue
        enough = {"enough"} if kind in ("longer", "resting") else set()
        assert set(by_passes) == {str(count * passes) if count else "1" for count in (0, 1, 2, 4)} | enough
        assert all(0 <= share <= 1 for shares in by_passes.values() for share in shares)
    assert len(results["right"]["balanced"]["1"]) == 4 and len(results["right"]["sums"]["1"]) == 4
    assert str(out) in printed and "The for statement" in printed
    assert {path.name for path in out.iterdir()} == {*training.FILES, "log.jsonl", "results.json"}
    assert len((out / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert list(out.parent.iterdir()) == [out]
    assert cli.main(["ask", "Hello", "--from", str(out), "--tokens", "5", "--passes", "1", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("Hello")


def test_every_preset_that_can_be_trained_has_a_shape_that_its_questions_fit():
    from mythoslab.model import preset

    for name, plan in training.TRAINING.items():
        assert not plan.question_batch or plan.longest_question <= preset(name).context_length
        assert not plan.halting_steps or preset(name).has_head


def test_a_model_that_learned_text_alone_is_measured_on_text_alone(small, monkeypatch, capsys):
    words, out = small
    monkeypatch.setitem(training.TRAINING, "tiny", replace(PLAN, question_batch=0))
    assert cli.main(words) == 0
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert "right" not in results and set(results["bits_per_byte"]) == {"1", "2", "4", "8", "order-3 bytes", "lzma"}
    assert "right answers" not in capsys.readouterr().out


def test_a_second_training_takes_the_place_of_the_first(small, board):
    words, out = small
    assert cli.main(words) == 0
    first = (out / "model.safetensors").read_bytes()
    assert (out / "tensorboard").is_dir() and list(out.parent.iterdir()) == [out]
    assert cli.main([*words, "--seed", "1"]) == 0
    assert (out / "model.safetensors").read_bytes() != first and list(out.parent.iterdir()) == [out]


def stopped_at(monkeypatch, words, n_steps):
    with monkeypatch.context() as patch:
        patch.setattr(training, "stopping_politely", lambda: stop_after(n_steps))
        assert cli.main(words) == 130


def test_resume_ends_with_the_same_model_as_a_run_that_was_never_stopped(small, monkeypatch, capsys):
    words, out = small
    assert cli.main(words) == 0
    whole = (out / "model.safetensors").read_bytes()
    stopped_at(monkeypatch, words, 3)
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"mythoslab: stopped after step 3 of 6, saved in {out}.training: the same command with --resume goes on"
    assert (out / "model.safetensors").read_bytes() == whole  # the model of before is kept meanwhile
    assert cli.main([*words, "--resume"]) == 0
    assert (out / "model.safetensors").read_bytes() == whole and list(out.parent.iterdir()) == [out]


def test_ctrl_c_in_the_second_stage_says_how_to_go_on_too(small, monkeypatch, capsys):
    words, out = small

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_halting", interrupted)
        assert cli.main(words) == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"saved in {out}.training: the same command with --resume goes on")
    assert not out.exists()
    assert cli.main([*words, "--resume"]) == 0 and load(out)


def test_what_stops_the_measuring_costs_nothing(small, monkeypatch, capsys):
    words, out = small

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(training, "measure", interrupted)
        assert cli.main(words) == 130
    told = capsys.readouterr()
    assert f"saved to {out}; measuring it" in told.out and told.err.splitlines()[-1].endswith("the same command with --resume goes on")
    assert load(out) and not (out / "results.json").exists()
    write_text = Path.write_text
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda path, *given, **kind: full() if path.name == ".results.part" else write_text(path, *given, **kind))
        assert cli.main([*words, "--resume"]) == 2
    told = capsys.readouterr()
    assert "bits per byte of the held-out text" in told.out  # what was measured is not lost
    assert told.err.splitlines()[-1].endswith("(No space left on device): make room, then the same command with --resume goes on")
    assert cli.main([*words, "--resume"]) == 0
    assert json.loads((out / "results.json").read_text(encoding="utf-8"))["run"]["n_steps"] == 6 and list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_with_experts_comes_back_in_its_dtype(trained, tmp_path, dtype):
    config = replace(trained[1].config, ffn="moe", expert_dim=8, n_routed_experts=4)
    save(tmp_path / "model", Mythos(config).to(dtype), trained[0])
    assert {weight.dtype for weight in load(tmp_path / "model")[0].parameters()} == {dtype}


def test_a_reader_who_goes_away_while_it_is_measured_is_no_unwritable_folder(small, monkeypatch, capsys):
    words, out = small

    def gone(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr(training, "told_results", gone)
    monkeypatch.setattr(cli.os, "dup2", lambda *_: None)
    assert cli.main(words) == 141
    assert (out / "results.json").exists() and list(out.parent.iterdir()) == [out]


def test_a_run_that_is_being_measured_is_not_gone_on_with_by_another(small, monkeypatch, capsys):
    pytest.importorskip("fcntl", reason="this system has no locks to test")
    words, out = small
    stopped_at(monkeypatch, words, 3)
    run = out.with_name("mine.training")
    capsys.readouterr()
    with training.alone_in(run):
        assert cli.main([*words, "--resume"]) == 2
    assert f"another run is writing to {run}" in capsys.readouterr().err
    assert cli.main([*words, "--resume"]) == 0


def test_a_text_of_which_hardly_anything_is_held_out_is_refused_before_training(small, monkeypatch, capsys):
    words, out = small
    monkeypatch.setattr(training, "split", lambda text: (text, "a"))
    assert cli.main(words) == 2
    assert capsys.readouterr().err == "mythoslab: the number of tokens held out is 1; it must be at least 2: give a longer text\n"
    assert not out.exists()


def test_the_command_that_is_printed_can_be_run(small, capsys):
    words, out = small
    assert cli.main([*words[:-1], f"{out} of mine"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"--from '{out} of mine'")


def test_a_full_disk_in_the_end_costs_nothing(small, monkeypatch, capsys):
    words, out = small

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "save", full)
        assert cli.main(words) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"mythoslab: {out} cannot be written (No space left on device): make room, then the same command with --resume goes on"
    assert [path.name for path in out.parent.iterdir()] == ["mine.training"]
    assert cli.main([*words, "--resume"]) == 0 and load(out)


@pytest.mark.parametrize(
    "words, told",
    [
        (("--steps", "7"), "n_steps is 7, and was 6 in the run"),
        (("--seed", "1"), "seed is 1, and was 0 in the run"),
        (("--text", "other"), "the text is not the one of the run"),
    ],
)
def test_resume_of_another_run_is_refused_and_the_run_left_as_it_was(small, tmp_path, monkeypatch, capsys, words, told):
    train_, out = small
    stopped_at(monkeypatch, train_, 3)
    if words[0] == "--text":
        (tmp_path / "other").write_text(real_text()[60_000:120_000], encoding="utf-8")
        words = ("--text", str(tmp_path / "other"))
    before = sorted((path, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file())
    capsys.readouterr()
    assert cli.main([*train_, *words, "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("mythoslab: ") and told in error and "remove the folder to begin anew" in error
    assert before == sorted((path, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file())


def test_resume_without_a_run_is_refused_at_once(small, monkeypatch, capsys):
    words, out = small
    monkeypatch.setattr(Tokenizer, "train", lambda *_: pytest.fail("it prepared first"))
    assert cli.main([*words, "--resume"]) == 2
    ended = capsys.readouterr()
    assert ended.out == "" and ended.err.count("\n") == 1
    assert ended.err == f"mythoslab: there is no checkpoint in {out}.training to go on from: train without --resume\n"
    assert not out.parent.exists()


def test_resume_with_nothing_but_damaged_checkpoints_is_refused_in_one_sentence(small, monkeypatch, capsys):
    words, out = small
    stopped_at(monkeypatch, words, 3)
    for path in checkpoints(Path(f"{out}.training")):
        flip(path / "state.json")
    capsys.readouterr()
    assert cli.main([*words, "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "damaged" in error and "remove the folder to begin anew" in error


def test_a_second_run_says_that_it_replaces_a_model(small, capsys):
    words, out = small
    assert cli.main(words) == 0
    assert "is replaced" not in capsys.readouterr().err
    assert cli.main(words) == 0
    assert f"a trained model lies in {out}: it is replaced when this run is done" in capsys.readouterr().err


def test_a_run_that_nobody_reads_is_saved_whole(small, monkeypatch):
    class Closed(io.StringIO):
        def flush(self):
            raise BrokenPipeError(32, "Broken pipe")

    words, out = small
    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "dup2", lambda *_: None)
        assert cli.main(words) == 141
    assert (out / "results.json").exists() and load(out) and not Path(f"{out}.training").exists()


def test_a_refused_text_leaves_an_interrupted_run_as_it_was(small, monkeypatch):
    words, out = small
    stopped_at(monkeypatch, words, 3)
    assert cli.main([*words, "--text", "nowhere.txt"]) == 2
    assert cli.main([*words, "--resume"]) == 0


def test_a_folder_named_like_a_run_keeps_what_is_not_of_a_run(small):
    words, out = small
    mine = Path(f"{out}.training", "thesis.txt")
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    assert cli.main(words) == 0
    assert mine.read_text() == "years of work" and list(mine.parent.iterdir()) == [mine]


def test_the_forest_is_not_resumed(tmp_path, capsys):
    assert cli.main(["train", "--preset", "forest", "--resume", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--resume" in error and list(tmp_path.iterdir()) == []


def run(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "mythoslab.cli", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


SHRUNK = """
import sys
from mythoslab import cli, training
from mythoslab.model import MythosConfig
training.preset = lambda name: MythosConfig(512, dim=16, n_heads=2, hidden_dim=24, n_passes=2, context_length=64)
plan = dict(n_steps=150, batch_size=2, question_batch=4, n_facts=(4, 6), n_asked=3, max_depth=3, save_every=1000)
training.TRAINING["tiny"] = training.TrainConfig(**plan)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such signal")
def test_ctrl_c_on_the_command_line_saves_and_resume_goes_on(tmp_path):
    (tmp_path / "text.txt").write_text(real_text()[:60_000], encoding="utf-8")
    words = [sys.executable, "-c", SHRUNK, "train", "--preset", "tiny", "--text", "text.txt"]
    kind = dict(cwd=tmp_path, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    kind["env"] = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(words, **kind)
    log = tmp_path / "runs" / "tiny.training" / "log.jsonl"
    try:
        while not log.exists() or log.read_bytes().count(b"\n") < 3:
            assert running.poll() is None, running.communicate()[1]
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        _, error = running.communicate(timeout=120)
    finally:
        running.kill()
    assert running.returncode == 130 and "Traceback" not in error
    last = error.splitlines()[-1]
    n_steps = len(log.read_text(encoding="utf-8").splitlines())
    assert last == f"mythoslab: stopped after step {n_steps} of 150, saved in {log.parent}: the same command with --resume goes on"
    assert [path.name for path in checkpoints(log.parent)] == [f"step-{n_steps:07}"]
    done = subprocess.run([*words, "--resume"], **kind)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "runs" / "tiny" / "log.jsonl").read_text(encoding="utf-8").splitlines()) == 150
    assert not log.parent.exists()


def test_without_a_model_ask_says_how_to_get_one(tmp_path):
    ended = run("ask", "Hello", cwd=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert "mythoslab train --preset tiny" in ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_preset_leaves_nothing_behind(tmp_path):
    ended = run("train", "--preset", "giant", cwd=tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert "'giant'" in ended.stderr and "tiny" in ended.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content, words, told",
    [
        (b"", (), "empty"),
        (b" \n\t\n", (), "empty"),
        (b"caf\xe9 and more", (), "not UTF-8"),
        (None, (), "cannot be read"),
        (b"one line", (), "at least 2"),
        (b"one line\n\nanother", (), "more than context_length"),
        (b"x", ("--steps", "0"), "--steps is 0"),
        (b"x", ("--steps", "-3"), "--steps is -3"),
        (b"x", ("--seed", "-1"), "seed is -1"),
    ],
)
def test_bad_input_is_refused_in_one_sentence_and_nothing_is_written(tmp_path, capsys, content, words, told):
    text, out = tmp_path / "text.txt", tmp_path / "runs" / "out"
    if content is not None:
        text.write_bytes(content)
    assert cli.main(["train", "--preset", "tiny", "--text", str(text), "--out", str(out), *words]) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
    assert error.splitlines()[-1].startswith("mythoslab: ") and error.count("mythoslab: ") == 1
    assert list(tmp_path.iterdir()) == ([text] if content is not None else [])


def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(training, "train", lambda *_, **__: pytest.fail("it trained first"))
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/mythoslab")):
        assert cli.main(["train", "--preset", "tiny", "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "cannot be written" in error and str(out) in error
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    "prompt, words, told",
    [
        ("word " * 200, (), "it must have at most 32, the context"),
        ("", (), "the prompt is empty"),
        ("x", ("--tokens", "-1"), "--tokens is -1"),
        ("x", ("--passes", "0"), "--passes is 0"),
        ("x", ("--temperature", "-1"), "temperature is -1"),
        ("x", ("--temperature", "nan"), "temperature is nan"),
        ("x", ("--seed", "-1"), "seed is -1"),
    ],
)
def test_bad_questions_are_refused_in_one_sentence(trained, tmp_path, capsys, prompt, words, told):
    save(tmp_path / "model", trained[1], trained[0])
    assert cli.main(["ask", prompt, "--from", str(tmp_path / "model"), *words]) == 2
    ended = capsys.readouterr()
    assert ended.out == "" and ended.err.count("\n") == 1 and told in ended.err


def test_apples_gpu_is_used_only_if_its_numbers_agree(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for problem, device in (("its numbers differ", "cpu"), ("", "mps")):
        monkeypatch.setattr(training, "mps_problem", lambda problem=problem: problem)
        assert choose_device().type == device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device().type == "cuda"


# Mistakes that learners make, and a word of the sentence that names each.


def in_nats(model, tokens, n_bytes, *, n_passes=None):
    return held_out_bits(model, tokens, n_bytes, n_passes=n_passes) * math.log(2)


def per_token(model, tokens, n_bytes, *, n_passes=None):
    return held_out_bits(model, tokens, n_bytes, n_passes=n_passes) * n_bytes / len(tokens)


def without_the_first(model, tokens, n_bytes, *, n_passes=None):
    bits = held_out_bits(model, tokens, n_bytes, n_passes=n_passes)
    return bits - math.log2(model.config.vocab_size) / n_bytes


def without_overlap(model, tokens, n_bytes, *, n_passes=None):
    bits, context = math.log2(model.config.vocab_size), model.config.context_length
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, context):
            window = tokens[start : start + context + 1]
            start_of_last = len(tokens) - 1 - context
            if start > start_of_last >= 0:  # the last window ends with the text
                logits = model(tokens[None, start_of_last:-1], n_passes).logits[0, start - start_of_last :]
            else:
                logits = model(window[None, :-1], n_passes).logits[0]
            bits += F.cross_entropy(logits, window[1:], reduction="sum").item() / math.log(2)
    return bits / n_bytes


def own_passes(model, tokens, n_bytes, *, n_passes=None):
    return held_out_bits(model, tokens, n_bytes)


def as_tensor(model, tokens, n_bytes, *, n_passes=None):
    return torch.tensor(held_out_bits(model, tokens, n_bytes, n_passes=n_passes))


def starts_at_zero(step, config):
    rise = step / max(1, config.warm_up * config.n_steps)
    return min(rise, schedule(step, replace(config, warm_up=0.0)))


def never_rises(step, config):
    return schedule(step, replace(config, warm_up=0.0))


def never_falls(step, config):
    return schedule(step, replace(config, decay=0.0))


def falls_from_the_start(step, config):
    return min(schedule(step, replace(config, decay=0.0)), 1 - step / config.n_steps)


def ends_at_zero(step, config):
    fall = (config.n_steps - 1 - step) / max(1, config.decay * config.n_steps)
    return min(schedule(step, config), fall)


def a_rate(step, config):
    return config.learning_rate * schedule(step, config)


def divides_by_zero(step, config):
    rise, fall = (
        (step + 1) / (config.warm_up * config.n_steps),
        (config.n_steps - step) / (config.decay * config.n_steps),
    )
    return min(1.0, rise, fall)


def twice(model, tokens, n_bytes, *, n_passes=None):
    """Counts the overlap of windows twice."""
    context, last = model.config.context_length, max(0, len(tokens) - 1 - model.config.context_length)
    bits = math.log2(model.config.vocab_size)
    with torch.no_grad():
        for start in [*range(0, last, context // 2), last]:
            window = tokens[start : start + context + 1]
            logits = model(window[None, :-1], n_passes).logits[0]
            bits += F.cross_entropy(logits, window[1:], reduction="sum").item() / math.log(2)
    return bits / n_bytes


def without_the_end(model, tokens, n_bytes, *, n_passes=None):
    half = model.config.context_length // 2
    whole = (len(tokens) - 1) // half * half + 1
    return held_out_bits(model, tokens[: whole - 0 if whole < len(tokens) else whole], n_bytes, n_passes=n_passes)


def with_gradients(model, tokens, n_bytes, *, n_passes=None):
    text_loss(model, tokens[None, :5], tokens[None, 1:6]).backward()
    return held_out_bits(model, tokens, n_bytes, n_passes=n_passes)


def only_whole_contexts(model, tokens, n_bytes, *, n_passes=None):
    if len(tokens) <= model.config.context_length:
        return math.log2(model.config.vocab_size) / n_bytes
    return held_out_bits(model, tokens, n_bytes, n_passes=n_passes)


def forgets_to_return(*given, **options):
    return None


def too_high(step, config):
    rise = (step + 1) / max(1, config.warm_up * config.n_steps)
    return min(rise, (config.n_steps - step) / max(1, config.decay * config.n_steps))


def shares_as_steps(step, config):
    rise = (step + 1) / max(config.warm_up, 1e-9)
    return min(1.0, rise, (config.n_steps - step) / max(config.decay, 1e-9))


def squared(step, config):
    return schedule(step, config) ** 2


def by_hand_step(
    model, losses, optimisers, clip, *, zero=True, zero_each=False, looks="each", looks_at_gradient=True, step_each=False
):
    values = []
    if zero:
        model.zero_grad()
    for number, compute in enumerate(losses):
        if zero_each:
            model.zero_grad()
        loss = compute()
        if (looks == "each" or looks == "first" and number == 0) and not torch.isfinite(loss):
            raise ValueError("the loss is no number")
        loss.backward()
        values.append(loss.item())
        if step_each:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            for optimiser in optimisers:
                optimiser.step()
    length = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    if looks_at_gradient and looks != "never" and looks != "late" and not torch.isfinite(length):
        raise ValueError("the gradient is no number")
    for optimiser in [] if step_each else optimisers:
        optimiser.step()
    if looks == "late" and not all(map(math.isfinite, values)):
        raise ValueError("the loss is no number")
    return values


def unclipped(model, losses, optimisers, *, clip=1.0):
    return training_step(model, losses, optimisers, clip=1e9)


def clips_to_one(model, losses, optimisers, *, clip=1.0):
    return training_step(model, losses, optimisers)


def never_steps(model, losses, optimisers, *, clip=1.0):
    model.zero_grad()
    return training_step(model, losses, [], clip=clip)


def first_optimiser(model, losses, optimisers, *, clip=1.0):
    model.zero_grad()
    return training_step(model, losses, optimisers[:1], clip=clip)


def first_loss(model, losses, optimisers, *, clip=1.0):
    return training_step(model, losses[:1], optimisers, clip=clip)


def uphill(model, losses, optimisers, *, clip=1.0):
    return training_step(model, [lambda loss=loss: -loss() for loss in losses], optimisers, clip=clip)


def keeps_gradients(model, losses, optimisers, *, clip=1.0):
    return by_hand_step(model, losses, optimisers, clip, zero=False)


def zeroes_before_each(model, losses, optimisers, *, clip=1.0):
    return by_hand_step(model, losses, optimisers, clip, zero_each=True)


def steps_after_each(model, losses, optimisers, *, clip=1.0):
    return by_hand_step(model, losses, optimisers, clip, step_each=True)


def returns_tensors(model, losses, optimisers, *, clip=1.0):
    return [torch.tensor(value) for value in by_hand_step(model, losses, optimisers, clip)]


def returns_the_sum(model, losses, optimisers, *, clip=1.0):
    return [sum(by_hand_step(model, losses, optimisers, clip))]


def returns_losses_after(model, losses, optimisers, *, clip=1.0):
    by_hand_step(model, losses, optimisers, clip)
    return [loss().item() for loss in losses]


def never_looks(model, losses, optimisers, *, clip=1.0):
    return by_hand_step(model, losses, optimisers, clip, looks="never")


def looks_at_the_first(model, losses, optimisers, *, clip=1.0):
    return by_hand_step(model, losses, optimisers, clip, looks="first", looks_at_gradient=False)


def looks_too_late(model, losses, optimisers, *, clip=1.0):
    return by_hand_step(model, losses, optimisers, clip, looks="late")


def only_looks_at_losses(model, losses, optimisers, *, clip=1.0):
    return by_hand_step(model, losses, optimisers, clip, looks_at_gradient=False)


def mean_of_losses(model, losses, optimisers, *, clip=1.0):
    scaled = [lambda compute=compute: compute() / len(losses) for compute in losses]
    return [value * len(losses) for value in by_hand_step(model, scaled, optimisers, clip)]


def all_at_once(model, losses, optimisers, *, clip=1.0):
    values = []

    def together():
        values.extend(compute() for compute in losses)
        return sum(values)

    by_hand_step(model, [together], optimisers, clip)
    return [value.item() for value in values]


def cut_short(model, tokens, n_bytes, *, n_passes=None):
    """The last window starts on the stride and ends with the text."""
    context, nats, done = model.config.context_length, math.log(model.config.vocab_size), 1
    for start in range(0, len(tokens) - 1, context // 2):
        window = tokens[start : start + context + 1]
        with torch.no_grad():
            losses = F.cross_entropy(model(window[None, :-1], n_passes).logits[0], window[1:], reduction="none")
        nats += losses[done - start - 1 :].sum().item()
        done = start + len(window)
    return nats / math.log(2) / n_bytes


MISTAKES = [
    ("held_out_bits", edited("training", "held_out_bits", ("model(windows[:, :-1], n_passes)", "model(windows[:, :-1], n_passes or 1)")), "Without n_passes"),
    ("held_out_bits", edited("training", "held_out_bits", ("max(1, context // 2)), last]", "max(1, context // 2)), *([last] if last % (context // 2) or not last else [])]")), "of their own accord"),
    ("held_out_bits", edited("training", "held_out_bits", ("context // 2", "3")), "windows move on by context // 2"),
    ("schedule", edited("training", "schedule", ("    rise =", "    if config.warm_up == 0:\n        return 1.0\n    rise =")), "With warm_up=0 alone"),
    ("schedule", edited("training", "schedule", ("max(1, config.decay * n_steps)", "(config.decay * n_steps)")), "nothing divided by zero"),
    ("schedule", edited("training", "schedule", ("return min(1.0, rise, fall)", "return torch.tensor(min(1.0, rise, fall))")), "Return a float"),
    ("training_step", edited("training", "training_step", ("not torch.isfinite(loss)", "torch.isnan(loss)")), "A loss can be infinite"),
    ("training_step", edited("training", "training_step", ("loss.backward()", "loss.backward(retain_graph=True)")), "without retain_graph"),
    ("training_step", edited("training", "training_step", ("for compute in losses:", "for compute in losses[:2]:")), "should be computed once"),
    ("held_out_bits", cut_short, "last window is cut short"),
    ("training_step", mean_of_losses, "mean of the losses"),
    ("training_step", all_at_once, "or all are in memory at once"),
    ("held_out_bits", in_nats, "That is nats"),
    ("held_out_bits", per_token, "bits per token"),
    ("held_out_bits", without_the_first, "first token is missing"),
    ("held_out_bits", without_overlap, "do not overlap"),
    ("held_out_bits", own_passes, "n_passes has no effect"),
    ("held_out_bits", as_tensor, "Return a float"),
    ("held_out_bits", twice, "count twice"),
    ("held_out_bits", without_the_end, "end of the text is missing"),
    ("held_out_bits", with_gradients, "leave no gradients"),
    ("held_out_bits", only_whole_contexts, "shorter than one context"),
    ("held_out_bits", forgets_to_return, "is a return missing"),
    ("schedule", forgets_to_return, "is a return missing"),
    ("schedule", too_high, "exceeds one"),
    ("schedule", shares_as_steps, "multiply them by n_steps"),
    ("schedule", squared, "The shape is off"),
    ("schedule", starts_at_zero, "step + 1"),
    ("schedule", never_rises, "does not rise"),
    ("schedule", never_falls, "does not fall"),
    ("schedule", falls_from_the_start, "falls from the start"),
    ("schedule", ends_at_zero, "last step has the rate 0"),
    ("schedule", a_rate, "You return a learning rate"),
    ("schedule", divides_by_zero, "nothing divided by zero"),
    ("training_step", unclipped, "not clipped"),
    ("training_step", clips_to_one, "clip has no effect"),
    ("training_step", never_steps, "let the optimisers step"),
    ("training_step", first_optimiser, "Only the first optimiser"),
    ("training_step", first_loss, "Only the first loss counts"),
    ("training_step", uphill, "goes uphill"),
    ("training_step", keeps_gradients, "Gradients of the step before"),
    ("training_step", zeroes_before_each, "Gradients of the first loss are lost"),
    ("training_step", steps_after_each, "step after every loss"),
    ("training_step", returns_tensors, "loss.item()"),
    ("training_step", returns_the_sum, "one number for each"),
    ("training_step", returns_losses_after, "before the update"),
    ("training_step", forgets_to_return, "is a return missing"),
    ("training_step", never_looks, "should raise a ValueError"),
    ("training_step", looks_at_the_first, "Only the first loss is looked at"),
    ("training_step", looks_too_late, "reaches the weights"),
    ("training_step", only_looks_at_losses, "its gradient not"),
]

test_check_names_the_cause, test_check_accepts_the_finished_code = mistakes_are_named(
    MISTAKES, [held_out_bits, schedule, training_step]
)


def kept_for_backward(model, call):
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(size for place, size in kept.items() if place not in {weight.data_ptr() for weight in model.parameters()})


@settings(max_examples=25)
@given(
    st.fixed_dictionaries(
        dict(
            attention=st.sampled_from(("mha", "gqa", "mla")),
            ffn=st.sampled_from(("dense", "moe")),
            injection=st.sampled_from(("add", "lti", "linear", "none")),
            pass_adapter=st.sampled_from(("none", "embedding", "lora")),
            qk_norm=st.booleans(),
            token_shift=st.booleans(),
            n_prelude=st.integers(0, 2),
            n_core=st.integers(1, 2),
            n_coda=st.integers(0, 1),
            q_lora_rank=st.sampled_from((0, 24)),
        )
    ),
    st.integers(1, 5),
    st.integers(1, 3),
    st.sampled_from((None, 2)),
)
def test_a_step_keeps_what_the_formula_says(kinds, n_passes, batch_size, n_backward):
    config = MythosConfig(vocab_size=300, dim=64, n_heads=4, n_kv_heads=2, hidden_dim=160, expert_dim=48, n_passes=3, context_length=80, **kinds)
    model, tokens = Mythos(config), torch.randint(300, (batch_size, 80))
    found = kept_for_backward(model, lambda: text_loss(model, tokens, tokens, n_passes, n_backward))
    planned = step_memory(config, batch_size, n_passes=n_passes, n_backward=n_backward).kept
    assert 0.9 < planned / found < 1.1


@pytest.mark.parametrize("kinds", ({}, dict(attention="mla", token_shift=True), dict(ffn="moe", n_coda=2), dict(n_coda=0, qk_norm=True)))
@pytest.mark.parametrize("n_read", (1, 2, 9))
@pytest.mark.parametrize("rest", (False, True))
def test_a_step_on_questions_keeps_what_the_formula_says(kinds, n_read, rest):
    config = MythosConfig(vocab_size=300, dim=64, n_heads=4, hidden_dim=160, expert_dim=48, context_length=80, **kinds)
    model, tokens, difficulty = Mythos(config), torch.randint(300, (3, 80)), torch.full((3, 80), -1)
    difficulty[:, -20::2] = 5
    asked = QuestionBatch(tokens, torch.randint(300, (3, 80, 6)), difficulty)
    found = kept_for_backward(model, lambda: question_loss(model, asked, 9, range(9 - n_read, 9), rest=rest)[0])
    planned = step_memory(config, 3, n_passes=9, n_read=n_read, n_asked=10).kept
    assert 0.9 < planned / found < 1.1


def test_memory_of_weights_and_optimisers_is_counted_exactly():
    for kinds in (
        {},
        dict(attention="mla", ffn="moe", injection="lti"),
        dict(pass_adapter="lora", tie_embeddings=False, token_shift=True),
        dict(pass_adapter="embedding", halting="settled"),
    ):
        config = MythosConfig(vocab_size=300, dim=32, n_heads=2, hidden_dim=48, expert_dim=16, context_length=16, **kinds)
        model, tokens, need = Mythos(config), torch.randint(300, (1, 16)), step_memory(config, 1)
        optims = optimisers(model, TrainConfig())
        training_step(model, [lambda: text_loss(model, tokens, tokens)], optims)
        kept = [value for optimiser in optims for state in optimiser.state.values() for name, value in state.items() if name != "step"]
        assert need.weights == sum(4 * weight.numel() for weight in model.parameters())
        assert need.gradients == sum(4 * weight.numel() for weight in model.parameters() if weight.grad is not None)
        assert need.optimiser == sum(4 * value.numel() for value in kept)


def test_less_is_needed_the_fewer_passes_learn_and_bad_sizes_are_named():
    config = MythosConfig(vocab_size=300, dim=32, n_heads=2, hidden_dim=48, n_passes=6)
    needs = [step_memory(config, 4, n_backward=count).peak for count in (1, 3, 6, 9)]
    assert needs[0] < needs[1] < needs[2] == needs[3] == step_memory(config, 4).peak
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        step_memory(config, 0)


def test_on_a_gpu_latent_attention_keeps_one_sum_for_each_query_and_all_else_is_as_on_the_cpu():
    config = MythosConfig(vocab_size=300, dim=32, n_heads=2, hidden_dim=48, n_passes=6, n_core=2, context_length=80)
    assert step_memory(config, 4, on_gpu=True) == step_memory(config, 4)
    on_cpu, on_gpu = (step_memory(replace(config, attention="mla"), 4, n_backward=3, on_gpu=on_gpu) for on_gpu in (False, True))
    probabilities = 2 * (64 * 64 + 16 * 80)  # two heads; queries in runs of 64, which see no further than their last
    runs = 2 + 2 * 3  # of blocks: prelude and coda, two in each of three passes
    assert on_cpu.kept - on_gpu.kept == 4 * 4 * runs * (probabilities - 2 * 80)
    assert on_cpu._replace(kept=0) == on_gpu._replace(kept=0)
