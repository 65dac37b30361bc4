"""What a GPU does: is it right, how fast is it? One command with a time limit, which needs no network.

    python benchmark/gpu.py --minutes 3                        # both parts, on a GPU
    python benchmark/gpu.py --device cpu --tiny --minutes 3    # the same at a tiny size: does the command run?

Whether it learns, and how fast: flagship.py. A machine with PyTorch and no network lacks a few pure Python
packages: benchmark/gpu.sh brings them as wheels.

Parts, in this order. Each row is in its file under `--output` as soon as it is known; what fails is a row, and stops
nothing:
1. correct (gpu_correct.csv): the GPU against the CPU. `value` must be at most `limit`.
2. fast (gpu_fast.csv): steps, levels and frames a second. `share_of_peak` is of a matrix product of the same precision,
   measured first. `idle` (the share of the time in which no kernel ran) and `top` (the kernels that took most) are of
   one iteration, a rollout and its updates, under torch's profiler.
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

import i2a
from sokoban_env import SokobanVectorEnv, generate_levels

CPU = torch.device("cpu")
FLAGSHIP = "--size 10 --num-boxes 4 --max-episode-steps 120"
AGENTS = {"model-free": "--agent model-free"} | {f"depth {d}": f"--imagination-depth {d}" for d in (3, 1, 5, 10)}
# Measured for two agents beside plain graphs
MORE = ("eager", "eager deterministic", "graph deterministic", "graph float32", "graph bf16", "graph compile bf16")
Check = Iterator[tuple[str, float, float]]  # name, value, limit


@dataclass
class Args:
    minutes: float = 3.0  # after these nothing new is measured
    parts: tuple[Literal["correct", "fast"], ...] = ("correct", "fast")  # which
    device: Literal["cuda", "cpu"] = "cuda"  # what is compared with the CPU, and measured
    tiny: bool = False  # sizes for a CPU
    output: str = str(RESULTS)  # folder of the results


def record(args: Args, name: str, rows: list[dict[str, Any]], **row: Any) -> None:
    """One more row of the file gpu_NAME.csv."""
    rows.append(show(row))
    write_rows(rows, f"{pathlib.Path(args.output).resolve()}/gpu_{name}.csv")


def run(folder: str, device: str, script: str, flags: str) -> str:
    """Run a script in a folder for at most five minutes; returns what it printed."""
    command = [sys.executable, str(ROOT / script), *shlex.split(flags)]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
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
        losses.append(i2a.update(args, networks, torch.optim.SGD(groups, 1e-3), *[x.to(d) for x in rows]))
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
    sys.path.append(str(ROOT / "tests"))
    from test_commands import TINY

    kind, scripts = device.type, [] if tiny else [name for name in TINY if name.endswith(".py")]
    with ThreadPoolExecutor(8) as pool, tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        runs = {script: pool.submit(run, other, kind, script, TINY[script]) for script in scripts}  # beside the rest
        run(folder, "cpu", "i2a.py", TINY["i2a.py"])
        (path,) = pathlib.Path(folder).glob("runs/*/checkpoint.pt")
        graph = "--cuda-graph" if kind == "cuda" else "--no-cuda-graph"
        for i, (where, flag) in enumerate(((kind, "--no-cuda-graph"), (kind, graph), ("cpu", "--no-cuda-graph"))):
            before = read_rows(path.with_name("metrics.csv"))
            run(folder, where, "i2a.py", f"--resume {path} {flag} --total-timesteps {1640 + 512 * i}")
            after = read_rows(path.with_name("metrics.csv"))
            yield f"a checkpoint goes on, {where} {flag}", float(len(after) <= len(before)), 0.0
        text = run(folder, kind, "i2a.py", f"--evaluate {path.with_name('agent.pt')}")
        yield "--evaluate", float("eval/solved" not in text), 0.0
        for script, job in runs.items():
            if job.exception():
                print(job.exception(), flush=True)
            yield f"shortest run of {script}", float(job.exception() is not None), 0.0


def correct(args: Args) -> None:
    rows, device = [], torch.device(args.device)
    i2a.seed_everything(1, True)
    set_precision("float32")
    for check in (check_environment, check_networks, check_graph, check_scripts):
        try:
            for name, value, limit in check(device, args.tiny):
                record(args, "correct", rows, check=name, value=value, limit=limit, passed=value <= limit)
        except Exception as e:
            record(args, "correct", rows, check=check.__name__, passed=False, error=repr(e)[-400:])


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


def env_steps(
    levels: torch.Tensor | None, num: int, mode: str, device: torch.device, at_least: float
) -> dict[str, Any]:
    """Steps of 10x10 rooms with four boxes, in rounds of 32."""
    envs = SokobanVectorEnv(num, levels=levels, device=device)
    envs.reset(seed=1)
    actions = torch.randint(5, (32, num), device=device)

    def steps(actions: torch.Tensor) -> None:
        for action in actions:
            envs.step(action)

    play = i2a.Captured(steps, torch.Generator(device)) if mode == "graph" else steps

    def work() -> None:
        play(actions)
        if mode == "graph":
            envs.refill()

    for _ in range(3):  # warms up, and records
        work()
    return {"value": 32 * num / seconds(work, device, at_least), "unit": "steps/s"}


def levels_made(num: int, mode: str, device: torch.device, at_least: float) -> dict[str, Any]:
    """Levels that a reset puts into the pool's ring."""
    envs = SokobanVectorEnv(num, device=device)
    took = seconds(lambda: envs.reset(seed=1), device, 0.0)
    return {"value": envs.get_state()["pool"]["serial"] / took, "unit": "levels/s"}


