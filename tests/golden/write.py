"""Rewrite the golden files: `python tests/golden/write.py`, then read the difference."""

from pathlib import Path

import yaml
from omegaconf import OmegaConf

from dpo_kit.config.compose import CONF, compose
from dpo_kit.config.trl_schema import load_schema


def resolved(method: str) -> dict:
    """What a method decides: beta, its own facts, and where its TRL config differs from TRL's defaults."""
    overrides = [
        f"method={method}",
        "model=local",
        "model.path=m",
        "data=jsonl",
        "data.train=d",
        "data.gold=dpo_kit.toy",
    ]
    cfg = OmegaConf.to_container(compose(overrides), resolve=True)
    fields = load_schema()["classes"][cfg["method"]["config"].split(".")[-1]]["fields"]
    differs = {key: value for key, value in cfg["trl"].items() if value != fields[key]["default"]}
    return {"beta": cfg["beta"], "method": cfg["method"], "differs_from_trl": differs}


if __name__ == "__main__":
    for file in (CONF / "method").glob("*.yaml"):
        golden = Path(__file__).parent / file.name
        golden.write_text(yaml.safe_dump(resolved(file.stem), allow_unicode=True, sort_keys=True))
