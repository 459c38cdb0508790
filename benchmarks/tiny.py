"""How fast `tiny` trains, beside an unrolled model of equal compute, and beside what the machine can do.

The two models take turns, so that whatever else the machine does slows both; the medians are compared.
"""

import statistics

import torch

from mythoslab.model import Mythos, count_parameters, flops_per_token, preset
from mythoslab.training import TRAINING, choose_device, optimisers, text_loss, training_step

from .clock import in_turn

ROUNDS = 15
SIDE = 1024


def main() -> None:
    device = choose_device()
    if device.type == "cpu":
        torch.set_num_threads(1)
    shape, plan = preset("tiny"), TRAINING["tiny"]
    contenders = {"looped": shape, "unrolled": shape.unrolled()}
    n_tokens = plan.batch_size * shape.context_length
    inputs, targets = torch.randint(
        shape.vocab_size, (2, plan.batch_size, shape.context_length), device=device
    )
    factors = torch.randn(2, SIDE, SIDE, device=device)
    if device.type == "cuda":
        factors = factors.bfloat16()  # as the training step does

    def product():
        factors[0] @ factors[1]

    def step_of(config):
        torch.manual_seed(0)
        model = Mythos(config).to(device)
        both = optimisers(model, plan)
        return lambda: training_step(model, [lambda: text_loss(model, inputs, targets)], both)

    tasks = {**{name: step_of(config) for name, config in contenders.items()}, "matrix product": product}
    seconds = in_turn(tasks, ROUNDS)
    median = {name: statistics.median(times) for name, times in seconds.items()}

    work = {name: 3 * n_tokens * flops_per_token(config) for name, config in contenders.items()}
    work["matrix product"] = 2 * SIDE**3
    peak = work["matrix product"] / median["matrix product"]
    print(f"a training step of tiny on {device.type}, {n_tokens:,} tokens, median of {ROUNDS} in turn")
    print(f"{'':16}{'weights':>12}{'tokens/s':>12}{'GFLOP/s':>12}{'of the peak':>14}")
    for name, config in contenders.items():
        rate = work[name] / median[name]
        print(
            f"{name:16}{count_parameters(config):12,}{n_tokens / median[name]:12,.0f}"
            f"{rate / 1e9:12,.1f}{rate / peak:14.0%}"
        )
    print(f"{'matrix product':16}{'':24}{peak / 1e9:12,.1f}{1:14.0%}   {SIDE} × {SIDE}")
    ratios = [unrolled / looped for looped, unrolled in zip(seconds["looped"], seconds["unrolled"])]
    print(
        f"looped is {statistics.median(ratios):.2f} times as fast as unrolled"
        f" (middle half of the rounds: {_quartile(ratios, 0):.2f} to {_quartile(ratios, 2):.2f})"
    )


def _quartile(values, index) -> float:
    return statistics.quantiles(values, n=4)[index]
