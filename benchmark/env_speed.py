"""How fast the Sokoban environment steps and makes levels on one thread, beside other versions and its peers.

    OMP_NUM_THREADS=1 python benchmark/env_speed.py
    OMP_NUM_THREADS=1 python benchmark/env_speed.py --versions FIRST_EDITION.py    # `git show 7637e5d:sokoban_env.py`
    OMP_NUM_THREADS=1 python benchmark/env_speed.py --peer-pythons PATH/bin/python OTHER_PATH/bin/python

Stepping is by random actions, handed in as tensors, on a fixed pool of 10x10 levels with 4 boxes. The step counters
start at random, so that episodes end (and new ones begin) spread out, as in a long run. A rate is measured `--repeats`
times for `--seconds` each, versions in turn. Seconds are of the processor, so that a busy machine doesn't count.

A peer python is an interpreter in whose environment gym-sokoban or Jumanji is installed; each runs a short script on
the same levels and one core. Jumanji steps in a compiled scan: "auto-reset" is with its VmapAutoResetWrapper, which
does what our environments do; "never reset" goes on behind the end of each episode.
"""

import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import tyro
from common import ROOT, write_rows

LIMIT = 120  # steps of an episode
# What of ours is compared with what of a peer's
COMPARE = {
    "step, auto-reset": "step, cells, copies",
    "step, never reset": "step, cells, copies, no episode ends",
    "step, rgb": "step, rgb, copies",
    "step, tiny_rgb": "step, tiny_rgb, copies",
    "generate 10x10, 4 boxes": "generate 10x10, 4 boxes, with solutions",
    "generate 7x7, 2 boxes": "generate 7x7, 2 boxes, with solutions",
}


@dataclass
class Args:
    versions: tuple[str, ...] = ()  # other sokoban_env.py files, measured in turn with this one
    peer_pythons: tuple[str, ...] = ()  # interpreters in which gym-sokoban or Jumanji may be installed
    seconds: float = 0.4  # how long one measurement takes
    repeats: int = 5  # measurements of each rate
    peer_seconds: float = 60.0  # how long gym-sokoban may generate 10x10 levels (it needs seconds for each)
    seed: int = 1  # of levels and actions
    output: str = "env_speed.csv"  # file under benchmark/results/; none if empty


