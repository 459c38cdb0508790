"""How fast a whole looped model trains and writes, beside OpenMythos at an equal configuration.

OpenMythos stops early when it is new, so speed is given for each pass that was really run. Everything takes turns in one
process; medians are compared.
"""

import importlib
import statistics
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F

from mythoslab.classroom.course import DATA
from mythoslab.mla import ONE_DNN
from mythoslab.model import Mythos, MythosConfig, flops_per_token
from mythoslab.questions import reference_documents, split
from mythoslab.thinking import Reader, generate
from mythoslab.training import load

from .blocks import ATTENTION, OPEN_MYTHOS
from .clock import in_turn

DIM, BATCH, LENGTH, PASSES, VOCABULARY = 256, 4, 256, 4, 2048
PROMPT, WRITTEN, ROUNDS = 256, 16, 9


def mythos() -> Mythos:
    """Ours: one block each of prelude, core and coda, latent attention, experts in the core, linear time-invariant injection."""
    # OpenMythos' shared expert is as wide as the two chosen ones, and its dense part four thirds as wide as the state.
    return Mythos(
        MythosConfig(
            vocab_size=VOCABULARY,
            dim=DIM,
            n_heads=8,
            hidden_dim=DIM * 4 // 3,
            n_passes=PASSES,
            context_length=PROMPT + WRITTEN + 1,
            attention="mla",
            ffn="moe",
            expert_dim=256,
            n_routed_experts=8,
            n_experts_per_token=2,
            n_shared_experts=2,
            injection="lti",
            **ATTENTION,
        )
    )


