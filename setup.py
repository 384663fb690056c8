"""Builds one abi3 wheel: the CPU kernel always, CUDA kernels where nvcc is, each source for its own architecture.

Everything but csrc/bind.cpp is compiled without torch. The extension uses the LibTorch stable ABI (target 2.10) and
Python's limited API (3.11), so the same file loads beside any newer torch and Python. Static metadata: pyproject.toml.

Environment: SAGETRAIN_CUDA=0 leaves CUDA out, =1 fails when nvcc is missing; NVCC names the compiler.
"""

import logging
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

if (torch := find_spec("torch")) is None or torch.origin is None:
    sys.exit("sagetrain is built with the installed torch: install torch, then pip install --no-build-isolation .")
TORCH = Path(torch.origin).parent
CSRC = Path("csrc")
REPORT = Path("build/ptxas.txt")  # what nvcc said of this tree's kernels; tests/test_packaging.py reads it
CXX_FLAGS = ["-std=c++20", "-O3", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--use_fast_math", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
TORCH_FLAGS = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030b0000"]
# ptxas at -O3 moves so much of an unrolled loop ahead that it runs out of registers and spills; at -O1 it keeps the
# source's order, and the main loops fit (times of both: docs/LOG.md). finish.cu was timed with these flags, too.
SOURCE_FLAGS = dict.fromkeys((f"sm80/{name}.cu" for name in ("forward", "backward", "dq", "finish")), ["-Xptxas=-O1"])
# Folder of csrc -> the architectures its sources are compiled for; the newest also as PTX, for GPUs yet to come.
ARCHITECTURES = {
    "sm80": [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 86, 89, 90, 120)]
    + ["-gencode=arch=compute_120,code=compute_120"],
    "sm90": ["-gencode=arch=compute_90a,code=sm_90a"],
}


def find_nvcc() -> str | None:
    """Path of nvcc, or None when CUDA kernels are not to be built."""
    wish = os.environ.get("SAGETRAIN_CUDA")
    homes = [os.environ[k] + "/bin/nvcc" for k in ("CUDA_HOME", "CUDA_PATH") if k in os.environ]
    candidates = [os.environ.get("NVCC"), *homes, "nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next((found for c in candidates if c and (found := shutil.which(c))), None)
    if wish == "1" and nvcc is None:
        sys.exit("SAGETRAIN_CUDA=1 but no nvcc was found: put it on PATH, or set CUDA_HOME or NVCC")
    return None if wish == "0" else nvcc


def cuda_home(nvcc: str) -> Path:
    """Root of the toolkit, as nvcc itself sees it (nvcc on PATH may be a wrapper script)."""
    dry_run = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    plan = subprocess.run(dry_run, capture_output=True, text=True, check=True)
    return Path(next(line.split("=", 1)[1] for line in plan.stderr.splitlines() if line.startswith("#$ TOP=")))


def cuda_sources() -> dict[str, list[str]]:
    """CUDA sources by architecture folder, only folders that have any."""
    found = {arch: sorted(str(p) for p in (CSRC / arch).glob("**/*.cu")) for arch in ARCHITECTURES}
    return {arch: sources for arch, sources in found.items() if sources}


class Build(build_ext):
    """build_ext that hands .cu files to nvcc, each folder with its own architecture flags."""

    def build_extension(self, ext: Extension) -> None:
        sources, nvcc = cuda_sources(), find_nvcc()
        REPORT.unlink(missing_ok=True)
        self.force = True  # what comes out depends on nvcc and the environment too, not only on the age of files
        if nvcc and sources:
            ext.extra_objects += self.compile_cuda(nvcc, sources)
            ext.define_macros += [("SAGETRAIN_CUDA", None)] + [(f"SAGETRAIN_{arch.upper()}", None) for arch in sources]
            home = cuda_home(nvcc)
            ext.include_dirs.append(str(home / "include"))
            ext.library_dirs += [str(home / "lib64"), str(home / "lib")]
            ext.extra_link_args += ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        why = " (nvcc not found or SAGETRAIN_CUDA=0)" if not nvcc else "" if sources else " (no CUDA sources)"
        built = ", ".join(sources) if nvcc and sources else "none"
        self.announce(f"sagetrain: CPU kernel; CUDA kernels: {built}{why}", level=logging.WARNING)
        super().build_extension(ext)

    def compile_cuda(self, nvcc: str, sources: dict[str, list[str]]) -> list[str]:
        jobs = [(Path(source), arch) for arch, files in sources.items() for source in files]
        jobs.sort(key=lambda job: job[0].stat().st_size, reverse=True)  # the longest first

        def compile(job: tuple[Path, str]) -> tuple[str, str]:
            source, arch = job
            target = Path(self.build_temp, source).with_suffix(".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            flags = [*NVCC_FLAGS, *SOURCE_FLAGS.get(source.relative_to(CSRC).as_posix(), []), *ARCHITECTURES[arch]]
            command = [nvcc, *flags, f"-I{CSRC}", "-c", str(source), "-o", str(target)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            print(done.stdout, end="", flush=True)
            if done.returncode:
                sys.exit(f"nvcc failed on {source}")
            return str(target), done.stdout

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects, said = zip(*pool.map(compile, jobs), strict=True)
        REPORT.parent.mkdir(exist_ok=True)
        REPORT.write_text("".join(said))
        return list(objects)


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "cp311", "abi3", super().get_tag()[2]


MODULES = sorted(".".join(p.parent.parts) for p in Path("sagetrain").glob("**/__init__.py"))
YAML = ["sagetrain.recipes", "sagetrain.conf", *sorted(f"sagetrain.conf.{p.name}" for p in Path("conf").glob("*/"))]

setup(
    ext_modules=[
        Extension(
            "sagetrain._C",
            [str(CSRC / "bind.cpp"), *sorted(str(p) for p in (CSRC / "cpu").glob("*.cpp"))],
            include_dirs=[str(CSRC)],
            library_dirs=[str(TORCH / "lib")],
            extra_compile_args=CXX_FLAGS + TORCH_FLAGS + ["-isystem", str(TORCH / "include")],
            # libtorch holds the stream getter of a CUDA torch; keep it even where this link does not need it.
            extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed", "-ltorch_cpu", "-Wl,-s"],
            py_limited_api=True,
        )
    ],
    package_dir={"sagetrain.conf": "conf", "sagetrain.recipes": "recipes"},
    packages=[*MODULES, *YAML],
    package_data={"sagetrain.compare": ["page.*"], **{package: ["*.yaml"] for package in YAML}},
    cmdclass={"build_ext": Build, "bdist_wheel": Wheel},
)
