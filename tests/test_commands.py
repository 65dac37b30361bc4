"""README, docs and I2A's benchmark programs: every command is run, with a budget that lets it end in seconds.

A command runs in a copy of the repository (so that nothing is written here), with its own flags and behind them those
of TINY, which override them. What it reads (runs/NAME/agent.pt, levels) is made by tiny runs first. What
can't be run stands in NOT_RUN with the reason. tests/test_docs.py says what counts as a command.
"""

import ast
import contextlib
import csv
import math
import pathlib
import re
import runpy
import shlex
import shutil
import sys

import gymnasium as gym
import matplotlib.pyplot as plt
import pytest
import torch
import tyro
from test_docs import ALL, PAGES, ROOT, commands, load

from sokoban_env import cells_to_text, generate_levels

# Flags that make a training run tiny; the files NAME of a --resume or --evaluate come from such a run
TINY = {
    "dyna_q.py": "--total-timesteps 300 --log-frequency 100",
    "dyna_dqn.py": "--total-timesteps 60 --learning-starts 20 --eval-frequency 30 --eval-episodes 1 --batch-size 16",
    "world_model_rollouts.py": "--total-timesteps 40 --initial-steps 40 --steps-per-iteration 20 --model-epochs 2 "
    "--num-envs 8 --num-steps 4 --num-minibatches 2 --policy-updates 1 --eval-episodes 2",
    "world_model_gp.py": "--total-timesteps 40 --initial-steps 40 --model-epochs 2 --gp-steps 2 --num-envs 8 "
    "--num-steps 4 --num-minibatches 2 --policy-updates 1 --eval-episodes 2",
    "i2a.py": "--total-timesteps 1128 --num-envs 8 --model-frames 1000 --model-steps 2 --eval-episodes 4 "
    "--num-steps 8 --max-episode-steps 8",
    "i2a.py --preset paper": "--total-timesteps 1008 --num-envs 2 --num-steps 2 --model-frames 1000 --model-steps 1 "
    "--eval-episodes 1 --max-episode-steps 2 --imagination-depth 2 --model-width 8 --lstm 16 --dense 16",
    "distillation.py": "--teacher-timesteps 256 --num-envs 8 --buffer-size 256 "
    "--distill-steps 20 --log-frequency 10 --batch-size 32 --max-episode-steps 16 --eval-episodes 32",
    "distral_tabular.py": "--total-timesteps 100 --eval-frequency 50",
    "distral.py": "--total-timesteps 512 --log-frequency 256 --num-envs 4 --channels 4 --dense 8 --eval-episodes 4 "
    "--max-episode-steps 8",
}
EVALUATION = {  # beside --evaluate, where the file doesn't bring a tiny number of episodes; --resume brings all flags
    "dyna_q.py": "--eval-episodes 2",
    "dyna_dqn.py": "--eval-episodes 2",
    "world_model_rollouts.py": "--eval-episodes 2",
    "i2a.py": "--eval-episodes 4 --num-steps 8 --max-episode-steps 8",
}
# Other programs: flags that make them tiny, and the files that they promise
PROGRAMS = {
    "benchmark/distillation_runs.py": (
        "",
        "benchmark/results/distillation_summary.csv docs/distillation.png",
    ),
    "benchmark/distral_sokoban.py": ("", "benchmark/results/distral_summary.csv"),
    "benchmark/distral_tabular_figures.py": (
        "",
        "benchmark/results/distral_tabular_summary.csv docs/distral_tabular.png",
    ),
    "benchmark/dyna_figures.py": (
        "--most-seeds 2",
        "benchmark/results/dyna_q_maze.csv benchmark/results/dyna_q_sweeping.csv docs/dyna_q_maze.png",
    ),
    "benchmark/dyna_neural.py": ("", "benchmark/results/dyna_dqn_table.csv docs/dyna_dqn.png"),
    "benchmark/run.py": (
        "--seeds 1 --flags='--total-timesteps 1128 --num-envs 8 --model-frames 1000 --model-steps 2 --eval-episodes 4 "
        "--max-episode-steps 32'",
        "benchmark/results/i2a_7x7.csv",
    ),
    "benchmark/curves.py --study distral": ("", "benchmark/results/distral_table.csv docs/distral.png"),
    "benchmark/curves.py --study i2a_7x7": ("", "benchmark/results/i2a_7x7_table.csv docs/i2a_7x7.png"),
    "benchmark/curves.py --study i2a_first_edition": (
        "",
        "benchmark/results/i2a_first_edition_table.csv docs/i2a_first_edition.png",
    ),
    "benchmark/gpu.py": ("--device cpu --tiny --parts fast", "benchmark/results/gpu_fast.csv"),
    "benchmark/i2a_evaluate.py retries": ("--most 2", "benchmark/results/i2a_retries.csv"),
    "benchmark/i2a_evaluate.py random": ("--episodes 8", "benchmark/results/i2a_random.csv"),
    "benchmark/i2a_evaluate.py boxes": ("--episodes 4", "benchmark/results/i2a_boxes.csv"),
    "benchmark/i2a_evaluate.py ablation": ("--episodes 4", "benchmark/results/i2a_ablation.csv"),
    "benchmark/i2a_evaluate.py search": ("--episodes 2", "benchmark/results/i2a_search.csv"),
    "benchmark/i2a_evaluate.py picture": ("", "docs/i2a_imagined.png"),
    "benchmark/i2a_evaluate.py film": ("--fewest 1", "docs/i2a_film.gif"),
    "benchmark/i2a_model.py": (
        "--seeds 1 --test-frames 640 --model-frames 1000 --model-steps 2",
        "benchmark/results/i2a_model.csv",
    ),
    "benchmark/i2a_throughput.py": ("--seconds 0", "benchmark/results/i2a_throughput.csv"),
    "benchmark/level_statistics.py": ("--num-levels 50", "benchmark/results/level_statistics.csv"),
    "benchmark/world_model_figures.py": (
        "",
        "benchmark/results/world_model_summary.csv docs/world_model_curves.png docs/world_model_limits.png",
    ),
    "benchmark/overview.py": ("", "docs/overview.png"),
    "benchmark/world_model_extras.py speed": ("", "benchmark/results/world_model_speed.csv"),
    "benchmark/world_model_extras.py likelihood": (
        "--seeds 1 --points 20",
        "benchmark/results/world_model_likelihood.csv",
    ),
    "tools/watch.py": ("--most 1 --delay 0", ""),
    "tools/sokoban.py render": ("--num-levels 2", "docs/sokoban_levels.png"),
}
NOT_RUN = {
    "python3 -m venv .venv": ".ci/run does it on a bare machine",
    ". .venv/bin/activate": ".ci/run does it",
    "pip install -r requirements.txt": ".ci/run does it",
    "python -m pytest": "this is it",
    "wandb login": "needs an account",
    "wandb sync runs/NAME/wandb/offline-run-*": "needs an account; tests/test_utilities.py tracks offline",
    "torchrun --nproc-per-node 4 i2a.py --num-envs 1024 --num-minibatches 32": "needs four GPUs, as the next one",
    "python i2a.py --cuda-graph --no-torch-deterministic --num-envs 1024 --num-minibatches 32": (
        "needs a GPU; tests/test_gpu.py runs it with a stand-in for graphs"
    ),
    "torchrun --nproc-per-node 4 i2a.py --preset paper": "needs four GPUs; tests/test_i2a_runs.py runs two processes",
    "python tools/sokoban.py play": "needs a terminal and somebody who plays",
    "python tools/sokoban.py play --size 7 --num-boxes 1": "needs a terminal and somebody who plays",
    "python benchmark/distillation_runs.py --speed": "measures for a minute, in fixed amounts",
    "python benchmark/env_speed.py --seconds 0.1 --repeats 7": "measures for minutes",
    "python benchmark/env_speed.py --peer-pythons GYM_SOKOBAN_PYTHON JUMANJI_PYTHON --output env_speed_peers.csv": (
        "needs interpreters with gym-sokoban and Jumanji; measures for minutes"
    ),
}


