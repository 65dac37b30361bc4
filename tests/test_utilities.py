"""The utilities that stand in several scripts, byte for byte: each is tested here once for every script that has it."""

import importlib
import itertools
import os
import pathlib
import random
import re
import runpy
import subprocess
import sys
import time
import types
from dataclasses import asdict

import numpy as np
import pytest
import torch
import tyro
from conftest import assert_same, n_step_returns, rows_of, seeded

ROOT = pathlib.Path(__file__).parent.parent
TEXTS = {path.stem: path.read_text() for path in sorted(ROOT.glob("*.py"))}
SCRIPTS = [name for name, text in TEXTS.items() if re.search(r"^def new_run\(", text, re.M)]  # all but sokoban_env


def scripts_with(*names: str) -> pytest.MarkDecorator:
    """Run a test for every script that defines these."""
    found = [s for s in SCRIPTS if all(re.search(rf"^(def|class) {name}\b", TEXTS[s], re.M) for name in names)]
    assert found, f"no script defines {names}"
    return pytest.mark.parametrize("script", [importlib.import_module(name) for name in found], ids=found)


@pytest.fixture
def flags() -> types.SimpleNamespace:
    return types.SimpleNamespace(track=False, wandb_project_name="tests", wandb_entity=None)


def message(call, *args: object) -> str:
    """The one line that a call ends the program with."""
    with pytest.raises(SystemExit) as error:
        call(*args)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    return error.value.code


# --------------------------------------------------------------------------------------------- seeds, files and metrics


@scripts_with("seed_everything")
@pytest.mark.parametrize("deterministic", [True, False])
def test_one_seed_gives_the_same_numbers_everywhere(script, deterministic, monkeypatch):
    def draw(seed: int) -> list[float]:
        script.seed_everything(seed, deterministic)
        return [random.random(), np.random.random(), torch.rand(()).item()]

    monkeypatch.setattr(torch.backends.cudnn, "deterministic", not deterministic)
    try:
        first = draw(1)
        assert draw(1) == first
        assert all(one != other for one, other in zip(first, draw(2), strict=True))
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.deterministic == deterministic
        assert not deterministic or torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@scripts_with("layer_init")
def test_layers_start_orthogonal(script):
    layer = torch.nn.Linear(6, 4)
    assert script.layer_init(layer, 0.5, 0.25) is layer and (layer.bias == 0.25).all()
    torch.testing.assert_close(layer.weight @ layer.weight.T, 0.25 * torch.eye(4), atol=1e-6, rtol=0)
    convolution = script.layer_init(torch.nn.Conv2d(3, 5, 2))
    weight = convolution.weight.flatten(1)
    torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(5), atol=1e-5, rtol=0)
    assert (convolution.bias == 0).all()


@scripts_with("new_run")
def test_each_run_has_a_folder_of_its_own(script, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1234567.8)
    names = [script.new_run("a/b:c__exp__1") for _ in range(6)]
    assert names == ["a-b-c__exp__1__1234567" + suffix for suffix in ("", "-2", "-3", "-4", "-5", "-6")]
    assert {path.name for path in pathlib.Path("runs").iterdir()} == {*names}
    assert message(script.new_run, "a/b:c__exp__1").startswith("runs/a-b-c__exp__1__1234567 exists")
    pathlib.Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    pathlib.Path("runs").write_text("in the way")
    assert message(script.new_run, "x").startswith("can't create runs/x__")


@scripts_with("replacing")
@pytest.mark.parametrize(
    "error", [OSError("disk full"), RuntimeError("disk full\nin three lines"), ValueError("other")]
)
def test_a_file_is_replaced_whole_or_not_at_all(script, error):
    path = pathlib.Path("file.txt")
    path.write_text("old")

    def write(failure: Exception | None) -> None:
        with script.replacing(path) as temporary:
            assert temporary.parent == path.parent and temporary != path
            temporary.write_text("new")
            if failure:
                raise failure

    if isinstance(error, ValueError):  # no fault of the disk: it must be seen
        with pytest.raises(ValueError, match="other"):
            write(error)
    else:
        assert message(write, error).startswith("can't write file.txt: disk full")
    assert path.read_text() == "old"
    write(None)
    assert path.read_text() == "new"
    assert [p.name for p in pathlib.Path().iterdir()] == ["file.txt"]


