"""A TRL trainer that loses nothing: one mixin before any of them, full or LoRA, with or without a reference pass.

    trainer = with_mixins(trl.DPOTrainer, Safekeeping, kept=Kept(origin=…, record=…, pair_ids=…))(model=…, args=…)

Its checkpoints are complete or absent, hold all that a resumed run needs to equal one that was never stopped, and are
finished by a thread beside the next steps. Asked to stop, it saves; it stops before a step that is not finite.
"""

import contextlib
import dataclasses
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dpo_kit.errors import ConfigError, TrainingError
from dpo_kit.model.batches import random_states, set_random_states
from dpo_kit.trainer.resume import whole_or_absent
from dpo_kit.trainer.resume.carried_state import carry
from dpo_kit.trainer.resume.signals import Interrupted, StopRequest, catch_signals

Base: Any = object  # in use, a trainer follows in the method resolution order
SAVING_SHARE = 0.05  # of the time, which saving may take where its cadence was left open
OPTIMIZER_VALUES = 2  # Adam keeps two values beside each trained weight


@dataclasses.dataclass
class Moment:
    """Where training stood: what is saved where the work that began then is not finished."""

    carried: dict[str, Any]
    random: dict[str, Any]
    record: dict[str, int]  # bytes of each file of the record
    logged: int  # entries of the trainer's own history
    due: dict[str, Any]  # what was still to be done at this step


@dataclasses.dataclass(frozen=True)
class Kept:
    """What belongs to a run's checkpoints beside TRL's own."""

    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what a run must share to go on from one
    record: Callable[[], Mapping[str, Path]] = dict  # the files that grow with the run, by name
    pair_ids: Sequence[str] = ()  # the names of the training rows
    spare_saves: bool = False  # leave out those that are due while saving would take over a twentieth of the time


