"""What i2a.py needs of a GPU, checked without one: nothing waits for a value, no operation mixes devices, and a graph
that is replayed does what the calls would have done."""

import contextlib
import copy
import functools
import importlib
import itertools
import pathlib
import shutil
import types
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import i2a
import sokoban_env

CPU, META = torch.device("cpu"), torch.device("meta")
SMALL = i2a.Args(
    size=6, num_boxes=1, cnn_channels=(8,), dense=16, encoder_channels=(8,), encoder_dense=8, lstm=16, model_width=4,
    imagination_depth=2, num_envs=8, num_steps=3,
)  # fmt: skip


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def to_meta(envs: sokoban_env.SokobanVectorEnv) -> sokoban_env.SokobanVectorEnv:
    """The environment on the meta device, where tensors have no values: whatever asks for one raises."""
    for part in (envs, envs._pool):
        for name, value in list(vars(part).items()):
            if isinstance(value, torch.Tensor):
                setattr(part, name, value.to(META))
            elif isinstance(value, list):
                setattr(part, name, [x.to(META) if isinstance(x, torch.Tensor) else x for x in value])
    envs.device, envs._pool.on = META, {"device": "meta"}
    envs._pool.serial = 2**40  # between two refills, which do wait
    envs._link()
    return envs


@pytest.fixture
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows no meta device."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.mark.parametrize(
    "changes",
    [
        {"agent": "model-free"},
        {},
        {"frame_stack": 2, "greedy_rollouts": True, "norm_adv": False, "symmetry": False, "finetune_model": True},
        {"env_model": "perfect", "rollout_policy": "random"},
        {"observation": "rgb", "view": "board", "symmetry": False, "optimizer": "rmsprop"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())) or "i2a",
)
def test_acting_and_updating_wait_for_nothing(changes: dict[str, Any], no_autocast: None):
    args = replace(SMALL, **changes)
    envs = i2a.make_envs(args, args.num_envs, None, CPU, backend="torch")
    observation, _ = envs.reset(seed=1)
    to_meta(envs)
    networks = i2a.make_networks(args, META)
    if args.env_model == "perfect":  # its simulators, for acting and for the values after it
        for num in (args.num_envs * i2a.A, 2 * args.num_envs * i2a.A):
            kwargs = {"size": 6, "max_episode_steps": None, "levels": ["#####\n#@$.#\n#####"], "backend": "torch"}
            simulator = sokoban_env.SokobanVectorEnv(num, **kwargs)
            simulator.reset(seed=1)
            networks["env_model"].envs[num] = to_meta(simulator)
    frames = i2a.as_frames(observation, args.frame_stack).to(META)
    rows, transitions, frames, ended = i2a.rollout(args, networks, envs, frames, None)
    assert rows[0].shape[0] == 24 and all(x.device == META for x in (*rows, *transitions.values(), frames, ended))
    groups = [{"params": list(network.parameters())} for network in networks.values() if network is not None]
    groups = [group for group in groups if any(p.requires_grad for p in group["params"])]
    optimizer = torch.optim.SGD(groups, 0.1)
    assert i2a.update(args, networks, optimizer, *rows).device == META
    if args.finetune_model:
        assert i2a.model_loss(networks["env_model"], transitions).device == META


@pytest.mark.parametrize(("kind", "stack"), [("cells", 1), ("tiny_rgb", 3), ("rgb", 1)])
def test_resets_and_states_keep_to_their_device(kind: str, stack: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sokoban_env._Pool, "fill", lambda _: None)  # which waits
    settings = {"size": 6, "num_boxes": 1, "observation": kind, "frame_stack": stack}
    envs = sokoban_env.SokobanVectorEnv(4, device=META, **settings)
    results = [envs.reset(seed=1), envs.step(torch.zeros(4, dtype=torch.int64, device=META)), envs.get_state()]
    results += [envs.set_state(envs.get_state()), envs.reset(options={"levels": ["#####\n#@$.#\n#####"] * 4})]
    boards = torch.zeros(4, 6, 6, dtype=torch.uint8, device=META)
    results.append(sokoban_env.convert_observation(boards, "cells", kind))
    assert {x.device for x in tensors(results)} == {META}


def test_the_generator_keeps_to_its_device():
    def where(*args: Any) -> Any:  # with one argument it waits
        return torch.where(*args) if len(args) == 3 else (torch.zeros(3, dtype=torch.int64, device=META),)

    levels, _ = sokoban_env._generate(Instead(torch, where=where), "meta", (6, 7, 2), 1, range(2), solve=False)
    assert levels.shape == (3, 6, 7) and levels.device == META


def test_the_meta_device_catches_what_waits():
    x = torch.zeros(4, device=META)
    for wait in (x.sum().item, x.tolist, x.nonzero, lambda: x[x > 0], lambda: bool((x > 0).any()), x.cpu):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()
    with pytest.raises(RuntimeError):
        x + torch.zeros(4)


