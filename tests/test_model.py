"""mythoslab.model: the configuration, the model, what it costs, how it writes, and its checks."""

import copy
import json
import math
from dataclasses import asdict, fields, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mythoslab.classroom.checks import check, reference
from mythoslab.model import (
    PRESETS,
    Mythos,
    MythosConfig,
    count_parameters,
    flops_per_token,
    generate,
    preset,
    sample,
)
from mythoslab.recurrence import Block
from tests.mistakes import mistakes_are_named

SMALL = MythosConfig(vocab_size=31, dim=16, n_heads=2, hidden_dim=24, n_passes=3, context_length=12)

configs = st.builds(
    lambda heads, per_head, **rest: MythosConfig(dim=2 * heads * per_head, n_heads=heads, **rest),
    heads=st.integers(1, 3),
    per_head=st.integers(1, 4),
    vocab_size=st.integers(1, 50),
    hidden_dim=st.integers(1, 20),
    n_prelude=st.integers(0, 2),
    n_core=st.integers(1, 3),
    n_coda=st.integers(0, 2),
    n_passes=st.integers(1, 4),
    context_length=st.integers(1, 9),
    rope_theta=st.floats(1.5, 1e6),
    tie_embeddings=st.booleans(),
)


@given(configs)
def test_config_survives_json(config):
    assert MythosConfig.from_json(config.to_json()) == config
    assert set(json.loads(config.to_json())) == {field.name for field in fields(MythosConfig)}


@settings(deadline=None, max_examples=40)
@given(configs, st.integers(1, 4))
def test_any_valid_config_builds_a_model_of_the_predicted_weights_and_operations(config, n_passes):
    model = Mythos(config)
    assert count_parameters(config) == sum(weight.numel() for weight in model.parameters())
    tokens = torch.randint(config.vocab_size, (2, config.context_length))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        logits = model(tokens, n_passes)
    assert logits.shape == (2, config.context_length, config.vocab_size)
    assert counter.get_total_flops() == flops_per_token(config, n_passes) * tokens.numel()


@pytest.mark.parametrize("field", [field.name for field in fields(MythosConfig)])
@pytest.mark.parametrize("wrong", [0.5, -1, "12", None, math.nan])
def test_a_wrong_field_is_named_with_what_was_got(field, wrong):
    unchecked = reference("model").MythosConfig  # without the type checker of the tests, as users have it
    with pytest.raises(ValueError) as error:
        unchecked(**{**asdict(SMALL), field: wrong})
    assert field in str(error.value) and repr(wrong) in str(error.value) and "must be" in str(error.value)


@pytest.mark.parametrize(
    "text, named",
    [
        ("{", "not JSON"),
        ("[]", "a JSON object"),
        ('{"vocab_size": 9, "n_experts": 4}', "n_experts"),
        ("{}", "vocab_size is 'missing'"),
        ('{"vocab_size": 9, "n_core": true}', "n_core is True"),
        ('{"vocab_size": 9, "dim": 18, "n_heads": 4}', "dim is 18"),
    ],
)
def test_damaged_json_is_named(text, named):
    with pytest.raises(ValueError, match=named):
        reference("model").MythosConfig.from_json(text)


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="'huge'.*tiny"):
        preset("huge")
    assert all(preset(name) is config for name, config in PRESETS.items())


@pytest.mark.parametrize("n_passes", [1, 2, 5, 16])
def test_no_token_sees_a_later_one_at_any_number_of_passes(n_passes):
    model, tokens = Mythos(SMALL), torch.randint(31, (2, 9))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 31
    before, after = model(tokens, n_passes), model(changed, n_passes)
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-5)
    assert (before[:, 5:] - after[:, 5:]).abs().amax(-1).min() > 1e-4


def test_a_sequence_alone_gives_what_it_gives_in_a_batch():
    model, tokens = Mythos(SMALL), torch.randint(31, (5, 12))
    assert torch.allclose(model(tokens)[2:3], model(tokens[2:3]), atol=1e-5)


