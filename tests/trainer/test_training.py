"""Whole runs on the embedded lab: what a run directory holds, how runs end and go on."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_kit
from dpo_kit import ConfigError, ModelError, Result, TrainingError, compose, train
from dpo_kit.config.compose import CONF, check
from dpo_kit.model.load import load_tokenizer
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json, write_json
from dpo_kit.run.history import read_metrics
from dpo_kit.toy import MODEL, TRAIN
from dpo_kit.trainer.resume.go_on import newest_verified
from dpo_kit.trainer.rows import prepare_data
from tests.offline_wandb import log_files, read_offline
from tests.small import few_pairs

METHODS = sorted(file.stem for file in (CONF / "method").glob("*.yaml"))
GIVEN = sorted({*METHODS} - {"online_dpo"})  # answers; those that a policy draws itself are in test_online.py
FILES = {
    "manifest.json",
    "trl_config.json",
    "data_report.json",
    "metrics.jsonl",
    "probe.jsonl",
    "samples.jsonl",
    "checkpoints",
    "model",
    "report.png",
    "result.json",
}
KEYS = {
    "probe/accuracy",
    "probe/accuracy_low",
    "probe/accuracy_high",
    "probe/margin_nats",
    "probe/logratio_chosen_nats",
    "probe/logratio_rejected_nats",
    *(
        f"probe/kl_{way}_rb_nats{end}"
        for way in ("forward", "reverse")
        for end in ("", "_se", "_per_token", "_cut_share")
    ),
    "gold/reward",
    "gold/reward_low",
    "gold/reward_high",
    "gold/capability",
    "gold/capability_low",
    "gold/capability_high",
    "gold/capability_prompts",
}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """40 embedded pairs as a file, with the gold reward known: a run on them takes seconds."""
    return few_pairs(tmp_path_factory.mktemp("few") / "pairs.jsonl")


@pytest.fixture(scope="module")
def small_run(few, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    return folder, train(compose(few), folder)


def test_a_run_directory_is_complete_and_the_result_is_written_last(small_run):
    folder, result = small_run
    assert {path.name for path in folder.iterdir()} >= FILES
    newest = max((path for path in folder.rglob("[!.]*") if path.is_file()), key=lambda path: path.stat().st_mtime_ns)
    assert newest.name == "result.json" and result.status == "done"
    assert set(result.final) >= KEYS | {"probe/reward_margin", "probe/reward_chosen", "probe/reward_rejected"}
    assert result.start["probe/accuracy"] == 0.5 and result.start["probe/kl_forward_rb_nats"] == 0
    assert all(math.isfinite(value) for value in result.final.values())


def test_every_file_of_a_run_is_strict_json(small_run):
    def refuse(constant):
        raise ValueError(constant)

    for path in (path for path in small_run[0].iterdir() if path.suffix in (".json", ".jsonl")):
        texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        assert all(json.loads(text, parse_constant=refuse) for text in texts), path.name


def test_the_probe_is_scored_pair_by_pair_at_every_evaluation(small_run):
    rows = [json.loads(line) for line in (small_run[0] / "probe.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rows} == {0, 2, 4}
    assert len(rows) == 3 * len({row["pair_id"] for row in rows})
    last = [row for row in rows if row["step"] == 4]
    margin = sum(row["logratio_chosen_nats"] - row["logratio_rejected_nats"] for row in last) / len(last)
    assert margin == pytest.approx(small_run[1].final["probe/margin_nats"], rel=1e-5)


def test_fresh_samples_are_kept_one_of_each_prompt_so_that_runs_can_be_paired(small_run):
    rows = read_metrics(small_run[0] / "samples.jsonl")
    by_step = {step: [row for row in rows if row["step"] == step] for step in (0, 2, 4)}
    assert sum(map(len, by_step.values())) == len(rows) and {len(part) for part in by_step.values()} == {8}
    assert len({tuple(row["prompt_id"] for row in part) for part in by_step.values()}) == 1
    reward = sum(row["gold_reward"] for row in by_step[4]) / 8
    assert reward == pytest.approx(small_run[1].final["gold/reward"])
    assert all(row["tokens"] > 0 and row["answer"] for row in by_step[0])


def test_the_saved_model_loads_in_plain_transformers_with_its_chat_template(small_run):
    model = AutoModelForCausalLM.from_pretrained(small_run[0] / "model")
    start = AutoModelForCausalLM.from_pretrained(MODEL)
    assert AutoTokenizer.from_pretrained(small_run[0] / "model").chat_template
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True))
    card = (small_run[0] / "model" / "README.md").read_text()
    assert all(word in card for word in ("Direct Preference Optimization", "beta", "0.1", "KL", "margin"))


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_finished_run_is_measured_once_on_the_split_that_no_choice_has_seen(few, tmp_path, tuning, monkeypatch):
    from dpo_kit.trainer.held_out import measure_test_split

    run = train(compose([*few, f"model.tuning={tuning}", "trl.learning_rate=5e-3"]), tmp_path)
    measured = measure_test_split(tmp_path)
    assert set(measured) >= {"probe/accuracy", "probe/margin_nats_low", "gold/reward", "gold/capability"}
    assert measured["probe/margin_nats"] != run.final["probe/margin_nats"]  # other rows
    config = check(compose([*few, f"model.tuning={tuning}"]))
    data = prepare_data(config, load_tokenizer(config.model))
    monkeypatch.setattr("dpo_kit.trainer.held_out.read_held_out", lambda *_: (data.kind, data.select))
    monkeypatch.setattr("dpo_kit.trainer.held_out.refuse_other_rows", lambda *_: None)
    RunDirectory(tmp_path).test.unlink()
    monkeypatch.setattr("dpo_kit.run.report.page.page_text", lambda _: 1 / 0)  # a page that fails costs no measurement
    on_select = measure_test_split(tmp_path)  # on the rows of the run's own probe it finds what the run found
    for key in ("probe/accuracy", "probe/margin_nats", "probe/logratio_chosen_nats", "probe/reward_margin"):
        assert on_select[key] == pytest.approx(run.final[key], abs=1e-4), key
    manifest = RunDirectory(tmp_path).manifest  # as a run leaves it that has measured nothing
    write_json(manifest, read_json(manifest) | {"measuring": None})
    RunDirectory(tmp_path).test.unlink()
    assert measure_test_split(tmp_path)["gold/reward"] == on_select["gold/reward"]


def test_the_reference_answers_the_prompts_of_a_run_as_often_as_there_is_time_for(small_run, monkeypatch):
    from dpo_kit.trainer import held_out

    asked, draw = [], held_out.draw_samples
    monkeypatch.setattr(held_out, "draw_samples", lambda *given, **own: asked.append(given) or draw(*given, **own))
    scores = held_out.score_reference_pool(small_run[0], most=3, least=2, seconds=0.0)
    prompts = [row["prompt_id"] for row in read_metrics(small_run[0] / "samples.jsonl") if row["step"] == 0]
    assert [row["prompt_id"] for row in asked[0][2]] == prompts
    assert [len(of_prompt) for of_prompt in scores] == [2] * len(prompts) and len({*map(tuple, scores)}) > 1
    start = AutoModelForCausalLM.from_pretrained(MODEL)
    assert all(torch.equal(a, b) for a, b in zip(asked[0][0].parameters(), start.parameters(), strict=True))
    assert len(held_out.score_reference_pool(small_run[0], most=3, least=1, seconds=1e9)[0]) == 3


def test_what_was_kept_on_the_way_is_measured_evaluated_and_exported_as_it_was(few, tmp_path):
    from dpo_kit.evaluate.__main__ import work
    from dpo_kit.export.__main__ import export
    from dpo_kit.trainer.held_out import measure_test_split

    run = tmp_path / "run"
    train(compose([*few, "callbacks.path=2", "trl.learning_rate=5e-3"]), run)
    end, then = measure_test_split(run), measure_test_split(run, 2)
    assert end["probe/margin_nats"] != then["probe/margin_nats"] and (run / "path" / "step-2" / "test.json").exists()
    export([f"run={run}", "step=2"])
    kept, out = (load_file(folder / "model.safetensors") for folder in (run / "path" / "step-2", run / "export-step-2"))
    assert all(torch.equal(kept[name], out[name]) for name in out)
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["step"] == 2 and "gold/reward" in row]
    assert f"{rows[-1]['gold/reward']:.2f}" in (run / "export-step-2" / "README.md").read_text()
    work([f"run={run}", "step=2", "parts=[preferences]"])
    found = read_json(run / "evaluation" / "step-2" / "result.json")
    assert found["margin_nats"] == pytest.approx(then["probe/margin_nats"], abs=1e-4)
    for tool in (export, work):
        with pytest.raises(ConfigError, match=r"step=3: .* has no weights of that step; kept on its way: 2"):
            tool([f"run={run}", "step=3"])


@pytest.mark.slow
def test_a_page_that_fails_does_not_fail_the_run(few, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("dpo_kit.run.report.page.page_text", lambda _: 1 / 0)
    assert train(compose([*few, "callbacks=none", "trl.max_steps=1"]), tmp_path).status == "done"
    assert Result.read(tmp_path).status == "done" and "could not be written" in caplog.text


def test_the_manifest_says_what_the_run_was_made_of(small_run):
    manifest = json.loads((small_run[0] / "manifest.json").read_text())
    assert manifest["versions"]["trl"] and manifest["config"]["beta"] == 0.1
    assert manifest["data"]["train"]["rows"] == 24 and len(manifest["model"]["sha256"]) == 64
    assert manifest["effective_batch"] == 4


def test_a_finished_run_is_read_not_trained_again(small_run, few, monkeypatch):
    monkeypatch.setattr("dpo_kit.trainer.build.load_policy", lambda *_: pytest.fail("trained again"))
    assert train(compose(few), small_run[0]) == small_run[1] == Result.read(small_run[0])


def test_a_directory_of_another_config_is_refused_with_the_difference(small_run, few):
    with pytest.raises(ConfigError, match=r"beta: 0.1 there, 0.2 now"):
        train(compose([*few, "beta=0.2"]), small_run[0])


def test_the_command_gives_the_same_result_as_the_api(small_run, few, command, tmp_path):
    done = command(*few, "hydra.run.dir=here")
    assert done.returncode == 0, done.stderr
    assert Result.read(tmp_path / "here").final == small_run[1].final
    assert Result.read(tmp_path / "here").next != small_run[1].next  # from Python nothing was typed
    assert "held-out accuracy" in done.stdout
    assert "next: python -m dpo_kit tracking=none" in done.stdout and "trl.max_steps=8" in done.stdout
    assert "Warning" not in done.stdout + done.stderr
    again = command(*few, "hydra.run.dir=here")
    assert again.returncode == 0 and "held-out accuracy" in again.stdout


@pytest.mark.slow
def test_wandb_holds_every_metric_of_the_record_and_no_secret(few, command, tmp_path):
    canary = "hf_" + "canary" * 6
    overrides = [o for o in few if o != "tracking=none"] + ["tracking.project=lab"]
    done = command(*overrides, "hydra.run.dir=run", env={"HF_TOKEN": canary})
    assert done.returncode == 0 and "wandb sync" in done.stderr, done.stderr
    (log,) = log_files(tmp_path / "run")
    recorded = read_offline(log)
    sent = {key for row in recorded.history for key in row}
    written = {key for row in read_metrics(tmp_path / "run" / "metrics.jsonl") for key in row}
    assert written - {"epoch", "step", "time"} <= sent
    assert recorded.exit_code == 0 and recorded.run.project == "lab" and recorded.config["beta"] == 0.1
    assert recorded.summary["final/probe/accuracy"] == Result.read(tmp_path / "run").final["probe/accuracy"]
    assert canary.encode() not in log.read_bytes()


@pytest.mark.parametrize(
    "tuning", ["full", *(pytest.param(each, marks=pytest.mark.slow) for each in ("lora", "qlora"))]
)
def test_callbacks_change_no_loss(few, tmp_path, tuning):
    def losses(callbacks):
        run = [*few, f"model.tuning={tuning}", f"callbacks={callbacks}"]
        train(compose(run), tmp_path / callbacks)
        return [row["loss"] for row in read_metrics(tmp_path / callbacks / "metrics.jsonl") if "loss" in row]

    assert losses("default") == losses("none")


def contents(folder):
    """The files under `folder` with their bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_stopped_run_goes_on_where_it_stood(small_run, few, tmp_path, monkeypatch):
    from dpo_kit.trainer.recorder import Recorder

    def stop(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Recorder, "on_step_end", stop, raising=False)
        train(compose(few), tmp_path)
    run = RunDirectory(tmp_path)
    assert run.read_result()["status"] == "interrupted"
    assert newest_verified(run.checkpoints).name == "checkpoint-2"
    pairs = Path(next(word for word in few if word.startswith("data.train=")).partition("=")[2])
    rows, before = pairs.read_text(), contents(tmp_path)
    try:
        pairs.write_text("".join(rows.splitlines(keepends=True)[1:]))
        with pytest.raises(ConfigError, match="cannot be resumed exactly"):
            train(compose(few), tmp_path)
    finally:
        pairs.write_text(rows)
    assert contents(tmp_path) == before  # a start that is refused changes nothing
    resumed = train(compose(few), tmp_path)
    assert resumed.final == small_run[1].final
    assert [row["step"] for row in read_metrics(run.metrics) if "loss" in row] == [1, 2, 3, 4]


