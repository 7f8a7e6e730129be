"""Reference log-probabilities computed once, for every run that needs them: beta, loss, seed and tuning share a pass.

TRL's own cache misses when only beta changes and hits, wrongly, when `ld_alpha` does (huggingface/trl#3985). Here each
sequence is addressed by its own token ids, under a reference that is addressed by its weights, config and precision;
whatever else a loss takes from it is worked out from these values, so nothing can be stale.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
import time
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from filelock import FileLock
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dpo_kit.errors import ModelError
from dpo_kit.model.batches import measuring
from dpo_kit.model.head import Tokens
from dpo_kit.model.scoring import Reference
from dpo_kit.trainer.as_trained import column_logps, score_as_trained

log = logging.getLogger(__name__)

AT_ONCE = 4096  # sequences between two writes, so that a killed pass loses little
RECHECKED = 4


class Store:
    """Log-probabilities of one reference under `folder`, in files named by the hash of their content.

    Written whole or not at all, by one process at a time (others wait, then read). A file that is not what its name
    says is set aside and its sequences are computed again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = FileLock(folder / "lock")

    def read(self) -> tuple[dict[bytes, float], float]:
        """All values by the address of their sequence (nats), and the seconds that computing them took."""
        values: dict[bytes, float] = {}
        seconds = 0.0
        for file in sorted(self.folder.glob("*.safetensors")):
            if hashlib.sha256(file.read_bytes()).hexdigest() != file.stem:
                self.set_aside(file)
                continue
            with safe_open(file, framework="pt") as opened:
                addresses = opened.get_tensor("addresses").numpy()
                values |= zip(map(bytes, addresses), opened.get_tensor("logps").tolist(), strict=True)
                seconds += float(opened.metadata()["seconds"])
        return values, seconds

    def write(self, addresses: Sequence[bytes], logps: Tensor, seconds: float) -> None:
        """Add values; shapes (n,) and (n,), nats."""
        tensors = {"addresses": torch.tensor([list(each) for each in addresses], dtype=torch.uint8), "logps": logps}
        content = save(tensors, {"seconds": f"{seconds:.3f}"})
        file = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        partial = file.with_suffix(".partial")
        partial.write_bytes(content)
        partial.replace(file)

    def set_aside(self, file: Path) -> None:
        log.warning("reference store: %s is damaged; it is set aside and computed again", file)
        file.replace(file.with_suffix(".damaged"))


class StoredReference:
    """Mixin before a TRL trainer with `precompute_ref_log_probs`: its pass goes through the store under `root`."""

    root: Path
    evaluates: bool = True  # whether TRL's own evaluation will read the columns of held-out rows
    folder: Path | None = None  # of this reference, once its key is known

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """TRL hashes all weights for its own cache, on one core: 20 s with a model of 7B. The store has its own key."""
        home: Any = next(
            sys.modules[base.__module__] for base in type(self).__mro__ if base.__module__.startswith("trl.")
        )
        hash_module = getattr(home, "hash_module", None)
        if hash_module is not None:
            home.hash_module = lambda module: ""
        try:
            super().__init__(*args, **kwargs)
        finally:
            if hash_module is not None:
                home.hash_module = hash_module

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """`dataset` with the reference's columns; overrides the trainer's method of the same name."""
        if name != "train" and not self.evaluates:
            return dataset

        def through_store(sequences: Sequence[Tokens]) -> Tensor:
            logps, self.folder = reference_logps(self, sequences, self.root, name)
            return torch.tensor(logps, dtype=torch.float64)

        with self.accelerator.main_process_first():  # type: ignore[attr-defined]
            columns = column_logps(self, dataset, through_store)
        for column, values in columns.items():
            dataset = dataset.add_column(column, values.tolist())
        return dataset


def reference_logps(trainer: Any, sequences: Sequence[Tokens], root: Path, name: str) -> tuple[list[float], Path]:
    """Summed completion log-probability of each sequence under `trainer`'s reference at step 0, in nats; its folder.

    Read from the store under `root` where it has them, computed and stored otherwise. ModelError where the reference
    gives a value that is not finite.
    """
    reference = Reference(trainer)
    wanted = {_address(tokens): tokens for tokens in sequences}
    with measuring(trainer, *reference.models, as_trained=True), reference.active() as model:
        store = Store(root / reference_key(trainer, model))
        store.folder.mkdir(parents=True, exist_ok=True)
        with store.lock:
            values = _checked(store, trainer, model, reference, wanted)
            missing = [address for address in wanted if address not in values]
            values |= _computed(store, trainer, model, wanted, missing, name)
    return [values[_address(tokens)] for tokens in sequences], store.folder


