"""All sources as normal rows of one kind and form, every row that is not, and what report and log say of them."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpo_kit.config.settings import Data, Source
from dpo_kit.data.forms import Match, recognise
from dpo_kit.data.read import Fault, Row, Tie, read_source
from dpo_kit.data.rows import ANSWERS, BESIDE, Kind, Rows
from dpo_kit.data.shape import Shape, add_ids, refuse_unread_kwargs
from dpo_kit.errors import DataError

log = logging.getLogger(__name__)
KINDS: dict[str, Kind] = {"pairs": "pairs", "scored": "pairs", "unary": "unary", "prompts": "prompts"}
CONVERT = "python -m dpo_kit data mode=convert"
TRIED = 1000  # of the longest chats the template is tried on, and as many spread over the others
LIKELY = ("input", "context", "history", "instruction", "question", "query", "documents", "passage", "system_prompt")
"""Names under which columns that are not trained on usually hold a part of the prompt."""


@dataclass
class Gathered:
    """Well-formed rows as they stand in their sources, each with its `_place`, its own `_values` apart from what is
    added to it, and the `ids` (of prompt and answers) that it is trained on; `read` counts the malformed ones too.
    """

    kind: Kind
    train: list[Rows]  # one list for each source
    held_out: Rows | None  # of data.eval; None where held-out prompts are to be taken from train
    faults: list[Fault]
    read: int
    shape: Shape
    forms: dict[str, str]  # by source: what its rows were read as
    notes: dict[str, Any] = field(default_factory=dict)  # for the report

    def shaped(self, row: dict[str, Any]) -> dict[str, Any]:
        """`row` as it is trained on."""
        return self.shape.of(row, self.kind)


def gather(data: Data, tokenizer: Any, *, refuse: bool = True, bare: bool = False) -> Gathered:
    """Read everything; malformed rows are refused (`data.on_bad_row`) or listed. `bare`: prompts too. DataError."""
    refuse = refuse and data.on_bad_row == "fail"
    faults: list[Fault] = []
    forms: dict[str, str] = {}
    parts: list[tuple[str, Kind, Rows]] = []
    read = 0
    trained = [(source, data.train_split) for source in sources(data.train)]
    for source, split in [*trained, *((s, data.eval_split or data.train_split) for s in eval_sources(data))]:
        path, since = source.path, len(faults)
        match, rows = read_rows(source, split, data, faults, bare=bare)
        read += len(rows) + len(faults) - since
        forms[path] = str(match)
        if match.form.rows == "rated":
            remedy = f"{CONVERT} data=jsonl data.train={path} makes pairs of those to one prompt"
            raise DataError(f"{path} has one scored answer a row ({match}): {remedy}")
        if match.form.rows == "scored":
            from dpo_kit.data.published import best_and_worst

            rows = _keep(map(best_and_worst, rows), faults)
        _refuse_empty(path, rows, faults[since:])
        placed = [row.values | {"_place": row.place, "_values": row.values} for row in rows]
        parts.append((path, KINDS[match.form.rows], placed))
    if refuse:
        refuse_malformed(faults)
    first, kind, _ = parts[0]
    for path, other, _ in parts:
        if other != kind:
            mixed = f"{kind} and {other} rows cannot be mixed, as {first} and {path} do"
            raise DataError(f"{mixed}: convert one of them with {CONVERT}")
    train, held_out = ([rows for _, _, rows in some] for some in (parts[: len(trained)], parts[len(trained) :]))
    every = [row for rows in (*train, *held_out) for row in rows]
    shape = Shape(_wraps(every, data, tokenizer), data.fold_system, data.chat_template_kwargs)
    pool = [row for rows in held_out for row in rows] if held_out else None
    gathered = Gathered(kind, train, pool, faults, read, shape, forms)
    _read_ids(gathered, every, tokenizer)
    if refuse:
        refuse_malformed(faults)
    if not any(gathered.train):
        raise DataError(f"{first} has no row to train on: {count_faults(faults)}")
    return gathered


def _wraps(rows: Rows, data: Data, tokenizer: Any) -> bool:
    """Whether text becomes chat. DataError: both are there, and TRL takes all for what the first is; no template."""
    text, chat = (
        next((row["_place"] for row in rows if isinstance(row["prompt"], str) == is_text), None)
        for is_text in (True, False)
    )
    if text and chat and data.wrap_as_chat is not True:
        both = f"text rows (such as {text}) and chat rows ({chat})"
        raise DataError(f"{both} are mixed: data.wrap_as_chat=true makes chat of both")
    if chat and tokenizer.chat_template is None:
        remedy = "use an instruct model, or name a template with model.chat_template=FILE"
        raise DataError(f"{chat} has chat messages, but the tokenizer has no chat template: {remedy}")
    if data.wrap_as_chat != "auto" or tokenizer.chat_template is None:
        return data.wrap_as_chat is True
    from dpo_kit.model.turns import control_pattern

    begins = control_pattern(tokenizer).match
    return chat is not None or not all(begins(row["prompt"].lstrip()) for row in rows)  # unless all is rendered already


def _read_ids(gathered: Gathered, rows: Rows, tokenizer: Any) -> None:
    """Give all rows their ids and the report what it says of them; rows that have none are taken out as faults."""
    kind, notes, formed = gathered.kind, gathered.notes, [gathered.shaped(row) for row in rows]
    is_chat = not isinstance(formed[0]["prompt"], str)
    refuse_unread_kwargs(gathered.shape.template_kwargs, formed, tokenizer)
    _try_template(formed, kind, tokenizer)
    if is_chat:  # only now is the template rendered here
        from dpo_kit.model.turns import end_tokens

        gathered.shape = replace(gathered.shape, ends=end_tokens(tokenizer))
        with_ends, formed = formed, [gathered.shaped(row) for row in rows]
        plain = replace(gathered.shape, fold_system=False)
        unfolded = (plain.of(row, kind) for row in rows) if gathered.shape.fold_system else formed
        ended, folded = (
            sum(row != other for row, other in zip(formed, others, strict=True)) for others in (with_ends, unfolded)
        )
        notes |= describe_end(tokenizer) | {"ended_already": ended, "system_turns_folded": folded}
        if ended:
            log.info("%d rows end what the assistant says as the chat template does: that is written once", ended)
        if folded:
            log.info("data.fold_system=true: the system turn of %d rows begins their first user turn", folded)
    read = {"prompt", *ANSWERS[kind], "label", *(BESIDE if is_chat else ())}
    filled = {name for row in rows for name, value in row["_values"].items() if value not in (None, "", [])}
    likely = [name for name in sorted(filled - read) if name in (*LIKELY, *BESIDE)]
    notes |= {"unused_columns": sorted(filled - read), "unused_parts_of_prompts": likely}
    if likely:
        columns = ", ".join(f"column {name}" for name in likely)
        what = "not trained on, though it looks like a part of the prompt: %s; write it into the prompt if it is one"
        log.warning(what, columns)
    notes["control_tokens"] = count_in_rows(formed, kind, tokenizer)
    add_ids(rows, formed, kind, tokenizer, gathered.faults)
    gathered.train = [[row for row in part if "ids" in row] for part in gathered.train]
    if gathered.held_out is not None:
        gathered.held_out = [row for row in gathered.held_out if "ids" in row]


def _try_template(rows: Rows, kind: Kind, tokenizer: Any) -> None:
    """ModelError for a template that is hostile to plain chats or those of `rows`: the longest, and some others."""
    from dpo_kit.model.template import refuse_hostile_template
    from dpo_kit.model.turns import PLAIN

    names = ("prompt", *ANSWERS[kind])
    chats = [row for row in rows if not isinstance(row["prompt"], str)]
    chats.sort(key=lambda row: sum(len(str(row[name])) for name in names), reverse=True)
    chats = chats[:TRIED] + chats[TRIED :: max(1, len(chats) // TRIED)]
    prompts = [(row["prompt"], True) for row in chats]
    wholes = [([*row["prompt"], *row[name]], False) for row in chats for name in ANSWERS[kind]]
    refuse_hostile_template(tokenizer, [*((chat, False) for chat in PLAIN), *prompts, *wholes])


def count_in_rows(rows: Rows, kind: Kind, tokenizer: Any) -> dict[str, Any]:
    """Rows with control tokens that somebody typed, how those are read and, apart, those that a model writes itself."""
    from dpo_kit.model.turns import control_pattern, count_control_tokens

    typed, written = Counter[str](), Counter[str]()
    places = []
    pattern = control_pattern(tokenizer)
    for row in rows:
        prompt, *answers = parts = [row[name] for name in ("prompt", *ANSWERS[kind])]
        if isinstance(prompt, str):  # a raw answer may end in EOS
            texts = [prompt, *(text.rstrip().removesuffix(tokenizer.eos_token) for text in answers)]
            counts, by_model = Counter(token for text in texts for token in pattern.findall(text)), Counter[str]()
        else:
            counts, by_model = count_control_tokens(tokenizer, [message for part in parts for message in part])
        typed.update(counts)
        written.update(by_model)
        places += [row["_place"]] if counts else []
    chats = any(not isinstance(row["prompt"], str) for row in rows)
    read_as = "text" if chats else "tokens"
    if places:
        log.warning(
            "%d rows hold control tokens in their text (%s; the first is %s); they are read as %s%s",
            *(len(places), ", ".join(typed), places[0], read_as),
            "" if chats else ", since raw text is taken as rendered already: for text as typed, data.wrap_as_chat=true",
        )
    return {"rows": len(places), "tokens": dict(typed), "read_as": read_as, "written_by_the_model": dict(written)}


def describe_end(tokenizer: Any) -> dict[str, Any]:
    """The token that ends an answer in the template, those at which generation stops; logged where they do not meet."""
    from dpo_kit.model.turns import ends_of, turns_of

    ends, end = ends_of(tokenizer), turns_of(tokenizer).end
    known = tokenizer.convert_ids_to_tokens(ends)  # None for an id that the tokenizer has not
    stops = [token or str(number) for token, number in zip(known, ends, strict=True)]
    if end is None:
        log.warning(
            "the chat template writes no token that ends an answer: trained on it, the model never learns to stop; "
            "take one that writes {{ eos_token }} after what the assistant says: model.chat_template=FILE"
        )
    elif stops and end not in stops:
        log.warning(
            "answers end in %s, at which the model's generation_config does not stop (it names %s): samples stop here "
            "at all of them, and what is trained is saved with all of them",
            *(end, ", ".join(stops)),
        )
    return {"answers_end_in": end, "generation_ends_in": stops}


def sources(spec: str | list[Source]) -> list[Source]:
    return [Source(path=spec)] if isinstance(spec, str) else spec


def eval_sources(data: Data) -> list[Source]:
    if data.eval is not None:
        return sources(data.eval)
    return sources(data.train) if data.eval_split else []


def count_faults(faults: Sequence[Fault]) -> str:
    """The reasons of `faults` with their numbers, and the first of them in full."""
    if not faults:
        return "name a file with rows"
    reasons = Counter(fault.reason for fault in faults).most_common()
    return ", ".join(f"{count} × {reason}" for reason, count in reasons) + f"; the first is {faults[0]}"


def refuse_malformed(faults: list[Fault]) -> None:
    """DataError with the first of `faults` that is more than a tie, where there are any."""
    if faults := [fault for fault in faults if not isinstance(fault, Tie)]:
        first = "\n".join(f"  {fault}" for fault in faults[:5])
        more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
        remedy = "mend them, or leave them out with data.on_bad_row=drop"
        raise DataError(f"{len(faults)} malformed rows:\n{first}{more}\n{remedy}")


def read_rows(
    source: Source, split: str, data: Data, faults: list[Fault], *, bare: bool = False
) -> tuple[Match, list[Row]]:
    """The form of a source and its rows in it; what cannot be read is added to `faults`. Raises DataError."""
    since = len(faults)
    rows = _keep(read_source(source.path, split, source.config or data.config), faults)
    _refuse_empty(source.path, rows, faults[since:])
    match = recognise(source.path, rows, data.columns, source.form or data.form, bare=bare)
    return match, _keep(map(match.read, rows), faults)


def _keep(items: Iterable[Row | Fault], faults: list[Fault]) -> list[Row]:
    rows = []
    for item in items:
        if isinstance(item, Row):
            rows.append(item)
        else:
            faults.append(item)
    return rows


def _refuse_empty(path: str, rows: list[Row], faults: list[Fault]) -> None:
    if not rows:
        raise DataError(f"{path} has no row to train on: {count_faults(faults)}")