def other_commands(page: pathlib.Path) -> list[str]:
    """What stands in the bash blocks, or in backticks as a program's call, and isn't `python SCRIPT`."""
    text = page.read_text()
    blocks = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    inline = re.findall(r"`((?:python3?|pip|torchrun|bash|wandb) [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    parts = (part.split("#")[0].strip() for line in (*blocks, *inline) for part in re.split(r";|&&|\|", line))
    parts = (re.sub(r"^([A-Z_]+=\S+ )+", "", part) for part in parts)
    return [part for part in parts if part and not re.match(r"python \S+\.py\b", part)]


def docstring_commands(path: pathlib.Path) -> list[str]:
    """The commands in a program's docstring, a line each."""
    lines = ast.get_docstring(ast.parse(path.read_text())).splitlines()
    found = (re.match(r"\s*(?:[A-Z_]+=\S+ )*(python \S+\.py\b.*)", line) for line in lines)
    return [match[1] for match in found if match]


DOCUMENTED = ("run", "curves", "i2a_evaluate", "i2a_model", "i2a_throughput")  # programs whose docstrings are run too
OWN = [command for name in DOCUMENTED for command in docstring_commands(ROOT / f"benchmark/{name}.py")]
COMMANDS = sorted({*OWN, *(command for _, command in ALL)})
OTHERS = sorted({command for page in PAGES for command in other_commands(page)})


def program(command: str) -> str:
    """The key of a command's row in TINY or PROGRAMS: the longest that it starts with, else the script."""
    words = shlex.split(command)[1:]
    keys = (key for key in {*TINY, *PROGRAMS} if words[: len(key.split())] == key.split())
    return max(keys, key=len, default=words[0])


def short(command: str) -> str:
    return command.removeprefix("python ")[:70]


def test_the_lists_name_what_the_pages_have():
    assert set(NOT_RUN) <= {*COMMANDS, *OTHERS}, "NOT_RUN is out of date"
    assert set(OTHERS) <= set(NOT_RUN), "run these in a test, or say in NOT_RUN why not"
    used = {program(command) for command in COMMANDS}
    assert {*TINY, *PROGRAMS} <= used, f"no page has {sorted({*TINY, *PROGRAMS} - used)} any more"


@pytest.fixture(scope="module", autouse=True)
def short_episodes():
    """Gymnasium's classics end after 20 steps, in imagination too."""
    with pytest.MonkeyPatch.context() as patch:
        for env_id in ("CartPole-v1", "Acrobot-v1", "Pendulum-v1"):
            patch.setattr(gym.registry[env_id], "max_episode_steps", 20)
        yield


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The repository without what a clone hasn't got, and small level sets under the names that the docs use."""
    target = tmp_path_factory.mktemp("copy")
    for folder in ("benchmark", "checkpoints", "docs", "tools"):
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, target)
        if path.name in TINY:
            load(path.name)  # from here, not from the copy: other tests import it too
    my_env = 'import gymnasium\n\ngymnasium.register("MyEnv-v0", "gymnasium.envs.classic_control:CartPoleEnv")\n'
    (target / "my_env.py").write_text(my_env)
    for name, size, num_boxes in (("boxoban-levels/unfiltered/valid", 7, 1), ("PATH/unfiltered/train", 10, 4)):
        (target / name).mkdir(parents=True)
        levels, _ = generate_levels(4, size=size, num_boxes=num_boxes, seed=1)
        boards = "\n".join(f"; {i}\n{cells_to_text(level)}\n" for i, level in enumerate(levels))
        (target / name / "000.txt").write_text(boards)
    return target


