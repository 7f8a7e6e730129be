"""What is said of the rows before they are trained on: control tokens and unused columns, and how answers end."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

from dpo_kit.data.context import BESIDE, LIKELY
from dpo_kit.data.rows import ANSWERS, Kind, Rows

log = logging.getLogger(__name__)
TRIED = 1000  # of the longest chats, and as many spread over the others


def try_template(rows: Rows, kind: Kind, tokenizer: Any) -> None:
    """ModelError where the chat template is hostile to plain chats or to those of `rows`: the longest, and some of all
    others.
    """
    from dpo_kit.model.template import refuse_hostile_template
    from dpo_kit.model.turns import PLAIN

    names = ("prompt", *ANSWERS[kind])
    chats = [row for row in rows if not isinstance(row["prompt"], str)]
    chats.sort(key=lambda row: sum(len(str(row[name])) for name in names), reverse=True)
    chats = chats[:TRIED] + chats[TRIED :: max(1, len(chats) // TRIED)]
    prompts = [(row["prompt"], True) for row in chats]
    wholes = [([*row["prompt"], *row[name]], False) for row in chats for name in ANSWERS[kind]]
    refuse_hostile_template(tokenizer, [*((chat, False) for chat in PLAIN), *prompts, *wholes])


def describe_columns(rows: Rows, formed: Rows, kind: Kind) -> dict[str, Any]:
    """The columns that hold something and that training does not read; those that look like a part of the prompt are
    named in the log at once.
    """
    read = {"prompt", *ANSWERS[kind], "label", *(() if isinstance(formed[0]["prompt"], str) else BESIDE)}
    filled = {name for row in rows for name, value in row["_values"].items() if value not in (None, "", [])}
    unused = sorted(filled - read)
    if likely := [name for name in unused if name in (*LIKELY, *BESIDE)]:
        log.warning(
            "not trained on, though it looks like a part of the prompt: %s; write it into the prompt if it is one",
            ", ".join(f"column {name}" for name in likely),
        )
    return {"unused_columns": unused, "unused_parts_of_prompts": likely}


def count_in_rows(rows: Rows, kind: Kind, tokenizer: Any) -> dict[str, Any]:
    """How many rows hold control tokens in their text, which ones, and how they are read; said in the log too. What a
    model writes itself (`<think>` in an answer) is counted apart: those stay tokens.
    """
    from dpo_kit.model.control_tokens import count_control_tokens
    from dpo_kit.model.turns import control_pattern

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
    """The token that ends an answer in the chat template, and those at which the model's own generation stops; said in
    the log where a model that learns the one would not stop at the others.
    """
    from dpo_kit.model.turns import ends_of, turns_of

    ends = ends_of(tokenizer)
    known = tokenizer.convert_ids_to_tokens(ends)  # None for an id that the tokenizer has not
    end, stops = turns_of(tokenizer).end, [token or str(number) for token, number in zip(known, ends, strict=True)]
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


def describe_changes(formed: Rows, with_ends: Rows, unfolded: Iterable[dict[str, Any]]) -> dict[str, int]:
    """How many rows are not trained on as they stand in their source, beside rows that are; said in the log too."""
    ended = sum(row != other for row, other in zip(formed, with_ends, strict=True))
    folded = sum(row != other for row, other in zip(formed, unfolded, strict=True))
    if ended:
        log.info("%d rows end what the assistant says as the chat template does: that is written once", ended)
    if folded:
        log.info("data.fold_system=true: the system turn of %d rows begins their first user turn", folded)
    return {"ended_already": ended, "system_turns_folded": folded}