def test_weights_that_are_not_finite_are_never_saved(few, tmp_path, monkeypatch):
    def poison(trainer):
        with torch.no_grad():
            next(trainer.model.parameters())[0, 0] = math.nan

    import dpo_kit.trainer.finish

    honest = dpo_kit.trainer.finish.refuse_non_finite
    monkeypatch.setattr(
        dpo_kit.trainer.finish,
        "refuse_non_finite",
        lambda model, where: (model.get_input_embeddings().weight.data.fill_(math.nan), honest(model, where)),
    )
    with pytest.raises(TrainingError, match="not finite"):
        train(compose([*few, "callbacks=none"]), tmp_path)
    assert RunDirectory(tmp_path).read_result()["status"] == "failed" and not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=local", "model.path=./nowhere"], "does not exist"),
        (["model=local", "model.path=nobody/nothing"], "cannot be loaded"),
        (["model.tuning=lora", "+model.lora.rankk=3"], "unknown key model.lora.rankk"),
        (["data.gold=dpo_kit.golld"], "cannot be imported"),
    ],
)
def test_what_cannot_be_loaded_is_refused_before_training(few, tmp_path, overrides, message):
    allow = ["allow_learning_rate=true"]
    with pytest.raises((ConfigError, ModelError), match=message):
        train(compose([*few, *allow, *overrides]), tmp_path)


