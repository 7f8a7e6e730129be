"""Imported once by the server from which jobs are forked, so that no job pays for these imports again: what a run loads
(a test compares), also what a library imports when it first needs it.
"""

import contextlib
import gc
import importlib
import io

from dpo_kit.run.quiet import quiet_imports

MODULES = (
    "dpo_kit.cli.main", "dpo_kit.training", "dpo_kit.trainer.prefix", "dpo_kit.trainer.probing",
    "dpo_kit.trainer.reference_store", "dpo_kit.run.report.diagnosis", "dpo_kit.run.report.picture",
    "dpo_kit.run.report.results", "dpo_kit.toy.domain", "trl.trainer.dpo_trainer",
    "trl.trainer.kto_trainer", "trl.experimental.cpo", "trl.experimental.online_dpo", "trl.experimental.orpo",
    "transformers.models.auto.processing_auto", "transformers.models.auto.feature_extraction_auto",
    "transformers.models.auto.image_processing_auto", "transformers.models.auto.video_processing_auto",
    "transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2",
    "torch.utils.serialization.config", "peft.tuners.lora", "matplotlib.figure", "matplotlib.backends.backend_agg",
    "rich.console", "rich.progress", "pydantic.type_adapter", "hydra.core.plugins", "wandb", "PIL.PngImagePlugin",
)  # fmt: skip

quiet_imports()
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    for name in MODULES:
        with contextlib.suppress(ImportError):  # one that a version lacks costs its job the import and nothing else
            importlib.import_module(name)
gc.freeze()  # the collector would touch, and so copy, every page that jobs share
