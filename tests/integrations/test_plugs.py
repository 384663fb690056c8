"""Names are registered by themselves, whichever of sagetrain and the library is imported first."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = {
    "transformers": "from transformers import AttentionInterface as A; assert 'sage_int8' in A().valid_keys()",
    "lightning.pytorch": "from lightning.pytorch.strategies import StrategyRegistry as R; assert 'sage_ddp' in R",
}


def python(program: str, *path: Path) -> subprocess.CompletedProcess[str]:
    import sagetrain

    paths = [str(Path(sagetrain.__file__).parents[1]), *map(str, path)]
    program = f"import sys; sys.path[:0] = {paths!r}\n{program}"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


@pytest.mark.parametrize("library", CHECKS)
@pytest.mark.parametrize("order", ["sagetrain first", "library first"])
def test_registered_in_any_order(library: str, order: str) -> None:
    imports = ["import sagetrain", f"import {library}"]
    done = python("\n".join([*(imports if order == "sagetrain first" else imports[::-1]), CHECKS[library]]))
    assert done.returncode == 0, done.stderr


def test_importing_sagetrain_imports_no_library() -> None:
    others = {"transformers", "lightning", "rich", "hydra"}
    done = python(f"import sagetrain, sys; assert not {others} & sys.modules.keys()")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_library_that_the_plug_does_not_fit_stays_usable(order: str, tmp_path: Path) -> None:
    (tmp_path / "library.py").write_text("value = 3")
    (tmp_path / "plug.py").write_text("from library import something_new")
    hook = "from sagetrain.integrations import after_import; after_import('library', 'plug')"
    first, second = (hook, "import library") if order == "before" else ("import library", hook)
    done = python(f"{first}\n{second}\nprint(library.value, library.__spec__.loader is library.__loader__)", tmp_path)
    assert done.stdout.strip() == "3 True", done.stderr
    assert "RuntimeWarning: plug does not load" in done.stderr and "something_new" in done.stderr


def test_a_library_that_is_broken_says_so_itself_and_can_be_mended(tmp_path: Path) -> None:
    (tmp_path / "library.py").write_text("import os\nif 'BROKEN' in os.environ: raise OSError('its own words')")
    (tmp_path / "plug.py").write_text("print('plugged')")
    hook = "import os, sagetrain.integrations\nsagetrain.integrations.after_import('library', 'plug')"
    again = "os.environ['BROKEN'] = ''\ntry: import library\nexcept OSError as e: print(e)\ndel os.environ['BROKEN']"
    done = python(f"{hook}\n{again}\nimport library", tmp_path)
    assert done.stdout.split("\n")[:2] == ["its own words", "plugged"], done.stderr
