"""mythoslab.training: yardsticks, a real short training, checkpoints, the commands, and the checks."""

import copy
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mythoslab import cli, training
from mythoslab.classroom.checks import check, reference
from mythoslab.model import Mythos, MythosConfig, generate
from mythoslab.questions import Tokenizer
from mythoslab.training import (
    History,
    TrainConfig,
    can_save,
    choose_device,
    continuation,
    held_out_bits,
    load,
    lzma_bits,
    optimisers,
    order_three_bits,
    save,
    schedule,
    train,
    train_preset,
    training_step,
)
from tests.mistakes import mistakes_are_named

SHAPE = dict(dim=32, n_heads=2, hidden_dim=64, n_passes=2, context_length=32)


def real_text():
    """Real prose on every machine: a part of the Python reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)[:60])


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


def test_a_short_training_learns_real_text(trained):
    tokenizer, model, history, before, learnt, held_out = trained
    tokens, n_bytes = tokenizer.encode(held_out), len(held_out.encode())
    after = held_out_bits(model, tokens, n_bytes)
    assert isinstance(history, History) and len(history.losses) == 150
    assert history.losses[-1] < history.losses[0] - 1.5
    counted = torch.bincount(tokenizer.encode(learnt), minlength=400) + 1
    unigram = -(counted / counted.sum()).log()[tokens].sum().item() / math.log(2) / n_bytes
    assert after < unigram - 0.2 and after < before / 1.4
    assert all(earlier < later for earlier, later in zip(history.seconds, history.seconds[1:]))


def test_more_passes_than_trained_do_no_harm_after_a_short_training(trained):
    tokenizer, model, *_, held_out = trained
    bits = {
        count: held_out_bits(model, tokenizer.encode(held_out), len(held_out.encode()), n_passes=count)
        for count in (2, 4)
    }
    assert bits[4] < bits[2] + 0.05


def test_the_same_seed_gives_the_same_losses_and_another_seed_others():
    data = torch.randint(40, (2000,), generator=torch.Generator().manual_seed(0))

    def losses(seed):
        torch.manual_seed(0)
        return train(
            Mythos(MythosConfig(vocab_size=40, **SHAPE)),
            data,
            TrainConfig(n_steps=4, n_passes=(1, 2, 3), seed=seed),
        )

    one, same, other = losses(3), losses(3), losses(4)
    assert (one.losses, one.n_passes) == (same.losses, same.n_passes)
    assert one.losses != other.losses


def test_passes_are_drawn_from_those_given_and_otherwise_the_models_own():
    data = torch.randint(40, (500,))
    model = Mythos(MythosConfig(vocab_size=40, **SHAPE))
    drawn = train(model, data, TrainConfig(n_steps=30, batch_size=1, n_passes=(1, 4))).n_passes
    assert set(drawn) == {1, 4}
    assert train(model, data, TrainConfig(n_steps=2, batch_size=1)).n_passes == [2, 2]


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
        id(weight) for name, weight in model.named_parameters() if "attention." in name or "ffn." in name
    }


@settings(deadline=None)
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
        ("n_passes", (1, 0)),
        ("n_passes", 3),
        ("learning_rate", "0.1"),
        ("clip", True),
        ("weight_decay", None),
        ("warm_up", None),
        ("decay", True),
        ("seed", -1),
        ("seed", 2**63),
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


def test_a_loss_that_is_no_number_stops_training_and_says_what_to_do():
    model = Mythos(MythosConfig(vocab_size=40, **SHAPE))
    with torch.no_grad():
        model.norm.weight[0] = math.inf
    kept = model.core.blocks[0][0].ffn.up.weight.clone()
    with pytest.raises(ValueError, match="step 1 of 3: the loss is .*lower learning_rate"):
        train(model, torch.randint(40, (300,)), TrainConfig(n_steps=3))
    assert torch.equal(model.core.blocks[0][0].ffn.up.weight, kept)


def by_hand(training, held_out):
    """The order-three model as its definition reads."""

    def chance(context, byte):
        shorter = chance(context[1:], byte) if context else 1 / 256
        places = range(len(context), len(training))
        followed = [training[place] for place in places if training[place - len(context) : place] == context]
        kinds = len(set(followed))
        return (followed.count(byte) + kinds * shorter) / (len(followed) + kinds) if followed else shorter

    text = training[-3:] + held_out
    return sum(
        -math.log2(chance(text[place - 3 : place], text[place])) for place in range(3, len(text))
    ) / len(held_out)


@given(st.text("abc é", min_size=4, max_size=60), st.text("abcd é", min_size=1, max_size=20))
def test_order_three_is_what_its_definition_says(training, held_out):
    expected = by_hand(training.encode(), held_out.encode())
    assert math.isclose(order_three_bits(training, held_out), expected, rel_tol=1e-9)


def test_order_three_knows_a_rule_of_three_bytes_and_gives_surprises_a_chance():
    training = "abcd" * 500
    assert order_three_bits(training, "abcd" * 50) < 0.05
    assert 3 < order_three_bits(training, "\x00\x01" * 20) < 40


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
            logits = model(tokens[None, start:place])[0, -1]
            nats += F.cross_entropy(logits, tokens[place]).item()
    assert math.isclose(held_out_bits(model, tokens, 250), nats / math.log(2) / 250, rel_tol=1e-4)


def test_a_saved_model_comes_back_whole(trained, tmp_path):
    tokenizer, model, *_ = trained
    save(tmp_path / "new" / "model", model, tokenizer)
    again, read = load(tmp_path / "new" / "model")
    tokens = torch.randint(400, (2, 20))
    assert torch.equal(again(tokens), model(tokens)) and again.config == model.config
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


@pytest.mark.parametrize(
    "damage",
    [
        damage_config,
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


def test_train_says_all_it_promises_and_ask_goes_on_from_it(tmp_path, monkeypatch, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "runs" / "mine"
    text.write_text(real_text()[:150_000], encoding="utf-8")
    train_ = [
        "train",
        "--preset",
        "tiny",
        "--text",
        str(text),
        "--out",
        str(out),
        "--steps",
        "2",
        "--seed",
        "3",
    ]
    assert cli.main(train_) == 0
    printed = capsys.readouterr().out
    rows = {
        line.strip()[:-8].strip(): line.split()[-1] for line in printed.splitlines() if line.startswith("  ")
    }
    passes = load(out)[0].config.n_passes
    for name in ("1 pass", f"{passes} passes, as in training", f"{2 * passes} passes", "order-3 bytes"):
        assert 0 < float(rows[name]) < 10
    assert (
        any(name.startswith("lzma") for name in rows)
        and str(out) in printed
        and "The for statement" in printed
    )
    assert (
        cli.main(["ask", "Hello", "--from", str(out), "--tokens", "5", "--passes", "1", "--temperature", "0"])
        == 0
    )
    assert capsys.readouterr().out.startswith("Hello")


def run(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "mythoslab.cli", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


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
        (b"x", ("--steps", "0"), "n_steps is 0"),
        (b"x", ("--steps", "-3"), "n_steps is -3"),
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
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("it trained first"))
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/mythoslab")):
        assert cli.main(["train", "--preset", "tiny", "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "cannot be written" in error and str(out) in error
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize(
    "prompt, words, told",
    [
        ("word " * 200, (), "1 to 32, the context"),
        ("", (), "prompt tokens is 0"),
        ("x", ("--tokens", "-1"), "n_new is -1"),
        ("x", ("--passes", "0"), "n_passes is 0"),
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
                logits = model(tokens[None, start_of_last:-1], n_passes)[0, start - start_of_last :]
            else:
                logits = model(window[None, :-1], n_passes)[0]
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


def unclipped(model, inputs, targets, optimisers, *, n_passes=None, clip=1.0):
    return training_step(model, inputs, targets, optimisers, n_passes=n_passes, clip=1e9)


def clips_to_one(model, inputs, targets, optimisers, *, n_passes=None, clip=1.0):
    return training_step(model, inputs, targets, optimisers, n_passes=n_passes)


def steps_with_own_passes(model, inputs, targets, optimisers, *, n_passes=None, clip=1.0):
    return training_step(model, inputs, targets, optimisers, clip=clip)


def never_steps(model, inputs, targets, optimisers, *, n_passes=None, clip=1.0):
    return training_step(model, inputs, targets, [], n_passes=n_passes, clip=clip)


def first_optimiser(model, inputs, targets, optimisers, *, n_passes=None, clip=1.0):
    model.zero_grad()
    return training_step(model, inputs, targets, optimisers[:1], n_passes=n_passes, clip=clip)


def by_hand_step(model, inputs, targets, optimisers, n_passes, clip, *, zero=True, looks=True):
    loss = F.cross_entropy(model(inputs, n_passes).flatten(0, 1), targets.flatten())
    if looks and not torch.isfinite(loss):
        raise ValueError("the loss is no number")
    if zero:
        model.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimiser in optimisers:
        optimiser.step()
    return loss


def keeps_gradients(model, inputs, targets, optimisers, *, n_passes=None, clip=1.0):
    return by_hand_step(model, inputs, targets, optimisers, n_passes, clip, zero=False).item()


def returns_a_tensor(model, inputs, targets, optimisers, *, n_passes=None, clip=1.0):
    return by_hand_step(model, inputs, targets, optimisers, n_passes, clip)


def never_looks(model, inputs, targets, optimisers, *, n_passes=None, clip=1.0):
    return by_hand_step(model, inputs, targets, optimisers, n_passes, clip, looks=False).item()


def looks_too_late(model, inputs, targets, optimisers, *, n_passes=None, clip=1.0):
    loss = by_hand_step(model, inputs, targets, optimisers, n_passes, clip, looks=False).item()
    if not math.isfinite(loss):
        raise ValueError("the loss is no number")
    return loss


MISTAKES = [
    ("held_out_bits", in_nats, "That is nats"),
    ("held_out_bits", per_token, "bits per token"),
    ("held_out_bits", without_the_first, "first token is missing"),
    ("held_out_bits", without_overlap, "do not overlap"),
    ("held_out_bits", own_passes, "n_passes has no effect"),
    ("held_out_bits", as_tensor, "Return a float"),
    ("schedule", starts_at_zero, "step + 1"),
    ("schedule", never_rises, "does not rise"),
    ("schedule", never_falls, "does not fall"),
    ("schedule", falls_from_the_start, "falls from the start"),
    ("schedule", ends_at_zero, "last step has the rate 0"),
    ("schedule", a_rate, "You return a learning rate"),
    ("schedule", divides_by_zero, "nothing divided by zero"),
    ("training_step", unclipped, "not clipped"),
    ("training_step", clips_to_one, "clip has no effect"),
    ("training_step", steps_with_own_passes, "n_passes has no effect"),
    ("training_step", never_steps, "let the optimisers step"),
    ("training_step", first_optimiser, "Only the first optimiser"),
    ("training_step", keeps_gradients, "Gradients of the step before"),
    ("training_step", returns_a_tensor, "loss.item()"),
    ("training_step", never_looks, "should raise a ValueError"),
    ("training_step", looks_too_late, "reaches the weights"),
]

test_check_names_the_cause, test_check_accepts_the_finished_code = mistakes_are_named(
    MISTAKES, [held_out_bits, schedule, training_step]
)
