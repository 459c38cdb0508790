"""A look at the machine: what is there, what is wrong, and how to mend it."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import tempfile
from pathlib import Path

from .course import shown, workbooks

__all__ = ["doctor", "mps_problem"]


def doctor() -> bool:
    """Print one line for each thing the course needs.

    Returns:
        Whether everything is well.
    """
    findings = [
        _python(),
        *_torch(),
        _course_extra(),
        _widgets(),
        _writable(workbooks()),
        _writable(Path("runs").absolute()),  # where `mythoslab train` writes
    ]
    for what, is_, remedy in findings:
        print(f"{'wrong' if remedy else 'ok':<6} {what:<10} {is_}{f' – {remedy}' if remedy else ''}")
    return not any(remedy for _, _, remedy in findings)


def _python():
    old = sys.version_info < (3, 10)
    return (
        "Python",
        platform.python_version(),
        "install Python 3.10 or newer, then run make lab again" if old else "",
    )


def _torch():
    try:
        import torch
    except (ImportError, OSError) as error:
        return [("torch", f"cannot be imported ({error})", "run make lab, or pip install -e '.[course]'")]
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    build = next(
        (f"{name} {of}" for name, of in (("CUDA", torch.version.cuda), ("ROCm", torch.version.hip)) if of),
        "CPU",
    )
    idle = torch.version.cuda and not cuda and Path("/dev/nvidia0").exists()
    findings = [
        ("torch", f"{torch.__version__}, {build} build", ""),
        (
            "device",
            torch.cuda.get_device_name() if cuda else "MPS" if mps else "CPU",
            "torch cannot use the GPU of this machine: update its driver" if idle else "",
        ),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores", ""),
    ]
    if mps:
        problem = mps_problem()
        remedy = "use the CPU, or update torch and macOS" if problem else ""
        findings.append(("MPS", problem or "agrees with the CPU", remedy))
    return findings


def mps_problem() -> str:
    """What is wrong with the numbers of Apple's MPS device; empty where they agree with the CPU's.

    A linear layer, causal attention, a softmax and a gradient are computed on both, because MPS has been seen
    to give wrong results without an error.
    """
    import torch
    from torch.nn import functional as F

    def compute(device):
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(2, 4, 64, 32, generator=generator).to(device) for _ in range(3))
        weight = torch.randn(32, 32, generator=generator).to(device).requires_grad_()
        mixed = F.scaled_dot_product_attention(F.linear(query, weight), key, value, is_causal=True)
        loss = mixed.softmax(-1).square().sum()
        loss.backward()
        return mixed.detach().cpu(), weight.grad.cpu()

    try:
        pairs = zip(compute("mps"), compute("cpu"))
        agree = all(torch.allclose(mps, cpu, rtol=1e-3, atol=1e-4) for mps, cpu in pairs)
    except (RuntimeError, NotImplementedError) as error:
        return f"it fails ({str(error).splitlines()[0]})"
    return "" if agree else "its numbers differ from the CPU's"


def _course_extra():
    missing = [name for name in ("jupyterlab", "nbdev") if importlib.util.find_spec(name) is None]
    if missing:
        return (
            "notebooks",
            f"{' and '.join(missing)} not installed",
            "run make lab, or pip install -e '.[course]'",
        )
    return "notebooks", "jupyterlab and nbdev are installed", ""


def _widgets():
    if importlib.util.find_spec("ipywidgets") is None:
        return "widgets", "ipywidgets is not installed", "run make lab, or pip install ipywidgets"
    extension = Path(
        sys.prefix, "share", "jupyter", "labextensions", "@jupyter-widgets", "jupyterlab-manager"
    )
    if not extension.is_dir():
        return (
            "widgets",
            "JupyterLab lacks their extension",
            "pip install --force-reinstall jupyterlab-widgets",
        )
    return "widgets", "ipywidgets and its JupyterLab extension are installed", ""


def _writable(folder: Path):
    existing = next(parent for parent in (folder, *folder.parents) if os.path.exists(parent))
    try:
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        problem = f"{shown(folder)} cannot be written ({error.strerror})"
        return folder.name, problem, f"make {existing} a writable folder"
    return folder.name, f"{shown(folder)} can be written", ""
