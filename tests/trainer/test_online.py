"""Online DPO: the policy's fresh answers, a judge asked in both orders, coins that are seeded and counted."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from dpo_kit.callbacks.reference import Reference
from dpo_kit.config.compose import check, compose
from dpo_kit.config.settings import LLMJudge
from dpo_kit.errors import ConfigError, ModelError, TrainingError
from dpo_kit.evaluate.evaluation import evaluate
from dpo_kit.evaluate.job import plan
from dpo_kit.judge.open import ScoringJudge
from dpo_kit.model.load import load_tokenizer
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json
from dpo_kit.run.history import read_metrics
from dpo_kit.toy import MODEL, TRAIN
from dpo_kit.trainer.build import build_trainer, with_mixins
from dpo_kit.trainer.measuring import ProbeAlone, StartCheck
from dpo_kit.trainer.online import FreshAnswers, JudgedReward, add_spends, open_judged_reward
from dpo_kit.trainer.resume.which_rows import find_rows
from dpo_kit.trainer.rows import prepare_data, read_data
from dpo_kit.training import train
from tests import scored_by_text, tiny
from tests.scripted_server import Turn, scripted_server
from tests.small import SMALL, differences, few_pairs, hash_model, rows_of

LLM = ["judge=llm", "judge.model=m", "judge.retries=0"]


def online(file, *words):
    """Overrides of an online run that takes seconds."""
    return ["method=online_dpo", *few_pairs(file), "trl.max_new_tokens=24", *words]


def prompts_file(path, count=40):
    """The first embedded prompts, without answers."""
    rows = [json.loads(line)["prompt"] for line in TRAIN.read_text().splitlines()[:count]]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in rows))
    return path


class Scripted:
    """A judge that says what it is told to, and keeps what it was shown."""

    name = "scripted"

    def __init__(self, say, stopped=None):
        self.say, self.stopped, self.shown = say, stopped, []

    def decide(self, shown):
        self.shown += shown
        return [self.say(each) for each in shown]

    def scores(self, prompts, answers):
        return None

    def spend(self):
        return {"stopped": self.stopped}


def points(judge, prompts, first, second, step=1, seed=0):
    reward = JudgedReward(judge, seed)
    completions = [[{"role": "assistant", "content": text}] for text in (*first, *second)]
    state = SimpleNamespace(global_step=step)
    return reward(2 * prompts, completions, trainer_state=state, completion_ids=[]), reward.counts


# --- composing and refusing --------------------------------------------------------------------------------------

REFUSED = {
    "judge=human": "judge=human cannot answer while",
    "~judge": "needs somebody to compare its answers",
    "data=jsonl data.train=d": "data.gold is null, and method=online_dpo needs somebody",
    "judge=llm judge.model=m": "judge.base_url is missing",
    "judge=llm judge.model=m judge.base_url=http://h judge.temprature=1": "did you mean judge.temperature",
    "judge.tie_margin=-1": "judge.tie_margin: input should be greater",
    "speed.group_by_length=true": "needs the length of answers",
    "trl.max_new_tokens=128": "must be above trl.max_new_tokens=128, got 128",
    "trl.precompute_ref_log_probs=true": "belongs to DPOConfig, KTOConfig",
    "trl.label_smoothing=0.1": "belongs to",
    "trl.reward_model_path=m": "use judge=reward_model judge.path=…",
    "trl.load_best_model_at_end=true": "take probe/accuracy",
    "trl.metric_for_best_model=eval_loss": "no loss on given answers",
    "trl.loss_type=hinge": "must be one of sigmoid, ipo",
    "beta=9": "its grid is 0.05, 0.1, 0.2, 0.5",
}


@pytest.mark.slow
@pytest.mark.parametrize(("words", "said"), REFUSED.items())
def test_what_online_dpo_cannot_do_is_refused_with_its_remedy(words, said):
    with pytest.raises(ConfigError) as refused:
        compose(["method=online_dpo", *words.split()])
    assert said in str(refused.value)


def test_a_judge_is_refused_where_answers_are_given():
    with pytest.raises(ConfigError, match="has nothing to compare with method=kto"):
        compose(["method=kto", "judge=gold"])


def test_the_judge_of_fresh_answers_is_part_of_the_config_and_of_no_other_method_s():
    cfg = compose(["method=online_dpo"])
    assert (cfg.judge.kind, cfg.judge.module, cfg.trl.beta) == ("gold", "dpo_kit.toy", 0.1)
    assert compose(["method=online_dpo", "beta=2"]).trl.beta == 2  # TRL wants a list of numbers or one number
    assert "judge" not in compose(["method=dpo"])


# --- the judge as a reward ---------------------------------------------------------------------------------------


def test_every_two_answers_are_shown_in_both_orders_and_the_better_one_gets_the_point():
    judge = Scripted(lambda shown: "first" if len(shown.first) > len(shown.second) else "second")
    found, counts = points(judge, ["p", "q"], ["longer", "b"], ["a", "longest"])
    assert found == [1, 0, 0, 1]
    assert {(s.prompt, s.first, s.second) for s in judge.shown} == {
        ("p", "longer", "a"), ("p", "a", "longer"), ("q", "b", "longest"), ("q", "longest", "b")
    }  # fmt: skip
    assert counts == Counter(win=1, loss=1)


@pytest.mark.parametrize(("said", "why"), [("first", "order-dependent"), ("tie", "tie"), ("unjudged", "unjudged")])
def test_what_the_judge_does_not_decide_a_seeded_coin_decides_and_it_is_counted(said, why):
    prompts = [f"p{number}" for number in range(200)]
    rows = (prompts, [f"a{p}" for p in prompts], [f"b{p}" for p in prompts])
    found, counts = points(Scripted(lambda _: said), *rows)
    assert counts == Counter({why: 200}) and 70 < sum(found[:200]) < 130
    assert [a + b for a, b in zip(found[:200], found[200:], strict=True)] == [1] * 200
    assert points(Scripted(lambda _: said), *rows)[0] == found
    assert (
        points(Scripted(lambda _: said), prompts, rows[2], rows[1])[0] == found[200:] + found[:200]
    )  # place is nothing
    for other in ({"step": 2}, {"seed": 1}):
        assert points(Scripted(lambda _: said), *rows, **other)[0] != found


def test_equal_answers_are_not_shown_to_the_judge():
    judge = Scripted(lambda _: "tie")
    _, counts = points(judge, ["p", "q"], ["same", "a"], ["same", "b"])
    assert len(judge.shown) == 2 and counts == Counter(identical=1, tie=1)


def test_a_judge_that_has_given_up_stops_the_run():
    for stopped, remedy in (
        ("max_cost=1 is reached", "raise judge.max_cost, and the same command goes on"),
        ("max_requests=9 is reached", "raise judge.max_requests, and"),
        ("5 requests failed one after the other", "once it answers, and"),
    ):
        judge = Scripted(lambda shown: "unjudged" if shown.prompt == "q" else "tie", stopped=stopped)
        with pytest.raises(TrainingError) as refused:
            points(judge, ["p", "q"], ["a", "b"], ["c", "d"])
        assert f"no more verdicts ({stopped}), and coins alone teach nothing: {remedy}" in str(refused.value)


def test_processes_share_what_a_judge_may_cost_and_what_they_have_spent_is_added(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    opened = []
    monkeypatch.setattr(
        "dpo_kit.trainer.online.open_judge", lambda part, *_: nullcontext(opened.append(part) or Scripted(None))
    )
    judge = LLMJudge(kind="llm", model="m", base_url="http://h", rubric="r", max_cost=2, max_requests=11, price_in=1)
    for given in (judge, judge.model_copy(update={"max_cost": None, "max_requests": None})):
        with open_judged_reward(given, 0, RunDirectory(tmp_path)):
            pass
    assert [(part.max_cost, part.max_requests) for part in opened] == [(0.5, 2), (None, None)]
    first = {"model": "m", "replies": 3, "cost": 0.25, "failed": {"APIError": 1}, "stopped": None}
    second = {"model": "m", "replies": 4, "cost": 0.5, "failed": {"APIError": 2, "Other": 1}, "stopped": "full"}
    together = {"model": "m", "replies": 7, "cost": 0.75, "failed": {"APIError": 3, "Other": 1}, "stopped": "full"}
    assert add_spends([first, second]) == together and add_spends([{}, {}]) == {}


def _verdict(number, body):
    """By the texts alone, whatever their order; as good where both together are of odd length."""
    one, two = re.findall(r"<<<answer \d \w+>>>\n(.*?)\n<<<end", body["messages"][0]["content"], re.DOTALL)
    return Turn("VERDICT: TIE" if len(one + two) % 2 else f"VERDICT: {1 if one > two else 2}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_two_processes_log_and_report_is_of_both(tmp_path):
    with scripted_server(_verdict) as server:
        words = online(tmp_path / "pairs.jsonl", *LLM, f"judge.base_url={server.base_url}", "trl.logging_steps=1")
        launcher = ["torch.distributed.run", "--nproc_per_node", "2", "-m", "dpo_kit"]
        command = [sys.executable, "-m", *launcher, *words, "callbacks=none", f"hydra.run.dir={tmp_path / 'run'}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    judged = read_json(tmp_path / "run" / "result.json")["judge"]
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "judge/coin_share" in row]
    shares = {key: [row[f"judge/{key}_share"] for row in rows] for key in ("coin", "identical")}
    coins = {"coin": sum(judged["coins"].values()), "identical": judged["coins"]["identical"]}
    assert judged["comparisons"] == 2 * 4 * len(rows) and len(rows) == 4 and judged["decided"] > 0
    for key, count in coins.items():
        assert sum(shares[key]) * 2 * 4 == pytest.approx(count)
    assert judged["spend"]["replies"] == len(server.bodies) > 0


# --- rows --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_prompts_are_taken_once_each_from_pairs_and_from_rows_of_prompts_alone(tmp_path):
    lines = TRAIN.read_text().splitlines()[:30]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(line + "\n" for line in (*lines, *lines)))
    common = ["method=online_dpo", "data.eval=null", "data.holdout=0.2"]
    tokenizer = load_tokenizer(check(compose(common)).model)
    by_kind = {}
    for name, path in (("pairs", file), ("prompts", prompts_file(tmp_path / "prompts.jsonl", 30))):
        by_kind[name] = read_data(check(compose([*common, f"data.train={path}"])), tokenizer)
        assert by_kind[name].kind == name
    train_rows = {name: [row["prompt_id"] for row in data.train] for name, data in by_kind.items()}
    assert train_rows["pairs"] == train_rows["prompts"] and len(set(train_rows["pairs"])) == 24
    assert all(not {"chosen", "rejected"} & row.keys() for data in by_kind.values() for row in data.train)
    assert "chosen" in by_kind["pairs"].select[0]


@pytest.mark.slow
def test_a_prompt_that_leaves_no_room_for_an_answer_is_left_out_and_counted(tmp_path):
    file, held = prompts_file(tmp_path / "prompts.jsonl", 30), prompts_file(tmp_path / "held.jsonl", 60)
    held.write_text("".join(held.read_text().splitlines(keepends=True)[30:]))
    long = [{"role": "user", "content": "My iron flickers. " * 12}]
    file.write_text(file.read_text() + json.dumps({"prompt": long}) + "\n")
    words = ["method=online_dpo", f"data.train={file}", f"data.eval={held}"]
    kept = {}
    for tokens in (100, 24):
        settings = check(compose([*words, f"trl.max_new_tokens={tokens}"]))
        data = read_data(settings, load_tokenizer(settings.model))
        kept[tokens] = [row["prompt"] for row in data.train], data.report["dropped_by_reason"]
    assert long in kept[24][0] and kept[24][1] == {} and len(kept[24][0]) == 31
    assert long not in kept[100][0] and kept[100][1] == {"prompt leaves no room for an answer": 1}


# --- whole runs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run of six steps, saved and evaluated at every second one."""
    folder = tmp_path_factory.mktemp("online")
    words = online(folder / "pairs.jsonl", "trl.max_steps=6", "trl.save_steps=2", "trl.save_total_limit=9")
    train(compose([*words, "trl.logging_steps=4"]), folder / "run")
    return folder / "run", [*words, "trl.logging_steps=4"]


