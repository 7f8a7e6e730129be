"""What an evaluation compares, from the command line to jobs: which policy, against what, on which held-out rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dpo_kit.config.compose import check, compose_unchecked, resolve, typed
from dpo_kit.config.explain import JUDGES, known_keys, unknown_key
from dpo_kit.config.places import locate, weights_faults
from dpo_kit.config.recall import recall_config
from dpo_kit.config.settings import Endpoint, Method, Model, Strict, Tracking
from dpo_kit.config.tools import refuse_foreign
from dpo_kit.errors import ConfigError, did_you_mean
from dpo_kit.evaluate.options import Alpaca, Domain, Evaluate, Harness, MTBench, Split, WinRate
from dpo_kit.judge.answers import LocalModel
from dpo_kit.judge.server import refuse_silent
from dpo_kit.model.adapter_origin import find_base
from dpo_kit.model.origin import ADAPTER, find_start, has_tokenizer, refuse_unusable
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import hash_weights, read_json
from dpo_kit.run.journal import key_of
from dpo_kit.run.other_tools import refuse_dashes
from dpo_kit.run.redact import redact_argv
from dpo_kit.sweep.choice.runs import read_runs

OWN = tuple(Evaluate.model_fields)
OF_A_PART: dict[str, type[Strict]] = {"gate": Harness, "alpaca_eval": Alpaca, "mt_bench": MTBench, "domain": Domain}
GROUPS: dict[str, type[Strict]] = {"win_rate": WinRate, **OF_A_PART}  # those are nothing without their part
ONLY_WITH: dict[str, tuple[str, ...]] = {  # keys by their first part, and the parts of which one must be asked for
    **{name: (name,) for name in OF_A_PART},
    "win_rate": ("win_rate", "alpaca_eval", "mt_bench", "domain"),
    "judge": ("win_rate", "mt_bench"),
    "review": ("win_rate",),
}
OF_THE_RUN = ("beta", "seed", "method", "model", "data", "trl", "callbacks")


@dataclass(frozen=True)
class Candidate:
    """A policy, its reference or any other model: what it is called, how it is loaded, and what a run made of it.
    `tuned` is the folder that a run left (whole weights, or an adapter on `model.path`); None: the reference of
    `model`, which is `model.path` itself unless `model.reference` names another.
    """

    name: str
    model: Model
    tuned: Path | None = None
    own_tokenizer: bool = False  # the folder `tuned` has one, with its template

    def load(self) -> Any:
        """The weights, in evaluation mode. ModelError where they cannot be loaded."""
        from dpo_kit.model.load import load_reference, load_tuned

        return load_tuned(self.model, self.tuned).eval() if self.tuned else load_reference(self.model)

    def tokenizer(self) -> Any:
        """The tokenizer of `model.path`, or the adapter's own; it reads control tokens in messages as text."""
        from dpo_kit.model.load import load_tokenizer

        own = {"path": str(self.tuned), "revision": None} if self.own_tokenizer else {}
        return load_tokenizer(self.model.model_copy(update=own))

    @property
    def start(self) -> "Candidate":
        """What this policy was tuned from."""
        return Candidate("its reference", self.model)

    def sampler(self) -> LocalModel:
        """This candidate as one whose answers are drawn here; known by its weights, wherever they lie."""
        from dpo_kit.model.turns import written_today

        if self.tuned is None:
            start, base = self.model.reference or self.model.path, find_start(self.model).base.path
            folders = [start] if self.model.reference or base == start else [base, start]
        elif self.model.tuning == "full":
            folders = [str(self.tuned)]
        else:
            folders = [find_start(self.model).base.path, str(self.tuned)]
        weights = [hash_weights(path) or f"{path}@{self.model.revision}" for path in folders]
        loaded = [self.model.dtype, self.model.quantization if self.model.tuning == "qlora" else None]
        identity = ["candidate", *weights, *loaded, *written_today(self.tokenizer())]
        return LocalModel(self.name, identity, self._open, wrap=False)

    def _open(self) -> tuple[Any, Any]:
        from dpo_kit.model.hardware import training_precision
        from dpo_kit.trainer.held_out import place

        fast = {"dtype": training_precision() if self.model.dtype == "auto" else self.model.dtype}
        return place(replace(self, model=self.model.model_copy(update=fast)).load()), self.tokenizer()


