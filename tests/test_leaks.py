"""Canaries: secrets planted everywhere a user might put one are refused or redacted, and found nowhere afterwards."""

import gzip
import json
import logging
import os
import zipfile

import pytest
import torch

from dpo_kit.config.compose import check, compose
from dpo_kit.errors import ConfigError
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.redact import REDACTED, RedactingFormatter, redact, redact_text, refuse_secrets
from dpo_kit.toy import TRAIN
from dpo_kit.trainer.finish import write_failure
from tests.canary import leaks
from tests.run.test_secrets import TOKENS

PLAIN = "Xq7-swordfish-Zk9"  # has no known shape
URL = f"https://me:{PLAIN}@example.org/pairs.jsonl"


# --- the search itself --------------------------------------------------------------------------------------------


def test_the_search_finds_what_was_planted_in_text_binary_archive_and_name(tmp_path):
    assert leaks([tmp_path], [PLAIN]) == []
    (tmp_path / "a.txt").write_text(f"x{PLAIN}x")
    (tmp_path / "b.bin").write_bytes(os.urandom(99) + PLAIN.encode() + os.urandom(99))
    torch.save({"args": {"hub_token": PLAIN}}, tmp_path / "c.bin")
    with zipfile.ZipFile(tmp_path / "d.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner.gz", gzip.compress(PLAIN.encode() * 50))
    (tmp_path / "e.bin").write_bytes(PLAIN.encode("utf-16-le"))
    (tmp_path / PLAIN).mkdir()
    found = [line.rpartition(": ")[0].rpartition("/")[2] for line in leaks([tmp_path], [PLAIN])]
    assert found == [PLAIN, "a.txt", "b.bin", "c.bin", "d.zip", "e.bin"]


# --- refused before anything is written ---------------------------------------------------------------------------


@pytest.mark.fault("a known token shape in the config", promise="P10")
@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS.keys())
def test_every_known_shape_is_refused_in_any_field_and_never_repeated(token):
    quoted = "'" + token.replace("\n", " ") + "'"
    with pytest.raises(ConfigError, match="instead, ") as refusal:
        refuse_secrets({"trl": {"hub_model_id": token}}, [f"tracking.tags=[a,{quoted}]"])
    assert token not in str(refusal.value) and "trl.hub_model_id" in str(refusal.value)
    for config in ({"a": [{"b": (token,)}]}, {token: 1}):
        with pytest.raises(ConfigError):
            refuse_secrets(config)


REFUSED = {
    "a secret-named field": ["trl.hub_token=swordfish"],
    "a secret-named key of one's own": ["+tracking.apiKey=swordfish"],
    "a secret deep inside a literal": ["trl.lr_scheduler_kwargs={password: swordfish}"],
    "a password that is a number": ["+trl.db_password=1234"],
    "credentials in a URL": [f"data.train={URL}"],
    "a token in a URL's query": ["data.train=https://example.org/pairs.jsonl?access_token=swordfish"],
    "a secret for a job's environment": ["+hydra.job.env_set.WANDB_API_KEY=swordfish"],
    "a secret in the run directory's name": [f"hydra.run.dir=outputs/{TOKENS['hugging face']}"],
    "an environment variable named like a secret": ["tracking.project=${oc.env:MY_PASSWORD}"],
    "the same inside another text": ["tracking.project=a-${oc.env:MY_PASSWORD,none}"],
    "the value of such a variable": [f"tracking.project=a-{PLAIN}"],
    "that value by way of a harmless name": ["tracking.project=${oc.env:HARMLESS}"],
    "one job of a sweep": ["-m", f"tracking.project=a,{TOKENS['github']}"],
    "a value of a swept secret": ["-m", "trl.hub_token=swordfish,tuna"],
    "a question that Hydra alone would answer": ["--info", "config", "trl.hub_token=swordfish"],
    "an option of Hydra": ["--config-dir", f"https://me:{PLAIN}@example.org"],
}


