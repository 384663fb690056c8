"""Fine-tuning data: GSM8K, MMLU, HellaSwag and DROP as prompt and answer, with the loss on the answer only.

Prompts are those that lm-evaluation-harness 0.4 asks without examples and without a chat template, character for
character, so that what is trained is what is evaluated; the answer is what it scores:
    gsm8k      Question: {question}\\nAnswer:| {working and #### number}
    mmlu       The following are multiple choice questions (with answers) about {subject}.\\n\\n
               {question}\\nA. ..\\nB. ..\\nC. ..\\nD. ..\\nAnswer:| {letter}
    hellaswag  {activity}: {ctx_a} {Ctx_b}| {the right ending}              (WikiHow markup taken out)
    drop       {passage} {question}| {the first accepted answer}
The prompt's tokens are those of the prompt alone, as at inference. The answer's are those that follow the prompt's last
line when both are tokenised together, unless a token reaches over the border; then the answer is tokenised by itself.
(By itself " A" would be two tokens to tokenizers that put a space before every text.) eos ends it.

Both layouts of a record are read: the hub data sets' and plain JSON lines. Nothing that is evaluated is trained on or
validated on: the harness takes GSM8K's and MMLU's test split and the validation split of HellaSwag and DROP. So
validation is `val_path`, or the validation files of a local folder; else MMLU's own validation split; else a hash of
the passage, scene or question decides (`val_fraction`), so that one passage is never on both sides.
All examples are read and tokenised when the data is built, so every error comes before training.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sagetrain.data.collate import Example, packed_examples, padded
from sagetrain.data.files import Files, find, find_validation, read_records
from sagetrain.data.loader import Stream
from sagetrain.data.text import clean, encode, frame, get_text, load_hub, say

VAL_FRACTION = 0.05  # held out where nothing is published for validation
TOO_LONG = ("error", "skip", "truncate")
Record = Mapping[str, Any]
Text = tuple[str, str, str]  # what the split is decided by, prompt, answer (with its leading space)
Parts = tuple[np.ndarray, np.ndarray, np.ndarray]  # token ids: bos, prompt, answer with eos


@dataclass(frozen=True)
class Task:
    """Where a task's data is on the hub, and how a record becomes text."""

    repo: str
    config: str | None
    train: str
    val: str | None  # a split that is neither trained on nor evaluated, if there is one
    text: Callable[[Record, str], Text]

    def read(self, record: Record, where: str) -> Text:
        """Raises ValueError, with where it stands, for a record that lacks something or answers with nothing."""
        text = self.text(record, where)
        if not text[2].strip():
            raise ValueError(f"{where}: the answer is empty; repair or remove it")
        return text


def _gsm8k(record: Record, where: str) -> Text:
    question = get_text(record, "question", where)
    return question, f"Question: {question}\nAnswer:", f" {get_text(record, 'answer', where)}"


def _mmlu(record: Record, where: str) -> Text:
    question, subject = get_text(record, "question", where).strip(), record.get("subject")  # "" in auxiliary_train
    choices = _list(record, "choices", where)
    letters = "ABCDEFGHIJ"[: len(choices)]
    about = f" about {subject.replace('_', ' ')}" if subject else ""
    head = f"The following are multiple choice questions (with answers){about}.\n\n"
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    right = letters[_index(record, "answer", len(choices), where)]
    return question, f"{head}{question}\n{lines}\nAnswer:", f" {right}"


def _hellaswag(record: Record, where: str) -> Text:
    if record.get("ctx_a"):
        before, begun = get_text(record, "ctx_a", where), get_text({"ctx_b": ""} | record, "ctx_b", where).capitalize()
    else:
        before, begun = _begun(get_text(record, "ctx", where))
    endings = _list(record, "endings", where)
    ending = _without_markup(endings[_index(record, "label", len(endings), where)])
    query = _without_markup(f"{get_text(record, 'activity_label', where)}: {before} {begun}")
    prompt = query.rstrip()  # spaces at its end are scored with the answer
    return str(record.get("source_id") or before or begun), prompt, f"{query[len(prompt) :]} {ending}"