def of_run(folder: Path) -> tuple[Candidate, dict[str, Any]]:
    """The policy that a finished run left, and the config of the run. ConfigError where there is none."""
    run = RunDirectory(folder)
    manifest, _ = run.read_finished()
    config = recall_config(manifest)
    policy = Candidate(folder.resolve().name, Model(**config["model"]), run.model)
    if manifest.get("template_date"):
        from dpo_kit.trainer.manifest import keep_date

        keep_date(run, policy.tokenizer())
    return policy, config


def of_path(key: str, path: str, model: Model) -> Candidate:
    """A model made by any tool (folder, hub id, adapter), loaded as `model` says. ConfigError for what is none."""
    folder = locate(key, path)
    if faults := [*weights_faults(key, path)]:
        raise ConfigError(faults[0])
    if RunDirectory(folder).manifest.exists():
        raise ConfigError(f"{path} is a run directory: say run={path}, or name its policy, {folder / 'model'}")
    own = {"reference": None, "revision": model.revision if path == model.path else None}
    if (folder / ADAPTER).exists():
        base = find_base(folder, read_json(folder / ADAPTER))
        based = model.model_copy(update=own | {"path": base, "tuning": "lora"})
        return Candidate(path, based, folder, own_tokenizer=has_tokenizer(str(folder), None))
    return Candidate(path, model.model_copy(update=own | {"path": path, "tuning": "full"}))