def refuse_non_finite(model: Any, where: str) -> None:
    """TrainingError where a weight that is trained is NaN or infinite: such a model is never saved."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if torch.nn.utils.get_total_norm(list(weights.values())).isfinite():  # one pass, one wait for the device
        return
    if broken := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise TrainingError(
            f"{len(broken)} weights are not finite {where} ({broken[0]}): nothing of it is saved. Lower "
            "trl.learning_rate, or look for rows whose answers are cut away in data_report.json"
        )


class Safekeeping(Base):
    """Mixin before a TRL trainer; see the head of this file."""

    kept = Kept()
    control: Any
    seconds_before = _save_seconds = _saved_at = 0.0
    checkpoint_bytes = 0
    kept_models = 0  # on the way, beside the last one
    _saved_step: int | None = None
    _boundary: int | None = None
    _at_epoch_end = False
    _checkpoint: Any = None
    _moment: Moment | None = None
    _resumed: dict[str, Any] | None = None
    _random_after: dict[str, Any] | None = None
    _aside: Path | None = None
    _finishing: threading.Thread | None = None
    _fault: BaseException | None = None
    _logged: Mapping[str, Any] = {}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stop = StopRequest()  # of the present `train`
        self._batches: list[tuple[torch.Tensor, Any]] = []
        self._since = time.time()

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train, from a verified checkpoint where one is given. Raises Interrupted, TrainingError, ConfigError."""
        self._since, self.stop = time.time(), StopRequest()
        if resume_from_checkpoint:
            self._checkpoint = resume_from_checkpoint
            self._resumed = torch.load(Path(resume_from_checkpoint) / self._state_file, weights_only=True)
            self.seconds_before = self._resumed["seconds"]
            self._saved_step = self._resumed["step"]
        self._refuse_small_disk()
        with catch_signals(self.stop):
            try:
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
                if self.stop.signal is not None:  # it came when nothing was left to do
                    raise Interrupted
                return output
            except Interrupted:
                self.stop.may_leave = False
                # what the last complete checkpoint does not have: the moment before the work that was left
                moment, step = self._moment, self.state.global_step
                if step > 0 and self._saved_step != step and moment is not None:
                    set_random_states(moment.random)
                    del self.state.log_history[moment.logged :]
                    self._save_checkpoint(self.model_wrapped, None)
                self._finish_saving()
                raise
            except BaseException as error:
                if not (isinstance(error, KeyboardInterrupt) and self.stop.signal):  # a second Ctrl-C waits for nothing
                    self._finish_saving(quietly=True)
                raise

    def _run_epoch(self, **given: Any) -> None:
        names = ("model", "trial", "epoch", "ignore_keys_for_eval", "start_time")
        self._catch_up(*(given[name] for name in names))
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            # a run that is resumed at its last step would take one more in the middle of an epoch
            self.control.should_training_stop = True
            return
        self.stop.may_leave, self.stop.step = False, self.state.global_step + 1
        super()._run_epoch(**given)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        self._catch_up(self.model_wrapped, trial, self.state.epoch, None, start_time)
        self._finish_saving()
        with self._may_be_left():
            return super()._finalize_training(trial, num_train_samples, start_time - self.seconds_before)

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One batch, remembered until its gradient was looked at."""
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._batches.append((loss, inputs))
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The last thing before the optimizer's step: TrainingError where loss or gradient is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        batches, self._batches = self._batches, []
        values = [loss.detach().float().reshape(()) for loss, _ in batches]
        if norm is not None and self.accelerator.scaler is None:  # a scaler skips steps of infinite gradient by itself
            device = values[0].device if values else None
            values.append(torch.as_tensor(norm, dtype=torch.float32, device=device))
        if values and not torch.stack(values).isfinite().all():  # one wait for the device
            self._finish_saving(quietly=True)
            from dpo_kit.trainer.resume.which_rows import describe_step

            what = describe_step(self, batches, norm, self.kept.pair_ids)
            raise TrainingError(f"{what} Last good checkpoint: {self._newest()}")
        return norm

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        step = self.state.global_step
        self._at_epoch_end = step == self._boundary  # called a second time at a step, for the epoch that it ends
        self._boundary = step
        self._logged = {"grad_norm": grad_norm, "learning_rate": kwargs.get("learning_rate")}
        if self.control.should_save and self.kept.spare_saves and not self.args.load_best_model_at_end:
            # the last one took seconds, and too few have passed since for another one
            dear = self._save_seconds > 1 and time.time() - self._saved_at < self._save_seconds / SAVING_SHARE
            if step < self.state.max_steps and self._any_process(dear):
                self.control.should_save = False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        # Each process has its own moment of the signal: all leave at the step at which the first one has seen it
        if not self._epoch_end_follows and self._any_process(self.stop.signal is not None):
            if self._saved_step != step:
                self._save_checkpoint(model, trial)
            raise Interrupted
        self.stop.step = step + 1

    @property
    def _epoch_end_follows(self) -> bool:
        """Whether what is done at the end of an epoch comes right after the present end of a step."""
        last = self.control.should_training_stop or float(self.state.epoch or 0.5).is_integer()
        return last and not self._at_epoch_end

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        if skip_scheduler and self.state.global_step > 0:  # eval_on_start: the first start has done it
            return {}
        with self._may_be_left(evaluate=True, save=self.control.should_save):
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        self._moment = None
        return metrics

    @contextlib.contextmanager
    def _may_be_left(self, **due: bool) -> Iterator[None]:
        """A process that is alone may leave what is inside: the moment before is saved (others would wait for it)."""
        self._moment, step = self._now(**due), self.state.global_step
        self.stop.step = None if self._saved_step == step else step or None
        with self.stop.leaving_allowed() if self.args.world_size == 1 else contextlib.nullcontext():
            yield

    def _any_process(self, flag: bool) -> bool:
        if self.args.world_size == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(int(flag), device=self.args.device), "sum").item())

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Stock saving into a folder aside; a thread makes it count while training goes on."""
        started = time.time()
        self._finish_saving()
        moment = self._moment or self._now()
        step, root = self.state.global_step, Path(self._get_output_dir(trial))
        aside = root / f"{whole_or_absent.SAVING}-checkpoint-{step}"
        written, final = aside / f"checkpoint-{step}", whole_or_absent.folder_of(root, step)
        if self.is_world_process_zero():
            shutil.rmtree(aside, ignore_errors=True)
            refuse_non_finite(self.model, f"at step {step}")
            root.mkdir(parents=True, exist_ok=True)
            whole_or_absent.refuse_full_disk(root, self.checkpoint_bytes, f"the checkpoint of step {step}")
        self.accelerator.wait_for_everyone()
        try:
            self._aside = aside
            super()._save_checkpoint(model, trial)
            self._aside = None
            best = self.state.best_model_checkpoint
            if best is not None and Path(best).is_relative_to(aside):  # under the name that it will have
                self.state.best_model_checkpoint = str(root / Path(best).name)
                if self.args.should_save:
                    self.state.save_to_json(str(written / "trainer_state.json"))
            self._save_own(written, moment)
        except BaseException as error:  # what is half written goes
            self._aside = None
            shutil.rmtree(aside, ignore_errors=True)
            if isinstance(error, Exception):
                raise self._not_saved(step, error) from error
            raise
        self.accelerator.wait_for_everyone()
        self._saved_step, self._saved_at = step, time.time()
        self._save_seconds = self._saved_at - started
        if self.args.should_save:
            self._complete(written, final)
        if self.args.push_to_hub:
            self._finish_saving()
            self._push_from_checkpoint(str(final))

    def _get_output_dir(self, trial: Any) -> str:
        """Where transformers writes and rotates checkpoints: while one is saved, a folder with nothing to rotate."""
        return str(self._aside) if self._aside is not None else super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._aside is None:  # not before it is complete
            super()._push_from_checkpoint(checkpoint_folder)

    def _not_saved(self, step: int, error: BaseException) -> TrainingError:
        root = Path(self.args.output_dir)
        free = shutil.disk_usage(root).free / 1e9
        return TrainingError(
            f"the checkpoint of step {step} could not be written ({type(error).__name__}: {error}); {free:.2f} GB are "
            f"free on its disk. Last good checkpoint: {self._newest()}; the same command goes on from there"
        )

    @property
    def _state_file(self) -> str:
        """Each process has its own sums and averages."""
        rank = self.args.process_index
        return f"{whole_or_absent.STATE}-{rank}.pt" if rank else f"{whole_or_absent.STATE}.pt"

    def _save_own(self, written: Path, moment: Moment) -> None:
        own = {"carried": moment.carried, "due": moment.due, "step": self.state.global_step}
        torch.save(own | {"seconds": self.seconds_before + time.time() - self._since}, written / self._state_file)
        files = self.kept.record() if self.args.should_save else {}
        for name in files.keys() & moment.record.keys():
            target = written / whole_or_absent.RECORD / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with files[name].open("rb") as file:
                target.write_bytes(file.read(moment.record[name]))

    def _complete(self, written: Path, final: Path) -> None:
        step, keep, best = self.state.global_step, self.args.save_total_limit, self.state.best_model_checkpoint
        facts = {"step": step, "origin": self.kept.origin}

        def work() -> None:
            try:
                self.checkpoint_bytes = sum(each.stat().st_size for each in written.rglob("*") if each.is_file())
                whole_or_absent.complete(written, final, facts)
                written.parent.rmdir()
                whole_or_absent.rotate(final.parent, keep, best)
            except BaseException as error:
                shutil.rmtree(written.parent, ignore_errors=True)
                self._fault = self._not_saved(step, error)

        self._finishing = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._finishing.start()

    def _finish_saving(self, quietly: bool = False) -> None:
        """Wait until the last checkpoint is complete. TrainingError where it could not be made so."""
        if self._finishing is not None:
            self._finishing.join()
            self._finishing = None
        fault, self._fault = self._fault, None
        if fault is not None and not quietly:
            raise fault

    def _newest(self) -> Path | str:
        from dpo_kit.trainer.resume.go_on import find_fault

        paths = whole_or_absent.list_checkpoints(Path(self.args.output_dir))
        return next((path for path in paths if not find_fault(path)), "none")

    def _refuse_small_disk(self) -> None:
        """ConfigError where model and checkpoints will not fit; an estimate from the weights, until one is written."""
        model = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        self.checkpoint_bytes = (1 + OPTIMIZER_VALUES) * model
        root = Path(self.args.output_dir)
        root.mkdir(parents=True, exist_ok=True)
        there, more = len(whole_or_absent.list_checkpoints(root)), 0
        if self.args.save_strategy != "no":
            more = max(0, (self.args.save_total_limit or 1) - there) + 1  # one more while the oldest is still there
        models = "the model" + (f", and {self.kept_models} on the way" if self.kept_models else "")
        what = f"this run ({more} checkpoints of {self.checkpoint_bytes / 1e9:.2f} GB and {models})"
        needed = (1 + self.kept_models) * model + more * self.checkpoint_bytes
        whole_or_absent.refuse_full_disk(root, needed, what, ConfigError)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._same_dtypes():
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with self._same_dtypes():
            super()._load_best_model()

    @contextlib.contextmanager
    def _same_dtypes(self) -> Iterator[None]:
        """After loading, each weight in the dtype that it had: PEFT widens adapters that TRL trains in bfloat16."""
        before = {name: weight.dtype for name, weight in self.model.named_parameters()}
        yield
        for name, weight in self.model.named_parameters():
            if weight.dtype != before[name]:
                weight.data = weight.data.to(before[name])

    def _now(self, *, evaluate: bool = False, save: bool = False) -> Moment:
        """The present moment, with what is still to be done at this step."""
        due = {"evaluate": evaluate, "save": save, "epoch_end": self._epoch_end_follows}
        due |= {"stop": self.control.should_training_stop, **self._logged}
        sizes = {name: path.stat().st_size for name, path in self.kept.record().items() if path.exists()}
        return Moment(carry(self), random_states(), sizes, len(self.state.log_history), due)

    def _catch_up(self, *given: Any) -> None:
        """After a resume, with what `_run_epoch` is given: carry on as if never stopped."""
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            from dpo_kit.trainer.resume.go_on import catch_up

            catch_up(self, resumed, given)
            self._random_after = random_states()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._random_after is None:
            super()._load_rng_state(checkpoint)
        else:
            set_random_states(self._random_after)
