"""The regression gate: lm-evaluation-harness on the same samples by the policy and by its reference, compared in pairs.

The harness does the tasks, the prompts and the scoring through its Python API; here its scores are kept, paired and
judged. A task *failed* where the loss is larger than the limit and its 95 % interval lies above 0; it *passed* where
the whole interval of the loss lies within the limit; anything else is *inconclusive*, with the samples that would
settle it. Only a task that failed closes the gate: too few samples are no evidence against a run (and each further
task is one more chance of a false alarm, 2.5 % at most). A bootstrap knows nothing of what no sample showed, so that a
handful of samples settles nothing whatever its interval: see `LEAST_CHANGED` and `UNSEEN`.
"""

import gc
import importlib
import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from dpo_kit.config.limits import missing_package
from dpo_kit.errors import ConfigError, DataError, did_you_mean
from dpo_kit.evaluate.job import Candidate, Job
from dpo_kit.evaluate.options import Harness
from dpo_kit.evaluate.part import Found, Line, Note, Part, asked, line, models_of
from dpo_kit.run.files import cache_folder, read_json, write_json, write_jsonl
from dpo_kit.run.history import plain
from dpo_kit.run.journal import key_of
from dpo_kit.run.quiet import quiet_imports
from dpo_kit.run.statistics import needed_mean, paired_bootstrap

Outcome = Literal["failed", "inconclusive", "passed"]
WORST_FIRST: tuple[Outcome, ...] = ("failed", "inconclusive", "passed")
LEAST_CHANGED = 6  # samples: with fewer, not even all of them getting worse is beyond chance (2·½⁵ = .0625)
UNSEEN = -math.log(0.025)  # over n: the share of samples that may change for the worse though n of them did not
USUAL_METRICS = {
    "gsm8k": "exact_match,flexible-extract",  # the right number counts, in whatever form: form is ifeval's question
    "ifeval": "prompt_level_strict_acc",
    "arc_challenge": "acc_norm",
    "hellaswag": "acc_norm",
    "truthfulqa_mc2": "acc",
}
EXECUTES = ("humaneval", "mbpp")  # already loading these runs code, so that they are known by name
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """A task as it was asked for: its leaf tasks in the harness (a group has several), and the metric that counts.
    `contents` says, by leaf, what its scores depend on besides the model: its text, its samples, its shots.
    """

    name: str
    leaves: Mapping[str, Any]
    contents: Mapping[str, str]
    metric: str
    filter: str


@dataclass(frozen=True)
class TaskComparison:
    """Policy against reference on the same samples of one task; `low` and `high` are those of `difference`.
    `difference` is policy − reference, so that a loss is negative; where less is better, both scores are turned round
    first. `needed` is how many samples would settle a true difference of this size, where it is not settled.
    """

    task: str
    metric: str
    policy: float
    reference: float
    n: int
    difference: float
    low: float
    high: float
    verdict: Outcome
    needed: int | None = None


class Gate(Part):
    """The regression gate."""

    def check(self, job: Job) -> None:
        check_harness(asked(job.options.gate))

    def measure(self, job: Job) -> Found:
        return {"status": "done", **run_harness(*models_of(job), asked(job.options.gate), job.folder)}

    def headline(self, found: Found) -> Found:
        return {"gate": found["gate"]}

    def tell(self, found: Found) -> Iterator[Line | Note]:
        gate = found["gate"]
        yield f"regression gate (loss up to {gate['limit']:g})", gate["verdict"], ""
        for task in found["tasks"]:
            label = f"{task['task']}, {task['metric']}, {task['n']:,} samples: {task['verdict']}"
            yield line(label, task, "difference", "+.3f")
        if gate["passed"]:
            yield Note(f"Gate {gate['verdict']}: {gate['reason']}.")
        else:
            yield Note(f"REGRESSION GATE FAILED: {gate['reason']}", first=True)


