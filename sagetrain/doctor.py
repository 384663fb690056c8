"""`python -m sagetrain.doctor`: what will run here, on which kernel, with which versions, and why not a faster one.

Exit code 0 when INT8 attention runs on the device that training would choose, 1 otherwise. The kernel is not only named
but called, forward and backward, and held against PyTorch's attention.
"""

import ctypes.util
import platform
import sys

import torch
from rich.table import Table
from rich.text import Text

from sagetrain.terminal import console, print_anything

# From the fastest down: what a CPU must have, and what the kernel is called with it (csrc/cpu).
CPU_LEVELS = ("avx512_vnni", "avx2")
CPU_FLAGS = {*CPU_LEVELS, "avx_vnni", "avx512f", "avx512bw", "avx512_bf16", "amx_int8", "amx_bf16"}


def cpu_facts() -> tuple[str, set[str]]:
    """Name of the processor, and which of the instruction sets that matter here it has."""
    name, flags = platform.processor() or platform.machine(), set()
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line.partition(":") for line in file]
    except OSError:  # not Linux
        return name, flags
    for key, _, value in lines:
        if key.strip() == "model name":
            name = value.strip()
        if key.strip() == "flags":
            flags = set(value.split())
    return name, flags & CPU_FLAGS


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


def main() -> int:
    """Print the table; 0 when INT8 attention runs here."""
    print_anything()
    table = Table(show_header=False, title="SageTrain doctor", title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    name, flags = cpu_facts()
    known = ", ".join(sorted(flags)) or "no known extensions"
    table.add_row("CPU", f"{name}, {torch.get_num_threads()} threads: {known}")
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        table.add_row(f"GPU {i}", f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}")
    if not torch.cuda.device_count():
        table.add_row("GPU", "none" if torch.backends.cuda.is_built() else "none (CPU build of torch)")
    device, works = torch.device("cuda" if torch.cuda.is_available() else "cpu"), False
    try:
        import sagetrain
        from sagetrain.attention import bf16
        from sagetrain.paths import CONF_DIR, recipes
        from sagetrain.training.train import quick_bf16, versions

        table.add_row("extension", sagetrain._C.__file__)
        table.add_row("configuration", f"{CONF_DIR} ({len(recipes())} recipes)")
        table.add_row("versions", ", ".join(f"{k} {v or 'missing'}" for k, v in versions().items()))
        kernel = sagetrain.kernel_name(device)
        error = trial(device)
        works = error < 0.1  # INT8 rounding costs a few percent; a broken kernel costs everything
        table.add_row("INT8 attention", f"{kernel} on {device}; {error:.1%} from SDPA, forward and backward together")
        table.add_row("why not faster", why_not_faster(kernel, device, flags) or "this is the fastest kernel there is")
        table.add_row("BF16 attention", bf16.report(device))
        table.add_row("precision", "bf16-mixed" if quick_bf16(device) else "32-true (bf16 is slow on this CPU)")
    except (ImportError, RuntimeError) as problem:
        table.add_row(Text("does not run", "red"), " ".join(str(problem).split()))
    verdict = Text("INT8 attention runs here", "green") if works else Text("INT8 attention does not run here", "red")
    table.add_row("verdict", verdict.append("" if works else "; attention=bf16 trains without it", "default"))
    console().print(table)
    return 0 if works else 1


if __name__ == "__main__":
    sys.exit(main())
