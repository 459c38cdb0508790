"""The trials behind notebook 12: many small models, each trained, measured and written down once."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import Core, Mythos, MythosConfig, Shown, initialise
from ..moe import MixtureOfExperts
from ..questions import Tokenizer, forest, reference_documents, require, split, text_batches, two_chains
from ..recurrence import RMSNorm
from ..thinking import think
from ..training import REST_AFTER, Bar, Curriculum, QuestionBatch, TrainConfig, Words, chain_questions, halting_loss, held_out_bits
from ..training import optimisers, question_words, schedule, training_step
from .course import UserError, can_write, shown

LABELS, COLOURS = 80, 8
DEPTH = 5  # links of the longest questions in training
SEEDS = 3
# On facts with four times as many: what befalls one model in four is seldom seen in three.
RARE = ("theirs", "theirs, mean of 0.4", "theirs, mean of 0.4, normed")
TASKS = {
    "facts": "one token for each fact, then the questions, read from left to right",
    "chains": "the same written in words, through the tokenizer",
    "text": "the Python reference",
}
MODELS = {
    "facts": dict(
        vocab_size=LABELS + COLOURS, dim=64, n_heads=2, hidden_dim=128, n_prelude=0, n_coda=0, n_passes=6, context_length=256,
        core_positions="none", qk_norm=True, tie_embeddings=False, halting="settled",
    ),
    "chains": dict(
        vocab_size=2048, dim=128, n_heads=4, hidden_dim=256, n_prelude=1, n_coda=0, n_passes=6, context_length=256,
        core_positions="half", qk_norm=True, token_shift=True, halting="settled",
    ),
    "text": dict(vocab_size=2048, dim=128, n_heads=4, hidden_dim=384, n_passes=4, context_length=128, token_shift=True, halting="act"),
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """A model to train: how it differs from the others of its task.

    Args:
        name: Of the row in tables.
        task: One of :data:`TASKS`.
        model: What its configuration changes in that of :data:`MODELS`.
        n_steps: Steps of training.
        taught: ``"links"``, every pass what is one link further; ``"answers"``, every pass the answer; ``"answer"``, only the last pass.
        answers: From the ``"last"`` state, or from the ``"mean"`` of all, weighted by the halting head (adaptive computation time), or
            from the ``"mean of 0.4"``, as OpenMythos weighted it before version 0.5. Where every pass is taught its
            link, the mean is not trained, and the head is taught when to stop before it is read.
        passes: Of every step; 0 to draw them anew at each.
        curriculum: Begin with one link, and go one further whenever nineteen of twenty are right.
        n_facts: Most facts of a list in training.
        core: ``"ours"``; ``"bare"``, that without a norm of the state; ``"stack"``, a block for every pass; ``"theirs"``, the update of
            OpenMythos; ``"no index"``, that without the number of the pass; ``"theirs, normed"`` and ``"no index, normed"``, the two
            with a norm of the state; ``"state not carried"``, theirs without the number and without the decayed state beside the block;
            ``"block alone"``, without the inputs beside it, too.
        head: Bias that the halting head begins with: 0 for one half, and far below it for a head that hardly stops anything.
        rest: Facts rest after two passes in training too, and from there on only questions are computed.
        seed: Of weights and questions.
    """

    name: str
    task: str = "facts"
    model: dict = field(default_factory=dict)
    n_steps: int = 1600
    taught: str = "links"
    answers: str = "last"
    passes: int = 0
    curriculum: bool = True
    n_facts: int = 64
    core: str = "ours"
    head: float = 0.0
    rest: bool = False
    seed: int = 0

    @property
    def config(self) -> MythosConfig:
        return MythosConfig(**{**MODELS[self.task], **self.model})

    @property
    def key(self) -> str:
        """What makes it the same trial, later and elsewhere."""
        return json.dumps(asdict(self), sort_keys=True)


_mla = dict(attention="mla", kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=2, v_head_dim=32)
_moe = dict(ffn="moe", expert_dim=64, n_routed_experts=4, n_experts_per_token=2)
_lora = dict(pass_adapter="lora", n_passes=2)  # later passes hold the second, in training too
_no_wider = dict(qk_nope_head_dim=30, n_experts_per_token=1)  # keys of 32 a head, and 128 channels inside experts, as ours
_one_head = dict(attention="gqa", n_kv_heads=1)
_theirs = dict(taught="answer", answers="mean", passes=8, core="theirs")
_as_theirs = dict(qk_norm=False, pass_adapter="lora", n_passes=8)
_chains = dict(task="chains", n_steps=1000, n_facts=24)
_text = dict(task="text", n_steps=300, taught="answer")

#: What `mythoslab evidence` trains, by the question that it answers.
GROUPS = {
    "depth": (  # as many steps as two minutes allow
        Trial("ours", n_steps=2200),
        Trial("with MLA", model=_mla, n_steps=2000),
        Trial("with experts", model=_moe, n_steps=1600),
        Trial("with LoRA", model=_lora, n_steps=2200),
        Trial("with all three", model=_mla | _moe | _lora, n_steps=1500),
        Trial("with all three, longer", model=_mla | _moe | _lora, n_steps=1700),
        Trial("facts at rest", rest=True, n_steps=2200),
        Trial("with all three, facts at rest", rest=True, model=_mla | _moe | _lora, n_steps=1700),
        Trial("with all three, in two minutes", rest=True, model=_mla | _moe | _lora | _no_wider, n_facts=80, n_steps=1900),
        Trial("with one key head", model=_one_head, n_steps=2200),
    ),
    "parts": (
        Trial("LTI injection", model=dict(injection="lti")),
        Trial("free linear injection", model=dict(injection="linear")),
        Trial("no injection", model=dict(injection="none")),
        Trial("pass embedding", model=dict(pass_adapter="embedding")),
        Trial("LoRA for six passes", model=dict(pass_adapter="lora")),
        Trial("sum, state not normed", core="bare"),
        Trial("free linear, state not normed", core="bare", model=dict(injection="linear")),
        Trial("LTI, state not normed", core="bare", model=dict(injection="lti")),
        Trial("six blocks", model=dict(n_core=6, n_passes=1), core="stack", passes=6),
        Trial("twenty blocks", model=dict(n_core=20, n_passes=1), core="stack", passes=20),
        Trial("one block, one pass", model=dict(n_passes=1), taught="answer", passes=1, curriculum=False),
        Trial("told only answers", taught="answer", n_steps=2200),
    ),
    "failure": (
        Trial("theirs", **_theirs, model=_as_theirs),
        Trial("theirs, head shut", **_theirs, model=_as_theirs, head=-6.0),
        Trial("theirs, last state", **_theirs | dict(answers="last"), model=_as_theirs),
        Trial("+ passes drawn", **_theirs | dict(passes=0), model=_as_theirs),
        Trial("+ last state", **_theirs | dict(passes=0, answers="last"), model=_as_theirs),
        Trial("+ no adapters", **_theirs | dict(passes=0, answers="last"), model=dict(qk_norm=False)),
        Trial("+ passes alike", **_theirs | dict(passes=0, answers="last", core="no index"), model=dict(qk_norm=False)),
        Trial("+ state not carried", core="state not carried", taught="answer", model=dict(qk_norm=False)),
        Trial("+ block alone", core="block alone", taught="answer", model=dict(qk_norm=False)),
        Trial("+ our update", core="bare", taught="answer", model=dict(qk_norm=False)),
        Trial("+ normed state", taught="answer", model=dict(qk_norm=False)),
        Trial("+ every pass taught", taught="answers", model=dict(qk_norm=False)),
        Trial("+ one link taught", model=dict(qk_norm=False)),
        Trial("+ queries and keys normed"),
    ),
    "mean": (
        Trial("normed state, mean", taught="answer", answers="mean", model=dict(qk_norm=False)),
        Trial("normed state, mean, head shut", taught="answer", answers="mean", model=dict(qk_norm=False), head=-6.0),
        Trial("mean, head taught to stop", answers="mean"),
        Trial("theirs, mean of 0.4", **_theirs | dict(answers="mean of 0.4"), model=_as_theirs),
        Trial("theirs, mean of 0.4, normed", **_theirs | dict(answers="mean of 0.4", core="theirs, normed"), model=_as_theirs),
    ),
    "controls": (  # of two steps of the ladder
        Trial("no adapters, begun as with", **_theirs | dict(passes=0, answers="last"), model=dict(qk_norm=False, n_passes=8)),
        Trial("passes alike, state normed", **_theirs | dict(passes=0, answers="last", core="no index, normed"), model=dict(qk_norm=False)),
    ),
    "chains": (
        Trial("ours", **_chains),
        Trial("only the answer taught", **_chains | dict(taught="answers")),
        Trial("queries and keys not normed", **_chains, model=dict(qk_norm=False)),
        Trial("half as wide", **_chains, model=dict(dim=64, hidden_dim=128)),
        Trial("at most twelve facts", **_chains | dict(n_facts=12)),
        Trial("half as many steps", **_chains | dict(n_steps=500)),
        Trial("half as many again", **_chains | dict(n_steps=1500)),
    ),
    "text": (
        Trial("theirs", **_text | _theirs, model=_as_theirs),
        Trial("theirs, mean of 0.4", **_text | _theirs | dict(answers="mean of 0.4"), model=_as_theirs),
        Trial("theirs, head shut", **_text | _theirs, model=_as_theirs, head=-6.0),
        Trial("theirs, last state", **_text | _theirs | dict(answers="last"), model=_as_theirs),
        Trial("+ passes drawn", **_text | _theirs | dict(passes=0), model=_as_theirs),
        Trial("+ last state", **_text | _theirs | dict(passes=0, answers="last"), model=_as_theirs),
        Trial("ours", **_text),
        Trial("ours, eight passes", **_text, model=dict(n_passes=8)),
        Trial("ours, always four passes", **_text, passes=4),
        Trial("as many weights, no loop", **_text, passes=1, model=dict(n_passes=1)),
        Trial("as much work, no loop", **_text, passes=1, model=dict(n_passes=1, n_core=4)),
        Trial("with MLA", **_text, model=dict(attention="mla", kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)),
        Trial("with one key head", **_text, model=_one_head),
        Trial("with experts", **_text, model=dict(ffn="moe", expert_dim=128, n_routed_experts=8, n_experts_per_token=2)),
        Trial("with LoRA", **_text, model=dict(pass_adapter="lora")),
    ),
}


class PackedFacts(nn.Module):
    """The state that a fact starts with: a vector for what it is about, and one for what it says.

    A token is the number of a node, plus ``LABELS`` times one more than what is said of it: its parent, or its colour. A question is
    about a node, and says nothing.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * LABELS + COLOURS + 1, dim).normal_(0, 0.02))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens % LABELS] + self.weight[LABELS + tokens // LABELS]


class Bare(Core):
    """The loop without a norm of the state."""

    def __init__(self, config: MythosConfig):
        super().__init__(config)
        self.norm = nn.Identity()


class Stack(Core):
    """The loop with a block of its own for every pass, and the last one for all that follow."""

    def one_pass(self, state, inputs, pass_index, shown=None):
        block = self.blocks[min(pass_index, len(self.blocks) - 1)]
        return block(self.injection(self.norm(state), inputs), pass_index)


def through(blocks: nn.ModuleList, x: Tensor, pass_index: int, shown: list[Shown] | None) -> Tensor:
    """What the blocks of a pass make of this, one after the other."""
    for block, memory in zip(blocks, shown or [None] * len(blocks)):
        x = block(x, pass_index, memory)
    return x


class Theirs(Core):
    """The loop of OpenMythos: ``state ← decay ⊙ state + gain ⊙ inputs + block(norm(state + pass + inputs))``, without a norm of the state.

    ``pass`` is its number as sines and cosines, in an eighth of the channels.

    Source: Gomez 2026 (OpenMythos 0.5), ``RecurrentBlock``.
    """

    says_pass = True

    def __init__(self, config: MythosConfig):
        super().__init__(config)
        self.log_rate = nn.Parameter(torch.zeros(config.dim))
        self.gain = nn.Parameter(torch.full((config.dim,), 0.1))
        n_told = config.dim // 8
        self.frequency = 10000.0 ** (-torch.arange(0, n_told, 2) / n_told)

    def one_pass(self, state, inputs, pass_index, shown=None):
        told = state
        if self.says_pass:
            angles = pass_index * self.frequency
            told = state + F.pad(torch.cat((angles.sin(), angles.cos())), (0, state.shape[-1] - 2 * len(angles)))
        return self.beside(state, inputs) + through(self.blocks, self.norm(told + inputs), pass_index, shown)

    def beside(self, state, inputs):
        """What is carried on beside the blocks."""
        return torch.exp(-self.log_rate.exp()) * state + self.gain * inputs


class TheirsWithoutIndex(Theirs):
    """The same without the number of the pass."""

    says_pass = False


class StateNotCarried(TheirsWithoutIndex):
    """That, with only the inputs beside the blocks: ``state ← gain ⊙ inputs + block(norm(state + inputs))``."""

    def beside(self, state, inputs):
        return self.gain * inputs


class BlockAlone(Core):
    """Their loop with nothing carried on beside the block, and without the number of the pass: ``state ← block(norm(state + inputs))``."""

    def one_pass(self, state, inputs, pass_index, shown=None):
        return through(self.blocks, self.norm(state + inputs), pass_index, shown)


class TheirsNormed(Theirs):
    """Their loop with a norm of the state after every pass, so that it cannot grow."""

    def __init__(self, config: MythosConfig):
        super().__init__(config)
        self.state_norm = RMSNorm(config.dim)

    def one_pass(self, state, inputs, pass_index, shown=None):
        return self.state_norm(super().one_pass(state, inputs, pass_index, shown))


class TheirsWithoutIndexNormed(TheirsWithoutIndex, TheirsNormed):
    """That without the number of the pass."""


def build(trial: Trial) -> Mythos:
    """The model of a trial, not trained yet."""
    config = trial.config
    torch.manual_seed(trial.seed)
    model = Mythos(config)
    if trial.task == "facts":
        model.embedding = PackedFacts(config.dim)
    cores = {"bare": Bare, "stack": Stack, "theirs": Theirs, "no index": TheirsWithoutIndex}
    cores |= {"theirs, normed": TheirsNormed, "no index, normed": TheirsWithoutIndexNormed, "state not carried": StateNotCarried, "block alone": BlockAlone}
    if trial.core in cores:
        model.core = cores[trial.core](config)
        initialise(model)
    if trial.head:
        nn.init.constant_(model.halting.halt.bias, trial.head)
    return model


def fact_list(
    batch_size: int, *, max_depth: int, generator: torch.Generator, n_facts: int | None = None, n_asked: int = 16, root_share: float = 0.15
) -> QuestionBatch:
    """Facts, then questions, one token each; two balanced chains if ``n_facts`` is None, and then every node is asked."""
    kind = dict(n_colours=COLOURS, n_labels=LABELS, generator=generator)
    if n_facts is None:
        facts = two_chains(batch_size, length=max_depth + 1, **kind)
    else:
        facts = forest(batch_size, n_nodes=n_facts, max_depth=max_depth, root_share=root_share, **kind)
    n_told = facts.node.shape[1]
    said = torch.where(facts.node == facts.parent, LABELS + facts.colour - 1, facts.parent)
    told = facts.node + LABELS * (1 + said)
    asked = torch.rand(facts.node.shape, generator=generator).argsort(1)[:, : n_told if n_facts is None else n_asked]
    nodes = facts.node.gather(1, asked)
    step = torch.arange(LABELS + COLOURS).repeat(batch_size, 1).scatter_(1, facts.node, said)  # a colour leads to itself
    hops = [step.gather(1, nodes)]
    for _ in range(max_depth):
        hops.append(step.gather(1, hops[-1]))
    tokens = torch.cat((told, nodes), 1)
    path, difficulty = torch.full((*tokens.shape, len(hops)), -1), torch.full_like(tokens, -1)
    path[:, n_told:] = torch.stack(hops, -1)
    difficulty[:, n_told:] = facts.depth.gather(1, asked)
    return QuestionBatch(tokens, path, difficulty)


class Corpus(NamedTuple):
    """The Python reference as tokens, and what questions in words are written with."""

    training: Tensor
    held_out: Tensor
    n_bytes: int  # of what is held out
    words: Words


@lru_cache(maxsize=1)
def corpus() -> Corpus:
    training, held_out = split(reference_documents())
    tokenizer = Tokenizer.train(training + question_words(), 2048)
    tokens = tokenizer.encode(training), tokenizer.encode(held_out)
    return Corpus(*tokens, len(held_out.encode()), Words(tokenizer))


def questions(trial: Trial, batch_size: int, **kind) -> QuestionBatch:
    """Questions of the trial's task."""
    if trial.task == "facts":
        return fact_list(batch_size, **kind)
    return chain_questions(batch_size, corpus().words, **{"n_asked": 10, **kind})


def answer_state(model: Mythos, states: Tensor, trial: Trial) -> Tensor:
    """The state that answers after all these passes.

    Source: the mean is that of OpenMythos (Gomez 2026). Unlike Graves 2016, nothing takes what is missing to one when passes run out.
    """
    if trial.answers == "last":
        return states[-1]
    return (halting_weights(model, states, trial.answers).unsqueeze(-1) * states).sum(0)


def halting_weights(model: Mythos, states: Tensor, answers: str = "mean") -> Tensor:
    """What each state counts for in the mean, (pass, batch, position): what its halting head says, until 0.99 are spent.

    With ``"mean of 0.4"`` every later state counts for one minus the probabilities spent, if that is above zero, as it did
    before version 0.5 of OpenMythos; so the weights can sum to more than one.
    """
    halts = model.halting(states)
    spent = halts.cumsum(0)
    goes_on = spent - halts < 0.99
    weights = torch.where(spent < 0.99, halts, 1 - (spent - halts))
    later = (1 - (halts * goes_on).sum(0)).clamp(min=0) if answers == "mean of 0.4" else 0.0
    return torch.where(goes_on, weights, later)


def learn(trial: Trial, model: Mythos) -> dict[int, float]:
    """Train a model; gives the seconds of computing after which each depth of questions was begun."""
    plan = TrainConfig(n_steps=trial.n_steps, question_batch=24, n_facts=(8, 24))
    draw, curriculum = torch.Generator().manual_seed(trial.seed + 1), Curriculum(DEPTH)
    if not trial.curriculum:
        curriculum.depth, curriculum.root_share = DEPTH, 0.15
    text = None
    if trial.task == "text":
        text = text_batches(corpus().training, batch_size=8, context_length=trial.config.context_length, generator=draw)
    optims, begun, start = optimisers(model, plan), {1: 0.0}, time.process_time()

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=draw))

    for step in Bar(range(trial.n_steps), desc=f"{trial.task}, {trial.name}, seed {trial.seed}", leave=False, mininterval=1):
        for group in (group for optimiser in optims for group in optimiser.param_groups):
            group["lr"] = plan.learning_rate * schedule(step, plan)
        right: list[Tensor] = []
        if text is not None:
            inputs, targets = next(text)
            n_passes = trial.passes or number(1, 2 * trial.config.n_passes - 1)

            def loss(inputs=inputs, targets=targets, n_passes=n_passes):
                logits = model.read(answer_state(model, model.think(inputs, n_passes), trial))
                return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

        else:
            depth = curriculum.depth
            n_facts = None if depth > 1 and number(0, 1) else number(max(8, depth + 2), trial.n_facts)
            kind = dict(max_depth=depth, root_share=curriculum.root_share, n_facts=n_facts)
            batch = questions(trial, 24, generator=draw, **kind)
            n_passes = trial.passes or depth + number(1, 3)

            def loss(batch=batch, n_passes=n_passes):
                value, answered = question_loss(model, batch, n_passes, trial)
                right.append(answered[batch.difficulty[batch.difficulty >= 0] > 0])
                return value

        training_step(model, [loss], optims)
        for part in model.modules():
            if isinstance(part, MixtureOfExperts):
                part.update_bias(plan.bias_rate)
        if right:
            before = curriculum.depth
            curriculum.update(right[0].float().mean().item())
            if curriculum.depth > before:
                begun[curriculum.depth] = round(time.process_time() - start, 1)
    return begun


