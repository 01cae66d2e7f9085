"""Command lines as values: how a process was started, and what to type next."""

import shlex
import sys

import pytest

from ostro.runtime.commands import (
    STARTED_AS,
    CommandLine,
    Names,
    NativeDialect,
    RunFacts,
    launched,
    typed_program,
)

RUN = RunFacts("r1", "my logs/r1/config.yaml", "checkpoints/r1")
TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "x",
    "GROUP_WORLD_SIZE": "1",
    "GROUP_RANK": "0",
}
NODES = {"GROUP_WORLD_SIZE": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "n0", "MASTER_PORT": "29511"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["c.yaml"], "train c.yaml a=2"),
        (["a=1", "b=3"], "train b=3 a=2"),
        (["--a", "1", "--b", "3"], "train --b 3 a=2"),
        (["--a=1", "aa=1", "--x.a", "1"], "train aa=1 --x.a 1 a=2"),
        (["b=a word"], "train 'b=a word' a=2"),
    ],
)
def test_a_setting_takes_the_place_of_its_other_spellings(words, expected):
    assert str(CommandLine(("train",), tuple(words)).pair("a", 2)) == expected


@pytest.mark.parametrize(
    ("orig", "argv", "default", "expected"),
    [
        (["python", "train.py", "a=1"], ["train.py", "a=1"], "python train.py", "python train.py"),
        (["python3", "-u", "d/train.py"], ["d/train.py"], "python train.py", "python3 d/train.py"),
        (["python", "-m", "ostro.cli.main", "train"], ["/lib/main.py", "train"], "ostro",
         "python -m ostro.cli.main"),
        (["python", "-m", "ostro", "train"], ["/l/ostro/__main__.py", "train"], "ostro",
         "python -m ostro"),
        (["python", "-m", "pytest", "x"], ["/lib/pytest.py", "x"], "ostro", None),
        (["python", "other.py"], ["other.py"], "ostro", None),
    ],
)  # fmt: skip
def test_the_program_is_what_was_typed(orig, argv, default, expected):
    found = typed_program(default.split(), argv, orig)
    if expected is None:
        assert found in [("ostro",), (sys.executable, "-m", "ostro")]
    else:
        assert shlex.join(found) == expected


def test_launchers_give_the_whole_path_of_an_interpreter():
    found = typed_program(["python", "train.py"], ["train.py"], [sys.executable, "-u", "train.py"])
    assert found[1] == "train.py" and found[0] in ("python", "python3", sys.executable)


@pytest.mark.parametrize(
    ("environ", "program", "expected"),
    [
        ({}, "python train.py", "python train.py"),
        (TORCHRUN, "python train.py", "torchrun --nproc_per_node=2 --standalone train.py"),
        (TORCHRUN, "ostro", "torchrun --nproc_per_node=2 --standalone --no_python ostro"),
        (TORCHRUN, "python -m ostro.cli.main",
         "torchrun --nproc_per_node=2 --standalone -m ostro.cli.main"),
        ({**TORCHRUN, **NODES, "TORCHELASTIC_MAX_RESTARTS": "3"}, "python train.py",
         "torchrun --nproc_per_node=2 --max_restarts=3 --nnodes=2 --node_rank=0 --master_addr=n0"
         " --master_port=29511 train.py"),
        ({"RANK": "0", "WORLD_SIZE": "2", "CROSS_SIZE": "1", "LOCAL_SIZE": "2"},
         "python3 src/train.py", "deepspeed --num_gpus=2 src/train.py"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "n[0-1]",
          "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, "ostro", "srun --nodes=2 --ntasks=4 ostro"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}, "ostro", "mpirun -n 2 ostro"),
        ({**TORCHRUN, STARTED_AS: "python3 'my train.py'"}, "python train.py",
         "python3 'my train.py'"),
    ],
)  # fmt: skip
def test_launchers_are_part_of_the_program(environ, program, expected):
    assert shlex.join(launched(program.split(), environ)) == expected


def test_native_commands_take_the_resolved_configuration():
    dialect = NativeDialect(["--config_path", "c.yaml"])
    assert str(dialect.resume(RUN)).endswith("train --config_path 'my logs/r1/config.yaml'")
    anew = RunFacts("r1", "c.yaml", "d", never_loads=True)
    assert str(dialect.resume(anew)).endswith("c.yaml --trainer.load_checkpoint true")
    assert "load_checkpoint" not in str(dialect.again(anew)), "there is nothing to load yet"
    assert str(dialect.train_on(RUN, 8, 2)).endswith("--epoch 2 --trainer.num_train_steps 8")


def test_a_configuration_that_lacks_credentials_is_not_advised():
    words = ["--config_path", "c.yaml", "--trainer.id", "old", "--data.source", "${TOKEN}"]
    run = RunFacts("r1", "logs/config.yaml", "d", is_complete=False)
    told = str(NativeDialect(words).resume(run))
    assert told.endswith("--config_path c.yaml --data.source '${TOKEN}' --trainer.id r1")


NAMES = Names({"model.seq_len": "block_size", "optimizer.warmup": "warmup_iters"})


@pytest.mark.parametrize(
    ("native", "spoken"),
    [
        ("model.seq_len = 0 (--x) - must be", "block_size = 0 (--x) - must be"),
        ("model.seq_len = 0 (block_size, c.py:3) - no", "block_size = 0 (c.py:3) - no"),
        ("error: model.seq_len: was 1, now 2 (block_size, c.py:3)",
         "error: block_size: was 1, now 2 (c.py:3)"),
        ("seq_len = 16 is short; set model.seq_len.", "block_size = 16 is short; set block_size."),
        ("warmup takes 3 steps", "warmup takes 3 steps"),
        ("optimizer.warmup.more, my_seq_len", "optimizer.warmup.more, my_seq_len"),
        ("seq_lens", "seq_lens"),
        ("--trainer.resume_policy '{model.seq_len: warn}'",
         "--trainer.resume_policy '{model.seq_len: warn}'"),
        ("type --model.seq_len 3", "type --model.seq_len 3"),
        ("two\nmodel.seq_len: lines", "two\nblock_size: lines"),
    ],
)  # fmt: skip
def test_messages_take_the_names_of_a_dialect(native, spoken):
    assert NAMES.spoken(native) == spoken
