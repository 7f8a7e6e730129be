"""A plan foresees memory from the config alone; a dry run checks everything and writes nothing."""

import json
import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from trl.trainer.utils import disable_dropout_in_model

from dpo_kit import ConfigError
from dpo_kit.cli.plan import PeakMemory, Plan, advise, main, plan_run, show_dropped, show_row, split_words
from dpo_kit.config.compose import check, compose
from dpo_kit.config.settings import Callbacks
from dpo_kit.data.other_rows import unpair
from dpo_kit.model.load import load_tokenizer
from dpo_kit.run.files import read_json
from dpo_kit.toy import MODEL
from dpo_kit.trainer import memory
from dpo_kit.trainer.arguments import build_arguments
from dpo_kit.trainer.memory import (
    _measuring,
    batch_shape,
    build_weightless,
    count_activations,
    estimate,
    estimate_by_layers,
    optimizer_bytes,
    worst_batch,
)
from dpo_kit.trainer.prefix import Layout
from dpo_kit.trainer.rows import read_data
from dpo_kit.trainer.speed import SHARING
from tests.conftest import ROOT
from tests.small import few_pairs, write_pairs

ROWS = [{"tokens": {"prompt": 10, "chosen": 6, "rejected": 4, "cut": False}} for _ in range(8)]
SHAPE = ((0, 400), (0, 300), (160, 200), (120, 180))


def _settings(*words):
    return check(compose([*words, "tracking=none"]))


def _args(tmp_path, *words):
    return build_arguments(_settings(*words), [{"label": True}, {"label": False}] * 32, tmp_path, 96)


def _memory(tmp_path, *words, loads_reference=False):
    settings, args = _settings(*words), _args(tmp_path, *words)
    model = build_weightless(settings, args)
    return estimate(model, settings, args, ROWS, loads_reference=loads_reference, shares=True)


