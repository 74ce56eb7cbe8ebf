"""How fast is a training step, how much memory does it take, and where does the time go? Not collected by pytest.

    python tests/benchmark.py                          # the laptop preset and two toys, in two minutes
    python tests/benchmark.py --threads 1 --json FILE  # the figures, for a program
    python tests/benchmark.py --against FOLDER         # the ratio to another checkout, which counts on a noisy machine

Every case runs in a process of its own, which holds a target with random weights and takes steps when it is asked to.
Its importances are shifted so that 1 in 20 is above 0, and stay so, as in a run after its first third. With --against,
a process of either checkout takes 20 steps in turn, each with its own code and its own presets."""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CASES = ("laptop", "tms_5-2", "resid_mlp1")


# --- In the process of a case ---


def build(case, C=1, batch=1, layers=1):
    """The arguments of `vpd.training_step` for a case; C, batch and layers are factors on its own."""
    import dataclasses

    import toy_models
    import torch
    import train_gpt2
    import vpd

    getattr(vpd, "keep_memory", lambda: None)()  # older checkouts have none
    torch.manual_seed(0)
    data = torch.Generator().manual_seed(0)
    if case in train_gpt2.PRESETS:
        getattr(train_gpt2, "choose_precision", lambda device: None)("cpu")  # older checkouts have none
        preset = train_gpt2.PRESETS[case]
        shape = dataclasses.replace(preset.shape, layers=preset.shape.layers * layers)
        model, config, divergence = train_gpt2.GPT(shape).eval(), preset.config, vpd.kl
        sizes = {f"h.{i}.{path}": C * number for i in range(shape.layers) for path, number in preset.C.items()}
        inputs = torch.randint(shape.vocabulary, (batch * preset.batch, shape.context), generator=data)
    else:
        toy = toy_models.parse_name(case)
        model, config, divergence = toy.model().eval(), toy.config(0), vpd.mse
        sizes, inputs = {path: C * number for path, number in toy.C().items()}, toy.batch(data)
    config = dataclasses.replace(config, lr=1e-12)  # so that they stay so
    training = vpd.start(model, sizes, vpd.check(model, sizes, inputs, config), config)
    G, decomposition = training.decomposition.G, training.decomposition
    with torch.no_grad():
        _, seen = vpd.forward_with_inputs(model, sizes, inputs)
        z = G(seen, decomposition.U, decomposition.V)
        z = torch.cat(list(z.values()), -1) if isinstance(z, dict) else z  # older checkouts have a dict
        (G.read_out.bias if hasattr(G, "read_out") else G.b_out).sub_(z.flatten()[:: 7].quantile(0.95))
    return model, inputs, divergence, training, config


def worker(case, factors):
    """Take as many steps as each line of standard input says; answer with their seconds, as JSON. "look" measures."""
    import torch
    import vpd

    arguments = build(case, **factors)
    step = lambda: vpd.training_step(*arguments)
    for line in sys.stdin:
        if line.strip() == "look":
            answer = look(step)
        else:
            answer = []
            for _ in range(int(line)):
                began = time.perf_counter()
                step()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                answer.append(time.perf_counter() - began)
        print(json.dumps(answer), flush=True)


def look(step):
    """Operations of a step, the rate of a large product, peak bytes, and the share of time of each kind of operation."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode

    sys.path.append(str(HERE))
    from test_vpd import PeakMemory

    with FlopCounterMode(display=False) as counter:
        step()
    with PeakMemory() as memory:
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(10):
            step()
    rows = [(row.key, row.self_cpu_time_total, row.count) for row in profiler.key_averages()]
    total = sum(spent for _, spent, _ in rows)
    shares = {key.removeprefix("aten::"): spent / total for key, spent, _ in sorted(rows, key=lambda row: -row[1])[:12]}
    x, seconds = torch.randn(1024, 1024), []
    for _ in range(20):
        began = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - began)
    rate = 2 * 1024**3 / statistics.median(seconds)
    calls = sum(count for key, _, count in rows if key.startswith("aten::")) / 10
    return {"operations": counter.get_total_flops(), "rate": rate, "peak_bytes": memory.peak, "calls": calls, "shares": shares}


# --- In the process that asks ---


class Case:
    """A case in a process of its own, with the code of a checkout."""

    def __init__(self, case, threads, folder=HERE.parent, **factors):
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", case, json.dumps(factors)]
        command += ["--threads", str(threads), "--code", str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ask(5)  # warm-up

    def ask(self, what):
        """The answer of `worker` to a line."""
        print(what, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        return json.loads(line) if line else sys.exit("error: a process of the benchmark ended; its message is above")

    def end(self):
        self.process.stdin.close()
        self.process.wait()


def growth(threads):
    """Step times of the laptop preset for factors on C, batch and layers, and the exponents with which they grow."""
    table = {}
    for what in ("C", "batch", "layers"):
        seconds = {}
        for factor in (1, 2, 4):
            case = Case("laptop", threads, **{what: factor})
            seconds[factor] = statistics.median(case.ask(15))
            case.end()
        exponent = math.log(seconds[4] / seconds[1]) / math.log(4)
        table[what] = {"seconds": seconds, "exponent": exponent}
        times = "  ".join(f"x{factor} {1e3 * s:.0f} ms" for factor, s in seconds.items())
        print(f"laptop, {what}: {times}   time grows as {what}^{exponent:.2f}")
    return table


def compare(case, threads, other, rounds=8):
    """The median of the ratios of step times, this checkout to the other, over alternating rounds of 20 steps."""
    both = Case(case, threads), Case(case, threads, other)
    times = [[statistics.median(one.ask(20)) for one in both] for _ in range(rounds)]
    for one in both:
        one.end()
    ratios = sorted(mine / its for mine, its in times)
    mine, its = (1e3 * statistics.median(x) for x in zip(*times))
    print(f"{case}, {threads} threads: {mine:.1f} ms against {its:.1f} ms; ratio {statistics.median(ratios):.2f} "
          f"({ratios[0]:.2f} to {ratios[-1]:.2f})")
    return {"milliseconds": mine, "others_milliseconds": its, "ratio": statistics.median(ratios), "ratios": ratios}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of the language model (default: 2); a toy has 1, as it runs")
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--code", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        sys.path.insert(0, options.code)
        import train_gpt2  # before torch: it sets the wait policy  # noqa: F401
        import torch

        torch.set_num_threads(options.threads)
        return worker(options.worker[0], json.loads(options.worker[1]))
    if options.against and not (options.against / "vpd.py").exists():
        sys.exit(f"error: {options.against} is no checkout: give a folder with vpd.py")
    figures = {}
    for name in CASES:
        threads = options.threads if name == "laptop" else 1
        if options.against:
            figures[name] = compare(name, threads, options.against.resolve())
            continue
        case = Case(name, threads)
        seconds, seen = statistics.median(case.ask(40)), case.ask("look")
        case.end()
        reached = seen["operations"] / seconds / seen["rate"]
        figures[name] = {"seconds": seconds, "threads": threads, "share_of_rate": reached, **seen}
        print(f"{name}, {threads} threads: {1e3 * seconds:.1f} ms a step; {seen['operations'] / 1e9:.2f} GFLOP, at {reached:.0%} "
              f"of the {seen['rate'] / 1e9:.0f} GFLOP/s of a large product; {seen['calls']:.0f} calls; "
              f"peak {seen['peak_bytes'] / 1e6:.0f} MB")
        print("   " + "  ".join(f"{key} {share:.0%}" for key, share in seen["shares"].items()))
    if not options.against:
        figures["growth"] = growth(options.threads)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
