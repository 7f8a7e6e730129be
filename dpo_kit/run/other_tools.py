"""What users of other tools type for our keys, so that a refusal can name the one that is meant."""

OURS = {
    "tracking": "wandb use_wandb report_to logger log_with reporter",
    "method": "loss loss_type pref_loss dpo_loss algorithm algo rl trainer",
    "seed": "random_seed",
    "beta": "pref_beta dpo_beta kl_coef kl_beta",
    "data.train": "dataset datasets dataset_name dataset_path train_file train_files train_data data_path data_file",
    "data.eval": "eval_dataset eval_file eval_data val_data val_file valid_file validation_file test_dataset dev_file",
    "model.path": "model_name model_name_or_path model_path model_id base_model pretrained_model policy_model",
    "model.reference": "ref_model reference_model ref_model_name_or_path ref_model_path",
    "model.tuning": "finetuning_type use_lora use_peft lora peft load_in_4bit use_4bit qlora adapter",
    "model.dtype": "torch_dtype dtype model_dtype",
    "model.attn_implementation": "attn attn_impl flash_attn flash_attention use_flash_attention",
    "model.chat_template": "template prompt_template",
    "model.lora.r": "lora_r lora_rank rank",
    "model.lora.target_modules": "lora_target lora_target_modules lora_modules",
    "trl.learning_rate": "lr learning_rate",
    "trl.num_train_epochs": "epochs num_epochs n_epochs train_epochs max_epochs",
    "trl.max_steps": "steps num_steps n_steps train_steps iters num_iters",
    "trl.per_device_train_batch_size": "batch_size bs train_batch_size micro_batch_size micro_train_batch_size",
    "trl.per_device_eval_batch_size": "eval_batch_size",
    "trl.gradient_accumulation_steps": "grad_accum grad_acc accumulation_steps gradient_accumulation",
    "trl.gradient_checkpointing": "grad_checkpointing activation_checkpointing",
    "trl.max_length": "cutoff_len max_seq_length max_seq_len sequence_len seq_len max_len",
    "trl.max_new_tokens": "max_tokens max_completion_length",
    "trl.lr_scheduler_type": "scheduler lr_scheduler",
    "trl.warmup_steps": "warmup warmup_steps",
    "trl.optim": "optimizer",
    "trl.weight_decay": "wd",
    "trl.max_grad_norm": "grad_clip clip_grad gradient_clipping max_norm",
    "trl.bf16": "precision mixed_precision",
    "hydra.run.dir": "output_dir out_dir output save_dir run_dir logdir",
    "tracking.project": "wandb_project project project_name",
    "tracking.entity": "wandb_entity",
    "tracking.name": "run_name wandb_name wandb_run_name exp_name experiment_name",
    "tracking.group": "wandb_group",
    "experiment": "recipe",
}  # our key: what users of other tools type
MEANT = {name: key for key, names in OURS.items() for name in names.split()}


def meant(key: str) -> str | None:
    """Our key for one that users of other tools type, with or without a group before it; None for any other."""
    return MEANT.get(key.rpartition(".")[2].replace("-", "_").lower())