def check_harness(options: Harness) -> None:
    """ConfigError for what is wrong with the options whatever the tasks hold; loads nothing."""
    for name in options.tasks:
        if name.startswith(EXECUTES):
            _refuse_code(name, options)
    if fault := missing_package("the gate (lm-evaluation-harness)", "lm_eval"):
        raise ConfigError(fault)
    for path in options.include_path:
        if not Path(path).expanduser().is_dir():
            raise ConfigError(f"include_path={path} is no folder: name the one that holds your task's .yaml file")
    for name in options.metrics:
        if name not in options.tasks:
            raise ConfigError(f"metrics names {name}, which is not among tasks={','.join(options.tasks)}")


def _refuse_code(name: str, options: Harness) -> None:
    if not options.allow_code:
        raise ConfigError(
            f"task {name} executes on this machine what the model writes: allow_code=true, in a container without "
            "network or anything to lose, if that is meant"
        )


def run_harness(policy: Candidate, reference: Candidate, options: Harness, folder: Path) -> Found:
    """The gate: {harness, tasks: [TaskComparison…], gate: {passed, worst_task, difference, low, high, limit, …}}. Each
    model's samples are written to `folder`/gate. What was scored before, by the same weights on the same samples, is
    not scored again. ConfigError where a task cannot be had, DataError where it cannot be paired.
    """
    check_harness(options)
    quiet_imports()
    with _harness_settings(options):
        from lm_eval.tasks import TaskManager

        folders = [str(Path(path).expanduser()) for path in options.include_path]
        # reading the harness's thousands of task files takes seconds
        manager = TaskManager(include_path=folders, include_defaults=False) if folders else None
        if manager is None or any(name not in manager.task_index for name in options.tasks):
            manager = TaskManager(include_path=folders or None)
        tasks = [_load_task(manager, name, options) for name in options.tasks]
        ours, theirs = (_score(each, manager, tasks, options, folder / "gate") for each in (policy, reference))
    compared = [_compare(task, ours, theirs, options) for task in tasks]
    gate = decide_gate(compared, options.max_regression)
    return {"harness": version("lm-eval"), "tasks": [asdict(each) for each in compared], "gate": gate}


@contextmanager
def _harness_settings(options: Harness) -> Iterator[None]:
    """The harness draws its progress on terminals only, says what went wrong only, and executes code where it may."""
    logger, variable = logging.getLogger("lm_eval"), "HF_ALLOW_CODE_EVAL"
    level, before = logger.level, os.environ.get(variable)
    logger.setLevel(logging.ERROR)
    if options.allow_code:
        os.environ[variable] = "1"
    try:
        with Path(os.devnull).open("w") as nowhere, redirect_stderr(sys.stderr if sys.stderr.isatty() else nowhere):
            yield
    finally:
        logger.setLevel(level)
        if options.allow_code:
            os.environ.pop(variable) if before is None else os.environ.update({variable: before})


def _load_task(manager: Any, name: str, options: Harness) -> Task:
    if name not in manager.task_index:
        meant = did_you_mean(name, manager.all_tasks, "; `lm-eval ls tasks` lists them.", count=3)
        raise ConfigError(
            f"tasks: lm-evaluation-harness {version('lm-eval')} has no task {name}{meant} For one of your own, name "
            "its folder: include_path=[…]"
        )
    try:
        leaves = manager.load([name])["tasks"]
    except ImportError as error:
        needed = f"task {name} needs a package that is not there ({error}): pip install {error.name}"
        raise ConfigError(needed) from error
    except OSError as error:
        config = manager.task_index[name].cfg or {}
        data = ", ".join(repr(config[key]) for key in ("dataset_path", "dataset_name") if config.get(key))
        fetch = f'python -c "from datasets import load_dataset; load_dataset({data})"'
        remedy = f"fetch it once where there is a network, with HF_HUB_OFFLINE=0: {fetch}; or " if data else ""
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "TRUE") else ""
        raise ConfigError(
            f"the data of task {name} are not on this machine and cannot be fetched{offline}: {remedy}set HF_HOME to a "
            f"cache that has them, or choose other tasks=. ({str(error).splitlines()[0]})"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"task {name} cannot be loaded: {str(error).splitlines()[0]}") from error
    if any(getattr(leaf, "UNSAFE_CODE", False) for leaf in leaves.values()):
        _refuse_code(name, options)
    metric, _, chosen = options.metrics.get(name, USUAL_METRICS.get(name, "")).partition(",")
    contents = {}
    for leaf_name, leaf in leaves.items():  # now, since the harness changes their config when it evaluates them
        text = re.sub(r" at 0x[0-9a-f]+", "", repr(sorted(leaf.dump_config().items(), key=str)))
        shots = leaf.config.num_fewshot if options.num_fewshot is None else options.num_fewshot
        samples = [doc for _, doc in leaf.doc_iterator(limit=options.limit)]
        shown = list(leaf.fewshot_docs() or []) if shots else []
        contents[leaf_name] = key_of(text, repr(samples), repr(shown), shots)
    return Task(name, leaves, contents, metric, chosen)


