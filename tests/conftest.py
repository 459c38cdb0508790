"""While tests run, check the shapes written in signatures; say in the log which torch runs them."""

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

import tests.shapes
from mythoslab.classroom.course import notebooks, topic_of

pytest.register_assert_rewrite("tests.mistakes")
torch.set_num_threads(1)
settings.register_profile("any machine", settings(), deadline=None)  # how long an example takes is not what is tested
settings.load_profile("any machine")
modules = [f"mythoslab.{topic_of(path)}" for path in notebooks()]
install_import_hook(modules, f"{tests.shapes.__name__}.checked")


def pytest_report_header():
    build = "CPU build"
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    return f"torch {torch.__version__}, {build}"
