"""Every text architecture of the installed transformers, tiny, trained by this project and by plain TRL.

    python examples/benchmark/families.py                      # the tables of docs/families.md: 25 minutes, one core
    python examples/benchmark/families.py only=llama,qwen3_moe  # some of them

Each family is a random model of two layers made from its own config class, in a process with a time limit. Two steps of
DPO, full and LoRA, on the same rows: token ids, the log-probabilities of step 0 and both losses are compared with those
of trl.DPOTrainer, and the log-probabilities with the model's own logits. QLoRA is trained where bitsandbytes works.
"""

import json
import logging
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl import DPOConfig, DPOTrainer

from dpo_kit import compose
from dpo_kit.config.compose import check
from dpo_kit.errors import DpoKitError
from dpo_kit.model.adapter import fit_targets
from dpo_kit.model.batches import measuring
from dpo_kit.model.load import load_tokenizer
from dpo_kit.model.sampling import draw_samples
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.quiet import quiet_libraries
from dpo_kit.toy import MODEL, TRAIN
from dpo_kit.trainer.build import build_trainer, choose_arguments
from dpo_kit.trainer.rows import prepare_data

LIMIT = 60  # seconds of a processor for one family
NEAR = 1e-4  # largest relative difference of losses and log-probabilities that counts as equal
COMMON = {
    "max_steps": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
    "max_length": 128,
}
SIZES = {  # of whatever field of this name a config has
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks num_experts_per_tok "
    "moe_k num_key_value_heads n_head_kv num_key_heads linear_num_key_heads top_k moe_top_k num_attn_heads "
    "num_experts_per_token moe_topk num_memory_blocks num_mem_blocks",
    4: "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads num_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts linear_num_value_heads mamba_n_heads linear_conv_kernel_dim "
    "num_linear_heads conv_kernel mamba_d_conv swa_num_attention_heads linear_num_heads",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim qk_head_dim linear_key_head_dim linear_value_head_dim "
    "state_size ssm_state_size mamba_d_state rotary_dim kv_channels attention_head_dim mamba_head_dim global_head_dim "
    "swa_head_dim linear_head_dim index_head_dim time_step_rank mamba_dt_rank",
    16: "moe_intermediate_size shared_expert_intermediate_size sliding_window kv_lora_rank q_lora_rank mamba_d_head "
    "mamba_chunk_size chunk_size attention_window_size moe_ffn_hidden_size expert_ffn_hidden_size "
    "n_positions_per_block shared_intermediate_size mamba_headdim o_lora_rank window_size local_window_size",
    32: "hidden_size n_embd d_model word_embed_proj_dim embedding_size lru_width attention_hidden_size emb_dim dim "
    "embed_dim hidden_size_per_layer_input vocab_size_per_layer_input dim_model dim_head",
    64: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_ff ffn_hidden_size inner_dim d_inner "
    "dense_intermediate_size mlp_hidden_size intermediate_size_mlp dff",
    512: "max_position_embeddings n_positions max_seq_len max_sequence_length n_ctx context_length",
    640: "vocab_size",
    1: "n_shared_experts n_group topk_group num_shared_experts first_k_dense_replace mamba_n_groups n_groups "
    "moe_layer_start_index num_dense_layers moe_layer_freq decoder_sparse_step num_nextn_predict_layers "
    "mamba_ngroups moe_num_shared_experts n_expert_groups",
}
TINY = {name: size for size, names in SIZES.items() for name in names.split()}
TINY |= {"pad_token_id": 0, "eos_token_id": 4, "bos_token_id": None, "initializer_range": 0.1, "init_std": 0.1}
LINEAR = ["linear_attention", "full_attention"]
OWN = {  # what a family's code demands of its sizes; of hybrids, a layer with attention, without which none is sampled
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mpt": {"expansion_ratio": 2},
    "mamba2": {"num_heads": 8, "expand": 2, "head_dim": 8},
    "opt": {"word_embed_proj_dim": 16},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "bamba": {"attn_layer_indices": [1]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "nemotron_h": {"layers_block_type": LINEAR, "mamba_num_heads": 8},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zaya": {"num_experts_per_tok": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "zamba": {"layers_block_type": ["hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    **{name: {"bos_token_id": 0} for name in ("cwm", "modernbert-decoder", "emu3_text_model", "mllama_text_model")},
    **{name: {"layer_types": LINEAR} for name in ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "kimi_linear")},
    **{name: {"layer_types": LINEAR} for name in ("bailing_hybrid", "granitemoehybrid")},
}


