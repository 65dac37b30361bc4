"""How fast the Sokoban environment steps and makes levels on one thread, beside its peers and its bounds.

    OMP_NUM_THREADS=1 python benchmark/env_speed.py
    OMP_NUM_THREADS=1 python benchmark/env_speed.py --peer-pythons PATH/bin/python OTHER_PATH/bin/python
    OMP_NUM_THREADS=1 python benchmark/env_speed.py --seconds 0.05 --repeats 1 --output /dev/null   # does it run?

Stepping is by random actions, handed in as tensors, on a fixed pool of 10x10 levels with 4 boxes. The step counters
start at random, so that from the first step on episodes end (and new ones begin) spread out, as in a long run. A rate
is measured `--repeats` times for `--seconds` each, and its best and its median are given.

A peer python is an interpreter in whose environment gym-sokoban or Jumanji is installed; each runs a short script in
the same run, on the same levels and one core. Jumanji steps in a compiled scan: "auto-reset" is with its
VmapAutoResetWrapper, which does what our environments do; "never reset" goes on behind the end of each episode.
"""

import csv
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import sokoban_env  # noqa: F401  (registers Sokoban-v0)
from sokoban_env import SokobanVectorEnv, generate_levels

LIMIT = 120  # steps of an episode
NUM_ACTIONS = 64  # batches of random actions, used in turn


@dataclass
class Args:
    peer_pythons: tuple[str, ...] = ()
    """interpreters in which gym-sokoban or Jumanji may be installed"""
    seconds: float = 0.4
    """how long one measurement takes"""
    repeats: int = 5
    """measurements of each rate"""
    num_levels: int = 1000
    """levels in the fixed pool"""
    peer_seconds: float = 60.0
    """how long gym-sokoban may generate 10x10 levels (it needs seconds for each)"""
    seed: int = 1
    """seed of levels and actions"""
    output: str = "benchmark/results/env_speed.csv"
    """where the table goes"""


@dataclass
class Row:
    """One rate; `peer` names what it is compared with, on a row of its own."""

    what: str
    envs: int
    best: float
    median: float
    unit: str = "steps/s"
    target: float | None = None
    package: str = "ours"


# ------------------------------------------------------------------------------------------------------------- ours


def rate(work: Callable[[], int], args: Args) -> tuple[float, float]:
    """Best and median number per second of what `work()` does, which returns how many that were."""
    work()
    rates = []
    for _ in range(args.repeats):
        done, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < args.seconds or not done:
            done += work()
        rates.append(done / elapsed)
    return max(rates), statistics.median(rates)


def spread_out(envs: SokobanVectorEnv, args: Args) -> None:
    """Reset, and give each environment a random number of steps already made."""
    envs.reset(seed=args.seed)
    state = envs.get_state(pool=False)
    rng = torch.Generator().manual_seed(args.seed)
    state["steps"] = torch.randint(LIMIT, (envs.num_envs,), generator=rng).to(envs.device)
    envs.set_state(state)


def stepper(envs: SokobanVectorEnv, args: Args) -> Callable[[], int]:
    rng = torch.Generator().manual_seed(args.seed)
    actions = list(torch.randint(5, (NUM_ACTIONS, envs.num_envs), generator=rng).to(envs.device))

    def work() -> int:
        for action in actions:
            envs.step(action)
        if envs.device.type == "cuda":
            torch.cuda.synchronize()
        return NUM_ACTIONS * envs.num_envs

    return work


def step_rate(num_envs: int, args: Args, *, ends: bool = True, **kwargs: Any) -> tuple[float, float]:
    envs = SokobanVectorEnv(num_envs, max_episode_steps=LIMIT if ends else None, **kwargs)
    spread_out(envs, args)
    return rate(stepper(envs, args), args)


def single_rate(levels: torch.Tensor, args: Args) -> tuple[float, float]:
    env = gym.make("Sokoban-v0", levels=levels)
    env.reset(seed=args.seed)
    actions = np.random.default_rng(args.seed).integers(5, size=1024).tolist()

    def work() -> int:
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        return len(actions)

    return rate(work, args)


