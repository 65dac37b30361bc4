"""What a GPU does: is it right, how fast is it? One command with a time limit, which needs no network.

    python benchmark/gpu.py --minutes 3                        # both parts, on a GPU
    python benchmark/gpu.py --device cpu --tiny --minutes 3    # the same at a tiny size: does the command run?

Whether it learns, and how fast: gpu_flagship.py. A machine with PyTorch and no network lacks a few pure Python
packages: benchmark/gpu.sh brings them as wheels.

Parts, in this order; each writes its rows to `--output` as soon as it has them, and what fails is a row, and stops
nothing:
1. correct (gpu_correct.csv): the GPU against the CPU. `value` must be at most `limit`.
2. fast (gpu_fast.csv): steps, levels and frames a second. `share_of_peak` is of a matrix product of the same precision,
   measured first. `kernels_per_frame`, `idle` (the share of the time in which no kernel ran) and `top` (the kernels
   that took most) are of one iteration, a rollout and its updates, under torch's profiler.
"""

import contextlib
import copy
import functools
import itertools
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from common import RESULTS, ROOT, read_rows, show, write_rows
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT))
import i2a
from sokoban_env import SokobanVectorEnv, generate_levels

CPU = torch.device("cpu")
FLAGSHIP = "--size 10 --num-boxes 4 --max-episode-steps 120"
Check = Iterator[tuple[str, float, float]]  # name, value, limit


@dataclass
class Args:
    minutes: float = 3.0  # after these nothing new is measured
    parts: tuple[Literal["correct", "fast"], ...] = ("correct", "fast")  # which
    device: Literal["cuda", "cpu"] = "cuda"  # what is compared with the CPU, and measured
    tiny: bool = False  # sizes for a CPU
    output: str = str(RESULTS)  # folder of the results


class Table:
    """Rows that are in their file as soon as they are known."""

    def __init__(self, args: Args, name: str) -> None:
        self.path, self.rows = pathlib.Path(args.output).resolve() / f"gpu_{name}.csv", []

    def add(self, **row: Any) -> None:
        self.rows.append({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in show(row).items()})
        with contextlib.redirect_stdout(None):  # not the name of the file after each row
            write_rows(self.rows, str(self.path))


def tiny_runs() -> dict[str, str]:
    """Flags with which each script's run is over in seconds: those of the tests."""
    sys.path.append(str(ROOT / "tests"))
    from test_commands import TINY

    return {script: flags for script, flags in TINY.items() if script.endswith(".py")}


def run(folder: str, device: str, script: str, *flags: str, limit: float = 300.0) -> str:
    """Run a script in a folder for at most so many seconds; returns what it printed."""
    command = [sys.executable, str(ROOT / script), *flags]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise RuntimeError(f"{script}: {done.stderr[-300:]}")
    return done.stdout


# ---------------------------------------------------------------------------------------------------------- 1. correct


def check_environment(device: torch.device, tiny: bool) -> Check:
    """100,000 transitions with their autoresets, and 2,000 generated levels: how many differ?"""
    num, steps, number = (50, 40, 20) if tiny else (1000, 100, 2000)
    settings = {"size": 7, "num_boxes": 2, "max_episode_steps": 40}
    both = SokobanVectorEnv(num, backend="torch", **settings), SokobanVectorEnv(num, device=device, **settings)
    different = (both[0].reset(seed=1)[0] != both[1].reset(seed=1)[0].cpu()).flatten(1).any(1).sum()
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        actions = torch.randint(5, (num,), generator=rng)
        here, there = ([*out[:4], out[4].get("final_obs", out[0])] for out in (envs.step(actions) for envs in both))
        wrong = [(a != b.cpu()).reshape(num, -1).any(1) for a, b in zip(here, there, strict=True)]
        different += torch.stack(wrong).any(0).sum()
    yield "transitions that differ", float(different), 0.0
    many = [SokobanVectorEnv(number, size=10, num_boxes=4, device=d, backend="torch") for d in (CPU, device)]
    here, there = (envs.reset(seed=1)[0].cpu() for envs in many)
    yield "levels that differ", float((here != there).flatten(1).any(1).sum()), 0.0


