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

With `chat_template` an example is a conversation as the tokenizer's template writes it, and as the harness asks with
`--apply_chat_template`: the prompt is what the user says (MMLU's first line the system), the answer (without its space)
what the assistant says. (One of several choices follows the prompt as the harness scores it, with no other space than
its own.) Then prompt are all tokens up to where the assistant begins, and the answer ends with what the
template ends a turn with; a line break behind that, which nobody would generate, is left out.

Both layouts of a record are read: the hub data sets' and plain JSON lines. Nothing that is evaluated is trained on or
validated on: the harness takes GSM8K's and MMLU's test split and the validation split of HellaSwag and DROP. So
validation is `val_path`, or the validation files of a local folder; else MMLU's own validation split; else a hash of
the passage, scene or question decides (`val_fraction`), so that one passage is never on both sides.
All examples are read and tokenised when the data is built, so every error comes before training; tables.py keeps them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError

from sagetrain.data.collate import Example, flattened, packed_examples, padded
from sagetrain.data.corpus import TOGETHER, clean, encode, frame, get_text, load_hub, say
from sagetrain.data.files import find, find_validation, read_records
from sagetrain.data.loader import Stream
from sagetrain.data.tables import Row, Table, digest, made_by, stamps, tabled

VAL_FRACTION = 0.05  # held out where nothing is published for validation
TOO_LONG = ("error", "skip", "truncate")
PACKING = (False, True, "batch")
CHAT = (False, True, "auto")
Record = Mapping[str, Any]
Text = tuple[str, str, str]  # what the split is decided by, prompt, answer (with its leading space)


@dataclass(frozen=True)
class Task:
    """Where a task's data is on the hub, and how a record becomes text."""

    repo: str
    config: str | None
    train: str
    val: str | None  # a split that is neither trained on nor evaluated, if there is one
    text: Callable[[Record, str], Text]
    chosen: bool = False  # whether the answer is one of several that are scored, and not generated
    system: bool = False  # whether the first paragraph of a prompt is the system's message in a conversation

    def read(self, record: Record, where: str) -> Text:
        """Raises ValueError, with where it stands, for a record that lacks something or answers with nothing."""
        text = self.text(record, where)
        if not text[2].strip():
            raise ValueError(f"{where}: the answer is empty; repair or remove it")
        return text


def _gsm8k(record: Record, where: str) -> Text:
    question = get_text(record, "question", where)
    return question, f"Question: {question}\nAnswer:", f" {get_text(record, 'answer', where)}"


LETTERS = "ABCDEFGHIJ"  # of MMLU's choices


def _mmlu(record: Record, where: str) -> Text:
    question, subject = get_text(record, "question", where).strip(), record.get("subject")  # "" in auxiliary_train
    subject = get_text(record, "subject", where) if subject else ""
    choices = get_list(record, "choices", where)
    if len(choices) > len(LETTERS):
        raise ValueError(
            f"{where}: field 'choices' has {len(choices)} texts, and more than {len(LETTERS)} have no letter"
        )
    letters = LETTERS[: len(choices)]
    about = f" about {subject.replace('_', ' ')}" if subject else ""
    head = f"The following are multiple choice questions (with answers){about}.\n\n"
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True))
    right = letters[get_index(record, "answer", len(choices), where)]
    return question, f"{head}{question}\n{lines}\nAnswer:", f" {right}"


def _hellaswag(record: Record, where: str) -> Text:
    if record.get("ctx_a"):
        before, begun = get_text(record, "ctx_a", where), get_text({"ctx_b": ""} | record, "ctx_b", where).capitalize()
    else:
        before, begun = _begun(get_text(record, "ctx", where))
    endings = get_list(record, "endings", where)
    ending = without_markup(endings[get_index(record, "label", len(endings), where)])
    prompt = without_markup(f"{get_text(record, 'activity_label', where)}: {before} {begun}")
    return str(record.get("source_id") or before or begun), prompt, f" {ending}"


