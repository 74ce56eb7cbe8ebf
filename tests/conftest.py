"""What holds for every test, and a finished run of a tiny language model, which several files read."""

import dataclasses
import functools
import sys

import pytest
import torch

import train_gpt2 as gpt
import vpd

TEXT = "def first(self, x):\n    return '<b>' & x\n\n\nclass Name:\n\tdef second(self): return \"</script>\" \n" * 60

@pytest.fixture(autouse=True)
def process_as_it_was():
    """A command may choose threads and another precision of matrix products for its process: the next test starts anew."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.enable_flash_sdp(True)

def tiny_preset(**changes):
    """Two layers of width 16, six subcomponents for each matrix; seconds."""
    config = vpd.Config(steps=30, faithfulness_steps=50, lr=5e-3, G_type="transformer", G_width=32, G_blocks=1, G_heads=2)
    C = dict.fromkeys(gpt.SUBCOMPONENTS["laptop"], 6)
    return gpt.Preset(gpt.Shape(2, 16, 2, 16, 280), 4, 60, 1e-2, C, dataclasses.replace(config, **changes))

@pytest.fixture(scope="session")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpt.PRESETS, "laptop", tiny_preset())
        patch.setattr(gpt, "EVALUATED", 256)
        opened = gpt.open_run(gpt.SETTINGS | {"data": str(folder / "text.txt")}, folder / "run", "cpu")
        gpt.evaluate(opened)
    return opened

@pytest.fixture
def run(finished_run, monkeypatch):
    """A finished run of a tiny model on TEXT; while a test uses it, `laptop` is its preset."""
    monkeypatch.setitem(gpt.PRESETS, "laptop", tiny_preset())
    monkeypatch.setattr(gpt, "EVALUATED", 256)
    return finished_run

@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the command line in this process, with short attacks and prunings and no picture; returns what it printed."""
    attack = vpd.fresh_adversary

    def short_attack(*arguments, **options):
        reached = attack(*arguments, **options, steps=3)
        return reached + reached[-1:] * 77

    monkeypatch.setattr(vpd, "fresh_adversary", short_attack)
    monkeypatch.setattr(vpd, "prune", functools.partial(vpd.prune, steps=20))
    monkeypatch.setattr(vpd, "draw_run", lambda *_: None)  # that of `finished_run` is drawn

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["train_gpt2.py", "--device", "cpu", *map(str, arguments)])
        gpt.main()
        return capsys.readouterr().out

    return call