def check_networks(device: torch.device, tiny: bool) -> Check:
    """Imagined rollouts, outputs, returns, and the losses and gradients of an update, of the same weights and data."""

    def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
        return float((ours.detach().cpu() - reference.detach().cpu()).norm() / reference.detach().norm())

    args = i2a.parse_args(["--num-envs", "8" if tiny else "64"])
    torch.manual_seed(1)
    here = i2a.make_networks(args, CPU)
    there = copy.deepcopy(here).to(device)
    envs = i2a.make_envs(args, args.num_envs, None, CPU)
    frames = i2a.as_frames(envs.reset(seed=1)[0], args.frame_stack)
    rows, _, frames, _ = i2a.rollout(args, here, envs, frames, torch.Generator().manual_seed(1))
    imagined = i2a.imagine(here, frames, 3, None, True)
    ours = i2a.imagine(there, frames.to(device), 3, None, True)[0].cpu()
    yield "imagined frames that differ", float((ours != imagined[0]).flatten(3).any(3).float().mean()), 0.01  # by ties
    outputs = there["agent"](frames.to(device), [x.to(device) for x in imagined])
    for name, ours, reference in zip(("logits", "values"), outputs, here["agent"](frames, imagined), strict=True):
        yield name, relative(ours, reference), 1e-4
    rewards, values, next_values = torch.randn(3, 32, 64)
    done = torch.rand(32, 64) < 0.1
    inputs = rewards, values, next_values, done & (rewards > 0), done
    ours, reference = (i2a.generalized_advantages(*(x.to(d) for x in inputs), 0.97, 0.95) for d in (device, CPU))
    yield "advantages", relative(ours, reference), 1e-5
    losses = []
    for networks, d in ((there, device), (here, CPU)):
        groups = [{"params": list(networks[name].parameters())} for name in ("agent", "rollout_policy")]
        losses.append(i2a.update(args, networks, torch.optim.SGD(groups, 1e-3), [x.to(d) for x in rows], 3))
    yield "losses", relative(*losses), 1e-4
    for name in ("agent", "rollout_policy"):
        ours, reference = (torch.cat([p.grad.flatten() for p in n[name].parameters()]) for n in (there, here))
        yield f"gradient of the {name}", relative(ours, reference), 1e-3


def check_graph(device: torch.device, tiny: bool) -> Check:
    """Six rollouts, with and without a CUDA graph: how many rows differ?"""
    args = i2a.parse_args(["--num-envs", "8" if tiny else "64", "--max-episode-steps", "32"])
    networks, made = i2a.make_networks(args, device), []
    for graph in (False, device.type == "cuda"):
        rng, envs = torch.Generator(device).manual_seed(1), i2a.make_envs(args, args.num_envs, None, device)
        frames, batches = i2a.as_frames(envs.reset(seed=1)[0], args.frame_stack), []
        act = functools.partial(i2a.rollout, args, networks, envs, rng=rng)
        act = i2a.Captured(act, rng) if graph else act
        for _ in range(6):
            batch, _, frames, _ = act(frames)
            envs.refill()
            batches += [x.clone().reshape(len(x), -1) for x in batch]
        made.append(batches)
    different = sum((a != b).any(1).sum() for a, b in zip(*made, strict=True))
    yield "rows under a CUDA graph that differ", float(different), 0.0


def check_scripts(device: torch.device, tiny: bool) -> Check:
    """A run goes from the CPU to the GPU, into a graph, and back; it is evaluated; each script's shortest run ends."""
    scripts, kind = tiny_runs(), device.type

    def shortest(script: str) -> tuple[str, float, float]:
        try:
            with tempfile.TemporaryDirectory() as folder:
                run(folder, kind, script, *shlex.split(scripts[script]))
        except (RuntimeError, subprocess.TimeoutExpired) as e:
            print(e, flush=True)
            return f"shortest run of {script}", 1.0, 0.0
        return f"shortest run of {script}", 0.0, 0.0

    with ThreadPoolExecutor(8) as pool, tempfile.TemporaryDirectory() as folder:
        shortest_runs = pool.map(shortest, [] if tiny else scripts)  # beside what follows
        run(folder, "cpu", "i2a.py", *shlex.split(scripts["i2a.py"]))
        (path,) = pathlib.Path(folder).glob("runs/*/checkpoint.pt")
        graph = "--cuda-graph" if kind == "cuda" else "--no-cuda-graph"
        for i, (where, flag) in enumerate(((kind, "--no-cuda-graph"), (kind, graph), ("cpu", "--no-cuda-graph"))):
            before = read_rows(path.with_name("metrics.csv"))
            run(folder, where, "i2a.py", "--resume", str(path), flag, "--total-timesteps", str(1640 + 512 * i))
            after = read_rows(path.with_name("metrics.csv"))
            yield f"a checkpoint goes on, {where} {flag}", float(len(after) <= len(before)), 0.0
        text = run(folder, kind, "i2a.py", "--evaluate", str(path.with_name("agent.pt")))
        yield "--evaluate", float("eval/solved" not in text), 0.0
        yield from shortest_runs