class Recording(TorchDispatchMode):
    """A CUDA graph for tensors of the CPU: replaying runs the recorded operations on the same memory, and no Python."""

    active = False

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.replays, self.registered = [], 0, False

    def register_generator_state(self, rng: torch.Generator) -> None:
        self.registered = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        assert name not in ("aten::_local_scalar_dense", "aten::nonzero"), "a wait, during capture"
        assert kwargs.get("generator") is None or self.registered
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:  # recording has run them, where capturing does not
            return
        for func, args, kwargs, result in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


class Instead:
    """A module, some of whose names mean something else."""

    def __init__(self, module: Any, **names: Any) -> None:
        vars(self).update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """A machine that seems to have a GPU; the graphs made on it."""
    made = []

    def nothing(*_: Any) -> None: ...

    @contextlib.contextmanager
    def capture(graph: Recording, **_: Any) -> Iterator[None]:
        made.append(graph)
        with graph, monkeypatch.context() as patch:
            patch.setattr(sokoban_env._Pool, "fill", nothing)  # which is left out while a GPU captures
            yield

    cuda = Instead(
        torch.cuda, is_available=lambda: True, set_device=nothing, Stream=nothing, set_stream=nothing,
        graph_pool_handle=nothing, CUDAGraph=Recording, graph=capture,
    )  # fmt: skip
    names = {"cuda": cuda, "device": lambda _: CPU, "set_float32_matmul_precision": nothing}
    monkeypatch.setattr(i2a, "torch", Instead(torch, **names))
    # What it does on a GPU, where a wrong action is found out later
    monkeypatch.setattr(sokoban_env.SokobanVectorEnv, "_check_actions", lambda _, actions: actions.long())
    monkeypatch.setattr(i2a, "SokobanVectorEnv", functools.partial(sokoban_env.SokobanVectorEnv, backend="torch"))
    return made


def train(*flags: str) -> tuple[dict, list]:
    """The weights at the end, and the rows of metrics without times."""
    shutil.rmtree("runs", ignore_errors=True)
    # rates that float32 can hold, for a graph reads one from a tensor; more episodes than the ring has levels
    small = "--size 6 --num-boxes 1 --cnn-channels 8 --dense 16 --encoder-channels 8 --lstm 16 --model-width 4 "
    small += "--imagination-depth 2 --num-envs 32 --num-steps 4 --max-episode-steps 8 --num-minibatches 2 "
    small += "--anneal-from 0 --update-epochs 2 --total-timesteps 2048 --log-frequency 512 "
    i2a.main(i2a.parse_args([*small.split(), "--learning-rate", "0.0009765625", "--eval-episodes", "8", *flags]))
    (path,) = pathlib.Path("runs").glob("*/checkpoint.pt")
    state = torch.load(path, weights_only=True)
    rows = [{k: v for k, v in row.items() if k not in ("charts/SPS", "charts/minutes")} for row in state["rows"]]
    return state["networks"], rows


@pytest.mark.parametrize("flags", [("--agent", "model-free"), ("--env-model", "copy"), ("--env-model", "perfect")])
def test_graphs_train_the_same_agent(flags: tuple[str, ...], graphs: list[Recording]):
    weights, rows = train(*flags)
    assert not graphs
    replayed, replayed_rows = train(*flags, "--cuda-graph")
    assert all(torch.equal(replayed[name], weights[name]) for name in weights)
    assert replayed_rows == rows and rows[-1]["charts/solved"] > 0
    # 64 updates and 16 rollouts, of which two each are warm-up
    assert [graph.replays for graph in graphs] == [62, 14]


