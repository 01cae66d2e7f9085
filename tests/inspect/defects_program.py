"""A program for tests: `verify-resume` of a configuration, with one defect planted in resuming.

`python defects_program.py CONFIG FOLDER` tries each defect in a process of its own.
"""

import dataclasses
import os
import sys
from pathlib import Path

import torch

from ostro import train_lm
from ostro.cli.arguments import load_run
from ostro.inspect.verify_resume import NotExactError, Plan, verify_resume
from ostro.optim import LossScaler
from ostro.trainer import TrainState

load = TrainState.load


def after_loading(spoil):
    def spoiled(state, saved):
        load(state, saved)
        spoil(state)

    TrainState.load = spoiled


def random_state(state):
    torch.manual_seed(0)


def position(state):
    state.step += 1


def moments(state):
    for values in state.optimizer.state.values():
        values["exp_avg"].zero_()


def scaler(state):
    state.loss_scaler = LossScaler(state.device)


def skip_window(state):
    state.skip_step.count.zero_()


def stale_config():
    build, find = train_lm.build_trainer, train_lm.resume_source

    def stale(config, *rest):
        if any(Path(config.trainer.checkpointer.folder("doctor")).glob("step-*")):
            optimizer = dataclasses.replace(config.optimizer, learning_rate=0.5)
            config = dataclasses.replace(config, optimizer=optimizer)
        return build(config, *rest)

    assert find is not None
    train_lm.build_trainer = stale


DEFECTS = {
    "none": lambda: None,
    "dropped random state": lambda: after_loading(random_state),
    "position off by one": lambda: after_loading(position),
    "lost moments": lambda: after_loading(moments),
    "lost scaler": lambda: after_loading(scaler),
    "cleared skip window": lambda: after_loading(skip_window),
    "stale config": stale_config,
}


def main(path, folder):
    config = load_run(path, []).config
    for index, (name, plant) in enumerate(DEFECTS.items()):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            plant()
            said = "found nothing"
            try:
                verify_resume(config, Plan(4), Path(folder) / str(index), lambda line: None)
            except NotExactError as error:
                said = str(error)
            os.write(1, f"{name}: {said}\n".encode())
            os._exit(0)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