def generation_rate(size: int, num_boxes: int, num: int, args: Args) -> tuple[float, float]:
    seeds = iter(range(args.seed, 10**9))

    def work() -> int:
        generate_levels(num, size=size, num_boxes=num_boxes, seed=next(seeds))
        return num

    return rate(work, args)


def endless_rate(args: Args) -> tuple[float, float]:
    """Each reset of an environment without `levels` waits for fresh ones, and does nothing else that takes long."""
    envs = SokobanVectorEnv(1000)
    envs.reset(seed=args.seed)

    def work() -> int:
        envs.reset()
        return envs.num_envs

    return rate(work, args)


def our_rows(levels: torch.Tensor, args: Args) -> Iterator[Row]:
    targets = {1: 20e3, 64: 0.8e6, 1024: 8e6, 4096: 14e6}
    for num_envs, target in targets.items():
        for copy in (True, False):
            what = f"step, cells, {'copies' if copy else 'views'}"
            yield Row(what, num_envs, *step_rate(num_envs, args, levels=levels, copy=copy), target=target)
    for num_envs in (64, 1024, 4096):
        best, median = step_rate(num_envs, args, levels=levels, ends=False)
        yield Row("step, cells, copies, no episode ends", num_envs, best, median)
    yield Row("step, cells, copies, endless levels", 64, *step_rate(64, args))
    for copy in (True, False):
        what = f"step, rgb, {'copies' if copy else 'views'}"
        yield Row(what, 1024, *step_rate(1024, args, levels=levels, copy=copy, observation="rgb"), target=0.5e6)
    best, median = step_rate(1024, args, levels=levels, observation="tiny_rgb")
    yield Row("step, tiny_rgb, copies", 1024, best, median)
    yield Row("step, cells, gymnasium.make", 1, *single_rate(levels, args), target=20e3)
    for observation in ("rgb", "tiny_rgb"):  # what gym-sokoban does
        best, median = step_rate(1, args, levels=levels, observation=observation)
        yield Row(f"step, {observation}, copies", 1, best, median)
    best, median = generation_rate(10, 4, 1000, args)
    yield Row("generate 10x10, 4 boxes, with solutions", 0, best, median, "levels/s", 1e3)
    best, median = generation_rate(7, 1, 5000, args)
    yield Row("generate 7x7, 1 box, with solutions", 0, best, median, "levels/s", 10e3)
    best, median = generation_rate(7, 2, 5000, args)
    yield Row("generate 7x7, 2 boxes, with solutions", 0, best, median, "levels/s")
    yield Row("generate 10x10, 4 boxes, endless environment", 0, *endless_rate(args), "levels/s")
    if torch.cuda.is_available():
        for num_envs in (1024, 4096, 16384):
            best, median = step_rate(num_envs, args, levels=levels, device="cuda")
            yield Row(f"step, cells, copies, on {torch.cuda.get_device_name()}", num_envs, best, median)


# ------------------------------------------------------------------------------------------------------------ bounds