def correct(args: Args) -> None:
    table, device = Table(args, "correct"), torch.device(args.device)
    i2a.seed_everything(1, True)
    set_precision("float32")
    for check in (check_environment, check_networks, check_graph, check_scripts):
        try:
            for name, value, limit in check(device, args.tiny):
                table.add(check=name, value=value, limit=limit, passed=value <= limit)
        except Exception as e:
            table.add(check=check.__name__, value="", limit="", passed=False, error=repr(e)[-400:])


# ------------------------------------------------------------------------------------------------------------- 2. fast


def set_precision(name: str) -> None:
    """Products of float32 numbers exactly, or with TF32's 10 bits of mantissa. (bf16 is i2a.py's own flag.)"""
    torch.set_float32_matmul_precision("highest" if name == "float32" else "high")
    torch.backends.cudnn.allow_tf32 = name != "float32"


def seconds(work: Callable[[], Any], device: torch.device, at_least: float) -> float:
    """The mean time of a call, after the caller's warm-up; on a CPU, the processor's time."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    calls, start = 0, clock()
    while not calls or clock() - start < at_least:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        calls += 1
    return (clock() - start) / calls


def peaks(device: torch.device, size: int) -> dict[str, float]:
    """Floating-point operations a second of a large matrix product, and bytes a second of a large copy."""
    found = {}
    for name in ("float32", "tf32", "bf16"):
        set_precision(name)
        a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16 if name == "bf16" else torch.float32)
        product = functools.partial(torch.matmul, a, b)
        seconds(product, device, 0.1)
        found[name] = 2 * size**3 / seconds(product, device, 0.2)
    a = torch.randn(8 * size**2, device=device)
    b = torch.empty_like(a)
    found["copy"] = 2 * a.nbytes / seconds(lambda: b.copy_(a), device, 0.2)
    return found


def env_steps(num: int, graph: bool, levels: torch.Tensor | None, device: torch.device, at_least: float) -> dict:
    """Steps of 10x10 rooms with four boxes, in rounds of 32."""
    envs = SokobanVectorEnv(num, levels=levels, device=device)
    envs.reset(seed=1)
    actions = torch.randint(5, (32, num), device=device)

    def steps(actions: torch.Tensor) -> None:
        for action in actions:
            envs.step(action)

    play = i2a.Captured(steps, torch.Generator(device)) if graph else steps

    def work() -> None:
        play(actions)
        if graph:
            envs.refill()

    for _ in range(3):  # warms up, and records
        work()
    return {"value": 32 * num / seconds(work, device, at_least), "unit": "steps/s"}


def levels_made(num: int, device: torch.device) -> dict:
    """Levels that a reset puts into the pool's ring."""
    envs = SokobanVectorEnv(num, device=device)
    took = seconds(lambda: envs.reset(seed=1), device, 0.0)
    return {"value": envs.get_state()["pool"]["serial"] / took, "unit": "levels/s"}


