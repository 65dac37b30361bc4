"""What a GPU does: is it right, how fast is it, does it learn? One command with a time limit, which needs no network.

    python benchmark/gpu.py --minutes 9                            # all three parts, on a GPU
    python benchmark/gpu.py --device cpu --tiny --minutes 3        # the same command at a tiny size: does it run?
    python benchmark/gpu.py --parts learn --checkpoint runs/NAME/checkpoint.pt --minutes 9    # go on training

A machine that has PyTorch and no network lacks a few pure Python packages. benchmark/gpu.sh downloads them as wheels
into .whl/, and installs them from there.

Parts, in this order; each writes its rows to `--output` as soon as it has them, and a check that fails stops nothing:
1. correct (gpu_correct.csv): the GPU against the CPU. `value` must be at most `limit`.
2. fast (gpu_fast.csv): steps, levels and frames a second. `share_of_peak` is of the matrix product measured in the same
   run, at the same precision; `kernels_per_frame` and `idle`, the share of the time in which no kernel ran, are of one
   iteration (a rollout and its updates) under torch's profiler; `top` are the kernels that took most of its time.
3. learn (gpu_learn.csv, gpu_checkpoint.pt): the rest of the time, i2a.py with `--train`, or on from `--checkpoint`.
"""

import contextlib
import copy
import functools
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from common import RESULTS, ROOT, read_rows, write_rows
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(ROOT))
import i2a
from sokoban_env import SokobanVectorEnv, generate_levels

CPU = torch.device("cpu")
FLAGSHIP = "--size 10 --num-boxes 4 --max-episode-steps 120"


@dataclass
class Args:
    minutes: float = 9.0  # for all parts together; the second may take until 6 tenths of it
    parts: tuple[Literal["correct", "fast", "learn"], ...] = ("correct", "fast", "learn")  # which
    device: Literal["cuda", "cpu"] = "cuda"  # what is compared with the CPU, and measured
    tiny: bool = False  # sizes that a CPU does in seconds: to see that all of it runs
    output: str = str(RESULTS)  # folder of the results
    train: str = (
        f"{FLAGSHIP} --model-frames 40000 --model-steps 6000 --num-envs 1024 --num-minibatches 32 --no-anneal-lr "
        "--no-torch-deterministic --cuda-graph --total-timesteps 1000000000 --log-frequency 2000000"
    )  # flags of i2a.py in the third part
    checkpoint: str | None = None  # the third part goes on from this checkpoint.pt