def _begun(context: str) -> tuple[str, str]:
    """ctx_a and ctx_b, its first letter a capital, of a record that has them in one: ctx_b is what follows the last
    whole sentence, and empty where the context ends with one."""
    before, begun = re.fullmatch(r"""(.*[.!?]["')]*(?=\s|$))?(.*)""", context.strip(), re.DOTALL).groups("")
    begun = begun.strip()
    return before, begun[:1].upper() + begun[1:]


def _without_markup(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _drop(record: Record, where: str) -> Text:
    passage, question = get_text(record, "passage", where), get_text(record, "question", where)
    prompt = f"{passage} {question}"
    space = "" if prompt[-1].isspace() else " "
    return passage, prompt, space + _drop_answer(record, where)


def _drop_answer(record: Record, where: str) -> str:
    if "answers" in record:
        return _list(record, "answers", where)[0]
    answer = record.get("answers_spans") or record.get("answer")  # the latter as in the original files
    if not isinstance(answer, Mapping):
        fields = ", ".join(record)
        raise ValueError(f"{where}: no field 'answers', 'answers_spans' or 'answer'; the fields are {fields}")
    if (number := answer.get("number")) not in (None, ""):
        return clean(str(number))
    if not answer.get("spans") and isinstance(date := answer.get("date"), Mapping):
        return clean(" ".join(str(date[part]) for part in ("day", "month", "year") if date.get(part)))
    return " and ".join(dict.fromkeys(_list(answer, "spans", where)))


TASKS = {
    "gsm8k": Task("openai/gsm8k", "main", "train", None, _gsm8k),
    "mmlu": Task("cais/mmlu", "all", "auxiliary_train", "validation", _mmlu),
    "hellaswag": Task("Rowan/hellaswag", None, "train", None, _hellaswag),
    "drop": Task("ucinlp/drop", None, "train", None, _drop),
}


class TaskStream(Stream):
    """Tokenised examples, shuffled by (seed, epoch); with `width` > 0 several are packed in a row of so many tokens.

    Global batch g of an epoch is B*W examples (rows when packing) of its permutation, rank r takes the r-th B of them;
    what is left at the end of an epoch is not used in that epoch.

    Raises:
        ValueError: no training example.
    """

    start = {"epoch": 0, "row": 0}

    def __init__(
        self,
        name: str,
        train: list[Example],
        val: list[Example],
        pad_id: int,
        batch_size: int,
        seed: int,
        width: int,
        facts: dict[str, Any],
    ) -> None:
        self.facts = facts  # what was read, for the record of the run
        self.pad_id, self.batch_size, self.seed, self.width = pad_id, batch_size, seed, width
        order = np.random.default_rng((seed,)).permutation(len(train))
        self.train = _rows([train[i] for i in order] if width else train, width)
        self.held_out = _rows(val, width)
        self.name = f"{name}, {len(train)} examples, seed {seed}" + (f", packed to {width}" if width else "")

    def batches(self, position: dict[str, Any], rank: int, ranks: int) -> Iterator[tuple[dict, dict]]:
        epoch, row, size = position["epoch"], position["row"], self.batch_size
        self.length(ranks)
        if row + size * ranks > len(self.train):  # the checkpoint was written with smaller global batches
            epoch, row = epoch + 1, 0
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.train))
        while row + size * ranks <= len(self.train):
            mine = order[row + rank * size : row + (rank + 1) * size]
            row += size * ranks
            ends = row + size * ranks > len(self.train)
            after = {"epoch": epoch + 1, "row": 0} if ends else {"epoch": epoch, "row": row}
            yield self.collate([self.train[i] for i in mine]), after

    def length(self, ranks: int) -> int:
        if len(self.train) < self.batch_size * ranks:
            raise ValueError(
                f"{self.name}: {len(self.train)} row(s) of training data, but one step of {ranks} rank(s) with "
                f"batch_size {self.batch_size} needs {self.batch_size * ranks}"
            )
        return len(self.train) // (self.batch_size * ranks)

    def collate(self, rows: Sequence[list[Example]]) -> dict[str, Any]:
        if self.width:
            return packed_examples(rows, self.width, self.pad_id)
        return padded([example for row in rows for example in row], self.pad_id)