def test_every_pass_is_the_core_on_the_normed_state_and_what_the_prelude_read():
    model, tokens = Mythos(replace(SMALL, n_core=2)), torch.randint(31, (1, 7))
    inputs = model.prelude_norm(model.prelude(model.embedding_norm(model.embedding(tokens))))
    state = inputs
    for thought in model.think(tokens, 4):
        for block in [model.core.norm, lambda normed: normed + inputs, *model.core.blocks[0]]:
            state = block(state)
        assert torch.allclose(thought, state, atol=1e-5)
    assert torch.allclose(model(tokens, 4), model.read(state), atol=1e-5)


def test_unrolled_twin_computes_as_much_and_stores_more():
    twin = SMALL.unrolled()
    assert flops_per_token(twin) == flops_per_token(SMALL)
    block = sum(weight.numel() for weight in Block(16, 2, 24).parameters())
    assert count_parameters(twin) - count_parameters(SMALL) == 2 * block
    assert count_parameters(replace(SMALL, n_passes=50)) == count_parameters(SMALL)


@pytest.mark.parametrize("seed", range(3))
def test_a_new_model_is_calm_and_undecided(seed):
    torch.manual_seed(seed)
    model = Mythos(replace(SMALL, vocab_size=400, dim=64, hidden_dim=128))
    tokens = torch.randint(400, (4, 12))
    size = model.think(tokens, 64).square().mean((1, 2, 3)).sqrt()
    assert size.max() < 1.5 * size[3] and size.min() > 0.5 * size[3]
    loss = F.cross_entropy(model(tokens).flatten(0, 1), torch.randint(400, (48,)))
    assert abs(loss - math.log(400)) < 0.15


def test_what_adds_to_the_stream_starts_smaller_the_more_passes_there_are():
    few, many = Mythos(replace(SMALL, n_passes=1)), Mythos(replace(SMALL, n_passes=30))
    ratio = few.core.blocks[0][0].ffn.down.weight.std() / many.core.blocks[0][0].ffn.down.weight.std()
    assert math.isclose(ratio.item(), math.sqrt(32 / 3), rel_tol=0.2)


def test_every_weight_learns_with_and_without_tied_embeddings():
    for tied in (True, False):
        model = Mythos(replace(SMALL, tie_embeddings=tied))
        F.cross_entropy(model(torch.randint(31, (4, 12))).flatten(0, 1), torch.randint(31, (48,))).backward()
        assert (model.head.weight is model.embedding.weight) == tied
        assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in model.parameters())


@pytest.mark.parametrize(
    "call, named",
    [
        (lambda model: model(torch.zeros(1, 13, dtype=torch.long)), "13 tokens.*12"),
        (lambda model: model(torch.zeros(1, 3, dtype=torch.long), 0), "got 0"),
        (lambda model: generate(model, torch.zeros(0, dtype=torch.long), 3), "prompt tokens is 0"),
        (lambda model: generate(model, torch.zeros(13, dtype=torch.long), 3), "prompt tokens is 13.*1 to 12"),
        (lambda model: generate(model, torch.zeros(3, dtype=torch.long), -1), "n_new is -1"),
        (lambda model: generate(model, torch.zeros(3, dtype=torch.long), 1, n_passes=0), "n_passes is 0"),
        (
            lambda model: generate(model, torch.zeros(3, dtype=torch.long), 1, temperature=-1.0),
            "temperature is -1",
        ),
        (lambda model: generate(model, torch.zeros(3, dtype=torch.long), 1, top_k=0), "top_k is 0"),
        (lambda model: sample(torch.zeros(4), temperature=math.nan), "temperature is nan"),
    ],
)
def test_bad_input_is_named_at_once(call, named):
    with pytest.raises(ValueError, match=named):
        call(Mythos(SMALL))


