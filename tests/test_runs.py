"""Runs: kill and resume, reproducibility, and every bad input that must end in one clear line."""

import dataclasses
import functools
import json
import math
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
import torch.nn.functional as F
from torch import nn

import vpd
from test_vpd import C, Net

CONFIG = vpd.Config(steps=120, faithfulness_steps=20, w_importance=1e-4)

def batches(generator):
    return torch.randn(32, 4, generator=generator)

def net():
    torch.manual_seed(0)
    return Net().eval()

def decompose_net(out, config=CONFIG, model=None, sizes=C, get_batch=batches, divergence=vpd.mse):
    """The run that the tests kill, resume and spoil. A checkpoint after every step."""
    return vpd.decompose(model or net(), sizes, get_batch, divergence, config, out, checkpoint_seconds=0)

def same(a, b):
    """Equal to the last bit, through dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b

def test_a_look_every_tenth_of_a_run_is_logged_and_changes_nothing(tmp_path):
    config = dataclasses.replace(CONFIG, steps=27)
    plain, looks = decompose_net(tmp_path / "plain", config), []
    def validate(decomposition):
        looks.append(decomposition.U["first"].norm().item())
        torch.rand(3)  # what it draws is not the run's
        return {"norm": looks[-1]}
    seen = vpd.decompose(net(), C, batches, vpd.mse, config, tmp_path / "seen", validate=validate)
    assert same(plain.U, seen.U) and same(plain.G.state_dict(), seen.G.state_dict())
    lines = [json.loads(line) for line in (tmp_path / "seen" / "log.jsonl").read_text().splitlines()]
    assert [line["norm"] for line in lines if "norm" in line] == looks
    assert [line["step"] for line in lines if "norm" in line] == [*range(2, 28, 2), 27]  # every 27 // 10 steps, and last
    vpd.draw_run({"matrices": {}}, tmp_path / "seen" / "log.jsonl", tmp_path / "training.png")

def in_a_process(function, *arguments):
    """Call the function in a process of its own, with one thread; returns its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode

def run_that_dies(folder, config=CONFIG, draw=None, save=None):
    """The run, which kills itself when it draws a batch the so-many-th time, or in the midst of its so-many-th save."""
    torch.set_num_threads(1)
    draws, saves, write = iter(range(10**6)), iter(range(10**6)), torch.save

    def mortal_batches(generator):
        if next(draws) == draw:
            os.kill(os.getpid(), signal.SIGKILL)
        return batches(generator)

    def mortal_save(state, file):
        if next(saves) == save:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(state, file)

    torch.save = mortal_save
    decompose_net(folder, config, get_batch=mortal_batches)

def test_a_run_killed_again_and_again_ends_bit_identical_to_one_that_was_never_interrupted(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert in_a_process(run_that_dies, whole) == 0
    # before its first save; between steps; twice within a save, which follows every step
    for death, saved in (({"save": 0}, 0), ({"draw": 31}, 30), ({"save": 30}, 60), ({"save": 55}, 115)):
        assert in_a_process(functools.partial(run_that_dies, killed, **death)) == -signal.SIGKILL
        assert steps_saved(killed) == saved
    assert in_a_process(run_that_dies, killed) == 0
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, killed))
    for key in a.keys() - {"seconds", "log_bytes"}:
        assert same(a[key], b[key]), key
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (whole, killed)]
    for lines in logs:
        [line.pop("seconds") for line in lines]
    assert logs[0] == logs[1]

def steps_saved(folder):
    """Steps in a folder's checkpoint. A checkpoint that is half-written would fail to load here."""
    path = Path(folder) / "checkpoint.pt"
    return torch.load(path, weights_only=True)["step"] if path.exists() else 0

def test_a_run_that_saves_before_its_first_line_of_the_log_resumes(tmp_path):
    config = dataclasses.replace(CONFIG, steps=800)  # a line for every 4 steps
    assert in_a_process(functools.partial(run_that_dies, tmp_path, config, draw=3)) == -signal.SIGKILL
    assert steps_saved(tmp_path) == 2 and not (tmp_path / "log.jsonl").read_text()
    assert in_a_process(functools.partial(run_that_dies, tmp_path, config, draw=7)) == -signal.SIGKILL
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [4, 8]

