"""Recipes of published runs: what the sources state, what wins over what, and how a run stands beside them."""

import dataclasses
from typing import Any

import pytest
import yaml
from hydra.utils import get_class

from dpo_kit.config.compose import CONF, check, compose
from dpo_kit.config.identity import comparable
from dpo_kit.config.settings import Experiment
from dpo_kit.errors import ConfigError
from dpo_kit.run.report.results import sentences
from dpo_kit.trainer.published import batch_fault, compare_with_published

# model, data, beta, learning rate, epochs, rows × accumulation × devices, max_length, scheduler, warm-up, optimizer:
# written down from the sources once more, apart from the recipes
STATED: dict[str, tuple[Any, ...]] = {
    "zephyr-7b-dpo": (
        "alignment-handbook/zephyr-7b-sft-full", "HuggingFaceH4/ultrafeedback_binarized",
        0.01, 5e-7, 1, (8, 2, 8), 1024, "cosine", 0.1, "adamw_torch",
    ),
    "zephyr-7b-dpo-qlora": (
        "merged", "HuggingFaceH4/ultrafeedback_binarized",
        0.01, 5e-6, 1, (4, 4, 1), 1024, "cosine", 0.1, "paged_adamw_32bit",
    ),
    "simpo-llama3-8b-instruct": (
        "meta-llama/Meta-Llama-3-8B-Instruct", "princeton-nlp/llama3-ultrafeedback",
        2.5, 1e-6, 1, (2, 16, 4), 2048, "cosine", 0.1, "adamw_torch",
    ),
    "orpo-mistral-7b": (
        "mistralai/Mistral-7B-v0.1", "argilla/ultrafeedback-binarized-preferences-cleaned",
        0.1, 5e-6, 5, (8, 1, 4), 2048, "inverse_sqrt", 200, "paged_adamw_32bit",
    ),
    "kto-qwen1.5-1.8b": (
        "trl-lib/qwen1.5-1.8b-sft", "trl-lib/kto-mix-14k",
        0.1, 5e-7, 1, (16, 1, 1), 1024, "cosine", 0.1, None,
    ),
}  # fmt: skip
START = {"zephyr-7b-dpo-qlora": ["model.path=merged"]}  # what must be typed beside a recipe's name
EXPERIMENT = Experiment(
    name="x", title="t", source="s", batch=128, expected={"probe/accuracy": [0.75, 0.78]}, expected_from="f"
)


def test_every_recipe_is_held_against_its_source_here():
    assert {file.stem for file in (CONF / "experiment").glob("*.yaml")} == STATED.keys() | {"none"}


@pytest.mark.parametrize("name", STATED)
def test_a_recipe_holds_what_its_source_states(name):
    model, data, beta, rate, epochs, batch, length, scheduler, warmup, optimizer = STATED[name]
    settings = check(compose([f"experiment={name}", *START.get(name, [])]))
    trl = settings.trl
    assert (settings.model.path, settings.data.train, settings.beta, trl["beta"]) == (model, data, beta, beta)
    assert (trl["learning_rate"], trl["num_train_epochs"]) == (rate, epochs)
    assert (trl["per_device_train_batch_size"], trl["gradient_accumulation_steps"]) == batch[:2]
    assert settings.experiment.batch == batch[0] * batch[1] * batch[2] and settings.experiment.name == name
    assert (trl["max_length"], trl["lr_scheduler_type"], trl["warmup_steps"]) == (length, scheduler, warmup)
    assert optimizer in (trl["optim"], None)


@pytest.mark.slow
@pytest.mark.parametrize("name", STATED)
def test_a_recipe_composes_to_trl_s_config(name, tmp_path):
    settings = check(compose([f"experiment={name}", *START.get(name, [])]))
    given = {key: value for key, value in settings.trl.items() if value is not None} | {"bf16": False, "use_cpu": True}
    args = get_class(settings.method.config)(output_dir=str(tmp_path), **given)
    recipe = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text())
    assert {key: getattr(args, key) for key in recipe["trl"]} == {key: given[key] for key in recipe["trl"]}


def test_the_qlora_recipe_tunes_what_the_handbook_tunes():
    lora = compose(["experiment=zephyr-7b-dpo-qlora", "model.path=merged"]).model
    assert (lora.tuning, lora.lora.r, lora.lora.lora_alpha, lora.lora.lora_dropout) == ("qlora", 128, 128, 0.05)
    assert list(lora.lora.target_modules) == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]


def test_simpo_s_margin_is_the_published_ratio_of_beta():
    trl = compose(["experiment=simpo-llama3-8b-instruct"]).trl
    assert (trl.simpo_gamma / trl.beta, trl.cpo_alpha) == (pytest.approx(0.55), 0.0)


