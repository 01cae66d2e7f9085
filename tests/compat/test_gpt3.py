"""`src/train.py`: model file, training file, flags; what each becomes natively."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import write_text

from ostro.checkpoint import disk_bytes, find_latest
from ostro.cli.gpt3 import load_gpt3, processes, train
from ostro.compat.gpt3 import settings
from ostro.core.errors import CheckpointError, ConfigError
from ostro.distributed.launch import launch
from ostro.optim import MuonConfig
from ostro.runtime.signals import Signals

ROOT = Path(__file__).parents[2]
MODEL = {"n_layers": 2, "d_model": 16, "n_heads": 2, "context_length": 32, "vocab_size": 257,
         "learning_rate": 1e-2, "batch_size": 8}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "train.txt")
    data = {"train_urls": [str(tmp_path / "train.txt")], "tokenizer": "bytes", "cache_dir": "cache",
            "num_validation_sequences": 4}  # fmt: skip
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(MODEL))
    training = {"data": data, "max_steps": 6, "sequence_length": 16, "save_interval": 3,
                "eval_interval": 3, "log_interval": 1}  # fmt: skip
    (tmp_path / "training.yaml").write_text(yaml.safe_dump(training))
    return tmp_path


FILES = ["--config", "tiny.yaml", "--training_config", "training.yaml"]


def native(*words: str, **environ: str):
    return load_gpt3([*FILES, *words], environ)[0].config


def run(*words: str) -> None:
    train([*FILES, *words], Signals(), {})


def test_settings_become_native_ones(folder):
    config = native("--seed", "3", "--gradient_checkpointing")
    trainer, model, optimizer = config.trainer, config.model, config.optimizer
    assert (model.num_layers, model.hidden_dim, model.num_heads, model.seq_len) == (2, 16, 2, 16)
    assert model.gradient_checkpointing and config.vocab_size == 257
    assert (trainer.seed, trainer.num_train_steps, trainer.train_batch_size) == (3, 6, 8)
    assert optimizer.learning_rate == 1e-2, "the model file's, where the training file says null"
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (0.9, 0.95, 0.1)
    assert trainer.log_dir == "experiments/tiny/logs/."
    assert trainer.checkpointer.folder("any") == "experiments/tiny/checkpoints"
    assert native("--output_dir", "here").trainer.log_dir == "here/logs/."


def test_muon_is_an_optimizer_of_a_training_file(folder):
    path = folder / "training.yaml"
    text = yaml.safe_load(path.read_text())
    text["optimizer"] = {"type": "Muon", "betas": [0.8, 0.99], "weight_decay": 0.2}
    path.write_text(yaml.safe_dump(text))
    expected = MuonConfig(
        learning_rate=1e-2, beta1=0.8, beta2=0.99, weight_decay=0.2, min_lr_ratio=0.0, warmup=0
    )
    assert native() == replace(native(), optimizer=expected)


@pytest.mark.parametrize(
    ("batch", "ranks", "length", "micro"),
    [(512, 1, 2048, 8), (512, 8, 2048, 8), (8, 4, 256, 2), (24, 1, 256, 8), (7, 1, 256, 1)],
)
def test_micro_batches_hold_16k_tokens_at_most(folder, batch, ranks, length, micro):
    size = settings.micro_batch(batch // ranks, max(1, settings.MICRO_BATCH_TOKENS // length))
    assert size == micro and batch // ranks % size == 0


@pytest.mark.parametrize("size", ["125M", "350M", "760M", "1.3B", "2.7B", "6.7B", "13B", "175B"])
def test_every_size_loads(size, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_gpt3(["--model_size", size], {})[0].config
    assert config.model.hidden_dim % config.model.num_heads == 0
    large = "configs/training_configs/large_scale.yaml"
    config = load_gpt3(["--model_size", size, "--training_config", large], {})[0].config
    assert config.model.seq_len == 2048 and config.trainer.mp.compute == "float16"


@pytest.mark.parametrize(
    ("size", "steps", "warmup"),
    [("125M", 572205, 715), ("1.3B", 286102, 358), ("13B", 143051, 179), ("175B", 91553, 114)],
)
def test_the_budget_is_that_of_the_paper(size, steps, warmup, monkeypatch):
    """300 billion tokens, 375 million of them warm-up, in batches of the size's own."""
    monkeypatch.chdir(ROOT)
    large = ["--training_config", "configs/training_configs/large_scale.yaml"]
    config = load_gpt3(["--model_size", size, *large], {})[0].config
    assert (config.trainer.num_train_steps, config.optimizer.warmup) == (steps, warmup)
    assert config.optimizer.min_lr_ratio == 0.1
    checkpointer = config.trainer.checkpointer
    assert disk_bytes(checkpointer, steps, 1)[1] == steps // 25_000 + 2, "in checkpoints"
    assert checkpointer.policy.due(1000, 0) == "temporary"