@pytest.fixture
def refused(monkeypatch, tmp_path, capsys):
    """Run the command in an empty folder, as far as its refusal; what it said."""
    from dpo_kit.cli import main as cli
    from dpo_kit.config.exits import REFUSED

    def run(words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MY_PASSWORD", PLAIN)
        monkeypatch.setenv("HARMLESS", f"x{PLAIN}")
        monkeypatch.setattr("sys.argv", ["dpo_kit", *words])
        for start in ("_single", "_sweep"):
            monkeypatch.setattr(cli, start, lambda _: pytest.fail("ran"))
        monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
        monkeypatch.setattr("sys.excepthook", cli.sys.excepthook)
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        assert end.value.code == REFUSED, said
        return said.out + said.err

    return run


@pytest.mark.fault("a secret on the command line", promise="P10")
@pytest.mark.parametrize("words", REFUSED.values(), ids=REFUSED.keys())
def test_a_secret_on_the_command_line_is_refused_before_a_file_is_written(words, refused, tmp_path):
    said = refused(words)
    assert "refused" in said and "instead, " in said
    assert PLAIN not in said and "swordfish" not in said and TOKENS["github"] not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("a secret in a configuration file", promise="P10")
@pytest.mark.parametrize(
    "text",
    [
        "trl: {hub_token: swordfish}",
        f"tracking: {{tags: [{TOKENS['slack']}]}}",
        f"data: {{train: '{URL}'}}",
        "tracking: {project: '${oc.env:MY_PASSWORD}'}",
        "hydra: {job: {env_set: {HF_TOKEN: swordfish}}}",
    ],
)
def test_a_secret_in_a_configuration_file_is_refused_before_a_file_is_written(text, refused, tmp_path):
    file = tmp_path / "mine" / "experiment" / "secret.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"# @package _global_\n{text}\n")
    said = refused(["--config-dir", str(tmp_path / "mine"), "experiment=secret"])
    assert "instead, " in said and leaks([tmp_path / "outputs"], [PLAIN, "swordfish", TOKENS["slack"]]) == []
    assert PLAIN not in said and "swordfish" not in said and TOKENS["slack"] not in said
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("trl.hub_token=x", "hf auth login"),
        (f"tracking.name={TOKENS['wandb, 86 characters']}", "wandb login"),
        (f"tracking.name={TOKENS['openai']}", "OPENAI_API_KEY"),
        (f"tracking.name={TOKENS['anthropic']}", "ANTHROPIC_API_KEY"),
        (f"tracking.name={TOKENS['aws']}", "aws configure"),
        (f"data.train={URL}", ".netrc"),
        ("+tracking.password=x1", "environment variable"),
    ],
)
def test_a_refusal_names_the_place_where_the_secret_belongs(override, remedy):
    with pytest.raises(ConfigError, match=remedy):
        compose([override])


def test_what_merely_looks_like_a_secret_is_accepted(monkeypatch):
    monkeypatch.setenv("FEATURE_TOKEN", "disabled")
    monkeypatch.setenv("SERVICE_CREDENTIALS", "/etc/keys.json")
    commit = "0123456789abcdef0123456789abcdef01234567"
    accepted = [
        f"model.revision={commit}",
        "tracking.project=disabled",
        "data.train=/etc/keys.json",
        "trl.include_num_input_tokens_seen=all",
        f"hydra.run.dir=outputs/{commit}",
        "+data.columns.prompt=token",
    ]
    check(compose(accepted))


@pytest.mark.fault("a secret given to a tool", promise="P10")
def test_the_tools_refuse_secrets_as_well(capsys):
    from dpo_kit.config.exits import REFUSED as EXIT
    from dpo_kit.config.tools import run_tool

    assert run_tool("sweep", "", [f"sweep={URL}"], lambda _: pytest.fail("ran")) == EXIT
    assert PLAIN not in capsys.readouterr().err


# --- redacted where it comes from elsewhere -----------------------------------------------------------------------


@pytest.mark.fault("a secret of the environment in an error", promise="P10")
def test_errors_and_logs_hold_no_secret_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SERVICE_PASSWORD", PLAIN)
    record = logging.LogRecord("x", 20, "x", 1, "server %s said %s", (PLAIN, TOKENS["openai"]), None)
    assert RedactingFormatter("%(message)s").format(record) == f"server {REDACTED} said {REDACTED}"
    assert redact({"a": [f"b{PLAIN}"], PLAIN: 1}) == {"a": [f"b{REDACTED}"], REDACTED: 1}
    try:
        raise OSError(f"no answer from {URL} with {TOKENS['aws']}")
    except OSError as error:
        write_failure(RunDirectory(tmp_path), check(compose([])), error)
    assert leaks([tmp_path], [PLAIN, TOKENS["aws"]]) == [] and (tmp_path / "result.json").exists()
    monkeypatch.delenv("SERVICE_PASSWORD")
    assert redact_text(PLAIN) == PLAIN