class AtRest(Shown):
    """What the first tokens showed last, for those behind them that think on."""

    def __init__(self, kept: Tensor):
        super().__init__()
        self.kept, self.length = kept, kept.shape[1]

    def write(self, new, pass_index):
        return torch.cat((self.kept, new), 1)


def think_on(model: Mythos, tokens: Tensor, n_passes: int, n_asked: int) -> Tensor:
    """The states of the last ``n_asked`` tokens after every pass, with all others at rest after two: (pass, batch, asked, dim).

    The same numbers as those of :meth:`Mythos.think`, told ``batch.passes_at_rest(n_passes)``; but that computes every pass of all tokens,
    and here experts count no load of what rests. With gradients, unlike :func:`think`.
    """
    inputs, shown = model.inputs(tokens, None), [Shown() for _ in model.core.blocks]
    n_told = tokens.shape[1] - n_asked
    states = list(model.core(inputs, min(n_passes, REST_AFTER), shown)[:, :, n_told:])
    resting = [AtRest(memory.last[:, :n_told]) for memory in shown]
    for pass_index in range(REST_AFTER, n_passes):
        states.append(model.core.one_pass(states[-1], inputs[:, n_told:], pass_index, resting))
    return torch.stack(states)


def question_loss(model: Mythos, batch: QuestionBatch, n_passes: int, trial: Trial) -> tuple[Tensor, Tensor]:
    """Cross-entropy of what the trial teaches, and which answers are right in the end."""
    asked = at = batch.difficulty >= 0
    if trial.rest:  # all questions stand at the end
        n_asked = int(asked[0].sum())
        states, at = think_on(model, batch.tokens, n_passes, n_asked), asked[:, -n_asked:]
    else:
        states = model.think(batch.tokens, n_passes)
    answer = batch.path[..., -1][asked]
    if trial.taught == "answer":
        logits = model.read(answer_state(model, states, trial), at=at)
        return F.cross_entropy(logits, answer), logits.argmax(-1) == answer
    losses = []
    for index, state in enumerate(states):
        logits = model.read(state, at=at)
        losses.append(F.cross_entropy(logits, batch.targets(index)[asked] if trial.taught == "links" else answer))
    return torch.stack(losses).mean(), logits.argmax(-1) == answer