def test_a_checkpoint_of_another_device_goes_on():
    """Its generator's state has another size there, and its environment's levels are kept in another way."""
    train("--agent", "model-free", "--total-timesteps", "1024")
    (path,) = pathlib.Path("runs").glob("*/checkpoint.pt")
    state = torch.load(path, weights_only=True)
    state["processes"][0]["rng"] = torch.zeros(16, dtype=torch.uint8)  # as a GPU's
    envs = sokoban_env.SokobanVectorEnv(32, size=6, num_boxes=1, backend="torch")
    envs.reset(seed=1)
    state["processes"][0]["env"] = envs.get_state()
    state["optimizer"]["param_groups"][0].update(lr=torch.tensor(0.1), capturable=True)  # as --cuda-graph leaves them
    torch.save(state, path)
    i2a.main(i2a.parse_args(["--resume", str(path), "--total-timesteps", "2048"]))
    resumed = torch.load(path, weights_only=True)
    assert len(resumed["rows"]) > len(state["rows"]) and resumed["global_step"] == 2048
    assert resumed["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.0009765625 / 16)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The prepared measurement."""
    monkeypatch.syspath_prepend(str(pathlib.Path(i2a.__file__).parent / "benchmark"))
    return importlib.import_module("gpu")


def test_the_checks_pass_and_see_what_differs(gpu: types.ModuleType, monkeypatch: pytest.MonkeyPatch):
    for check in (gpu.check_environment, gpu.check_networks, gpu.check_graph):
        rows = list(check(CPU, True))
        assert rows and all(value <= limit for _, value, limit in rows), rows

    def other_weights(networks: torch.nn.ModuleDict) -> torch.nn.ModuleDict:
        networks = copy.deepcopy(networks)
        for p in networks.parameters():
            p.data *= 1 + 0.01 * torch.rand_like(p)
        return networks

    def shorter(num: int, **settings: Any) -> sokoban_env.SokobanVectorEnv:
        limit = 39 if "device" in settings else 40
        return sokoban_env.SokobanVectorEnv(num, **settings | {"max_episode_steps": limit})

    monkeypatch.setattr(gpu, "copy", Instead(copy, deepcopy=other_weights))
    monkeypatch.setattr(gpu, "SokobanVectorEnv", shorter)
    rows = [*gpu.check_environment(CPU, True), *gpu.check_networks(CPU, True)]
    failed = {name for name, value, limit in rows if value > limit}
    assert failed >= {"transitions that differ", "logits", "values", "losses", "gradient of the agent"}
    assert "advantages" not in failed and "levels that differ" not in failed


def test_the_command_writes_what_it_measures(gpu: types.ModuleType, tmp_path: pathlib.Path):
    gpu.main(gpu.Args(parts=("fast",), device="cpu", tiny=True, output=str(tmp_path)))
    speeds = {row["what"]: float(row["value"]) for row in gpu.read_rows(tmp_path / "gpu_fast.csv")}
    assert speeds.keys() >= {"bf16", "steps, 1,000 levels", "levels", "model-free", "depth 3"}
    assert min(speeds.values()) > 0 and speeds["model-free"] > speeds["depth 3"]


AGENT_FLAGS = (
    "--agent model-free --num-envs 8 --num-steps 4 --num-minibatches 8 --cnn-channels 8 --dense 8 --no-bf16 "
    "--levels levels.txt --log-frequency 64 --eval-episodes 2 --max-episode-steps 8 --learning-rate 7e-4"
)


@pytest.fixture
def flagship(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.setattr(i2a, "save_checkpoint", i2a.save_checkpoint)  # both are replaced: put back after the test
    monkeypatch.setattr(sokoban_env, "load_levels", sokoban_env.load_levels)
    sokoban_env.save_levels("levels.txt", sokoban_env.generate_levels(4, size=10, num_boxes=4, seed=1)[0])
    return importlib.import_module("flagship")


def frames_of(gpu: types.ModuleType, path: pathlib.Path) -> dict[str, list[int]]:
    """By piece, the frames of the evaluations; each is two rows, of sampled and of greedy actions."""
    frames: dict[str, list[int]] = {}
    for row in gpu.read_rows(path)[::2]:
        frames.setdefault(row["piece"], []).append(int(row["frames"]))
    return frames


def test_the_trained_agent_is_measured_on_the_way(
    gpu: types.ModuleType, flagship: types.ModuleType, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    clock = types.SimpleNamespace(time=functools.partial(next, itertools.count()))  # a second each time it is asked
    monkeypatch.setattr(flagship, "time", clock)
    settings = {"first": 128, "branch": 64, "large_from": 256, "every": 64, "num_levels": 2, "valid": "levels.txt"}
    flagship.main(flagship.Args("agent", 60.0, AGENT_FLAGS, output=str(tmp_path), **settings))
    frames = frames_of(gpu, tmp_path / "flagship_agent.csv")
    assert frames["constant"] == [64, 128, 192, 256] and frames["branch"] == [192]
    assert frames["large"][0] == 320 and frames["falling"][0] == frames["large"][-1] + 64
    metrics = gpu.read_rows(next(pathlib.Path("runs").glob("*__flagship-agent__*/metrics.csv")))
    rates = {int(row["global_step"]): float(row["charts/learning_rate"] or 0) for row in metrics}
    assert all(rates[step] == 7e-4 for step in frames["constant"][:3] + frames["large"])
    assert [*rates.values()][-1] < rates[frames["falling"][0]] < 5e-4
    i2a.main(i2a.parse_args(["--evaluate", str(tmp_path / "agent.pt")]))


def test_one_run_and_how_it_goes_on(
    gpu: types.ModuleType, flagship: types.ModuleType, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    save_checkpoint = i2a.save_checkpoint
    settings = {"every": 192, "num_levels": 2, "valid": "levels.txt", "output": str(tmp_path)}
    flagship.main(flagship.Args("agent", None, f"{AGENT_FLAGS} --total-timesteps 384", until=192, **settings))
    assert frames_of(gpu, tmp_path / "flagship_agent.csv") == {"one run": [192]}
    checkpoint = next(pathlib.Path("runs").glob("*__flagship-agent__*/checkpoint.pt"))
    monkeypatch.setattr(i2a, "save_checkpoint", save_checkpoint)  # as in a new process
    flagship.main(flagship.Args("agent", None, f"--resume {checkpoint} --gamma 0.9", **settings))
    assert frames_of(gpu, tmp_path / "flagship_agent.csv") == {"one run": [192, 384]}
    assert i2a.load_checkpoint(str(tmp_path / "agent.pt"), "cpu")["global_step"] == 384