def test_a_seed_fixes_the_result_and_another_seed_changes_it():
    config = dataclasses.replace(CONFIG, steps=20)
    first, again = decompose_net(None, config), decompose_net(None, config)
    other = decompose_net(None, dataclasses.replace(config, seed=1))
    assert same(first.U, again.U) and same(first.G.state_dict(), again.G.state_dict())
    assert not same(first.U, other.U)

def test_a_finished_run_is_loaded_and_not_repeated(tmp_path):
    config = dataclasses.replace(CONFIG, steps=10)
    first = decompose_net(tmp_path, config)
    written = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    again = decompose_net(tmp_path, config)
    assert same(first.U, again.U) and same(first.G.state_dict(), again.G.state_dict())
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == written

# --- Bad input ---

class Tied(nn.Module):
    """Two matrices that share their memory, one as the transpose of the other."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3, bias=False), nn.Linear(3, 4, bias=False)
        self.last.weight = nn.Parameter(self.first.weight.detach().T)

    def forward(self, x):
        return self.last(self.first(x))

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.square, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.square(self.square(x))

class InPlace(nn.Module):
    """Adds to its residual stream in place: after the matrix has read it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        h = self.first(x)
        h += torch.relu(self.second(h))
        return h

class CutOff(Net):
    def forward(self, x):
        return self.last(F.gelu(self.first(x)).detach())

class Pair(Net):
    def forward(self, x):
        return super().forward(x), None

class ByKeyword(Net):
    def forward(self, x):
        return self.last(input=F.gelu(self.first(input=x)))

small = dataclasses.replace(CONFIG, steps=3)

