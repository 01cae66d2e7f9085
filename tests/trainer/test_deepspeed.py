"""DeepSpeed behind our interface: its settings filled in, and runs that equal those of torch."""

import math
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import ostro, read_metrics, torchrun_words, write_config

from ostro.checkpoint import CheckpointerConfig, find_latest
from ostro.core.errors import ConfigError
from ostro.core.units import Precision
from ostro.optim import AdamConfig, MuonConfig
from ostro.trainer import BatchStage, TrainerConfig
from ostro.trainer.backends.deepspeed import deepspeed_settings

SHIPPED = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "fp16": {"enabled": "auto"},
    "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    "steps_per_print": 1000000,
}


def fill(given, optimizer=None, *, has_fp16=True, processes=2, **trainer):
    fields = {"train_batch_size": 16, "per_device_parallelism": 4, "deepspeed": given} | trainer
    config = TrainerConfig(**fields)
    plan = config.batch_plan(processes)
    return deepspeed_settings(config, optimizer or AdamConfig(), plan, has_fp16=has_fp16)


def test_auto_takes_our_values():
    settings, notices = fill(SHIPPED, mp=Precision.from_text("p=f32,c=bf16"))
    assert notices == []
    assert settings == {
        "train_batch_size": 16,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "fp16": {"enabled": False},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2},
        "steps_per_print": 1000000,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    assert SHIPPED["bf16"] == {"enabled": "auto"}, "what was given is untouched"


def test_what_is_left_out_is_filled_in_as_well():
    settings, _ = fill({"zero_optimization": {"stage": 1}}, AdamConfig(max_grad_norm=None))
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 0.0
    assert settings["bf16"] == settings["fp16"] == {"enabled": False}


def test_equal_values_may_stand_there():
    given = {
        "train_batch_size": 16,
        "gradient_clipping": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95]}},
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto"}},
        "bf16": {"enabled": False},
    }
    settings, _ = fill(given)
    assert "optimizer" not in settings and "scheduler" not in settings


@pytest.mark.parametrize(
    ("given", "theirs", "ours"),
    [
        ({"train_batch_size": 32}, "train_batch_size = 32", "trainer.train_batch_size = 16"),
        (
            {"train_micro_batch_size_per_gpu": 2},
            "train_micro_batch_size_per_gpu = 2",
            "per_device_parallelism = 4",
        ),
        ({"gradient_accumulation_steps": 4}, "steps = 4", "16 / (4 * 2) = 2"),
        ({"gradient_clipping": 0.5}, "gradient_clipping = 0.5", "optimizer.max_grad_norm = 1.0"),
        ({"bf16": {"enabled": True}}, "bf16.enabled = true", "trainer.mp = f32, bf16 = false"),
        ({"fp16": {"enabled": True}}, "fp16.enabled = true", "trainer.mp = f32, fp16 = false"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type = Lamb", "AdamW"),
        (
            {"optimizer": {"params": {"lr": 0.1}}},
            "params.lr = 0.1",
            "optimizer.learning_rate = 0.0001",
        ),
        (
            {"optimizer": {"params": {"betas": [0.9, 0.999]}}},
            "betas = [0.9, 0.999]",
            "[0.9, 0.95]",
        ),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}},
            "scheduler.params.warmup_num_steps = 10",
            "optimizer.learning_rate",
        ),
    ],
)
def test_a_contradiction_names_both(given, theirs, ours):
    with pytest.raises(ConfigError) as error:
        fill(given)
    assert "trainer.deepspeed." in str(error.value)
    assert theirs in str(error.value) and ours in str(error.value)


@pytest.mark.parametrize(
    ("trainer", "optimizer", "setting"),
    [
        ({}, AdamConfig(skip_bad_steps=True), "optimizer.skip_bad_steps"),
        (
            {"train_batch_size": [BatchStage(0, 16), BatchStage(5, 32)]},
            None,
            "trainer.train_batch_size",
        ),
        ({"mp": Precision.from_text("bf16")}, None, "trainer.mp = bf16"),
        ({"mp": Precision.from_text("p=f32,c=f16"), "has_fp16": False}, None, "no float16"),
        ({"checkpointer": CheckpointerConfig(format="nanogpt")}, None, "format = nanogpt"),
        ({"checkpointer": CheckpointerConfig(base_path="s3://a")}, None, "base_path = s3://a"),
    ],
)
def test_what_deepspeed_does_not_do_is_refused(trainer, optimizer, setting):
    with pytest.raises(ConfigError, match=re.escape(setting)):
        fill(SHIPPED, optimizer, **trainer)


def test_an_optimizer_that_needs_whole_matrices_is_refused():
    with pytest.raises(ConfigError, match=r"optimizer\.type - DeepSpeed hands"):
        fill({}, MuonConfig())