@pytest.mark.fault("an uncaught error that tells a secret", promise="P10")
def test_an_uncaught_error_is_shown_without_secrets(monkeypatch, capsys):
    from dpo_kit.cli.main import _show_without_secrets

    monkeypatch.setenv("SERVICE_PASSWORD", PLAIN)
    try:
        raise RuntimeError(f"{PLAIN} and {TOKENS['slack']}")
    except RuntimeError as error:
        _show_without_secrets(RuntimeError, error, error.__traceback__)
    said = capsys.readouterr().err
    assert "RuntimeError" in said and PLAIN not in said and TOKENS["slack"] not in said


# --- whole runs ---------------------------------------------------------------------------------------------------

ENVIRONMENT = {
    "HF_TOKEN": TOKENS["hugging face"],
    "OPENAI_API_KEY": TOKENS["openai"],
    "AWS_ACCESS_KEY_ID": TOKENS["aws"],
    "AWS_SECRET_ACCESS_KEY": "aB3/" * 10,
    "WANDB_API_KEY": TOKENS["wandb, 40 characters"],
    "SERVICE_PASSWORD": PLAIN,
}


def plant_rows(file):
    """40 embedded pairs: token shapes and credentials inside prompts and answers, and one malformed row with both."""
    rows = [json.loads(line) for line in TRAIN.read_text().splitlines()[:40]]
    for row, secret in zip(rows, [*TOKENS.values(), URL, *TOKENS.values(), URL], strict=False):
        for name in ("prompt", "chosen"):
            row[name][-1]["content"] += f" {secret}"
    rows[-1] |= {"chosen": [{"role": f"key {TOKENS['github']}", "content": "x"}]}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.fault("canaries in environment, data and command line of a run and a sweep", promise="P10")
@pytest.mark.parametrize("sweep", [False, True], ids=["run", "sweep"])
def test_a_canary_is_found_nowhere_after_a_run(sweep, command, tmp_path):
    data = tmp_path.parent / f"{tmp_path.name}-data" / "pairs.jsonl"
    data.parent.mkdir()
    plant_rows(data)
    small = ["trl.max_steps=4", "trl.eval_steps=2", "trl.save_steps=2", "trl.per_device_train_batch_size=4"]
    small += ["callbacks.pairs=8", "callbacks.prompts=8", "data.on_bad_row=drop", "trl.max_length=256"]
    small += ["speed.reference_store=true"]
    overrides = [*small, f"data.train={data}", "data.eval=null", "data.holdout=0.4"]
    env = ENVIRONMENT | {"DPO_KIT_CACHE": str(tmp_path / "cache"), "WANDB_DIR": str(tmp_path / "wandb")}
    done = command(*(["-m", "beta=0.1,0.5", "model.tuning=full,lora"] if sweep else []), *overrides, env=env)
    assert done.returncode == 0, done.stderr
    (tmp_path / "terminal.txt").write_text(done.stdout + done.stderr)
    names = {path.name for path in tmp_path.rglob("*")}
    assert {"manifest.json", "samples.jsonl", "dropped_rows.jsonl", "training_args.bin", "hydra.yaml"} <= names
    assert any(name.endswith(".wandb") for name in names) and any((tmp_path / "cache").rglob("*.safetensors"))
    secrets = [*TOKENS.values(), *ENVIRONMENT.values()]
    assert leaks([tmp_path], secrets) == []
    assert not list(tmp_path.rglob("model/training_args.bin"))
    assert REDACTED in next(tmp_path.rglob("samples.jsonl")).read_text()
    assert REDACTED in next(tmp_path.rglob("dropped_rows.jsonl")).read_text()
    found = leaks([data.parent], secrets)  # the search sees what was planted
    assert len(found) == len(set(TOKENS.values()) | {PLAIN}) - 1  # all but the private key, whose line ends are escaped
