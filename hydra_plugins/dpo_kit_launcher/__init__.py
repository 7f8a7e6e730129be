"""dpo_kit's launcher for Hydra, which imports every module here on every start: nothing heavy may stand in them."""