def test_fp16_in_the_json_becomes_bf16_where_there_is_none():
    given = SHIPPED | {"fp16": {"enabled": True, "loss_scale": 0}}
    bf16 = Precision.from_text("p=f32,c=bf16")
    settings, notices = fill(given, mp=bf16, has_fp16=False)
    assert (settings["fp16"], settings["bf16"]) == ({"enabled": False}, {"enabled": True})
    assert len(notices) == 1 and "bfloat16" in notices[0]
    with pytest.raises(ConfigError, match=r"fp16\.enabled = true"):
        fill(given, mp=bf16)
    settings, _ = fill(given, mp=replace(bf16, compute="float16"))
    assert settings["fp16"] == {"enabled": True, "loss_scale": 0}


BASE = {
    "model": {"embed_pdrop": 0.1, "gradient_checkpointing": True},
    "optimizer": {"max_grad_norm": 0.5, "weight_decay": 0.1},
    "sample_prompts": ["the quick"],
    "sampling": {"max_new_tokens": 4},
}
TRAINER = {
    "num_train_steps": 10,
    "train_batch_size": 8,
    "per_device_parallelism": 2,
    "log_interval": 1,
    "steps_per_eval": 4,
}
STAGES = {
    # parts of the small model are small: all of them are to be gathered
    f"stage{n}": {"zero_optimization": {"stage": n, "stage3_param_persistence_threshold": 0}}
    for n in range(4)
}
RUNS = {"torch": None, **STAGES, "shipped": SHIPPED, "file": {"zero_optimization": {"stage": 3}}}
DIVERGING = {f"diverging{n}": STAGES[f"stage{n}"] for n in range(4)}


def write_run(root: Path, name: str, deepspeed: dict | None, **trainer) -> Path:
    folder = root / name
    every = 100 if "diverging" in name else 5
    checkpoints = {"base_path": str(folder / "checkpoints"), "keep": [{"every": every}]}
    if name == "file":
        checkpoints["format"] = "file"
    mp = "p=f32,c=bf16" if "shipped" in name else "f32"
    fields = TRAINER | {"deepspeed": deepspeed, "mp": mp, "checkpointer": checkpoints} | trainer
    return write_config(folder, **BASE, trainer=fields)


def make_runs(root: Path) -> None:
    """Runs of two processes each below `root`, by name, and the same going on after step 5."""
    paths = [write_run(root, name, given) for name, given in RUNS.items()]
    for name, given in RUNS.items():
        start = root / name / "checkpoints" / "tiny" / "step-5"
        if given is not None and name != "file":
            paths.append(write_run(root, f"{name}-on", given, load_checkpoint_path=str(start)))
    for name, given in DIVERGING.items():  # nothing is flushed between the bad step and the end
        quiet = {"log_interval": 10, "steps_per_eval": None}
        paths.append(write_run(root, name, given, **quiet))
    done = run_all(2, paths)
    assert "[INFO]" not in done.stdout, "DeepSpeed is silent"
    assert "error:" not in done.stdout, done.stdout


def run_all(num_processes: int, paths: list[Path]) -> subprocess.CompletedProcess:
    """Run configurations one after another."""
    words = torchrun_words(num_processes, Path(__file__).parent / "deepspeed_runs.py", *paths)
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def optimizer_bytes(folder: Path) -> tuple[int, int]:
    """ZeRO stage and size of the first rank's moments, as the log says."""
    log = (folder / "logs" / "tiny" / "train.log").read_text()
    found = re.search(r"ZeRO stage (\d): optimizer state .* \((\d+) bytes\)", log)
    assert found, log
    return int(found[1]), int(found[2])


def check_float32_equals_torch_in_every_stage(runs):
    for metric, count in (("train/loss", 10), ("grad/norm/total", 10), ("eval/loss", 4)):
        expected = read_metrics(runs / "torch", metric)
        assert len(expected) == count
        for name in STAGES:
            found = read_metrics(runs / name, metric)
            assert found == pytest.approx(expected, rel=1e-4), (name, metric)


def check_bfloat16_stays_near(runs):
    expected = read_metrics(runs / "torch")
    assert read_metrics(runs / "shipped") == pytest.approx(expected, rel=5e-3)
    assert optimizer_bytes(runs / "shipped")[0] == 2


def check_optimizer_state_is_halved_from_stage_1_on(runs):
    sizes = [optimizer_bytes(runs / name) for name in STAGES]
    assert [stage for stage, _ in sizes] == [0, 1, 2, 3]
    whole = sizes[0][1]
    for _, size in sizes[1:]:
        assert size == pytest.approx(whole / 2, rel=0.01)


