"""What several test files share: where things are, a space small enough to enumerate, and the whole suite in two processes."""

import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
sys.path.insert(0, str(ROOT))
import data


def text_batch(prompts, responses):
    """B prompts and B responses (lists of ids) -> tokens (B, T), response_mask (B, T), as the modules take them."""
    texts = [torch.tensor(x + y) for x, y in zip(prompts, responses)]
    masks = [torch.arange(len(x + y)) >= len(x) for x, y in zip(prompts, responses)]
    return pad_sequence(texts, batch_first=True), pad_sequence(masks, batch_first=True)


def rows(count, **changes):
    """The longer response is the better one, the shorter the safer: what two judges agree on after a few steps."""
    found = []
    for pair in data.world_preferences(count):
        longer = int(len(pair.responses[1]) > len(pair.responses[0]))
        found.append({"prompt": pair.prompt, "response_0": pair.responses[0], "response_1": pair.responses[1],
                      "better_response_id": longer, "safer_response_id": 1 - longer, **changes})
    return found


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def read_shared():
    """The path of a file next to the repository, which a clone does not have."""
    def path(name):
        if not (SHARED / name).exists():
            pytest.skip(f"{name} is not in ../shared of this checkout")
        return SHARED / name
    return path


@pytest.fixture
def space():
    """space(m): 3 prompts, every sequence of up to 3 tokens from a vocabulary of 3, random r (N, S), g (m, N, S), and
    a random π_ref (N, S) with rational probabilities c/120, so that `rows` (N, 120), which repeats a sequence c times,
    is a sample of π_ref without any sampling error. `spread` turns (…, N, S) into (…, N, 120)."""
    def build(m, seed=0):
        draw = torch.Generator().manual_seed(seed)
        sequences = [y for length in (1, 2, 3) for y in itertools.product(range(3), repeat=length)]
        N, S, total = 3, len(sequences), 120
        extra = torch.rand(N, S, generator=draw).multinomial(total - S, replacement=True, generator=draw)
        counts = 1 + torch.stack([row.bincount(minlength=S) for row in extra])  # (N, S)
        rows = torch.stack([torch.arange(S).repeat_interleave(row) for row in counts])  # (N, total)
        normal = {"generator": draw, "dtype": torch.float64}
        return SimpleNamespace(
            ref=counts.double() / total, rows=rows, r=torch.randn(N, S, **normal), g=torch.randn(m, N, S, **normal),
            spread=lambda x: x.gather(-1, rows.expand(*x.shape[:-1], total)))
    return build


# ---- `python -m pytest` without a choice of tests: one process takes the tests from the front, another from the back, until they meet
CLAIMS = "TESTS_CLAIMED"  # a folder with a file for each test that one of the two has taken
other = SimpleNamespace(process=None, output=None)


def pytest_configure(config):
    args = config.invocation_params.args
    if set(args) - {"-q", "-v", "-x"} or CLAIMS in os.environ or (os.cpu_count() or 1) < 2:
        return
    os.environ[CLAIMS] = tempfile.mkdtemp()
    os.environ["OMP_NUM_THREADS"] = "1"  # a core for each; tiny models gain little by a second one
    torch.set_num_threads(1)
    other.output = tempfile.TemporaryFile("w+")
    other.process = subprocess.Popen([sys.executable, "-m", "pytest", "--color=no", *args], cwd=config.invocation_params.dir,
                                     stdout=other.output, stderr=subprocess.STDOUT)


def pytest_collection_modifyitems(items):
    if CLAIMS in os.environ and not other.process:
        items.reverse()


def pytest_runtest_protocol(item):
    """True: nothing is left to do for this test, since the other process has it."""
    if CLAIMS in os.environ:
        try:
            os.close(os.open(Path(os.environ[CLAIMS], hashlib.sha256(item.nodeid.encode()).hexdigest()), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return True


def pytest_sessionfinish(session):
    if other.process and other.process.wait():
        session.exitstatus = session.exitstatus or 1


def pytest_terminal_summary(terminalreporter):
    if other.process:
        other.output.seek(0)
        terminalreporter.section("the tests from the back, in the second process")
        terminalreporter.write(other.output.read())
        other.output.close()
        shutil.rmtree(os.environ.pop(CLAIMS))