def tiny_config(family):
    """The config of a random model of two layers, of the family with this model_type."""
    return CONFIG_MAPPING[family](**tiny_sizes(CONFIG_MAPPING[family]) | OWN.get(family, {}))


def tiny_sizes(kind):
    """What to give a config of the class `kind`, and the configs within it."""
    usual = kind().to_dict()
    names = set(usual) | set(getattr(kind, "attribute_map", ()))
    values = {name: value for name, value in TINY.items() if name in names}
    if "kv_lora_rank" in names:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent attention has as many
    values |= {name: 0.0 for name, value in usual.items() if "drop" in name and isinstance(value, float)}
    parts = {name: part for name, part in kind.sub_configs.items() if part is not AutoConfig}
    return values | {name: tiny_sizes(part) | OWN.get(part.model_type, {}) for name, part in parts.items()}


def save_tiny(config, folder):
    """Write a random model, in fp32, and the embedded tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(folder)
    for file in MODEL.iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(file, folder)


def settings_of(folder, tuning, out):
    """The settings of a run on the model in `folder`."""
    words = ["tracking=none", "allow_learning_rate=true", "data.eval=null", "data.holdout=0.3", "data.gold=null"]
    words += ["callbacks.max_new_tokens=4", "speed.group_by_length=false", "trl.save_strategy=no"]
    words += [f"trl.{key}={value}" for key, value in COMMON.items()]
    return check(compose([*words, f"data.train={out}", f"model.path={folder}", f"model.tuning={tuning}"]))


class Bench:
    """What all families share: rows, tokenizer, settings by tuning; read once, in the parent process."""

    def __init__(self, place):
        rows = place / "pairs.jsonl"
        rows.write_text("".join(TRAIN.read_text().splitlines(keepends=True)[:12]))
        self.settings = {tuning: settings_of(MODEL, tuning, rows) for tuning in ("full", "lora", "qlora")}
        self.tokenizer = load_tokenizer(self.settings["full"].model)
        self.data = prepare_data(self.settings["full"], self.tokenizer)

    def of(self, folder, tuning):
        """The settings for a model in `folder`."""
        settings = self.settings[tuning]
        return settings.model_copy(update={"model": settings.model.model_copy(update={"path": str(folder)})})

    def ours(self, folder, tuning):
        """What two steps of ours log, and why prompts are not shared, if they are not; two answers are drawn before."""
        heard = []
        handler = logging.Handler()
        handler.emit = lambda record: heard.append(record.getMessage())
        logging.getLogger("dpo_kit").handlers = [handler]
        logging.getLogger("dpo_kit").setLevel(logging.INFO)
        run = RunDirectory(folder.parent / f"ours-{tuning}")
        run.root.mkdir()
        trainer = build_trainer(self.of(folder, tuning), self.data, self.tokenizer, run)
        with measuring(trainer):
            draw_samples(trainer.model, self.tokenizer, self.data.select[:2], max_new_tokens=4)
        trainer.train()
        alone = [line.split("for both answers: ")[1] for line in heard if "for both answers: " in line]
        return logged(trainer), alone[0] if alone else None

    def theirs(self, folder, tuning):
        """What two steps of trl.DPOTrainer log, called as in a script of one's own; whether its ids are ours."""
        model, lora = AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), None
        if tuning == "lora":
            lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0, target_modules="all-linear")
            fit_targets(lora, model, DPOTrainer)
        options = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "warmup_steps": 0.1}
        quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        names = ("prompt", "chosen", "rejected")
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(output_dir=str(folder.parent / "trl"), seed=0, **options, **quiet, **COMMON),
            train_dataset=Dataset.from_list([{name: row[name] for name in names} for row in self.data.train]),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=lora,
        )
        pairs = zip(trainer.train_dataset, self.data.train, strict=True)
        same = all(theirs[f"{name}_ids"] == row["ids"][name].tolist() for theirs, row in pairs for name in names)
        trainer.train()
        return logged(trainer), same


def logged(trainer):
    """What it logged at each step."""
    return [row for row in trainer.state.log_history if "loss" in row]