def open_mythos(**kind):
    """OpenMythos with the same sizes, or others; and the passes that a step of it really runs."""
    sys.path.append(str(OPEN_MYTHOS))
    module = importlib.import_module("open_mythos")
    sizes = dict(n_experts=8, expert_dim=256, n_experts_per_tok=2, n_shared_experts=1, lora_rank=4, max_loop_iters=PASSES)
    shape = dict(vocab_size=VOCABULARY, dim=DIM, n_heads=8, prelude_layers=1, coda_layers=1, max_seq_len=PROMPT + WRITTEN + 1)
    model = module.OpenMythos(module.MythosConfig(**{**shape, **sizes, **ATTENTION, **kind}))
    runs = []
    model.recurrent.block.register_forward_hook(lambda *_: runs.append(1))
    return model, runs


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours, dense = mythos(), mythos_dense()
    theirs, runs = open_mythos()
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()
    factors = torch.randn(2, 1024, 1024)

    def training(model, logits_of):
        def step():
            model.zero_grad(set_to_none=True)
            F.cross_entropy(logits_of(model(inputs)).flatten(0, 1), targets).backward()

        return step

    tasks = {
        "mythoslab": training(ours, lambda thought: thought.logits),
        "mythoslab, dense": training(dense, lambda thought: thought.logits),
        "OpenMythos": training(theirs, lambda logits: logits),
        "matrix product": lambda: factors[0] @ factors[1],
    }
    if ONE_DNN is not None:
        tasks["by oneDNN"] = lambda: ONE_DNN(factors[0], factors[1], None, "none", [], "")
    runs.clear()
    tasks["OpenMythos"]()
    passes = {"mythoslab": PASSES, "mythoslab, dense": PASSES, "OpenMythos": len(runs)}
    seconds = {name: statistics.median(times) for name, times in in_turn(tasks, ROUNDS).items()}
    peak = 2 * 1024**3 / seconds["matrix product"]
    print(f"a whole model {DIM} wide, forward and backward, {BATCH} × {LENGTH} tokens, one thread, median of {ROUNDS} in turn")
    print(f"{'':18}{'passes run':>12}{'tokens/s':>12}{'× passes':>12}{'GFLOP/s':>10}{'of the peak':>13}")
    speed = {}
    for name, count in passes.items():
        rate = BATCH * LENGTH / seconds[name]
        speed[name] = rate * count
        work = ""
        if name != "OpenMythos":
            config = (ours if name == "mythoslab" else dense).config
            seen = replace(config, context_length=LENGTH // 2)  # half of the square is masked, and need not be computed
            gflops = 3 * rate * flops_per_token(seen) / 1e9
            work = f"{gflops:10.1f}{1e9 * gflops / peak:13.0%}"
        print(f"{name:18}{count:12}{rate:12,.0f}{speed[name]:12,.0f}{work}")
    for name in ("matrix product", "by oneDNN"):
        if name in seconds:
            rate = 2 * 1024**3 / seconds[name]
            print(f"{name:18}{'':36}{rate / 1e9:10.1f}{rate / peak:13.0%}")
    print(f"tokens per second and executed pass: ours is {speed['mythoslab'] / speed['OpenMythos']:.2f} times OpenMythos")
    _write(ours, theirs)
    _write_until_done()


def mythos_dense() -> Mythos:
    """Multi-head attention and dense parts of common proportions: what a matrix product should suit best."""
    return Mythos(
        MythosConfig(VOCABULARY, dim=DIM, n_heads=4, hidden_dim=704, n_passes=PASSES, context_length=LENGTH)
    )


@torch.inference_mode()
def _write(ours: Mythos, theirs) -> None:
    ours.eval(), theirs.eval()
    prompt = torch.randint(VOCABULARY, (1, PROMPT))

    def write_ours():
        reader = Reader(ours, max_passes=PASSES, rule="none")
        token = reader.read(prompt).logits[:, -1:].argmax(-1)
        for _ in range(WRITTEN):
            token = reader.read(token).logits[:, -1:].argmax(-1)

    def write_theirs():
        kept = {}
        token = theirs(prompt, PASSES, kept)[:, -1:].argmax(-1)
        for step in range(WRITTEN):
            token = theirs(token, PASSES, kept, PROMPT + step)[:, -1:].argmax(-1)

    def read_ours():
        Reader(ours, max_passes=PASSES, rule="none").read(prompt)

    tasks = {"ours": write_ours, "theirs": write_theirs, "ours, prompt": read_ours, "theirs, prompt": lambda: theirs(prompt, PASSES, {})}
    seconds = {name: statistics.median(times) for name, times in in_turn(tasks, ROUNDS).items()}
    rates = {name: WRITTEN / (seconds[name] - seconds[f"{name}, prompt"]) for name in ("ours", "theirs")}
    print(
        f"writing after {PROMPT} tokens, one at a time, {PASSES} passes each: {rates['ours']:.0f} tokens/s, OpenMythos {rates['theirs']:.0f};"
        f" ours is {rates['ours'] / rates['theirs']:.1f} times as fast"
    )


@torch.inference_mode()
def _write_until_done(prompt_length: int = 64) -> None:
    """The trained model of the course, which stops by itself, beside OpenMythos of its sizes, which never does with a cache; one cap for both."""
    ours, tokenizer = load(DATA / "course")
    config, cap = ours.config, 4 * ours.config.n_passes
    heads = dict(attn_type="gqa", n_heads=config.n_heads, n_kv_heads=config.kv_heads)
    experts = dict(n_experts=2, n_experts_per_tok=1, expert_dim=config.hidden_dim // 2, n_shared_experts=1)  # as wide a feed-forward part
    theirs, _ = open_mythos(vocab_size=config.vocab_size, dim=config.dim, max_loop_iters=cap, **heads, **experts)
    theirs.eval()
    prompt = tokenizer.encode(split(reference_documents())[1])[None, :prompt_length]
    spent = []

    def write_ours():
        spent.clear()
        for written in generate(ours, prompt[0], WRITTEN + 1, max_passes=cap, temperature=0.0):
            spent.append(written[0].passes)

    def write_theirs():
        theirs.generate(prompt, WRITTEN + 1, n_loops=cap)

    def read_ours():
        next(generate(ours, prompt[0], 1, max_passes=cap, temperature=0.0))

    def read_theirs():
        theirs.generate(prompt, 1, n_loops=cap)

    tasks = {"ours": write_ours, "theirs": write_theirs, "ours, prompt": read_ours, "theirs, prompt": read_theirs}
    seconds = {name: statistics.median(times) for name, times in in_turn(tasks, ROUNDS).items()}
    rates = {name: WRITTEN / (seconds[name] - seconds[f"{name}, prompt"]) for name in ("ours", "theirs")}
    print(
        f"writing with at most {cap} passes: the model of the course takes {statistics.mean(spent[1:]):.1f} and writes {rates['ours']:.0f} tokens/s;"
        f" OpenMythos of its sizes {rates['theirs']:.0f}; ours is {rates['ours'] / rates['theirs']:.1f} times as fast"
    )