def _score(
    candidate: Candidate, manager: Any, tasks: Sequence[Task], options: Harness, folder: Path
) -> dict[str, Rows]:
    """The samples of every leaf task by its name, scored by `candidate`; from the cache where it has them."""
    leaves = {name: leaf for task in tasks for name, leaf in task.leaves.items()}
    templated = candidate.tokenizer().chat_template is not None
    chat = templated if options.chat == "auto" else options.chat
    if chat and not templated:
        raise ConfigError(f"chat=true, but the tokenizer of {candidate.name} has no chat template: use chat=auto")
    sampler = candidate.sampler()
    identity, cache = [version("lm-eval"), sampler.identity, options.seed, chat], cache_folder("harness")
    contents = {name: text for task in tasks for name, text in task.contents.items()}
    files = {name: cache / f"{key_of(identity, text)}.json" for name, text in contents.items()}
    if missing := [name for name, file in files.items() if not file.exists()]:
        from lm_eval.models.huggingface import HFLM

        weights, tokenizer = sampler.open()
        model = HFLM(pretrained=weights, tokenizer=tokenizer, batch_size=options.batch_size, backend="causal")
        for name in missing:
            write_json(files[name], _evaluate(model, manager, leaves[name], options, chat))
        del model, weights
        gc.collect()
    rows = {name: read_json(file) for name, file in files.items()}
    for name, samples in rows.items():
        write_jsonl(folder / f"{name}.{candidate.name}.jsonl", samples)
    return rows


def _evaluate(model: Any, manager: Any, leaf: Any, options: Harness, chat: bool) -> Rows:
    """The samples of a leaf task; metrics that are no number per sample (perplexity, BLEU) are left out."""
    evaluator: Any = importlib.import_module("lm_eval.evaluator")
    evaluator.get_git_commit_hash = lambda: None  # git complains on the terminal where there is no repository
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    found = evaluator.simple_evaluate(
        model=model, tasks=[leaf], task_manager=manager, num_fewshot=options.num_fewshot, limit=options.limit,
        apply_chat_template=chat, bootstrap_iters=0, confirm_run_unsafe_code=options.allow_code,
        **dict.fromkeys(seeds, options.seed),
    )  # fmt: skip
    rows = []
    for sample in found["samples"][leaf.task_name]:
        values = {name: plain(sample[name]) for name in sample["metrics"]}
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, bool | int | float)}
        rows.append(
            {"sample": sample["doc_id"], "document": sample["doc_hash"], "filter": sample["filter"],
             "prompt": str(sample["arguments"][0][0]), "target": str(sample["target"]),
             "response": str(sample["filtered_resps"]),
             "metrics": {name: value for name, value in numbers.items() if math.isfinite(value)}}
        )  # fmt: skip
    return rows


