"""Models go to transformers and come back: equal logits, equal bits, and what cannot go is said."""

import json
import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from tiny_run import ostro, read_metrics, write_config
from transformers_weights import assert_close, randomize

from ostro.checkpoint import find_latest
from ostro.cli.arguments import load_run
from ostro.cli.main import run_command
from ostro.config import check
from ostro.core.errors import CheckpointError, ConfigError
from ostro.data.tokenizer import tokenizer_from_text
from ostro.data.tokenizer_config import BpeTokenizer, PretrainedTokenizer
from ostro.kernels import decoder
from ostro.models import Gpt2Config, LlamaConfig
from ostro.models.hf import (
    from_hf,
    gpt2_parameters,
    hf_config,
    lm_config,
    read_hf,
    read_weights,
    to_hf,
    write_hf,
)
from ostro.nn import ACTIVATIONS
from ostro.nn.rotary import (
    DefaultRotaryConfig,
    LinearRotaryConfig,
    Llama3RotaryConfig,
    YarnRotaryConfig,
)

VOCAB = 97
GPT2 = Gpt2Config(seq_len=64, hidden_dim=48, num_layers=3, num_heads=4)
LLAMA = LlamaConfig(
    seq_len=128, hidden_dim=48, intermediate_dim=80, num_layers=2, num_heads=4, num_kv_heads=2
)
MODELS = {
    "gpt2": GPT2,
    "gpt2 without biases": replace(GPT2, use_bias=False),
    "gpt2 otherwise": replace(
        GPT2,
        mlp_scale=3,
        layer_norm_epsilon=1e-3,
        activation_function="relu",
        scale_attn_by_inverse_layer_idx=True,
        upcast_attn=True,
        embed_pdrop=0.1,
        resid_pdrop=0.2,
        attn_pdrop=0.3,
    ),
    "llama": LLAMA,
    "llama with biases": replace(LLAMA, use_bias=True, num_kv_heads=4, activation_function="gelu"),
    "llama tied": replace(LLAMA, tie_word_embeddings=True, num_kv_heads=1, layer_norm_epsilon=1e-3),
    "wide heads": replace(LLAMA, head_dim=20, rope=DefaultRotaryConfig(theta=500.0)),
    "divided": replace(LLAMA, rope=DefaultRotaryConfig(factor=2.0)),
    "linear": replace(LLAMA, rope=LinearRotaryConfig(factor=4.0)),
    "llama3": replace(LLAMA, rope=Llama3RotaryConfig(original_max_position_embeddings=32)),
    "yarn": replace(
        LLAMA,
        rope=YarnRotaryConfig(
            factor=4.0, original_max_position_embeddings=32, beta_fast=16.0, attention_factor=1.2
        ),
    ),
}


def model_of(config, seed=0):
    model = config.build(VOCAB).eval()
    randomize(model, seed)
    return model