def test_a_recipe_wins_over_model_and_method_and_loses_to_the_command_line():
    assert compose(["experiment=zephyr-7b-dpo", "method=dpo"]).beta == 0.01
    tiny = compose(["experiment=zephyr-7b-dpo", "model=tiny", "data=toy"])
    assert tiny.trl.learning_rate == 5e-7 and tiny.trl.per_device_train_batch_size == 8
    assert "toy" in tiny.model.path and tiny.data.columns is None
    typed = compose(["experiment=zephyr-7b-dpo", "beta=0.1", "trl.learning_rate=1e-6", "seed=1"])
    assert (typed.beta, typed.trl.learning_rate, typed.seed) == (0.1, 1e-6, 1)


@pytest.mark.parametrize("wrong", ["zephyr-7b-dpoo", "zephyr-7b"])
def test_a_wrong_name_is_refused_with_the_near_miss(wrong):
    with pytest.raises(ConfigError, match=r"experiment must be one of .*did you mean zephyr-7b-dpo"):
        compose([f"experiment={wrong}"])


@pytest.mark.slow
@pytest.mark.parametrize("name", STATED)
def test_a_recipe_is_dry_run_on_the_embedded_lab(name, command):
    done = command(f"experiment={name}", "model=tiny", "data=toy", "dry_run=true")
    assert done.returncode == 0 and "nothing was trained or written" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_run_of_a_recipe_ends_beside_the_published_one(command, tmp_path):
    short = ["trl.max_steps=2", "callbacks.pairs=16", "callbacks.prompts=8", "tracking=none", "hydra.run.dir=run"]
    done = command("experiment=zephyr-7b-dpo", "model=tiny", "data=toy", *short)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert (
        "not the published run of experiment=zephyr-7b-dpo: 16 rows per optimizer step, not 128" in text + done.stderr
    )
    assert "probe/accuracy: 0.754 to 0.785 published (6 reports)" in text
    assert "so no verdict: 16 rows per optimizer step, not 128" in text and "data.columns" in text
    assert "## Beside the published run" in (tmp_path / "run" / "report.md").read_text()


# --- beside the published run ------------------------------------------------------------------------------------


def _manifest(*words: str, batch: int = 128, recipe: str = "zephyr-7b-dpo", **more: Any) -> dict[str, Any]:
    """The manifest of a run of `recipe` with `words`, as Python starts it: without a command."""
    config = comparable(check(compose([f"experiment={recipe}", *words])))
    return {"config": config, "effective_batch": batch, "command": None, "model": {}} | more


@pytest.mark.parametrize(
    ("measured", "said"),
    [
        ({"measured": 0.76}, "0.760 here: in agreement."),
        ({"measured": 0.70}, "0.700 here: below."),
        ({"measured": 0.80}, "0.800 here: above."),
        ({"measured": 0.70, "low": 0.6, "high": 0.76}, "[0.600, 0.760] here: in agr"),
        ({"measured": None}, "not measured here."),
    ],
)
def test_a_run_agrees_where_its_interval_meets_the_published_range(measured, said):
    figure = {"key": "probe/accuracy", "expected": [0.75, 0.78], **measured}
    assert said in next(sentences({"differs": [], "figures": [figure]}))


def test_reports_that_agree_are_all_counted():
    figure = {"key": "probe/accuracy", "expected": [0.75, 0.75], "measured": 0.75}
    assert next(sentences({"differs": [], "figures": [figure]})).startswith("probe/accuracy: 0.750 published (2 rep")


def test_what_trains_no_other_run_leaves_the_verdict_and_the_last_value_counts():
    words = ["seed=3", "beta=0.01", "trl.gradient_accumulation_steps=16", "speed.share_prefix=false", "callbacks=none"]
    ends = {"probe/accuracy": 0.76, "probe/accuracy_low": 0.7, "probe/accuracy_high": 0.8}
    rows = [{"step": 0, "probe/accuracy": 0.5}, {"step": 9, **ends}, {"step": 10, "probe/accuracy": None}]
    found = compare_with_published(_manifest(*words, "tracking=none"), rows)
    assert found["differs"] == []
    assert "0.760 [0.700, 0.800] here: in agreement." in next(sentences(found))


def test_what_was_changed_from_python_too_is_named_and_takes_the_verdict_away():
    found = compare_with_published(
        _manifest("beta=0.1", "tracking=none", batch=16), [{"step": 1, "probe/accuracy": 0.7}]
    )
    first, *_, last = sentences(found)
    assert first.endswith("0.700 here.")
    assert last.startswith("Not the published run, so no verdict: 16 rows per optimizer step, not 128")
    assert last.endswith("makes it so), beta: 0.01 there, 0.1 now.")


