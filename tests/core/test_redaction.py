"""Credentials: found in text, and nowhere in what a run prints and leaves."""

import json
import logging
import re
import sys
import threading
import time

import pytest
from tiny_run import ostro, write_config

from ostro.config import check, dump_yaml, load
from ostro.core import redaction
from ostro.core.errors import ConfigError, DataError
from ostro.core.redaction import REDACTED, local_path, redact, redacted, with_secrets
from ostro.data.cache.store import CacheDir
from ostro.lm_config import TrainLmConfig
from ostro.runtime.entry_point import entry_point
from ostro.runtime.run_log import logging_to

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
        "{'Authorization': 'Basic pl4nted'}",
        "Bearer pl4nted.pl4nted",
        "hf_pl4ntedpl4ntedpl4nted",
        "https://host/x?auth=pl4nted",
        "https://host/x?pl4nted",
        "https://host/x#pl4nted",
        "https://host/x?a=1&b=${B}&c=pl4nted",
        "https://u:a?pl4nted@host/x",
        "https://u:pl4nt",  # cut off
        "hdfs://pl4nted@host/x",
        "s3://bucket/x?versionId=pl4nted",
        "zip://a-?.csv::https://u:pl4nted@host/x.zip",
        "http://host/a,http://u:pl4nted@host/b",
        'urls = ["http://u:pl4n\'pl4nted@host/x"]',
        "Max retries exceeded with url: /x?sig=pl4nted (Caused by",
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
        "s3://bucket/part-??.jsonl",
        "s3://bucket/year=20?4/lang=en/*.jsonl",
        "/data/year=20?4/lang=en/*.jsonl",
        "s3://bucket{1..4}/#1.jsonl",
        "s3://arn:aws:s3:us-west-2:123:accesspoint/name/x",
        "tcp://[::1]:29500",
        "https://me:${PASSWORD}@host/x?a=${A}&b=${B}",
        "gs://bucket/a@b",
        "s3://bucket/a?key=",
        "s3://${KEY}:${SECRET}@bucket",
        "https://host/x?token=${TOKEN}",
        "secret: null",
        "SECRETARY: My lord, the standard bearer approached.",
        "hf_tokenizer: gpt2 by hf_tokenizer_name_or_path",
        "sk-learn-based-estimators",
        "tokenizer: bytes, tokens: 5",
        "optimizer.weight_decay = 0.1 (config.yaml:3)",
    ],
)
def test_all_else_stays(text):
    assert redact(text) == text


def test_long_rows_of_dots_take_no_time():
    """A model that has just begun to learn writes such samples."""
    start = time.perf_counter()
    assert redact("." * 8000) == "." * 8000
    assert time.perf_counter() - start < 3  # 20 s where each dot is taken for a beginning


def test_the_value_of_a_secret_variable_is_left_out_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "pl4nted0pl4nted0")
    assert redact("refused pl4nted0pl4nted0") == f"refused {REDACTED}"


def test_all_text_below_the_name_of_a_secret_is_left_out():
    value = {"a": {"password": "x", "tokens": 3, "access_token": ["y", None]}, "secret": "${X}"}
    hidden = {"password": REDACTED, "tokens": 3, "access_token": [REDACTED, None]}
    assert redacted(value) == {"a": hidden, "secret": "${X}"}


def test_the_host_of_a_url_is_shown_whatever_is_in_its_password():
    assert redact("http://u:ab@pl4nted/x@host/x.jsonl") == f"http://{REDACTED}@host/x.jsonl"
    assert redact("https://h/x?a=1&b=${B}") == f"https://h/x?{REDACTED}&b=${{B}}"


@pytest.fixture
def forgetful(monkeypatch):
    """What is filled in meanwhile is forgotten."""
    monkeypatch.setattr(redaction, "_remembered", {})
    monkeypatch.setattr(redaction, "_locations", {})
    return monkeypatch


def test_a_reference_is_filled_in_for_the_one_who_opens_it(forgetful):
    forgetful.setenv("NAME", "me")
    assert with_secrets("ftp://${NAME}@host/${NAME}") == "ftp://me@host/me"
    assert with_secrets("/local/${NAME}/${run_id}") == "/local/me/${run_id}"
    assert local_path("s3://${NAME}@b") == "s3://${NAME}@b"
    with pytest.raises(DataError, match="OTHER is not set"):
        CacheDir("memory://${OTHER}/x")
    with pytest.raises(DataError, match="OTHER is not set"):
        CacheDir("${OTHER}/x")
    with pytest.raises(DataError, match="give the URL again"):
        CacheDir(f"memory://{REDACTED}@x")


def test_what_was_filled_in_is_shown_as_its_name(forgetful):
    forgetful.setenv("PASS", "p@ss/wo rd'1")
    forgetful.setenv("FOLDER", "/data")
    forgetful.setenv("SHORT", "ab")
    for location in ("ftp://u:${PASS}@host/x", "${FOLDER}/cache", "${SHORT}/logs/*.txt"):
        with_secrets(location)
    for spelling in ("p@ss/wo rd'1", "p%40ss%2Fwo%20rd%271", repr("p@ss/wo rd'1")):
        shown = redact(f"login failed for {spelling}")
        assert "${PASS}" in shown and "wo" not in shown
    assert redact("read /data/cache/1, /database") == "read ${FOLDER}/cache/1, /database"
    assert redact("ab/logs/1.txt, about lab/logs") == "${SHORT}/logs/1.txt, about lab/logs"