def change(folder: Path, **settings: object) -> None:
    training = yaml.safe_load((folder / "training.yaml").read_text())
    (folder / "training.yaml").write_text(yaml.safe_dump(training | settings))


def test_budgets_in_tokens(folder):
    (folder / "tiny.yaml").write_text(yaml.safe_dump(MODEL | {"training_tokens": 12_800}))
    change(folder, max_steps=None, scheduler={"warmup_steps": None, "eta_min": None})
    config = native()
    assert config.trainer.num_train_steps == 12_800 // (8 * 16)
    assert config.optimizer.warmup == 10, "375 million tokens are more than a tenth of the run"
    assert config.optimizer.min_lr_ratio == 0.1
    change(folder, max_steps=7)
    assert native().trainer.num_train_steps == 7


def test_values_of_the_model_file_that_are_replaced(folder):
    change(folder, batch_size=4, learning_rate=1e-2)
    _, made, _ = load_gpt3(FILES, {})
    notices = [re.sub(r":\d+\)", ")", notice) for notice in made.notices]
    assert notices == [
        "batch_size = 4 (training.yaml) replaces batch_size = 8 (tiny.yaml)",
        "sequence_length = 16 (training.yaml) replaces context_length = 32 (tiny.yaml)",
    ]


def test_checkpoints_between_those_kept_replace_one_another(folder):
    """Also over a resume, which is the same run: it deletes what the attempt before left."""
    change(folder, save_interval=2, keep_interval=4, max_steps=8)
    kept = folder / "experiments" / "tiny" / "checkpoints"
    # A save that is under way puts a temporary one off.
    plain = ["--trainer.checkpointer.async_save", "false"]

    def names() -> set[str]:
        return {path.name for path in kept.iterdir()}

    run(*plain, "--trainer.checkpointer.save_last", "false")
    assert names() == {"latest_checkpoint.pt", "step_4.pt", "step_6.pt"}
    resume = ["--resume_from_checkpoint", str(kept / "latest_checkpoint.pt")]
    run(*resume, *plain, "--trainer.num_train_steps", "13")
    assert names() == {"latest_checkpoint.pt", "step_4.pt", "step_8.pt", "step_12.pt"}


def test_another_run_leaves_the_checkpoints_of_the_one_before(folder):
    change(folder, save_interval=2, keep_interval=100)
    kept = folder / "experiments" / "tiny" / "checkpoints"
    run("--trainer.checkpointer.save_last", "false")
    run("--trainer.num_train_steps", "3")
    assert (kept / "step_4.pt").exists()


def test_train_resume_and_latest(folder):
    run()
    kept = folder / "experiments" / "tiny" / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == [
        "latest_checkpoint.pt", "step_3.pt", "step_5.pt"
    ]  # fmt: skip
    content = torch.load(kept / "latest_checkpoint.pt", weights_only=True)
    assert content["values"]["step"] == 6
    whole = content["model"]
    # From the older one, by name: the newest beside it must not win.
    run("--resume_from_checkpoint", str(kept / "step_3.pt"), "--output_dir", "again")
    saved = find_latest(str(folder / "again" / "checkpoints"))
    for name, tensor in saved.tensors("model").items():
        assert torch.equal(tensor, whole[name]), "resuming is exact"
    run("--resume_from_checkpoint", str(kept), "--output_dir", "more", "--trainer.num_train_steps",
        "8")  # fmt: skip
    assert find_latest(str(folder / "more")).values["step"] == 8


def test_float16_keeps_its_scaler(folder):
    run("--fp16")
    saved = find_latest(str(folder / "experiments"))
    assert "loss_scaler.scale" in saved.tensors("state")


