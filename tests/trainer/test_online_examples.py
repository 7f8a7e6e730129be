"""The examples on online preferences: online against offline at equal KL, and rounds that survive a kill."""

import importlib.util
import os
import signal
import subprocess
import sys
import time

import pytest

from dpo_kit.run.files import read_json
from tests.conftest import ROOT
from tests.small import hash_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SHORT = ["trl.max_steps=3", "callbacks.prompts=8", "callbacks.pairs=8", "trl.per_device_train_batch_size=4"]


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(name, *words):
    return [sys.executable, str(ROOT / "examples" / f"{name}.py"), *words]


def test_gold_reward_at_a_kl_is_interpolated_by_prompt_in_the_square_root_of_the_kl():
    line = [(0.0, {"p": 0.0, "q": 1.0}), (1.0, {"p": 1.0, "q": 1.0}), (9.0, {"p": 3.0, "q": 0.0})]
    module = example("online_against_offline")
    assert module.reward_at(4.0, line) == pytest.approx({"p": 2.0, "q": 0.5})  # √4 is half-way from √1 to √9
    assert module.reward_at(0.25, line) == pytest.approx({"p": 0.5, "q": 1.0})
    assert module.reward_at(9.0, line) == pytest.approx(line[2][1])


def test_a_difference_has_its_interval_and_none_is_reported_as_none():
    module = example("online_against_offline")
    prompts = [f"p{number}" for number in range(40)]

    def level(gap):
        lines = {
            (name, seed): [(0.0, dict.fromkeys(prompts, 0.0)), (1.0, {p: gap * (name == "online") + i % 5 * (seed - 1)
             for i, p in enumerate(prompts)}), (4.0, dict.fromkeys(prompts, 9.0))]
            for name in ("offline", "online") for seed in (0, 1, 2)
        }  # fmt: skip
        found = module.difference_at(1.0, lines, [0, 1, 2])
        return found | {"p_holm": found["p"]}

    apart, same = level(1.0), level(0.0)
    assert (apart["difference"], apart["low"], apart["high"]) == pytest.approx((1.0, 1.0, 1.0))
    assert apart["by_seed"] == pytest.approx([1.0] * 3)
    assert module.verdict([apart]) == "Online is higher at 1.00 nats."
    assert module.verdict([same]) == "Not told apart at 1.00 nats."
    assert module.verdict([]).startswith("No KL is reached by both")


def test_online_and_offline_are_compared_on_the_same_prompts_and_as_many_comparisons(tmp_path):
    words = ["betas=0.1,0.5", "seeds=0", f"runs={tmp_path}", f"out={tmp_path / 'found.json'}", *SHORT]
    done = subprocess.run(command("online_against_offline", *words), capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_json(tmp_path / "found.json")
    assert {run["method"] for run in found["runs"]} == {"dpo", "online_dpo"} and len(found["runs"]) == 4
    assert found["budget"]["online"]["comparisons"] == 3 * 4
    assert (tmp_path / "frontier.png").exists() and "reverse KL" in done.stdout
    data = [read_json(tmp_path / f"{name}-beta0.1-seed0" / "manifest.json")["data"] for name in ("online", "offline")]
    assert data[0]["train"]["rows"] == data[1]["train"]["rows"] and data[0]["select"] == data[1]["select"]


def test_rounds_go_on_after_a_kill_as_if_there_had_been_none(tmp_path):
    words = ["rounds=2", "prompts=24", "build.max_new_tokens=24", "trl.save_steps=1", "trl.eval_steps=3", *SHORT]

    def start(name):
        return subprocess.Popen(
            command("iterative_dpo", *words, f"out={tmp_path / name}"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    whole = start("whole")
    text = whole.communicate(timeout=400)[0].decode()
    assert whole.returncode == 0, text
    stopped, moment = start("stopped"), tmp_path / "stopped" / "round-2" / "run" / "metrics.jsonl"
    until = time.time() + 400
    while not moment.exists() and stopped.poll() is None and time.time() < until:
        time.sleep(0.02)
    os.kill(stopped.pid, signal.SIGKILL)
    stopped.communicate()
    first = tmp_path / "stopped" / "round-1" / "run" / "result.json"
    assert not (tmp_path / "stopped" / "round-2" / "run" / "result.json").exists()
    trained = first.stat().st_mtime_ns
    again = start("stopped")
    said = again.communicate(timeout=400)[0].decode()
    assert again.returncode == 0, said
    assert first.stat().st_mtime_ns == trained  # the round that had ended was not done again
    for number in (1, 2):
        place = f"round-{number}"
        assert hash_model(tmp_path / "whole" / place / "run") == hash_model(tmp_path / "stopped" / place / "run")
        files = [read_json(tmp_path / name / place / "against_the_first.json") for name in ("whole", "stopped")]
        assert files[0] == files[1] and files[0]["probe/kl_reverse_rb_nats"] > 0
    start_of_second = read_json(tmp_path / "whole" / "round-2" / "run" / "manifest.json")["model"]["parent"]
    assert start_of_second["run"].endswith("round-1/run")