def _begun(context: str) -> tuple[str, str]:
    """ctx_a and ctx_b, its first letter a capital, of a record that has them in one: ctx_b is what follows the last
    whole sentence, and empty where the context ends with one."""
    before, begun = re.fullmatch(r"""(.*[.!?]["')]*(?=\s|$))?(.*)""", context.strip(), re.DOTALL).groups("")
    begun = begun.strip()
    return before, begun[:1].upper() + begun[1:]


def without_markup(text: str) -> str:
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _drop(record: Record, where: str) -> Text:
    passage, question = get_text(record, "passage", where), get_text(record, "question", where)
    prompt = f"{passage} {question}"
    space = "" if prompt[-1].isspace() else " "
    return passage, prompt, space + _drop_answer(record, where)


def _drop_answer(record: Record, where: str) -> str:
    if "answers" in record:
        return get_list(record, "answers", where)[0]
    answer = record.get("answers_spans") or record.get("answer")  # the latter as in the original files
    if not isinstance(answer, Mapping):
        fields = ", ".join(record)
        raise ValueError(f"{where}: no field 'answers', 'answers_spans' or 'answer'; the fields are {fields}")
    if (number := answer.get("number")) not in (None, ""):
        return clean(str(number))
    if not answer.get("spans") and isinstance(date := answer.get("date"), Mapping):
        return clean(" ".join(str(date[part]) for part in ("day", "month", "year") if date.get(part)))
    return " and ".join(spans_of(answer, where)[0])


def spans_of(answer: Record, where: str) -> list[list[str]]:
    """The accepted answers, each by its spans. The hub's `answers_spans` has several answers in one list where they
    were validated; which is which only numbers and dates show, which are never parts of one answer."""
    spans = list(dict.fromkeys(get_list(answer, "spans", where)))
    return [[span] for span in spans] if {"number", "date"} & set(answer.get("types") or ()) else [spans]


TASKS = {
    "gsm8k": Task("openai/gsm8k", "main", "train", None, _gsm8k),
    "mmlu": Task("cais/mmlu", "all", "auxiliary_train", "validation", _mmlu, chosen=True, system=True),
    "hellaswag": Task("Rowan/hellaswag", None, "train", None, _hellaswag, chosen=True),
    "drop": Task("ucinlp/drop", None, "train", None, _drop),
}


