"""Several processes train one run: two on the CPU reach what one does with the same global batch."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate.utils import DistributedType

from dpo_kit import ConfigError
from dpo_kit.model import sampling
from dpo_kit.model.scoring import score
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json
from dpo_kit.run.history import read_metrics
from dpo_kit.run.processes import QUIET, agree, is_writer
from dpo_kit.sweep.launch.plan import refuse_sweep
from tests import tiny
from tests.conftest import ROOT
from tests.small import differences, few_pairs

FILES = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))
LOGGED = ["trl.logging_steps=1", "trl.learning_rate=1e-3", "trl.save_steps=2"]


def _launch(folder, words, *, launcher=("torch.distributed.run", "--nproc_per_node", "2"), env=None):
    """A run of two processes, started in `folder` as a user starts it."""
    command = [sys.executable, "-m", *launcher, "-m", "dpo_kit", *words]
    given = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, timeout=250)


def _values(run):
    rows = read_metrics(RunDirectory(run).metrics)
    kept = ("loss", "eval_loss", "grad_norm", "probe/margin_nats", "probe/accuracy", "gold/reward", "gold/capability")
    kept += tuple(f"probe/kl_{way}_{name}" for way in ("forward", "reverse") for name in ("rb_nats", "k1_nats_se"))
    return {key: [row[key] for row in rows if key in row] for key in kept}


def _samples(run):
    """What was sampled, in the order in which it was written."""
    rows = [json.loads(line) for line in RunDirectory(run).samples.read_text().splitlines()]
    return [(row["step"], row["prompt_id"], row["answer"]) for row in rows]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A finished run of two processes without a directory of its own, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    words = [
        *few_pairs(folder / "pairs.jsonl"),
        *LOGGED,
        "trl.per_device_train_batch_size=2",
        "speed.reference_store=true",
    ]
    done = _launch(folder, words, env={"DPO_KIT_CACHE": str(folder / "cache")})
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "outputs").iterdir()
    return run, done, words


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["dpo", "simpo"]
)  # ORPO and CPO average their supervised term over the tokens of one device
def test_two_processes_reach_the_losses_of_one_with_the_same_global_batch(method, two, command, tmp_path):
    run, folder = two[0], two[0].parents[1]
    words = [word for word in two[2] if not word.startswith("trl.per_device")]
    if method != "dpo":
        done = _launch(folder, [*two[2], f"method={method}", f"hydra.run.dir={tmp_path / 'two'}"])
        assert done.returncode == 0, done.stderr
        run = tmp_path / "two"
    one = command(*words, f"method={method}", "trl.per_device_train_batch_size=4", "hydra.run.dir=one")
    assert one.returncode == 0, one.stderr
    theirs, ours = _values(run), _values(tmp_path / "one")
    assert len(ours["loss"]) == 4 and len(set(ours["loss"])) > 2
    for key, values in ours.items():
        assert theirs[key] == pytest.approx(values, rel=1e-5, abs=1e-5), key
    assert len(ours["probe/kl_reverse_rb_nats"]) >= 2 and max(ours["probe/kl_reverse_rb_nats"]) > 0.01
    assert _samples(run) == _samples(tmp_path / "one")
    manifest = read_json(RunDirectory(run).manifest)
    assert manifest["machine"]["world_size"] == 2 and manifest["effective_batch"] == 4


@pytest.mark.slow
def test_all_processes_share_one_directory_and_the_first_one_speaks(two):
    run, done, _ = two
    assert done.stdout.count("run directory:") == 1 and done.stdout.count("held-out measure") == 1
    assert (run / "result.json").exists() and (run / ".hydra" / "config.yaml").exists()
    assert not list(run.parents[1].glob("*.log"))
    steps = [row["step"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert steps == [1, 2, 3, 4]
    lines = [json.loads(line) for line in (run / "probe.jsonl").read_text().splitlines()]
    assert len({(row["step"], row["pair_id"]) for row in lines}) == len(lines)
    assert done.stderr.count("sequences computed") == 1  # of the rows to train on, once for both processes
    assert len(list((run.parents[1] / "cache" / "reference").glob("*/*.safetensors"))) == 1


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_exactly_and_only_with_two(two, command, tmp_path):
    run, _, words = two
    again = shutil.copytree(run, tmp_path / "again")
    for name in ("result.json", "model", "checkpoints/checkpoint-4"):
        path = again / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    one = command(*words, f"hydra.run.dir={again}")
    assert one.returncode == 2 and "machine.world_size: 2 there, 1 now" in one.stderr
    done = _launch(run.parents[1], [*words, f"hydra.run.dir={again}"])
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr and differences(run, again) == []


@pytest.mark.slow
def test_accelerate_starts_two_processes_from_its_file(tmp_path):
    words = [*few_pairs(tmp_path / "pairs.jsonl"), "callbacks=none", "trl.save_strategy=no", "hydra.run.dir=run"]
    file = str(ROOT / "examples" / "accelerate" / "ddp.yaml")
    done = _launch(tmp_path, words, launcher=("accelerate.commands.launch", "--config_file", file))
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "run" / "manifest.json")["machine"]["world_size"] == 2


def test_a_sweep_inside_a_launcher_is_refused_with_the_right_command(command):
    done = command("-m", "beta=0.1,0.2", env={"WORLD_SIZE": "2", "RANK": "0"})
    assert done.returncode == 2 and "sweep outside, and let each job be started by it" in done.stderr
    said = done.stderr.partition("by it: ")[2].strip()
    launched = "hydra.launcher.command=['torchrun','--nproc_per_node','2']"
    assert shlex.split(said) == [
        "python",
        "-m",
        "dpo_kit",
        "-m",
        launched,
        "beta=0.1,0.2",
        "hydra.launcher.devices_per_job=2",
    ]
    refuse_sweep(["beta=0.1,0.2"])  # alone, a sweep is welcome


def test_processes_that_share_nothing_must_be_given_a_directory(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(ConfigError, match="2 processes that train together need one directory"):
        agree(["beta=0.1"], "outputs/now")
    assert agree(["hydra.run.dir=mine"], "outputs/now") == [] and is_writer()
    monkeypatch.setenv("RANK", "1")
    assert agree(["hydra.run.dir=mine"], "outputs/now") == QUIET and not is_writer()


class _OneOf:
    """An accelerator of several processes, of which each keeps what it would have sent."""

    device = torch.device("cpu")

    def __init__(self, place, count, kind=DistributedType.MULTI_CPU):
        self.process_index, self.num_processes, self.distributed_type = place, count, kind

    def reduce(self, values, how):
        assert how == "sum"
        return values


@pytest.mark.parametrize("count", [2, 3, 7])
def test_processes_score_the_very_batches_that_one_would_and_each_once(count):
    model = tiny.model().eval()
    sequences = [([2] * (1 + n % 3), [3 + n % 5] * (1 + n % 4)) for n in range(11)]
    with torch.no_grad():
        alone = score(model, sequences, pad_id=0, tokens_per_batch=16)
        parts = [
            score(model, sequences, pad_id=0, tokens_per_batch=16, accelerator=_OneOf(place, count))
            for place in range(count)
        ]
    assert torch.equal(torch.stack(parts).sum(0), alone)
    assert bool(((torch.stack(parts) != 0).sum(0) == 1).all())


class _SentError(Exception):
    """What a process would send to the others."""


@pytest.mark.parametrize("count", [2, 3, 7])
def test_processes_draw_the_very_samples_that_one_would(count, monkeypatch):
    model, rows = tiny.model(scale=0.1).eval(), [{"prompt": " ".join(["red"] * (1 + n % 4))} for n in range(5)]

    def draw(answers=(), accelerator=None):
        waiting = iter(answers)

        def gather(own):
            for answer in waiting:
                return answer
            raise _SentError(own)

        monkeypatch.setattr(sampling, "gather_object", gather)
        torch.manual_seed(0)
        with torch.no_grad():
            options = {"max_new_tokens": 40, "batch_size": 3, "accelerator": accelerator}
            return sampling.draw_samples(model, tiny.tokenizer(), rows, **options)

    gathered = []
    for _ in range(2):  # batches: the second goes on from the random state that one process would be in
        sent = []
        for place in range(count):
            with pytest.raises(_SentError) as stopped:
                draw(gathered, _OneOf(place, count))
            sent += stopped.value.args[0]
        gathered.append(sent)
    alone = draw()
    assert all(draw(gathered, _OneOf(place, count)) == alone for place in range(count))
    assert len({len(each.token_ids) for each in alone}) > 2
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):  # nothing is sent: each draws all, in step
        assert draw([], _OneOf(0, count, kind)) == alone


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_accelerate_file_is_one_that_accelerate_reads(file):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert config.num_processes == 2 and f"--config_file examples/accelerate/{file.name}" in file.read_text()
    stated = yaml.safe_load(file.read_text())
    known = {"fsdp_config": "fsdp_", "deepspeed_config": ("deepspeed", "zero", "offload", "gradient")}
    assert all(key.startswith(known[part]) for part in known for key in stated.get(part, {}))


def test_there_is_a_file_for_each_way_to_share_out_a_model():
    assert [file.stem for file in FILES] == ["ddp", "fsdp2", "zero2", "zero3"]