@pytest.mark.slow
def test_callbacks_that_can_stop_training_early_are_a_difference():
    words = ["callbacks.patience=2", "trl.metric_for_best_model=probe/accuracy", "callbacks.pairs=64"]
    named = {line.partition(":")[0] for line in compare_with_published(_manifest(*words), [])["differs"]}
    assert named == {"callbacks.patience", "trl.metric_for_best_model"}


@pytest.mark.slow
@pytest.mark.parametrize(("model", "differs"), [({}, 0), ({"adapter": {}}, 1)])
def test_a_start_that_the_recipe_asks_for_is_its_start_unless_it_is_an_adapter(model, differs):
    manifest = _manifest("model.path=merged", recipe="zephyr-7b-dpo-qlora", batch=16, model=model)
    assert len(compare_with_published(manifest, [])["differs"]) == differs


@pytest.mark.slow
def test_a_recipe_of_one_s_own_is_found_again_and_without_its_folder_there_is_no_verdict(tmp_path):
    (tmp_path / "experiment").mkdir()
    own = "# @package _global_\ndefaults: [zephyr-7b-dpo, _self_]\nexperiment: {name: mine}\nbeta: 0.2\n"
    (tmp_path / "experiment" / "mine.yaml").write_text(own)
    config = comparable(check(compose(["experiment=mine"], config_dir=tmp_path)))
    manifest = {"config": config, "effective_batch": 128, "model": {}}
    typed = f"python -m dpo_kit --config-dir={tmp_path} experiment=mine"
    assert compare_with_published(manifest | {"command": typed}, [])["differs"] == []
    assert "experiment=mine alone cannot be composed" in compare_with_published(manifest, [])["differs"][0]
    (tmp_path / "experiment" / "mine.yaml").write_text("a: [")
    assert "cannot be composed" in compare_with_published(manifest | {"command": typed}, [])["differs"][0]


def test_without_a_published_band_its_absence_is_said():
    published = {"name": "x", "expected_from": "no published band", "differs": [], "figures": []}
    assert list(sentences(published)) == ["x: no published band."]
    assert compare_with_published({"config": {"experiment": None}}, []) is None


def test_the_qlora_recipe_asks_for_the_merged_start():
    with pytest.raises(ConfigError, match=r"model\.path is missing"):
        compose(["experiment=zephyr-7b-dpo-qlora"])


def test_another_batch_is_refused_softly_with_the_accumulation_that_makes_it_right():
    assert batch_fault(EXPERIMENT, {"gradient_accumulation_steps": 2}, 128) is None
    assert "trl.gradient_accumulation_steps=16 makes" in batch_fault(EXPERIMENT, {"gradient_accumulation_steps": 2}, 16)
    assert "trl.per_device_train_batch_size makes" in batch_fault(EXPERIMENT, {"gradient_accumulation_steps": 1}, 7)
    assert batch_fault(None, {}, 7) is None


def test_every_recipe_opens_with_its_command_and_names_its_source():
    for name in STATED:
        file = CONF / "experiment" / f"{name}.yaml"
        assert f"# python -m dpo_kit experiment={name} " in file.read_text().splitlines()[1]
        assert yaml.safe_load(file.read_text())["experiment"]["source"].count("/") > 1


# --- a chat template for a base model ----------------------------------------------------------------------------


def test_a_model_without_a_chat_template_takes_the_config_s():
    from dpo_kit.model.load import load_tokenizer, read_template

    settings = check(compose(["experiment=orpo-mistral-7b"]))
    tiny = check(compose([])).model
    template = settings.model.chat_template
    tokenizer = load_tokenizer(tiny.model_copy(update={"chat_template": template}))
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    eos = tokenizer.eos_token
    assert tokenizer.apply_chat_template(chat, tokenize=False) == f"<|user|>\nHi{eos}\n<|assistant|>\nHo{eos}\n"
    begun = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert begun == f"<|user|>\nHi{eos}\n<|assistant|>\n"
    assert read_template(template) == template


def test_a_template_may_stand_in_a_file_and_a_wrong_name_is_refused(tmp_path):
    from dpo_kit.model.load import read_template

    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    assert read_template(str(tmp_path / "chat.jinja")) == "{{ messages }}"
    with pytest.raises(ConfigError, match=r"model\.chat_template must be a Jinja template or a file .*none"):
        read_template(str(tmp_path / "none.jinja"))


def test_a_result_of_an_earlier_version_is_still_read(tmp_path):
    from dpo_kit import Result
    from dpo_kit.run.files import write_json

    old = {field.name: "" for field in dataclasses.fields(Result) if field.name != "published"}
    write_json(tmp_path / "result.json", old)
    assert Result.read(tmp_path).published is None