def test_a_damaged_checkpoint_is_skipped_and_a_foreign_pickle_refused(folder, capsys):
    run()
    kept = folder / "experiments" / "tiny" / "checkpoints"
    newest = kept / "step_5.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    newest.write_bytes(data)
    saved = find_latest(str(kept))
    assert saved.path.endswith("step_3.pt")
    torch.save({"model": Path("x")}, kept / "evil.pt")
    with pytest.raises(CheckpointError, match="can run code"):
        run("--resume_from_checkpoint", str(kept / "evil.pt"))
    (kept / "other.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match=r"other\.pt"):
        run("--resume_from_checkpoint", str(kept / "other.pt"))


@pytest.mark.parametrize(
    ("words", "environ", "parts"),
    [
        (["--sed", "3"], {}, ["sed", "did you mean seed?"]),
        (["--seed=-1"], {}, ["seed = -1 (--seed)", "2**64 - 1"]),
        (["--seed", str(1 << 64)], {}, ["seed = 18446744073709551616", "2**64 - 1"]),
        (["--model_size", "1.3B"], {}, ["model_size = 1.3B", "tiny.yaml"]),
        (["--gpus_per_node", "0"], {}, ["gpus_per_node = 0", "at least 1"]),
        (["--gpus_per_node", "4"], {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
         ["gpus_per_node = 4", "has started 2"]),
        (["--num_nodes", "2"], {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
         ["num_nodes = 2", "has started 1"]),
        (["--distributed_backend", "mpi"], {}, ["distributed_backend = mpi"]),
        (["--trainer.sed", "1"], {}, ["trainer.sed", "seed"]),
    ],
)  # fmt: skip
def test_mistakes_are_named(folder, words, environ, parts):
    with pytest.raises(ConfigError) as caught:
        native(*words, **environ)
    for part in parts:
        assert part in str(caught.value)


def test_tasks_of_slurm_are_workers_or_start_them():
    flags = settings.Gpt3Flags(num_nodes=4, gpus_per_node=8)
    for per_node, total in (("8(x4)", "32"), ("1(x4)", "4")):
        task = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": total, "SLURMD_NODENAME": "n1"}
        nodes = {"SLURM_STEP_NODELIST": "n[1-4]", "SLURM_STEP_TASKS_PER_NODE": per_node}
        assert processes(flags, task | nodes) == (8, 4)
    task |= nodes | {"SLURM_STEP_TASKS_PER_NODE": "2(x4)", "SLURM_STEP_NUM_TASKS": "8"}
    with pytest.raises(ConfigError, match="the launcher has started 2"):
        processes(flags, task)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"sequence_length": 64}, "context_length = 32"),
        ({"scheduler": {"eta_min": 0.5}}, "scheduler.eta_min = 0.5"),
        ({"keep_interval": 0}, "keep_interval = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"save_interval": 0}, "save_interval = 0"),
        ({"optimizer": {"type": "SGD"}}, "optimizer.type = SGD"),
        ({"optimizer": {"betas": [0.9]}}, "must be two numbers"),
        ({"max_step": 3}, "did you mean max_steps?"),
    ],
)
def test_mistakes_in_the_training_file_are_named(folder, change, part):
    training = yaml.safe_load((folder / "training.yaml").read_text())
    (folder / "training.yaml").write_text(yaml.safe_dump(training | change))
    with pytest.raises(ConfigError, match=part.replace("?", r"\?")):
        native()


@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed's CPU device has no float16")
def test_float16_under_deepspeed_on_a_cpu(folder):
    (folder / "ds.json").write_text('{"zero_optimization": {"stage": 1}}')
    with pytest.raises(ConfigError, match="no float16"):
        native("--deepspeed_config", "ds.json", "--fp16")
    training = yaml.safe_load((folder / "training.yaml").read_text())
    (folder / "training.yaml").write_text(yaml.safe_dump(training | {"fp16": True}))
    loaded, made, _ = load_gpt3([*FILES, "--deepspeed_config", "ds.json"], {})
    assert loaded.config.trainer.mp.compute == "bfloat16"
    assert "bfloat16" in made.notices[-1]
    assert loaded.config.trainer.deepspeed == {"zero_optimization": {"stage": 1}}
    (folder / "ds.json").write_text("{nonsense")
    with pytest.raises(ConfigError, match=r"ds\.json.*cannot be read"):
        native("--deepspeed_config", "ds.json")


def test_several_machines_need_an_address_and_a_number():
    with pytest.raises(ConfigError) as caught:
        launch(["src/train.py", "--num_nodes", "2"], 4, 2, {})
    assert "NODE_RANK=0 python3 src/train.py --num_nodes 2" in str(caught.value)
    assert "NODE_RANK=1" in str(caught.value)


def test_slurm_numbers_the_machines(monkeypatch):
    started = []
    monkeypatch.setattr("ostro.distributed.launch.run_launcher", started.append)
    job = {"SLURM_NODEID": "1", "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "n[01-02]"}
    launch(["src/train.py"], 4, 2, job)
    launch(["src/train.py"], 4, 2, job | {"MASTER_ADDR": "10.0.0.1", "NODE_RANK": "0"})
    first, second = started
    assert (first.node_rank, first.master_addr, first.master_port) == (1, "n01", 61497)
    assert (second.node_rank, second.master_addr) == (0, "10.0.0.1")