@pytest.mark.parametrize("method", GIVEN)
def test_every_method_runs_on_the_embedded_lab(method, few, tmp_path):
    result = train(compose([*few, f"method={method}", "data.gold=null"]), tmp_path)
    assert result.status == "done" and set(result.final) >= {key for key in KEYS if key.startswith("probe/")}
    assert ("probe/reward_margin" in result.final) == compose([f"method={method}"]).method.implicit_reward


@pytest.mark.parametrize("tuning", ["lora", pytest.param("qlora", marks=pytest.mark.slow)])
def test_adapters_are_tuned_and_saved(few, tmp_path, tuning):
    result = train(compose([*few, f"model.tuning={tuning}", "data.gold=null"]), tmp_path)
    assert (tmp_path / "model" / "adapter_model.safetensors").exists() and result.final["probe/margin_nats"] != 0


def test_unary_rows_give_auc_and_class_gap_instead_of_pair_accuracy(few, tmp_path):
    rows = [json.loads(line) for line in TRAIN.read_text().splitlines()[:40]]
    unary = [
        {"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"}
        for r in rows
        for side in ("chosen", "rejected")
    ]
    (tmp_path / "thumbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unary[:60]))
    overrides = [o for o in few if not o.startswith("data.train")] + [f"data.train={tmp_path / 'thumbs.jsonl'}"]
    final = train(compose([*overrides, "method=kto", "data.gold=null"]), tmp_path / "run").final
    assert {"probe/auc", "probe/auc_low", "probe/class_gap_nats"} <= set(final) and "probe/accuracy" not in final


def test_kto_s_class_weights_even_out_the_counts():
    from dpo_kit.trainer.arguments import decide

    trl = dict(compose(["method=kto"]).trl)
    rows = [{"label": i < 20} for i in range(100)]
    assert decide(trl, rows, 64)["desirable_weight"] == 4.0
    assert "desirable_weight" not in decide(trl | {"desirable_weight": 1.3}, rows, 64)


def test_the_public_api_is_what_the_readme_says():
    assert callable(dpo_kit.train) and callable(dpo_kit.compose)


@pytest.mark.slow
def test_the_demo_shows_what_it_promises(tmp_path):
    result = train(compose(["tracking=none"]), tmp_path)
    start, final = result.start, result.final
    assert (final["probe/accuracy"] - 0.5) / (result.ceiling - 0.5) >= 0.65
    assert final["gold/reward_low"] > start["gold/reward_high"] + 0.5
    assert 0.5 < final["probe/kl_reverse_rb_nats"] < 15
    assert final["gold/capability"] >= start["gold/capability"] - 0.03


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_works_on_the_embedded_lab_with_its_defaults(method, tmp_path):
    result = train(compose([f"method={method}", "tracking=none"]), tmp_path)
    start, final = result.start, result.final
    assert final["probe/margin_nats_low"] > 0 and final["probe/accuracy_low"] > 0.55
    assert final["gold/reward_low"] > start["gold/reward_high"]
    assert final["probe/kl_reverse_rb_nats"] < 30


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "kto", "orpo", "simpo"])
def test_lora_works_on_the_embedded_lab_with_its_defaults(method, tmp_path):
    result = train(compose([f"method={method}", "model.tuning=lora", "tracking=none"]), tmp_path)
    assert result.final["probe/margin_nats_low"] > 0 and result.final["probe/accuracy_low"] > 0.55
    assert result.final["probe/kl_reverse_rb_nats"] < 30