def compare(one, other):
    """The largest relative difference of the losses, and of the log-probabilities of step 0, of two logs."""
    pairs = [(a["loss"], b["loss"]) for a, b in zip(one, other, strict=True)]
    pairs += [(one[0][key], other[0][key]) for key in ("logps/chosen", "logps/rejected")]
    return max(abs(a - b) / max(1e-12, abs(b)) for a, b in pairs)


def sentence(error):
    """What was refused, short; the kind of an error that is not ours."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    text = text.replace(str(error.__dict__.get("folder", "\0")), "")
    return text if isinstance(error, DpoKitError) else f"FAULT {type(error).__name__}: {text[:160]}"


def try_family(bench, family, place):
    """A row of the tables: what became of each tuning, or why the family is refused."""
    folder = place / "model"
    try:
        config = tiny_config(family)
        config.save_pretrained(folder)
    except Exception as error:
        return {"skipped": sentence(error)}
    try:
        choose_arguments(bench.of(folder, "full"), bench.data, place)  # no weights are there yet
    except DpoKitError as error:
        return {"refused": sentence(error).replace(str(folder), "…")}
    try:
        save_tiny(config, folder)
    except Exception as error:
        return {"skipped": sentence(error)}
    row = {}
    for tuning in bench.settings:
        try:
            mine, row["alone"] = bench.ours(folder, tuning)
        except Exception as error:
            row[tuning] = sentence(error).replace(str(folder), "…")
            row[f"{tuning} trace"] = traceback.format_exc()[-1500:]
            continue
        if tuning == "qlora":
            row[tuning] = "trains" if abs(mine[0]["loss"] - 0.6931) < 0.02 else f"first loss {mine[0]['loss']:.4f}"
            continue
        try:
            plain, same_ids = bench.theirs(folder, tuning)
        except Exception as error:
            row[tuning] = f"trains; TRL: {type(error).__name__}"
            continue
        off = compare(mine, plain)
        row[tuning] = "as TRL" if off <= NEAR and same_ids else f"off by {off:.0e}{'' if same_ids else ', other ids'}"
    return row


def in_a_process(bench, family):
    """`try_family` in a process of its own, which has LIMIT seconds of a processor."""
    fork = multiprocessing.get_context("fork")
    reader, writer = fork.Pipe(duplex=False)

    def work():
        resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
        with tempfile.TemporaryDirectory() as place, Path(os.devnull).open("w") as silent:
            sys.stdout = sys.stderr = silent
            result = try_family(bench, family, Path(place))
        writer.send(result)

    process = fork.Process(target=work)
    process.start()
    writer.close()
    try:
        return reader.recv()
    except EOFError:
        return {"skipped": f"ended by a signal, or took longer than {LIMIT} s"}
    finally:
        process.join()


def show(rows):
    """The tables, as Markdown; `rows` by family."""
    print("| model_type | full | LoRA | QLoRA | prompts shared |\n|---|---|---|---|---|")
    for family, row in rows.items():
        if "full" in row:
            shared = f"no: {row['alone']}" if row.get("alone") else "yes"
            print(f"| `{family}` | {row['full']} | {row['lora']} | {row['qlora']} | {shared} |")
    reasons = {}
    for family, row in rows.items():
        if "refused" in row:
            reasons.setdefault(row["refused"].replace(f"model_type {family}", "model_type …"), []).append(family)
    print("\n| refused before weights are loaded | model_type |\n|---|---|")
    for reason, families in reasons.items():
        print(f"| {reason} | {', '.join(f'`{family}`' for family in families)} |")
    print(f"\nNot made so small: {', '.join(f'`{family}`' for family, row in rows.items() if 'skipped' in row)}.")


def main(words):
    """Print the tables; `only=name,name` takes some families; what `out=FILE` holds already is not tried again."""
    options = dict(word.split("=", 1) for word in words)
    families = options["only"].split(",") if "only" in options else sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    out = Path(options.get("out", os.devnull))
    lines = out.read_text().splitlines() if out.is_file() else []
    rows = {row.pop("family"): row for row in map(json.loads, lines)}
    quiet_libraries()
    with tempfile.TemporaryDirectory() as place:
        os.environ["DPO_KIT_CACHE"] = str(Path(place) / "cache")
        bench = Bench(Path(place))
        for family in families:
            if family not in rows:
                rows[family] = in_a_process(bench, family)
                with out.open("a") as file:
                    file.write(json.dumps({"family": family} | rows[family]) + "\n")
    show({family: rows[family] for family in families})


if __name__ == "__main__":
    main(sys.argv[1:])
