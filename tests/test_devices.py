"""Where tensors live, seen without a GPU: every tensor computes on the CPU and says on which device it would be.

`Placed` intercepts torch's functions, marks what is moved to or made on a CUDA device and what is computed from it, and
refuses what CUDA would refuse: an operation on tensors of two devices (numbers without dimensions and indices from the
CPU aside), NumPy on a device tensor, a CPU generator there. It also counts where the host waits for the device. What it
cannot see: kernels, their rounding and their speed, autocast, and the backward pass inside autograd.
"""

import json
import random
import re
import sys
import time
import traceback
import weakref
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import data
import dual
import mocan
import train
from conftest import ROOT, rows
from model import GPT

WAITS = {"cpu", "item", "tolist", "__int__", "__float__", "__bool__", "__index__", "nonzero", "equal", "allclose"}
DEVICE = torch.device("cuda:0")


def on_device(x):
    return getattr(x, "placed", False)


def tensors(*x):
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, torch.Tensor)]


def where():
    """The innermost function of the project that is running: file, function."""
    ours = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT and f.name[0] != "<"]
    return f"{Path(ours[-1].filename).stem}.{ours[-1].name}" if ours else "a test"


class Placed(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.waits = Counter()  # where the host waited for the device
        self.calls = 0  # with a tensor on the device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        given = tensors(args, kwargs)
        there = [x for x in given if on_device(x)]
        here = [x for x in given if not on_device(x) and x.dim()]
        self.calls += bool(there)
        if function == torch.Tensor.device.__get__:
            return DEVICE if there else torch.device("cpu")
        if function == torch.Tensor.is_cuda.__get__:
            return bool(there)
        if function == torch.Tensor.data.__set__:  # nn.Module.to
            args[0].placed = on_device(args[1])
            return function(*args)
        if name == "pin_memory":
            assert not there, f"{where()} pins a device tensor"
            return args[0]
        if name in ("_parse_to", "_has_compatible_shallow_copy_type"):  # of nn.Module.to
            return function(*args, **kwargs or {})
        if name == "backward":
            with torch._C.DisableTorchFunction():
                return function(*args, **kwargs or {})
        target = []

        def local(x):
            """The argument with the device replaced by the CPU."""
            if isinstance(x, torch.device) or isinstance(x, str) and x.startswith(("cuda", "cpu")):
                target.append(torch.device(x).type)
                return "cpu"
            return x
        args, kwargs = tree_map(local, (args, kwargs or {}))
        if name == "to" and sys._getframe(1).f_code.co_filename.endswith(("clip_grad.py", "adam.py")):
            target = []  # to the device of a group of tensors, which torch's C++ takes for the CPU
        moved = name in ("to", "cpu")
        if name == "cpu":
            target.append("cpu")
        if name == "to" and len(given) == 2:
            target.append("cuda" if on_device(given[1]) else "cpu")
        assert not (target == ["cuda"] and kwargs.get("generator")), f"{where()} has a CPU generator for the device"
        assert name != "numpy" or not there, f"{where()} hands a device tensor to NumPy"
        if there and here and not moved and name != "copy_":
            indices = name in ("__getitem__", "__setitem__") and on_device(args[0]) and not any(
                x.is_floating_point() for x in here)
            assert indices, f"{where()}: {name} of {len(there)} tensors on the device and {len(here)} on the CPU"
        masked = "item__" in name and any(x.dtype == torch.bool for x in there[1:])
        if there and (name in WAITS or masked or moved and target == ["cpu"]):
            self.waits[where()] += 1
        result = function(*args, **kwargs)
        placed = target == ["cuda"] if target else bool(there)
        if name == "copy_" or name.startswith("new_") and not target:
            placed = on_device(args[0])
        if moved and result is given[0] and placed != on_device(result):
            result = result.detach().clone()
        for x in tensors(result):
            x.placed = placed
        return result


@pytest.fixture
def placed(monkeypatch):
    copied, made = torch.nn.Parameter.__deepcopy__, torch.nn.Parameter.__new__

    def new(kind, data=None, requires_grad=True):
        parameter = made(kind, data, requires_grad)
        parameter.placed = on_device(data)
        return parameter

    def deepcopy(self, memo):
        copy = copied(self, memo)
        copy.placed = on_device(self)
        return copy
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", deepcopy)
    monkeypatch.setattr(torch.nn.Parameter, "__new__", new)
    return Placed()


def test_what_cuda_refuses_is_refused(placed):
    with placed:
        x = torch.ones(3).to("cuda:0")
        y = torch.ones(3)
        n = torch.tensor([0, 2])
        assert x.device == DEVICE and y.device.type == "cpu" and x.cpu().device.type == "cpu"
        assert (x * x.sum() + 1).device == DEVICE and x[n].device == DEVICE  # as on CUDA
        for wrong in (lambda: x + y, lambda: y[n.to("cuda")], lambda: torch.where(x > 0, x, y), lambda: x.numpy(),
                      lambda: torch.rand(3, device="cuda", generator=torch.Generator()), lambda: x.pin_memory(),
                      lambda: torch.nn.Linear(3, 1)(x), lambda: torch.nn.Linear(3, 1).to("cuda")(y)):
            with pytest.raises(AssertionError):
                wrong()
        assert torch.nn.Linear(3, 1).to("cuda")(x).device == DEVICE


JOB = ("--quick", "--device", "cuda:0", "--world_pairs", "300", "--n_embd", "16", "--max_new_tokens", "24", "--sft_steps",
       "4", "--prompts", "6", "--responses", "4", "--steps", "5", "--prealign_steps", "3", "--shots", "2", "--shot_steps",
       "3", "--shot_responses", "3", "--eval_prompts", "4", "--eval_responses", "2")
MORE = {
    "world": (),
    "every option": ("--constraints", "harmless,polite", "--accumulate", "2", "--dtype", "bfloat16",
                     "--checkpoint_activations", "--checkpoint_every", "1e-9"),
    "adapters": ("--lora", "2", "--dtype", "float32"),
    "judges": ("--data", "pairs.jsonl", "--score_steps", "12", "--margin", "0.0")}


@pytest.mark.parametrize("more", MORE.values(), ids=MORE)
@pytest.mark.filterwarnings("ignore")
def test_the_whole_job_on_one_device(placed, more, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(60)))
    monkeypatch.setattr(sys, "argv", ["train.py", *JOB, *more])
    assemble, update, scored = mocan.from_checkpoint, mocan.train_mocan, []

    models, build = weakref.WeakSet(), GPT.__init__
    monkeypatch.setattr(GPT, "__init__", lambda self, config: (build(self, config), models.add(self))[0])

    def judges_there():
        return [x for x in models if x.config.score_head and on_device(x.wte.weight)]

    def from_checkpoint(saved, device):
        """Score models are on the device one at a time, where something asks for a score."""
        assert judges_there() == []
        model = assemble(saved, device)
        if model.config.score_head:
            scored.append(len(judges_there()))
        return model

    def train_mocan(*args):
        assert judges_there() == [] and len(scored) >= 2 * ("--data" in more)
        return update(*args)
    monkeypatch.setattr(mocan, "from_checkpoint", from_checkpoint)
    monkeypatch.setattr(mocan, "train_mocan", train_mocan)
    began = time.monotonic()
    with placed:
        train.main()
    assert set(scored) == ({1} if "--data" in more else set())
    assert placed.calls > 10_000
    # the host waits where results leave the device, and in training only where they are printed or saved
    assert placed.waits.keys() <= {"mocan.losses", "mocan.sample_pool", "mocan.map_pool", "model.generate",
                                   "model.to_checkpoint", "train.train_reference"}
    assert {"mocan.losses", "mocan.map_pool", "model.generate"} <= placed.waits.keys()
    # for the losses once a line, and once more where calibration ends a loop before its last step
    lines = re.findall(r"  .+ (\d+)/(\d+)  loss ", capsys.readouterr().out)
    loops = sum(step == "1" for step, _ in lines)
    ended = loops - sum(step == steps for step, steps in lines)
    assert placed.waits["mocan.losses"] == len(lines) + ended
    if "--checkpoint_every" not in more:  # and a line is due at the first step, the last, and every ten seconds: never at each
        assert len(lines) <= 2 * loops + (time.monotonic() - began) / 10


@pytest.mark.filterwarnings("ignore:effective sample size")
def test_the_dual_of_scores_on_a_device(placed):
    score = torch.randn(20, 8)
    constraint = torch.randn(2, 20, 8)
    here = dual.solve(score, constraint, 0.1, 0.5)
    with placed:
        there = dual.solve(score.to("cuda"), constraint.to("cuda"), 0.1, 0.5)
        assert all(x.device == DEVICE for x in there if isinstance(x, torch.Tensor))
    assert torch.equal(here.lam, there.lam)