@given(
    logits=st.lists(st.floats(-5, 5), min_size=2, max_size=8),
    top_k=st.integers(1, 10),
    temperature=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_a_drawn_token_is_among_the_top_k(logits, top_k, temperature, seed):
    logits = torch.tensor(logits)
    token = sample(
        logits, top_k=top_k, temperature=temperature, generator=torch.Generator().manual_seed(seed)
    )
    assert (logits > logits[token]).sum() < top_k
    if temperature == 0:
        assert logits[token] == logits.max()


def test_writing_slides_the_window_and_follows_seed_temperature_and_passes():
    torch.manual_seed(0)
    model, prompt = Mythos(SMALL), torch.tensor([3, 1, 4])
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)  # decided enough that a different text shows
    likeliest = list(generate(model, prompt, 20, temperature=0))
    text = prompt.tolist()
    for token in likeliest:
        assert token == model(torch.tensor([text[-12:]]))[0, -1].argmax()
        text.append(token)
    assert likeliest == list(generate(model, prompt, 20, top_k=1))

    draw, text = torch.Generator().manual_seed(5), prompt.tolist()
    for token in generate(model, prompt, 30, generator=torch.Generator().manual_seed(5)):
        with torch.no_grad():
            assert token == sample(model(torch.tensor([text[-12:]]))[0, -1], generator=draw)
        text.append(token)

    def drawn(seed, **options):
        return list(generate(model, prompt, 20, generator=torch.Generator().manual_seed(seed), **options))

    assert drawn(5) == drawn(5) != drawn(6)
    assert drawn(5, n_passes=3) == drawn(5) != drawn(5, n_passes=1)


class WithoutIndexing(Mythos):
    def forward(self, tokens):  # an index into a CUDA tensor, even a fake one, needs a CUDA build of torch
        return self.read(self.think(tokens, 4).select(0, -1))


def test_it_runs_on_fake_cuda_without_mixing_devices():
    with torch.device("meta"):
        model = WithoutIndexing(SMALL)
    with FakeTensorMode():
        weights = {
            name: torch.empty(weight.shape, device="cuda") for name, weight in model.named_parameters()
        }
        tokens = torch.zeros(2, 12, dtype=torch.long, device="cuda")
        logits = torch.func.functional_call(model, weights, tokens)
    assert logits.device.type == "cuda" and logits.shape == (2, 12, 31)


# Mistakes that learners make, and a word of the sentence that names each.


class IgnoresPasses(Mythos):
    def think(self, tokens, n_passes=None):
        return super().think(tokens)


class ReadsTheFirstPass(Mythos):
    def forward(self, tokens, n_passes=None):
        return self.read(self.think(tokens, n_passes)[0])


class AveragesThePasses(Mythos):
    def forward(self, tokens, n_passes=None):
        return self.read(self.think(tokens, n_passes).mean(0))


class NoCoda(Mythos):
    def read(self, state):
        return self.head(self.norm(state))


class NoLastNorm(Mythos):
    def read(self, state):
        return self.head(self.coda(state))


class Without(Mythos):
    left_out = ""

    def think(self, tokens, n_passes=None):
        bare = copy.copy(self)
        bare._modules = {**self._modules, self.left_out: nn.Identity()}
        return Mythos.think(bare, tokens, n_passes)


class NoPrelude(Without):
    left_out = "prelude"


class NoPreludeNorm(Without):
    left_out = "prelude_norm"


class NoEmbeddingNorm(Without):
    left_out = "embedding_norm"


class ZeroIsNotGiven(Mythos):
    def think(self, tokens, n_passes=None):
        return super().think(tokens, n_passes or self.config.n_passes)


class NeverTies(Mythos):
    def __init__(self, config):
        super().__init__(config)
        self.head.weight = nn.Parameter(self.head.weight.detach().clone())


class AlwaysTies(Mythos):
    def __init__(self, config):
        super().__init__(config)
        self.head.weight = self.embedding.weight


class OneCoreBlock(Mythos):
    def __init__(self, config):
        super().__init__(replace(config, n_core=1))


class ForgetsTheta(Mythos):
    def __init__(self, config):
        super().__init__(replace(config, rope_theta=10000.0))


class SeesAhead(Mythos):
    def __init__(self, config):
        super().__init__(config)
        for part in self.modules():
            if hasattr(part, "causal"):
                part.causal = False


