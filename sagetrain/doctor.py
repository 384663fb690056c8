"""`python -m sagetrain.doctor`: what will run here, on which kernel, with which versions, and why not a faster one.

Exit code 0 when INT8 attention runs on the device that training would choose, 1 otherwise. The kernel is not only named
but called, forward and backward, and held against PyTorch's attention.
"""

import argparse
import ctypes.util
import platform
import re
import shutil
import sys
import textwrap
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from sagetrain.terminal import print_anything

PACKAGES = ("torch", "transformers", "peft", "lightning", "deepspeed", "datasets", "lm-eval", "hydra-core")
# From the fastest down: what a CPU must have, and what the kernel is called with it (csrc/cpu).
CPU_LEVELS = ("avx512_vnni", "avx2")
CPU_FLAGS = {*CPU_LEVELS, "avx_vnni", "avx512f", "avx512bw", "avx512_bf16", "amx_int8", "amx_bf16"}


def cpu_facts() -> tuple[str, set[str]]:
    """Name of the processor, and which of the instruction sets that matter here it has."""
    file = Path("/proc/cpuinfo")  # Linux alone has it
    text = file.read_text() if file.exists() else ""
    name, flags = (re.search(rf"^{key}\s*: (.*)", text, re.MULTILINE) for key in ("model name", "flags"))
    known = CPU_FLAGS & set(flags[1].split()) if flags else set()
    return name[1] if name else platform.processor() or platform.machine(), known


def trial(device: torch.device) -> float:
    """Run INT8 attention forward and backward; relative distance of output and gradients from PyTorch's attention."""
    import sagetrain

    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    q, k, v, d_o = (torch.randn(1, 2, 128, 64, generator=generator).to(device, dtype) for _ in range(4))
    results = []
    for attention in (sagetrain.attention, torch.nn.functional.scaled_dot_product_attention):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, is_causal=True)
        results.append(
            torch.cat([x.detach().flatten() for x in (out, *torch.autograd.grad(out, leaves, d_o))]).double()
        )
    return float((results[0] - results[1]).norm() / results[1].norm())


def why_not_faster(kernel: str, device: torch.device, flags: set[str]) -> str:
    """What keeps a faster kernel from running here, in one sentence ("" when this is the fastest we have)."""
    if device.type == "cuda":
        return ""
    if not torch.backends.cuda.is_built():
        gpu = "this torch is a CPU build, so no CUDA kernel can run"
    elif not torch.cuda.is_available():
        gpu = "torch sees no CUDA device" + ("" if ctypes.util.find_library("cuda") else " (no NVIDIA driver found)")
    else:
        gpu = "the extension was built without CUDA kernels for this GPU (see above)"
    missing = [level for level in CPU_LEVELS if level not in flags] if "avx512_vnni" not in kernel else []
    cpu = f"; this CPU has no {' and no '.join(missing)}" if missing else ""
    return gpu + cpu


def quick_bf16(where: torch.device) -> bool:
    """Whether bf16 matrix products are quicker than fp32 there: all GPUs we serve, CPUs with instructions for them."""
    if where.type == "cuda":
        return True
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # torch 2.12 and later
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def versions() -> dict[str, str]:
    """Installed version of each package that matters here ("" when absent)."""
    import sagetrain

    found = {"python": platform.python_version(), "sagetrain": sagetrain.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def bf16_report(device: torch.device) -> str:
    """What `attention=bf16` stands for here, and what a faster one lacks."""
    try:
        from sagetrain.integrations import bf16
    except ModuleNotFoundError as error:
        return f"no package {error.name}: pip install 'sagetrain[hf]'"
    return bf16.report(device)


def findings() -> tuple[list[tuple[str, str]], bool]:
    """Rows (what, how it stands), and whether INT8 attention runs here."""
    name, flags = cpu_facts()
    known = ", ".join(sorted(flags)) or "no known extensions"
    rows = [("CPU", f"{name}, {torch.get_num_threads()} threads: {known}")]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        rows.append((f"GPU {i}", f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"))
    if not torch.cuda.device_count():
        rows.append(("GPU", "none" if torch.backends.cuda.is_built() else "none (CPU build of torch)"))
    device, works = torch.device("cuda" if torch.cuda.is_available() else "cpu"), False
    try:
        import sagetrain
        from sagetrain.paths import CONF_DIR, recipes

        rows.append(("extension", str(sagetrain._C.__file__)))
        rows.append(("configuration", f"{CONF_DIR} ({len(recipes())} recipes)"))
        rows.append(("versions", ", ".join(f"{k} {v or 'missing'}" for k, v in versions().items())))
        kernel = sagetrain.kernel_name(device)
        error = trial(device)
        works = error < 0.1  # INT8 rounding costs a few percent; a broken kernel costs everything
        rows.append(("INT8 attention", f"{kernel} on {device}; {error:.1%} from SDPA, forward and backward together"))
        rows.append(("why not faster", why_not_faster(kernel, device, flags) or "this is the fastest kernel there is"))
        rows.append(("BF16 attention", bf16_report(device)))
        rows.append(("precision", "bf16-mixed" if quick_bf16(device) else "32-true (bf16 is slow on this CPU)"))
    except (ImportError, RuntimeError) as problem:
        rows.append(("does not run", " ".join(str(problem).split())))
    verdict = "INT8 attention " + ("runs here" if works else "does not run here; attention=bf16 trains without it")
    return [*rows, ("verdict", verdict)], works


def main(arguments: list[str] | None = None) -> int:
    """Print what was found; 0 when INT8 attention runs here."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m sagetrain.doctor", description=__doc__.partition(": ")[2])
    parser.parse_args(arguments)  # there are none but --help
    rows, works = findings()
    width = shutil.get_terminal_size().columns
    print("SageTrain doctor")
    for what, how in rows:
        print(textwrap.fill(f"{what:<15} {how}", width, subsequent_indent=16 * " ", break_on_hyphens=False))
    return 0 if works else 1


if __name__ == "__main__":
    sys.exit(main())