def learn_halting(trial: Trial, model: Mythos, n_steps: int = 300, n_passes: int = 12) -> None:
    """Teach the halting head alone: stop when the answer will not change any more, and after two passes if nothing is asked."""
    draw = torch.Generator().manual_seed(trial.seed + 2)
    optimiser = torch.optim.AdamW(model.halting.parameters(), lr=1e-2)
    fall = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.05, n_steps)
    for step in Bar(range(n_steps), desc=f"{trial.task}, {trial.name}, halting", leave=False, mininterval=1):
        n_facts = None if step % 2 else int(torch.randint(8, trial.n_facts + 1, (), generator=draw))
        batch = questions(trial, 24, max_depth=DEPTH, n_facts=n_facts, generator=draw)
        each = batch.passes_at_rest(n_passes) if trial.rest else n_passes
        loss = halting_loss(model, batch.tokens, batch.difficulty >= 0, each)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        fall.step()


@torch.no_grad()
def answers_after(model: Mythos, batch: QuestionBatch, passes: Sequence[int], trial: Trial, *, rest: bool = False) -> Iterator[Tensor]:
    """The logits of what is asked, (asked, word), after each of these numbers of passes.

    Args:
        rest: Let tokens that are asked nothing stop after two passes.
    """
    asked = batch.difficulty >= 0
    states = model.think(batch.tokens, batch.passes_at_rest(max(passes)) if rest else max(passes))
    for count in passes:
        yield model.read(answer_state(model, states[:count], trial), at=asked)