@dataclass(frozen=True, kw_only=True)
class Job:
    """One evaluation. `opponent` is the reference, another model, or a file of answers. `config` is that of a run
    (data, trl, seed, …); `beta` makes rewards of logratios and is None where it is not known or no such distance. What
    only this job needs is kept in `folder`; in `shared` what other jobs of a sweep need too.
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
    run: RunDirectory | None = None
    step: int | None = None  # of the run, whose weights then are the policy; None: its last ones
    tracking: Tracking
    words: tuple[str, ...]  # that were typed

    @property
    def method(self) -> Method:
        return Method(**self.config["method"])

    @property
    def opponent_name(self) -> str:
        return self.opponent.name if isinstance(self.opponent, Candidate) else str(self.opponent)

    @property
    def reader(self) -> Candidate:
        """Whose tokenizer reads the held-out rows."""
        return self.reference if self.run else self.policy

    def held_out(self) -> tuple[str, list[dict[str, Any]]]:
        """The kind (pairs, unary or prompts) and the rows of the split, read once for all jobs that share them."""
        from dpo_kit.trainer.held_out import read_held_out, refuse_other_rows

        parts = {name: self.config[name] for name in ("data", "trl", "seed", "method")}
        model, own = self.reader.model.model_dump(mode="json"), self.reader.own_tokenizer and str(self.reader.tuned)
        key = key_of(parts, model, own, self.split)
        if key not in _HELD_OUT:
            _HELD_OUT.clear()
            _HELD_OUT[key] = read_held_out(parts, self.method, self.reader.tokenizer(), self.split)
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
    if cfg.step is not None and not cfg.run:
        raise ConfigError(f"step={cfg.step} goes with run=DIR: it is the policy that the run kept after so many steps")
    if cfg.policy:
        return [_plan_models(cfg, arguments)]
    if cfg.reference:
        raise ConfigError(
            f"reference={cfg.reference} goes with policy=: that of a run is known; did you mean against=?"
        )
    folder = locate(given[0], cfg[given[0]])
    for word in arguments:
        if _root(word) not in (*OWN, "tracking"):
            raise ConfigError(
                f"{word}: this is taken from the manifest of {folder}. To measure its policy in another way: "
                f"policy={folder}/model reference=… {word}"
            )
    if cfg.run:
        return [_plan_run(folder, cfg, arguments, cfg.step)]
    if cfg.out:
        raise ConfigError(f"out={cfg.out} goes with run= or policy=: those of a sweep are kept in each run directory")
    finished = [run for run in read_runs(str(folder)) if run.finished]
    if not finished:
        raise ConfigError(f"sweep={folder} holds no run that has ended well: give the command of the sweep again")
    # what was kept on the way of a run is judged here unless a known truth judged it then; a gate is for all
    gated = "gate" in cfg.parts
    ways = [run.way() if gated or not (run.config.get("data") or {}).get("gold") else [run] for run in finished]
    return [_plan_run(arm.root, cfg, arguments, arm.step, sweep=folder) for way in ways for arm in way]


def _root(word: str) -> str:
    """The first part of the key of an override."""
    return word.lstrip("+~").partition("=")[0].split(".")[0]


def _plan_run(
    folder: Path, cfg: DictConfig, arguments: Sequence[str], step: int | None, sweep: Path | None = None
) -> Job:
    run = RunDirectory(folder)
    policy, config = of_run(folder)
    if step is not None:
        policy = replace(policy, name=f"{policy.name}-step-{step}", tuned=run.at(step).model)
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
    place = run.evaluation_of(step)
    if (place / "result.json").exists() and read_json(place / "result.json").get("split", split) != split:
        place /= split  # beside the other split, which a choice may rest on
    if options.against:
        name = opponent.name if isinstance(opponent, Candidate) else opponent.stem
        place /= f"against-{''.join(c if c.isalnum() or c in '.-_' else '_' for c in name).strip('._')}"
    place = Path(options.out) if options.out else place
    return Job(
        policy=policy, reference=policy.start, opponent=opponent, config=config, options=options, split=split,
        beta=config["beta"] if Method(**config["method"]).implicit_reward else None,
        folder=place, shared=sweep / "evaluation" if sweep else place, run=run, step=step,
        tracking=typed(Tracking, resolve(cfg, ["tracking"])["tracking"]), words=tuple(redact_argv(arguments)),
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
    asked = options.win_rate.model_dump(exclude={"stop_early", "within", "judge_accuracy"})  # these change no answer
    identity = [policy.name, reference.name, str(options.against), config["data"], asked]
    folder = Path(options.out or f"outputs/evaluation-{key_of(identity)[:8]}")
    return Job(
        policy=policy, reference=reference, opponent=_opponent(options.against, reference, settings.model),
        config=config, beta=settings.beta if told and settings.method.implicit_reward else None, options=options,
        split=options.split or ("all" if alone else "test"), folder=folder, shared=folder,
        tracking=settings.tracking, words=tuple(redact_argv(arguments)),
    )  # fmt: skip


def share_template(job: Job) -> Job:
    """`job`, of models made elsewhere, with one chat template for both where one of them has one and the other none."""
    if job.run or job.policy.model.chat_template:
        return job
    both = (job.policy, job.reference)
    mine, theirs = (candidate.tokenizer().chat_template for candidate in both)
    template = {"chat_template": mine or theirs}
    policy, reference = (
        candidate if own else replace(candidate, model=candidate.model.model_copy(update=template))
        for candidate, own in zip(both, (mine, theirs), strict=True)
    )
    opponent = reference if job.opponent == job.reference else job.opponent
    return replace(job, policy=policy, reference=reference, opponent=opponent)


def refuse_silent_servers(job: Job) -> None:
    """ConfigError for servers that do not answer, unless all may have been asked by an earlier start."""
    if "win_rate" not in job.options.parts or (job.shared / "judgements.jsonl").exists():
        return
    of_rate = {f"win_rate.{name}": getattr(job.options.win_rate, name) for name in ("policy_server", "opponent_server")}
    for key, server in {"judge": job.options.judge, **of_rate}.items():
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
    roots = {word: _root(word) for word in arguments}
    unasked = [name for name in OF_A_PART if name not in parts]
    for word, root in roots.items():
        needed = ONLY_WITH.get(root, parts)
        if not {*needed} & {*parts}:
            asked = ",".join([*parts, needed[0]])
            raise ConfigError(f"{word} does nothing without the part {needed[0]}: add it, parts=[{asked}]")
    if cfg.data.gold is None and "judge" not in roots.values():
        unasked.append("judge")  # the default one needs what these data do not have
    values = dict.fromkeys(OWN) | resolve(cfg, [name for name in OWN if name not in unasked])
    return typed(Evaluate, values, [f"judge.{name}" for kind in JUDGES for name in kind.model_fields])