@scripts_with("Logger")
def test_a_row_has_what_was_logged(script, flags, capsys, monkeypatch):
    logger = script.Logger(flags, "run")
    logger.log(5, {"losses/a": 0.125})
    assert rows_of(pathlib.Path("runs/run")) == [{"global_step": 5, "losses/a": 0.125}]  # at once
    logger.log(10, {"charts/b": 1 / 3})
    logger.close()
    assert rows_of(logger.path.parent) == [
        {"global_step": 5, "losses/a": 0.125},
        {"global_step": 10, "charts/b": 1 / 3},
    ]
    assert capsys.readouterr().out.splitlines() == ["global_step=5 losses/a=0.125", "global_step=10 charts/b=0.333333"]
    monkeypatch.setattr(script.sys.stderr, "isatty", lambda: True)
    logger.log(15, {"losses/a": 1.0})
    assert capsys.readouterr().out == ""  # the terminal has a progress bar


@scripts_with("Logger", "save_checkpoint", "load_checkpoint")
def test_a_resumed_run_has_each_row_once(script, flags):
    logger = script.Logger(flags, "run")
    logger.log(1, {"losses/a": 1.0})
    script.save_checkpoint(logger.path.with_name("checkpoint.pt"), {"rows": logger.rows})
    logger.log(2, {"losses/a": 2.0})  # and the run dies before its next checkpoint
    rows = script.load_checkpoint("runs/run/checkpoint.pt", "cpu")["rows"]
    again = script.Logger(flags, "run", rows)
    assert rows_of(again.path.parent)[-1]["losses/a"] == 2  # nothing is lost by starting
    again.log(2, {"losses/a": 2.0})
    again.log(3, {"losses/a": 3.0})
    assert [row["global_step"] for row in rows_of(again.path.parent)] == [1, 2, 3]
    assert len(rows) == 1  # the checkpoint's list is its own


@scripts_with("Logger")
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_loss_that_is_no_number_ends_the_run(script, flags, value):
    logger = script.Logger(flags, "run")
    logger.log(1, {"losses/a": 1.0, "charts/b": value})  # anything else may be
    end = message(logger.log, 2, {"losses/fine": 0.0, "losses/a": value})
    assert end.startswith(f"losses/a is {value} at step 2: ")
    assert str(rows_of(logger.path.parent)[-1]["losses/a"]) == str(value)


