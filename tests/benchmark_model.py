"""A small model as our checkpoint and as a folder of transformers, and small benchmarks."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from tiny_run import WORDS, write_config
from transformers_weights import randomize

from ostro.checkpoint import State, find_latest, write
from ostro.cli.main import run_command
from ostro.cli.native import saved_config
from ostro.train_lm import load_model, load_tokenizer

SEQ_LEN = 48


def write_model(folder: Path) -> tuple[Path, Path]:
    """A checkpoint with random weights, and the folder that it is exported to."""
    tokenizer = {"type": "bpe", "vocab_size": 320}
    trainer = {"num_train_steps": 1, "steps_per_eval": None, "id": "bench"}
    model = {"seq_len": SEQ_LEN, "hidden_dim": 32}
    config = write_config(folder, data={"tokenizer": tokenizer}, trainer=trainer, model=model)
    assert run_command(["train", "--config_path", str(config)]) == 0
    saved = find_latest(str(folder / "checkpoints"))
    tokenizer = load_tokenizer(saved)
    ours = load_model(saved, saved_config(saved, None), tokenizer, torch.device("cpu"))
    randomize(ours)
    state = State({"model": ours.state_dict()}, saved.values, saved.texts)
    checkpoint = folder / "experiments" / "bench" / "checkpoints"
    write(str(checkpoint), state, step=0, is_temporary=False)
    words = ["export", "--checkpoint", str(checkpoint), "--to", "hf", "--output"]
    assert run_command([*words, str(folder / "hf")]) == 0
    return checkpoint, folder / "hf"


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choices(WORDS, k=count))


def write_tasks(folder: Path, answer: Callable[[str], str] = str) -> Path:
    """One task for each kind of question that the four benchmarks ask, and rolling text.

    `answer` gives the right one to every third open question.
    """
    draw = random.Random(0)
    piqa = [
        {"goal": words(draw, 4), "sol1": words(draw, 3), "sol2": words(draw, 9), "label": i % 2}
        for i in range(12)
    ]
    boolq = [
        {"passage": words(draw, 3 + 7 * (i % 5)), "question": words(draw, 4), "label": i % 2}
        for i in range(12)
    ]
    lambada = [{"text": words(draw, 4 + 6 * (i % 4))} for i in range(12)]
    trivia = []
    for i in range(12):
        question = words(draw, 2 + 8 * (i % 4))
        right = answer(f"Question: {question}?\nAnswer:") if i % 3 == 0 else words(draw, 1)
        trivia.append({"question": question, "aliases": ["nobody", right]})
    rolling = [{"text": words(draw, 5 + 20 * i)} for i in range(4)]
    _write(folder, "local_piqa", piqa, "multiple_choice", ["acc", "acc_norm"],
           "Question: {{goal}}\nAnswer:", "label", doc_to_choice="{{[sol1, sol2]}}",
           num_fewshot=1)  # fmt: skip
    _write(folder, "local_boolq", boolq, "multiple_choice", ["acc"],
           "{{passage}}\nQuestion: {{question}}?\nAnswer:", "label",
           doc_to_choice=["no", "yes"])  # fmt: skip
    _write(folder, "local_lambada", lambada, "loglikelihood", ["perplexity", "acc"],
           "{{text.split(' ')[:-1]|join(' ')}}", "{{' '+text.split(' ')[-1]}}")  # fmt: skip
    until = {"until": ["\n", ".", ","], "do_sample": False, "max_gen_toks": 8}
    _write(folder, "local_triviaqa", trivia, "generate_until", ["exact_match"],
           "Question: {{question}}?\nAnswer:", "{{aliases}}",
           generation_kwargs=until)  # fmt: skip
    _write(folder, "local_text", rolling, "loglikelihood_rolling",
           ["word_perplexity", "byte_perplexity", "bits_per_byte"], "", "{{text}}")  # fmt: skip
    lost = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(folder / "lost.jsonl")}}
    _write(folder, "local_lost", [], "loglikelihood", ["acc"], "{{text}}", "{{text}}", **lost)
    group = {"group": "local_group", "task": ["local_boolq", "local_lambada"]}
    (folder / "local_group.yaml").write_text(yaml.safe_dump(group))
    return folder


def _write(folder, name, records, output_type, metrics, text, target, **more) -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": output_type,
        "doc_to_text": text,
        "doc_to_target": target,
        "metric_list": [{"metric": metric} for metric in metrics],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | more))


SUPERGLUE = {
    "boolq": {"passage": "the dog", "question": "is it old", "label": 1},
    "cb": {"premise": "the dog", "hypothesis": "a fox", "label": 2},
    "copa": {
        "premise": "The dog jumps.",
        "question": "cause",
        "choice1": "The fox mixes.",
        "choice2": "It knows.",
        "label": 1,
    },
    "multirc": {"paragraph": "the dog", "question": "who", "answer": "a fox", "label": 0},
    "record": {
        "passage": "the dog\n@highlight\nfox",
        "query": "a @placeholder jumps",
        "entities": ["dog", "lazy fox", "fox"],
        "answers": ["fox"],
    },
    "rte": {"premise": "the dog", "hypothesis": "a fox", "label": 0},
    "wic": {
        "sentence1": "the dog",
        "sentence2": "a dog",
        "start1": 4,
        "end1": 7,
        "start2": 2,
        "end2": 5,
        "label": 1,
    },
    "wsc": {
        "text": "The dog said it jumps",
        "span1_text": "The dog",
        "span2_text": "it",
        "span2_index": 3,
        "label": 1,
    },
}


def write_copies(folder: Path) -> Path:
    """The harness's own descriptions of the four benchmarks with data of our own."""
    _copy(folder, "piqa", "piqa/piqa", {"goal": "a", "sol1": "fox", "sol2": "dog", "label": 0})
    answers = {"question": "who", "answer": {"aliases": ["dog", "a dog"]}}
    settings = {"until": ["\n", ".", ","], "do_sample": False, "max_gen_toks": 8}
    _copy(folder, "triviaqa", "triviaqa/default", answers, generation_kwargs=settings)
    for name in ("lambada_openai", "lambada_standard"):
        _copy(folder, name, f"lambada/{name}", {"text": "the quick brown fox"})
    for name, record in SUPERGLUE.items():
        task = "sglue_rte" if name == "rte" else name
        _copy(folder, task, f"super_glue/{name}/default", record)
    return folder


def _copy(folder: Path, task: str, description: str, record: dict, **more) -> None:
    import lm_eval

    data = folder / f"{task}.jsonl"
    data.write_text((json.dumps(record) + "\n") * 2)
    copy = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / f"{description}.yaml"),
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {part: str(data) for part in ("train", "validation", "test")}
        },
    }
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(copy | more))
