"""How fast is a training step, how much memory does it take, and where does the time go? Not collected by pytest.

    python tests/benchmark.py                          # the laptop preset and two toys, in a minute
    python tests/benchmark.py --threads 1 --json FILE  # the figures, for a program
    python tests/benchmark.py --against FOLDER         # the ratio to another checkout, which counts on a noisy machine

Every case runs in a process of its own, which holds a target with random weights and takes steps when it is asked to.
Its importances are shifted so that 1 in 20 is above 0, and stay so, as in a run after its first third. With --against,
a process of either checkout takes 20 steps in turn, each with its own code and its own presets."""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
import weakref
from pathlib import Path

FILE = Path(__file__).resolve()
ENVIRONMENT = dict(os.environ)  # train_gpt2 adds to it how threads wait; another checkout has its own way
sys.path.insert(0, os.environ.get("BENCHMARKED_CODE", str(FILE.parents[1])))

import train_gpt2  # isort: skip  # before torch, because it sets how idle threads wait
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
import toy_models
import vpd

CASES = ("laptop", "tms_5-2", "resid_mlp1")

# ---- In the process of a case ---------------------------------------------------------------------------------------
def build(case: str) -> tuple:
    """The arguments of `vpd.training_step` for a case."""
    torch.manual_seed(0)
    data_generator = torch.Generator().manual_seed(0)
    if case in train_gpt2.PRESETS:
        preset = train_gpt2.PRESETS[case]
        model = train_gpt2.GPT(preset.shape).eval()
        divergence = vpd.kl
        if hasattr(vpd, "sequence_config"):
            C = train_gpt2.subcomponents(model, 1)
            config = vpd.sequence_config(model, C, **preset.settings)
        else:  # an older checkout
            C = {}
            for i in range(preset.shape.layers):
                C |= {f"h.{i}.{matrix}": number for matrix, number in preset.C.items()}
            config = preset.config
        batch = torch.randint(preset.shape.vocabulary, (preset.batch, preset.shape.context), generator=data_generator)
    else:
        toy = toy_models.parse_name(case)
        model = toy.model().eval()
        config = toy.config(0)
        divergence = vpd.mse
        C = toy.C()
        batch = toy.batch(data_generator)
    config = dataclasses.replace(config, lr=1e-12)  # so that the importances stay as they are shifted
    if hasattr(vpd, "initialize"):
        training = vpd.initialize(model, C, batch, config)
    else:  # an older checkout
        training = vpd.start(model, C, vpd.check(model, C, batch, config), config)
    _, inputs = vpd.forward_with_inputs(model, C, batch)
    with torch.no_grad():
        G = training.decomposition.G
        z = G(inputs, training.decomposition.U, training.decomposition.V).flatten()
        bias = G.read_out.bias if hasattr(G, "read_out") else G.b_out
        bias.sub_(z[::7].quantile(0.95))  # of some, because a quantile takes at most 16 million
    return model, batch, divergence, training, config

def worker(case: str) -> None:
    """Take as many steps as each line of standard input says; answer with their seconds, as JSON. "look" measures."""
    if case in train_gpt2.PRESETS:
        train_gpt2.choose_precision("cpu")
    vpd.keep_memory()
    step = functools.partial(vpd.training_step, *build(case))
    for line in sys.stdin:
        question = line.strip()
        answer = look(step) if question == "look" else timed(step, int(question))
        print(json.dumps(answer), flush=True)

def timed(function, times: int) -> list[float]:
    """The seconds of each of so many calls."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return seconds

def look(step) -> dict:
    """Floating-point operations of a step, peak bytes, calls, and the share of time of each kind."""
    with FlopCounterMode(display=False) as counter:
        step()
    with PeakMemory() as memory:
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        timed(step, 10)
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    shares = {row.key.removeprefix("aten::"): row.self_cpu_time_total / total for row in rows[:12]}
    calls = sum(row.count for row in rows if row.key.startswith("aten::")) / 10
    return {"operations": counter.get_total_flops(), "peak_bytes": memory.peak, "calls": calls, "shares": shares}

class PeakMemory(TorchDispatchMode):
    """Within, the largest sum of the bytes of all tensors that are made there and live at one time."""
    def __init__(self):
        super().__init__()
        self.sizes = {}
        self.live = 0
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.count(x.untyped_storage())
        return result

    def count(self, storage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key) -> None:
        self.live -= self.sizes.pop(key)

# ---- In the process that asks ---------------------------------------------------------------------------------------
class Case:
    """A case in a process of its own, with the code of a checkout."""
    def __init__(self, case: str, threads: int, folder: Path = FILE.parents[1]):
        command = [sys.executable, FILE, "--threads", str(threads), "--worker", case]
        code = ENVIRONMENT | {"BENCHMARKED_CODE": str(folder)}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=code)
        self.ask(5)  # warm-up

    def ask(self, what):
        """The answer of `worker` to a line."""
        print(what, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            sys.exit("error: a process of the benchmark ended; its message is above")
        return json.loads(line)

    def median(self, steps: int) -> float:
        """The median of the milliseconds of so many steps."""
        return 1e3 * statistics.median(self.ask(steps))

def measure(name: str, threads: int) -> dict:
    """The time of a step, and what `look` sees."""
    case = Case(name, threads)
    milliseconds = case.median(40)
    seen = case.ask("look")
    rate = seen["operations"] / milliseconds / 1e6
    print(f"{name}, {threads} threads: {milliseconds:.1f} ms a step, peak {seen['peak_bytes'] / 1e6:.0f} MB;")
    print(f"   {seen['operations'] / 1e9:.2f} GFLOP in {seen['calls']:.0f} calls, {rate:.0f} GFLOP/s")
    print("   " + "  ".join(f"{key} {share:.0%}" for key, share in seen["shares"].items()))
    return {"milliseconds": milliseconds, "threads": threads, **seen}

def compare(name: str, threads: int, folder: Path, rounds: int = 8) -> dict:
    """The median of the ratios of step times, this checkout to the other, over alternating rounds of 20 steps."""
    this = Case(name, threads)
    other = Case(name, threads, folder)
    own = []
    others = []
    for _ in range(rounds):
        own.append(this.median(20))
        others.append(other.median(20))
    ratios = sorted(round(x / its, 2) for x, its in zip(own, others))
    ratio = statistics.median(ratios)
    mine = statistics.median(own)
    its = statistics.median(others)
    print(f"{name}, {threads} threads: {mine:.1f} ms against {its:.1f} ms; ratio {ratio:.2f}, {ratios}")
    return {"milliseconds": mine, "others_milliseconds": its, "ratio": ratio, "ratios": ratios}

def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of the language model (default: 2); a toy has 1")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        torch.set_num_threads(options.threads)
        return worker(options.worker)
    if options.against and not (options.against / "vpd.py").exists():
        sys.exit(f"error: {options.against} is no checkout: give a folder with vpd.py")
    figures = {}
    for name in CASES:
        threads = options.threads if name == "laptop" else 1
        figures[name] = compare(name, threads, options.against) if options.against else measure(name, threads)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))

if __name__ == "__main__":
    main()
