"""Configurations in the shapes of Levanter's own presets: what they say is taken over, ignored with
a notice, or refused."""

from pathlib import Path

import pytest
import yaml

from ostro.cli.aliases import LEVANTER
from ostro.cli.arguments import load_run
from ostro.config import Foreign
from ostro.config.fields import dotted_names
from ostro.core.errors import ConfigError
from ostro.data.sources.source import HfSource, UrlsSource
from ostro.data.text import WeightStage
from ostro.lm_config import TrainLmConfig, with_hf_model

OWT = {
    "train_urls": ["gs://bucket/owt/train.{1..128}-of-128.jsonl.gz"],
    "validation_urls": ["gs://bucket/owt/val.{1..8}-of-8.jsonl.gz"],
    "cache_dir": "gs://bucket/tokenized/owt/",
    "cache_options": {"batch_size": 64, "num_shard_groups": 16, "target_size_per_flush": "512MB"},
}
MIX = {
    "cache_dir": "gs://bucket/tokenized/mix",
    "tokenizer": "gpt2",
    "stop_strategy": "restart",
    "shuffle": 10000,
    "permutation_type": "feistel",
    "cache_options": {"batch_size": 64},
    "configs": {
        "owt": {key: OWT[key] for key in ("train_urls", "validation_urls")},
        "wiki": {"id": "somebody/wikitext", "cache_dir": "other"},
        "web": {"id": "somebody/web", "name": "plain", "cache_dir": "third"},
    },
    "train_weights": {"owt": 0.6, "wiki": 0.4},
}
SMALL = {"type": "gpt2", "hidden_dim": 768, "num_heads": 12, "num_layers": 12, "seq_len": 1024,
         "gradient_checkpointing": True, "scale_attn_by_inverse_layer_idx": True}  # fmt: skip
NANO = {"type": "gpt2", "hidden_dim": 32, "num_heads": 4, "num_layers": 2}
TRAINER = {
    "tracker": [{"type": "wandb", "project": "p", "tags": ["owt", "gpt2"]}],
    "mp": "p=f32,c=bfloat16",
    "model_axis_size": 1,
    "per_device_parallelism": -1,
    "train_batch_size": 256,
    "num_train_steps": 20000,
    "checkpointer": {"keep": [{"every": 1000}], "save_interval": "5m"},
    "tensor_parallel_axes": ["mlp", "heads"],
    "fsdp_axis": "embed",
    "batch_axis": "batch",
}
ADAM = {"learning_rate": "1E-3", "weight_decay": 0.1, "warmup": 0.01}
PRESETS = {
    "nano": {"data": {"id": "somebody/wikitext"}, "model": NANO, "trainer": TRAINER},
    "nano with its cache": {"data": OWT, "model": NANO, "trainer": TRAINER, "optimizer": ADAM},
    "small fast": {"data": OWT, "model": SMALL | {"attn_backend": "splash"}, "trainer": TRAINER},
    "small with skipped steps": {
        "data": OWT, "model": SMALL, "trainer": TRAINER,
        "optimizer": ADAM | {"skip_bad_steps": True},
    },
    "harness": {
        "data": MIX, "model": NANO, "trainer": TRAINER, "eval_harness_steps": 1000,
        "eval_harness": {"task_spec": ["piqa"], "max_examples": 2048},
    },
    "mixture": {"data": MIX, "model": SMALL, "trainer": TRAINER, "optimizer": ADAM},
    "large with flash attention": {
        "data": OWT,
        "model": SMALL | {"use_flash_attention": True, "flash_attention_block_size": 512},
        "trainer": TRAINER | {"profiler": True, "log_jaxprs": False},
    },
    "2023": {
        "data": {key: OWT[key] for key in ("train_urls", "cache_dir")} | {"num_train_shards": 128},
        "model": {key: value for key, value in SMALL.items() if key != "type"},
        "fcm_prob": 0.0,
        "trainer": {"wandb": {"project": "p"}, "learning_rate": 6e-4, "weight_decay": 0.1,
                    "warmup_ratio": 0.01, "use_jax_array": True},
    },
}  # fmt: skip


def config_of(tmp_path: Path, content: dict, *flags: str) -> TrainLmConfig:
    path = tmp_path / "preset.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_run(str(path), flags).config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_with_one_notice_for_what_is_ignored(tmp_path, capsys, name):
    config_of(tmp_path, PRESETS[name])
    notes = [line for line in capsys.readouterr().err.splitlines() if "no effect here" in line]
    settings = [note.split()[1].rpartition(".")[2] for note in notes]
    assert len(settings) == len(set(settings)), "each is named once"
    text = yaml.safe_dump(PRESETS[name])
    wanted = {row.path.rpartition(".")[2] for row in LEVANTER} - {"cache_dir"}
    present = {word for word in wanted if f"{word}:" in text}
    assert present <= set(settings)


