"""`ostro why`: the documents of a batch, and the loss of each."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from ostro.checkpoint import Saved, SavedFile, entries, find_latest
from ostro.cli.arguments import Parser, load_run
from ostro.cli.native import DATA, open_checkpoint, saved_config
from ostro.core.errors import ConfigError
from ostro.data.text import LMData
from ostro.distributed import pick_device
from ostro.inspect.why import explain, logged_loss
from ostro.lm_config import TrainLmConfig
from ostro.runtime.signals import Signals
from ostro.tracker import run_folder
from ostro.train_lm import build_data, load_model, load_tokenizer


def why(argv: list[str], signals: Signals) -> None:
    """`ostro why`: the documents of a batch, and the loss of each."""
    about = "Name the documents of an update's batch, with the loss of each from a checkpoint."
    parser = Parser("why", about)
    parser.add_argument("--step", type=int, required=True, metavar="N", help="which update, from 0")
    parser.add_config_path(required=False)
    about = "in place of the file: the folder of a run's checkpoints, or the one to compute with"
    parser.add_argument("--checkpoint", metavar="PATH", help=about)
    parser.add_imports()
    parser.add_count("top", "show so many only", metavar="K")
    parser.add_argument("--sort", choices=["loss", "example"], default="loss", help="default: loss")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options, flags = parser.parse(argv)
    if options.config_path is None and options.checkpoint is None:
        raise ConfigError("ostro why - needs a run - give --config_path FILE or --checkpoint PATH")
    given = None if options.checkpoint is None else open_checkpoint(options.checkpoint)
    if options.config_path is not None:
        config = load_run(options.config_path, flags, trust=options.trust).config
    else:
        assert given is not None, "one of the two is there"
        config = saved_config(given, options, flags, DATA)
    run_id = _run_id(config, given)
    saved, place = _weights(config, given, options.checkpoint, run_id, options.step)
    source = saved or given
    tokenizer = load_tokenizer(source) if source else config.data.build_tokenizer(must_exist=True)
    data = build_data(config, tokenizer, must_exist=True)
    device = pick_device(config.trainer.device)
    model = None if saved is None else load_model(saved, config, tokenizer, device)
    found = explain(config, data, tokenizer, options.step, model)
    documents = found.documents
    if options.sort == "loss":
        documents = sorted(documents, key=lambda document: document.rank)
    documents = documents[: options.top]
    folder = None if run_id is None else run_folder(config.trainer.log_dir, run_id)
    logged = None if folder is None else logged_loss(folder / "metrics.jsonl", options.step)
    notes = [*_about(saved, place, data, options.step), *found.notes]
    if options.json:
        weights = saved and {"checkpoint": str(saved), "step": saved.step}
        whole = {**asdict(found), "documents": [asdict(document) for document in documents]}
        print(json.dumps({**whole, "notes": notes, "weights": weights, "logged_loss": logged}))
        return
    print(f"step {found.step}: {found.batch_size} examples of {found.seq_len} tokens")
    for note in notes:
        print(note)
    means = {"mean loss here": found.mean_loss, "logged by the run": logged}
    shown = [f"{name}: {loss:.6f}" for name, loss in means.items() if loss is not None]
    print("; ".join(shown), end="\n" if shown else "")
    for line in found.lines(documents):
        print(line)


def _run_id(config: TrainLmConfig, given: Saved | SavedFile | None) -> str | None:
    """The id of the run, where it does not have to be drawn."""
    of_checkpoint = None if given is None else given.values.get("run_id")
    return of_checkpoint or config.trainer.id or os.environ.get("RUN_ID")


def _weights(
    config: TrainLmConfig,
    given: Saved | SavedFile | None,
    path: str | None,
    run_id: str | None,
    step: int,
) -> tuple[Saved | SavedFile | None, str]:
    """The checkpoint named, or the last one of the run before `step`; and where it was sought."""
    if given is not None and path is not None:
        local = Path(path).expanduser()
        if local.is_file() or str(given).rstrip("/") == path.rstrip("/"):
            return given, path
        place = str(given).rpartition("/")[0] or "."
    elif run_id is not None:
        place = config.trainer.checkpointer.folder(run_id)
    else:
        return None, "a run without trainer.id"
    own = [entry for entry in entries(place) if (entry.run_id or run_id) == run_id]
    earlier = (find_latest(entry.path, weights=True) for entry in own if entry.step < step)
    return next((saved for saved in earlier if saved is not None), None), place


def _about(saved: Saved | SavedFile | None, place: str, data: LMData, step: int) -> list[str]:
    """Which weights the losses are of, and what is wrong with them."""
    if saved is None:
        where = f"no checkpoint from before this update in {place}"
        return [f"no losses: {where}; --checkpoint takes any"]
    when = "those that this update began with"
    if saved.step < step - 1:
        when = f"this update began with those after update {step - 1}"
    elif saved.step >= step:
        when = "they have been trained on this batch already"
    notes = [f"losses of the weights after update {saved.step}: {when} ({saved})"]
    if saved.values.get("data", data.fingerprint) != data.fingerprint:
        notes.append(
            "warning: that checkpoint was trained on other data, or in another order: the batch"
            " below follows from the configuration, and need not be what that run saw"
        )
    return notes