def by_depth(values: Tensor, batch: QuestionBatch) -> list[float]:
    """Mean of what was found for each question, by depth."""
    depth = batch.difficulty[batch.difficulty >= 0]
    return [round(values[depth == hard].float().mean().item(), 4) for hard in depth.unique().tolist()]


def stairs(model: Mythos, trial: Trial, length: int, passes: Sequence[int], *, rest: bool, n_lists: int = 64) -> dict[str, dict]:
    """On two chains of ``length``, by passes and depth: the share of right answers, and of right choices between the two colours there are."""
    model.eval()
    batch = questions(trial, n_lists, max_depth=length - 1, generator=torch.Generator().manual_seed(1000 + length), **_all_asked(trial, length))
    asked = batch.difficulty >= 0
    answer = batch.path[..., -1][asked]
    pairs = batch.path[..., -1].where(asked, -1)
    both = torch.stack((pairs.amax(1), pairs.where(asked, 10**6).amin(1)), 1)  # the two colours of each list
    row = asked.nonzero()[:, 0]
    right, choice = {}, {}
    for count, logits in zip(passes, answers_after(model, batch, passes, trial, rest=rest)):
        right[str(count)] = by_depth(logits.argmax(-1) == answer, batch)
        of_two = logits.gather(1, both[row])  # (asked, 2)
        other = both[row].sum(1) - answer
        chosen = both[row].gather(1, of_two.argmax(1, keepdim=True))[:, 0]
        choice[str(count)] = by_depth((chosen == answer) & (other != answer), batch)
    return {"right": right, "choice": choice}


