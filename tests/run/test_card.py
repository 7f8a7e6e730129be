"""The card states method, data, beta, KL and margin, and nothing secret."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_kit.run.report.card import write_card

CANARY = "hf_" + "canary" * 6
RESULT: dict[str, Any] = {
    "method": "ipo",
    "beta": 0.2,
    "seed": 3,
    "model": "org/small-instruct",
    "tuning": "lora",
    "steps": 60,
    "ceiling": 0.9,
    "start": {"probe/accuracy": 0.5},
    "final": {
        "probe/accuracy": 0.7,
        "probe/margin_nats": 4.5,
        "probe/margin_nats_low": 4.0,
        "probe/margin_nats_high": 5.0,
        "probe/kl_reverse_rb_nats": 6.1,
        "gold/reward": 1.6,
    },
    "findings": [{"symptom": "Nothing saturates.", "meaning": "Beta is not felt.", "remedy": "Train longer."}],
}
MANIFEST: dict[str, Any] = {
    "command": f"python -m dpo_kit method=ipo beta=0.2 +trl.hub_token=swordfish note={CANARY}",
    "versions": {"trl": "1.16.0", "torch": "2.13.0"},
    "model": {"path": "org/small-instruct", "revision": "0123456789abcdef0123456789abcdef01234567", "sha256": None},
    "data": {"train": {"rows": 1199, "sha256": "abc123"}, "select": {"rows": 150, "sha256": "def456"}},
    "config": {
        "method": {
            "name": "ipo",
            "title": "Identity Preference Optimization",
            "paper": "arXiv:2310.12036, eq. 17",
            "equation": "(h − 1/(2β))²",
            "beta": {"meaning": "tau", "higher": "closer"},
        },
        "data": {"train": "https://me:swordfish@example.org/pairs.jsonl", "eval": None},
        "trl": {"learning_rate": 5e-6, "max_steps": 60, "hub_token": "swordfish"},
    },
}


@pytest.fixture
def card(tmp_path: Path) -> str:
    text = write_card(tmp_path, RESULT, MANIFEST)
    assert (tmp_path / "model" / "README.md").read_text(encoding="utf-8") == text
    return text


def test_the_card_states_method_paper_data_beta_and_what_was_measured(card: str) -> None:
    for fact in [
        "# ipo of org/small-instruct, beta 0.2",
        "arXiv:2310.12036, eq. 17",
        "`(h − 1/(2β))²`",
        "a higher beta keeps the policy closer to the reference",
        "| preference margin, nats | – | 4.50 | [4.00, 5.00] |",
        "| KL reverse, nats per answer | – | 6.10 |",
        "| held-out accuracy | 0.500 | 0.700 |",
        "| gold reward of fresh samples | – | 1.60 |",
        "50% of the way",
        "train: 1199 rows",
        "lora tuning, 60 steps, seed 3",
        "learning_rate 5e-06",
        "trl 1.16.0",
        MANIFEST["model"]["revision"],
        "Nothing saturates. Beta is not felt.",
    ]:
        assert fact in card, fact


def test_the_front_matter_is_yaml_that_the_hub_reads(card: str) -> None:
    facts = yaml.safe_load(card.split("---")[1])
    assert facts["library_name"] == "peft" and facts["base_model"] == "org/small-instruct"
    assert "ipo" in facts["tags"]


def test_a_local_model_is_no_hub_id(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    text = write_card(tmp_path, RESULT | {"model": str(tmp_path / "base"), "tuning": "full"}, MANIFEST)
    facts = yaml.safe_load(text.split("---")[1])
    assert "base_model" not in facts and facts["library_name"] == "transformers"


def test_the_command_can_be_repeated_but_no_secret_is_in_the_card(card: str) -> None:
    assert "python -m dpo_kit method=ipo beta=0.2 +trl.hub_token=<redacted>" in card
    assert "swordfish" not in card and CANARY not in card


def test_a_run_without_measurements_findings_or_command_still_has_a_card(tmp_path: Path) -> None:
    text = write_card(tmp_path, RESULT | {"final": {}, "findings": []}, MANIFEST | {"command": None})
    assert "## To know" not in text and "```" not in text
