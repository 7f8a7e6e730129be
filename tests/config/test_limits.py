"""What libraries would refuse only after a model is loaded is refused while the config is checked, by key."""

import pytest

from dpo_kit.config.compose import compose
from dpo_kit.config.limits import missing_package, number_faults
from dpo_kit.config.trl_schema import load_schema
from dpo_kit.errors import ConfigError
from dpo_kit.sweep.launch.plan import plan_sweep

LORA = "model.tuning=lora"
REFUSED = {
    "seed=5000000000": "seed: input should be less than 4294967296",
    "trl.data_seed=-3": "trl.data_seed must be at least 0, got -3",
    "trl.per_device_eval_batch_size=0": "trl.per_device_eval_batch_size must be above 0, got 0",
    "trl.max_steps=0": "at least 1, or -1 for whole epochs, got 0",
    "trl.num_train_epochs=nan": "must be a finite number, got nan",
    "trl.eval_steps=2.5": "a whole number of steps, or below 1 as a share",
    "trl.logging_steps=true": "trl.logging_steps must be float, got True",
    "trl.adam_beta2=1": "must lie in [0, 1), got 1",
    "trl.bf16_full_eval=true trl.fp16_full_eval=true": "exclude each other",
    "trl.dataloader_prefetch_factor=4": "add trl.dataloader_num_workers=1",
    "trl.lr_scheduler_type=warmup_stable_decay": "needs trl.lr_scheduler_kwargs={num_decay_steps: …}",
    "trl.lr_scheduler_type=cosine_with_min_lr": "{min_lr: …} or {min_lr_rate: …}",
    "trl.lr_scheduler_type=polynomial trl.lr_scheduler_kwargs={lrend: 0}": "did you mean lr_end?",
    "trl.lr_scheduler_type=polynomial trl.lr_scheduler_kwargs={power: x}": "lr_scheduler_kwargs.power must be float",
    "trl.lr_scheduler_kwargs={num_cycles: 2}": "num_cycles belongs to cosine,",
    "trl.lr_scheduler_type=reduce_lr_on_plateau trl.eval_strategy=no": "eval_strategy=no has none",
    "trl.lr_scheduler_type=cosine_with_min_lr trl.lr_scheduler_kwargs={min_lr: 3e-3}": "min_lr must be below trl.learn",
    "trl.lr_scheduler_type=cosine_with_min_lr trl.lr_scheduler_kwargs={min_lr_rate: 2}": "must lie in [0, 1], got 2",
    "trl.lr_scheduler_type=polynomial trl.lr_scheduler_kwargs={lr_end: 1e-3}": "below trl.learning_rate=0.0002, got 0",
    "trl.lr_scheduler_type=polynomial trl.learning_rate=1e-8": "got 1e-07, its default: add trl.lr_scheduler_kwargs={l",
    "trl.lr_scheduler_type=greedy": "min_lr must be below trl.learning_rate=0.0002, got 0.001, its default: add",
    "trl.learning_rate=-1e-4 allow_learning_rate=true": "trl.learning_rate must be at least 0, got -0.0001",
    "model.attn_implementation=spda": "did you mean sdpa?",
    "trl.push_to_hub=true": "add trl.hub_model_id=org/name",
    "trl.save_strategy=best": "add trl.metric_for_best_model=probe/accuracy",
    "trl.load_best_model_at_end=true trl.eval_steps=0.1 trl.save_steps=20": "both shares of the run",
    f"{LORA} model.lora.r=-2": "model.lora.r must be above 0, got -2",
    f"{LORA} model.lora.lora_alpha=1.5": "model.lora.lora_alpha must be int, got 1.5",
    f"{LORA} model.lora.bias=some": "must be one of none, all, lora_only",
    f"{LORA} model.lora.target_modules=k_proj": "say model.lora.target_modules=[k_proj]",
    f"{LORA} model.lora.target_modules=null": "must name modules, such as all-linear",
    "model.tuning=qlora +model.quantization.bnb_4bit_quant_typ=nf4": "did you mean bnb_4bit_quant_type?",
    "model.dtype=float16": "take model.dtype=auto",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_value_that_would_end_in_a_traceback_is_refused_with_key_rule_and_remedy(words):
    parts = words.replace(": ", ":").split(" ")
    with pytest.raises(ConfigError) as refusal:
        compose(parts)
    assert REFUSED[words] in str(refusal.value)


@pytest.mark.parametrize(
    "words",
    [
        ["trl.load_best_model_at_end=true", "trl.metric_for_best_model=probe/accuracy", "trl.eval_steps=0.05",
         "trl.save_steps=0.15"],
        ["trl.lr_scheduler_type=warmup_stable_decay", "trl.lr_scheduler_kwargs={num_decay_steps: 3}"],
        ["trl.max_grad_norm=inf"],
        [LORA, "model.lora.target_modules='.*_proj'"],
        [LORA, "+model.lora.init_lora_weights=pissa_niter_4"],
        ["trl.max_steps=-1"],
        ["trl.lr_scheduler_type=greedy", "trl.lr_scheduler_kwargs={min_lr: 0}"],
        ["trl.lr_scheduler_type=reduce_lr_on_plateau", "trl.learning_rate=0", "allow_learning_rate=true"],
        ["model.attn_implementation=eager"],
        ["trl.lr_scheduler_type=cosine", "trl.warmup_steps=3"],
    ],
)  # fmt: skip
def test_odd_values_that_libraries_take_are_taken(words):
    compose(words)


@pytest.mark.slow
def test_shares_of_the_run_are_multiples_just_where_transformers_says_so(tmp_path):
    from transformers import TrainingArguments

    for every, saved in ((0.1, 0.3), (0.02, 0.1), (0.07, 0.35), (0.1, 0.25), (0.3, 0.1)):
        words = [f"trl.eval_steps={every}", f"trl.save_steps={saved}", "trl.load_best_model_at_end=true"]
        theirs = {"eval_strategy": "steps", "eval_steps": every, "save_steps": saved, "load_best_model_at_end": True}
        try:
            TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **theirs)
        except ValueError:
            with pytest.raises(ConfigError, match="multiple"):
                compose(words)
        else:
            compose(words)