def _kept_on_the_cpu(model, half):
    """Bytes that a real forward pass of a batch of SHAPE keeps, weights aside; in bfloat16 where `half`."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor
        return tensor

    ids = torch.zeros(1, sum(own for _, own in SHAPE), dtype=torch.long)
    layout = Layout(ids, ids, ids[0], SHAPE, keys=None, query_ends=ids[0], key_ends=ids[0])
    bare = model.get_base_model() if hasattr(model, "peft_config") else model
    bare.set_attn_implementation(SHARING)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
        bare.base_model(
            input_ids=ids, position_ids=ids, attention_mask=torch.ones(1, 1, 1, 1), use_cache=False, layout=layout
        )
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("half", ["false", "true"])
@pytest.mark.parametrize("words", [[], ["model.tuning=lora"], ["model.tuning=lora", "model.lora.lora_dropout=0"]])
def test_activations_counted_without_weights_are_those_of_a_real_forward_pass(words, half, tmp_path):
    from peft import get_peft_model

    from dpo_kit.model.adapter import build_adapter

    words = [*words, f"trl.bf16={half}"]
    settings = _settings(*words)
    real = AutoModelForCausalLM.from_pretrained(MODEL)
    adapter = build_adapter(settings.model)
    real = (get_peft_model(real, adapter) if adapter else real).train()
    disable_dropout_in_model(real)  # as TRL does
    args = _args(tmp_path, *words)
    planned = count_activations(build_weightless(settings, args), SHAPE, args)[0]
    assert planned == pytest.approx(_kept_on_the_cpu(real, half == "true"), rel=0.001)


def test_checkpointing_keeps_less_and_computes_one_layer_again(tmp_path):
    words = ["trl.gradient_checkpointing=true"]
    model = _settings()
    args, sparing = _args(tmp_path), _args(tmp_path, *words)
    whole = count_activations(build_weightless(model, args), SHAPE, args)[0]
    saved = sum(count_activations(build_weightless(model, sparing), SHAPE, sparing))
    assert whole / 3 < saved < 0.6 * whole  # three layers, of which one is computed again at a time


@pytest.mark.parametrize(
    "words",
    [
        ["model.tuning=lora"],
        *(
            pytest.param(words, marks=pytest.mark.slow)
            for words in ([], ["trl.gradient_checkpointing=true"], ["trl.bf16=true"])
        ),
    ],
)
def test_memory_counted_of_two_layers_is_that_of_all_where_they_are_alike(words, tmp_path, monkeypatch):
    settings, args = _settings(*words), _args(tmp_path, *words)
    whole = _memory(tmp_path, *words)
    drawn_on = estimate_by_layers(settings, args, ROWS, loads_reference=False)
    assert vars(drawn_on) == pytest.approx(vars(whole), rel=0.05)
    real = memory.build_weightless

    def unlike(settings, args, layers=None):
        model = real(settings, args, layers)
        if layers is None:
            model.more = torch.nn.Linear(3, 3)
        return model

    monkeypatch.setattr(memory, "build_weightless", unlike)
    counted = []
    monkeypatch.setattr(memory, "estimate", lambda model, *_, **__: counted.append(model) or whole)
    estimate_by_layers(settings, args, ROWS, loads_reference=False)
    assert len(counted) == 3  # one layer, two, and the whole


def test_an_adapter_on_the_last_layer_alone_is_counted_on_the_whole_model(tmp_path):
    words = ["model.tuning=lora", "model.lora.target_modules=[q_proj]", "+model.lora.layers_to_transform=[2]"]
    settings, args = _settings(*words), _args(tmp_path, *words)
    assert vars(estimate_by_layers(settings, args, ROWS, loads_reference=False)) == vars(_memory(tmp_path, *words))


def test_bytes_of_weights_gradients_and_adam_are_four_four_and_eight_for_each_weight(tmp_path):
    count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(MODEL).parameters())
    memory = _memory(tmp_path, loads_reference=True)
    assert (memory.parameters, memory.reference, memory.gradients) == (4 * count,) * 3
    assert memory.optimizer == 8 * count
    lora = _memory(tmp_path, "model.tuning=lora")
    assert lora.reference == 0 and lora.gradients < 4 * count and lora.optimizer == 2 * lora.gradients


def test_a_quantised_base_takes_half_a_byte_and_its_scales_for_each_weight_of_its_layers(tmp_path):
    memory = _memory(tmp_path, "model.tuning=qlora", "model.lora.r=1")
    sizes = AutoModelForCausalLM.from_pretrained(MODEL)
    linear = sum(p.numel() for n, p in sizes.named_parameters() if p.dim() == 2 and "embed" not in n)
    rest = sum(p.numel() for p in sizes.parameters()) - linear
    assert memory.parameters - memory.gradients == pytest.approx(linear * (0.5 + 1 / 64) + 4 * rest, rel=0.01)


def test_measures_of_one_s_own_take_the_memory_of_any_other_of_the_probe():
    none = Callbacks.model_construct(preference_margin=False, implicit_reward=False, kl_drift=False, metrics={})
    model = SimpleNamespace(config=AutoConfig.from_pretrained(MODEL))
    taken = [
        _measuring(none.model_copy(update=change), model, 0, False, ROWS)
        for change in ({}, {"metrics": {"own": "a.b"}}, {"preference_margin": True})
    ]
    assert taken[0] == 0 < taken[1] == taken[2]


def test_gradients_take_the_place_of_activations_unless_they_are_accumulated(tmp_path):
    memory = _memory(tmp_path, "callbacks=none")
    forward = memory.activations + memory.logits
    assert memory.peak(False) == memory.lasting + max(forward, memory.passes)
    assert memory.gradients < memory.passes < memory.activations + memory.gradients
    assert memory.peak(True) == memory.lasting + forward + memory.gradients


@pytest.mark.parametrize(
    ("name", "size"), [("adamw_torch_fused", 8), ("adamw_bnb_8bit", 2), ("sgd", 0), ("lion_32bit", 4)]
)
def test_an_optimizer_keeps_what_its_name_says(name, size):
    assert optimizer_bytes(name) == size


def test_a_batch_shares_its_prompts_and_is_cut_and_padded_as_training_does():
    lengths = [
        {"prompt": 10, "chosen": 6, "rejected": 4, "cut": False},
        {"prompt": 5, "chosen": 9, "rejected": 1, "cut": True},
    ]
    assert batch_shape(lengths, True, None) == ((0, 16), (0, 14), (10, 4), (5, 1))
    assert batch_shape(lengths, False, None) == ((0, 16),) * 4
    assert batch_shape(lengths, False, 12) == ((0, 12),) * 4
    assert batch_shape([{"prompt": 1, "chosen": 50, "rejected": 50}], True, None) == ((0, 51), (0, 51))  # not worth it
    assert batch_shape([{"prompt": 4, "completion": 3}], True, None) == ((0, 7),)


def test_the_worst_batch_is_the_one_with_most_tokens(tmp_path):
    rows = [{"tokens": {"prompt": n, "chosen": 1, "rejected": 1}} for n in (1, 1, 1, 90, 80, 1, 1, 1)]
    args = _args(tmp_path)
    assert max(own for _, own in worst_batch(rows, 2, True, args)) == 91
    args.train_sampling_strategy = "group_by_length"
    assert [own for _, own in worst_batch(rows, 2, True, args)] == [91, 81, 1, 1]
    args.train_sampling_strategy = "sequential"  # rows 3 and 4 stand in different batches
    assert [own for _, own in worst_batch(rows, 2, True, args)] == [2, 91, 1, 1]


def test_a_row_of_one_answer_counts_that_answer(tmp_path):
    pair = {
        "prompt": "a",
        "chosen": "b",
        "rejected": "c",
        "tokens": {"prompt": 10, "chosen": 6, "rejected": 4, "cut": 0},
    }
    rows = unpair([pair])
    args = _args(tmp_path)
    assert [sum(own for _, own in worst_batch([row], 1, True, args)) for row in rows] == [16, 14]


def test_a_plan_counts_steps_tokens_and_disk_and_loads_no_weights(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", refuse)
    words = [*few_pairs(tmp_path / "pairs.jsonl"), "trl.max_steps=12", "trl.save_total_limit=1"]
    found = plan_run(_settings(*words))
    assert (found.steps, found.batch, found.epochs) == (12, 4, 2.0)
    assert 48 * 20 < found.tokens < 48 * 120
    weights = 4 * found.parameters
    assert found.disk == weights * (1 + 2 * 3)  # the model, and two checkpoints with Adam's values
    assert not [path for path in tmp_path.iterdir() if path.name != "pairs.jsonl"]


@pytest.mark.parametrize(
    ("billions", "tuning", "said"),
    [
        (1, "full", "fits one device of 24 GB"),
        (4, "full", "fits one device of 80 GB"),
        (8, "full", "fits 2 devices of 80 GB, sharded"),
        (70, "full", "fits 16 devices of 80 GB, sharded"),
        (300, "qlora", "fits no usual device"),
    ],
)
def test_advice_follows_memory_and_tuning(billions, tuning, said):
    size = billions * 10**9
    memory = {"parameters": 4 * size, "reference": 0, "optimizer": 8 * size, "gradients": 4 * size}
    found = Plan(memory, 16 * size + 2 * 10**9, 1, 1, 1.0, 1, 1, size)
    assert said in advise(found, _settings(f"model.tuning={tuning}"))


def test_what_a_plan_prints_to_start_the_run_with_can_be_pasted():
    size = 10**9
    memory = {"parameters": 4 * size, "reference": 0, "optimizer": 8 * size, "gradients": 4 * size}
    words = ["model=local", "model.path=my model", "data.train='v=2.jsonl'"]
    said = advise(Plan(memory, 16 * size, 1, 1, 1.0, 1, 1, size), _settings(), words)
    alone, several = said.splitlines()
    assert shlex.split(alone.partition(": ")[2]) == ["python", "-m", "dpo_kit", *words]
    assert shlex.split(several.partition(": ")[2])[-len(words) - 2 :] == ["-m", "dpo_kit", *words]


def test_the_peak_of_a_block_is_measured():
    with PeakMemory() as peak:
        torch.ones(50_000_000)
        block = torch.ones(50_000_000)
        del block
    assert 180e6 < peak.bytes < 450e6


def test_one_row_is_shown_as_the_loss_sees_it():
    tokenizer = load_tokenizer(_settings().model)
    row = {"pair_id": "p1", "prompt": "one two three", "chosen": " four", "rejected": " five six"}
    text = show_row(row, tokenizer, {"max_length": 5, "truncation_mode": "keep_start"})
    assert re.search(r"chosen \(\d \+ \d tokens", text) and "cut by trl.max_length=5" in text
    assert text.count("▶") == 3


def test_the_tool_takes_a_run_s_overrides_and_its_own_keys():
    own, overrides = split_words(["method=ipo", "first_step=true", "out=x.json", "trl.max_steps=3"])
    assert own == {"first_step": "true", "out": "x.json"} and overrides == ["method=ipo", "trl.max_steps=3"]
    for words, said in ((["ipo"], "key=value"), (["first_step=yes"], "first_step must be true or false")):
        with pytest.raises(ConfigError, match=said):
            split_words(words)
    assert main(["method=ipoo"]) == 2


@pytest.mark.slow
def test_the_plan_is_written_and_compared_with_the_first_steps(command, tmp_path):
    words = few_pairs(tmp_path / "pairs.jsonl")
    done = command("plan", *words, "first_step=true", "out=plan.json")
    assert done.returncode == 0, done.stderr
    assert "measured in three steps" in done.stdout and "fits one device" in done.stdout
    found = read_json(tmp_path / "plan.json")
    assert found["measured"]["peak"] > 0 and not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_a_dry_run_shows_a_row_and_the_plan_and_writes_nothing(command, tmp_path):
    done = command(*few_pairs(tmp_path / "pairs.jsonl"), "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "pairs.jsonl is read as pairs (prompt, chosen, rejected)" in done.stdout
    assert "▶" in done.stdout and "fits one device" in done.stdout and "nothing was trained" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


@pytest.mark.slow
def test_a_dry_run_of_a_sweep_names_its_jobs_and_trains_none(command, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_pairs(tmp_path / folder / "p.jsonl")
    done = command("-m", "data=jsonl", "data.train=a/p.jsonl,b/p.jsonl", "beta=0.1,0.2", "dry_run=True")
    assert done.returncode == 0, done.stderr
    names = re.findall(r"^  (dpo-\S+)$", done.stdout, re.M)
    assert names == [f"dpo-beta{beta}-seed0-train{folder}_p.jsonl" for folder in "ab" for beta in (0.1, 0.2)]
    assert "4 jobs, into outputs/sweep-" in done.stdout and "nothing was trained" in done.stdout
    assert not (tmp_path / "outputs").exists()


def test_a_dry_run_says_which_rows_would_be_dropped_and_where_they_stand(tmp_path):
    file = write_pairs(tmp_path / "pairs.jsonl", 20)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number in (3, 7):
        rows[number - 1]["rejected"] = rows[number - 1]["chosen"]
    rows[9]["prompt"][0]["content"] = "why " * 900
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = _settings("data=jsonl", f"data.train={file}", "data.holdout=0.3")
    said = show_dropped(read_data(settings, load_tokenizer(settings.model)))
    assert re.search(r"^rows: \d+ to train on, \d+ and \d+ held out, 3 dropped$", said, re.M)
    assert re.search(rf"2 \(.*identical.*\): {file}:3, {file}:7$", said, re.M), said
    assert re.search(rf"1 \(.*\): {file}:10$", said, re.M)


@pytest.mark.slow
def test_estimates_stay_within_a_fifth_of_what_training_takes(tmp_path):
    import subprocess
    import sys

    script = [sys.executable, str(ROOT / "examples" / "benchmark" / "plan.py"), "sizes=29M", "cells=1"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    ratio = float(re.search(r"29M full \d+ \d+ ([\d.]+)", done.stderr)[1])
    assert 0.8 < ratio < 1.2


@pytest.mark.slow
def test_the_readme_says_what_a_model_of_half_a_billion_weights_needs(tmp_path):
    import subprocess
    import sys

    script = [sys.executable, str(ROOT / "examples" / "benchmark" / "plan.py"), "table=true", "sizes=Qwen2.5-0.5B"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    found = re.findall(r"│ (full|q?lora) +│ +([\d.]+) │ (.+?) +│", done.stdout)
    shown = re.findall(
        r"^\| (?:Qwen2.5-0.5B )?\| (full|q?lora) \| ([\d.]+) \| (.+?) \|$",
        (ROOT / "docs" / "devices.md").read_text(),
        re.M,
    )
    assert len(found) == 3 and found == shown[:3]