def check_going_on_equals_not_stopping(runs):
    for name in [*STAGES, "shipped"]:
        straight = read_metrics(runs / name)
        resumed = read_metrics(runs / f"{name}-on")
        assert sorted(resumed) == [6, 7, 8, 9]
        expected = {step: straight[step] for step in resumed}
        assert resumed == pytest.approx(expected, rel=1e-6), name


def check_weights_are_those_of_torch(runs):
    expected = find_latest(str(runs / "torch" / "checkpoints")).tensors("model")
    for name in STAGES:
        weights = find_latest(str(runs / name / "checkpoints")).tensors("model")
        assert weights.keys() == expected.keys()
        for key, tensor in weights.items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=1e-4)


def check_a_divergence_spoils_no_weights(runs):
    for stage, name in enumerate(DIVERGING):
        assert not math.isfinite(read_metrics(runs / name)[6])
        saved = find_latest(str(runs / name / "checkpoints"))
        assert saved.values["step"] == 6
        before = find_latest(str(runs / f"stage{stage}" / "checkpoints" / "tiny" / "step-5"))
        for key, tensor in saved.tensors("model").items():
            assert torch.equal(tensor, before.tensors("model")[key]), (name, key)


def check_the_file_points_to_the_newest_folder(runs):
    folder = runs / "file" / "checkpoints" / "tiny"
    assert sorted(path.name for path in folder.iterdir()) == [
        "latest_checkpoint.pt",
        "step-5",
        "step-9",
    ]
    saved = find_latest(str(folder / "latest_checkpoint.pt"))
    assert saved.path == str(folder / "step-9")
    assert saved.values["deepspeed"] == {"stage": 3, "processes": 2, "precision": "float32"}


def check_one_process_without_a_launcher(runs, tmp_path):
    path = write_run(tmp_path, "alone", STAGES["stage3"])
    done = ostro("train", "--config_path", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "eprecat" not in done.stderr
    alone, together = (read_metrics(folder) for folder in (tmp_path / "alone", runs / "torch"))
    assert alone == pytest.approx(together, rel=1e-4)

    done = ostro(
        "sample", "--checkpoint", tmp_path / "alone/checkpoints/tiny/latest_checkpoint.pt",
        "--prompt", "the", "--max_new_tokens", "3",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("the")


def check_what_does_not_fit_says_why(runs, tmp_path):
    """Refused before anything is trained."""
    sharded, plain = (str(runs / name / "checkpoints") for name in ("stage2", "torch"))
    paths = [
        write_run(tmp_path, "fewer", STAGES["stage2"], load_checkpoint_path=sharded),
        write_run(tmp_path, "stage", STAGES["stage1"], load_checkpoint_path=sharded),
        write_run(tmp_path, "without", None, load_checkpoint_path=sharded),
        write_run(tmp_path, "with", STAGES["stage2"], load_checkpoint_path=plain),
        write_run(tmp_path, "wrong", {"zero_optimization": {"stage": 7}}),
    ]
    done = run_all(1, paths)
    errors = [line for line in done.stdout.splitlines() if line.startswith("error:")]
    assert len(errors) == len(paths), done.stdout
    parts = ["processes = 2, this run has processes = 1", "stage = 2, this run has stage = 1",
             "saved by DeepSpeed", "saved without DeepSpeed", "DeepSpeed refuses it"]  # fmt: skip
    for error, part in zip(errors, parts, strict=True):
        assert part in error


@pytest.mark.dist
def test_runs_of_two_processes_and_what_goes_on_from_them(tmp_path):
    """One test, because the processes are started once."""
    runs = tmp_path / "runs"
    make_runs(runs)
    check_float32_equals_torch_in_every_stage(runs)
    check_bfloat16_stays_near(runs)
    check_optimizer_state_is_halved_from_stage_1_on(runs)
    check_going_on_equals_not_stopping(runs)
    check_weights_are_those_of_torch(runs)
    check_a_divergence_spoils_no_weights(runs)
    check_the_file_points_to_the_newest_folder(runs)
    check_one_process_without_a_launcher(runs, tmp_path)
    check_what_does_not_fit_says_why(runs, tmp_path)


@pytest.mark.dist
def test_a_mistake_in_the_json_is_told_before_the_data_is_read(tmp_path):
    path = write_run(tmp_path, "wrong", {"train_batch_size": 5})
    path.write_text(path.read_text().replace("train.txt", "gone.txt"))
    done = ostro("train", "--config_path", path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "trainer.deepspeed.train_batch_size = 5" in done.stderr
    assert "trainer.train_batch_size = 8" in done.stderr and "gone.txt" not in done.stderr