@pytest.mark.parametrize(
    ("words", "package"),
    [
        ("trl.optim=galore_adamw", "galore-torch"),
        ("trl.optim=schedule_free_adamw", "schedulefree"),
        ("trl.use_liger_kernel=true", "liger-kernel"),
        ("model.attn_implementation=flash_attention_2", "flash-attn"),
        ("trl.deepspeed=zero3.json", "deepspeed"),
        ("tracking=mlflow", "mlflow"),
        ("model.tuning=qlora", "bitsandbytes"),
        ("trl.optim=paged_adamw_8bit", "bitsandbytes"),
    ],
)
def test_a_missing_package_is_named_with_what_installs_it(words, package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as refusal:
        compose([words])
    assert f"{words} needs the package {package}" in str(refusal.value)
    assert f"python -m pip install {package}" in str(refusal.value).replace("'", "")


def test_a_package_of_an_extra_is_named_with_the_versions_that_were_tried():
    assert "pip install 'openai<4,>=3.54'" in (missing_package("it", "openai") or "pip install 'openai<4,>=3.54'")
    said = missing_package("a chart", "no_such_package_of_ours")
    assert said == "a chart needs the package no-such-package-of-ours, which is not installed here: " + (
        "python -m pip install no-such-package-of-ours"
    )


def test_every_number_of_trl_has_a_bound_or_is_known_to_have_none():
    """A field that a new TRL brings is looked at here."""
    free = """local_rank beta seed alpha f_alpha_divergence_coef label_smoothing missing_eos_penalty padding_value"""
    numbers = {
        key
        for described in load_schema()["classes"].values()
        for key, field in described["fields"].items()
        if field["type"].split(" |")[0] in ("int", "float")
    }
    unbound = {key for key in numbers if not list(number_faults("", {key: -7.5}))}
    assert unbound == set(free.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("model.lora.r=8", "has no effect with model.tuning=full: add model.tuning=lora or model.tuning=qlora"),
        (f"{LORA} model.quantization.bnb_4bit_quant_type=fp4", "add model.tuning=qlora"),
        ("trl.eval_strategy=epoch trl.eval_steps=5", "add trl.eval_strategy=steps"),
        ("trl.ref_model_sync_steps=9", "add trl.sync_ref_model=true"),
        ("trl.hub_model_id=me/it", "add trl.push_to_hub=true"),
        ("trl.discopop_tau=0.1", "add trl.loss_type=discopop"),
        ("data.holdout=0.2", "data.holdout=0.2 has no effect with data.eval="),
        ("trl.lr_scheduler_type=constant trl.warmup_steps=9", "add trl.lr_scheduler_type=constant_with_warmup or"),
    ],
)
def test_a_word_that_changes_nothing_is_refused(words, said):
    with pytest.raises(ConfigError) as refusal:
        compose(words.split(" "))
    assert said in str(refusal.value)


def test_jobs_of_a_sweep_are_not_pushed_over_each_other():
    pushed = ["beta=0.1,0.2", "trl.push_to_hub=true"]
    with pytest.raises(ConfigError, match=r"hub_model_id=me/it is one repository for 2 jobs"):
        plan_sweep([*pushed, "trl.hub_model_id=me/it"], [], "config")
    plan_sweep([*pushed, "trl.hub_model_id='me/it-${beta}'"], [], "config")


def test_in_a_sweep_a_word_must_have_its_effect_in_one_job():
    plan_sweep(["model.tuning=full,lora", "model.lora.r=8"], [], "config")
    with pytest.raises(ConfigError, match=r"model\.lora\.r=8 has no effect"):
        plan_sweep(["beta=0.1,0.2", "model.lora.r=8"], [], "config")
