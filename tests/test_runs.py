"""Runs: kill and resume, several processes, and every bad input that must end in one clear line."""

import dataclasses
import itertools
import math
import multiprocessing
import os
import signal

import pytest
import torch
import torch.multiprocessing

import vpd
from conftest import SHORT, C, Net, decompose_net, logged, net, net_refused, rows, same

CONFIG = dataclasses.replace(SHORT, steps=120)

def saved(folder):
    """The checkpoint. If it were half-written, it would fail to load here."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)

def run_that_dies(folder, config, draw=None, save=None):
    """The run, which kills itself when it draws a batch the so-many-th time, or in the midst of its so-many-th save."""
    draws = itertools.count()
    saves = itertools.count()
    write = torch.save
    def mortal_rows(generator):
        if next(draws) == draw:
            os.kill(os.getpid(), signal.SIGKILL)
        return rows(generator)
    def mortal_save(state, file):
        if next(saves) == save:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        write(state, file)
    torch.save = mortal_save
    decompose_net(folder, config, get_batch=mortal_rows)

def in_a_process(function, *arguments, **options):
    """Call the function in a process of its own; returns its exit code."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, kwargs=options)
    process.start()
    process.join()
    return process.exitcode

def test_a_run_killed_again_and_again_ends_bit_identical_to_one_that_was_never_interrupted(tmp_path):
    config = dataclasses.replace(CONFIG, steps=400)  # a line in the log for every 2 steps
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    assert in_a_process(run_that_dies, whole, config) == 0
    assert in_a_process(run_that_dies, killed, config, save=0) == -signal.SIGKILL
    assert not (killed / "checkpoint.pt").exists()
    # before the first line of the log; between steps; twice within a save, which follows every step
    for death, steps in (({"draw": 2}, 1), ({"draw": 31}, 31), ({"save": 30}, 61), ({"save": 55}, 116)):
        assert in_a_process(run_that_dies, killed, config, **death) == -signal.SIGKILL
        assert saved(killed)["step"] == steps
    assert in_a_process(run_that_dies, killed, config) == 0
    one = saved(whole)
    other = saved(killed)
    for key in one.keys() - {"seconds", "log_bytes"}:
        assert same(one[key], other[key]), key
    assert logged(whole) == logged(killed)

# --- Bad input ---

def test_what_goes_wrong_in_a_run_stops_it_and_is_named_and_the_checkpoint_is_kept(tmp_path):
    sizes = iter([32] * 4 + [31])
    of_x = iter([1] * 4 + [math.nan])
    of_loss = iter([1] * 15 + [math.inf] * 4)  # three of the check; four a step: two ascents, the first two losses
    late = {
        r"batch 3 has shape \(31, 4\), the first had \(32, 4\)": dict(get_batch=lambda _: torch.randn(next(sizes), 4)),
        "target model's output is not finite at step 3": dict(get_batch=lambda of: rows(of) * next(of_x)),
        "stochastic is not finite at step 3": dict(divergence=lambda a, b: vpd.mse(a, b) * next(of_loss)),
    }
    for number, (message, given) in enumerate(late.items()):
        folder = tmp_path / str(number)
        net_refused(message, folder, config=CONFIG, **given)
        assert saved(folder)["step"] == 3

def test_a_folder_that_holds_another_run_is_refused(tmp_path):
    decompose_net(tmp_path)
    net_refused(r"holds another run \(it differs in: lr\)", tmp_path, config=dataclasses.replace(SHORT, lr=1.0))
    net_refused(r"differs in: C of last\)", tmp_path, sizes={**C, "last": 9})
    net_refused(r"differs in: target model\)", tmp_path, model=Net())

def test_a_damaged_checkpoint_is_refused_and_left_alone(tmp_path):
    decompose_net(tmp_path)
    path = tmp_path / "checkpoint.pt"
    half = path.read_bytes()[:2000]
    path.write_bytes(half)
    net_refused("checkpoint.pt is damaged or is not of this run", tmp_path)
    assert path.read_bytes() == half

def test_an_unfinished_run_of_another_device_is_refused_and_a_finished_one_is_loaded(tmp_path):
    finished = decompose_net(tmp_path)
    state = saved(tmp_path)
    state["versions"]["device"] = "cuda"
    state["each process"][0]["noise"] = torch.zeros(16, dtype=torch.uint8)  # a CUDA generator's state has 16 bytes
    torch.save(state, tmp_path / "checkpoint.pt")
    loaded = decompose_net(tmp_path)
    assert same(loaded.U, finished.U) and same(loaded.G.state_dict(), finished.G.state_dict())
    assert same(saved(tmp_path), state)
    torch.save(state | {"step": 2}, tmp_path / "checkpoint.pt")
    net_refused("stopped on cuda; cpu draws other numbers", tmp_path)

# --- Several processes ---

TOGETHER = dataclasses.replace(CONFIG, steps=12, clip_UV=math.inf, clip_G=math.inf, w_frequency=0.1, w_importance=0.1)

def joined_step(share):
    """Two training steps on this share of a fixed batch and of fixed sources; random sources are 0.3, without routing.
    Returns the losses and the gradients of the second, and the sources afterwards."""
    model = net()
    generator = torch.Generator().manual_seed(5)
    batch = torch.randn(8, 4, generator=generator)
    training = vpd.initialize(model, C, batch[share], TOGETHER)
    training.sources.data = torch.rand(8, training.sources.shape[-1], generator=generator)[share]
    for _ in range(2):
        losses = vpd.training_step(model, batch[share], vpd.mse, training, TOGETHER)
    found = training.decomposition
    parameters = [*found.U.values(), *found.V.values(), *found.G.parameters()]
    return losses, [x.grad for x in parameters], training.sources.detach()

def without_chance(model, U, V, g, batch, target, divergence, generator, shrink):
    return vpd.adversarial_reconstruction(model, U, V, g, batch, target, divergence, torch.full_like(g, 0.3))

def one_of_two(rank, folder):
    """What each of two processes does: two steps on its half of the batch; a start that differs, as on two devices."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", world_size=2, rank=rank)
    vpd.stochastic_reconstruction = without_chance
    step = joined_step(slice(4 * rank, 4 * rank + 4))
    other = dataclasses.replace(TOGETHER, seed=rank)
    training = vpd.initialize(net(), C, torch.zeros(4, 4), other)
    torch.save({"step": step, "start": training.decomposition.U}, folder / f"made{rank}.pt")
    torch.distributed.destroy_process_group()

def test_two_processes_take_the_step_of_one_on_the_joined_batch_and_start_from_the_same(tmp_path, monkeypatch):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), 2)
    made = [torch.load(tmp_path / f"made{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert same(made[0]["start"], made[1]["start"])
    monkeypatch.setattr(vpd, "stochastic_reconstruction", without_chance)
    losses, gradients, sources = joined_step(slice(0, 8))
    for rank in (0, 1):
        own_losses, own_gradients, own_sources = made[rank]["step"]
        assert own_losses == pytest.approx(losses, rel=1e-4)
        torch.testing.assert_close(own_gradients, gradients, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own_sources, sources[4 * rank : 4 * rank + 4], rtol=1e-4, atol=1e-5)
