"""Reference log-probabilities computed once, for every run that needs them: beta, loss, seed and tuning share a pass.

TRL's own cache misses when only beta changes and hits, wrongly, when `ld_alpha` does (huggingface/trl#3985). Here each
sequence is addressed by its own token ids, under a reference that is addressed by its weights, config and precision;
whatever else a loss takes from it is worked out from these values, so nothing can be stale.
"""

import contextlib
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
from dpo_kit.model.scoring import ReferenceModel, column_logps, score_as_trained

log = logging.getLogger(__name__)

AT_ONCE = 4096  # sequences between two writes, so that a killed pass loses little
RECHECKED = 4
VOLATILE = ("_name_or_path", "transformers_version", "use_cache", "architectures")
"""Fields of a model's config that say nothing about its outputs."""


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
        homes = [sys.modules[base.__module__] for base in type(self).__mro__ if base.__module__.startswith("trl.")]
        with contextlib.ExitStack() as put_back:
            for home in {home for home in homes if hasattr(home, "hash_module")}:
                put_back.callback(setattr, home, "hash_module", home.hash_module)
                home.hash_module = lambda module: ""  # type: ignore[attr-defined]
            super().__init__(*args, **kwargs)

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

    Read from the store under `root` where it has them, once a sample of that agrees with the live reference; computed,
    longest first, and stored part by part otherwise. ModelError where the reference gives a value that is not finite.
    """
    reference = ReferenceModel(trainer)
    addresses = [_address(tokens) for tokens in sequences]
    wanted = dict(zip(addresses, sequences, strict=True))
    with measuring(trainer, *reference.models, as_trained=True), reference.active() as model:
        store = Store(root / reference_key(trainer, model))
        store.folder.mkdir(parents=True, exist_ok=True)
        with store.lock:
            values, seconds = store.read()
            hits = [address for address in wanted if address in values]
            sample = hits[:: max(1, len(hits) // RECHECKED)][:RECHECKED]
            if sample:
                again = score_as_trained(trainer, model, [wanted[address] for address in sample])
                stored = torch.tensor([values[address] for address in sample], dtype=torch.float64)
                tokens = torch.tensor([len(wanted[address][1]) for address in sample])
                if reference.agrees(again - stored, tokens, as_trained=True):
                    saved = seconds * len(hits) / len(values)
                    log.info(
                        "reference: %d of %d sequences from the store, %.1f s saved", len(hits), len(wanted), saved
                    )
                else:
                    values = {}
                    for file in store.folder.glob("*.safetensors"):
                        store.set_aside(file)
            missing = [address for address in wanted if address not in values]
            missing.sort(key=lambda address: -sum(map(len, wanted[address])))
            started = since = time.perf_counter()
            for first in range(0, len(missing), AT_ONCE):
                part = missing[first : first + AT_ONCE]
                rows = [wanted[address] for address in part]
                logps = score_as_trained(trainer, model, rows, f"reference pass, {name}")
                if not bool(logps.isfinite().all()):
                    raise ModelError(
                        "the reference gives log-probabilities that are not finite: its weights are broken; copy "
                        "model.path (or model.reference) again, or take model.dtype=float32"
                    )
                now = time.perf_counter()
                store.write(part, logps, now - since)
                values |= zip(part, logps.tolist(), strict=True)
                since = time.perf_counter()
            if missing:
                log.info("reference: %d sequences computed in %.1f s", len(missing), since - started)
    return [values[address] for address in addresses], store.folder


def _address(tokens: Tokens) -> bytes:
    """16 bytes of SHA-256 over the token ids and the place where the completion begins."""
    prompt, answer = tokens
    return hashlib.sha256(array("q", [len(prompt), *prompt, *answer]).tobytes()).digest()[:16]


def reference_key(trainer: Any, model: Any) -> str:
    """What the reference's values depend on beside the sequence: weights, model config, precision.

    Under PEFT the weights are the base's, under the names they have without an adapter, so that full and LoRA tuning
    of one model share a key.
    """

    def digest(tensor: Tensor) -> str:
        flat = tensor.detach().contiguous().cpu().reshape(-1)
        return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()

    total = hashlib.sha256()
    weights = sorted(_base_weights(model))
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter: as many at once as there are cores
        for (name, tensor), hashed in zip(weights, pool.map(digest, (each for _, each in weights)), strict=True):
            total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {hashed}".encode())
    config = {k: v for k, v in model.config.to_dict().items() if k not in VOLATILE}
    for name, module in model.named_modules():  # of an adapter that training goes on from
        if isinstance(module, LoraLayer) and "ref" in module.scaling:
            config[f"scaling of {name}"] = module.scaling["ref"]
    total.update(json.dumps(config, sort_keys=True, default=str).encode())
    total.update(f"{trainer.accelerator.mixed_precision}".encode())
    return total.hexdigest()[:32]


def _base_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The weights that answer as the reference, each under the name it has in a model without adapter."""
    prefix = model.base_model.prefix if is_peft_model(model) else None
    for name, tensor in model.state_dict().items():
        own = prefix is not None and (prefix in name or ".modules_to_save." in name)
        if not own or re.search(r"\.ref(\.|$)", name):  # TRL's copy of an adapter that training goes on from
            for wrapped, plain in (("base_model.model.", ""), (".base_layer.", "."), (".original_module.", ".")):
                name = name.replace(wrapped, plain)
            yield name, tensor
