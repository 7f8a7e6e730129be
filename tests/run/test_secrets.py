"""Secrets are found by key and by shape; settings that merely look alike stay."""

import json

import pytest

from dpo_kit.run.redact import REDACTED, is_secret_key, redact, redact_argv, redact_text

HEX40 = "0123456789abcdef0123456789abcdef01234567"
TOKENS = {
    "hugging face": "hf_" + "aB3" * 11,
    "openai": "sk-proj-" + "aB3_" * 10,
    "anthropic": "sk-ant-api03-" + "aB3-" * 10,
    "wandb, 40 characters": HEX40,
    "wandb, 86 characters": "wandb_v1_" + "aB3x_yZ" * 11,
    "wandb, 86 characters without a prefix": "aB3x_Y" * 14 + "zz",
    "wandb on premises": "local-" + HEX40,
    "aws": "AKIA" + "ABCD1234" * 2,
    "github": "ghp_" + "aB3d" * 9,
    "github, fine-grained": "github_pat_" + "aB3d_" * 8,
    "gitlab": "glpat-" + "aB3d" * 5,
    "slack": "xoxb-123456789012-abcdefghij",
    "google": "AIza" + "aB3d_" * 7,
    "json web token": "eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0dXJl",
    "private key": "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
}


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS.keys())
def test_a_known_token_shape_is_redacted_under_any_key_and_inside_text(token: str) -> None:
    assert redact({"comment": token}) == {"comment": REDACTED}
    assert redact_text(f"use {token} here") == f"use {REDACTED} here"
    assert token not in json.dumps(redact({"a": [{"b": (token,)}], token: 1}))


@pytest.mark.parametrize(
    "key",
    [
        "hub_token",
        "api_key",
        "apiKey",
        "OPENAI_API_KEY",
        "password",
        "db-passwd",
        "client_secret",
        "aws_credentials",
        "model.init.token",
        "accessToken",
        "ssh_private_key",
        "Authorization",
        "push_to_hub_token",
        "auth_tokens",
    ],
)
def test_a_secret_named_key_hides_its_value_at_any_depth(key: str) -> None:
    config = {"model": {"kwargs": [{key: "swordfish"}], key: {"user": "me", "more": ["swordfish"]}}}
    assert is_secret_key(key)
    assert "swordfish" not in json.dumps(redact(config))


def test_settings_that_look_like_secrets_are_kept() -> None:
    config = {
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "additional_special_tokens": ["<a>"],
        "max_new_tokens": 64,
        "include_num_input_tokens_seen": "all",
        "token": True,
        "hub_token": None,
        "api_key_env": "OPENAI_API_KEY",
        "tokenizer": "gpt2",
        "monkey": "a",
        "revision": HEX40,
        "git_sha": HEX40,
        "git": HEX40 + "+changes",
        "model": {"path": f"/cache/models--a--b/snapshots/{HEX40}", "name": "org/name@" + HEX40},
        "url": "https://user-content.example.org/data?split=train",
        "mail": "someone@example.org",
        "sha256": HEX40 + HEX40[:24],
        "beta": 0.1,
        "note": "risk-averse-and-task-oriented-models, hf_model_name_with_words",
    }
    assert redact(config) == config


def test_a_number_is_hidden_under_a_password_but_not_under_a_count() -> None:
    assert redact_argv(["callbacks.max_tokens=100,200", "password=100"]) == [
        "callbacks.max_tokens=100,200",
        f"password={REDACTED}",
    ]
    assert redact({"password": 1234, "num_tokens": 1234, "tokens": 1234}) == {
        "password": REDACTED,
        "num_tokens": 1234,
        "tokens": 1234,
    }


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://me:swordfish@example.org/x", f"https://{REDACTED}@example.org/x"),
        ("git+ssh://swordfish@example.org", f"git+ssh://{REDACTED}@example.org"),
        ("https://x.org/a?access_token=swordfish&b=1", f"https://x.org/a?access_token={REDACTED}&b=1"),
        ("https://x.org/a?X-Amz-Signature=swordfish", f"https://x.org/a?X-Amz-Signature={REDACTED}"),
        ("Authorization: Bearer swordfish123", f"Authorization: Bearer {REDACTED}"),
        (f"at commit {HEX40}", f"at commit {HEX40}"),
    ],
)
def test_credentials_in_urls_and_headers_are_redacted(text: str, clean: str) -> None:
    assert redact_text(text) == clean


def test_a_command_line_is_redacted_by_key_and_by_shape() -> None:
    argv = ["python", "-m", "dpo_kit", "beta=0.2", "+trl.hub_token=swordfish", "--api-key", "swordfish"]
    argv += ["--password=swordfish", f"x={HEX40}", f"model.revision={HEX40}", TOKENS["hugging face"]]
    assert redact_argv(argv) == [
        *["python", "-m", "dpo_kit", "beta=0.2", f"+trl.hub_token={REDACTED}", "--api-key", REDACTED],
        *[f"--password={REDACTED}", f"x={REDACTED}", f"model.revision={HEX40}", REDACTED],
    ]


def test_redaction_leaves_its_input_alone_and_returns_plain_containers() -> None:
    config = {"a": ({"token": "x"},), "b": {1, 2}}
    clean = redact(config)
    assert config["a"][0]["token"] == "x"
    assert clean["a"] == [{"token": REDACTED}] and sorted(clean["b"]) == [1, 2]
    json.dumps(clean)
