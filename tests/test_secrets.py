"""Credentials: found in text, and nowhere in what a run prints and leaves."""

import logging

import pytest
from tiny_run import ostro, write_config

from ostro.config import check, dump_yaml, load
from ostro.data.store import CacheDir
from ostro.errors import ConfigError, DataError
from ostro.lm_config import TrainLmConfig
from ostro.run_log import logging_to
from ostro.secrets import REDACTED, redact, redacted, with_secrets

SECRET = "pl4nted/s3cret+value"


@pytest.mark.parametrize(
    "text",
    [
        f"s3://AKIAIOSFODNN7EXAMPLE:{SECRET}@bucket/x",
        f"https://user:{SECRET}@host:80/x?a=b",
        "https://user:p@ss-pl4nted@host/x",
        f"https://{SECRET[:7]}@host/x",
        f"redis://:{SECRET}@host:6379",
        f"https://host/x?token={SECRET}&a=b",
        f"https://host/x?a=b&X-Amz-Signature={SECRET}",
        f"data.urls = ['https://host/x?sig={SECRET}', 'y'] (--data.urls)",
        f"api_key: {SECRET}",
        f"{{'wandb_api_key': '{SECRET}', 'a': 1}}",
        f"--hf_token={SECRET}",
        f"Authorization: Bearer {SECRET}",
        "hf_pl4ntedpl4ntedpl4nted",
    ],
)
def test_a_credential_is_left_out(text):
    assert "pl4nted" not in redact(text)
    assert REDACTED in redact(text)


@pytest.mark.parametrize(
    "text",
    [
        "http://host:8080/a@b",
        "http://localhost:80/x:y@z",
        "hdfs://me@host/x",
        "gs://bucket/a@b",
        "s3://bucket/a?key=",
        "s3://${KEY}:${SECRET}@bucket",
        "https://host/x?token=${TOKEN}",
        "secret: null",
        "tokenizer: bytes, tokens: 5",
        "optimizer.weight_decay = 0.1 (config.yaml:3)",
    ],
)
def test_all_else_stays(text):
    assert redact(text) == text


def test_the_value_of_a_secret_variable_is_left_out_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "pl4nted0pl4nted0")
    assert redact("refused pl4nted0pl4nted0") == f"refused {REDACTED}"


def test_all_text_below_the_name_of_a_secret_is_left_out():
    value = {"a": {"password": "x", "tokens": 3, "access_token": ["y", None]}, "secret": "${X}"}
    hidden = {"password": REDACTED, "tokens": 3, "access_token": [REDACTED, None]}
    assert redacted(value) == {"a": hidden, "secret": "${X}"}


def test_a_reference_is_filled_in_for_the_one_who_opens_it(monkeypatch):
    monkeypatch.setenv("NAME", "me")
    assert with_secrets("ftp://${NAME}@host/${NAME}") == "ftp://me@host/me"
    assert with_secrets("/local/${OTHER}") == "/local/${OTHER}"
    with pytest.raises(DataError, match="OTHER is not set"):
        CacheDir("memory://${OTHER}/x")
    with pytest.raises(DataError, match="give the URL again"):
        CacheDir(f"memory://{REDACTED}@x")


def test_the_log_leaves_credentials_out(tmp_path, capsys):
    log = logging.getLogger("ostro.test")
    with logging_to(tmp_path / "train.log"):
        log.warning("no %s", f"https://u:{SECRET}@host")
        try:
            raise OSError(f"https://u:{SECRET}@host")
        except OSError:
            log.exception("failed")
    text = (tmp_path / "train.log").read_text()
    assert "Traceback" in text and REDACTED in text
    assert SECRET not in text + capsys.readouterr().out


def test_what_was_saved_without_its_credential_has_to_be_given_again(tmp_path):
    path, url = tmp_path / "c.yaml", f"https://u:{SECRET}@host/cache"
    given = load(TrainLmConfig, [], ["--data.source=stdlib", f"--data.cache_dir={url}"])
    path.write_text(dump_yaml(given.config))
    assert SECRET not in path.read_text()
    with pytest.raises(ConfigError, match=r"data\.cache_dir = .* - was saved without"):
        check(load(TrainLmConfig, [str(path)]).config)
    again = load(TrainLmConfig, [str(path)], [f"--data.cache_dir={url}"])
    assert again.config == given.config
    check(again.config)


@pytest.mark.cli
@pytest.mark.parametrize("num_steps", [2, -1], ids=["success", "failure"])
def test_nothing_a_run_prints_or_leaves_holds_a_credential(tmp_path, num_steps, monkeypatch):
    key = "pl4nted0" * 5  # as long as a key of wandb
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trackers = [
        {"type": "json_logger"},
        {"type": "tensorboard", "logdir": str(tmp_path / "tb")},
        {"type": "wandb", "mode": "offline"},
    ]
    config = write_config(
        tmp_path,
        data={"cache_dir": f"memory://user:{SECRET}@host/cache"},
        trainer={"num_train_steps": num_steps, "tracker": trackers},
    )
    done = ostro("train", "--config_path", config, "--debug", cwd=tmp_path)
    assert (done.returncode == 0) == (num_steps > 0), done.stderr
    config.unlink()
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    holds = [
        str(file) for file, data in files.items() if SECRET.encode() in data or key.encode() in data
    ]
    assert holds == []
    assert SECRET not in done.stdout + done.stderr and key not in done.stdout + done.stderr
    if num_steps > 0:
        again = ostro("train", "--config_path", tmp_path / "logs" / "tiny" / "config.yaml")
        assert again.returncode == 2 and "give the whole value as a flag" in again.stderr
        assert "config.yaml:" in again.stderr.partition("data.cache_dir")[2]


@pytest.mark.cli
def test_a_job_script_takes_no_credential(tmp_path):
    config = write_config(tmp_path)
    flags = ["--processes_per_node", 1, f"--data.cache_dir=s3://a:{SECRET}@b"]
    done = ostro("launch", "slurm", "--config_path", config, "--dry_run", *flags)
    assert done.returncode == 2
    assert SECRET not in done.stdout + done.stderr and "would stand in the script" in done.stderr