def i2a_frames(flags: str, mode: str, device: torch.device, at_least: float, peak: dict[str, float]) -> dict:
    """Frames of i2a.py's loop with an untrained agent (the same work), and where the time goes."""
    graph = "graph" in mode and device.type == "cuda"
    args = i2a.parse_args([*flags.split(), "--cuda-graph" if graph else "--no-cuda-graph"])
    i2a.seed_everything(1, "deterministic" in mode)
    precision = next((name for name in ("bf16", "float32") if name in mode), "tf32")
    set_precision(precision)
    rng = torch.Generator(device).manual_seed(1)
    networks, envs = i2a.make_networks(args, device), i2a.make_envs(args, args.num_envs, None, device)
    if "compile" in mode:
        for network in networks.values():
            network.compile()
    optimizer = i2a.make_optimizer(args, networks)
    if graph:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(1e-3, device=device)
    act = functools.partial(i2a.rollout, args, networks, envs, rng=rng)
    learn = functools.partial(i2a.update, args, networks, optimizer)
    frames, size = i2a.as_frames(envs.reset(seed=1)[0], args.frame_stack), args.num_steps * args.num_envs

    def iteration() -> None:
        nonlocal frames
        batch, _, frames, _ = act(frames)
        if graph:
            envs.refill()
        for _ in range(args.update_epochs):
            parts = torch.randperm(size, generator=rng, device=device).tensor_split(args.num_minibatches)
            for which, index in enumerate(parts):
                learn([x[index] for x in batch], which % 8 if args.symmetry else 0)

    counter = FlopCounterMode(display=False)
    with contextlib.nullcontext() if "compile" in mode else counter:
        iteration()
    if graph:  # whose replays can't be counted
        act, learn = i2a.Captured(act, rng), i2a.Captured(learn, rng)
    for _ in range(3 if at_least else 0):
        iteration()
    took = seconds(iteration, device, at_least)
    row: dict[str, Any] = {"value": size / took, "unit": "frames/s"}
    if "compile" not in mode:
        flop = counter.get_total_flops()
        row |= {"mflop_per_frame": flop / size / 1e6, "share_of_peak": flop / took / peak[precision]}
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            iteration()
            torch.cuda.synchronize()
        kernels = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels.sort(key=lambda e: -e.self_device_time_total)
        busy = sum(e.self_device_time_total for e in kernels) / 1e6
        row |= {"kernels_per_frame": sum(e.count for e in kernels) / size, "idle": max(0.0, 1 - busy / took)}
        row["gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["top"] = "; ".join(f"{e.self_device_time_total / 1e6 / busy:.0%} {e.key[:60]}" for e in kernels[:4])
    return row


def fast(args: Args, deadline: float) -> None:
    table, device, tiny = Table(args, "fast"), torch.device(args.device), args.tiny
    i2a.seed_everything(1, False)
    peak = peaks(device, 256 if tiny else 8192)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    for what, value in peak.items():
        table.add(what=what, envs="", mode=f"{card}, torch {torch.__version__}", value=value, unit="peak, per second")

    sizes, batches, depths, small = (16_384, 1024, 4096, 65_536), (4096, 1024, 256), (3, 1, 5, 10), ""
    more = ("eager", "eager deterministic", "graph deterministic", "graph float32", "graph bf16", "graph compile bf16")
    if tiny:
        sizes, batches, depths, more = (64,), (8,), (3,), ("eager deterministic",)
        small = " --num-steps 4 --num-minibatches 2 --update-epochs 1"
    ways = ("eager",) if device.type == "cpu" else ("graph", "eager")
    at_least = 0.0 if tiny else 0.5
    levels, most = generate_levels(20 if tiny else 1000, seed=1)[0], sizes[0] // 2
    cases: list[tuple[str, int, str, Callable[[], dict]]] = []
    for num, way in itertools.product(sizes, ways):
        steps = functools.partial(env_steps, num, way == "graph", levels, device, at_least)
        cases.append(("steps, 1,000 levels", num, way, steps))
    steps = functools.partial(env_steps, most, ways[0] == "graph", None, device, at_least)
    cases.append(("steps, endless levels", most, ways[0], steps))
    cases.append(("levels", most, "", functools.partial(levels_made, most, device)))
    agents = {"model-free": "--agent model-free"} | {f"depth {d}": f"--imagination-depth {d}" for d in depths}
    runs = [
        *itertools.product(agents, batches, ways[:1]),
        *itertools.product(("model-free", "depth 3"), batches[:1], more),
    ]
    for agent, num, mode in runs:
        flags = f"{FLAGSHIP} {agents[agent]} --num-envs {num}{small}" + (" --bf16" if "bf16" in mode else "")
        frames = functools.partial(i2a_frames, flags, mode, device, 2 * at_least, peak)
        cases.append((agent, num, mode, frames))
    for what, envs, mode, measure in cases:
        if time.time() > deadline:
            print(f"no time for {what}, {envs}, {mode}", flush=True)
            continue
        try:
            table.add(what=what, envs=envs, mode=mode, **measure())
        except Exception as e:
            table.add(what=what, envs=envs, mode=mode, value="", unit="", error=repr(e)[-300:])
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def main(args: Args) -> None:
    start = time.time()
    pathlib.Path(args.output).mkdir(parents=True, exist_ok=True)
    if args.device == "cuda":
        if not torch.cuda.is_available():
            sys.exit("torch sees no GPU here; --device cpu --tiny shows that the command runs")
        torch.cuda.set_stream(torch.cuda.Stream())  # as i2a.py, for its graphs
    if "correct" in args.parts:
        correct(args)
    if "fast" in args.parts:
        fast(args, start + 60 * args.minutes)


if __name__ == "__main__":
    main(tyro.cli(Args))