def train(script: str, flags: list[str]) -> tuple[object, object]:
    """Run a script's `main`, as its last line does; returns the flags and what main returned."""
    module = load(script)
    args = module.parse_args(flags) if hasattr(module, "parse_args") else tyro.cli(module.Args, args=flags)
    return args, module.main(args)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """trained(script, flags): the folder of a tiny run."""
    made: dict[tuple[str, str], pathlib.Path] = {}

    def get(script: str, flags: str = "") -> pathlib.Path:
        if (script, flags) not in made:
            folder = tmp_path_factory.mktemp("made")
            with contextlib.chdir(folder):
                train(script, shlex.split(f"{TINY[script]} --save-model {flags}"))
            (made[script, flags],) = (folder / "runs").iterdir()
        return made[script, flags]

    return get


def unfinished(path: pathlib.Path) -> None:
    """Let a finished run's file be that of a run with more to do."""
    state = torch.load(path, weights_only=True)
    state["args"]["total_timesteps"] += state["args"]["total_timesteps"] // 2
    torch.save(state, path)


def rows_of(folder: pathlib.Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def prepare(script: str, flags: list[str], copy: pathlib.Path, trained) -> None:
    """Put the files there that a command names."""
    source = script if script in TINY else "i2a.py"
    shutil.rmtree(copy / "runs", ignore_errors=True)
    if any("runs/NAME/" in flag for flag in flags):
        folder = trained(source)
        shutil.copytree(folder, copy / "runs/NAME")
        if "--resume" in flags:
            shutil.copytree(folder, copy / "runs" / folder.name)
            unfinished(copy / flags[flags.index("--resume") + 1])
    for name, env_id in (("A", "CartPole-v1"), ("B", "Sokoban-v0")):
        if f"{name}/agent.pt" in flags:
            shutil.copytree(trained(source, f"--env-ids {env_id}"), copy / name, dirs_exist_ok=True)
    if "DQN/agent.pt" in flags:
        shutil.copytree(trained("dyna_dqn.py", "--env-id CartPole-v1"), copy / "DQN", dirs_exist_ok=True)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in NOT_RUN and program(c) in TINY], ids=short)
