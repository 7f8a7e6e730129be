"""What an evaluation compares, from the command line to jobs: which policy, against what, on which held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pydantic
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_kit.config.compose import check, compose_unchecked
from dpo_kit.config.explain import JUDGES, describe_fault, explain, known_keys, unknown_key
from dpo_kit.config.places import locate
from dpo_kit.config.settings import Endpoint, Method, Model, Strict, Tracking
from dpo_kit.config.tools import refuse_foreign
from dpo_kit.errors import ConfigError, did_you_mean
from dpo_kit.evaluate.candidate import ADAPTER, Candidate, of_path, of_run
from dpo_kit.evaluate.options import Alpaca, Domain, Evaluate, Harness, MTBench, Split, WinRate
from dpo_kit.judge.server import refuse_silent
from dpo_kit.model.origin import refuse_unusable
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json
from dpo_kit.run.journal import key_of
from dpo_kit.run.redact import redact_argv
from dpo_kit.run.words import refuse_dashes
from dpo_kit.sweep.choice.runs import read_runs

OWN = tuple(Evaluate.model_fields)
OF_A_PART = ("gate", "alpaca_eval", "mt_bench", "domain")  # options that are nothing without their part
ONLY_WITH: dict[str, tuple[str, ...]] = {  # keys by their first part, and the parts of which one must be asked for
    **{name: (name,) for name in OF_A_PART},
    "win_rate": ("win_rate", "alpaca_eval", "mt_bench", "domain"),
    "judge": ("win_rate", "mt_bench"),
    "review": ("win_rate",),
}
GROUPS: dict[str, type[Strict]] = {
    "win_rate": WinRate, "gate": Harness, "alpaca_eval": Alpaca, "mt_bench": MTBench, "domain": Domain,
}  # fmt: skip
OF_THE_RUN = ("beta", "seed", "method", "model", "data", "trl", "callbacks")


@dataclass(frozen=True)
class Job:
    """One evaluation. `opponent` is the reference, another model, or a file of answers.

    `config` is that of a run (data, trl, seed, …); `beta` makes rewards of logratios and is None where it is not known
    or no such distance. What only this job needs is kept in `folder`; in `shared` what other jobs of a sweep need too.
    """

    policy: Candidate
    reference: Candidate
    opponent: Candidate | Path
    config: dict[str, Any]
    beta: float | None
    options: Evaluate
    split: Split
    folder: Path
    shared: Path
    run: RunDirectory | None
    tracking: Tracking
    words: tuple[str, ...]  # that were typed

    @property
    def method(self) -> Method:
        return Method(**self.config["method"])

    @property
    def opponent_name(self) -> str:
        return self.opponent.name if isinstance(self.opponent, Candidate) else str(self.opponent)

    def held_out(self) -> tuple[str, list[dict[str, Any]]]:
        """The kind (pairs, unary or prompts) and the rows of the split, read once for all jobs that share them."""
        from dpo_kit.trainer.held_out import read_held_out, refuse_other_rows

        parts = {name: self.config[name] for name in ("data", "trl", "seed", "method")}
        reader = self.reference if self.run else self.policy
        key = key_of(
            parts, reader.model.model_dump(mode="json"), reader.own_tokenizer and str(reader.tuned), self.split
        )
        if key not in _HELD_OUT:
            _HELD_OUT.clear()
            _HELD_OUT[key] = read_held_out(parts, self.method, reader.tokenizer(), self.split)
        kind, rows = _HELD_OUT[key]
        if self.run:
            refuse_other_rows(read_json(self.run.manifest), self.split, rows)
        return kind, rows


_HELD_OUT: dict[str, tuple[str, list[dict[str, Any]]]] = {}  # the rows that were read last


def plan(arguments: Sequence[str]) -> list[Job]:
    """One evaluation, or one for each finished run of a sweep. ConfigError, DataError, ModelError; loads no weights."""
    known = [*OWN, *(f"{group}.{name}" for group, model in GROUPS.items() for name in model.model_fields)]
    roots = {key.split(".")[0] for key in (*known, *known_keys(), "hydra")}
    refuse_dashes(arguments, arguments)
    for word in arguments:
        key, equals, _ = word.partition("=")
        if not equals:
            raise ConfigError(f"arguments are key=value, got {word}; did you mean run={word}?")
        name = key.lstrip("+~").partition("@")[0]
        root, nested, _ = name.partition(".")
        if root.split("/")[0] not in roots or (nested and root in GROUPS and name not in known):
            meant = did_you_mean(name, [*known, *roots], cutoff=0.5)
            raise ConfigError(f"unknown key {key}{meant}" if meant else unknown_key(key, known))
    cfg = compose_unchecked(["+tool=evaluate", *arguments])
    if cfg.out:
        refuse_foreign("out", str(cfg.out))
    given = [mode for mode in ("run", "sweep", "policy") if cfg[mode]]
    if len(given) != 1:
        got = " and ".join(given) or "none of them"
        raise ConfigError(f"say one of run=DIR, sweep=DIR and policy=… reference=…, got {got}")
    if cfg.policy:
        return [_plan_models(cfg, arguments)]
    if cfg.reference:
        raise ConfigError(
            f"reference={cfg.reference} goes with policy=: that of a run is known; did you mean against=?"
        )
    folder = str(locate(given[0], cfg[given[0]]))
    for word in arguments:
        if _root(word) not in (*OWN, "tracking"):
            raise ConfigError(
                f"{word}: this is taken from the manifest of {folder}. To measure its policy in another way: "
                f"policy={folder}/model reference=… {word}"
            )
    if cfg.run:
        return [_plan_run(Path(folder), cfg, arguments)]
    if cfg.out:
        raise ConfigError(f"out={cfg.out} goes with run= or policy=: those of a sweep are kept in each run directory")
    finished = [run.root for run in read_runs(folder) if run.finished]
    if not finished:
        raise ConfigError(f"sweep={folder} holds no run that has ended well: give the command of the sweep again")
    return [_plan_run(run, cfg, arguments, sweep=Path(folder)) for run in finished]


def _root(word: str) -> str:
    """The first part of the key of an override."""
    return word.lstrip("+~").partition("=")[0].split(".")[0]


def _plan_run(folder: Path, cfg: DictConfig, arguments: Sequence[str], sweep: Path | None = None) -> Job:
    run = RunDirectory(folder)
    policy, config = of_run(folder)
    cfg = cfg.copy()
    OmegaConf.set_struct(cfg, False)
    for name in OF_THE_RUN:
        cfg[name] = config[name]
    cfg.choose = read_json(run.manifest).get("choose") or cfg.choose
    options = _options(cfg, arguments)
    opponent = _opponent(options.against, policy.start, policy.model)
    if options.split == "all":
        raise ConfigError("split=all is for models made elsewhere (policy=): a run has trained on some of its rows")
    split: Split = options.split or ("select" if sweep else "test")
    place = run.evaluation
    if (place / "result.json").exists() and read_json(place / "result.json").get("split", split) != split:
        place /= split  # beside the other split, which a choice may rest on
    if options.against:
        name = opponent.name if isinstance(opponent, Candidate) else opponent.stem
        place /= f"against-{''.join(c if c.isalnum() or c in '.-_' else '_' for c in name).strip('._')}"
    place = Path(options.out) if options.out else place
    beta = config["beta"] if Method(**config["method"]).implicit_reward else None
    shared, tracking = sweep / "evaluation" if sweep else place, Tracking(**_plain(cfg.tracking))
    words = tuple(redact_argv(arguments))
    return Job(
        policy=policy, reference=policy.start, opponent=opponent, config=config, beta=beta, options=options,
        split=split, folder=place, shared=shared, run=run, tracking=tracking, words=words,
    )  # fmt: skip


def _plan_models(cfg: DictConfig, arguments: Sequence[str]) -> Job:
    train = None if OmegaConf.is_missing(cfg.data, "train") else cfg.data.train
    alone = cfg.data.eval is not None and train in (None, cfg.data.eval)  # held-out rows, and nothing to train on
    if alone:
        cfg = cfg.copy()
        cfg.data.train = cfg.data.eval
    settings = check(OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in OWN]), trains=False)
    refuse_unusable(settings)
    options = _options(cfg, arguments)
    policy = of_path("policy", str(options.policy), settings.model)
    if options.reference is None and policy.tuned is None:
        raise ConfigError("reference is missing: add reference=…, the folder or hub id that policy was tuned from")
    reference = of_path("reference", options.reference, settings.model) if options.reference else policy.start
    told = any(word.startswith("beta=") for word in arguments)  # else nobody knows what the policy was trained with
    config = settings.model_dump(mode="json")
    identity = [policy.name, reference.name, str(options.against), config["data"], options.win_rate.model_dump()]
    folder = Path(options.out or f"outputs/evaluation-{key_of(identity)[:8]}")
    opponent = _opponent(options.against, reference, settings.model)
    beta = settings.beta if told and settings.method.implicit_reward else None
    split: Split = options.split or ("all" if alone else "test")
    words = tuple(redact_argv(arguments))
    return Job(
        policy=policy, reference=reference, opponent=opponent, config=config, beta=beta, options=options, split=split,
        folder=folder, shared=folder, run=None, tracking=settings.tracking, words=words,
    )  # fmt: skip


def share_template(job: Job) -> Job:
    """`job`, of models made elsewhere, with one chat template for both where one of them has one and the other none."""
    policy, reference = job.policy, job.reference
    if job.run or policy.model.chat_template:
        return job
    mine, theirs = (candidate.tokenizer().chat_template for candidate in (policy, reference))
    if mine and not theirs:
        reference = reference.with_template(mine)
    elif theirs and not mine:
        policy = policy.with_template(theirs)
    opponent = reference if job.opponent == job.reference else job.opponent
    return replace(job, policy=policy, reference=reference, opponent=opponent)


def refuse_silent_servers(job: Job) -> None:
    """ConfigError for servers that do not answer, unless all may have been asked by an earlier start."""
    if "win_rate" not in job.options.parts or (job.shared / "judgements.jsonl").exists():
        return
    wanted = job.options.win_rate
    servers = (job.options.judge, wanted.policy_server, wanted.opponent_server)
    for key, server in zip(("judge", "win_rate.policy_server", "win_rate.opponent_server"), servers, strict=True):
        if isinstance(server, Endpoint):
            refuse_silent(key, server)


def _opponent(against: str | None, reference: Candidate, model: Model) -> Candidate | Path:
    if against is None:
        return reference
    path = locate("against", against)
    if path.is_file() or path.suffix in (".jsonl", ".json", ".csv"):
        return path
    if RunDirectory(path).manifest.exists():
        return of_run(path)[0]
    if path.is_dir() and not (path / "config.json").exists() and not (path / ADAPTER).exists():
        raise ConfigError(
            f"against={against} is neither a run directory nor a model nor a file of answers: name one of these"
        )
    return of_path("against", against, model)


def _options(cfg: DictConfig, arguments: Sequence[str]) -> Evaluate:
    parts = [cfg.parts] if isinstance(cfg.parts, str) else list(cfg.parts)
    unasked = [name for name in OF_A_PART if name not in parts]
    for word in arguments:
        needed = ONLY_WITH.get(_root(word), parts)
        if not {*needed} & {*parts}:
            asked = ",".join([*parts, needed[0]])
            raise ConfigError(f"{word} does nothing without the part {needed[0]}: add it, parts=[{asked}]")
    if cfg.data.gold is None and not any(_root(word) == "judge" for word in arguments):
        unasked.append("judge")  # the default one needs what these data do not have
    try:
        values: dict[str, Any] = {name: None if name in unasked else _plain(cfg[name]) for name in OWN}
        return Evaluate(**values)
    except OmegaConfBaseException as error:
        raise explain(error) from error
    except pydantic.ValidationError as error:
        of_judges = [f"judge.{name}" for kind in JUDGES for name in kind.model_fields]
        raise ConfigError("\n".join(describe_fault(fault, of_judges) for fault in error.errors())) from error


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True, throw_on_missing=True) if OmegaConf.is_config(value) else value