def losses(monkeypatch, run):
    """The losses of the batches of `run()`, unrounded."""
    seen, honest = [], OnlineDPOTrainer.training_step

    def recorded(self, *args, **kwargs):
        loss = honest(self, *args, **kwargs)
        seen.append(float(loss))
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(OnlineDPOTrainer, "training_step", recorded)
        run()
    return seen


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize(("fast", "relative"), [("false", 1e-6), ("auto", 1e-5)])
def test_losses_equal_those_of_plain_trl_with_the_same_reward(tuning, fast, relative, tmp_path, monkeypatch):
    words = ["judge.module=tests.scored_by_text", f"model.tuning={tuning}", f"speed.share_prefix={fast}"]
    more = ["trl.learning_rate=3e-4", "trl.save_strategy=no", "trl.max_steps=6"]
    cfg = compose(online(tmp_path / "pairs.jsonl", *words, *more))
    ours = losses(monkeypatch, lambda: train(cfg, tmp_path / "ours"))
    theirs = losses(monkeypatch, lambda: plain_trl(cfg, tuning, tmp_path / "theirs").train())
    assert ours == pytest.approx(theirs, rel=relative)
    assert len(theirs) == 6 and len(set(theirs)) > 3


def plain_trl(cfg, tuning, folder):
    """What a script of one's own would do with the same prompts and the same reward, unknown to any judge."""
    settings = check(cfg)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    rows = prepare_data(settings, tokenizer).train
    args = OnlineDPOConfig(
        output_dir=str(folder / "trl"), report_to="none", seed=0, use_cpu=True, bf16=False, max_steps=6, max_length=128,
        gradient_checkpointing=False, warmup_steps=0.1, save_strategy="no", learning_rate=3e-4, max_new_tokens=24,
        per_device_train_batch_size=4, logging_nan_inf_filter=False,
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear")

    def reward(prompts, completions, **_):
        return scored_by_text.gold_rewards(prompts, [each[0]["content"] for each in completions])

    return OnlineDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32"),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=tokenizer,
        peft_config=lora if tuning == "lora" else None,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_goes_on_from_a_checkpoint_equals_one_that_was_never_stopped(ended, tmp_path):
    whole, words = ended
    stopped = shutil.copytree(whole, tmp_path / "run")
    (stopped / "result.json").unlink()
    for later in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(stopped / "checkpoints" / later)
    train(compose(words), stopped)
    assert differences(whole, stopped) == []
    here, there = (read_json(folder / "result.json")["judge"] for folder in (whole, stopped))
    assert here == there and here["comparisons"] == 6 * 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_measuring_changes_nothing_of_what_is_drawn_and_trained(ended, tmp_path):
    whole, words = ended
    train(compose([*words, "callbacks=none"]), tmp_path / "run")
    assert hash_model(whole) == hash_model(tmp_path / "run")
    drawn = [[json.loads(row).get("logps/chosen") for row in rows_of(folder)["metrics.jsonl"]] for folder in
             (whole, tmp_path / "run")]  # fmt: skip
    assert [each for each in drawn[0] if each] == [each for each in drawn[1] if each]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_records_what_every_run_does_and_what_the_judge_said(ended):
    whole, _ = ended
    history = read_metrics(whole / "metrics.jsonl")
    measured = {key for row in history for key in row}
    assert {"probe/margin_nats", "probe/reward_chosen", "probe/kl_forward_rb_nats", "probe/kl_reverse_rb_nats",
            "gold/reward", "judge/coin_share", "judge/identical_share", "judge/score"} <= measured  # fmt: skip
    judged = read_json(whole / "result.json")["judge"]
    assert judged["comparisons"] == judged["decided"] + sum(judged["coins"].values()) == 24
    assert (judged["name"], judged["coins"]["order-dependent"]) == ("gold dpo_kit.toy", 0)
    assert [row["step"] for row in history if "probe/accuracy" in row] == [0, 2, 4, 6]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_learns_on_the_embedded_lab(tmp_path):
    """Measured: gold reward .15 → 2.27 in an epoch at a reverse KL of 1.6 nats; here 60 of its 150 steps."""
    words = ["method=online_dpo", "tracking=none", "trl.max_steps=60", "trl.eval_strategy=no", "trl.save_strategy=no"]
    result = train(compose(words), tmp_path / "run")
    assert result.final["gold/reward_low"] > result.start["gold/reward_high"] + 0.3
    assert 0.1 < result.final["probe/kl_reverse_rb_nats"] < 5


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_over_beta_works_end_to_end(command, tmp_path):
    words = [word for word in online(tmp_path / "pairs.jsonl") if not word.startswith("callbacks.prompts")]
    done = command(*words, "beta-sweep=standard", "callbacks.prompts=16", "hydra.sweep.dir=swept", timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "swept"
    assert len(list(folder.glob("online_dpo-beta*-seed0/result.json"))) == 4
    assert (folder / "frontier.png").exists() and (folder / "best.json").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_its_tools_plan_show_evaluate_and_export_it_or_say_why_not(ended, command, tmp_path):
    whole, words = ended
    planned = command("plan", *words)
    assert planned.returncode == 0 and "6 steps of 4 rows" in planned.stdout
    shown = command(*words, "dry_run=true")
    assert shown.returncode == 0 and "two answers of at most 24 tokens, drawn and compared" in shown.stdout
    (job,) = plan([f"run={whole}", f"out={tmp_path / 'found'}", "win_rate.limit=8"])
    found = evaluate(job)
    assert found["status"] == "done" and 0 <= found["win_rate"] <= 1 and "accuracy" in found
    assert command("export", f"run={whole}", f"out={tmp_path / 'plain'}").returncode == 0
    script = command("export", f"run={whole}", "mode=script")
    assert script.returncode == 2 and "drew its answers and had them judged" in script.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_prompts_alone_train_and_are_evaluated_without_preferences(tmp_path):
    words = [*SMALL, "method=online_dpo", f"data.train={prompts_file(tmp_path / 'prompts.jsonl')}", "data.eval=null",
             "data.holdout=0.4", "trl.max_new_tokens=24"]  # fmt: skip
    result = train(compose(words), tmp_path / "run")
    assert "gold/reward" in result.final and "probe/accuracy" not in result.final
    (job,) = plan([f"run={tmp_path / 'run'}", "win_rate.limit=8", "parts=[preferences,win_rate]"])
    found = evaluate(job)
    assert found["parts"]["preferences"].startswith("skipped") and "win_rate" in found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_language_model_that_follows_the_order_decides_nothing(tmp_path):
    with scripted_server(lambda number, body: Turn("VERDICT: 1")) as server:
        cfg = compose(online(tmp_path / "pairs.jsonl", *LLM, f"judge.base_url={server.base_url}", "callbacks=none"))
        result = train(cfg, tmp_path / "run")
    assert result.judge["decided"] == 0
    assert result.judge["coins"]["order-dependent"] + result.judge["coins"]["identical"] == 16
    assert len(server.bodies) == 2 * result.judge["coins"]["order-dependent"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_that_fails_stops_the_run_and_it_goes_on_once_it_answers_without_asking_twice(tmp_path):
    broken = True

    def script(number, body):
        return Turn(status=500) if broken and number >= 20 else Turn("VERDICT: TIE")

    with scripted_server(script) as server:
        words = [*LLM, f"judge.base_url={server.base_url}", "trl.save_steps=1", "judge.workers=1", "callbacks=none"]
        cfg = compose(online(tmp_path / "pairs.jsonl", *words))
        with pytest.raises(TrainingError, match="requests failed one after the other"):
            train(cfg, tmp_path / "run")
        assert read_json(tmp_path / "run" / "result.json")["status"] == "failed"
        broken = False
        result = train(cfg, tmp_path / "run")
    assert result.status == "done" and result.judge["comparisons"] == 16
    assert result.judge["spend"]["replies"] == sum(count == 1 for count in server.answered.values())


# --- TRL's own faults, and the checks at the start ---------------------------------------------------------------


def tiny_trainer(folder, output, mixin=None, batch=8, accumulated=1, prompts=None, **given):
    """TRL's trainer on a tiny model and 16 prompts, whose reward is the text's. Ours takes prompts as JSON."""
    spell = json.dumps if mixin else str
    rows = [{"prompt": spell(prompt)} for prompt in prompts or [row["prompt"] for row in tiny.pairs(16)]]
    options = {"max_steps": 1, "max_new_tokens": 6, "max_length": 32, "learning_rate": 1e-3, "logging_steps": 1}
    args = OnlineDPOConfig(
        output_dir=str(output), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated, save_strategy="no", **options,
    )  # fmt: skip
    return with_mixins(OnlineDPOTrainer, *([mixin] if mixin else []))(
        args=args, train_dataset=Dataset.from_list(rows),
        **{"model": LlamaForCausalLM.from_pretrained(folder), "processing_class": tiny.tokenizer(),
           "reward_funcs": reward_of_text} | given,
    )  # fmt: skip


def reward_of_text(prompts, completions, **_):
    return scored_by_text.gold_rewards(prompts, completions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.saved_model(tmp_path_factory.mktemp("model"))


def gradient_norm(folder, output, monkeypatch, mixin, batch, accumulated):
    """Of the first step, on answers that depend on their prompt alone."""

    def scripted(self, model, prompts, images=None):
        ids = self.processing_class(text=prompts, return_tensors="pt", padding=True, padding_side="left")
        answers = [[2 + (len(prompt.strip('"')) * (7 + half) + place) % 12 for place in range(4)] for half in (0, 1)
                   for prompt in prompts]  # fmt: skip
        mask = torch.ones(len(answers), 4, dtype=torch.long)
        return ids["input_ids"].repeat(2, 1), ids["attention_mask"].repeat(2, 1), torch.tensor(answers), mask, None

    with monkeypatch.context() as patch:
        patch.setattr(OnlineDPOTrainer, "_generate", scripted)
        trainer = tiny_trainer(folder, output, mixin, batch, accumulated)
        trainer.train()
    return next(row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row)


@pytest.mark.slow
def test_gradients_do_not_grow_with_accumulation_as_plain_trl_s_do(folder, tmp_path, monkeypatch):
    """The fault of TRL that we avoid is still there."""
    common = (folder, tmp_path, monkeypatch)
    whole = gradient_norm(*common, FreshAnswers, 8, 1)
    assert gradient_norm(*common, FreshAnswers, 4, 2) == pytest.approx(whole, rel=1e-4)
    plain = gradient_norm(*common, None, 4, 2)
    assert plain == pytest.approx(2 * whole, rel=1e-4)


def first_answers(trainer):
    """What TRL's trainer generates at its first step: ids and mask of the prompts, ids of the answers."""
    honest, seen = OnlineDPOTrainer._generate, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnlineDPOTrainer, "_generate", lambda *given: seen.append(honest(*given)) or seen[-1])
        trainer.train()
    return seen[0][:3]


@pytest.mark.slow
def test_prompts_are_read_as_everywhere_with_tools_and_the_token_that_begins_texts(folder, tmp_path):
    """Stock TRL leaves out both; where a judge is shown an answer, it is with the special tokens of its thoughts."""
    tokenizer = tiny.tokenizer([*tiny.WORDS, "user", "assistant", "<bos>"])
    tokenizer.add_special_tokens({"bos_token": "<bos>", "additional_special_tokens": ["cat"]})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 14)])
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}" + tiny.TEMPLATE
    shown = []

    def judge(prompts, completions, **_):
        shown.extend(zip(prompts, completions, strict=True))
        return [float(text.count("cat")) for text in completions]

    chat = [{"role": "user", "content": "red", "tools": [{"name": "dog"}]}]
    read = {}
    for name, prompts in (("chat", [chat] * 8), ("text", ["red one"] * 8)):
        given = {"processing_class": tokenizer, "reward_funcs": judge, "model": tiny.model(vocabulary=15)}
        trainer = tiny_trainer(folder, tmp_path, FreshAnswers, prompts=prompts, **given)
        ids, mask, answers = first_answers(trainer)
        read[name] = ids[0][mask[0].bool()].tolist()
        assert any("cat" in text for _, text in shown) == any(8 in row for row in answers.tolist())
        assert {json.dumps(prompt) for prompt, _ in shown} == {json.dumps(prompts[0])}
        shown.clear()
    assert read["chat"] == tokenizer("dog user red <eos> assistant", add_special_tokens=False)["input_ids"]
    assert read["text"] == tokenizer("<bos> red one", add_special_tokens=False)["input_ids"]


