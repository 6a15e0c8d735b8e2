"""What a run leaves when it is killed, when the disk is full, when its inputs change, when they are hostile."""

import contextlib
import fcntl
import gc
import gzip
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import dual
import mocan
import model
import train
from conftest import rows
from test_train import ROOT, TINY, command, job, numbers, one_line_on_stderr, same_weights

SMALL = [*TINY, "--algo", "mocan", "--sft_steps", 20, "--prompts", 8]


def written(path, some):
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return path


def kept(path):
    """An artifact's content, without how long it took and with "this run" for the name of the run that made it."""
    saved = torch.load(path, weights_only=True)
    del saved["seconds"]
    run = saved.pop("run")
    made_from = {what: "this run" if run in (x, *(x if isinstance(x, list) else ())) else x
                 for what, x in saved["made_from"].items()}
    return {**saved, "made_from": made_from}


def same(x, y):
    """Bit for bit."""
    if isinstance(x, torch.Tensor):
        return isinstance(y, torch.Tensor) and x.dtype == y.dtype and torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[what], y[what]) for what in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(same, x, y))
    return x == y


def same_run(a, b):
    """Every weight and sample, all that artifacts say they were made from, and the table but for its times."""
    assert sorted(p.name for p in a.glob("*.pt")) == sorted(p.name for p in b.glob("*.pt"))
    for path in a.glob("*.pt"):
        assert same(kept(path), kept(b / path.name)), path.name
    assert numbers(a) == numbers(b) and (a / "samples.jsonl").read_bytes() == (b / "samples.jsonl").read_bytes()


# ---- kill -9

def child(argv, log):
    """One run of train.py in a process of its own, which a fork server makes without importing torch again."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    mocan.Progress.report = due_always
    sys.argv = ["train.py", *map(str, argv)]
    train.main()


def due_always(self, result, report=mocan.Progress.report):
    """Checkpoints after every step: a test cannot wait for 2 % of its time."""
    self.due = 0.0
    report(self, result)


def due_at_the_end(self, result, report=mocan.Progress.report):
    self.due = math.inf
    report(self, result)


def killed(context, argv, log, seconds):
    """Start it, kill it after that long -> whether it was killed before its end."""
    process = context.Process(target=child, args=(argv, log))
    process.start()
    process.join(seconds)
    alive = process.is_alive()
    process.kill()
    process.join()
    assert alive or process.exitcode == 0, Path(log).read_text()[-3000:]
    return alive


@pytest.mark.parametrize("source", ["world", "file"])
def test_a_run_killed_again_and_again_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, source):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_resume"])
    flags = [*TINY, "--shots", 2, "--shot_steps", 4, "--shot_responses", 4, "--sample_batch", 16, "--sft_steps", 30]
    if source == "file":
        flags += ["--data", written(tmp_path / "pairs.jsonl", rows(150)), "--score_steps", 12, "--margin", "5%",
                  "--accumulate", 1]
    log = tmp_path / "log"
    first = context.Process(target=int)  # starts the server, which imports torch: no part of a run's time
    first.start()
    first.join()
    began = time.time()
    assert not killed(context, [*flags, "--out", tmp_path / "whole"], log, 300)
    whole = time.time() - began
    assert (tmp_path / "whole" / "pecan_shot_2.pt").exists()
    draw, kills, stages, runs = random.Random(source), 0, set(), 0
    while runs < 30 and (kills < 10 or len(stages) < 4):
        out, argv = tmp_path / f"run{runs}", [*flags, "--out", tmp_path / f"run{runs}"]
        lives = 0
        while killed(context, argv, log, draw.uniform(0.05, max(0.5, lives / 20)) * whole):  # it ends
            lives += 1
            kills += 1
            if (out / "run.json").exists():
                argv = ["--resume", "--out", out]
                stages.add(len(list(out.glob("*.pt"))))
                for path in out.glob("*.pt"):
                    torch.load(path, weights_only=True)  # whole, at any moment
        same_run(tmp_path / "whole", out)
        shutil.rmtree(out)
        runs += 1
    assert len(stages) > 3 and "goes on after" in log.read_text()


@pytest.mark.parametrize("lora", [0, 3])
def test_resume_continues_a_training_loop_bit_for_bit_wherever_it_stopped(tmp_path, monkeypatch, capsys, lora):
    """Between the micro-batches of a step, between epochs with their calibration, and in the policy update."""
    flags = [*SMALL, "--accumulate", 2, "--lora", lora]
    job(*flags, "--out", tmp_path / "whole")
    real = mocan.Progress.add
    monkeypatch.setattr(mocan.Progress, "report", due_always)
    stops = {1: None, 7: "reference: goes on after 3 of 20", 12: "reference: goes on after 5 of 20",
             36: "reference: goes on after 17 of 20", 43: "mocan: goes on after 1 of 6"}
    for stop in stops if not lora else (12, 43):
        said = stops[stop]
        calls = []

        def add(self, loss):
            calls.append(loss)
            if len(calls) == stop:
                raise KeyboardInterrupt
            real(self, loss)
        monkeypatch.setattr(mocan.Progress, "add", add)
        out = tmp_path / f"stopped{stop}"
        with pytest.raises(KeyboardInterrupt):
            job(*flags, "--out", out)
        monkeypatch.setattr(mocan.Progress, "add", real)
        capsys.readouterr()
        job("--resume", "--out", out)
        printed = capsys.readouterr().out
        assert said in printed if said else "goes on" not in printed
        same_run(tmp_path / "whole", out)


def test_resume_knows_the_best_epoch_so_far_and_how_many_brought_nothing_since(tmp_path, monkeypatch, capsys):
    """Where each epoch is worse than the first, training ends after the third with the first one's weights."""
    consider, add, calls = mocan.Progress.consider, mocan.Progress.add, []
    monkeypatch.setattr(mocan.Progress, "consider", lambda self, loss: consider(self, -loss))
    monkeypatch.setattr(mocan.Progress, "report", due_always)
    job(*SMALL, "--out", tmp_path / "whole")
    said = capsys.readouterr().out
    assert said.count("calibration loss") == 1 and "reference 18/20" in said and "reference 19/20" not in said

    def stop_in_the_third_epoch(self, loss):
        calls.append(loss)
        if len(calls) == 15:
            raise KeyboardInterrupt
        add(self, loss)
    monkeypatch.setattr(mocan.Progress, "add", stop_in_the_third_epoch)
    with pytest.raises(KeyboardInterrupt):
        job(*SMALL, "--out", tmp_path / "out")
    job("--resume", "--out", tmp_path / "out")
    assert "goes on after 14 of 20" in capsys.readouterr().out
    same_run(tmp_path / "whole", tmp_path / "out")