def weights_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def tokens_for(config):
    return torch.randint(VOCAB, (2, config.seq_len), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_what_is_written_and_the_round_trip_is_exact(tmp_path, name):
    from transformers import AutoModelForCausalLM

    config = MODELS[name]
    ours = model_of(config)
    folder = tmp_path / "out"
    write_hf(str(folder), config, weights_of(ours), None, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    theirs, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert theirs.config.eos_token_id == 7
    tokens = tokens_for(config)
    with torch.no_grad():
        logits = ours(tokens)
        assert logits.abs().max() > 3  # far from a flat softmax
        assert_close(logits, theirs.eval()(tokens).logits, 1e-5, "logits")

    described, tensors = read_hf(str(folder))
    back = from_hf(config, tensors)
    assert back.keys() == weights_of(ours).keys()
    assert all(torch.equal(back[key], value) for key, value in weights_of(ours).items())
    expected = replace(config, gradient_checkpointing=True)
    if isinstance(config, Gpt2Config):
        expected = replace(expected, use_bias=True)
    else:
        expected = replace(expected, head_dim=config.head_size, upcast_attn=False)
    if name == "divided":
        expected = replace(expected, rope=LinearRotaryConfig(factor=2.0))
    assert lm_config(described) == (expected, VOCAB)


def transformers_model(family, **changes):
    from transformers import AutoModelForCausalLM
    from transformers import GPT2Config as Gpt2
    from transformers import LlamaConfig as Llama

    if family == "gpt2":
        theirs = Gpt2(n_positions=64, n_embd=48, n_layer=3, n_head=4, vocab_size=VOCAB,
                      bos_token_id=None, eos_token_id=None, **changes)  # fmt: skip
    else:
        theirs = Llama(max_position_embeddings=128, hidden_size=48, intermediate_size=80,
                       num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                       vocab_size=VOCAB, **changes)  # fmt: skip
    model = AutoModelForCausalLM.from_config(theirs).eval()
    randomize(model)
    return model


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {}),
        ("gpt2", {"n_inner": 96, "activation_function": "gelu", "layer_norm_epsilon": 1e-3}),
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 20, "rope_parameters": LLAMA3}),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 9000.0}},
        ),
    ],
)
@pytest.mark.parametrize("shards", [False, True])
def test_what_transformers_writes_is_read(tmp_path, family, changes, shards):
    theirs = transformers_model(family, **changes)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == shards
    described, tensors = read_hf(str(tmp_path))
    config, vocab_size = lm_config(described)
    ours = config.build(vocab_size).eval()
    ours.load_state_dict(from_hf(config, tensors))
    tokens = tokens_for(config)
    with torch.no_grad():
        assert_close(ours(tokens), theirs(tokens).logits, 1e-5, "logits")


def test_rope_of_transformers_4():
    old = {
        "model_type": "llama",
        "rope_theta": 500.0,
        "rope_scaling": {"type": "linear", "factor": 2},
    }
    assert lm_config(old)[0].rope == LinearRotaryConfig(theta=500.0, factor=2)
    old["rope_scaling"] = {"type": "yarn", "factor": 2}  # was first trained at the whole length
    rope = lm_config(old | {"max_position_embeddings": 64})[0].rope
    assert rope == YarnRotaryConfig(theta=500.0, factor=2, original_max_position_embeddings=64)


def test_other_spellings_of_the_names_and_saved_constants(tmp_path):
    tensors = to_hf(GPT2, weights_of(model_of(GPT2)))
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)
    bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    bare["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    assert from_hf(GPT2, bare).keys() == weights_of(model_of(GPT2)).keys()
    untied = bare | {"lm_head.weight": bare["wte.weight"] + 1}
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not transformer\.wte\.weight"):
        from_hf(GPT2, untied)
    llama = to_hf(LLAMA, weights_of(model_of(LLAMA)))
    bare = {name.removeprefix("model."): tensor for name, tensor in llama.items()}
    bare["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    assert from_hf(LLAMA, bare).keys() == weights_of(model_of(LLAMA)).keys()


def test_rows_of_qkv_move_without_the_transpose():
    """As files need it that keep linear weights as we do, and moments of an optimizer."""
    (qkv,) = [p for p in gpt2_parameters(GPT2) if p.ours == "blocks.1.attention.qkv.weight"]
    assert qkv.conv1d and qkv.theirs == ("transformer.h.1.attn.c_attn.weight",)
    ours = torch.arange(144.0)[:, None].expand(144, 48)
    (theirs,) = qkv.export(ours)
    # The key of head 2 begins at row (2, 1, 0) of ours, at (1, 2, 0) of theirs.
    assert theirs[48 + 2 * 12, 0] == (2 * 3 + 1) * 12
    assert torch.equal(qkv.load(theirs), ours)


def test_biases_without_a_place():
    config = replace(GPT2, use_bias=False)
    tensors = to_hf(config, weights_of(model_of(config)))
    assert not tensors["transformer.ln_f.bias"].any()
    tensors["transformer.ln_f.bias"][3] = 0.5
    with pytest.raises(CheckpointError, match=r"transformer\.ln_f\.bias is not zero"):
        from_hf(config, tensors)


def test_missing_unknown_and_misshapen_tensors_are_all_listed():
    tensors = to_hf(GPT2, weights_of(model_of(GPT2)))
    tensors["transformer.more"] = tensors.pop("transformer.ln_f.weight")
    with pytest.raises(CheckpointError) as error:
        from_hf(GPT2, tensors)
    assert "transformer.ln_f.weight is missing" in str(error.value)
    assert "transformer.more is unknown here" in str(error.value)
    with pytest.raises(CheckpointError, match=r"c_fc.weight has shape \(48, 192\), .*\(48, 96\)"):
        from_hf(replace(GPT2, mlp_scale=2), to_hf(GPT2, weights_of(model_of(GPT2))))
    with pytest.raises(CheckpointError, match=r"attention.out.bias is missing; .* and \d+ more"):
        to_hf(GPT2, {})


def test_models_that_hugging_face_has_not(tmp_path):
    with pytest.raises(CheckpointError, match="only"):
        to_hf(object(), {})
    odd = replace(LLAMA, hidden_dim=46, head_dim=12)
    with pytest.raises(CheckpointError, match="num_heads = 4 - must divide hidden_dim = 46"):
        hf_config(odd, VOCAB, None)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model_type": "mistral"}, 'model_type = "mistral"'),
        ({"scale_attn_weights": False}, "scale_attn_weights = false"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"n_inner": 100}, "n_inner = 100"),
        ({"activation_function": "mish"}, "activation_function = mish"),
        ({"n_head": 5}, "num_heads = 5"),
        ({"n_embd": "wide"}, "describes no model"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_gpt2_configurations_we_cannot_follow(change, names):
    with pytest.raises(CheckpointError) as error:
        lm_config(hf_config(GPT2, VOCAB, None) | change)
    assert names in str(error.value)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"mlp_bias": True}, "mlp_bias = true"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1"),
        ({"rope_scaling": {"rope_type": "longrope"}}, 'rope_type = "longrope"'),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale = 0.7"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "_freq_factor = null"),
    ],
)
def test_llama_configurations_we_cannot_follow(change, names):
    with pytest.raises(CheckpointError) as error:
        lm_config(hf_config(LLAMA, VOCAB, None) | change)
    assert names in str(error.value)