def _checked(
    store: Store, trainer: Any, model: Any, reference: Reference, wanted: dict[bytes, Tokens]
) -> dict[bytes, float]:
    """What the store holds, once a sample of it agrees with the live reference; nothing where it does not."""
    values, seconds = store.read()
    hits = [address for address in wanted if address in values]
    if not hits:
        return {}
    sample = hits[:: max(1, len(hits) // RECHECKED)][:RECHECKED]
    again = score_as_trained(trainer, model, [wanted[address] for address in sample])
    stored = torch.tensor([values[address] for address in sample], dtype=torch.float64)
    tokens = torch.tensor([len(wanted[address][1]) for address in sample])
    if not reference.agrees(again - stored, tokens, as_trained=True):
        for file in store.folder.glob("*.safetensors"):
            store.set_aside(file)
        return {}
    saved = seconds * len(hits) / len(values)
    log.info("reference: %d of %d sequences from the store, %.1f s saved", len(hits), len(wanted), saved)
    return values


def _computed(
    store: Store, trainer: Any, model: Any, wanted: dict[bytes, Tokens], missing: list[bytes], name: str
) -> dict[bytes, float]:
    """The values of the `missing` sequences, longest first, written part by part."""
    values: dict[bytes, float] = {}
    started = time.perf_counter()
    missing = sorted(missing, key=lambda address: -sum(map(len, wanted[address])))
    for part in _parts(missing, AT_ONCE):
        since = time.perf_counter()
        logps = score_as_trained(trainer, model, [wanted[address] for address in part], f"reference pass, {name}")
        if not bool(logps.isfinite().all()):
            raise ModelError(
                "the reference gives log-probabilities that are not finite: its weights are broken; copy "
                "model.path (or model.reference) again, or take model.dtype=float32"
            )
        store.write(part, logps, time.perf_counter() - since)
        values |= zip(part, logps.tolist(), strict=True)
    if missing:
        log.info("reference: %d sequences computed in %.1f s", len(missing), time.perf_counter() - started)
    return values


def _parts(items: list[bytes], size: int) -> Iterator[list[bytes]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _address(tokens: Tokens) -> bytes:
    """16 bytes of SHA-256 over the token ids and the place where the completion begins."""
    prompt, answer = tokens
    return hashlib.sha256(array("q", [len(prompt), *prompt, *answer]).tobytes()).digest()[:16]


def reference_key(trainer: Any, model: Any) -> str:
    """What the reference's values depend on beside the sequence: weights, model config, precision.

    Under PEFT the weights are the base's, under the names they have without an adapter, so that full and LoRA tuning
    of one model share a key.
    """
    total = hashlib.sha256()
    weights = sorted(_base_weights(model))
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter: as many at once as there are cores
        for (name, tensor), digest in zip(weights, pool.map(_digest, (each for _, each in weights)), strict=True):
            total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {digest}".encode())
    config = {k: v for k, v in model.config.to_dict().items() if k not in VOLATILE}
    for name, module in model.named_modules():  # of an adapter that training goes on from
        if isinstance(module, LoraLayer) and "ref" in module.scaling:
            config[f"scaling of {name}"] = module.scaling["ref"]
    total.update(json.dumps(config, sort_keys=True, default=str).encode())
    total.update(f"{trainer.accelerator.mixed_precision}".encode())
    return total.hexdigest()[:32]


def _digest(tensor: Tensor) -> str:
    flat = tensor.detach().contiguous().cpu().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


VOLATILE = ("_name_or_path", "transformers_version", "use_cache", "architectures")
"""Fields of a model's config that say nothing about its outputs."""


def _base_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights that answer as the reference, each under the name it has in a model without adapter."""
    prefix = model.base_model.prefix if is_peft_model(model) else None
    for name, tensor in model.state_dict().items():
        own = prefix is not None and (prefix in name or ".modules_to_save." in name)
        if not own or OF_REFERENCE.search(
            name
        ):  # TRL's copy of an adapter that training goes on from belongs to the reference
            yield _plain_name(name), tensor


OF_REFERENCE = re.compile(r"\.ref(\.|$)")


def _plain_name(name: str) -> str:
    for wrapped, plain in (("base_model.model.", ""), (".base_layer.", "."), (".original_module.", ".")):
        name = name.replace(wrapped, plain)
    return name
