"""What several test files share: a small net and its run, and a finished run of a tiny language model."""

import functools
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train_gpt2 as gpt
import vpd

torch.set_num_threads(1)  # models so small that two threads would only wait for each other

TEXT = "def first(self, x):\n    return '<b>' & x\n\n\nclass Name:\n\tdef second(self): return \"</script>\" \n" * 60
TRANSFORMER = {"G_width": 32, "G_blocks": 1, "G_heads": 2}

def same(a, b):
    """Equal to the last bit, through dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b

def logged(folder):
    """The lines of a decomposition's log, without how long it took."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return lines

def two_layers(net, x):
    return net.last(F.gelu(net.first(x)))

class Net(nn.Module):
    """Two linear layers, one with a bias; any input shape (..., 4) -> (..., 3). compute(net, x): what it computes."""
    def __init__(self, compute=two_layers, first=nn.Linear):
        super().__init__()
        self.first = first(4, 5)
        self.last = nn.Linear(5, 3, bias=False)
        self.compute = compute
        self.eval()

    def forward(self, x):
        return self.compute(self, x)

C = {"first": 6, "last": 7}
SHORT = vpd.Config(steps=3)

def rows(generator):
    return torch.randn(32, 4, generator=generator)

def net():
    """The same net every time."""
    torch.manual_seed(0)
    return Net()

def decompose_net(out=None, config=SHORT, model=None, sizes=C, get_batch=rows, divergence=vpd.mse):
    """A run of the net, or of another model, with a checkpoint after every step."""
    return vpd.decompose(model or net(), sizes, get_batch, divergence, config, out, 0)

def net_refused(message, folder, **given):
    """The run of the net must end in one line with this message."""
    with pytest.raises(vpd.BadInput, match=message) as error:
        decompose_net(folder, **given)
    assert "\n" not in str(error.value)

def dies(patch, module, name, after):
    """Let a function be interrupted when it is called for the so-many-th time."""
    function = getattr(module, name)
    calls = itertools.count()
    def mortal(*arguments, **options):
        if next(calls) == after:
            raise KeyboardInterrupt
        return function(*arguments, **options)
    patch.setattr(module, name, mortal)

def code_blocks(title):
    """The blocks of code in a section of the README."""
    readme = (Path(vpd.__file__).parent / "README.md").read_text()
    _, rest = readme.split(f"## {title}\n")
    section, *_ = rest.split("\n## ")
    return re.findall(r"```(?:python)?\n(.*?)```", section, re.S)

def tiny_preset(**changes):
    """Two layers of width 16; seconds."""
    shape = gpt.Shape(layers=2, width=16, heads=2, context=16, vocabulary=280)
    settings = {"steps": 30, "lr": 5e-3, "w_importance": 3e-5, "w_frequency": 1e-4, **TRANSFORMER, **changes}
    return gpt.Preset(shape, batch=4, target_steps=60, target_lr=1e-2, settings=settings)

def use_preset(patch, preset):
    """While the patch holds, `laptop` is this preset, and little is evaluated."""
    patch.setitem(gpt.PRESETS, "laptop", preset)
    patch.setattr(gpt, "EVALUATED", 256)

@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        use_preset(patch, tiny_preset())
        opened = gpt.open_run(gpt.SETTINGS | {"data": str(folder / "text.txt")}, folder / "run", "cpu")
        gpt.evaluate(opened)
    return opened

@pytest.fixture
def run(finished_run, monkeypatch):
    """A finished run of a tiny model on TEXT; while a test uses it, `laptop` is its preset."""
    use_preset(monkeypatch, tiny_preset())
    return finished_run

@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command line in this process, with short attacks and prunings, no picture; returns what it printed."""
    attack = vpd.fresh_adversary
    def short_attack(*arguments, **options):
        reached = attack(*arguments, **options | {"steps": 3})
        return reached + reached[-1:] * 77
    monkeypatch.setattr(vpd, "fresh_adversary", short_attack)
    monkeypatch.setattr(vpd, "prune", functools.partial(vpd.prune, steps=20))
    monkeypatch.setattr(vpd, "draw_run", lambda *_: None)  # that of `finished_run` is drawn
    monkeypatch.setattr(gpt, "choose_precision", lambda _: None)  # for the whole process: later tests, too
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_gpt2.py", "--device", "cpu", *map(str, arguments)])
        gpt.main()
        return capsys.readouterr().out
    return call

@pytest.fixture
def refused(command):
    """Runs a command line that must end in one line with this message."""
    def call(message, *arguments):
        with pytest.raises(SystemExit, match=message) as stopped:
            command(*arguments)
        assert stopped.value.code.startswith("error: ") and "\n" not in stopped.value.code
    return call