def _compare(task: Task, policy: Mapping[str, Rows], reference: Mapping[str, Rows], options: Harness) -> TaskComparison:
    first = policy[next(iter(task.leaves))]
    known = {f"{name},{row['filter']}" for row in first for name in row["metrics"]}
    metric = task.metric or next(iter(first[0]["metrics"]), "")
    chosen = task.filter or next((row["filter"] for row in first if metric in row["metrics"]), "")
    if f"{metric},{chosen}" not in known:
        raise DataError(
            f"task {task.name} has no number per sample for {metric or 'any metric'}, which a paired comparison needs; "
            f"choose one with metrics={{{task.name}: …}}: "
            + (", ".join(sorted(known)) or "it has none, so leave it out")
        )

    def scores(rows: Mapping[str, Rows]) -> dict[str, float]:
        """{sample: score}, more being better."""
        signs = {name: 1 if leaf.higher_is_better().get(metric, True) else -1 for name, leaf in task.leaves.items()}
        return {
            f"{name}/{row['sample']}/{row['document']}": sign * row["metrics"][metric]
            for name, sign in signs.items()
            for row in rows[name]
            if row["filter"] == chosen and metric in row["metrics"]
        }

    shown = metric if len({row["filter"] for row in first}) == 1 else f"{metric},{chosen}"
    return compare_task(task.name, shown, scores(policy), scores(reference), options.max_regression)


def compare_task(
    task: str, metric: str, policy: Mapping[str, float], reference: Mapping[str, float], limit: float
) -> TaskComparison:
    """The comparison of two {sample: score}, more being better. DataError where they are not of the same samples."""
    found = paired_bootstrap(policy, reference)
    if policy.keys() != reference.keys() or found is None:
        both = len(policy.keys() & reference.keys())
        raise DataError(
            f"{task}: a paired comparison needs the same samples, two at least: the policy has {len(policy)}, the "
            f"reference {len(reference)}, both have {both}. Evaluate them with the same version of the task"
        )
    gaps = [policy[name] - reference[name] for name in policy]
    verdict: Outcome = "inconclusive"
    needed = None
    if found.value < -limit and found.high < 0 and sum(gap != 0 for gap in gaps) >= LEAST_CHANGED:
        verdict = "failed"
    elif found.low >= -limit and (found.low > 0 or UNSEEN / found.count <= limit):
        verdict = "passed"
    elif found.value < -limit:
        needed = max(needed_mean(gaps) or 0, math.ceil(LEAST_CHANGED / -found.value))
    elif limit and (within := needed_mean([gap + limit for gap in gaps])) is not None:
        needed = max(within, math.ceil(UNSEEN / limit))  # how many would show that the loss stays within the limit
    means = fmean(policy.values()), fmean(reference.values())
    return TaskComparison(task, metric, *means, found.count, found.value, found.low, found.high, verdict, needed)


def decide_gate(tasks: Sequence[TaskComparison], limit: float) -> Found:
    """The gate over all tasks: {passed, verdict, worst_task, difference, low, high, limit, inconclusive, reason}. The
    worst task is the one of the worst verdict, and of those the one with the largest loss.
    """
    worst = min(tasks, key=lambda task: (WORST_FIRST.index(task.verdict), task.difference))
    more = f"about {worst.needed:,} samples would settle it" if worst.needed else "no number of samples settles that"
    reasons: dict[Outcome, str] = {
        "failed": f": a loss beyond chance, and above the limit of {limit:g}",
        "passed": f", the worst task: no loss above {limit:g} is left in any interval",
        "inconclusive": f": neither a loss nor that it stays within {limit:g} is shown; {more}",
    }
    seen = f"{worst.difference:+.3f} [{worst.low:+.3f}, {worst.high:+.3f}] on {worst.n} samples of {worst.task}"
    return {
        "passed": worst.verdict != "failed", "verdict": worst.verdict, "worst_task": worst.task,
        "difference": worst.difference, "low": worst.low, "high": worst.high, "limit": limit,
        "inconclusive": [task.task for task in tasks if task.verdict == "inconclusive"],
        "reason": seen + reasons[worst.verdict],
    }  # fmt: skip