class Operations(TorchDispatchMode):
    """Counts what the code that runs under it does to arrays: operations by kind, bytes moved, single cells fetched."""

    KINDS = {
        "fetch": ("index", "take", "index_put_", "_index_put_impl_"),
        "reduction": ("any", "all", "sum", "argmax"),
        "choice": ("where", "nonzero"),
        "copy": ("clone", "_to_copy", "zeros", "zeros_like", "arange", "cat", "stack", "copy_"),
        "view": (
            "view",
            "reshape",
            "select",
            "slice",
            "alias",
            "permute",
            "unsqueeze",
            "squeeze",
            "expand",
            "unbind",
            "empty_like",
        ),
        "nothing": ("detach", "movedim", "lift_fresh", "scalar_tensor", "_local_scalar_dense"),  # in numpy
    }  # all others are arithmetic

    def __init__(self) -> None:
        super().__init__()
        self.count, self.bytes, self.cells = Counter(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        kind = next((kind for kind, names in self.KINDS.items() if name in names), "arithmetic")
        if kind == "nothing":
            return result
        self.count[kind] += 1
        tensors = [x for x in torch.utils._pytree.tree_leaves([args, kwargs, result]) if isinstance(x, torch.Tensor)]
        if kind == "fetch":  # by one index, or put by it; a whole board counts as one cell, and then as bytes
            values = tensors[-2] if name.startswith(("index_put", "_index_put")) else result
            self.cells += tensors[1].numel()
            self.bytes += 2 * values.nbytes if values.numel() > tensors[1].numel() else 0
        elif kind != "view":
            self.bytes += sum(tensor.nbytes for tensor in tensors[: 2 if name == "copy_" else None])  # it returns one
        return result


def count_operations(num_envs: int, observation: str, levels: torch.Tensor, args: Args) -> tuple[Counter, float, float]:
    """Operations by kind, bytes and fetched cells of one step: means over steps in which episodes end as in a long run.

    The environment's one text runs on either backend. The count is taken from the torch backend, whose operations can
    be listed as they happen; the numpy backend does the same ones, except that it draws only what moved.
    """
    envs = SokobanVectorEnv(num_envs, levels=levels, observation=observation, backend="torch")
    spread_out(envs, args)
    actions = torch.randint(5, (LIMIT, num_envs), generator=torch.Generator().manual_seed(args.seed))
    with Operations() as operations:
        for action in actions:
            returned = torch.utils._pytree.tree_leaves(envs.step(action))
            operations.count["conversion"] += 1 + sum(isinstance(x, torch.Tensor) for x in returned)  # in and out
    count = Counter({kind: number / LIMIT for kind, number in operations.count.items()})
    return count, operations.bytes / LIMIT, operations.cells / LIMIT


def best_time(statement: Callable[[], Any], loops: int) -> float:
    """Seconds that a call takes, at best."""
    times = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(loops):
            statement()
        times.append((time.perf_counter() - start) / loops)
    return min(times)


def bounds(levels: torch.Tensor, rates: dict[tuple[str, int], float], args: Args) -> list[list[Any]]:
    """A table with its header: how long a step takes, beside the time of three things that it can't do without.

    Dispatch: its array operations, each at what numpy needs for one of that kind on a single element (a call, checks,
    an allocation, no work to speak of), and the conversions between torch and numpy. A small batch pays this. Fetch:
    the single cells and table entries that are read or written by index. Memory: the bytes that all other operations
    read and write, at the bandwidth of copying an array as large as all observations, which is in cache where they
    are. A large batch pays these two. They are estimates, rather from below: Python between the operations is left
    out, and arithmetic that is slower than a copy of its bytes.
    """
    one, flag, index = np.ones(1, dtype=np.int64), np.ones(1, dtype=bool), np.zeros((3, 1), dtype=np.int64)
    tensor = torch.zeros(1, dtype=torch.int64)
    cost = {
        "arithmetic": best_time(lambda: one + 1, 20_000),
        "reduction": best_time(lambda: flag.any(), 20_000),
        "choice": best_time(lambda: np.where(flag, one, one), 20_000),
        "fetch": best_time(lambda: one[index], 20_000),
        "copy": best_time(lambda: one.copy(), 20_000),
        "view": best_time(lambda: one[:1], 20_000),
        "conversion": best_time(lambda: torch.from_numpy(np.asarray(tensor)), 20_000) / 2,
    }
    empty = best_time(lambda: None, 20_000)  # the call of the lambda itself
    cost = {kind: seconds - empty for kind, seconds in cost.items()}
    flat, spread = np.ones(4096 * 100, dtype=np.uint8), np.arange(4096) * 100 + np.array([[11], [12], [13]])
    cell_cost = best_time(lambda: flat[spread], 2000) / spread.size
    print(
        "\nnumpy, measured: "
        + ", ".join(f"{kind} {1e6 * seconds:.2f} µs" for kind, seconds in cost.items())
        + f" an operation on one element; {1e9 * cell_cost:.2f} ns a cell fetched"
    )
    header = "copies of;envs;step, µs;operations;dispatch, µs;cells fetched;fetch, µs;kB moved;copying, GB/s;memory, µs"
    table: list[list[Any]] = [[*header.split(";"), "step / sum"]]
    for (observation, num_envs), best in rates.items():
        count, moved, cells = count_operations(num_envs, observation, levels, args)
        dispatch = sum(number * cost[kind] for kind, number in count.items())
        frame = levels[0].numel() * {"cells": 1, "rgb": 3 * 64}[observation]
        source = np.ones(max(64, num_envs) * frame, dtype=np.uint8)  # of fewer a copy is all dispatch
        target = source.copy()
        loops = max(10, 2 * 10**8 // source.nbytes // 10)
        bandwidth = 2 * source.nbytes / best_time(lambda s=source, t=target: np.copyto(t, s), loops)
        memory, fetch, step = moved / bandwidth, cells * cell_cost, num_envs / best
        figures = [1e6 * step, sum(count.values()), 1e6 * dispatch, cells, 1e6 * fetch, moved / 1e3, bandwidth / 1e9]
        figures += [1e6 * memory, step / (dispatch + fetch + memory)]
        table.append([observation, num_envs, *(f"{figure:.4g}" for figure in figures)])
    return table


# ------------------------------------------------------------------------------------------------------------- peers

# Each prints a line of JSON for each rate: [package, what, envs, best, median, unit]. `given` is what the parent hands
# in. gym-sokoban is of 2018: what it needs from old numpy and setuptools is put back before the import.
PEER_HEAD = r"""
import json, os, statistics, sys, time, warnings
warnings.filterwarnings("ignore")
given = json.load(sys.stdin)
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core, for compilers that bring their own threads

def rate(work):
    work()
    rates = []
    for _ in range(given["repeats"]):
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < given["seconds"] or not done:
            done += work()
        rates.append(done / (time.perf_counter() - start))
    return max(rates), statistics.median(rates)

def report(*values):
    print(json.dumps(values), flush=True)
"""

GYM_SOKOBAN = r"""
import signal, types
import numpy as np
if not hasattr(np, "bool8"):
    np.bool8 = np.bool_
try:
    import pkg_resources
except ImportError:
    sys.modules["pkg_resources"] = module = types.ModuleType("pkg_resources")
    module.resource_filename = lambda package, path: os.path.join(os.path.dirname(sys.modules[package].__file__), path)
try:
    import gym_sokoban
    from gym_sokoban.envs import room_utils
    from gym_sokoban.envs.sokoban_env import SokobanEnv
except ImportError:
    sys.exit()
try:
    from importlib.metadata import version
    package = "gym-sokoban " + version("gym-sokoban")
except Exception:
    package = "gym-sokoban"

levels = np.array(given["levels"])
fixed = np.where(levels == 0, 0, np.where((levels == 2) | (levels == 4) | (levels == 6), 2, 1))
state = np.select([levels == 3, levels == 4, levels >= 5], [4, 3, 5], levels)  # its codes
numbers = iter(range(10**9))

def reset(env):  # as SokobanEnv.reset, but with a level that is there already
    i = next(numbers) % len(levels)
    env.room_fixed, env.room_state = fixed[i].copy(), state[i].copy()
    env.player_position = np.argwhere(env.room_state == 5)[0]
    env.num_env_steps = env.reward_last = env.boxes_on_target = 0

for mode in ("rgb", "tiny_rgb"):
    env = SokobanEnv(dim_room=(10, 10), num_boxes=4, max_steps=120, reset=False)
    reset(env)
    actions = np.random.default_rng(given["seed"]).integers(5, size=100).tolist()

    def work():
        for action in actions:
            if env.step(action, observation_mode=mode + "_array")[2]:
                reset(env)
        return len(actions)

    report(package, "step, " + mode, 1, *rate(work), "steps/s")

class Stop(Exception):
    pass

def stop(*_):
    raise Stop

signal.signal(signal.SIGALRM, stop)
for size, boxes, seconds in ((10, 4, given["peer_seconds"]), (7, 2, min(5.0, given["peer_seconds"]))):
    done, start = 0, time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        while True:  # with the number of steps that SokobanEnv takes; it fails at some rooms
            try:
                room_utils.generate_room(dim=(size, size), num_steps=int(1.7 * 2 * size), num_boxes=boxes)
                done += 1
            except (RuntimeError, RuntimeWarning):
                pass
    except Stop:
        pass
    mean = done / (time.perf_counter() - start)
    report(package, f"generate {size}x{size}, {boxes} boxes", 0, mean, mean, "levels/s")
"""

JUMANJI = r"""
try:
    import jax
    import numpy as np
    from jumanji.environments.routing.sokoban import Sokoban
    from jumanji.environments.routing.sokoban.generator import HuggingFaceDeepMindGenerator
    from jumanji.wrappers import VmapAutoResetWrapper, VmapWrapper
except ImportError:
    sys.exit()
try:
    from importlib.metadata import version
    package = "Jumanji " + version("jumanji")
except Exception:
    package = "Jumanji"
jax.config.update("jax_platforms", "cpu")
levels = np.array(given["levels"])

class Pool(HuggingFaceDeepMindGenerator):  # its default generator, but with our levels instead of a download
    def __init__(self):
        self._fixed_grids = jax.numpy.array(np.select([levels == 0, (levels == 2) | (levels == 6)], [1, 2]), "uint8")
        self._variable_grids = jax.numpy.array(np.select([levels == 3, levels >= 5], [4, 3]), "uint8")

base = Sokoban(generator=Pool())
key = jax.random.PRNGKey(given["seed"])
for what, envs in (("auto-reset", VmapAutoResetWrapper(base)), ("never reset", VmapWrapper(base))):
    for num in given["num_envs"]:
        length = max(16, 65536 // num)
        actions = jax.random.randint(key, (length, num), 0, 4)

        def body(carry, action):  # the time step, with its observation, is carried, so that it has to be built
            return envs.step(carry[0], action), None

        run = jax.jit(lambda carry: jax.lax.scan(body, carry, actions)[0])
        carry = jax.block_until_ready(run(jax.jit(envs.reset)(jax.random.split(key, num))))

        def work():
            global carry
            carry = jax.block_until_ready(run(carry))
            return length * num

        work()
        report(package, "step, " + what, num, *rate(work), "steps/s")
"""


def peer_rows(python: str, levels: torch.Tensor, args: Args) -> Iterator[Row]:
    """What one interpreter's packages do; nothing if it has neither."""
    given = {
        "levels": levels.tolist(),
        "num_envs": [64, 1024, 4096],
        "seconds": args.seconds,
        "repeats": args.repeats,
        "peer_seconds": args.peer_seconds,
        "seed": args.seed,
    }
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    found = False
    for name, script in (("gym_sokoban", GYM_SOKOBAN), ("jumanji", JUMANJI)):
        try:
            run = subprocess.run(
                [python, "-c", PEER_HEAD + script],
                input=json.dumps(given),
                capture_output=True,
                text=True,
                env={**os.environ, **single},
                timeout=args.peer_seconds + 300,
                check=False,
            )
        except subprocess.TimeoutExpired:
            print(f"{name} in {python} did not end", file=sys.stderr)
            found = True
            continue
        for line in run.stdout.splitlines():
            if line.startswith("["):
                package, what, envs, best, median, unit = json.loads(line)
                found = True
                yield Row(what, envs, best, median, unit, package=package)
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"{name} in {python} failed: {reason}", file=sys.stderr)
            found = True
    if not found:
        print(f"{python} can import neither gym_sokoban nor jumanji", file=sys.stderr)


# What of ours is compared with what of a peer's: same number of environments, or what is named.
COMPARE = {
    "step, auto-reset": "step, cells, copies",
    "step, never reset": "step, cells, copies, no episode ends",
    "step, rgb": "step, rgb, copies",
    "step, tiny_rgb": "step, tiny_rgb, copies",
    "generate 10x10, 4 boxes": "generate 10x10, 4 boxes, with solutions",
    "generate 7x7, 2 boxes": "generate 7x7, 2 boxes, with solutions",
}


def comparisons(rows: list[Row]) -> list[tuple[Row, Row, float]]:
    """Each peer's row with ours that it is compared with, and the ratio of the best rates."""
    result = []
    for peer in rows:
        if peer.package != "ours":
            result += [
                (peer, own, own.best / peer.best if peer.best else float("inf"))
                for own in rows
                if own.package == "ours"
                and own.what == COMPARE[peer.what]
                and own.envs in ((peer.envs,) if peer.envs != 1 else (1, 1024))
            ]
    return result


# ------------------------------------------------------------------------------------------------------------ report


def hardware() -> dict[str, Any]:
    cpu = platform.processor() or "unknown"
    if pathlib.Path("/proc/cpuinfo").exists():
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return {"cpu": cpu, "cores": os.cpu_count(), **versions}


def amount(value: float | None) -> str:
    """A rate with three digits that count: 23, 48.1 k, 7.91 M."""
    if value is None:
        return ""
    for factor, suffix in ((1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * factor:  # what would be rounded to it counts as well
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.3g}"


def write_csv(path: pathlib.Path, table: list[list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
    os.replace(temporary, path)


def main(args: Args) -> None:
    if args.seconds <= 0 or args.repeats < 1 or args.num_levels < 1 or args.seed < 0 or args.peer_seconds <= 0:
        raise ValueError("seconds and peer_seconds must be above 0, repeats and num_levels at least 1, seed at least 0")
    for python in args.peer_pythons:
        if not os.access(python, os.X_OK) or os.path.isdir(python):
            raise ValueError(f"{python}: no interpreter that can be run")
    torch.set_num_threads(1)
    start = time.perf_counter()
    machine = hardware()
    print(", ".join(f"{name} {value}" for name, value in machine.items()) + ", one thread\n")
    levels, _ = generate_levels(args.num_levels, seed=args.seed)

    rows: list[Row] = []
    for source in (our_rows(levels, args), *(peer_rows(python, levels, args) for python in args.peer_pythons)):
        for row in source:
            rows.append(row)
            envs = f", {row.envs} envs" if row.envs else ""
            print(f"  {row.package}: {row.what}{envs}: {amount(row.best)} {row.unit}", file=sys.stderr)
    print("| what | envs | best | median | unit | target | reached |\n|---|--:|--:|--:|---|--:|---|")
    for row in rows:
        if row.package == "ours":
            reached = "" if row.target is None else "yes" if row.best >= row.target else "NO"
            print(
                f"| {row.what} | {row.envs or ''} | {amount(row.best)} | {amount(row.median)} | {row.unit} | "
                f"{amount(row.target)} | {reached} |"
            )
    compared = comparisons(rows)
    if compared:
        print("\n| peer | what | envs | best | median | ours | envs | best | ratio |")
        print("|---|---|--:|--:|--:|---|--:|--:|--:|")
        for peer, own, ratio in compared:
            print(
                f"| {peer.package} | {peer.what} | {peer.envs or ''} | {amount(peer.best)} | {amount(peer.median)} | "
                f"{own.what} | {own.envs or ''} | {amount(own.best)} | {amount(ratio)} |"
            )
    own = {(row.what, row.envs): row.best for row in rows if row.package == "ours"}
    cases = [("cells", 1), ("cells", 64), ("cells", 1024), ("cells", 4096), ("rgb", 1024)]
    limits = bounds(levels, {case: own[f"step, {case[0]}, copies", case[1]] for case in cases}, args)
    print()
    for row in (limits[0], ["---", *["--:"] * (len(limits[0]) - 1)], *limits[1:]):
        print("| " + " | ".join(map(str, row)) + " |")

    output = pathlib.Path(args.output)
    table = [["package", "what", "envs", "best", "median", "unit", "target", "compared_with", "ratio", *machine]]
    for row in rows:
        pairs = [pair for pair in compared if pair[0] is row] or [(row, None, "")]
        for _, own, ratio in pairs:
            with_ = "" if own is None else f"{own.what}, {own.envs} envs" if own.envs else own.what
            rates = [f"{row.best:.6g}", f"{row.median:.6g}", row.unit, "" if row.target is None else f"{row.target:g}"]
            ratio = ratio if ratio == "" else f"{ratio:.4g}"
            table.append([row.package, row.what, row.envs or "", *rates, with_, ratio, *machine.values()])
    if str(output) != os.devnull:
        write_csv(output, table)
        write_csv(output.with_stem(output.stem + "_bounds"), limits)
    print(f"\nwrote {output} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except OSError as e:
        sys.exit(f"error: {e.filename}: {e.strerror}")
    except ValueError as e:
        sys.exit(f"error: {e}")