class Examples:
    """Rows of a table as examples; one of more than `longest` tokens loses the beginning of its prompt, but not bos."""

    def __init__(self, table: Table, tokenizer: Any, longest: int) -> None:
        self.table, self.longest = table, longest
        self.lengths, self.prompts = np.minimum(table.lengths, longest), table.columns["prompt"]
        self.bos, self.pad = int(table[0][0] == tokenizer.bos_token_id), tokenizer.pad_token_id

    def __getitem__(self, number: int) -> Example:
        ids = self.table[number]
        over = max(len(ids) - self.longest, 0)
        return np.concatenate([ids[: self.bos], ids[self.bos + over :]]), int(self.prompts[number]) - over

    def padded(self, numbers: Sequence[int]) -> dict[str, Any]:
        return padded([self[number] for number in numbers], self.pad)

    def packed(self, rows: Sequence[list[int]]) -> dict[str, Any]:
        return packed_examples([[self[number] for number in row] for row in rows], self.longest, self.pad)

    def flattened(self, numbers: Sequence[int]) -> dict[str, Any]:
        return flattened([self[number] for number in numbers])

    def together(self, numbers: np.ndarray) -> list[list[int]]:
        """Rows of as many examples as fit, in their order."""
        rows: list[list[int]] = []
        filled = self.longest
        for number in map(int, numbers):
            if filled + self.lengths[number] > self.longest:
                rows.append([])
                filled = 0
            rows[-1].append(number)
            filled += self.lengths[number]
        return rows


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
    packing: bool | str = False,
    chat_template: bool | str | None = False,
    too_long: str = "error",
) -> Stream:
    """Local files (`path`) or the task's hub data set (another one with `source`, `name`, `split`).

    `val_fraction` (between 0 and 1, 0 for no validation) holds out by hash; null takes what there is for validation
    (`val_path`, the validation files of a folder, `val_split`, MMLU's own split), or else a twentieth. `max_examples`
    limits the training and the validation examples, each drawn evenly. `packing` says what a batch is: false, an
    example a row, padded; "batch", the same examples end to end in one row; true, rows of `seq_len` tokens with as many
    examples as fit, so that a row is no fixed number of them. `chat_template`: see `chats`. `too_long` says what
    becomes of an example of more than `seq_len` tokens: error; skip; truncate (the prompt loses its beginning; skipped
    if the answer alone is too long).
    """
    if val_fraction is not None and not 0 <= val_fraction < 1:
        raise ValueError(f"data.val_fraction must be in [0, 1), not {val_fraction}")
    if max_examples is not None and (type(max_examples) is not int or max_examples < 1):
        raise ValueError(f"data.max_examples must be an integer of at least 1, not {max_examples!r}")
    if too_long not in TOO_LONG:
        raise ValueError(f"data.too_long must be one of {', '.join(TOO_LONG)}, not {too_long!r}")
    if packing not in PACKING:
        raise ValueError(f"data.packing must be false, true or batch, not {packing!r}")
    chat = chats(tokenizer, chat_template)
    task, files = TASKS[kind], None if path is None else find(path)
    repo, config = source or task.repo, name or (None if source else task.config)

    def read(part: list[Path] | str) -> Any:
        if isinstance(part, str):
            data, label = load_hub(repo, config, part, streaming=False), f"{repo} {part}"
            records, key = lambda: ((f"{label}:{i}", x) for i, x in enumerate(data)), data._fingerprint
        else:
            label, key = ", ".join(map(str, part)), stamps(part)
            records = lambda: ((f"{file}:{i}", x) for file in part for i, x, _ in read_records(file))  # noqa: E731
        made_from = kind, made_by(tokenizer), chat and tokenizer.chat_template, key
        return tabled(lambda: _rows(task, tokenizer, records(), chat), label, *made_from)

    val, fraction = None, 0.0
    if val_path is not None:
        val, held = find_validation(val_path, files), f"({val_path})"
    elif val_fraction is None and files and files.validation:
        val, held = files.validation, "(files of the folder)"
    elif val_fraction is None and not files and (val := val_split or (None if source else task.val)):
        held = f"({repo} {val})"
    else:
        fraction = VAL_FRACTION if val_fraction is None else val_fraction
        held = f"({fraction:g} of all, by hash)" if fraction else ""
    parts = [read(files.chosen if files else split or task.train), *([read(val)] if val else [])]
    table, train = Table(parts), np.arange(len(parts[0]))
    apart = np.arange(len(train), len(table)) if val else np.flatnonzero(table.columns["share"] < fraction)
    prompts = table.columns["digest"]
    train = train[~np.isin(prompts[train], prompts[apart])]
    if not len(train):
        raise ValueError(f"no {kind} example is left for training; lower data.val_fraction, or give another val_path")
    train, apart = _some(train, max_examples), _some(apart, max_examples)
    if max_examples:
        held = f"({'; '.join(filter(None, [held[1:-1], f'at most {max_examples}']))})"

    examples, needs = Examples(table, tokenizer, seq_len), table.lengths
    long = needs > seq_len
    lost = long & ((too_long == "skip") | (examples.bos + needs - examples.prompts >= seq_len))  # no room for a prompt
    used = np.concatenate([train, apart])
    if (count := long[used].sum()) and too_long == "error":
        raise ValueError(
            f"{kind}: {count} of {len(used)} examples do not fit data.seq_len={seq_len}, the longest needs "
            f"{needs[used].max()}. Give data.seq_len={needs[used].max()}, or say what to do with them: data.too_long="
            "skip leaves them out, data.too_long=truncate cuts the beginning of their prompts"
        )
    cut = {"skipped as too long": int(lost[used].sum()), "truncated": int((long & ~lost)[used].sum())}
    train, apart = train[~lost[train]], apart[~lost[apart]]
    facts = {"examples": len(train), "validation examples": f"{len(apart)} {held}".strip()}
    facts |= {what: number for what, number in cut.items() if number}
    say("%s: %s", kind, ", ".join(f"{number} {what}" for what, number in facts.items()))
    if files and files.some_left:
        say("data.path=%s: %s", path, files)
        facts["files"] = str(files)
    facts["chat_template"] = chat

    label = ",".join(file.name for file in files.chosen) if files else f"{repo} {split or task.train}"
    label = f"{kind} {label}, {len(train)} examples, seed {seed}"
    label += (f", packed to {seq_len}" if packing is True else "") + (", chat template" if chat else "")
    train, held_out = train.tolist(), apart.tolist()
    collate = examples.flattened if packing == "batch" else examples.padded
    if packing is True:
        train = examples.together(np.random.default_rng((seed,)).permutation(train))
        held_out, collate = examples.together(apart), examples.packed
    stream = Stream(label, lambda epoch: train, held_out, collate, batch_size, seed, endless=False, facts=facts)
    stream.length(1)  # says now that there is too little
    return stream


