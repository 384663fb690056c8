"""From the checkout to an sdist, from that to a wheel, from that to a clean environment, used from another directory.

Everything is built in a copy: the checkout stays as it is, and nothing that lies about in it can help.
"""

import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.tiny import ARMS

CHECKOUT = Path(__file__).resolve().parents[1]
JUNK = (".*", "build", "dist", "outputs", "multirun", "wandb", "*.egg-info", "__pycache__", "*.so")
PATHS = {"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}

if not (CHECKOUT / "setup.py").exists():
    pytest.skip("needs the sources of the package", allow_module_level=True)


def call(*command: str | Path, cwd: Path, **env: str) -> str:
    """Run a command that has to succeed; what it wrote to both streams."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=cwd, env=os.environ | PATHS | env, text=True, **streams)
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}"
    return done.stdout


def copy(where: Path) -> Path:
    """A copy of the sources as a clone has them."""
    shutil.copytree(CHECKOUT, where, ignore=shutil.ignore_patterns(*JUNK))
    return where


def pip_wheel(source: Path, out: Path, **env: str) -> str:
    options = ["--no-cache-dir", "--no-index", "--no-deps", "--no-build-isolation"]
    return call(sys.executable, "-m", "pip", "wheel", "-v", *options, "-w", out, source, cwd=out, **env)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = copy(tmp_path_factory.mktemp("sdist") / "sagetrain")
    call(sys.executable, "-c", "from setuptools.build_meta import build_sdist as b; b('..')", cwd=tree)
    (archive,) = tree.parent.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> tuple[Path, str]:
    """The wheel built from the sdist without CUDA, and what the build said.

    Its compiler does not optimise, which takes three times as long: what the kernels compute is for other tests.
    """
    quick = sdist.parent / "c++"
    quick.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    quick.chmod(0o755)
    said = pip_wheel(sdist, sdist.parent, SAGETRAIN_CUDA="0", CC=str(quick), CXX=str(quick))
    (path,) = sdist.parent.glob("*.whl")
    return path, said


@pytest.fixture(scope="module")
def installed(wheel: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Python of a clean environment with the wheel in it, and its site-packages.

    It sees the packages of the environment that runs the tests, but not an editable sagetrain among them.
    """
    root = tmp_path_factory.mktemp("installed")
    venv.create(root / "venv", with_pip=False, symlinks=True)
    python = root / "venv" / "bin" / "python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel[0], cwd=root)
    (packages,) = (root / "venv" / "lib").glob("python*/site-packages")
    (packages / "outer.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python, packages


def requirements(name: str) -> set[str]:
    """The installed distributions that `name` needs, itself among them, without extras."""
    found, open_ones = set(), [name]
    while open_ones:
        if (name := canonicalize_name(open_ones.pop())) not in found:
            try:
                lines = metadata.requires(name) or []
            except metadata.PackageNotFoundError:  # for another system
                continue
            found.add(name)
            needed = (Requirement(line) for line in lines)
            open_ones += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def torch_alone(wheel: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the wheel, torch, what torch needs, and nothing else."""
    root = tmp_path_factory.mktemp("alone")
    venv.create(root / "venv", with_pip=False, symlinks=True)
    python = root / "venv" / "bin" / "python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel[0], cwd=root)
    (packages,) = (root / "venv" / "lib").glob("python*/site-packages")
    for name in requirements("torch"):
        files = metadata.distribution(name).files
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            source = metadata.distribution(name).locate_file(top)
            if not (packages / top).exists():
                (packages / top).symlink_to(source)
    return python


def test_torch_is_the_only_dependency(wheel: tuple[Path, str]) -> None:
    with zipfile.ZipFile(wheel[0]) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    needed = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert needed == ["Requires-Dist: torch>=2.10"]
    extras = {line.split(": ")[1] for line in lines if line.startswith("Provides-Extra:")}
    assert {"hf", "train", "deepspeed", "eval", "dev"} <= extras


ALONE = """
import sys, time, torch
begin = time.process_time()
import sagetrain
took = time.process_time() - begin
q, k, v = (torch.randn(1, 2, 65, 64, requires_grad=True) for _ in range(3))
loss = sagetrain.attention(q, k, v, is_causal=True).square().sum()
loss.backward()
before = loss.item()
with torch.no_grad():
    for x in (q, k, v):
        x -= 0.1 * x.grad
assert sagetrain.attention(q, k, v, is_causal=True).square().sum() < 0.9 * before
import sagetrain.ops.reference, sagetrain.ops.schemes
for absent in ("transformers", "lightning", "hydra", "datasets"):
    try:
        __import__(absent)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{absent} is here: nothing is tested")
assert took < 0.3, took
print("trained")
"""


def test_a_training_step_with_torch_alone(torch_alone: Path, tmp_path: Path) -> None:
    assert "trained" in call(torch_alone, "-c", ALONE, cwd=tmp_path)


AS_MODULES = """
import contextlib, importlib, io, json, runpy, sys
commands, imported = {}, {}
for command in ("sagetrain", "sagetrain.export x y", "sagetrain.doctor"):
    name, *sys.argv[1:] = command.split()
    code, streams = 0, (io.StringIO(), io.StringIO())
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code
    commands[name] = code, *(stream.getvalue() for stream in streams)
for name in ("sagetrain.__main__", "sagetrain.compare", "sagetrain.export"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        imported[name] = f"{error} {error.name}"
print(json.dumps([commands, imported]))
"""


def test_commands_with_torch_alone_say_what_to_install(torch_alone: Path, tmp_path: Path) -> None:
    """Each as `python -m` runs it; all but one, which asks how it was called, one after the other in one process."""
    compare = [torch_alone, "-m", "sagetrain.compare", "x"]
    done = subprocess.run(compare, cwd=tmp_path, env=os.environ | PATHS, capture_output=True, text=True)
    said = call(torch_alone, "-c", AS_MODULES, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    commands, imported = json.loads(said.splitlines()[-1])
    doctor = commands.pop("sagetrain.doctor")
    assert len(commands) == 2 and len(imported) == 3
    for code, _, errors in (*commands.values(), (done.returncode, done.stdout, done.stderr)):
        assert code == 2 and "Traceback" not in errors, errors
        assert re.search(r"error: no package \w+: pip install 'sagetrain\[train\]'", errors)
    for error in imported.values():  # which ends no program by itself
        assert re.fullmatch(r"no package (\w+): pip install 'sagetrain\[train\]' \1", error)
    assert doctor[0] == 0 and "INT8 attention runs here" in doctor[1] and "pip install 'sagetrain[hf]'" in doctor[1]


def test_sdist_has_all_that_is_needed_to_build_and_test(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    folders = ("sagetrain", "csrc", "conf", "recipes", "tests")
    tree = copy(sdist.parent / "again")
    wanted = {str(p.relative_to(tree)) for folder in folders for p in (tree / folder).glob("**/*") if p.is_file()}
    assert wanted | {"setup.py", "pyproject.toml", "Makefile", "constraints.txt", "README.md", "LICENSE"} <= names


def test_wheel_is_one_for_every_python_and_holds_the_package_only(wheel: tuple[Path, str]) -> None:
    path, _ = wheel
    assert re.fullmatch(r"sagetrain-[\d.]+-cp311-abi3-linux_\w+\.whl", path.name)
    names = {name for name in zipfile.ZipFile(path).namelist() if ".dist-info/" not in name}
    sources = [p for p in (CHECKOUT / "sagetrain").glob("**/*") if p.is_file() and p.suffix in (".py", ".html", ".js")]
    yaml = [p for folder in ("conf", "recipes") for p in (CHECKOUT / folder).glob("**/*.yaml")]
    expected = {str(p.relative_to(CHECKOUT)) for p in sources} | {f"sagetrain/{p.relative_to(CHECKOUT)}" for p in yaml}
    assert names == expected | {"sagetrain/_C.abi3.so"}
    licences = [name for name in zipfile.ZipFile(path).namelist() if name.endswith("LICENSE")]
    assert len(licences) == 1


def test_quickstart_runs_on_what_the_makefile_installs_for_it(tmp_path: Path) -> None:
    """`make quickstart` comes before the packages of the tests: here these are not to be found."""
    (listed,) = re.findall(r"^TEST_NEEDS := (.*)", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
    hidden = [name.removeprefix("pytest-") for name in listed.split()]
    hidden.remove("matplotlib")  # torchmetrics imports it where its metadata are, and these cannot be hidden
    hidden[hidden.index("wandb-workspaces")] = "wandb_workspaces"
    assert {"wandb", "deepspeed", "xdist"} <= set(hidden)
    once = [f"out={tmp_path}", "trainer.max_steps=1", "compare.seeds=1"]
    program = (
        f"import sys; sys.modules |= dict.fromkeys({hidden}); from sagetrain.__main__ import compose\n"
        f"from sagetrain.training.train import run; run(compose({[*ARMS, *once]}))"
    )
    call(sys.executable, "-c", program, cwd=CHECKOUT, PYTHONPATH=str(CHECKOUT))
    assert (tmp_path / "report.html").exists()


def test_build_without_cuda_says_so(wheel: tuple[Path, str]) -> None:
    assert re.search(r"sagetrain: CPU kernel; CUDA kernels: none \(.*SAGETRAIN_CUDA=0\)", wheel[1])


def test_extension_uses_stable_interfaces_only(installed: tuple[Path, Path]) -> None:
    library = installed[1] / "sagetrain" / "_C.abi3.so"
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", call("readelf", "-d", library, cwd=library.parent))
    assert "libtorch.so" in needed
    assert not [name for name in needed if re.search("python|cud|c10", name)]
    symbols = re.findall(r" U (.+)", call("nm", "-DC", "--undefined-only", library, cwd=library.parent))
    assert [s for s in symbols if "aoti_torch" in s]  # torch's C interface
    assert not [s for s in symbols if re.search(r"\b(at|c10|torch)::", s)], "these change with torch"
    assert not [s for s in symbols if s.startswith("_Py")], "these change with Python"


USE = """
import contextlib, io, json, runpy, sys, torch, sagetrain
from sagetrain.__main__ import compose
from sagetrain.paths import recipes
q, k, v = (torch.randn(1, 2, 40, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
sagetrain.attention(q, k, v, is_causal=True).float().square().sum().backward()
def ran(module, *arguments):
    sys.argv[1:] = arguments
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try: runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end: assert not end.code, end.code
    return said.getvalue()
print(json.dumps({
    "file": sagetrain.__file__, "extension": sagetrain._C.__file__, "kernel": sagetrain.kernel_name("cpu"),
    "gradients": [float(x.grad.float().norm()) for x in (q, k, v)],
    "recipes": {name: compose([f"recipe={name}"]).recipe for name in recipes()},
    "help": ran("sagetrain", "--help"), "doctor": ran("sagetrain.doctor"),
}))
"""


@pytest.fixture(scope="module")
def used(installed: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the installed package says of itself from another directory, its commands as `python -m` runs them."""
    folder = tmp_path_factory.mktemp("elsewhere")
    said = call(installed[0], "-c", USE, cwd=folder, CUDA_VISIBLE_DEVICES="")
    assert not list(folder.iterdir())
    return json.loads(said.splitlines()[-1])


def test_wheel_works_from_another_directory(installed: tuple[Path, Path], used: dict[str, Any]) -> None:
    packages = installed[1]
    assert Path(used["file"]).parent == Path(used["extension"]).parent == packages / "sagetrain"
    assert used["kernel"].startswith("cpu/")
    assert all(norm > 0 for norm in used["gradients"])
    assert list(used["recipes"]) == sorted(p.stem for p in (CHECKOUT / "recipes").glob("*.yaml"))
    assert all(name == composed for name, composed in used["recipes"].items())


def test_wheel_brings_the_command_line(used: dict[str, Any]) -> None:
    assert all(p.stem in used["help"] for p in (CHECKOUT / "recipes").glob("*.yaml"))


def test_wheel_brings_the_doctor(installed: tuple[Path, Path], used: dict[str, Any]) -> None:
    said = used["doctor"]
    assert str(installed[1] / "sagetrain") in said and "cpu/" in said and "CUDA" in said


# The kernels of the main loops, which must never spill; the others run once per token, and may for the newest GPUs.
TYPES = [f"{dtype}, {head_dim}" for dtype in ("__nv_bfloat16", "__half") for head_dim in (64, 128)]
FORWARD = {f"forward_kernel<{types}>" for types in TYPES}
MAIN = FORWARD | {f"dq_kernel<{types}>" for types in TYPES}
MAIN |= {f"dkv_kernel<{types}, {fused}>" for types in TYPES for fused in ("true", "false")}
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
HOPPER = FORWARD | {f"backward_kernel<{types}>" for types in TYPES}
COMPILED = {(kernel, arch) for kernel in MAIN for arch in ARCHITECTURES} | {(kernel, "sm_90a") for kernel in HOPPER}


@pytest.fixture(scope="module")
def cuda_build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A tree with the extension built in place, CUDA included; and what ptxas said of its kernels.

    That is the checkout where it was built from the sources as they are now (`make` does), else a copy built here.
    """
    report, built = CHECKOUT / "build" / "ptxas.txt", CHECKOUT / "sagetrain" / "_C.abi3.so"
    changed = max(p.stat().st_mtime for p in (CHECKOUT / "setup.py", *(CHECKOUT / "csrc").glob("**/*.*")))
    if report.exists() and built.exists() and changed < report.stat().st_mtime <= built.stat().st_mtime:
        return CHECKOUT, report.read_text()
    nvcc = shutil.which("nvcc") or {"CUDA_HOME", "CUDA_PATH", "NVCC"} & os.environ.keys()
    if not nvcc or os.environ.get("SAGETRAIN_CUDA") == "0":
        pytest.skip("no nvcc here, or SAGETRAIN_CUDA=0")
    tree = copy(tmp_path_factory.mktemp("cuda") / "sagetrain")
    return tree, call(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, SAGETRAIN_CUDA="1")


def test_cuda_kernels_are_built_for_their_architectures_and_do_not_spill(cuda_build: tuple[Path, str]) -> None:
    report = subprocess.run("c++filt", input=cuda_build[1], stdout=subprocess.PIPE, text=True, check=True).stdout
    spills = {}  # (kernel, architecture) -> bytes stored, bytes loaded
    for said in report.split("Compiling entry function ")[1:]:
        name, arch = re.match(r"'.*?(\w+(?:<.*?>)?)\(.*' for '(\w+)'", said).groups()
        stores, loads = (sum(map(int, re.findall(rf"(\d+) bytes spill {kind}", said))) for kind in ("stores", "loads"))
        spills[name, arch] = stores, loads
    missing = COMPILED - spills.keys()
    assert not missing, f"not compiled, or not reported by ptxas: {sorted(missing)}"
    wrong = [
        f"{name} for {arch} spills: {stores} bytes of stores, {loads} of loads"
        for (name, arch), (stores, loads) in spills.items()
        if stores + loads and (name in MAIN | HOPPER or arch != "sm_120")
    ]
    assert not wrong, "\n".join(wrong)


def test_no_kernel_folder_includes_another() -> None:
    """What two of them need is in csrc/common."""
    csrc = CHECKOUT / "csrc"
    reaches = []
    for path in csrc.glob("*/*"):
        included = [(path.parent / name).resolve() for name in re.findall(r'#include "(.+)"', path.read_text())]
        allowed = {csrc, csrc / "common", path.parent}
        reaches += [f"{path.relative_to(csrc)}: {other}" for other in included if other.parent not in allowed]
    assert not reaches, "\n".join(reaches)


def test_every_cuda_kernel_waits_for_the_one_before_it() -> None:
    """A kernel without after_previous() reads what its predecessor still writes: now and then, on newer GPUs only."""
    sources = {path: path.read_text() for path in (CHECKOUT / "csrc").glob("**/*.cu*")}
    bodies = [(path, body) for path, text in sources.items() for body in re.split(r"__global__ [^{]*\{", text)[1:]]
    assert bodies
    late = [f"{path.name}: {body[:80]!r}" for path, body in bodies if not body.lstrip().startswith("after_previous();")]
    assert not late
    assert not [path.name for path, text in sources.items() if "<<<" in text], "launch with launch_kernel"


TRY_CUDA = """
import os, torch, sagetrain
x = torch.randn(1, 1, 8, 8, requires_grad=True)
o = sagetrain.attention(x, x, x)
os.environ["SAGETRAIN_CPU_ISA"] = "none"
for refused in (lambda: sagetrain.attention(x, x, x), o.sum().backward):
    try: refused()
    except RuntimeError as error: assert "SAGETRAIN_CPU_ISA must be" in str(error), error
    else: raise AssertionError("an error of the kernel was lost")
if torch.cuda.is_available(): assert sagetrain.kernel_name("cuda").startswith("sm")
else:
    try: name = torch.ops.sagetrain.kernel_name(0)  # there may be a GPU that only this torch is not for
    except RuntimeError as error: name = str(error)
    assert name.startswith("sm") or "no INT8 attention kernel in this build for compute capability" in name, name
"""


def test_build_with_cuda_runs_beside_any_torch(cuda_build: tuple[Path, str]) -> None:
    tree, _ = cuda_build
    call(sys.executable, "-c", TRY_CUDA, cwd=tree)