def test_a_preset_trains_what_it_says(tmp_path):
    config = config_of(tmp_path, PRESETS["mixture"])
    sources = config.data.configs
    assert sources["wiki"] == HfSource(id="somebody/wikitext")
    assert sources["web"] == HfSource(id="somebody/web", name="plain")
    assert sources["owt"] == UrlsSource(OWT["train_urls"], OWT["validation_urls"])
    assert config.data.train_weights == {"owt": 0.6, "wiki": 0.4}
    assert (config.data.shuffle, config.optimizer.learning_rate) == (10000, 1e-3)


def test_weights_in_stages_as_pairs(tmp_path):
    stages = [[0, {"owt": 0.8, "wiki": 0.2}], [1000, {"owt": 0.5, "wiki": 0.5}]]
    data = MIX | {"train_weights": stages}
    config = config_of(tmp_path, PRESETS["mixture"] | {"data": data})
    expected = [WeightStage(0, stages[0][1]), WeightStage(1000, stages[1][1])]
    assert config.data.train_weights == expected
    flag = "--data.train_weights=[[0, {wiki: 1}], [500, {owt: 1.0}]]"
    config = config_of(tmp_path, PRESETS["mixture"], flag)
    assert config.data.train_weights == [WeightStage(0, {"wiki": 1}), WeightStage(500, {"owt": 1})]
    with pytest.raises(ConfigError, match=r"train_weights\.1 = .* must be a mapping"):
        config_of(tmp_path, PRESETS["mixture"], "--data.train_weights=[[0, {wiki: 1}], [5]]")
    with pytest.raises(ConfigError, match=r"train_weights\.0\.start = x .* whole number"):
        config_of(tmp_path, PRESETS["mixture"], "--data.train_weights=[[x, {wiki: 1}]]")


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("model.use_layer_norm_weight", "false", "must be true: norms always have a weight"),
        ("data.stop_strategy", "first_exhausted", "must be restart"),
        ("fcm_prob", "0.15", "must be 0: "),
        ("z_loss_weight", "1e-4", "must be 0: "),
        ("trainer.crash_on_inf", "false", "set trainer.crash_on_nan: false"),
        ("trainer.model_averaging", "{type: ema}", "must be none"),
        ("data.format.type", "chat", "documents are plain text"),
        ("data.cache_optoins", "{}", "is not a setting"),
        ("model.attn_backends", "x", "is not a setting"),
    ],
)
def test_what_would_change_the_mathematics_is_refused(tmp_path, setting, value, says):
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, PRESETS["small fast"], f"--{setting}", value)
    assert f"{setting} = {value} (--{setting})" in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize("row", [row for row in LEVANTER if row.accepts], ids=lambda row: row.path)
def test_what_changes_nothing_may_stand_there(tmp_path, row):
    config_of(tmp_path, PRESETS["nano"], f"--{row.path.replace('*', 'x')}", row.accepts[0])
    config_of(tmp_path, PRESETS["nano"], f"--{row.path.replace('*', 'x')}", "null")


def test_no_row_hides_a_setting_of_ours():
    """A row for something that is known here would never be asked for."""
    known = set(dotted_names(TrainLmConfig))
    assert known and not known & {row.path for row in LEVANTER}


def test_the_key_of_the_text_within_a_format(tmp_path):
    data = OWT | {"format": {"type": "text", "text_key": "content"}}
    assert config_of(tmp_path, PRESETS["nano"] | {"data": data}).data.text_key == "content"


@pytest.mark.parametrize(
    ("family", "name"),
    [("gpt2", "openai-community/gpt2"), ("llama", "NousResearch/Llama-2-7b-hf")],
)
def test_the_model_that_a_family_is_known_by(tmp_path, family, name):
    content = PRESETS["nano"] | {"model": {"type": family}}
    for value, expected in (("true", name), ("false", None), ("null", None), ("a/b", "a/b")):
        config = config_of(tmp_path, content, "--initialize_from_hf", value)
        assert with_hf_model(config).initialize_from_hf == expected
    with pytest.raises(ConfigError, match="needs initialize_from_hf"):
        config_of(tmp_path, content, "--initialize_from_hf=false", "--use_hf_model_config=true")


def test_rows_match_whole_paths():
    row = Foreign("data.configs.*.cache_dir", "why")
    assert row.fits("data.configs.wiki.cache_dir")
    assert not row.fits("data.cache_dir") and not row.fits("data.configs.a.b.cache_dir")