@scripts_with("save_checkpoint", "load_checkpoint")
def test_a_checkpoint_comes_back_and_outlives_a_save_that_fails(script, monkeypatch):
    path, layer = pathlib.Path("a.pt"), torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    state = {"network": layer.state_dict(), "optimizer": optimizer.state_dict(), "rows": [{"a": 1.5}], "no": None}
    script.save_checkpoint(path, state)

    def half(state: object, target: pathlib.Path) -> None:
        pathlib.Path(target).write_bytes(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        assert message(script.save_checkpoint, path, {}).startswith("can't write a.pt: unexpected pos")
    loaded = script.load_checkpoint(str(path), "cpu")
    assert_same(loaded, state)
    assert script.load_checkpoint(str(path), torch.device("meta"))["network"]["weight"].device.type == "meta"


@scripts_with("load_checkpoint", "saved_args")
def test_flags_come_back_from_a_checkpoint_and_other_files_are_refused(script):
    args = script.Args(seed=7, exp_name="x")
    script.save_checkpoint(pathlib.Path("good.pt"), {"args": asdict(args), "x": torch.zeros(999)})
    assert script.saved_args("good.pt") == args
    pathlib.Path("damaged.pt").write_bytes(pathlib.Path("good.pt").read_bytes()[:2000])
    pathlib.Path("text.pt").write_text("not a checkpoint")
    torch.save(pathlib.Path, "code.pt")  # something that only unpickling code could bring back
    pathlib.Path("folder.pt").mkdir()
    for name in ("damaged.pt", "text.pt", "code.pt", "folder.pt", "nowhere.pt"):
        for read in (script.saved_args, lambda path: script.load_checkpoint(path, "cpu")):
            assert message(read, name).startswith(f"can't read the checkpoint {name}: ")
    foreign = {"weights": 1}, {"args": asdict(args) | {"flag_of_another": 1}}, {"args": 3}, [1]
    for content in foreign:
        torch.save(content, "foreign.pt")
        assert message(script.saved_args, "foreign.pt").startswith("foreign.pt was written by another script")


@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_is_one_line(name, monkeypatch):
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tyro, "cli", interrupted)
    monkeypatch.setattr("gymnasium.envs.registration.registry", {})  # the script registers environments again
    assert message(lambda: runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")).startswith("stopped")


# ------------------------------------------------------------------------------------- boards, advantages and policies


@scripts_with("cell_planes", "player_view")
def test_planes_say_what_each_cell_is(script):
    cells = torch.arange(7, dtype=torch.uint8).expand(2, 3, 1, 7)
    expected = [[1, 0, 0, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0, 1], [0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1]]
    planes = script.cell_planes(cells)  # wall, target, box, player
    assert planes.dtype == torch.float32 and torch.equal(planes[1, 2, :, 0], torch.tensor(expected).float())


@scripts_with("player_view")
@pytest.mark.parametrize("size", [(6, 6), (7, 7), (6, 9)])
def test_the_player_stands_in_the_middle_of_its_view(script, size):
    height, width = size
    odd = [n if n % 2 else n - 1 for n in size]
    boards = torch.zeros(20, height, width, dtype=torch.uint8)
    for i, board in enumerate(boards):  # the first and last rows and columns are wall
        board[1:-1, 1:-1] = torch.randint(1, 5, (height - 2, width - 2))
        board[1 + i % (height - 2), 1 + i % (width - 2)] = 5 + i % 2
    views = script.player_view(boards)
    assert views.dtype == torch.uint8 and views.shape == (20, *odd)
    for i, (board, view) in enumerate(zip(boards, views, strict=True)):
        at = 1 + i % (height - 2), 1 + i % (width - 2)
        for y, x in itertools.product(*map(range, odd)):
            assert view[y, x] == board[(at[0] + y - odd[0] // 2) % odd[0], (at[1] + x - odd[1] // 2) % odd[1]]
    assert torch.equal(script.player_view(boards.unflatten(0, (4, 5))), views.unflatten(0, (4, 5)))


@scripts_with("generalized_advantages")
def test_advantages_are_discounted_sums_of_errors(script):
    rewards, values, next_values = torch.randn(3, 6, 50)  # (T, B) each
    terminated, truncated = torch.rand(2, 6, 50) < 0.2
    done = terminated | truncated
    result = script.generalized_advantages(rewards, values, next_values, terminated, done, 0.5, 0.8)
    errors = rewards + 0.5 * next_values * ~terminated - values  # truncated: V of its own last frame
    # Σ_k (γλ)^k δ_{t+k}, up to the end of an episode: nothing of the next one
    torch.testing.assert_close(result, n_step_returns(errors, done, done, torch.zeros(6, 50), 0.5 * 0.8))


@scripts_with("sample")
def test_sampled_actions_follow_the_policy(script):
    logits = torch.tensor([0.0, 1, 2, -1, -3]).expand(200_000, 5)
    share = script.sample(logits, seeded()).bincount(minlength=5) / 200_000
    assert torch.allclose(share, logits[0].softmax(-1), atol=0.005)


# ------------------------------------------------------------------- Weights and Biases; slow to start: one script only


@scripts_with("Logger")
def test_wandb_has_what_the_csv_has(script, flags, monkeypatch):
    rows, finished, given = {}, [], {}
    run = types.SimpleNamespace(
        log=lambda row, step: rows.update({step: row}),
        finish=lambda: finished.append(True),
    )
    wandb = types.SimpleNamespace(Error=OSError, init=lambda **settings: given.update(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    flags.track = True
    logger = script.Logger(flags, "run", [{"global_step": 1, "losses/a": 1.0}])  # a resumed run: one row is there
    logger.log(2, {"losses/a": 0.5})
    logger.log(3, {"losses/a": 0.25, "charts/b": 4.0})
    logger.close()
    assert rows == dict(enumerate(logger.rows[1:], start=2))  # by the row's number: W&B drops one that it has
    assert finished and (given["name"], given["id"], given["project"]) == ("run", "run", "tests")
    assert given["resume"] == "allow" and given["config"] == vars(flags)


def test_wandb_offline(flags, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags.track = True
    logger = importlib.import_module(SCRIPTS[0]).Logger(flags, "run")
    logger.log(1, {"losses/a": 0.5})
    logger.close()
    (path,) = logger.path.parent.rglob("*.wandb")
    assert path.stat().st_size


def test_tracking_without_a_login_says_what_to_do():
    code = f"import types, {SCRIPTS[0]} as script\n"
    code += "flags = types.SimpleNamespace(track=True, wandb_project_name='tests', wandb_entity=None)\n"
    keys = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DISABLED")
    environment = {name: x for name, x in os.environ.items() if name not in keys}
    environment |= {"HOME": os.getcwd(), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code + "script.Logger(flags, 'run')"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("--track: ") and "WANDB_MODE=offline" in last and "Traceback" not in result.stderr


def test_help_can_be_shown_by_a_windows_pipe():
    """All in one process, which knows cp1252 only: importing torch is what takes long."""
    commands = [[str(ROOT / f"{name}.py")] for name in SCRIPTS]
    commands += [[str(ROOT / "tools" / "sokoban.py"), *command] for command in ([], ["play"], ["generate"], ["check"])]
    code = "import runpy, sys\nfor words in " + repr(commands) + ":\n"
    code += "    sys.argv = [*words, '--help']\n    try:\n        runpy.run_path(words[0], run_name='__main__')\n"
    code += "    except SystemExit as end:\n        assert not end.code, words\n"
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode("cp1252")
    assert result.stdout.decode("cp1252").count("usage: ") == len(commands)