def _some(numbers: np.ndarray, limit: int | None) -> np.ndarray:
    if limit is None or limit >= len(numbers):
        return numbers
    return numbers[np.sort(np.random.default_rng((0,)).choice(len(numbers), limit, replace=False))]


def chats(tokenizer: Any, asked: bool | str | None) -> bool:
    """Whether examples become conversations, as `data.chat_template` asks: true; false (or null); auto, where the
    tokenizer has a template, as those of some base models do too.

    Raises ValueError for true where it has none, and for anything else.
    """
    if asked is not None and not any(asked is choice or asked == choice == "auto" for choice in CHAT):
        raise ValueError(f"data.chat_template must be false, true or auto, not {asked!r}")
    there = bool(getattr(tokenizer, "chat_template", None))
    if asked is True and not there:
        raise ValueError(
            f"data.chat_template=true: the tokenizer '{tokenizer.name_or_path}' has no chat template. Give model.path= "
            "(or model.tokenizer=) of a model that has one, as instruct models do, or data.chat_template=false"
        )
    return there and bool(asked)


def _rows(task: Task, tokenizer: Any, records: Iterable[tuple[str, Record]], chat: bool) -> Iterator[Row]:
    """Of each example: its tokens, how many of them are prompt, digest of the prompt's text, place among all in [0, 1)
    of what the split is decided by."""
    records = iter(records)
    while texts := [task.read(record, where) for where, record in islice(records, TOGETHER[0])]:
        asked = [text[1:] for text in texts]
        pairs = _conversations(tokenizer, asked, task) if chat else _continuations(tokenizer, asked, task)
        for (key, text, _), (prompt, answer) in zip(texts, pairs, strict=True):
            ids, share = np.concatenate([prompt, answer]), digest(key.encode()) / 2**63
            yield {"ids": ids, "prompt": len(prompt), "digest": digest(text.encode()), "share": share}