def written(folder, config=GPT2):
    write_hf(str(folder), config, weights_of(model_of(config)), None, None)
    return folder


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(CheckpointError, match="is there already"):
        written(tmp_path)
    with pytest.raises(CheckpointError, match="is there already"):
        written(tmp_path / "note")
    with pytest.raises(CheckpointError, match="cannot be written"):
        written(tmp_path / "note" / "below")
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
    (tmp_path / "empty").mkdir()
    assert (written(tmp_path / "empty") / "config.json").exists()


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_weights_are_read_as_plain_weights_or_not_at_all(tmp_path):
    folder = written(tmp_path / "out")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        read_hf(str(folder))
    torch.save(weights, folder / "pytorch_model.bin")
    assert read_hf(str(folder))[1].keys() == weights.keys()
    for bad in ({"a": Trap(tmp_path / "sprung")}, {"a": 1}, [1]):
        torch.save(bad, folder / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin - "):
            read_hf(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin - "):
        read_hf(str(folder))
    assert not (tmp_path / "sprung").exists()


def test_damaged_folders(tmp_path):
    folder = written(tmp_path / "out")
    (folder / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        read_hf(str(folder))
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    for bad in ({}, {"weight_map": {"a": "../../else"}}):
        index.write_text(json.dumps(bad))
        with pytest.raises(CheckpointError, match="weight_map"):
            read_hf(str(folder))
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        read_hf(str(folder))
    save_file({"a": torch.ones(1)}, folder / "x.safetensors")
    with pytest.raises(CheckpointError, match="b is missing"):
        read_hf(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json - cannot be read"):
        read_hf(str(folder))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache of the hub, without network; it holds acme/tiny."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--acme--tiny"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    for branch, seed in (("main", 0), ("second", 1)):
        (repository / "refs" / branch).write_text(str(seed) * 40)
        weights = weights_of(model_of(GPT2, seed))
        write_hf(str(repository / "snapshots" / (str(seed) * 40)), GPT2, weights, None, None)


def test_the_hub_and_its_revisions(hub):
    main, second = (read_weights(f"acme/tiny{at}", GPT2, VOCAB) for at in ("", "@second"))
    for found, seed in ((main, 0), (second, 1)):
        expected = weights_of(model_of(GPT2, seed))
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    for wrong in ("acme/other", "acme/tiny@third", "./nowhere"):
        with pytest.raises(CheckpointError, match=r"initialize_from_hf = .* give a local folder"):
            read_weights(wrong, GPT2, VOCAB)


def test_settings_that_differ_are_refused_and_a_stretched_rope_is_told(tmp_path, caplog):
    folder = str(written(tmp_path / "gpt2"))
    read_weights(folder, replace(GPT2, resid_pdrop=0.3), VOCAB)
    with pytest.raises(CheckpointError, match=r"model\.num_heads = 2, there it is 4"):
        read_weights(folder, replace(GPT2, num_heads=2), VOCAB)
    with pytest.raises(CheckpointError, match="it has 97 tokens, this run 257"):
        read_weights(folder, GPT2, 257)
    with pytest.raises(CheckpointError, match="it is a Gpt2Config"):
        read_weights(folder, LLAMA, VOCAB)
    folder = str(written(tmp_path / "llama", LLAMA))
    with caplog.at_level(logging.WARNING):
        read_weights(folder, LLAMA, VOCAB)
        assert not caplog.messages
        read_weights(folder, replace(LLAMA, rope=LinearRotaryConfig(factor=2.0)), VOCAB)
    assert "model.rope" in caplog.text


def test_the_tokenizer_goes_along(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = BpeTokenizer(vocab_size=300).learn([lambda: iter(["some words and some more"])])
    weights = weights_of(model_of(GPT2))
    write_hf(str(tmp_path / "a"), GPT2, weights, tokenizer.to_text(), tokenizer.eos_id)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert theirs("some more").input_ids == tokenizer.encode_prompt("some more")
    assert theirs.eos_token_id == tokenizer.eos_id
    write_hf(str(tmp_path / "b"), GPT2, weights, '{"type": "bytes"}', 256)
    assert not (tmp_path / "b" / "tokenizer.json").exists()


TINY = replace(GPT2, seq_len=16, hidden_dim=16, num_layers=2, num_heads=2)


def test_training_starts_from_transformers_weights(tmp_path, capsys):
    """The first evaluation, before a learning rate of zero could change anything, is theirs."""
    from transformers import AutoModelForCausalLM

    ours = TINY.build(257)
    randomize(ours)
    write_hf(str(tmp_path / "theirs"), TINY, weights_of(ours), None, None)
    path = write_config(tmp_path, initialize_from_hf=str(tmp_path / "theirs"))
    assert run_command(["train", "--config_path", str(path)]) == 0
    assert f"starting from the weights of {tmp_path}/theirs" in capsys.readouterr().out

    config = load_run(str(path), []).config
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    data = config.data.build(config.data.build_tokenizer(), 16, 0)
    losses = []
    for tested in data.validation.values():
        for batch in tested.batches(config.trainer.batch_plan(1).eval_batch_size, 2):
            with torch.no_grad():
                logits = theirs(batch.tokens).logits
            losses += F.cross_entropy(logits.mT, batch.targets, reduction="none").flatten().tolist()
    expected = sum(losses) / len(losses)
    assert read_metrics(tmp_path, "eval/loss")[0] == pytest.approx(expected, abs=1e-5)

    # The run's own checkpoint comes first, and needs the model no more.
    (tmp_path / "theirs").rename(tmp_path / "away")
    words = ["train", "--config_path", str(path), "--trainer.num_train_steps", "7"]
    assert run_command(words) == 0
    assert "resuming from" in capsys.readouterr().out


def test_the_model_section_can_be_taken_from_it(tmp_path, capsys):
    config = replace(LLAMA, seq_len=16, layer_norm_epsilon=1e-3)
    model = config.build(257)
    randomize(model)
    write_hf(str(tmp_path / "theirs"), config, weights_of(model), None, None)
    source = {"initialize_from_hf": str(tmp_path / "theirs"), "use_hf_model_config": True}
    path = write_config(tmp_path, **source)
    assert run_command(["train", "--config_path", str(path), "--dry_run"]) == 0
    assert "num_kv_heads: 2" in capsys.readouterr().out
    assert run_command(["train", "--config_path", str(path)]) == 0
    saved = find_latest(str(tmp_path / "checkpoints"))
    kept = yaml.safe_load(saved.texts["config.yaml"])
    assert kept["model"]["type"] == "llama" and kept["model"]["layer_norm_epsilon"] == 1e-3
    assert kept["model"]["gradient_checkpointing"] is False  # as in the configuration
    assert kept["use_hf_model_config"] is False  # so that resuming does not ask for it again


def test_settings_that_exclude_each_other(tmp_path, capsys):
    path = write_config(tmp_path)
    config = load_run(str(path), []).config
    both = replace(config.trainer, initialize_from="somewhere")
    with pytest.raises(ConfigError, match=r"initialize_from_hf = x .*initialize_from is set too"):
        check(replace(config, trainer=both, initialize_from_hf="x"))
    with pytest.raises(ConfigError, match="needs initialize_from_hf"):
        check(replace(config, use_hf_model_config=True))
    words = ["train", "--config_path", str(path), "--initialize_from_hf", str(tmp_path)]
    assert run_command(words) == 2
    assert "config.json - cannot be read" in capsys.readouterr().err


@pytest.mark.cli
def test_export_from_the_command_line(tmp_path):
    from transformers import AutoModelForCausalLM

    path = write_config(tmp_path, trainer={"num_train_steps": 2, "steps_per_eval": None})
    assert run_command(["train", "--config_path", str(path)]) == 0
    words = ["export", "--checkpoint", tmp_path / "checkpoints", "--to", "hf", "--output"]
    done = ostro(*words, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert f"AutoModelForCausalLM.from_pretrained('{tmp_path}/out')" in done.stdout
    assert "without its tokenizer" in done.stdout
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.eos_token_id == 256
    ours = TINY.build(257)
    ours.load_state_dict(find_latest(str(tmp_path / "checkpoints")).tensors("model"))
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        assert_close(ours(tokens), theirs(tokens).logits, 1e-5, "logits")
    again = ostro(*words, tmp_path / "out")
    assert again.returncode == 2 and "is there already" in again.stderr
    typo = ostro(*words, tmp_path / "new", "--quantize")
    assert typo.returncode == 2 and "unknown option --quantize" in typo.stderr
    told = ostro("export", "--help")
    assert told.returncode == 0 and "--output DIR" in told.stdout
    assert "--trainer" not in told.stdout


def write_tokenizer(folder):
    """A tokenizer with a beginning, an end, padding, a chat template and a token of its own."""
    from tokenizers import AddedToken, processors

    inner = BpeTokenizer(vocab_size=280).learn([lambda: iter(["the cat sat on a mat"])]).inner
    inner.add_special_tokens(["<s>", "</s>", "<pad>", "<|turn|>"])
    inner.add_tokens([AddedToken("zebra", single_word=True, normalized=False)])
    begin = ("<s>", inner.token_to_id("<s>"))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    folder.mkdir()
    inner.save(str(folder / "tokenizer.json"))
    files = {
        "tokenizer_config": {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": {"__type": "AddedToken", "content": "<s>"},
            "add_bos_token": True,
            "pad_token": "<pad>",
            "unk_token": None,
            "chat_template": "{{ messages[0].content }}<|turn|>",
        },
        "special_tokens_map": {"eos_token": {"content": "</s>", "lstrip": False}},
        "generation_config": {"eos_token_id": [inner.token_to_id("</s>"), 7], "top_p": 0.5},
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return PretrainedTokenizer(str(folder)).build()


def test_names_and_ids_of_tokens_come_back(tmp_path):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    source = write_tokenizer(tmp_path / "source")
    saved = tokenizer_from_text(source.to_text(), source.eos_id, "a checkpoint")
    assert saved.fingerprint == source.fingerprint
    folder = tmp_path / "out"
    write_hf(str(folder), GPT2, weights_of(model_of(GPT2)), saved.to_text(), saved.eos_id)
    theirs = AutoTokenizer.from_pretrained(folder)
    names = (theirs.bos_token, theirs.eos_token, theirs.pad_token, theirs.unk_token)
    assert names == ("<s>", "</s>", "<pad>", None)
    assert theirs.chat_template == "{{ messages[0].content }}<|turn|>"
    assert theirs.tokenize("zebra zebras") == ["zebra", *theirs.tokenize(" zebras")]
    text = "the cat <|turn|> zebra"
    assert theirs(text).input_ids == source.encode_prompt(text)
    ids = [source.inner.token_to_id(name) for name in ("<s>", "</s>", "<pad>")]
    config = AutoConfig.from_pretrained(folder)
    assert [config.bos_token_id, config.eos_token_id, config.pad_token_id] == ids
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == [ids[1], 7] and generation.pad_token_id == ids[2]
    again = PretrainedTokenizer(str(folder)).build()
    assert (again.eos_id, again.fingerprint) == (source.eos_id, source.fingerprint)


def test_without_files_of_its_own_the_template_names_the_beginning(tmp_path):
    source = write_tokenizer(tmp_path / "source")
    weights = weights_of(model_of(GPT2))
    text = source.inner.to_str()
    write_hf(str(tmp_path / "a"), GPT2, weights, text, source.eos_id)
    config = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")
    plain = BpeTokenizer(vocab_size=280).learn([lambda: iter(["the cat"])])
    write_hf(str(tmp_path / "b"), GPT2, weights, plain.to_text(), plain.eos_id)
    config = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert config["bos_token"] == config["eos_token"] == "<|endoftext|>"


@pytest.mark.parametrize("config", [GPT2, MODELS["llama tied"]], ids=["gpt2", "llama"])
@pytest.mark.parametrize("prefixed", [True, False])
def test_tied_weights_under_either_name(config, prefixed):
    weights = weights_of(model_of(config))
    theirs = to_hf(config, weights)
    name = next(name for name in theirs if name.endswith(("wte.weight", "embed_tokens.weight")))
    if not prefixed:
        theirs = {key.partition(".")[2]: value for key, value in theirs.items()}
        name = name.partition(".")[2]
    head_only = {key: value for key, value in theirs.items() if key != name}
    head_only["lm_head.weight"] = theirs[name]
    for each in (theirs, head_only, {**theirs, "lm_head.weight": theirs[name]}):
        found = from_hf(config, each)
        assert all(torch.equal(found[key], weights[key]) for key in weights)
    untied = replace(LLAMA, tie_word_embeddings=False)
    lost = {**to_hf(untied, weights_of(model_of(untied)))}
    del lost["model.embed_tokens.weight"]
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight is missing"):
        from_hf(untied, lost)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("pattern", ["weights_{}.part", "a/b-{}.part", "model {}+x.bin"])
def test_an_index_may_name_any_files(tmp_path, pickled, pattern):
    weights = {name: t.contiguous() for name, t in to_hf(GPT2, weights_of(model_of(GPT2))).items()}
    (tmp_path / "config.json").write_text(json.dumps(hf_config(GPT2, VOCAB, None)))
    where = {name: pattern.format(number % 3) for number, name in enumerate(weights)}
    for file in set(where.values()):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        part = {name: weights[name] for name in weights if where[name] == file}
        torch.save(part, tmp_path / file) if pickled else save_file(part, tmp_path / file)
    name = "pytorch_model.bin.index.json" if pickled else "model.safetensors.index.json"
    (tmp_path / name).write_text(json.dumps({"weight_map": where}))
    _, found = read_hf(str(tmp_path))
    assert all(torch.equal(found[key], weights[key]) for key in weights)
    for outside in ("../x.safetensors", "/x", "a/../../x", ".hidden", ""):
        (tmp_path / name).write_text(json.dumps({"weight_map": {"a": outside}}))
        with pytest.raises(CheckpointError, match="no weight_map"):
            read_hf(str(tmp_path))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers_by_name(name):
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 301)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), atol=2e-6, rtol=1e-5)
    assert name in decoder.ACTIVATIONS
    ours = replace(GPT2, activation_function=name)
    config, _ = lm_config(hf_config(ours, VOCAB, None))
    assert config.activation_function == name


def test_two_names_of_one_activation_are_no_difference(tmp_path):
    ours = replace(GPT2, activation_function="gelu_pytorch_tanh")
    folder = str(written(tmp_path / "gpt2", ours))
    read_weights(folder, GPT2, VOCAB)
    with pytest.raises(CheckpointError, match="activation_function = gelu, there it is gelu_py"):
        read_weights(folder, replace(GPT2, activation_function="gelu"), VOCAB)