def load(path: str | pathlib.Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stepping(
    module: types.ModuleType, num_envs: int, args: Args, *, ends: bool = True, true_next: bool = False, **kwargs: Any
) -> Callable:
    """A function that does some work, and returns how much that was."""
    envs = module.SokobanVectorEnv(num_envs, max_episode_steps=LIMIT if ends else None, **kwargs)
    envs.reset(seed=args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    state = envs.get_state(pool=False)
    state["steps"] = torch.randint(LIMIT, (num_envs,), generator=rng)
    envs.set_state(state)
    actions = list(torch.randint(5, (64, num_envs), generator=rng))

    def work() -> int:
        for action in actions:
            observation, *_, info = envs.step(action)
            if true_next and len(info.get("final_obs", observation)) < num_envs:  # as the first edition had it
                info["final_obs"] = observation.clone().index_put_((info["_final_obs"],), info["final_obs"])
        return len(actions) * num_envs

    return work


def single_stepping(module: types.ModuleType, args: Args, **kwargs: Any) -> Callable:
    spec = gym.envs.registration.EnvSpec("Sokoban-v0", entry_point=module._make_single, max_episode_steps=LIMIT)
    env = gym.make(spec, **kwargs)
    env.reset(seed=args.seed)
    actions = np.random.default_rng(args.seed).integers(5, size=256).tolist()

    def work() -> int:
        for action in actions:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                env.reset()
        return len(actions)

    return work


def generating(module: types.ModuleType, num: int, args: Args, **settings: int) -> Callable:
    seeds = iter(range(args.seed, 10**9))
    return lambda: len(module.generate_levels(num, seed=next(seeds), **settings)[0])


def endless(module: types.ModuleType, args: Args) -> Callable:
    """Each reset without `levels` waits for fresh ones, and does nothing else that takes long."""
    envs = module.SokobanVectorEnv(500)
    envs.reset(seed=args.seed)
    return lambda: len(envs.reset()[0])


def cases(module: types.ModuleType, levels: torch.Tensor, args: Args) -> Iterator[tuple[str, Any, Callable]]:
    """What is measured, in how many environments, and the work."""
    fixed = {"args": args, "levels": levels}
    for num_envs in (1, 64, 1024, 4096):
        yield "step, cells, copies", num_envs, stepping(module, num_envs, **fixed)
        yield "step, cells, views", num_envs, stepping(module, num_envs, **fixed, copy=False)
    for num_envs in (64, 1024, 4096):
        yield "step, cells, copies, no episode ends", num_envs, stepping(module, num_envs, **fixed, ends=False)
    yield "step, cells, copies, endless levels", 64, stepping(module, 64, args)
    for num_envs, observation in ((1024, "rgb"), (1024, "tiny_rgb"), (1, "rgb"), (1, "tiny_rgb")):  # 1: gym-sokoban
        yield f"step, {observation}, copies", num_envs, stepping(module, num_envs, **fixed, observation=observation)
    true_next = stepping(module, 1024, **fixed, observation="rgb", true_next=True)
    yield "step, rgb, copies, true next observation of every row", 1024, true_next
    yield "step, rgb, views", 1024, stepping(module, 1024, **fixed, observation="rgb", copy=False)
    yield "step, cells, gymnasium.make", 1, single_stepping(module, **fixed)
    yield "generate 10x10, 4 boxes, with solutions", "", generating(module, 200, args, size=10, num_boxes=4)
    yield "generate 7x7, 1 box, with solutions", "", generating(module, 2000, args, size=7, num_boxes=1)
    yield "generate 7x7, 2 boxes, with solutions", "", generating(module, 2000, args, size=7, num_boxes=2)
    yield "generate 10x10, 4 boxes, endless environment", "", endless(module, args)


def rate(work: Callable[[], int], seconds: float) -> float:
    done, start = 0, time.process_time()
    while (elapsed := time.process_time() - start) < seconds or not done:
        done += work()
    return done / elapsed


def our_rows(args: Args) -> Iterator[dict[str, Any]]:
    modules = {"ours": load(ROOT / "sokoban_env.py")} | {pathlib.Path(path).stem: load(path) for path in args.versions}
    levels, _ = modules["ours"].generate_levels(1000, seed=args.seed)
    for same in zip(*(cases(module, levels, args) for module in modules.values()), strict=True):
        what, envs, _ = same[0]
        for *_, work in same:
            work()  # warms up
        rates = [[rate(work, args.seconds) for *_, work in same] for _ in range(args.repeats)]
        for name, values in zip(modules, zip(*rates, strict=True), strict=True):
            row = {
                "package": name,
                "what": what,
                "envs": envs,
                "best": max(values),
                "median": statistics.median(values),
            }
            yield row | {"unit": "levels/s" if "generate" in what else "steps/s"}


# Each prints a line of JSON for each rate: [package, what, envs, best, median, unit]. `given` is what the parent hands
# in. gym-sokoban is of 2018: what it needs from old numpy and setuptools is put back before the import.
PEER_HEAD = r"""
import json, os, statistics, sys, time, warnings
from importlib.metadata import version
import numpy as np
warnings.filterwarnings("ignore")
given = json.load(sys.stdin)
levels = np.array(given["levels"])
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core, for compilers that bring their own threads

def rate(work):
    work()
    rates = []
    for _ in range(given["repeats"]):
        done, start = 0, time.process_time()
        while time.process_time() - start < given["seconds"] or not done:
            done += work()
        rates.append(done / (time.process_time() - start))
    return max(rates), statistics.median(rates)

def report(*values):
    print(json.dumps(values), flush=True)
"""

GYM_SOKOBAN = r"""
import types
np.bool8 = np.bool_
sys.modules["pkg_resources"] = module = types.ModuleType("pkg_resources")
module.resource_filename = lambda package, path: os.path.join(os.path.dirname(sys.modules[package].__file__), path)
from gym_sokoban.envs import room_utils
from gym_sokoban.envs.sokoban_env import SokobanEnv
package = "gym-sokoban " + version("gym-sokoban")
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

for size, boxes, seconds in ((10, 4, given["peer_seconds"]), (7, 2, min(5.0, given["peer_seconds"]))):
    done, start = 0, time.process_time()
    while time.process_time() - start < seconds:  # with SokobanEnv's number of steps; it fails at some rooms
        try:
            room_utils.generate_room(dim=(size, size), num_steps=int(1.7 * 2 * size), num_boxes=boxes)
            done += 1
        except (RuntimeError, RuntimeWarning):
            pass
    mean = done / (time.process_time() - start)
    report(package, f"generate {size}x{size}, {boxes} boxes", "", mean, mean, "levels/s")
"""

JUMANJI = r"""
import jax
from jumanji.environments.routing.sokoban import Sokoban
from jumanji.environments.routing.sokoban.generator import HuggingFaceDeepMindGenerator
from jumanji.wrappers import VmapAutoResetWrapper, VmapWrapper
jax.config.update("jax_platforms", "cpu")

class Pool(HuggingFaceDeepMindGenerator):  # its default generator, but with our levels instead of a download
    def __init__(self):
        self._fixed_grids = jax.numpy.array(np.select([levels == 0, (levels == 2) | (levels == 6)], [1, 2]), "uint8")
        self._variable_grids = jax.numpy.array(np.select([levels == 3, levels >= 5], [4, 3]), "uint8")

base = Sokoban(generator=Pool())
key = jax.random.PRNGKey(given["seed"])
for what, envs in (("auto-reset", VmapAutoResetWrapper(base)), ("never reset", VmapWrapper(base))):
    for num in (64, 1024, 4096):
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

        report("Jumanji " + version("jumanji"), "step, " + what, num, *rate(work), "steps/s")
"""


def peer_rows(python: str, args: Args) -> Iterator[dict[str, Any]]:
    levels, _ = load(ROOT / "sokoban_env.py").generate_levels(1000, seed=args.seed)
    given = {"levels": levels.tolist(), "seconds": args.seconds, "repeats": args.repeats, "seed": args.seed}
    given["peer_seconds"] = args.peer_seconds
    for module, script in (("gym_sokoban", GYM_SOKOBAN), ("jumanji", JUMANJI)):
        code = f"import importlib.util\nif not importlib.util.find_spec('{module}'):\n    raise SystemExit\n"
        command, single = [python, "-c", code + PEER_HEAD + script], {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            command, input=json.dumps(given), stdout=subprocess.PIPE, text=True, env=os.environ | single, check=True
        )
        for line in run.stdout.splitlines():
            if line.startswith("["):
                yield dict(zip(("package", "what", "envs", "best", "median", "unit"), json.loads(line), strict=True))


def main(args: Args) -> None:
    torch.set_num_threads(1)
    machine = {"cpu": platform.processor() or platform.machine(), "python": platform.python_version()}
    machine |= {"torch": torch.__version__, "numpy": np.__version__}
    rows, ours = [], {}
    for source in (our_rows(args), *(peer_rows(python, args) for python in args.peer_pythons)):
        for row in source:
            if row["package"] == "ours":
                ours[row["what"], row["envs"]] = row["best"]
            own = ours.get((COMPARE.get(row["what"], row["what"]), row["envs"]))
            ratio = f"{own / row['best']:.3g}" if own and row["best"] else ""
            row |= {"best": f"{row['best']:.4g}", "median": f"{row['median']:.4g}", "ours / this": ratio}
            print(", ".join(str(value) for value in row.values()), flush=True)
            rows.append(row | machine)
    if args.output:
        write_rows(rows, args.output)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