@pytest.mark.slow
def test_plain_trl_cannot_evaluate_and_we_measure_with_the_callbacks(folder, tmp_path):
    rows = Dataset.from_list([{"prompt": "red one"}])
    with pytest.raises(ValueError, match="exactly one of input_ids"):  # the batch is text
        tiny_trainer(folder, tmp_path, eval_dataset=rows).evaluate()
    assert tiny_trainer(folder, tmp_path, ProbeAlone, eval_dataset=rows).evaluate() == {}


@pytest.mark.slow
def test_a_reference_that_is_not_the_start_is_refused_before_the_first_step(folder, tmp_path):
    honest = tiny_trainer(folder, tmp_path, FreshAnswers)
    honest.add_callback(StartCheck(honest, Reference(honest)))
    honest.train()
    other = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    wrong = tiny_trainer(folder, tmp_path, FreshAnswers, ref_model=other)
    wrong.add_callback(StartCheck(wrong, Reference(wrong)))
    with pytest.raises(ModelError, match="at step 0 it must give the same"):
        wrong.train()
    assert (honest.state.global_step, wrong.state.global_step) == (1, 0)


@pytest.mark.slow
def test_the_prompts_of_a_batch_that_is_not_finite_are_found(folder, tmp_path):
    trainer = tiny_trainer(folder, tmp_path)
    prompts = trainer.train_dataset["prompt"]
    assert find_rows(trainer, {"prompt": [prompts[3], prompts[5]]}) == [3, 5]


@pytest.mark.slow
def test_a_scoring_judge_s_answers_within_the_tie_margin_go_to_the_coin():
    judge = ScoringJudge("lengths", lambda prompts, answers: [float(len(each)) for each in answers], 1.0)
    _, counts = points(judge, ["p", "q"], ["aa", "a"], ["aaa", "aaaa"])
    assert counts == Counter(tie=1, loss=1)


@pytest.mark.slow
def test_the_trainer_is_built_with_what_the_method_file_says(tmp_path):
    settings = check(compose(online(tmp_path / "pairs.jsonl")))
    tokenizer, run = load_tokenizer(settings.model), RunDirectory(tmp_path / "run")
    reward = JudgedReward(Scripted(lambda _: "tie"), 0)
    trainer = build_trainer(settings, prepare_data(settings, tokenizer), tokenizer, run, reward)
    assert trainer.train_dataset.column_names == ["prompt"] and trainer.reward_funcs == [reward]
    assert reward in trainer.callback_handler.callbacks