@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(sizes={"frist": 4}), r"'frist' is not an nn.Linear.*nearest that are: first"),
        (dict(sizes={"": 4}), r"is not an nn.Linear"),
        (dict(sizes={}), r"no matrix to decompose"),
        (dict(sizes={"first": 0}), r"C\['first'\] is 0.*at least 1"),
        (dict(sizes={"first": 2.5}), r"C\['first'\] is 2.5"),
        (dict(sizes={"first": True}), r"C\['first'\] is True"),
        (dict(get_batch=lambda g: {"x": batches(g)}), r"a batch is a dict: make get_batch return one tensor"),
        (dict(get_batch=lambda g: (batches(g), 1)), r"a batch is a tuple: make get_batch return one tensor"),
        (dict(model=Tied().eval(), sizes={"first": 4}), r"first.weight is tied to last.weight"),
        (dict(model=Twice().eval(), sizes={"square": 4}), r"square runs twice"),
        (dict(model=Twice().eval(), sizes={"unused": 4}), r"unused does not run"),
        (dict(model=InPlace().eval(), sizes={"first": 4, "second": 4}), r"modified by an inplace.*write x = x \+ y"),
        (dict(model=CutOff().eval()), r"no gradient reaches first: detach nothing"),
        (dict(model=Pair().eval()), r"the model returns a tuple: make it return one tensor"),
        (dict(config=dataclasses.replace(small, G_type="transformer", G_heads=0)), r"G_heads 0: give at least 1 head"),
        (dict(model=net().train()), r"call model.eval\(\)"),
        (dict(config=dataclasses.replace(small, G_type="transformer")), r"set G_type='mlp'"),
        (dict(config=dataclasses.replace(small, G_type="lstm")), r"G_type is 'lstm'"),
        (dict(config=dataclasses.replace(small, G_type="transformer", G_width=30)), r"G_width is 30 and G_heads 4: .*a width of n \* 2 \* heads"),
        (dict(model=net().double(), get_batch=lambda g: batches(g).double()), r"weight is torch.float64: call model.float\(\)"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_leaves_no_folder(tmp_path, arguments, message):
    with pytest.raises(vpd.BadInput, match=message) as error:
        decompose_net(tmp_path / "run", **{"config": small, **arguments})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()

def test_a_matrix_that_is_called_by_keyword_is_decomposed_like_any_other(tmp_path):
    model = ByKeyword().eval()
    model.load_state_dict(net().state_dict())
    plain, by_keyword = decompose_net(None, small), decompose_net(None, small, model=model)
    assert same(plain.U, by_keyword.U) and same(plain.V, by_keyword.V)

def test_a_batch_of_another_shape_is_refused_and_the_checkpoint_kept(tmp_path):
    count = iter([32] * 4 + [31] * 9)
    with pytest.raises(vpd.BadInput, match=r"batch 3 has shape \(31, 4\), not \(32, 4\), as the first had"):
        decompose_net(tmp_path, get_batch=lambda generator: torch.randn(next(count), 4, generator=generator))
    assert steps_saved(tmp_path) == 3

def test_a_target_that_turns_nan_stops_the_run_names_itself_and_keeps_the_checkpoint(tmp_path):
    drawn = iter(range(99))
    with pytest.raises(vpd.BadInput, match="target model's output is not finite at step 3"):
        decompose_net(tmp_path, get_batch=lambda generator: batches(generator) * (torch.nan if next(drawn) == 4 else 1))
    assert steps_saved(tmp_path) == 3
    assert all(x.isfinite().all() for x in torch.load(tmp_path / "checkpoint.pt", weights_only=True)["U"].values())

def test_a_loss_that_turns_inf_stops_the_run_and_is_named(tmp_path):
    calls = iter(range(10**6))
    with pytest.raises(vpd.BadInput, match="the (stochastic|adversarial) .*is not finite at step 5"):
        # four evaluations a step: two inner ascents, the stochastic and the adversarial loss
        decompose_net(tmp_path, divergence=lambda a, b: vpd.mse(a, b) * (torch.inf if next(calls) >= 20 else 1))
    assert steps_saved(tmp_path) == 5

def test_a_folder_that_holds_another_run_is_refused(tmp_path):
    decompose_net(tmp_path, small)
    with pytest.raises(vpd.BadInput, match=r"holds another run \(it differs in: lr\)"):
        decompose_net(tmp_path, dataclasses.replace(small, lr=1.0))
    with pytest.raises(vpd.BadInput, match=r"differs in: order of the matrices\)"):
        decompose_net(tmp_path, small, sizes=dict(reversed(C.items())))  # G's scores and the optimizer go by the order
    with pytest.raises(vpd.BadInput, match=r"differs in: C of last\)"):
        decompose_net(tmp_path, small, sizes={**C, "last": 9})
    other = net()
    other.first.weight.data += 1
    with pytest.raises(vpd.BadInput, match=r"differs in: target model"):
        decompose_net(tmp_path, small, model=other)

@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "cut", "foreign"])
def test_a_damaged_or_foreign_checkpoint_is_refused_and_left_alone(tmp_path, content):
    decompose_net(tmp_path, small)
    path = tmp_path / "checkpoint.pt"
    if content == "cut":
        content = path.read_bytes()[: path.stat().st_size // 2]
    if content == "foreign":
        torch.save({"U": {}, "V": {}, "step": 7}, path)
        content = path.read_bytes()
    path.write_bytes(content)
    with pytest.raises(vpd.BadInput, match="checkpoint.pt is damaged or is not of this run") as error:
        decompose_net(tmp_path, small)
    assert "\n" not in str(error.value) and path.read_bytes() == content

def stopped_run(folder, **began):
    """A run that stopped after 3 of 6 steps; its checkpoint says that it ran with these versions."""
    config, draws = dataclasses.replace(small, steps=6), iter(range(99))

    def mortal(generator):
        if next(draws) == 4:  # the first draw is for the checks
            raise KeyboardInterrupt
        return batches(generator)

    with pytest.raises(KeyboardInterrupt):
        decompose_net(folder, config, get_batch=mortal)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(state | {"versions": state["versions"] | began}, folder / "checkpoint.pt")
    return config

def test_an_unfinished_run_of_another_device_is_refused_and_a_finished_one_is_loaded(tmp_path):
    config = stopped_run(tmp_path / "stopped", device="cuda")
    with pytest.raises(vpd.BadInput, match="stopped on cuda; cpu draws other numbers"):
        decompose_net(tmp_path / "stopped", config)
    finished = decompose_net(tmp_path / "finished", small)
    state = torch.load(tmp_path / "finished" / "checkpoint.pt", weights_only=True)
    state["versions"]["device"] = "cuda"
    state["each process"][0]["noise"] = torch.zeros(16, dtype=torch.uint8)  # a CUDA generator's state has 16 bytes
    torch.save(state, tmp_path / "finished" / "checkpoint.pt")
    loaded = decompose_net(tmp_path / "finished", small)
    assert same(loaded.U, finished.U) and same(loaded.G.state_dict(), finished.G.state_dict())

def test_a_run_resumed_with_other_threads_or_another_torch_says_so_in_one_line(tmp_path, capsys):
    config = stopped_run(tmp_path / "other", threads=77, torch="1.0")
    decompose_net(tmp_path / "other", config)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and "torch 1.0, threads 77" in warnings[0]
    config = stopped_run(tmp_path / "same")
    decompose_net(tmp_path / "same", config)
    assert "warning" not in capsys.readouterr().err

# --- Several processes ---

TOGETHER = dataclasses.replace(CONFIG, steps=12, clip_UV=math.inf, clip_G=math.inf, w_frequency=0.1, w_importance=0.1)

def joined_step(config, rows):
    """Two training steps on these rows of a fixed batch and of fixed sources; stochastic masks all 0.3, without routing.

    Returns the losses and, by name, the gradients of the second, and the sources afterwards.
    """
    model, generator = net(), torch.Generator().manual_seed(5)
    batch = torch.randn(8, 4, generator=generator)
    training = vpd.initialize(model, C, batch[rows], config)
    training.sources.data = torch.rand(8, training.sources.shape[-1], generator=generator)[rows]
    for _ in range(2):
        losses = vpd.training_step(model, batch[rows], vpd.mse, training, config)
    decomposition = training.decomposition
    parameters = {**decomposition.U, **{"V" + k: v for k, v in decomposition.V.items()}, **dict(decomposition.G.named_parameters())}
    return losses, {name: x.grad for name, x in parameters.items()}, training.sources.detach()

def without_chance(model, U, V, g, batch, target, divergence, generator, shrink):
    return vpd.adversarial_reconstruction(model, U, V, g, batch, target, divergence, torch.full_like(g, 0.3))

def one_of_two(rank, folder):
    """What each of two processes does: a step on its half of the batch; a whole run; the same run, stopped once and resumed."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", world_size=2, rank=rank)
    half = slice(4 * rank, 4 * rank + 4)
    stochastic, vpd.stochastic_reconstruction = vpd.stochastic_reconstruction, without_chance
    torch.save(joined_step(TOGETHER, half), folder / f"step{rank}.pt")
    vpd.stochastic_reconstruction = stochastic

    # a warm-up that ends differently on both, as it may on two devices
    training = vpd.initialize(net(), C, torch.zeros(4, 4), TOGETHER)
    training.decomposition.U["first"].data += rank
    vpd.fit_weights(net(), training.decomposition, TOGETHER)
    torch.save(training.decomposition.U, folder / f"warm{rank}.pt")

    draws = iter(range(1000))

    def mortal(generator):
        if next(draws) == 1 + 7:  # the first draw is for the checks
            raise KeyboardInterrupt
        return batches(generator)

    whole = decompose_net(folder / "whole", TOGETHER)
    with pytest.raises(KeyboardInterrupt):
        decompose_net(folder / "stopped", TOGETHER, get_batch=mortal)
    resumed = decompose_net(folder / "stopped", TOGETHER)
    torch.save((whole.U, resumed.U, whole.G.state_dict(), resumed.G.state_dict()), folder / f"run{rank}.pt")
    torch.distributed.destroy_process_group()

def test_two_processes_take_the_step_of_one_on_the_joined_batch_and_resume_bit_identical(tmp_path, monkeypatch):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), 2)

    monkeypatch.setattr(vpd, "stochastic_reconstruction", without_chance)
    losses, gradients, sources = joined_step(TOGETHER, slice(0, 8))
    halves = [torch.load(tmp_path / f"step{rank}.pt", weights_only=True) for rank in (0, 1)]
    for one in halves:
        assert one[0] == pytest.approx(losses, rel=1e-4)
        for name, gradient in gradients.items():
            torch.testing.assert_close(one[1][name], gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.cat([one[2] for one in halves]), sources, rtol=1e-4, atol=1e-5)

    assert same(*(torch.load(tmp_path / f"warm{rank}.pt", weights_only=True) for rank in (0, 1)))
    runs = [torch.load(tmp_path / f"run{rank}.pt", weights_only=True) for rank in (0, 1)]
    for U, resumed_U, G, resumed_G in runs:
        assert same(U, resumed_U) and same(G, resumed_G)
    assert same(runs[0], runs[1])  # both processes hold the same decomposition ...
    first, second = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)["each process"]
    assert not same(first["sources"], second["sources"]) and not same(first["data"], second["data"])  # ... each drew its own
