"""`python -m sagetrain.evaluate MODEL --tasks gsm8k mmlu hellaswag drop`: scores by lm-evaluation-harness.

MODEL is a run directory or one of its checkpoints, a folder of Hugging Face's format, or a hub id. A run is evaluated
with its own attention, precision and chat template (and its adapters beside the weights, as they trained), another
model with sage_int8 and in the type of its weights (FP32 ones where the device is quick at BF16 under autocast), unless
told otherwise. Scores are printed and, of a run or with --out, written to eval.json, whose format
sagetrain/evaluation/scores.py describes. The same command goes on where it was killed.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from sagetrain.extras import needs
from sagetrain.terminal import console, print_anything

with needs("train", command=__name__ == "__main__"):
    import torch
    from omegaconf import DictConfig, OmegaConf
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from sagetrain.data import build_tokenizer
    from sagetrain.data.tasks import chats
    from sagetrain.doctor import quick_bf16
    from sagetrain.errors import asked_for, refused
    from sagetrain.evaluation import AUTOCAST, scores
    from sagetrain.evaluation.tasks import METRICS, build, check_tasks, find
    from sagetrain.integrations import bf16
    from sagetrain.paths import CONF_DIR, groups
    from sagetrain.training.export import load, run_of
with needs("eval", command=__name__ == "__main__"):
    from sagetrain.evaluation.harness import evaluate


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one line on stderr that says what is wrong."""
    print_anything()
    logging.disable_progress_bar()  # of transformers
    try:
        options = _options(arguments)
        found = evaluate_model(**vars(options))
    except Exception as error:
        return refused(error)
    console().print(scores.table(found))
    return 0


def evaluate_model(
    model: str,
    tasks: list[str],
    data: str | dict[str, str] | None = None,
    attention: str | None = None,
    limit: int | None = None,
    few_shot: int = 0,
    batch_size: int | str = 8,
    chat_template: bool | None = None,
    out: str | Path | None = None,
    device: str | None = None,
) -> scores.Scores:
    """The scores of a model by task, also written to eval.json of its run or of `out`. The arguments are those of the
    command; `data` is a folder, or a file or folder by task.

    Raises ValueError, OSError and their kin with one line that says what to do.
    """
    tasks = check_tasks(tasks, "--tasks")
    files = find(tasks, data, few_shot)
    run = run_of(model)
    cfg = OmegaConf.load(run / "config.yaml") if run else None
    arm = attention or (cfg.attention.name if cfg else "sage_int8")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"--device: {device!r} is none of cpu, cuda, cuda:1")
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: torch sees no CUDA device; python -m sagetrain.doctor says why")
    implementation = bf16.choose(_implementation(arm), where)
    if folder := Path(out).expanduser() if out else run:
        with asked_for(f"--out {folder}" if out else str(folder)):  # before the questions, not after
            held = scores.check(folder)
        if folder.absolute() != run and (others := _others(held, model)):
            raise ValueError(f"--out {folder} has scores of {others[0]}: choose another folder")
    built = {task: build(task, of, few_shot) for task, of in files.items()}
    network, step = load(model) if cfg else (_load(model), 0)
    tokenizer = build_tokenizer(cfg.model.tokenizer if cfg else model)
    if chat_template is None:
        chat_template = chats(tokenizer, cfg.data.get("chat_template") if cfg else False)
    network.to(where).set_attn_implementation(implementation)

    def keep(found: scores.Scores) -> None:
        for task, of in found.items():
            of |= {"model": model, "data": "hub" if files[task] is None else ", ".join(map(str, files[task].asked))}
        try:
            if folder:
                with asked_for(f"the scores are not written to {folder}, the answers are kept"):
                    scores.keep(folder, step, arm, found)
        except ValueError:
            console().print(scores.table(found))
            raise

    return evaluate(
        network,
        tokenizer,
        built,
        title=Path(model).name,
        batch_size=batch_size,
        limit=limit,
        chat_template=chat_template,
        dtype=_autocast(cfg, network, where),
        keep=keep,
    )


def _others(held: dict[str, dict[str, scores.Scores]], model: str) -> list[str]:
    """The models, as they were named, of scores that are not of `model`; a run's checkpoints are all of the run."""
    entries = (of for arms in held.values() for tasks in arms.values() for of in tasks.values())
    named = dict.fromkeys(of["model"] for of in entries if of.get("model"))
    return [other for other in named if _place(other) != _place(model)]


def _place(model: str) -> Path | str:
    folder = run_of(model) or Path(model).expanduser()
    return folder.resolve() if folder.exists() else model


def _load(model: str) -> Any:
    folder = Path(model).expanduser()
    if folder.is_dir() and not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise ValueError(
                f"{model} holds adapters and no model: name the run they are of, or what "
                "python -m sagetrain.export RUN FOLDER --merge wrote"
            )
        runs = ", ".join(path.parent.name for path in sorted(folder.glob("*/run.json")))
        raise ValueError(f"{model} holds no model{f'; it holds the runs {runs}: name one' if runs else ''}")
    with asked_for(model):
        return AutoModelForCausalLM.from_pretrained(Path(model).expanduser() if Path(model).exists() else model)


def _implementation(arm: str) -> str:
    choices = groups()["attention"]
    if arm not in choices:
        raise ValueError(f"--attention: unknown attention {arm!r}, choose from {', '.join(choices)}")
    return OmegaConf.load(CONF_DIR / "attention" / f"{arm}.yaml").implementation


def _autocast(cfg: DictConfig | None, network: Any, where: torch.device) -> torch.dtype | None:
    """What the products are computed in beside the type of the weights."""
    if cfg is not None:
        return AUTOCAST.get(cfg.trainer.precision)
    return torch.bfloat16 if network.dtype == torch.float32 and quick_bf16(where) else None


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m sagetrain.evaluate", description=__doc__.partition(": ")[2])
    parser.add_argument("model", metavar="MODEL", help="run directory or checkpoint, Hugging Face folder, or hub id")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help=", ".join(METRICS))
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FOLDER|TASK=FILE",
        help="local data: a folder with a file for each task (gsm8k-test.jsonl.xz, mmlu/test.parquet, ...), or a file "
        "for a task, with TASK.few_shot=FILE for its examples; other tasks are read from the hub",
    )
    parser.add_argument("--attention", metavar="NAME", help="a file of conf/attention: sage_int8, bf16, sdpa, ...")
    parser.add_argument("--limit", type=_some, metavar="N", help="the first N questions (MMLU: of each subject)")
    parser.add_argument("--few-shot", type=_count, default=0, metavar="N", help="examples before a question (0)")
    parser.add_argument("--batch-size", type=_batch, default=8, metavar="N|auto", help="rows at a time (8)")
    parser.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        help="questions as turns of a conversation (a run: as it was trained)",
    )
    parser.add_argument("--out", metavar="FOLDER", help="where to write eval.json (a run: into it)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu")
    options = parser.parse_args(arguments)
    options.data = _sources(options.data) if options.data else None
    return options


def _sources(words: list[str]) -> str | dict[str, str]:
    named = [word for word in words if "=" in word]
    if not named and len(words) == 1:
        return words[0]
    if len(named) < len(words):
        raise ValueError("--data: give one folder, or TASK=FILE for each task")
    return dict(word.split("=", 1) for word in named)


def _count(word: str) -> int:
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number is needed, not {word}")
    return int(word)


def _some(word: str) -> int:
    if not _count(word):
        raise argparse.ArgumentTypeError("at least 1 is needed")
    return int(word)


def _batch(word: str) -> int | str:
    return word if word == "auto" else _some(word)


if __name__ == "__main__":
    sys.exit(main())
