"""One run, from a composed config to a run directory: the page to read first.

cfg → check → tokenizer, rows → policy, reference → TRL's trainer with our callbacks → model, result.json
"""

import contextlib
import logging
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dpo_kit.config.compose import check
from dpo_kit.config.identity import origin, refuse_other_run
from dpo_kit.config.settings import Settings
from dpo_kit.errors import DpoKitError, TrainingError
from dpo_kit.model.load import load_tokenizer
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import write_json
from dpo_kit.run.lock import only_writer
from dpo_kit.run.processes import is_writer
from dpo_kit.run.quiet import phase, quiet_libraries
from dpo_kit.trainer.build import build_trainer
from dpo_kit.trainer.finish import Result, finish_run, write_failure
from dpo_kit.trainer.manifest import build_manifest, chosen_amount, keep_date, typed_command
from dpo_kit.trainer.measuring import add_callbacks, findings_before_training, spent
from dpo_kit.trainer.recorder import start_tracking
from dpo_kit.trainer.refusals import explain_stop
from dpo_kit.trainer.resume.signals import Interrupted
from dpo_kit.trainer.rows import prepare_data, report_data

log = logging.getLogger(__name__)


def train(cfg: DictConfig, run_dir: str | Path | None = None) -> Result:
    """Train as `cfg` says and leave a run directory; the same as `python -m dpo_kit` with the same config.

    `cfg` comes from `compose`; `run_dir` defaults to a time stamp under outputs/. A directory that holds a finished run
    of this config is read, not trained again; an unfinished one goes on from its newest whole checkpoint. Ctrl-C and
    SIGTERM save at the next step, then raise KeyboardInterrupt and SystemExit(143). Raises ConfigError, DataError,
    ModelError before training, TrainingError during and after it.
    """
    settings = check(cfg)
    run = RunDirectory(Path(run_dir or time.strftime("outputs/%Y%m%d-%H%M%S")))
    refuse_other_run(run, settings)
    if (ended := run.read_result()) and ended["status"] == "done":
        return Result.read(run.root)
    with only_writer(run.root) if is_writer() else contextlib.nullcontext():
        return _train(settings, run)


def _train(settings: Settings, run: RunDirectory) -> Result:
    began = time.time()
    quiet_libraries()
    tokenizer = load_tokenizer(settings.model)
    date = keep_date(run, tokenizer)
    with phase("reading the rows"):
        data = prepare_data(settings, tokenizer)
    manifest = build_manifest(settings, data, typed_command(), tokenizer, date, chosen_amount(run))
    checkpoint: Path | None = None
    of_earlier_start = (run.checkpoints, run.result, *run.record().values())
    if settings.resume not in ("auto", "never") or any(path.exists() for path in of_earlier_start):
        from dpo_kit.trainer.resume.go_on import begin_from, find_checkpoint

        checkpoint = find_checkpoint(settings, run, manifest)
        begin_from(run, checkpoint)  # not before: a start that is refused leaves what is there as it is
    if is_writer():
        write_json(run.manifest, manifest)
        report_data(data, run)
    tracker = start_tracking(settings, manifest["config"], run)
    opened: Any = contextlib.nullcontext()  # a judge of answers, where they are drawn while training
    try:
        if settings.judge is not None:
            from dpo_kit.trainer.online import open_judged_reward

            opened = open_judged_reward(settings.judge, settings.seed, run)
        with opened as reward:
            trainer = build_trainer(settings, data, tokenizer, run, reward, origin(manifest))
            add_callbacks(trainer, settings, data, run, tracker, began)
            findings = findings_before_training(trainer, len(data.train))
            seconds = {"train": run_trainer(trainer, run, checkpoint, manifest["command"])}
            seconds |= {"measuring": spent(trainer), "run": time.time() - began + trainer.seconds_before}
            judge, ceiling = reward.summary(trainer.accelerator) if reward else None, data.report.get("ceiling")
            result = finish_run(
                trainer, settings, run, tracker, seconds=seconds, ceiling=ceiling, judge=judge, early_findings=findings
            )
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk must not hide what went wrong
            if is_writer():
                write_failure(run, settings, error)
        if tracker:
            tracker.finish(exit_code=1)
        raise
    if tracker:
        tracker.finish()
    return result


def run_trainer(trainer: Any, run: RunDirectory, checkpoint: Path | None, command: str | None) -> float:
    """Train, from `checkpoint` where there is one; the seconds of all starts together.

    Raises KeyboardInterrupt or SystemExit where a signal stopped it, once what it had done is saved, and TrainingError
    where the disk is full.
    """
    started = time.time()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (DpoKitError, RecursionError):
        raise
    except Exception as error:
        raise explain_stop(error, trainer.state.global_step, run.root) from error
    except Interrupted:
        from dpo_kit.trainer.resume.go_on import how_to_go_on

        log.info("stopped after step %d; to go on: %s", trainer.state.global_step, how_to_go_on(run, command))
        raise trainer.stop.exception() from None
    if trainer.state.global_step == 0:
        raise TrainingError("the trainer took no step: see how many rows a step takes, and trl.num_train_epochs")
    return trainer.seconds_before + time.time() - started