def _continuations(
    tokenizer: Any, texts: Sequence[tuple[str, str]], task: Task
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens of each prompt (bos before it) and of the answer to it (eos behind), chosen as this module's text says."""
    bos, eos = frame(tokenizer)
    if task.chosen:  # spaces at the end of a prompt are scored with the answer
        ends = [len(prompt.rstrip()) for prompt, _ in texts]
        texts = [(prompt[:end], prompt[end:] + reply) for end, (prompt, reply) in zip(ends, texts, strict=True)]
    prompts = encode(tokenizer, [prompt for prompt, _ in texts])
    lasts = [prompt.rpartition("\n")[2] for prompt, _ in texts]
    ends = encode(tokenizer, [last + answer for last, (_, answer) in zip(lasts, texts, strict=True)])
    for (_, reply), prompt, last, end in zip(texts, prompts, encode(tokenizer, lasts), ends, strict=True):
        joint = np.array_equal(end[: len(last)], last)
        answer = end[len(last) :] if joint else encode(tokenizer, [reply])[0]
        yield np.concatenate([bos, prompt]), np.concatenate([answer, eos])


def _conversations(
    tokenizer: Any, texts: Sequence[tuple[str, str]], task: Task
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same of conversations of one question and one answer. An answer that is chosen follows the prompt as it is
    scored, whatever spaces the template writes or takes away.

    Raises ValueError where the template does not let an answer follow the prompt as it is.
    """
    parts = [prompt.partition("\n\n") if task.system else ("", "", prompt) for prompt, _ in texts]
    asked = [
        [{"role": role, "content": said} for role, said in (("system", head + gap), ("user", rest)) if said]
        for head, gap, rest in parts
    ]
    answers = [{"role": "assistant", "content": reply.strip()} for _, reply in texts]
    said = [[*question, answer] for question, answer in zip(asked, answers, strict=True)]
    prompts = _written(tokenizer, asked, add_generation_prompt=True)
    wholes = [whole.rstrip() for whole in _written(tokenizer, said)]

    def ids(some: Sequence[str]) -> list[list[int]]:  # the template has written bos itself
        return tokenizer(list(some), add_special_tokens=False, verbose=False)["input_ids"]

    ends = []
    for i, (prompt, whole, (_, reply)) in enumerate(zip(prompts, wholes, texts, strict=True)):
        before, there, end = whole[len(prompt) :].partition(reply.strip())
        if not whole.startswith(prompt) or not there or before.strip():
            raise ValueError(
                f"data.chat_template: in the template of '{tokenizer.name_or_path}' the answer does not follow the "
                "prompt as it is, so what is trained would not be what is asked. Set data.chat_template=false"
            )
        ends.append(end)
        if task.chosen:
            wholes[i] = prompt + reply.removeprefix(" ") + end
    for prompt, whole, end, first, both in zip(prompts, wholes, ends, ids(prompts), ids(wholes), strict=True):
        joint = both[: len(first)] == first
        answer = both[len(first) :] if joint else ids([whole[len(prompt) :]])[0]
        answer = answer if end else [*answer, tokenizer.eos_token_id]
        yield np.asarray(first, np.int32), np.asarray(answer, np.int32)


UNWRITTEN = (TemplateError, TypeError, ValueError, KeyError)


def _written(tokenizer: Any, conversations: Sequence[list[dict[str, str]]], **how: Any) -> list[str]:
    """Conversations by the template, as the harness has it write them: without thinking, where the template knows that,
    and without the system's message, where it refuses one. Raises ValueError for a template that cannot be used."""
    how |= {"tokenize": False, "enable_thinking": False}
    try:
        return tokenizer.apply_chat_template(conversations, **how)
    except UNWRITTEN:
        conversations = [[turn for turn in turns if turn["role"] != "system"] for turns in conversations]
    try:
        return tokenizer.apply_chat_template(conversations, **how)
    except UNWRITTEN as error:
        raise ValueError(
            f"data.chat_template: the template of '{tokenizer.name_or_path}' refuses a question and its answer "
            f"({error}). Set data.chat_template=false (of python -m sagetrain.evaluate: --no-chat-template)"
        ) from error


def check_template(tokenizer: Any) -> None:
    """Raises ValueError for a template that does not write a question."""
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    _written(tokenizer, [turns], add_generation_prompt=True)


def get_list(record: Record, field: str, where: str) -> list[str]:
    values = record.get(field)
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f"{where}: field '{field}' must be a non-empty list; the fields are {', '.join(record)}")
    if odd := [value for value in values if not isinstance(value, str | int | float)]:
        raise ValueError(f"{where}: field '{field}' must hold texts, one of it is {odd[0]!r}")
    return [clean(str(value)) for value in values]


def get_index(record: Record, field: str, count: int, where: str) -> int:
    value = str(record.get(field))
    if not value.isdecimal() or int(value) >= count:
        raise ValueError(f"{where}: field '{field}' must be 0 to {count - 1}, not {value!r}")
    return int(value)
