"""Iterative DPO: rounds of generate → judge → build pairs → train, each an ordinary run from the last one's policy.

    python examples/iterative_dpo.py                              three rounds on the embedded lab: minutes
    python examples/iterative_dpo.py rounds=5 prompts=400 beta=0.2 out=rounds
    python examples/iterative_dpo.py start=DIR out=rounds model=local data=jsonl data.train=prompts.jsonl judge=llm …

Options: rounds=3 prompts=800 (in each round, new ones as long as there are any) start=FOLDER (the first model)
out=FOLDER, and any override of dpo_kit; those of build and judge reach the building of pairs. The same command with the
same out= goes on: a round that has ended is not done again, one that was stopped goes on. The reference of each round
is the model that the round starts from, so that beta bounds the round's own step; the table also shows the KL to the
very first model, which nothing bounds.
"""

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console
from rich.table import Table

from dpo_kit import compose, train
from dpo_kit.callbacks.drift import Drift, drift_metrics
from dpo_kit.callbacks.gold import GoldFigures, load_gold
from dpo_kit.callbacks.reference import Reference
from dpo_kit.config.compose import check
from dpo_kit.data.__main__ import compose_tool
from dpo_kit.data.build.pairs import build_pairs
from dpo_kit.data.build.prompts import read_prompts
from dpo_kit.data.other_rows import distinct_prompts
from dpo_kit.export.folder import export_run
from dpo_kit.model.batches import measuring
from dpo_kit.model.load import load_reference, load_tokenizer
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json, write_json, write_jsonl
from dpo_kit.toy import MODEL
from dpo_kit.trainer.held_out import Tuned, place
from dpo_kit.trainer.rows import read_data

OWN = {"rounds": "3", "prompts": "800", "start": str(MODEL), "out": ""}
OF_BUILDING = ("build", "judge")
KL = "probe/kl_reverse_rb_nats"


def main(arguments):
    given = dict(argument.split("=", 1) for argument in arguments)
    options = OWN | {key: value for key, value in given.items() if key in OWN}
    words = [f"{key}={value}" for key, value in given.items() if key not in OWN]
    folder = Path(options["out"] or tempfile.mkdtemp()).resolve()
    start, rows = Path(options["start"]), []
    for number in range(1, int(options["rounds"]) + 1):
        place_of_round = folder / f"round-{number}"
        report = build(place_of_round, number, start, int(options["prompts"]), words)
        result = learn(place_of_round, start, words)
        start = policy_of(RunDirectory(place_of_round / "run"))
        rows.append(describe(number, report, result, measure(place_of_round, start, options["start"], words)))
    show(rows, folder)
    return rows


def build(folder, number, start, count, words):
    """Pairs of the present policy's own answers to this round's prompts; the report of the build."""
    report = folder / "pairs" / "build_report.json"
    if report.exists() and read_json(report)["status"] == "done":
        return read_json(report)
    own = [f"model.path={start}", f"out={folder / 'pairs'}", f"build.prompts={folder / 'prompts.jsonl'}"]
    cfg = compose_tool(["mode=build", *words, *own])
    every, _ = read_prompts(None, check(compose(training_words(words))).data, None)
    first = (number - 1) * count
    chosen = [every[index % len(every)] for index in range(first, first + min(count, len(every)))]
    write_jsonl(folder / "prompts.jsonl", ({"prompt": prompt} for prompt in chosen))
    return build_pairs(cfg)


def learn(folder, start, words):
    """An ordinary run on the round's pairs, whose reference is what it starts from."""
    pairs = f"data.train={folder / 'pairs' / 'pairs.jsonl'}"
    return train(compose([*training_words(words), f"model.path={start}", pairs]), folder / "run")


def policy_of(run):
    """The folder of a run's policy, an adapter merged."""
    if not (run.model / "adapter_config.json").exists():
        return run.model
    if not run.export.exists():
        export_run(run, run.export, "auto", "original")
    return run.export


def training_words(words):
    own = (word for word in words if word.split("=")[0].split(".")[0] not in OF_BUILDING)
    return ["tracking=none", "callbacks.preview=[]", *own]


def measure(folder, policy, first, words):
    """Gold reward, where it is known, and reverse KL to the very first model, on fresh answers to held-out prompts."""
    file = folder / "against_the_first.json"
    if not file.exists():
        pairs = f"data.train={folder.parent / 'round-1' / 'pairs' / 'pairs.jsonl'}"  # the same prompts for all rounds
        settings = check(compose([*training_words(words), f"model.path={first}", pairs]))
        tokenizer, model = load_tokenizer(settings.model), settings.model.model_copy(update={"path": str(policy)})
        tuned = Tuned(place(load_reference(model)), tokenizer, SimpleNamespace(**settings.trl))
        reference = Reference(tuned, model=place(load_reference(settings.model)), is_start=False)
        prompts = distinct_prompts(read_data(settings, tokenizer).select)[: settings.callbacks.at_most("prompts")]
        length = settings.callbacks.at_most("max_new_tokens")
        with measuring(tuned, *reference.models):
            drift = Drift(reference, prompts, max_new_tokens=length, batch_size=64, cache_bytes=0)
            samples = drift.draw(tuned.model)
            found = drift_metrics("reverse", drift.reverse(samples), samples)
        if settings.data.gold:
            found |= GoldFigures(load_gold(settings.data.gold), tuned).reward(samples)
        write_json(file, found)
    return read_json(file)


def describe(number, report, result, found):
    return {
        "round": number,
        "prompts": report["prompts"]["in"],
        "pairs": report["pairs"],
        "kl_to_its_start": result.final[KL],
        "kl_to_the_first": found[KL],
        **{key: value for key, value in found.items() if key.startswith("gold/")},
    }


def show(rows, folder):
    columns = ("round", "prompts", "pairs", "gold reward", "95 %", "KL to its own start", "KL to the first model")
    table = Table(*columns, title="nats per answer, on held-out prompts", title_justify="left")
    for row in rows:
        counts = (f"{row[name]:,}" for name in ("round", "prompts", "pairs"))
        gold = [row.get(f"gold/reward{end}") for end in ("", "_low", "_high")]
        judged = ("–", "") if gold[0] is None else (f"{gold[0]:.2f}", f"[{gold[1]:.2f}, {gold[2]:.2f}]")
        table.add_row(*counts, *judged, f"{row['kl_to_its_start']:.2f}", f"{row['kl_to_the_first']:.2f}")
    console = Console(width=110)
    console.print(table)
    console.print(f"rounds: {folder}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main(sys.argv[1:])