def test_a_script_runs(command: str, copy: pathlib.Path, trained, monkeypatch, capsys):
    _, script, *flags = shlex.split(command)
    prepare(script, flags, copy, trained)
    monkeypatch.chdir(copy)
    monkeypatch.syspath_prepend(str(copy))
    training = not {"--evaluate", "--resume"} & {*flags}
    extra = TINY[program(command)] if training else EVALUATION.get(script, "") if "--evaluate" in flags else ""
    if {"--resume", "--total-timesteps"} <= {*flags}:
        extra = "--total-timesteps 90"
    capsys.readouterr()
    args, _ = train(script, [*flags, *shlex.split(extra)])
    text = capsys.readouterr().out
    if "--evaluate" in flags:
        assert re.search(r"(return|solved|score|policy)\S* *:?=?\s*-?\d", text), text
        if "--capture-video" in flags:
            assert list(pathlib.Path(args.evaluate).parent.glob("*.gif"))
        return
    (folder,) = (path for path in (copy / "runs").iterdir() if path.name != "NAME")
    assert not {":", "/"} & {*folder.name}  # W&B takes no such name
    rows = rows_of(folder)
    values = {(i, k): float(v) for i, row in enumerate(rows) for k, v in row.items() if v and "/" in k}
    assert any(k.startswith(("losses/", "eval/")) for _, k in values)
    # a score is 0 / 0 where the teacher has learned nothing yet
    assert [key for key, v in values.items() if not math.isfinite(v) and key[1] != "eval/score"] == []
    if "--resume" in flags:
        assert len(rows) > len(rows_of(copy / "runs/NAME"))
    if args.save_model:
        assert any(file.stat().st_size for file in (*folder.glob("*.pt"), *folder.glob("*.npz")))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in NOT_RUN and program(c) in PROGRAMS], ids=short)
def test_a_program_writes_what_it_promises(command: str, copy: pathlib.Path, trained, monkeypatch):
    _, script, *flags = shlex.split(command)
    extra, promised = PROGRAMS[program(command)]
    prepare(script, flags, copy, trained)
    monkeypatch.chdir(copy)
    for path in promised.split():
        pathlib.Path(path).unlink(missing_ok=True)
    monkeypatch.setattr(sys, "argv", [script, *flags, *shlex.split(extra)])
    monkeypatch.syspath_prepend(str((copy / script).parent))
    names = [path.stem for folder in ("benchmark", "tools") for path in (ROOT / folder).glob("*.py")]
    kept, threads = {name: sys.modules.pop(name, None) for name in names}, torch.get_num_threads()
    try:
        runpy.run_path(str(copy / script), run_name="__main__")
    except SystemExit as e:
        assert e.code in (None, 0), e.code
    finally:
        for name, module in kept.items():  # none of the copy's own stays
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        torch.set_num_threads(threads)
        plt.close("all")
    for path in promised.split():
        assert pathlib.Path(path).stat().st_size, path


def test_every_command_is_run_or_listed():
    left = [c for c in COMMANDS if c not in NOT_RUN and program(c) not in {*TINY, *PROGRAMS}]
    assert not left, "give these a row in TINY, PROGRAMS or NOT_RUN"
    assert {c for page in PAGES for c in commands(page)} <= set(COMMANDS)


BLOCKS = [(page.name, block) for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)]


@pytest.mark.parametrize("block", [block for _, block in BLOCKS], ids=[f"{n}-{i}" for i, (n, _) in enumerate(BLOCKS)])
def test_python_in_the_pages_runs(block: str, copy: pathlib.Path, monkeypatch):
    monkeypatch.chdir(copy)
    exec(compile(block, "<page>", "exec"), {})
