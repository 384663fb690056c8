"""Fine-tuning data: GSM8K, MMLU, HellaSwag and DROP as prompt and answer, with the loss on the answer only.

Prompts are the plain, chat-free ones of lm-evaluation-harness, zero-shot, so that what is trained is what is evaluated:
    gsm8k      Question: {question}\\nAnswer:| {working and #### number}
    mmlu       The following are multiple choice questions (with answers) about {subject}.\\n\\n
               {question}\\nA. ..\\nB. ..\\nC. ..\\nD. ..\\nAnswer:| {letter}
    hellaswag  {activity}: {context}| {the right ending}                   (WikiHow markup taken out)
    drop       Passage: {passage}\\nQuestion: {question}\\nAnswer:| {the first accepted answer}
The prompt's tokens are those of the prompt alone, as at inference. The answer's are those that follow the prompt's last
line when both are tokenised together, unless a token reaches over the border; then the answer is tokenised by itself.
(By itself " A" would be two tokens to tokenizers that put a space before every text.) eos ends it.

Both layouts of a record are read: the hub data sets' and plain JSON lines. Validation: `val_path`; else a hash of the
passage, context or question decides (`val_fraction`), so that one passage is never on both sides; else, from the hub,
its own validation split. Numbers after a hash split are numbers on that split, not on the published benchmark.
All examples are read and tokenised when the data is built, so every error comes before training.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sagetrain.data.collate import Example, packed_examples, padded
from sagetrain.data.loader import Stream
from sagetrain.data.text import clean, encode, find_files, frame, get_text, load_hub, read_records

log = logging.getLogger(__name__)
Record = Mapping[str, Any]
Text = tuple[str, str, str]  # what the split is decided by, prompt, answer (with its leading space)


@dataclass(frozen=True)
class Task:
    """Where a task's data is on the hub, and how a record becomes text."""

    repo: str
    config: str | None
    train: str
    val: str
    text: Callable[[Record, str], Text]


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
    if "ctx" not in record and "ctx_a" in record:
        record = {**record, "ctx": f"{record['ctx_a']} {record.get('ctx_b', '')}".strip()}
    context, endings = get_text(record, "ctx", where), _list(record, "endings", where)
    ending = endings[_index(record, "label", len(endings), where)]
    prompt = _without_markup(f"{get_text(record, 'activity_label', where)}: {context}")
    return context, prompt, f" {_without_markup(ending)}"


def _without_markup(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ").strip()


def _drop(record: Record, where: str) -> Text:
    passage, question = get_text(record, "passage", where), get_text(record, "question", where)
    if "answers" in record:
        answer = _list(record, "answers", where)[0]
    elif isinstance(spans := record.get("answers_spans"), Mapping):
        answer = " and ".join(dict.fromkeys(_list(spans, "spans", where)))
    else:
        raise ValueError(f"{where}: no field 'answers' or 'answers_spans'; the fields are {', '.join(record)}")
    return passage, f"Passage: {passage}\nQuestion: {question}\nAnswer:", f" {answer}"


TASKS = {
    "gsm8k": Task("openai/gsm8k", "main", "train", "test", _gsm8k),
    "mmlu": Task("cais/mmlu", "all", "auxiliary_train", "validation", _mmlu),
    "hellaswag": Task("Rowan/hellaswag", None, "train", "validation", _hellaswag),
    "drop": Task("ucinlp/drop", None, "train", "validation", _drop),
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
        self, name: str, train: list[Example], val: list[Example], pad_id: int, batch_size: int, seed: int, width: int
    ) -> None:
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
) -> TaskStream:
    """Local files (`path`) or the task's hub data set (another one with `source`, `name`, `split`).

    `val_fraction` (between 0 and 1, 0 for no validation) holds out by hash; the default is 0.1 for local files and the
    validation split for the hub. `max_examples` limits the training and the validation examples, each drawn evenly.
    """
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise ValueError(f"data.val_fraction must be in [0, 1), not {val_fraction}")
    if max_examples is not None and max_examples < 1:
        raise ValueError(f"data.max_examples must be at least 1, not {max_examples}")
    task = TASKS[kind]
    repo, config = source or task.repo, name or (None if source else task.config)

    def read(files: Any, part: str) -> list[Text]:
        if files is not None:
            texts = [task.text(r, f"{file}:{n}") for file in find_files(files) for n, r in read_records(file)]
        else:
            texts = [task.text(r, f"{repo} {part}:{i}") for i, r in enumerate(load_hub(repo, config, part, False))]
        if not texts:
            raise ValueError(f"data set '{files or repo}' is empty: it holds no example")
        return texts

    train, val = read(path, split or task.train), []
    if val_path is not None:
        val = read(val_path, "")
    elif path is None and val_fraction is None:
        val = read(None, val_split or task.val)
    elif fraction := 0.1 if val_fraction is None else val_fraction:
        val = [text for text in train if _share(text[0]) < fraction]
        train = [text for text in train if _share(text[0]) >= fraction]
        log.info("%s: %d examples to train on, %d held out by hash (no published split)", kind, len(train), len(val))
    if not train:
        raise ValueError(f"no {kind} example is left for training; lower data.val_fraction")
    train, val = (_tokenise(kind, tokenizer, _some(texts, max_examples), seq_len) for texts in (train, val))
    label = ",".join(file.name for file in find_files(path)) if path is not None else f"{repo} {split or task.train}"
    stream = TaskStream(
        f"{kind} {label}", train, val, tokenizer.pad_token_id, batch_size, seed, seq_len if packing else 0
    )
    stream.length(1)  # says now that there is too little
    return stream


def _tokenise(kind: str, tokenizer: Any, texts: Sequence[Text], seq_len: int) -> list[Example]:
    """bos, prompt, answer, eos; a prompt that is too long loses its beginning (never bos)."""
    (bos, eos), examples, cut = frame(tokenizer), [], 0
    prompts = encode(tokenizer, [prompt for _, prompt, _ in texts])
    lasts = [prompt.rpartition("\n")[2] for _, prompt, _ in texts]
    ends = encode(tokenizer, [last + answer for last, (_, _, answer) in zip(lasts, texts, strict=True)])
    for (_, _, reply), prompt, last, end in zip(texts, prompts, encode(tokenizer, lasts), ends, strict=True):
        joint = np.array_equal(end[: len(last)], last)
        answer = end[len(last) :] if joint else encode(tokenizer, [reply])[0]
        room = seq_len - len(bos) - len(answer) - len(eos)
        if room < 1:
            raise ValueError(
                f"{kind}: the answer '{reply.strip()[:60]}...' alone has {len(answer)} tokens and leaves no room for a "
                f"prompt in seq_len {seq_len}; raise seq_len to {seq_len + 1 - room} or more"
            )
        cut += len(prompt) > room
        prompt = prompt[-room:]
        examples.append((np.concatenate([bos, prompt, answer, eos]), len(bos) + len(prompt)))
    if cut:
        log.warning("%s: %d of %d prompts lost their beginning to fit seq_len %d", kind, cut, len(texts), seq_len)
    return examples


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
    return [clean(str(value)) for value in values]


def _index(record: Record, field: str, count: int, where: str) -> int:
    value = str(record.get(field))
    if not value.isdigit() or int(value) >= count:
        raise ValueError(f"{where}: field '{field}' must be 0 to {count - 1}, not {value!r}")
    return int(value)