def build_task(
    kind: str,
    tokenizer: Any,
    seq_len: int,
    seed: int,
    batch_size: int,
    source: str | None = None,
    name: str | None = None,
    path: Any = None,
    val_path: Any = None,
    split: str | None = None,
    val_split: str | None = None,
    val_fraction: float | None = None,
    max_examples: int | None = None,
    packing: bool = False,
    too_long: str = "error",
) -> TaskStream:
    """Local files (`path`) or the task's hub data set (another one with `source`, `name`, `split`).

    `val_fraction` (between 0 and 1, 0 for no validation) holds out by hash; null takes what there is for validation
    (`val_path`, the validation files of a folder, `val_split`, MMLU's own split), or else a twentieth. `max_examples`
    limits the training and the validation examples, each drawn evenly. `too_long` says what becomes of an example of
    more than `seq_len` tokens: error; skip; truncate (the prompt loses its beginning; skipped if the answer alone is
    too long).
    """
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise ValueError(f"data.val_fraction must be in [0, 1), not {val_fraction}")
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"data.max_examples must be at least 1, not {max_examples}")
    if too_long not in TOO_LONG:
        raise ValueError(f"data.too_long must be one of {', '.join(TOO_LONG)}, not {too_long!r}")
    files = None if path is None else find(path)
    train, val, held_out = _splits(kind, files, val_path, source, name, split, val_split, val_fraction)
    prompts = {prompt for _, prompt, _ in val}
    train = [text for text in train if text[1] not in prompts]
    if not train:
        raise ValueError(f"no {kind} example is left for training; lower data.val_fraction, or give another val_path")
    encoded = [_tokenise(tokenizer, _some(texts, max_examples)) for texts in (train, val)]
    if too_long == "error":
        _check_length(kind, encoded[0] + encoded[1], seq_len)
    cut: Counter[str] = Counter()
    train, val = ([e for parts in side for e in _fit(*parts, seq_len, too_long, cut)] for side in encoded)
    hub = f"{source or TASKS[kind].repo} {split or TASKS[kind].train}"
    label = ",".join(file.name for file in files.chosen) if files else hub
    facts = {"examples": len(train), "validation examples": f"{len(val)} {held_out}".strip()} | cut
    say("%s: %s", kind, ", ".join(f"{count} {what}" for what, count in facts.items()))
    if files and files.some_left:
        say("data.path=%s: %s", path, files)
        facts["files"] = str(files)
    width = seq_len if packing else 0
    stream = TaskStream(f"{kind} {label}", train, val, tokenizer.pad_token_id, batch_size, seed, width, facts)
    stream.length(1)  # says now that there is too little
    return stream


def _splits(
    kind: str,
    files: Files | None,
    val_path: Any,
    source: str | None,
    name: str | None,
    split: str | None,
    val_split: str | None,
    val_fraction: float | None,
) -> tuple[list[Text], list[Text], str]:
    """Training texts, validation texts, and where the latter come from."""
    task = TASKS[kind]
    repo, config = source or task.repo, name or (None if source else task.config)

    def local(paths: Sequence[Path]) -> list[Text]:
        texts = [task.read(record, f"{path}:{n}") for path in paths for n, record in read_records(path)]
        return _not_empty(texts, ", ".join(map(str, paths)))

    def hub(part: str) -> list[Text]:
        records = enumerate(load_hub(repo, config, part, False))
        return _not_empty([task.read(record, f"{repo} {part}:{i}") for i, record in records], f"{repo} {part}")

    train = local(files.chosen) if files else hub(split or task.train)
    if val_path is not None:
        return train, local(find_validation(val_path, files)), f"({val_path})"
    if val_fraction is None and files and files.validation:
        return train, local(files.validation), "(files of the folder)"
    if val_fraction is None and not files and (val_part := val_split or (None if source else task.val)):
        return train, hub(val_part), f"({repo} {val_part})"
    fraction = VAL_FRACTION if val_fraction is None else val_fraction
    if not fraction:
        return train, [], ""
    val = [text for text in train if _share(text[0]) < fraction]
    return [text for text in train if _share(text[0]) >= fraction], val, f"({fraction:g} of all, by hash)"


