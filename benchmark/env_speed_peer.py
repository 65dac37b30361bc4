"""The speed of gym-sokoban or Jumanji on one core, a line of JSON for each rate: what, envs, best, median.

benchmark/env_speed.py starts it with an interpreter that has one of them, and gives it three arguments: numpy's file of
levels (L, 10, 10), cells of sokoban_env.py; the seconds and the number of measurements. Rates have the names of ours.
"""

import importlib.util
import itertools
import json
import os
import sys
import types
import warnings
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
from common import rates


def report(package: str, what: str, envs: int | str, work: Callable[[], int], seconds: float, repeats: int) -> None:
    row = {"package": f"{package} {version(package)}", "what": what, "envs": envs}
    print(json.dumps(row | rates(work, seconds, repeats)), flush=True)


def gym_sokoban(levels: np.ndarray, seconds: float, repeats: int) -> None:
    # It is of 2018: what it needs of old numpy and setuptools is put back before the import
    np.bool8 = np.bool_
    sys.modules["pkg_resources"] = module = types.ModuleType("pkg_resources")
    module.resource_filename = lambda package, path: os.path.join(os.path.dirname(sys.modules[package].__file__), path)
    from gym_sokoban.envs import room_utils
    from gym_sokoban.envs.sokoban_env import SokobanEnv

    fixed = np.where(levels == 0, 0, np.where((levels == 2) | (levels == 4) | (levels == 6), 2, 1))
    state = np.select([levels == 3, levels == 4, levels >= 5], [4, 3, 5], levels)  # its codes
    rooms = itertools.cycle(zip(fixed, state, strict=True))
    env = SokobanEnv(dim_room=(10, 10), num_boxes=4, max_steps=120, reset=False)
    actions = np.random.default_rng(1).integers(5, size=100).tolist()

    def reset() -> None:  # as SokobanEnv.reset, but with a level that is there already
        env.room_fixed, env.room_state = (room.copy() for room in next(rooms))
        env.player_position = np.argwhere(env.room_state == 5)[0]
        env.num_env_steps = env.reward_last = env.boxes_on_target = 0

    def step() -> int:
        for action in actions:
            if env.step(action, observation_mode="rgb_array")[2]:
                reset()
        return len(actions)

    def generate(size: int, boxes: int) -> int:  # with SokobanEnv's number of steps; it fails at some rooms
        try:
            room_utils.generate_room(dim=(size, size), num_steps=int(1.7 * 2 * size), num_boxes=boxes)
        except (RuntimeError, RuntimeWarning):
            return 0
        return 1

    reset()
    report("gym-sokoban", "step, rgb", 1, step, seconds, repeats)
    report("gym-sokoban", "generate 7x7, 2 boxes", "", lambda: generate(7, 2), seconds, repeats)
    # it needs seconds for each of these
    report("gym-sokoban", "generate 10x10, 4 boxes", "", lambda: generate(10, 4), 150 * seconds, 1)


def jumanji(levels: np.ndarray, seconds: float, repeats: int) -> None:
    """It steps in a compiled scan, with its VmapAutoResetWrapper, which does what our environments do, and without."""
    import jax
    from jumanji.environments.routing.sokoban import Sokoban
    from jumanji.environments.routing.sokoban.generator import HuggingFaceDeepMindGenerator
    from jumanji.wrappers import VmapAutoResetWrapper, VmapWrapper

    jax.config.update("jax_platforms", "cpu")

    class Pool(HuggingFaceDeepMindGenerator):  # its default generator, but with our levels instead of a download
        def __init__(self) -> None:
            fixed = np.select([levels == 0, (levels == 2) | (levels == 6)], [1, 2])
            self._fixed_grids = jax.numpy.array(fixed, "uint8")
            self._variable_grids = jax.numpy.array(np.select([levels == 3, levels >= 5], [4, 3]), "uint8")

    base, key = Sokoban(generator=Pool()), jax.random.PRNGKey(1)
    wrappers = {"step, cells": VmapAutoResetWrapper, "step, cells, no episode ends": VmapWrapper}

    def stepping(envs: VmapWrapper, num: int, length: int) -> Callable[[], int]:
        actions = jax.random.randint(key, (length, num), 0, 4)
        carry = jax.jit(envs.reset)(jax.random.split(key, num))

        @jax.jit
        def run(carry: tuple) -> tuple:  # the time step, with its observation, is carried, so that it has to be built
            return jax.lax.scan(lambda carry, action: (envs.step(carry[0], action), None), carry, actions)[0]

        def work() -> int:
            nonlocal carry
            carry = jax.block_until_ready(run(carry))
            return length * num

        return work

    for (what, wrapper), num in itertools.product(wrappers.items(), (64, 1024, 4096)):
        report("jumanji", what, num, stepping(wrapper(base), num, max(16, 65536 // num)), seconds, repeats)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # one core, for compilers that bring their own threads
    for peer in (gym_sokoban, jumanji):
        if importlib.util.find_spec(peer.__name__):
            peer(np.load(sys.argv[1]).astype(int), float(sys.argv[2]), int(sys.argv[3]))
