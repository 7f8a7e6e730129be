"""Composing and refusing: what trains as meant is typed, what does not is refused with its remedy."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra

from dpo_kit.config.compose import CONF, check, compose
from dpo_kit.config.explain import known_keys
from dpo_kit.config.trl_schema import load_schema
from dpo_kit.errors import ConfigError
from tests.golden.write import resolved

METHODS = sorted(file.stem for file in (CONF / "method").glob("*.yaml"))
GOLDEN = Path(__file__).parents[1] / "golden"


def test_the_default_config_is_dpo_on_the_embedded_lab():
    cfg = compose()
    assert (cfg.method.name, cfg.beta, cfg.trl.beta, cfg.trl.loss_type) == ("dpo", 0.1, 0.1, ["sigmoid"])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_composes_as_its_golden_file_says(method):
    assert resolved(method) == yaml.safe_load((GOLDEN / f"{method}.yaml").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_every_default_beta_and_grid_lies_in_the_method_s_own_range(method):
    cfg = compose([f"method={method}"])
    low, high = cfg.method.beta.range
    assert cfg.beta in cfg.method.beta.grid
    assert all(low <= beta <= high for beta in cfg.method.beta.grid)


def test_simpo_is_really_simpo():
    trl = compose(["method=simpo"]).trl
    assert (trl.loss_type, trl.cpo_alpha, trl.beta, trl.simpo_gamma) == ("simpo", 0.0, 2.0, 1.0)
    assert compose(["method=simpo", "beta=5"]).trl.simpo_gamma == 2.5
    assert compose(["method=simpo", "beta=5", "trl.simpo_gamma=1.5"]).trl.simpo_gamma == 1.5


REFUSED = {
    "trl.bta=1": "did you mean trl.beta?",
    "+trl.bta=1": "did you mean trl.beta?",
    "trl.beta=0.3": "say beta=0.3",
    "trl.seed=3": "say seed=3",
    "trl.output_dir=x": "hydra.run.dir",
    "trl.report_to=wandb": "tracking=",
    "trl.run_name=x": "tracking.name",
    "trl.max_prompt_length=9": "use max_length",
    "trl.warmup_ratio=.1": "warmup_steps",
    "trl.cpo_alpha=1": "belongs to CPOConfig",
    "learning_rate=1e-6": "did you mean trl.learning_rate",
    "beta=abc": "beta: input should be a valid number",
    "beta=-1": "got -1; its grid is 0.05, 0.1, 0.2, 0.5",
    "beta=-1 allow_beta=true": "must lie in",
    "beta=nan": "must lie in",
    "model.tuning=qlra": "did you mean qlora?",
    "beta=7": "must lie in [0.001, 2] for method=dpo",
    "method=simpo beta=0.1": "its grid is 2, 2.5, 5, 10",
    "method=dpoo": "did you mean dpo?",
    "beta-sweep=standrd": "beta-sweep must be one of none",
    "beta_sweep=none": "did you mean beta-sweep?",
    "data.trian=x": "did you mean data.train?",
    "+foo=1": "unknown key foo",
    "+beta=1": "leave out the +",
    "trl.loss_type=sigmiod": "did you mean sigmoid?",
    "trl.loss_type=[sigmoid,ipoo]": "got 'ipoo'",
    "trl.f_divergence_type=kl": "must be one of alpha_divergence",
    "trl.eval_strategy=sometimes": "must be one of no, steps, epoch",
    "trl.eval_strategy=false": 'write trl.eval_strategy: "no"',
    "trl.optim=adamw_trch": "did you mean adamw_torch",
    "trl.bf16=maybe": "must be bool | None",
    "trl.per_device_train_batch_size=1.5": "must be int",
    "trl.num_train_epochs=many": "must be float",
    "trl.learning_rate=1": "allow_learning_rate=true",
    "trl.learning_rate=0": "must be above 0",
    "model=local": "model.path is missing",
    "model.tuning=loar": "'full', 'lora' or 'qlora'",
    "model.lora.rnk=8": "is not among the usual options of peft.LoraConfig",
    "trl.label_smoothing=0.1": "has no effect on sigmoid",
    "method=ipo trl.label_smoothing=0.1": "has no effect on ipo",
    "method=robust trl.label_smoothing=0.5": "in [0, 0.5)",
    "trl.loss_type=exo_pair": "must be above 0 for exo_pair",
    "trl.loss_type=ipo": "trl.loss_type=ipo is method=ipo, whose beta",
    "trl.loss_type=[sigmoid,sft]": "is method=dpo_sft",
    "method=cpo trl.loss_type=hinge": "defaults: [cpo, _self_]",
    "method=mpo trl.loss_weights=[1]": "one weight per loss",
    "method=kto trl.per_device_train_batch_size=1": "at least 2",
    "method=kto speed.group_by_length=true": "take auto",
    "speed.checkpointing=false trl.gradient_checkpointing=true": "contradict each other",
    "model.tuning=lora trl.sync_ref_model=true": "model.tuning=full",
    "data.on_bad_row=skip": "'fail' or 'drop'",
    "beta=0.1,0.2": "--multirun",
    "beta 0.1=3": "beta 0.1=3",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_cannot_train_as_meant_is_refused_with_its_remedy(overrides):
    parts = [overrides] if "beta 0.1" in overrides else overrides.split(" ")
    with pytest.raises(ConfigError) as refusal:
        compose(parts)
    assert REFUSED[overrides] in str(refusal.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["beta=7", "allow_beta=true"],
        ["trl.learning_rate=0.5", "allow_learning_rate=true"],
        ["method=ipo", "trl.loss_type=ipo"],  # a string where TRL wants a list
        ["trl.lr_scheduler_type=cosine_with_min_lr", "trl.lr_scheduler_kwargs={min_lr: 1e-8}"],
        ["trl.eval_strategy=no"],
        ["method=kto", "trl.desirable_weight=1.2"],
        ["model.tuning=lora", "+model.lora.exclude_modules=[lm_head]"],
        ["tracking=none", "callbacks=none"],
    ],
)
def test_what_is_meant_is_accepted(overrides):
    compose(overrides)


def test_learning_rates_come_from_command_line_then_experiment_then_model_then_method(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "slow.yaml").write_text("# @package _global_\ntrl: {learning_rate: 2e-4}\n")
    local = ["model=local", "model.path=m"]

    def rate(*overrides):
        return compose(overrides, config_dir=tmp_path).trl.learning_rate

    assert rate(*local) == 5e-7
    assert rate(*local, "model.tuning=lora") == 5e-6
    assert rate("model=tiny") == compose().model.learning_rate.full
    assert rate("experiment=slow") == 2e-4
    assert rate("experiment=slow", "trl.learning_rate=1e-4") == 1e-4


def test_a_learning_rate_that_ruins_a_pretrained_model_is_refused():
    with pytest.raises(ConfigError, match=r"at most 1e-05 for model\.tuning=full"):
        compose(["model=local", "model.path=m", "trl.learning_rate=5e-4"])


def test_a_user_s_own_method_needs_one_yaml_file_and_is_checked_like_ours(tmp_path):
    (tmp_path / "method").mkdir()
    mine = tmp_path / "method" / "mine.yaml"
    header = "# @package _global_\ndefaults: [dpo, _self_]\nmethod: {name: mine}\n"
    mine.write_text(header + "trl: {loss_type: [exo_pair], label_smoothing: 0.001}\n")
    assert compose(["method=mine"], config_dir=tmp_path).trl.loss_type == ["exo_pair"]
    mine.write_text(mine.read_text().replace("label_smoothing", "label_smothing"))
    with pytest.raises(ConfigError, match=r"did you mean trl\.label_smoothing"):
        compose(["method=mine"], config_dir=tmp_path)


def test_every_field_of_trl_is_reachable_without_a_plus():
    for method in ("dpo", "kto", "orpo", "cpo"):
        cfg = compose([f"method={method}"])
        fields = load_schema()["classes"][cfg.method.config.rsplit(".", 1)[-1]]["fields"]
        elsewhere = {
            "output_dir",
            "report_to",
            "run_name",
            "model_init_kwargs",
            "trust_remote_code",
            "resume_from_checkpoint",
        }
        assert set(cfg.trl) == set(fields) - elsewhere


def test_no_yaml_file_has_an_unquoted_no_or_off():
    def booleans(tree, path):
        for key, value in tree.items() if isinstance(tree, dict) else ():
            yield from booleans(value, f"{path}.{key}")
            if key.endswith("strategy") and isinstance(value, bool):
                yield f"{path}.{key}"

    found = [hit for file in CONF.rglob("*.yaml") for hit in booleans(yaml.safe_load(file.read_text()), file.name)]
    assert found == []


def test_composing_imports_neither_torch_nor_trl():
    heavy = "('torch', 'trl', 'transformers', 'wandb')"
    script = "import sys, dpo_kit.cli.main, dpo_kit.config.compose as c; c.compose(['method=kto']);"
    script += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plain_start_is_checked_without_loading_judge_sweep_help_or_reports(tmp_path):
    late = ("dpo_kit.judge", "dpo_kit.sweep", "dpo_kit.run.report", "scipy")
    of_config = ("arguments", "best_metric", "building", "derive_schema", "explain", "extensions", "help", "tools")
    late += tuple(f"dpo_kit.config.{name}" for name in of_config)
    script = "import sys, dpo_kit.cli.main as c\n"
    script += "c.refuse_early(c.read_arguments(['method=ipo', 'hydra.run.dir=run', 'tracking=none']))\n"
    script += f"print([name for name in sys.modules if name.startswith({late})])"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_near_misses_are_sought_among_real_keys_only():
    assert {"beta", "beta-sweep", "model.path", "trl.beta", "method.beta.grid"} <= set(known_keys())


@pytest.mark.parametrize("flag", [["--help"], ["--cfg", "job"]])
def test_help_and_cfg_job_answer_on_the_command_line(command, flag):
    done = command(*flag)
    assert done.returncode == 0
    assert "beta" in done.stdout


def test_help_names_every_option_and_what_beta_means(command):
    text = " ".join(command("--help").stdout.split())
    for method in METHODS:
        assert text.count(method) >= 2, method
    assert "Higher stays closer to the reference" in text and "2, 2.5, 5, 10" in text


def test_a_refusal_exits_2_and_writes_nothing(command, tmp_path):
    done = command("method=ipoo")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("dpo_kit: refused: method must be one of")
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_is_refused_whole_when_one_job_of_it_would_be(command, tmp_path):
    done = command("-m", "method=dpo,simpo", "beta=0.1,0.2")
    assert done.returncode == 2 and "method=simpo" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_errors_cross_process_borders():
    import pickle

    error = pickle.loads(pickle.dumps(ConfigError("beta must be > 0")))
    assert isinstance(error, ValueError) and str(error) == "beta must be > 0"


def test_the_schema_speaks_of_the_pinned_trl():
    from dpo_kit.config.trl_schema import installed_versions

    assert load_schema()["versions"] == installed_versions()


def test_another_trl_is_read_once_and_cached(tmp_path, monkeypatch):
    from dpo_kit.config import derive_schema, trl_schema

    calls = []
    monkeypatch.setenv("DPO_KIT_CACHE", str(tmp_path))
    monkeypatch.setattr(trl_schema, "installed_versions", lambda: {"trl": "1.99", "transformers": "5.99"})
    monkeypatch.setattr(derive_schema, "derive_schema", lambda: calls.append(1) or {"versions": "new", "classes": {}})
    for _ in range(2):
        trl_schema.load_schema.cache_clear()
        assert trl_schema.load_schema()["versions"] == "new"
    trl_schema.load_schema.cache_clear()
    assert calls == [1]


def test_the_checked_in_schema_is_what_the_installed_trl_says():
    """Fails at a TRL upgrade: run `python -m dpo_kit.config.derive_schema`, read the difference, then golden/."""
    import json

    from dpo_kit.config.derive_schema import PINNED_FILE, pinned_schema

    assert json.loads(json.dumps(pinned_schema())) == json.loads(PINNED_FILE.read_text())


def test_what_only_trl_s_code_says_is_declared_as_it_stands_there():
    """Which strings its trainer compares a field with, and the losses whose formula reads `label_smoothing`."""
    import ast
    import importlib
    import inspect
    import json

    from dpo_kit.config.derive_schema import BY_HAND, PINNED_FILE

    stated = json.loads(PINNED_FILE.read_text())["classes"]

    def name(node):
        return getattr(node, "attr", None) or getattr(node, "id", None)

    def strings(test):
        return {c.value for c in test.comparators if isinstance(c, ast.Constant) and isinstance(c.value, str)}

    compared, smoothed = {key: set() for key in BY_HAND}, {cls: set() for cls in stated}
    for cls, of in stated.items():
        module = of["path"].removesuffix(f".{cls}")
        module = getattr(importlib.import_module(module), cls).__module__
        sources = [
            inspect.getsource(importlib.import_module(of)) for of in (module, module.replace("_config", "_trainer"))
        ]
        for node in (node for source in sources for node in ast.walk(ast.parse(source))):
            if cls == "DPOConfig" and isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.NotEq):
                compared.get(name(node.left), set()).update(strings(node))
            if isinstance(node, ast.If) and isinstance(node.test, ast.Compare) and name(node.test.left) == "loss_type":
                read = {name(inner) for statement in node.body for inner in ast.walk(statement)}
                if isinstance(node.test.ops[0], ast.Eq) and {"logsigmoid", "label_smoothing"} <= read:
                    smoothed[cls].update(strings(node.test))
    assert compared == {key: set(stated["DPOConfig"]["fields"][key]["choices"]) for key in BY_HAND}
    assert smoothed == {cls: set(of["smoothed_losses"]) for cls, of in stated.items()}


def test_composed_trl_fields_build_trl_s_own_config_object(tmp_path):
    """The schema loses nothing: TRL's class built from the composed defaults equals TRL's class built from nothing."""
    from trl import DPOConfig

    fields = load_schema()["classes"]["DPOConfig"]["fields"]
    ours = DPOConfig(
        **{k: f["default"] for k, f in fields.items()} | {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    )
    theirs = DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert {f.name: getattr(ours, f.name) for f in dataclasses.fields(ours)} == {
        f.name: getattr(theirs, f.name) for f in dataclasses.fields(theirs)
    }


@pytest.mark.parametrize(
    "word", ["data.columns={chosen: better, rejected: worse}", "data.columns={chosen:better,rejected:worse}"]
)
def test_columns_are_mapped_by_a_literal_as_the_readme_writes_it(word):
    assert check(compose(["data=jsonl", "data.train=x.jsonl", word])).data.columns == {
        "chosen": "better",
        "rejected": "worse",
    }
    assert check(compose()).data.columns == {}


def test_a_key_of_an_option_that_is_not_chosen_is_said_to_be_one():
    with pytest.raises(ConfigError, match=r"judge\.module belongs to an option of the group judge .*: add judge=…"):
        compose(["method=kto_apo", "judge.module=x"])


def test_a_config_can_be_composed_while_a_job_of_hydra_runs():
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        job = GlobalHydra.instance().hydra
        assert compose(["seed=3"]).seed == 3
        assert GlobalHydra.instance().hydra is job