def test_parts_of_a_literal_url_are_left_out_of_what_its_library_says(forgetful):
    with_secrets("ftp://u:long%20password@host/x?key=another-secret")
    shown = redact("530 Login 'long password' incorrect; another-secret")
    assert shown == f"530 Login '{REDACTED}' incorrect; {REDACTED}"


@pytest.mark.parametrize(
    ("location", "rule"),
    [
        ("${UNSET}/x", "the environment variable UNSET is not set"),
        ("${EMPTY}/x", "the environment variable EMPTY is empty"),
        ("${run_id}/x", None),
        ("${HOME:-x}/x", "${HOME:-x} is no ${NAME}"),
        ("$HOME/x", "$HOME is not filled in"),
        ("s3://b/a$b/$x", None),
    ],
)
def test_what_cannot_be_filled_in_is_an_error_of_its_setting(forgetful, location, rule):
    forgetful.delenv("UNSET", raising=False)
    forgetful.setenv("EMPTY", "")
    for flag in LOCATIONS:
        name, _, value = flag.partition("=")
        given = ["--data.source=stdlib"] if "urls" not in flag and "data.id" not in flag else []
        config = load(TrainLmConfig, [], [*given, f"{name}={value.replace('PATH', location)}"])
        if rule is None:
            check(config.config)
        else:
            with pytest.raises(ConfigError, match=re.escape(f"{location} - {rule}")) as caught:
                check(config.config)
            assert name.lstrip("-").split(".type")[0] in str(caught.value)


LOCATIONS = [
    "--data.cache_dir=PATH",
    '--data.train_urls=["PATH"]',
    "--data.id=PATH",
    "--trainer.log_dir=PATH",
    "--trainer.checkpointer.base_path=PATH",
    "--trainer.load_checkpoint_path=PATH",
    "--trainer.initialize_from=PATH",
    "--initialize_from_hf=PATH",
    '--trainer.tracker={type: tensorboard, logdir: "PATH"}',
    '--data.tokenizer={type: pretrained, name: "PATH"}',
]


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


def test_standard_error_leaves_credentials_out(tmp_path, capsys, monkeypatch):
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    url = f"https://u:{SECRET}@host"

    def fail(*_):
        try:
            raise OSError(url)
        except OSError as error:
            raise RuntimeError("again") from error

    def command(signals):
        print(f"library: {url}", file=sys.stderr)
        thread = threading.Thread(target=fail)
        monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)
        thread.start()
        thread.join()
        raise RuntimeError(url)

    with pytest.raises(RuntimeError):
        entry_point(command)
    said = capsys.readouterr().err
    assert said.count(f"https://{REDACTED}@host") >= 2 and SECRET not in said
    report = json.loads(file.read_text())["message"]
    assert REDACTED in report["message"] and SECRET not in file.read_text()


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
    folder = str(tmp_path / "filled-in")
    monkeypatch.setenv("FOLDER", folder)
    config = write_config(
        tmp_path,
        trainer={
            "num_train_steps": num_steps,
            "tracker": trackers,
            "log_dir": "${FOLDER}/logs",
            "checkpointer": {"base_path": "${FOLDER}/checkpoints"},
        },
    )
    flag = f"--data.cache_dir=memory://user:{SECRET}@host/cache"
    done = ostro("train", "--config_path", config, "--debug", flag, cwd=tmp_path)
    assert (done.returncode == 0) == (num_steps > 0), done.stderr
    config.unlink()
    files = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    files["printed"] = f"{done.stdout}{done.stderr}".encode()
    holds = [
        (str(file), hidden)
        for file, data in files.items()
        for hidden in (SECRET, key, folder)
        if hidden.encode() in data
    ]
    assert holds == []
    if num_steps > 0:
        saved = tmp_path / "filled-in" / "logs" / "tiny" / "config.yaml"
        again = ostro("train", "--config_path", saved)
        assert again.returncode == 2 and "give the whole value as a flag" in again.stderr
        assert "config.yaml:" in again.stderr.partition("data.cache_dir")[2]
        again = ostro("train", "--config_path", saved, flag, "--trainer.num_train_steps", 3)
        assert again.returncode == 0, again.stderr
        assert "resuming from ${FOLDER}/checkpoints/tiny" in again.stdout


@pytest.mark.cli
def test_a_job_script_takes_no_credential(tmp_path):
    config = write_config(tmp_path)
    flags = ["--processes_per_node", 1, f"--data.cache_dir=s3://a:{SECRET}@b"]
    done = ostro("launch", "slurm", "--config_path", config, "--dry_run", *flags)
    assert done.returncode == 2
    assert SECRET not in done.stdout + done.stderr and "would stand in the script" in done.stderr