def _all_asked(trial: Trial, length: int) -> dict:
    return {} if trial.task == "facts" else {"n_asked": 2 * length}


@torch.no_grad()
def stopping(model: Mythos, trial: Trial, length: int, *, n_lists: int = 64) -> dict[str, object]:
    """The same when every token stops by itself, after eight passes more than the deepest question needs at the latest."""
    batch = questions(trial, n_lists, max_depth=length - 1, generator=torch.Generator().manual_seed(1000 + length), **_all_asked(trial, length))
    asked = batch.difficulty >= 0
    parts = [think(model, tokens, max_passes=length + 8, rule="settled") for tokens in batch.tokens.split(16)]
    logits, passes = torch.cat([part.logits for part in parts])[asked], torch.cat([part.passes for part in parts])
    depth, used = batch.difficulty[asked].double(), passes[asked].double()
    alike = torch.corrcoef(torch.stack((depth, used)))[0, 1].item() if used.std() > 0 else 0.0
    return {
        "right": by_depth(logits.argmax(-1) == batch.path[..., -1][asked], batch),
        "passes": by_depth(used, batch),
        "correlation": round(alike, 4),
        "passes_of_facts": round(passes[~asked].double().mean().item(), 3),
    }


@torch.no_grad()
def weights_of_passes(model: Mythos, tokens: Tensor, asked: Tensor, answers: str = "mean", n_passes: int = 32) -> list[float]:
    """What the state of each pass counts for in the mean of all, averaged over what is asked."""
    return [round(weight, 4) for weight in halting_weights(model, model.think(tokens, n_passes), answers)[:, asked].mean(1).tolist()]


