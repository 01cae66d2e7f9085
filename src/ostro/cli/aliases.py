"""Other names of settings, as people know them from elsewhere, and settings of Levanter's that have
nothing to say here. Inside there is one name.
"""

from ostro.config import Alias, Foreign

_OPTIMIZER = ("learning_rate", "weight_decay", "min_lr_ratio", "beta1", "beta2", "epsilon",
              "max_grad_norm", "lr_schedule")  # fmt: skip


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError("must be a fraction between 0 and 1")
    return value


def _plain_text(text: str) -> str:
    """The format of a data set of Levanter's: there, `text` is about documents, not files."""
    if text != "text":
        raise ValueError(
            "documents are plain text: prepare it, and name its key with data.text_key"
        )
    return "auto"


_JAX = "it is about JAX, and this is PyTorch"
_ATTENTION = "torch picks the kernel of attention by itself"
_CACHE = "the token cache is cut into shards by itself"
_EXPORT = "`ostro export` writes a checkpoint for transformers, at any time"
_PROFILER = "`ostro bench` says where the time goes"

LEVANTER = (
    *(Foreign(f"data.{name}", _CACHE)
      for name in ("cache_options", "create_sharded_cache", "num_train_shards", "num_val_shards",
                   "rows_per_chunk", "train_group_size", "val_group_size")),
    Foreign("data.configs.*.cache_dir", "all caches lie below data.cache_dir"),
    Foreign("data.permutation_type", "there is one kind of permutation"),
    Foreign("data.splits", "validation is whatever has validation files"),
    Foreign("data.stop_strategy", "a data set that ends begins again", ("restart",),
            "remove it; num_train_steps says when training ends"),
    Foreign("data.chat_template", "documents are plain text", ("none",), "remove it"),
    Foreign("data.ignore_token_id", "every token counts in the loss", ("-100",), "remove it"),
    Foreign("data.max_train_batches", "num_train_steps says how long", ("none",), "remove it"),
    *(Foreign(f"data.{name}", "no part of a data set is left out", ("none",), "remove it")
      for name in ("target_budget", "experiment_budget")),
    *(Foreign(f"model.{name}", _ATTENTION)
      for name in ("attn_backend", "use_flash_attention", "flash_attention_block_size")),
    *(Foreign(f"model.{name}", "it changes speed and memory alone, and only in JAX")
      for name in ("gradient_checkpointing_block_size", "scan_layers",
                   "cross_entropy_block_size")),
    Foreign("model.reference_checkpoint", "name the model in initialize_from_hf"),
    Foreign("model.use_layer_norm_weight", "norms always have a weight", ("true",),
            "remove it, or register a model of your own (docs/models.md)"),
    *(Foreign(f"model.{name}", "there are norms before the sublayers only", ("false",), "remove it")
      for name in ("hybrid_norm", "input_embedding_norm")),
    *(Foreign(f"trainer.{name}", _JAX)
      for name in ("jax_config", "jax_compilation_cache_dir", "log_jaxprs", "log_xla_hlo",
                   "use_hardware_rng", "use_jax_array", "shutdown_at_exit")),
    *(Foreign(f"trainer.{name}", _PROFILER)
      for name in ("profiler", "profiler_start_step", "profiler_num_steps",
                   "profiler_perfetto_link", "watch")),
    Foreign("trainer.run_base_dir", "everything of a run lies in log_dir and base_path"),
    Foreign("trainer.allow_nondivisible_batch_size", "a batch has to divide evenly", ("false",),
            "choose a batch size that does"),
    Foreign("trainer.allow_partial_checkpoint", "a checkpoint is whole", ("false",), "remove it"),
    Foreign("trainer.crash_on_inf", "infinity counts as not finite", ("true",),
            "set trainer.crash_on_nan: false, which is about both"),
    *(Foreign(f"trainer.{name}", "there is none", ("none",), "remove it")
      for name in ("quantization", "model_averaging")),
    Foreign("trainer.checkpointer.append_run_id_to_base_path", "the run id is appended", ("true",),
            "end trainer.checkpointer.base_path with /."),
    *(Foreign(f"optimizer.{name}", "cycles and decay say it", ("none",), "set optimizer.decay")
      for name in ("cooldown", "haps")),
    *(Foreign(name, "`ostro benchmark` scores a checkpoint, at any time")
      for name in ("eval_harness", "eval_harness_steps")),
    *(Foreign(name, _EXPORT)
      for name in ("hf_save_path", "hf_save_steps", "hf_save_dtype", "hf_upload")),
    Foreign("log_entropy", "entropies are not logged"),
    Foreign("fcm_prob", "there is no forgetful causal masking", ("0", "0.0"), "remove it"),
    Foreign("z_loss_weight", "the loss is the cross-entropy alone", ("0", "0.0"), "remove it"),
)  # fmt: skip
"""Settings of Levanter's, by what becomes of them."""

NATIVE = (
    Alias("trainer.batch_size", "trainer.train_batch_size"),
    Alias("trainer.per_device_train_parallelism", "trainer.per_device_parallelism"),
    Alias("trainer.eval_per_device_parallelism", "trainer.per_device_eval_parallelism"),
    Alias("trainer.wandb", "trainer.tracker", entry_type="wandb"),
    Alias("trainer.tracker.save_xla_dumps", "trainer.tracker.save_compile_dumps"),
    Alias("data.format.text_key", "data.text_key"),
    Alias("data.format.type", "data.format", convert=_plain_text),
    Alias("trainer.replica_ici_axis_size", "trainer.replica_axis_size"),
    Alias("trainer.replica_dcn_axis_size", "trainer.replica_axis_size"),
    *(Alias(f"trainer.{name}", f"optimizer.{name}") for name in _OPTIMIZER),
    Alias("trainer.warmup_ratio", "optimizer.warmup", convert=_fraction),
    Alias("optimizer.warmup_ratio", "optimizer.warmup", convert=_fraction),
    *LEVANTER,
)
"""The rows that the native command line takes."""