class Table:
    """Rows that are on the disk as soon as they are known."""

    def __init__(self, args: Args, name: str) -> None:
        self.path, self.rows = pathlib.Path(args.output).resolve() / f"gpu_{name}.csv", []

    def add(self, **row: Any) -> None:
        self.rows.append({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
        print(*(f"{k}={v}" for k, v in self.rows[-1].items() if v != ""), flush=True)
        write_rows(self.rows, str(self.path))


def tiny_runs() -> dict[str, str]:
    """Flags with which each script's run is over in seconds: those of the tests."""
    sys.path.append(str(ROOT / "tests"))
    from test_commands import TINY

    return {script: flags for script, flags in TINY.items() if script.endswith(".py")}


# ---------------------------------------------------------------------------------------------------------- 1. correct


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """‖ours - reference‖ / ‖reference‖, in float64."""
    ours, reference = ours.detach().cpu().double(), reference.detach().cpu().double()
    return float((ours - reference).norm() / reference.norm())


def check_transitions(device: torch.device, tiny: bool) -> tuple[float, float]:
    """How many of 100,000 transitions, with their autoresets, differ."""
    num, steps = (50, 40) if tiny else (1000, 100)
    settings = {"size": 7, "num_boxes": 2, "max_episode_steps": 40}
    here, there = SokobanVectorEnv(num, backend="torch", **settings), SokobanVectorEnv(num, device=device, **settings)
    different = (here.reset(seed=1)[0] != there.reset(seed=1)[0].cpu()).flatten(1).any(1).sum()
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        actions = torch.randint(5, (num,), generator=rng)
        both = [(*out[:4], out[4].get("final_obs", out[0])) for out in (here.step(actions), there.step(actions))]
        wrong = [(a != b.cpu()).flatten(1 if a.ndim > 1 else 0) for a, b in zip(*both, strict=True)]
        different += sum(w.any(1) if w.ndim > 1 else w.int() for w in wrong).bool().sum()
    return float(different), 0.0


def check_levels(device: torch.device, tiny: bool) -> tuple[float, float]:
    """How many of 2,000 generated levels, or of their solutions, differ."""
    number = 20 if tiny else 2000
    (levels, solutions), (ours, our_solutions) = (
        generate_levels(number, size=10, num_boxes=4, seed=1, device=d) for d in (CPU, device)
    )
    different = (levels != ours.cpu()).flatten(1).any(1)
    return float(different.sum()) + sum(a != b for a, b in zip(solutions, our_solutions, strict=True)), 0.0


def check_networks(device: torch.device, tiny: bool) -> Iterator[tuple[str, float, float]]:
    """Imagined rollouts, outputs, returns, and the losses and gradients of an update, on the same weights and data."""
    args = i2a.parse_args(["--num-envs", "8" if tiny else "64"])
    torch.manual_seed(1)
    here = i2a.make_networks(args, CPU)
    there = copy.deepcopy(here).to(device)
    envs = i2a.make_envs(args, args.num_envs, None, CPU)
    frames = i2a.as_frames(envs.reset(seed=1)[0], args.frame_stack)
    rows, *_, frames, _ = i2a.rollout(args, here, envs, frames, torch.Generator().manual_seed(1))

    dreams = [i2a.imagine(networks, frames.to(device), 3, None, True) for networks in (there,)]
    expected = i2a.imagine(here, frames, 3, None, True)
    wrong = (dreams[0][0].cpu() != expected[0]).flatten(3).any(3).float().mean()
    yield "imagined frames that differ, share", float(wrong), 0.01  # a tie may fall either way
    outputs = [here["agent"](frames, expected), there["agent"](frames.to(device), [x.to(device) for x in expected])]
    for name, ours, reference in zip(("logits", "values"), outputs[1], outputs[0], strict=True):
        yield name, relative(ours, reference), 1e-4
    rewards, values, next_values = torch.randn(3, 32, 64)
    done = torch.rand(32, 64) < 0.1
    inputs = rewards, values, next_values, done & (rewards > 0), done
    advantages = [i2a.generalized_advantages(*(x.to(d) for x in inputs), 0.97, 0.95) for d in (CPU, device)]
    yield "advantages", relative(*advantages[::-1]), 1e-5
    losses = []
    for networks, d in ((here, CPU), (there, device)):
        groups = [{"params": list(networks[name].parameters())} for name in ("agent", "rollout_policy")]
        losses.append(i2a.update(args, networks, torch.optim.SGD(groups, 1e-3), [x.to(d) for x in rows], 3))
    yield "losses", relative(*losses[::-1]), 1e-4
    for name in ("agent", "rollout_policy"):
        grads = [torch.cat([p.grad.flatten().cpu() for p in n[name].parameters()]) for n in (there, here)]
        yield f"gradient of the {name}", relative(*grads), 1e-3


def check_graph(device: torch.device, tiny: bool) -> tuple[float, float]:
    """Rows of six rollouts that differ if acting is replayed as a CUDA graph."""
    args = i2a.parse_args(["--num-envs", "8" if tiny else "64", "--max-episode-steps", "32"])
    i2a.seed_everything(1, True)
    networks, made = i2a.make_networks(args, device), []
    for graph in (False, True):
        rng, envs = torch.Generator(device).manual_seed(1), i2a.make_envs(args, args.num_envs, None, device)
        frames = i2a.as_frames(envs.reset(seed=1)[0], args.frame_stack)
        act = functools.partial(i2a.rollout, args, networks, envs, rng=rng)
        act = i2a.Captured(act, rng) if graph and device.type == "cuda" else act
        batches = []
        for _ in range(6):
            batch, _, frames, _ = act(frames)
            envs.refill()
            batches.append([x.clone() for x in batch])
        made.append(batches)
    pairs = [(a, b) for batches in zip(*made, strict=True) for a, b in zip(*batches, strict=True)]
    return float(sum((a != b).flatten(1).any(1).sum() if a.ndim > 1 else (a != b).sum() for a, b in pairs)), 0.0


def run(args: Args, folder: str, command: str, on_cpu: bool = False) -> str:
    """Run a script with its flags in a folder; returns what it printed, or raises."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if on_cpu or args.device == "cpu" else {}
    environment = os.environ | hidden | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    script, *flags = shlex.split(command)
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *flags],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{script}: {done.stderr[-300:]}")
    return done.stdout


def check_checkpoint(args: Args, tiny_flags: str) -> Iterator[tuple[str, float, float]]:
    """A run goes from the CPU to the device, into a graph there, back to the CPU, and is evaluated on the device."""
    with tempfile.TemporaryDirectory() as folder:
        run(args, folder, f"i2a.py {tiny_flags}", on_cpu=True)
        (path,) = pathlib.Path(folder).glob("runs/*/checkpoint.pt")
        frames, graph = 1128, ["--cuda-graph"] * (args.device == "cuda")
        for name, on_cpu, flags in (("on", False, []), ("graph", False, graph), ("back", True, ["--no-cuda-graph"])):
            frames += 512
            before = len(read_rows(path.with_name("metrics.csv")))
            run(
                args,
                folder,
                shlex.join(["i2a.py", "--resume", str(path), f"--total-timesteps={frames}", *flags]),
                on_cpu,
            )
            more = len(read_rows(path.with_name("metrics.csv"))) - before
            yield f"a checkpoint goes on: {name}", float(more < 1), 0.0
        text = run(args, folder, f"i2a.py --evaluate {path.with_name('agent.pt')}")
        yield "--evaluate", float("eval/solved" not in text), 0.0


def correct(args: Args, deadline: float) -> None:
    table, device = Table(args, "correct"), torch.device(args.device)
    exactly(True)

    def attempt(name: str, check: Callable[[], Any]) -> None:
        """Add the check's row, or its rows, or what it raised."""
        try:
            found = check()
            for what, value, limit in [(name, *found)] if isinstance(found, tuple) else found:
                table.add(check=what, value=value, limit=limit, passed=value <= limit)
        except Exception as e:
            table.add(check=name, value="", limit="", passed=False, error=repr(e)[-400:])

    attempt("transitions that differ", lambda: check_transitions(device, args.tiny))
    attempt("levels that differ", lambda: check_levels(device, args.tiny))
    attempt("networks", lambda: check_networks(device, args.tiny))
    attempt("rows that differ under a CUDA graph", lambda: check_graph(device, args.tiny))
    attempt("checkpoints", lambda: check_checkpoint(args, tiny_runs()["i2a.py"]))
    scripts = {name: flags for name, flags in tiny_runs().items() if not args.tiny}

    def runs(script: str) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            run(args, folder, f"{script} {scripts[script]}")
        return 0.0, 0.0

    with ThreadPoolExecutor(4 if args.device == "cuda" else 1) as pool:
        for script in scripts:
            pool.submit(attempt, f"the shortest run of {script}", functools.partial(runs, script))


# ------------------------------------------------------------------------------------------------------------- 2. fast


def exactly(exact: bool) -> None:
    """Float32 products in float32, or with TF32's 10 bits of mantissa."""
    torch.set_float32_matmul_precision("highest" if exact else "high")
    torch.backends.cudnn.allow_tf32 = not exact


def seconds(work: Callable[[], Any], device: torch.device, at_least: float) -> float:
    """The mean time of a call, after the caller's warm-up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    calls, start = 0, time.perf_counter()
    while not calls or time.perf_counter() - start < at_least:
        work()
        wait()
        calls += 1
    return (time.perf_counter() - start) / calls


def peaks(device: torch.device, tiny: bool) -> dict[str, float]:
    """Floating-point operations a second of a large matrix product at each precision, and bytes copied a second."""
    size, found = 256 if tiny else 8192, {}
    for name, kind in (("float32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        exactly(name == "float32")
        a, b = torch.randn(2, size, size, device=device).to(kind)
        for _ in range(3):
            a @ b
        found[name] = 2 * size**3 / seconds(lambda a=a, b=b: [a @ b for _ in range(10)], device, 0.2) * 10
    a = torch.randn(size * size * (1 if tiny else 8), device=device)
    b = torch.empty_like(a)
    found["copy"] = 2 * a.nbytes / seconds(lambda: b.copy_(a), device, 0.2)
    return found


def env_steps(num: int, graph: bool, endless: bool, device: torch.device, tiny: bool) -> float:
    """Steps a second of 10x10 rooms with four boxes, in rounds of 32."""
    levels = None if endless else generate_levels(20 if tiny else 1000, seed=1)[0]
    envs = SokobanVectorEnv(num, levels=levels, device=device)
    envs.reset(seed=1)
    actions = torch.randint(5, (32, num), device=device)

    def work() -> None:
        for action in actions:
            envs.step(action)

    for _ in range(2):
        work()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            work()
    again = (lambda: (captured.replay(), envs.refill())) if graph else work
    again()
    return 32 * num / seconds(again, device, 0.1 if tiny else 1.0)


def i2a_frames(flags: str, mode: set[str], device: torch.device, tiny: bool, maximum: dict[str, float]) -> dict:
    """Frames a second of i2a.py's loop, on an untrained agent (the same work), and where its time goes."""
    args = i2a.parse_args(flags.split())
    i2a.seed_everything(1, "deterministic" in mode)
    precision = "bf16" if args.bf16 else "float32" if "float32" in mode else "tf32"
    exactly(precision == "float32")
    graph, rng = "graph" in mode and device.type == "cuda", torch.Generator(device).manual_seed(1)
    networks, envs = i2a.make_networks(args, device), i2a.make_envs(args, args.num_envs, None, device)
    for network in networks.values() if "compile" in mode else ():
        network.compile()
    names = ("agent", "rollout_policy") if args.agent == "i2a" else ("agent",)
    groups = [{"params": list(networks[name].parameters())} for name in names]
    rate = torch.tensor(1e-3, device=device) if graph else 1e-3
    optimizer = torch.optim.Adam(groups, rate, eps=1e-5, fused=True, capturable=graph)
    act = functools.partial(i2a.rollout, args, networks, envs, rng=rng)
    learn = functools.partial(i2a.update, args, networks, optimizer)
    if graph:
        act, learn = i2a.Captured(act, rng), i2a.Captured(learn, rng)
    frames, size = i2a.as_frames(envs.reset(seed=1)[0], args.frame_stack), args.num_steps * args.num_envs

    def iteration() -> None:
        nonlocal frames
        batch, _, frames, _ = act(frames)
        if graph:
            envs.refill()
        which = 0
        for _ in range(args.update_epochs):
            for index in torch.randperm(size, generator=rng, device=device).tensor_split(args.num_minibatches):
                learn([x[index] for x in batch], which % 8 if args.symmetry else 0)
                which += 1

    with FlopCounterMode(display=False) if "compile" not in mode else contextlib.nullcontext() as counter:
        iteration()
    for _ in range(0 if tiny else 3):
        iteration()
    took = seconds(iteration, device, 0.0 if tiny else 2.0)
    row: dict[str, Any] = {"value": size / took, "unit": "frames/s", "precision": precision}
    if counter:
        flop = counter.get_total_flops()
        row |= {"mflop_per_frame": flop / size / 1e6, "share_of_peak": flop / took / maximum[precision]}
    if device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            iteration()
            torch.cuda.synchronize()
        times: Counter[str] = Counter()
        kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        for event in kernels:
            times[event.name] += event.time_range.elapsed_us() / 1e6
        row |= {"kernels_per_frame": len(kernels) / size, "idle": max(0.0, 1 - sum(times.values()) / took)}
        row["top"] = "; ".join(f"{t / sum(times.values()):.0%} {name[:60]}" for name, t in times.most_common(4))
        row["gib"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    return row


def fast(args: Args, deadline: float) -> None:
    table, device = Table(args, "fast"), torch.device(args.device)
    maximum = peaks(device, args.tiny)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    for what, value in maximum.items():
        unit = "bytes/s" if what == "copy" else "flop/s"
        table.add(what=f"peak, {what}", envs="", mode=f"{name}, torch {torch.__version__}", value=value, unit=unit)

    def attempt(what: str, envs: int, mode: str, measure: Callable[[], dict]) -> None:
        if time.time() > deadline:
            print(f"no time for {what}, {envs}, {mode}", flush=True)
            return
        try:
            table.add(what=what, envs=envs, mode=mode, **measure())
        except Exception as e:
            table.add(what=what, envs=envs, mode=mode, value="", error=repr(e)[-300:])
        if device.type == "cuda":
            torch.cuda.empty_cache()

    i2a.seed_everything(1, False)
    few = args.tiny or device.type == "cpu"
    graphs = (False,) if device.type == "cpu" else (True, False)
    for num in (64,) if args.tiny else (16_384, 1024, 4096, 65_536):
        for graph in graphs:
            for endless in (False, True) if num <= 16_384 else (False,):
                measure = lambda n=num, g=graph, e=endless: {  # noqa: E731
                    "value": env_steps(n, g, e, device, args.tiny), "unit": "steps/s"
                }  # fmt: skip
                attempt("steps, endless" if endless else "steps", num, "graph" if graph else "eager", measure)

    def levels() -> dict:
        """A new environment fills its ring with two levels for each environment, at least."""
        envs = SokobanVectorEnv(64 if args.tiny else 8192, device=device)
        return {"value": 2 * envs.num_envs / seconds(lambda: envs.reset(seed=1), device, 0.0), "unit": "levels/s"}

    attempt("levels of the generator", 64 if args.tiny else 8192, "", levels)
    agents = {"model-free": "--agent model-free", "depth 3": ""}
    if not few:
        agents |= {f"depth {depth}": f"--imagination-depth {depth}" for depth in (1, 5, 10)}
    cases = [(agent, num, "graph") for num in ((8,) if args.tiny else (4096, 1024, 256)) for agent in agents]
    modes = ("eager", "eager deterministic", "graph deterministic", "graph float32", "graph bf16", "graph compile bf16")
    cases += [
        (agent, 8 if args.tiny else 4096, mode) for mode in modes[: 2 if few else None] for agent in [*agents][:2]
    ]
    for agent, num, mode in cases:
        flags = f"{FLAGSHIP} {agents[agent]} --num-envs {num}" + " --bf16" * ("bf16" in mode)
        flags += " --num-steps 4 --num-minibatches 2 --update-epochs 1" * args.tiny
        attempt(agent, num, mode, functools.partial(i2a_frames, flags, {*mode.split()}, device, args.tiny, maximum))


# ------------------------------------------------------------------------------------------------------------ 3. learn


def learn(args: Args, deadline: float) -> None:
    output, table = pathlib.Path(args.output).resolve(), Table(args, "learn")
    flags = tiny_runs()["i2a.py"] if args.tiny else args.train
    if args.checkpoint:
        flags = f"--resume {pathlib.Path(args.checkpoint).resolve()} --total-timesteps 1000000000"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "i2a.py"), *shlex.split(flags)]
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
        process = subprocess.Popen(command, cwd=folder, env=os.environ | hidden)
        try:
            process.wait(max(1.0, deadline - time.time() - (5 if args.tiny else 40)))  # and the rest for the evaluation
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # its last checkpoint and rows are whole
            process.wait(20)
        (path,) = pathlib.Path(folder).glob("runs/*/checkpoint.pt")
        for row in read_rows(path.with_name("metrics.csv")):
            table.rows.append(row)
        shutil.copy(path, output / "gpu_checkpoint.pt")
        text = run(args, folder, f"i2a.py --evaluate {path}")
        table.add(global_step=table.rows[-1]["global_step"], **json.loads(text[text.index("{") : text.rindex("}") + 1]))


def main(args: Args) -> None:
    start = time.time()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no GPU; --device cpu --tiny shows that the command runs")
    pathlib.Path(args.output).mkdir(parents=True, exist_ok=True)
    i2a.keep_freed_memory()
    ends = {"correct": 0.3, "fast": 0.6, "learn": 1.0}
    for name, part in (("correct", correct), ("fast", fast), ("learn", learn)):
        if name in args.parts:
            part(args, start + 60 * args.minutes * (ends[name] if len(args.parts) > 1 else 1.0))
            print(f"{name}: until second {time.time() - start:.0f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