def i2a_frames(
    flags: str, mode: str, device: torch.device, at_least: float, peak: dict[str, float] | None = None
) -> dict[str, Any]:
    """Frames of i2a.py's loop with an untrained agent (the same work), and where the time goes."""
    graph = "graph" in mode
    if graph:
        flags += " --cuda-graph"
    if "bf16" in mode:
        flags += " --bf16"
    args = i2a.parse_args(flags.split())
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
            for index in parts:
                learn(*[x[index] for x in batch])

    counter = FlopCounterMode(display=False)
    if peak:
        with contextlib.nullcontext() if "compile" in mode else counter:
            iteration()
    if graph:  # whose replays can't be counted
        act, learn = i2a.Captured(act, rng), i2a.Captured(learn, rng)
    for _ in range(3 if at_least else 0):
        iteration()
    took = seconds(iteration, device, at_least)
    row: dict[str, Any] = {"value": size / took, "unit": "frames/s"}
    if peak and "compile" not in mode:
        row["share_of_peak"] = counter.get_total_flops() / took / peak[precision]
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            iteration()
            torch.cuda.synchronize()
        kernels = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        kernels.sort(key=lambda e: -e.self_device_time_total)
        busy = sum(e.self_device_time_total for e in kernels) / 1e6
        row["kernels_per_frame"] = sum(e.count for e in kernels) / size
        row["idle"] = max(0.0, 1 - busy / took)
        row["top"] = "; ".join(f"{e.self_device_time_total / 1e6 / busy:.0%} {e.key[:60]}" for e in kernels[:4])
    return row


def cases(device: torch.device, tiny: bool, peak: dict[str, float]) -> Iterator[tuple[str, int, str, Callable]]:
    """What is measured, in how many environments, the mode, and a function of the two, the device and a time."""
    sizes, batches, more, small = (16_384, 1024, 4096, 65_536), (4096, 1024, 256), MORE, ""
    if tiny:
        sizes, batches, more = (64,), (8,), ("eager deterministic",)
        small = "--num-steps 4 --num-minibatches 2 --update-epochs 1"
    modes = ("eager",) if device.type == "cpu" else ("graph", "eager")
    levels = generate_levels(20 if tiny else 1000, seed=1)[0]
    for num, mode in itertools.product(sizes, modes):
        yield "steps, 1,000 levels", num, mode, functools.partial(env_steps, levels)
    yield "steps, endless levels", sizes[0] // 2, modes[0], functools.partial(env_steps, None)
    yield "levels", sizes[0] // 2, "", levels_made

    def agent_frames(agent: str, num: int, mode: str, device: torch.device, at_least: float) -> dict[str, Any]:
        flags = f"{FLAGSHIP} {AGENTS[agent]} --num-envs {num} {small}"
        return i2a_frames(flags, mode, device, 2 * at_least, peak)

    agents = ("model-free", "depth 3") if tiny else AGENTS
    for agent, num in itertools.product(agents, batches):
        yield agent, num, modes[0], functools.partial(agent_frames, agent)
    for agent, mode in itertools.product(("model-free", "depth 3"), more):
        yield agent, batches[0], mode, functools.partial(agent_frames, agent)


def fast(args: Args, deadline: float) -> None:
    rows, device = [], torch.device(args.device)
    i2a.seed_everything(1, False)
    peak = peaks(device, 256 if args.tiny else 8192)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    for what, value in peak.items():
        mode = f"{card}, torch {torch.__version__}"
        record(args, "fast", rows, what=what, envs="", mode=mode, value=value, unit="peak, per second")
    for what, envs, mode, measure in cases(device, args.tiny, peak):
        if time.time() > deadline:
            print(f"no time for {what}, {envs}, {mode}", flush=True)
            continue
        try:
            result = measure(envs, mode, device, 0.0 if args.tiny else 0.5)
        except Exception as e:
            result = {"error": repr(e)[-300:]}
        record(args, "fast", rows, what=what, envs=envs, mode=mode, **result)
        if device.type == "cuda":
            torch.cuda.empty_cache()


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
