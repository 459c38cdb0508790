"""The trials of `mythoslab evidence`: exact questions, every trial trains, and results that are kept and gone on with."""

import json
import resource
import signal
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mythoslab import cli
from mythoslab.classroom import evidence
from mythoslab.classroom.course import DATA, UserError
from mythoslab.classroom.evidence import COLOURS, GROUPS, LABELS, Trial, build, by_depth, fact_list, learn, planned, read_results
from mythoslab.classroom.evidence import learn_halting, question_loss, stairs, think_on


def test_a_question_is_answered_by_following_the_facts_of_its_list():
    draw = torch.Generator().manual_seed(0)
    for batch in (fact_list(4, max_depth=5, n_facts=30, generator=draw), fact_list(4, max_depth=9, generator=draw)):
        for tokens, path, depth in zip(batch.tokens.tolist(), batch.path.tolist(), batch.difficulty.tolist()):
            said = {token % LABELS: token // LABELS - 1 for token in tokens if token >= LABELS}
            for node, hops, hard in zip(tokens, path, depth):
                if node >= LABELS:
                    assert hard == -1 and set(hops) == {-1}
                    continue
                for hop in hops:
                    node = said[node] if node < LABELS else node
                    assert hop == node
                assert LABELS <= hops[-1] < LABELS + COLOURS
                assert sum(hop < LABELS for hop in hops) == hard


@pytest.mark.parametrize("trial", [trial for group in GROUPS.values() for trial in group if trial.task == "facts"], ids=lambda trial: trial.name)
def test_every_trial_on_facts_trains(trial):
    model = build(trial)
    before = {name: weight.detach().clone() for name, weight in model.core.named_parameters()}
    learn(replace(trial, n_steps=2), model)
    assert any(not torch.equal(before[name], weight) for name, weight in model.core.named_parameters())
    assert all(weight.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("trial", [trial for trial in GROUPS["depth"] if trial.rest], ids=lambda trial: trial.name)
@pytest.mark.parametrize("n_facts", [None, 30])
def test_facts_at_rest_are_not_computed_and_all_numbers_are_those_of_masked_passes(trial, n_facts):
    model = build(trial)
    batch = fact_list(3, max_depth=5, n_facts=n_facts, generator=torch.Generator().manual_seed(0))
    asked, weights = batch.difficulty >= 0, list(model.core.parameters())
    n_asked, seen = int(asked[0].sum()), []
    with torch.no_grad():
        for weight in weights:
            weight.add_(torch.randn_like(weight) / 20)
    model.core.blocks[0].register_forward_hook(lambda block, given, result: seen.append(result.shape[1]))
    masked = model.think(batch.tokens, batch.passes_at_rest(7))[:, :, -n_asked:]
    seen.clear()
    resting = think_on(model, batch.tokens, 7, n_asked)
    assert seen == [batch.tokens.shape[1]] * 2 + [n_asked] * 5
    assert torch.allclose(masked, resting, atol=1e-5)
    weigh = torch.randn_like(masked)
    slopes = [torch.autograd.grad((weigh * states).sum(), weights, allow_unused=True, materialize_grads=True) for states in (masked, resting)]
    assert all(torch.allclose(one, other, atol=1e-3, rtol=1e-3) for one, other in zip(*slopes))


def test_where_facts_rest_the_head_learns_from_facts_that_do():
    trial = next(trial for trial in GROUPS["depth"] if trial.rest)
    model = build(trial)
    before = [weight.detach().clone() for weight in model.halting.parameters()]
    learn_halting(trial, model, n_steps=2)
    assert any(not torch.equal(one, other) for one, other in zip(before, model.halting.parameters()))


def test_where_facts_rest_the_loss_is_that_of_masked_passes():
    trial = next(trial for trial in GROUPS["depth"] if trial.rest)
    model, batch = build(trial), fact_list(3, max_depth=5, n_facts=30, generator=torch.Generator().manual_seed(0))
    asked, losses = batch.difficulty >= 0, []
    for index, state in enumerate(model.think(batch.tokens, batch.passes_at_rest(7))):
        losses.append(torch.nn.functional.cross_entropy(model.read(state, at=asked), batch.targets(index)[asked]))
    loss, right = question_loss(model, batch, 7, trial)
    assert torch.allclose(loss, torch.stack(losses).mean(), atol=1e-5) and right.shape == (int(asked.sum()),)


def test_a_stack_has_a_block_for_every_pass():
    model = build(next(trial for trial in GROUPS["parts"] if trial.core == "stack"))
    batch = fact_list(1, max_depth=2, generator=torch.Generator().manual_seed(0))
    states = model.think(batch.tokens, 6)
    with torch.no_grad():
        for weight in model.core.blocks[3].parameters():
            weight.zero_()
    changed = model.think(batch.tokens, 6)
    assert torch.equal(states[:3], changed[:3]) and not torch.equal(states[3], changed[3])


def test_a_bare_core_has_no_norm_and_else_the_weights_of_ours():
    ours, bare = build(Trial("x")), build(Trial("x", core="bare"))
    named = dict(ours.core.named_parameters())
    assert set(named) - {"norm.weight"} == {name for name, _ in bare.core.named_parameters()}
    batch = fact_list(2, max_depth=3, generator=torch.Generator().manual_seed(0))
    grown = [model.think(batch.tokens, 20).norm(dim=-1).mean((1, 2)) for model in (ours, bare)]
    assert grown[0][19] < 1.5 * grown[0][0] and grown[1][19] > 4 * grown[1][0]


def test_the_normed_state_of_their_loop_cannot_grow():
    batch = fact_list(2, max_depth=3, generator=torch.Generator().manual_seed(0))
    sizes = {}
    for core in ("theirs", "theirs, normed"):
        model = build(Trial("x", core=core))
        with torch.no_grad():
            for weight in model.core.blocks.parameters():
                weight.mul_(10)
            sizes[core] = model.think(batch.tokens, 20).square().mean(-1).sqrt()
    assert sizes["theirs"].max() > 3 and torch.allclose(sizes["theirs, normed"], torch.ones(()), atol=1e-3)


def test_a_mean_is_read_when_its_head_has_been_taught(monkeypatch):
    calls = []
    monkeypatch.setattr(evidence, "learn_halting", lambda *given: calls.append("taught"))
    monkeypatch.setattr(evidence, "stairs", lambda *given, **kind: calls.append("read") or {})
    monkeypatch.setattr(evidence, "stopping", lambda *given, **kind: calls.append("stopped") or {})
    trial = Trial("x", answers="mean")
    found = evidence.measure(trial, build(trial))
    assert calls[0] == "taught" and calls.count("taught") == 1 and set(calls) == {"taught", "read", "stopped"}
    assert found["resting"] and found["stopping"] and len(found["weights_of_passes"]) == 32


def test_each_rung_after_the_fifth_takes_one_thing_from_their_update():
    trials = {trial.name: trial for trial in GROUPS["failure"]}
    state, inputs = torch.randn(2, 3, 5, 64)
    names = ("+ last state", "+ no adapters", "+ passes alike", "+ state not carried", "+ block alone", "+ our update", "+ normed state")
    for before, after in pairwise(names):
        changed = {name for name, value in asdict(trials[after]).items() if value != asdict(trials[before])[name]} - {"name"}
        assert changed == ({"model"} if after == "+ no adapters" else {"core"}), after
    models = {name: build(trials[name]) for name in names}
    block = models["+ no adapters"].core.blocks[0]
    for name, model in models.items():
        core = model.core
        if name == "+ last state":
            assert hasattr(core.blocks[0], "adapters") and not hasattr(block, "adapters")
            continue
        core.blocks[0].load_state_dict(block.state_dict())
        alike = torch.equal(core.one_pass(state, inputs, 1), core.one_pass(state, inputs, 5))
        assert alike == (name != "+ no adapters")

    def normed(x):
        return torch.nn.functional.rms_norm(x, (64,), eps=1e-6)

    beside = torch.exp(torch.tensor(-1.0)) * state + 0.1 * inputs
    by_hand = {
        "+ passes alike": beside + block(normed(state + inputs)),
        "+ state not carried": 0.1 * inputs + block(normed(state + inputs)),
        "+ block alone": block(normed(state + inputs)),
        "+ our update": block(state + inputs),
        "+ normed state": block(normed(state) + inputs),
    }
    for name, needed in by_hand.items():
        assert torch.allclose(models[name].core.one_pass(state, inputs, 3), needed, atol=1e-5), name

    begun, carried = GROUPS["controls"]
    assert begun == replace(trials["+ no adapters"], name=begun.name, model=dict(qk_norm=False, n_passes=8))
    assert carried == replace(trials["+ passes alike"], name=carried.name, core="no index, normed")
    sizes = [build(trial).core.blocks[0].attention.o_proj.weight.std() for trial in (begun, trials["+ no adapters"])]
    adapted = models["+ last state"].core.blocks[0].block.attention.o_proj.weight.std()
    assert torch.isclose(sizes[0], adapted, rtol=0.05) and not torch.isclose(sizes[1], adapted, rtol=0.05)
    core = build(carried).core
    core.blocks[0].load_state_dict(block.state_dict())
    assert torch.allclose(core.one_pass(state, inputs, 3), normed(by_hand["+ passes alike"]), atol=1e-5)


def test_a_mean_of_states_takes_each_until_the_head_stops():
    trial = GROUPS["failure"][0]
    model = build(trial)
    states = torch.randn(5, 1, 2, 64)
    assert torch.allclose(evidence.answer_state(model, states, trial), states[:2].mean(0), atol=1e-6)  # a new head says one half


def test_a_head_that_begins_shut_has_weight_left_for_passes_that_were_never_trained():
    trial = next(trial for trial in GROUPS["failure"] if trial.name == "theirs, head shut")
    batch = fact_list(2, max_depth=3, generator=torch.Generator().manual_seed(0))
    weights = evidence.weights_of_passes(build(trial), batch.tokens, batch.difficulty >= 0)
    assert sum(weights[:8]) < 0.05 and min(weights[8:]) > 0.001
    weights = evidence.weights_of_passes(build(replace(trial, head=0.0)), batch.tokens, batch.difficulty >= 0)
    assert weights[:3] == [0.5, 0.5, 0.0]


def test_the_mean_takes_only_what_is_left_of_the_last_state_that_counts():
    model = build(replace(GROUPS["failure"][0], head=torch.logit(torch.tensor(0.6)).item()))
    weights = evidence.halting_weights(model, torch.randn(4, 1, 3, 64))
    assert torch.allclose(weights[:, 0, 0], torch.tensor([0.6, 0.4, 0.0, 0.0]), atol=1e-6)


def test_the_mean_of_an_old_version_goes_on_adding_what_its_head_has_not_spent():
    class Head(torch.nn.Module):
        def forward(self, states):
            return states[..., 0]

    model = build(GROUPS["failure"][0])
    model.halting = Head()
    states = torch.zeros(4, 1, 3, 64)
    states[..., 0] = torch.tensor([[0.3, 0.695, 0.5, 0.5], [0.6, 0.6, 0.1, 0.1], [0.1, 0.2, 0.3, 0.1]]).T.unsqueeze(1)
    weights = {kind: evidence.halting_weights(model, states, kind)[:, 0].T for kind in ("mean", "mean of 0.4")}
    assert torch.allclose(weights["mean"], torch.tensor([[0.3, 0.7, 0, 0], [0.6, 0.4, 0, 0], [0.1, 0.2, 0.3, 0.1]]), atol=1e-6)
    old = torch.tensor([[0.3, 0.7, 0.005, 0.005], [0.6, 0.4, 0, 0], [0.1, 0.2, 0.3, 0.1]])
    assert torch.allclose(weights["mean of 0.4"], old, atol=1e-6)


def test_facts_that_rest_show_what_they_were_after_two_passes():
    batch = fact_list(2, max_depth=9, generator=torch.Generator().manual_seed(0))
    model, trial = build(Trial("x")).eval(), Trial("x")
    kinds = {rest: list(evidence.answers_after(model, batch, [1, 2, 8], trial, rest=rest)) for rest in (False, True)}
    assert torch.allclose(kinds[True][1], kinds[False][1], atol=1e-5)
    assert not torch.allclose(kinds[True][2], kinds[False][2], atol=1e-4)
    each = torch.where(batch.difficulty >= 0, 8, 2)
    assert torch.allclose(kinds[True][2], model(batch.tokens, each).logits[batch.difficulty >= 0], atol=1e-5)


@pytest.mark.parametrize(("shift", "right", "choice"), [(0, 1.0, 1.0), (1, 0.0, 0.0)])
def test_stairs_tell_the_right_colour_from_the_other(monkeypatch, shift, right, choice):
    def oracle(model, batch, passes, trial, *, rest):
        asked = batch.difficulty >= 0
        answers = batch.path[..., -1].where(asked, -1)
        pair = torch.stack([row[row >= 0].unique() for row in answers])  # (list, the two colours)
        place = (answers[asked] == pair[asked.nonzero()[:, 0], 1]).long()
        said = pair[asked.nonzero()[:, 0], (place + shift) % 2]
        for _ in passes:
            yield torch.nn.functional.one_hot(said, LABELS + COLOURS).float()

    monkeypatch.setattr(evidence, "answers_after", oracle)
    stair = stairs(torch.nn.Identity(), Trial("x"), 6, [6], rest=True, n_lists=4)
    assert stair == {"right": {"6": [right] * 6}, "choice": {"6": [choice] * 6}}


def test_what_is_taught_is_what_counts():
    batch = fact_list(2, max_depth=3, generator=torch.Generator().manual_seed(0))
    model = build(Trial("x"))
    losses = {taught: question_loss(model, batch, 4, Trial("x", taught=taught))[0].item() for taught in ("links", "answers", "answer")}
    assert len(set(losses.values())) == 3


def test_a_new_model_chooses_by_chance():
    choice = stairs(build(Trial("x")), Trial("x"), 6, [1, 6], rest=True, n_lists=64)["choice"]
    assert all(abs(share - 0.5) < 0.25 for shares in choice.values() for share in shares)


def test_shares_by_depth():
    batch = fact_list(1, max_depth=1, generator=torch.Generator().manual_seed(0))
    assert by_depth(batch.difficulty[batch.difficulty >= 0] == 1, batch) == [0.0, 1.0]


@pytest.fixture
def quick(monkeypatch):
    """Three trials that only say that they ran."""
    ran = []

    def run(trial):
        ran.append((trial.name, trial.seed))
        return {"trial": evidence.asdict(trial), "seconds": {"cpu": 1.0}, "bits": {"1": 2.0}}

    monkeypatch.setattr(evidence, "GROUPS", {"a": (Trial("one"), Trial("two")), "b": (Trial("three"),)})
    monkeypatch.setattr(evidence, "run_trial", run)
    return ran


def test_what_is_written_down_is_not_run_again(quick, tmp_path, capsys):
    path = tmp_path / "new" / "evidence.jsonl"
    assert cli.main(["evidence", "--only", "a", "--seeds", "1", "--out", str(path)]) == 0
    assert quick == [("one", 0), ("two", 0)]
    assert cli.main(["evidence", "--seeds", "2", "--out", str(path)]) == 0
    assert quick[2:] == [("three", 0), ("one", 1), ("two", 1), ("three", 1)]
    assert len(read_results(path)) == 6 and "2 of 6 trials" in capsys.readouterr().out


def test_a_line_that_was_cut_off_is_run_again(quick, tmp_path):
    path = tmp_path / "evidence.jsonl"
    evidence.evidence(path, n_seeds=1)
    path.write_text(path.read_text()[:-9])
    evidence.evidence(path, n_seeds=1)
    assert quick[3:] == [("three", 0)] and len(read_results(path)) == 3
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_line_is_mended_in_place_and_nothing_whole_is_written_again(quick, tmp_path, monkeypatch):
    path = tmp_path / "evidence.jsonl"
    evidence.evidence(path, n_seeds=1)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"trial": ')
    monkeypatch.setattr(Path, "write_text", None)  # would empty the file first
    evidence.add_result(path, {"trial": {"name": "four"}})
    assert path.read_bytes() == whole + b'{"trial":{"name":"four"}}\n'


def test_a_whole_line_without_its_end_stays(quick, tmp_path):
    path = tmp_path / "evidence.jsonl"
    evidence.evidence(path, n_seeds=1)
    whole = path.read_bytes()
    path.write_bytes(whole.rstrip(b"\n"))
    evidence.add_result(path, {"trial": {"name": "four"}})
    assert path.read_bytes() == whole + b'{"trial":{"name":"four"}}\n'


def test_another_file_is_not_taken_for_a_broken_line(quick, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("my notes, one line")
    with pytest.raises(UserError, match="line 1 of .* is damaged"):
        evidence.evidence(path, n_seeds=1)
    assert path.read_text() == "my notes, one line" and quick == []


def test_a_disk_that_takes_half_a_line_is_told(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    told = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limit[1]))
    try:
        with pytest.raises(UserError, match="No space left on device.*: make room"):
            evidence.add_result(tmp_path / "some.jsonl", {"trial": {}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, told)


def test_a_file_that_cannot_be_written_is_told_before_any_trial_runs(quick, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["evidence", "--out", str(tmp_path / "file" / "evidence.jsonl")]) == 2
    assert quick == [] and "cannot write to" in capsys.readouterr().err


def test_a_damaged_line_is_named(quick, tmp_path):
    path = tmp_path / "evidence.jsonl"
    evidence.evidence(path, n_seeds=1)
    path.write_text("{\n" + path.read_text())
    with pytest.raises(UserError, match="line 1 of .* is damaged: remove it"):
        read_results(path)


def test_mistakes_on_the_command_line_are_told_in_one_sentence(capsys):
    assert cli.main(["evidence", "--only", "deep"]) == 2
    assert "the group is 'deep'; it must be one of depth, parts, failure, mean, controls, chains, text" in capsys.readouterr().err
    assert cli.main(["evidence", "--seeds", "0"]) == 2


def test_stopping_says_that_the_same_command_goes_on(quick, tmp_path, monkeypatch, capsys):
    def stop(trial):
        raise KeyboardInterrupt

    monkeypatch.setattr(evidence, "run_trial", stop)
    assert cli.main(["evidence", "--out", str(tmp_path / "e.jsonl")]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_what_is_rare_is_tried_with_four_times_as_many_seeds_and_after_the_others():
    trials = planned(n_seeds=2)
    seeds = {}
    for trial in trials:
        seeds.setdefault((trial.task, trial.name), []).append(trial.seed)
    more = {key for key, found in seeds.items() if found == list(range(8))}
    assert more == {("facts", name) for name in evidence.RARE}
    assert all(found == [0, 1] for key, found in seeds.items() if key not in more)
    assert {trial.seed for trial in trials[: 2 * len(seeds)]} == {0, 1} and len({trial.key for trial in trials}) == len(trials)


def test_the_stored_results_are_of_trials_that_are_planned():
    stored, keys = read_results(DATA / "evidence.jsonl"), {trial.key for trial in planned()}
    assert stored and set(stored) <= keys