class AnyLength(Mythos):
    def think(self, tokens, n_passes=None):
        return self.core(
            self.prelude_norm(self.prelude(self.embedding_norm(self.embedding(tokens)))),
            self.config.n_passes if n_passes is None else n_passes,
        )


def counts_passes(config):
    return count_parameters(replace(config, n_core=config.n_core * config.n_passes))


def forgets_norms(config):
    n_blocks = config.n_prelude + config.n_core + config.n_coda
    return count_parameters(config) - (2 * n_blocks + 4) * config.dim


def forgets_outer_norms(config):
    return count_parameters(config) - 4 * config.dim


def two_matrices(config):
    n_blocks = config.n_prelude + config.n_core + config.n_coda
    return count_parameters(config) - n_blocks * config.dim * config.hidden_dim


def always_tied(config):
    return count_parameters(replace(config, tie_embeddings=True))


def multiplies(logits, *, temperature=1.0, top_k=None, generator=None):
    return sample(
        logits,
        temperature=1 / temperature if temperature > 0 else temperature,
        top_k=top_k,
        generator=generator,
    )


def ignores_temperature(logits, *, temperature=1.0, top_k=None, generator=None):
    return sample(logits, temperature=min(1.0, abs(temperature) * 1e9), top_k=top_k, generator=generator)


def ignores_top_k(logits, *, temperature=1.0, top_k=None, generator=None):
    return sample(logits, temperature=temperature, generator=generator)


def ignores_the_generator(logits, *, temperature=1.0, top_k=None, generator=None):
    return sample(logits, temperature=temperature, top_k=top_k)


def always_the_likeliest(logits, *, temperature=1.0, top_k=None, generator=None):
    return int(logits.argmax())


def masks_with_zero(logits, *, temperature=1.0, top_k=None, generator=None):
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, len(logits))).values[-1], 0.0)
    return sample(logits, temperature=temperature, generator=generator)


def divides_by_zero(logits, *, temperature=1.0, top_k=None, generator=None):
    chances = (logits / max(temperature, 1e-9)).softmax(0)
    return int(torch.multinomial(chances, 1, generator=generator))


MISTAKES = [
    ("Mythos", IgnoresPasses, "n_passes has no effect"),
    ("Mythos", ReadsTheFirstPass, "after the first pass"),
    ("Mythos", AveragesThePasses, "average"),
    ("Mythos", NoCoda, "coda is left out"),
    ("Mythos", NoLastNorm, "last norm is left out"),
    ("Mythos", NoPrelude, "prelude is left out"),
    ("Mythos", NoPreludeNorm, "prelude_norm comes before the loop"),
    ("Mythos", NoEmbeddingNorm, "Embeddings are not normed"),
    ("Mythos", ZeroIsNotGiven, "is None"),
    ("Mythos", NeverTies, "should share one weight"),
    ("Mythos", AlwaysTies, "yours share one"),
    ("Mythos", OneCoreBlock, "core are missing or of another number"),
    ("Mythos", ForgetsTheta, "rope_theta has no effect"),
    ("Mythos", SeesAhead, "causal=True"),
    ("Mythos", AnyLength, "7 tokens in a context of 6"),
    ("count_parameters", counts_passes, "passes cost no weights"),
    ("count_parameters", forgets_norms, "two in every block, and four around them"),
    ("count_parameters", forgets_outer_norms, "four norms outside"),
    ("count_parameters", two_matrices, "three matrices"),
    ("count_parameters", always_tied, "two matrices of tokens"),
    ("sample", multiplies, "divide by it"),
    ("sample", ignores_temperature, "temperature has no effect"),
    ("sample", ignores_top_k, "top_k has no effect"),
    ("sample", ignores_the_generator, "hand the generator"),
    ("sample", always_the_likeliest, "always take the most likely"),
    ("sample", masks_with_zero, "use minus infinity"),
    ("sample", divides_by_zero, "top_k has no effect"),
]

test_check_names_the_cause, test_check_accepts_the_finished_code = mistakes_are_named(
    MISTAKES, [Mythos, count_parameters, sample]
)
