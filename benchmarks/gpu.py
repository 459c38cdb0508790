"""How fast the larger presets train on a GPU, and in how much memory: a line of JSON for each, as kept in ``data/gpu.jsonl``."""

import gc
import json
import time

import torch

from mythoslab.model import Mythos, preset
from mythoslab.training import TrainConfig, optimisers, text_loss, training_step

#: Preset, windows, last passes that gradients go through (None for all), and whether to compute in bfloat16.
CASES = [
    *[("small", *case) for case in ((1, None, False), (2, None, False), (2, 4, False))],
    *[("small", *case, True) for case in ((1, None), (2, None), (2, 4), (8, None), (8, 4), (16, 4), (32, 4))],
    *[("base", *case) for case in ((1, None, False), (1, 4, False), (2, 4, False), (2, 2, False))],
    *[("base", *case, True) for case in ((1, None), (1, 4), (2, 4), (2, 2), (4, 4), (8, 4))],
]
WARM_UP, ROUNDS = 2, 3


def training_on_gpu(name: str, batch_size: int, n_backward: int | None = None, half: bool = True) -> tuple[dict, list[float]]:
    """A few steps on text of no meaning: the most memory and the seconds of a step, and the losses."""
    config, losses = preset(name), []
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Mythos(config)
        tokens = torch.randint(config.vocab_size, (batch_size, config.context_length + 1))
    both = optimisers(model, TrainConfig())

    def loss():
        with torch.autocast("cuda", torch.bfloat16, enabled=half):  # within that of the step, which is always on
            return text_loss(model, tokens[:, :-1], tokens[:, 1:], n_backward=n_backward)

    for number in range(WARM_UP + ROUNDS):
        if number == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
            start = time.perf_counter()
        losses += training_step(model, [loss], both)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / ROUNDS
    about = dict(preset=name, batch_size=batch_size, n_backward=n_backward, dtype="bfloat16" if half else "float32")
    about |= dict(peak_bytes=torch.cuda.max_memory_allocated() - before, seconds=round(seconds, 3))
    return about | dict(device=torch.cuda.get_device_name(), torch=torch.__version__), losses


def main() -> None:
    for case in CASES:
        print(json.dumps(training_on_gpu(*case)[0]), flush=True)