def test_resume_continues_sampling_where_it_stopped(tmp_path, monkeypatch):
    job(*SMALL, "--sample_batch", 16, "--out", tmp_path / "whole")
    real, calls = model.GPT.generate, []

    def generate(self, *args, **more):
        calls.append(len(args[0]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *args, **more)
    monkeypatch.setattr(model.GPT, "generate", generate)
    monkeypatch.setattr(mocan.Progress, "report", due_always)
    with pytest.raises(KeyboardInterrupt):
        job(*SMALL, "--sample_batch", 16, "--out", tmp_path / "out")
    job("--resume", "--out", tmp_path / "out")
    assert calls[:6] == [2] * 5 + [4]  # 8 prompts of 8 responses: three batches of 2 were kept, one was left; then 4 responses
    assert not (tmp_path / "out" / "checkpoint.pt").exists()
    same_run(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize("writing, every", [(3.0, 60.0), (0.1, 60.0), (3.0, 10.0)])  # seconds
def test_checkpoints_take_two_per_cent_of_the_time_at_most(tmp_path, monkeypatch, writing, every):
    now, saves = [0.0], []
    monkeypatch.setattr(mocan.time, "monotonic", lambda: now[0])

    def save(saved, path):
        saves.append(now[0])
        now[0] += writing  # a large model on a slow disk, or a small one
    monkeypatch.setattr(mocan, "save", save)
    run = train.Config(out=str(tmp_path), run="run", checkpoint_every=every)
    progress = mocan.Progress(mocan.Recipe("stage", 10001, run=run))
    for _ in range(10000):
        now[0] += 1.0
        progress.report(None)
    assert len(saves) > 50 and writing * len(saves) <= 0.021 * now[0]
    assert min(b - a for a, b in zip(saves, saves[1:])) >= every
    assert saves[0] == 1.0  # and the first at once, which finds an unwritable folder before it costs much
    before = len(saves)
    progress.report(None)
    assert len(saves) == before + 1  # the loop's last


def test_a_checkpoint_of_another_run_or_stage_is_not_taken(tmp_path):
    def loop(stage, run, resume):
        return mocan.Progress(mocan.Recipe(stage, 9, run=train.Config(out=str(tmp_path), run=run, resume=resume)))
    assert loop("mocan", "this", True).done == []
    loop("mocan", "this", False).report("a batch")
    assert loop("mocan", "this", True).done == ["a batch"]
    for other in (("pecan", "this", True), ("mocan", "other", True), ("mocan", "this", False)):
        assert loop(*other).done == []
    assert mocan.Progress(mocan.Recipe("mocan", 9)).done == []


# ---- a full disk

def writes_of(out, *flags):
    """How often such a run replaces a file."""
    count, real = [], data.replace_file
    data.replace_file = lambda *args: count.append(args[0]) or real(*args)
    try:
        job(*flags, "--out", out)
    finally:
        data.replace_file = real
    return len(count)


def test_a_full_disk_at_any_write_loses_nothing(tmp_path, monkeypatch):
    """It fills in the middle of every other write, and when the file is complete, of the others."""
    flags = [*SMALL, "--checkpoint_every", 1e6]  # however slow: after a loop's first step and its last
    total = writes_of(tmp_path / "whole", *flags)
    real, hit = data.replace_file, set()
    assert total > 8
    for failing in range(1, total + 1):
        calls, out = [], tmp_path / f"run{failing}"

        class Full:
            def __init__(self, file):
                self.file = file

            def __getattr__(self, name):
                return getattr(self.file, name)

            def write(self, some):
                self.file.write(bytes(some)[:len(some) // 2])
                raise OSError(28, "No space left on device")

        def replace_file(path, put):
            calls.append(path)
            if len(calls) != failing:
                return real(path, put)
            hit.add(Path(path).name)
            if failing % 2:
                return real(path, lambda file: put(Full(file)))
            with monkeypatch.context() as patch:
                patch.setattr(data.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
                return real(path, put)
        monkeypatch.setattr(data, "replace_file", replace_file)
        with pytest.raises(OSError) as error:
            job(*flags, "--out", out)
        said = str(error.value)
        assert "\n" not in said and "cannot be written" in said and "--resume" in said
        del error  # and with it main's frame, which holds the lock
        gc.collect()
        assert not list(out.glob("*.tmp"))
        for path in out.glob("*.pt"):
            torch.load(path, weights_only=True)
        monkeypatch.setattr(data, "replace_file", real)
        if (out / "run.json").exists() and failing % 3 == 0:
            job("--resume", "--out", out)
            same_run(tmp_path / "whole", out)
    assert hit == {path.name for path in (tmp_path / "whole").iterdir()} - {"lock"} | {"checkpoint.pt"}


# ---- one run at a time, one that is stopped

def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    held = open(tmp_path / "lock", "a")
    fcntl.flock(held, fcntl.LOCK_EX)
    line = one_line_on_stderr(command("--quick", "--out", tmp_path))
    assert "another run is under way" in line and list(tmp_path.iterdir()) == [tmp_path / "lock"]
    held.close()
    job(*SMALL, "--algo", "mocan", "--out", tmp_path)


def test_ctrl_c_is_one_line_that_says_how_to_go_on(tmp_path):
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, SMALL), "--steps", "100000", "--out",
                                tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # nohup ignores it
    for line in process.stdout:
        if line.startswith("mocan:"):  # a loop that no calibration ends early
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0 and stderr.count("\n") == 1 and "--resume" in stderr


def test_resume_takes_no_other_setting_and_needs_a_run(tmp_path, capsys):
    for flags, said in ((["--resume", "--lr", "1"], "keeps the run's settings"), (["--resume"], "run.json is missing or damaged")):
        if "--lr" in flags:
            (tmp_path / "run.json").write_text(json.dumps({"config": {}}))
        with pytest.raises(SystemExit) as stop:
            train.settings([*flags, "--out", str(tmp_path / ("" if "--lr" in flags else "none"))])
        assert stop.value.code == 2 and said in capsys.readouterr().err


# ---- artifacts know what they were made from

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    path = written(out / "pairs.jsonl", rows(150))
    job(*TINY, "--sft_steps", 20, "--data", path, "--out", out / "run")
    return out


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


@pytest.mark.parametrize("flags, said", [
    (["--sft_steps", 15], "sft_steps 20, not 15"), ([], r"input policy \w+, not \w+")])
def test_a_new_reference_refuses_old_samples(copied, finished, monkeypatch, flags, said):
    """A run killed after reference.pt, then --from mocan: other settings, or the same and another run."""
    before = (copied / "reference.pt").read_bytes()
    monkeypatch.setattr(mocan, "sample_pool", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        job("--from", "reference", *flags, "--out", copied)
    monkeypatch.undo()
    assert (copied / "reference.pt").read_bytes() != before
    for stage in ("mocan", "evaluate"):
        with pytest.raises(ValueError, match=rf"offline\.pt: made with {said}; make it with --from offline$"):
            job("--from", stage, "--out", copied)
    if flags == []:
        job("--resume", "--out", copied)
        same_run(finished / "run", copied)


def test_a_file_of_another_run_is_refused_whatever_its_settings(copied, finished, tmp_path):
    """The same flags in another folder: the numbers are the same, and the run is not."""
    job(*TINY, "--sft_steps", 20, "--algo", "mocan", "--data", finished / "pairs.jsonl", "--out", tmp_path / "other")
    assert same_weights(tmp_path / "other", copied, "reference.pt")
    for name, said in (("reference.pt", r"reference\.pt: made with input tokenizer \w+, not \w+; .* --from reference$"),
                       ("tokenizer.pt", r"score_helpful\.pt: made with input reference \w+, not \w+; .* --from scores$")):
        shutil.copy(tmp_path / "other" / name, copied / name)
        with pytest.raises(ValueError, match=said):
            job("--from", "mocan", "--out", copied)
    for path in (tmp_path / "other").glob("*.pt"):
        shutil.copy(path, copied / path.name)
    job("--from", "evaluate", "--algo", "mocan", "--out", copied)  # all of the other run
    assert numbers(copied) == numbers(tmp_path / "other")


REMADE = {  # what another run made again: the artifact that this refuses, and what that calls it
    "tokenizer": ("reference", "tokenizer"), "reference": ("score_helpful", "reference"),
    "offline": ("offline_scores", "samples"), "score_helpful": ("offline_scores", "scorers"),
    "score_safe": ("offline_scores", "scorers"), "offline_scores": ("mocan", "scores")}


@pytest.mark.parametrize("name", REMADE)
def test_what_another_run_made_again_refuses_all_that_was_made_from_it(copied, name):
    child, what = REMADE[name]
    saved = torch.load(copied / f"{name}.pt", weights_only=True)
    torch.save({**saved, "run": "another"}, copied / f"{name}.pt")
    with pytest.raises(ValueError, match=rf"/{child}\.pt: made with input {what} \W*\w+.*, not .*another.*; make it with --from "):
        job("--from", "evaluate", "--out", copied)


def test_a_pre_alignment_that_was_cut_short_is_not_mixed_with_the_old_one(copied, monkeypatch):
    real, calls = train.pecan.prealign, []

    def once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)
    monkeypatch.setattr(train.pecan, "prealign", once)
    with pytest.raises(KeyboardInterrupt):
        job("--from", "prealign", "--prealign_lr", 1e-3, "--out", copied)
    other = shutil.copytree(copied, copied.parent / "other")
    with pytest.raises(ValueError, match=r"dpo-safe\.pt: made with prealign_lr 0\.003, not 0\.001; .* --from prealign$"):
        job("--from", "dual", "--out", other)
    job("--resume", "--out", copied)
    assert len(calls) == 3  # the one that was finished was not made again


@pytest.mark.parametrize("change", ["replaced", "appended"])
def test_other_data_in_the_same_file_is_refused(copied, finished, change):
    some = rows(180) if change == "appended" else rows(150, prompt="Why?")[:20] + rows(150)[20:]
    path = finished / "pairs.jsonl"
    before = path.read_bytes()
    try:
        written(path, some)
        for flags in (["--from", "dual"], ["--from", "mocan"], ["--from", "evaluate"], ["--resume"]):
            said = r"tokenizer\.pt: made with input data \w+, not \w+; make it with --from reference$"
            with pytest.raises(ValueError, match=said):
                job(*flags, "--out", copied)
    finally:
        path.write_bytes(before)


def test_a_pecan_run_killed_before_its_judges_is_resumed(tmp_path, monkeypatch):
    path, real = written(tmp_path / "pairs.jsonl", rows(150)), mocan.learn_score
    flags = [*TINY, "--sft_steps", 20, "--algo", "pecan", "--data", path]
    job(*flags, "--out", tmp_path / "whole")
    monkeypatch.setattr(mocan, "learn_score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        job(*flags, "--out", tmp_path / "out")
    monkeypatch.setattr(mocan, "learn_score", real)
    job("--resume", "--out", tmp_path / "out")
    same_run(tmp_path / "whole", tmp_path / "out")


def test_a_margin_that_makes_no_sense_costs_no_training(tmp_path):
    for flags in (["--margin", "abc"], ["--margin", "1,2,3"]):
        with pytest.raises(ValueError, match="expected a number in g's units"):
            job(*TINY, "--algo", "pecan", *flags, "--out", tmp_path)
    assert not list(tmp_path.glob("*.pt"))


# ---- numbers that are none

@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("look", [due_always, due_at_the_end])
def test_a_gradient_that_is_not_finite_stops_at_the_next_look_and_is_written_nowhere(tmp_path, monkeypatch, bad, look):
    job(*SMALL, "--out", tmp_path / "whole")
    real, norms, saves = mocan.clip_grad_norm_, [], []

    def clip_grad_norm_(parameters, largest):
        parameters = list(parameters)
        if len(norms) == 3:
            parameters[0].grad[0, 0] = bad
        norms.append(real(parameters, largest))
        return norms[-1]
    real_save = mocan.save
    monkeypatch.setattr(mocan, "save", lambda saved, path: (saves.append(path), real_save(saved, path)))
    monkeypatch.setattr(mocan, "clip_grad_norm_", clip_grad_norm_)
    monkeypatch.setattr(mocan.Progress, "report", look)
    out = tmp_path / "out"
    with pytest.raises(FloatingPointError, match="^reference: the loss or its gradient is nan after 3 steps; lower"):
        job(*SMALL, "--out", out)
    assert not (out / "reference.pt").exists()
    assert (len(norms), len(saves)) == ((4, 3) if look is due_always else (12, 0))  # 12: two epochs that brought nothing
    if look is due_always:  # what was finite is kept
        saved = torch.load(out / "checkpoint.pt", weights_only=True)
        assert len(saved["done"]) == 3 and all(x.isfinite().all() for x in saved["model"].values())
    else:
        assert not (out / "checkpoint.pt").exists()
    monkeypatch.undo()
    job("--resume", "--out", out)
    same_run(tmp_path / "whole", out)


# ---- hostile input

@pytest.mark.parametrize("line, said", [
    ("[" * 100000, "not a JSON object"), ('{"prompt": ' + "1" * 100000 + "}", "not a JSON object"),
    ('{"prompt": 1e999}', "is missing or wrong"),
    ('{"a": NaN}', "is missing or wrong"), ("\ufeff\ufeff{}", "not a JSON object"), ("\x00", "not a JSON object"),
])
def test_a_strange_line_is_named_by_file_and_number(tmp_path, line, said):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(rows(1)[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError) as error:
        data.load_preferences([str(path)])
    assert str(error.value).startswith(f"{path}:2: ") and said in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_of_a_hundred_megabytes_is_refused_before_it_is_read(tmp_path, packed):
    path = tmp_path / ("pairs.jsonl.gz" if packed else "pairs.jsonl")
    with (gzip.open if packed else open)(path, "wb") as file:
        file.write(json.dumps(rows(1)[0]).encode() + b'\n{"prompt": "')
        for _ in range(100):
            file.write(b"a" * 2**20)
    with pytest.raises(ValueError, match=r":2: more than 524288 bytes in a line"):
        data.load_preferences([str(path)])


def test_a_gzip_bomb_of_blank_lines_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_LINES", 1000)
    path = tmp_path / "pairs.jsonl.gz"
    with gzip.open(path, "wb") as file:
        file.write(b"\n" * 10**6)
    with pytest.raises(ValueError, match=r":1001: more than .* or 1000 lines"):
        data.load_preferences([str(path)])


def test_half_a_surrogate_pair_goes_through_the_whole_run(tmp_path):
    some = rows(150)
    for i, row in enumerate(some):
        row["prompt"] += " \ud800"
        row["response_0"] = "\udfff " + row["response_0"] + " \u0000"
    job(*SMALL, "--data", written(tmp_path / "pairs.jsonl", some), "--out", tmp_path / "out")
    assert "?" in (tmp_path / "out" / "samples.jsonl").read_text() and (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_console_of_any_encoding_ends_no_run(tmp_path, encoding):
    done = subprocess.run([sys.executable, ROOT / "train.py", *map(str, SMALL), "--out", tmp_path], capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert b"\\u03bb*" in done.stdout


class Code:
    def __reduce__(self):
        return os.system, ("touch code_ran",)


def test_code_in_a_pickle_is_refused_and_does_not_run(copied, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"config": {}, "weights": Code()}, copied / "reference.pt")
    with pytest.raises(ValueError, match=r"reference\.pt: missing or damaged .*; make it with --from reference$"):
        job("--from", "mocan", "--out", copied)
    np.savez(tmp_path / "scores.npz", score=np.array([Code()], dtype=object), constraint=np.zeros((1, 2)))
    with pytest.raises(ValueError, match="not a readable npz file of numbers"):
        dual.read_npz(tmp_path / "scores.npz", 1.0)
    assert not (tmp_path / "code_ran").exists()


@pytest.mark.parametrize("saved", [[1, 2], {"weights": {}}, {"config": {}, "weights": {}}, {"config": {"n_embd": 10**9}},
                                   {"config": {"n_embd": 10**6, "n_head": 1}, "weights": {}}, "text",
                                   {"made_from": 3}, {"made_from": {"seed": torch.ones(2)}}])
def test_a_foreign_checkpoint_is_one_line(copied, saved):
    torch.save(saved, copied / "reference.pt")
    with pytest.raises(ValueError) as error:
        job("--from", "scores", "--out", copied)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{copied / 'reference.pt'}: ")
    with pytest.raises(ValueError, match=r"/(reference|score_helpful|offline)\.pt: ") as error:
        job("--from", "mocan", "--out", copied)
    assert "\n" not in str(error.value)


def mutated(raw, draw):
    """A few bytes changed, removed, doubled or put in, as truncated and foreign files have them."""
    raw = bytearray(raw)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(raw) + 1)
        some = bytes(draw.choice((draw.randrange(256), *b'{}[]",:\\u0\n\x00\xff9')) for _ in range(draw.choice((1, 2, 8))))
        cut = draw.choice((0, 1, len(some), draw.randrange(64)))
        raw[at:at + cut] = some
        if draw.random() < 0.1:
            raw = raw[:draw.randrange(len(raw) + 1)]
        if draw.random() < 0.1:
            raw[at:at] = raw[at:at + draw.randrange(200)] * draw.choice((1, 30))
    return bytes(raw)


def test_mutated_inputs_are_read_or_refused_in_one_line(tmp_path, capsys):
    """19,000 of them: ValueError and nothing else, none for long, none with much memory."""
    sentence = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: How?\n\nAssistant: "
    lines = [*rows(2), *rows(1, is_response_0_safe=True, is_response_1_safe=False),
             {"chosen": sentence + "So.", "rejected": sentence + "No."},
             {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "Hello!"}], "rejected": "No."}]
    text = "".join(json.dumps(row) + "\n" for row in lines).encode()
    tiny = model.GPT(model.GPTConfig(40, 8, 1, 1, 4))
    began = train.artifact(train.Config(out=str(tmp_path), run="this"), "reference", "seed.pt", tokenizer={"run": "this"})
    train.finish(began, **model.to_checkpoint(tiny))
    later = train.Config(out=str(tmp_path), start="offline")
    np.savez(tmp_path / "seed.npz", score=np.random.rand(3, 4), constraint=np.random.rand(3, 4))

    kinds = [  # how many, a file's content and name, what reads it
        (15000, text, "pairs.jsonl", lambda path: data.load_preferences([f"safe={path}"])),
        (1500, gzip.compress(text), "pairs.jsonl.gz", lambda path: data.load_preferences([f"safe={path}"])),
        (1500, (tmp_path / "seed.pt").read_bytes(), "x.pt", lambda path: model.from_checkpoint(
            train.artifact(later, "reference", "x.pt", tokenizer={"run": "this"}))),
        (1000, (tmp_path / "seed.npz").read_bytes(), "x.npz", lambda path: dual.solve(
            *dual.read_npz(path, 1.0)[1:], [0.01], 1.0)),
    ]
    draw, read, slowest = random.Random(0), 0, 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for count, raw, name, reader in kinds:
        path = str(tmp_path / name)
        Path(path).write_bytes(raw)
        reader(path)  # what torch imports at first takes seconds
        for turn in range(count):
            content = mutated(raw, draw)
            Path(path).write_bytes(content)
            began = time.perf_counter()
            with contextlib.suppress(FloatingPointError):
                try:
                    reader(path)
                    read += 1
                except ValueError as error:
                    assert "\n" not in str(error), (name, turn)
                except BaseException as error:
                    raise AssertionError(f"{name} {turn}: {error!r}: {content!r}") from error
            slowest = max(slowest, time.perf_counter() - began)
    assert 100 < read < 15000 and slowest < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 1024