@torch.no_grad()
def size_of_states(model: Mythos, tokens: Tensor, asked: Tensor, n_passes: int = 32) -> list[float]:
    """The root mean square of a state after each pass, averaged over what is asked."""
    return [round(size, 3) for size in model.think(tokens, n_passes)[:, asked].square().mean(-1).sqrt().mean(1).tolist()]


class Averaged(nn.Module):
    """A model that answers as its trial does, for the measure of notebook 09."""

    def __init__(self, model: Mythos, trial: Trial):
        super().__init__()
        self.model, self.trial, self.config, self.embedding = model, trial, model.config, model.embedding

    def forward(self, tokens, n_passes):
        logits = self.model.read(answer_state(self.model, self.model.think(tokens, n_passes), self.trial))
        return NamedTuple("Logits", [("logits", Tensor)])(logits)


def measure(trial: Trial, model: Mythos) -> dict:
    """What a trained model can do."""
    model.eval()
    if trial.task == "text":
        trained = trial.config.n_passes
        counts = [1] if trained == 1 else [1, trained // 2, trained, 2 * trained, 4 * trained]
        text = corpus()
        tokens = text.held_out[:20_000]
        n_bytes = len(text.words.tokenizer.decode(tokens.tolist()).encode())
        answering = Averaged(model, trial)
        found = {}
        if trial.answers != "last":
            seen = tokens[: 20 * trial.config.context_length].view(20, -1)
            found["weights_of_passes"] = weights_of_passes(model, seen, torch.ones_like(seen, dtype=torch.bool), trial.answers)
        return found | {"bits": {str(count): round(held_out_bits(answering, tokens, n_bytes, n_passes=count), 4) for count in counts}}
    lengths = (6, 10, 20, 40) if trial.task == "facts" else (6, 10, 16, 20)
    found: dict = {"running": {}, "resting": {}}
    can_stop = trial.taught == "links" and trial.core in ("ours", "bare")
    if can_stop:  # first of all, since a mean is weighted by the head
        learn_halting(trial, model)
        model.eval()
    for length in lengths:
        counts = sorted({1, 6, 8, 16, 32, 64, length, length + 8}) if length == 6 else sorted({length // 2, length - 1, length, length + 8})
        found["running"][str(length)] = stairs(model, trial, length, counts, rest=False)
        if can_stop:
            found["resting"][str(length)] = stairs(model, trial, length, counts, rest=True)
    if trial.answers != "last":
        batch = questions(trial, 64, max_depth=5, generator=torch.Generator().manual_seed(1006))
        asked = batch.tokens, batch.difficulty >= 0
        found["weights_of_passes"] = weights_of_passes(model, *asked, trial.answers)
        found["size_of_states"] = size_of_states(model, *asked)
    if trial.answers == "mean of 0.4":
        found["read_as_mean"] = stairs(model, replace(trial, answers="mean"), 6, [8, 16, 64], rest=False)
    if can_stop:
        found["stopping"] = {str(length): stopping(model, trial, length) for length in lengths}
    return found


def run_trial(trial: Trial) -> dict:
    """Train and measure; gives a record that JSON can hold."""
    torch.set_num_threads(1)
    if trial.task != "facts":
        corpus()  # not part of the time
    clock, cpu = time.perf_counter(), time.process_time()
    model = build(trial)
    begun = learn(trial, model)
    seconds = {"cpu": round(time.process_time() - cpu, 1), "clock": round(time.perf_counter() - clock, 1)}
    found = measure(trial, model)
    weights = {"all": sum(weight.numel() for weight in model.parameters()), "core": sum(weight.numel() for weight in model.core.parameters())}
    about = {"seconds": seconds, "begun": begun, "weights": weights, "torch": torch.__version__}
    return {"trial": asdict(trial), **about, **found}


def read_results(path: str | Path) -> dict[str, dict]:
    """Records by the key of their trial; a last line that was cut off is left out.

    Raises:
        UserError: A line is damaged that is not the last or is none of ours, or the file cannot be read.
    """
    path, results = Path(path), {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read ({error.strerror}): choose another file with --out") from None
    except UnicodeDecodeError:
        raise UserError(f"{shown(path)} holds no results of trials: choose another file with --out") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            results[Trial(**record["trial"]).key] = record
        except (ValueError, KeyError, TypeError):
            if number < len(lines) or not line.startswith('{"trial"'[: len(line)]):
                raise UserError(f"line {number} of {shown(path)} is damaged: remove it, and its trial is run again") from None
    return results


def _is_json(line: bytes) -> bool:
    try:
        return bool(json.loads(line))
    except ValueError:
        return False


def add_result(path: Path, record: dict) -> None:
    """Write a record as one line at the end of the file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        with path.open("a+b", buffering=0) as file:  # in one piece, so that another process never reads half a line
            file.seek(0)
            written = file.read()
            last = written[written.rfind(b"\n") + 1 :]
            if last and _is_json(last):  # whole, and only its end of line is missing
                line = b"\n" + line
            elif last:  # cut off; where nothing is, another process may just have added a line
                file.truncate(len(written) - len(last))
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be written ({error.strerror}): make room, or choose another file with --out") from None


def planned(only: str | None = None, n_seeds: int = SEEDS) -> list[Trial]:
    """The trials of a group, or all, one seed after the other; those of :data:`RARE` go on when the others have had theirs.

    Raises:
        ValueError: There is no such group, or there are no seeds.
    """
    require(only is None or only in GROUPS, "the group", only, f"one of {', '.join(GROUPS)}")
    require(1 <= n_seeds <= 1000, "the number of seeds", n_seeds, "from 1 to 1,000")
    trials = [trial for group in (GROUPS if only is None else [only]) for trial in GROUPS[group]]
    rare = [trial for trial in trials if trial.task == "facts" and trial.name in RARE]
    return [replace(trial, seed=seed) for seed in range(4 * n_seeds) for trial in (trials if seed < n_seeds else rare)]


def evidence(path: str | Path, only: str | None = None, n_seeds: int = SEEDS) -> None:
    """Run what has not been run, and write each result down as soon as it is there."""
    path, trials = Path(path), planned(only, n_seeds)
    done = read_results(path)
    missing = [trial for trial in trials if trial.key not in done]
    print(f"{len(trials) - len(missing)} of {len(trials)} trials are in {shown(path)}")
    if missing:
        can_write(path.parent)
    for number, trial in enumerate(missing, 1):
        if trial.key in read_results(path):  # another process was faster
            continue
        try:
            record = run_trial(trial)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"stopped in trial {number} of {len(missing)}; the same command goes on with it") from None
        add_result(path, record)
        print(told(record), flush=True)


def told(record: dict) -> str:
    """A record in one line."""
    trial = record["trial"]
    start = f"{trial['task']:7}{trial['name']:30} seed {trial['seed']}  {record['seconds']['cpu']:4.0f} s  "
    if "bits" in record:
        return start + ", ".join(f"{count}: {bits:.3f}" for count, bits in record["bits"].items()) + " bits per byte by passes"
    parts = []
    for kind in ("running", "resting"):
        for length, stair in record[kind].items():
            last = list(stair["right"].values())[-1] if length != "6" else stair["right"]["8"]
            parts.append(f"{kind} {length}: {100 * min(last):.0f}")
    return start + ", ".join(parts) + " % of the hardest"