def _not_empty(texts: list[Text], where: str) -> list[Text]:
    if not texts:
        raise ValueError(f"data set '{where}' is empty: it holds no example")
    return texts


def _tokenise(tokenizer: Any, texts: Sequence[Text]) -> list[Parts]:
    """bos, prompt, and the answer with eos, of each text."""
    bos, eos = frame(tokenizer)
    prompts = encode(tokenizer, [prompt for _, prompt, _ in texts])
    lasts = [prompt.rpartition("\n")[2] for _, prompt, _ in texts]
    ends = encode(tokenizer, [last + answer for last, (_, _, answer) in zip(lasts, texts, strict=True)])
    parts = []
    for (_, _, reply), prompt, last, end in zip(texts, prompts, encode(tokenizer, lasts), ends, strict=True):
        joint = np.array_equal(end[: len(last)], last)
        answer = end[len(last) :] if joint else encode(tokenizer, [reply])[0]
        parts.append((bos, prompt, np.concatenate([answer, eos])))
    return parts


def _check_length(kind: str, examples: Sequence[Parts], seq_len: int) -> None:
    needs = [sum(map(len, parts)) for parts in examples]
    if long := sum(need > seq_len for need in needs):
        raise ValueError(
            f"{kind}: {long} of {len(needs)} examples do not fit data.seq_len={seq_len}, the longest needs "
            f"{max(needs)}. Give data.seq_len={max(needs)}, or say what to do with them: data.too_long=skip leaves "
            "them out, data.too_long=truncate cuts the beginning of their prompts"
        )


def _fit(
    bos: np.ndarray, prompt: np.ndarray, answer: np.ndarray, seq_len: int, too_long: str, cut: Counter[str]
) -> Iterator[Example]:
    """The example, whole or truncated, unless it is to be skipped; `cut` counts what was done."""
    room = seq_len - len(bos) - len(answer)
    if len(prompt) > room:
        if too_long == "skip" or room < 1:
            cut["skipped as too long"] += 1
            return
        cut["truncated"] += 1
        prompt = prompt[-room:]
    yield np.concatenate([bos, prompt, answer]), len(bos) + len(prompt)


def _rows(examples: list[Example], width: int) -> list[list[Example]]:
    """One example a row; or, with `width`, as many in a row as fit, in their order."""
    rows: list[list[Example]] = []
    filled = 0
    for example in examples:
        if not width or not rows or filled + len(example[0]) > width:
            rows.append([])
            filled = 0
        rows[-1].append(example)
        filled += len(example[0])
    return rows


def _some(texts: list[Text], limit: int | None) -> list[Text]:
    if limit is None or limit >= len(texts):
        return texts
    return [texts[i] for i in sorted(np.random.default_rng((0,)).choice(len(texts), limit, replace=False))]


def _share(key: str) -> float:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


def _list(record: Record, field: str, where: str) -> list[str]:
    values = record.get(field)
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f"{where}: field '{field}' must be a non-empty list; the fields are {', '.join(record)}")
    if odd := [value for value in values if not isinstance(value, str | int | float)]:
        raise ValueError(f"{where}: field '{field}' must hold texts, one of it is {odd[0]!r}")
    return [clean(str(value)) for value in values]


def _index(record: Record, field: str, count: int, where: str) -> int:
    value = str(record.get(field))
    if not value.isdecimal() or int(value) >= count:
        raise ValueError(f"{where}: field '{field}' must be 0 to {count - 1}, not {value!r}")
    return int(value)
