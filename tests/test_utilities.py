"""The utilities that stand in several scripts, byte for byte: each is tested here once for every script that has it."""

import csv
import importlib
import os
import pathlib
import random
import re
import subprocess
import sys
import time
import types
from dataclasses import asdict

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
TEXTS = {path.stem: path.read_text() for path in sorted(ROOT.glob("*.py"))}
# The single-file scripts
SCRIPTS = [name for name, text in TEXTS.items() if re.search(r"^def new_run\(", text, re.M)]


def scripts_with(*names: str) -> pytest.MarkDecorator:
    """Run a test for every script that defines these."""
    found = [
        s for s in SCRIPTS if all(re.search(rf"^(def|class) {name}\(|^class {name}:", TEXTS[s], re.M) for name in names)
    ]
    assert found, f"no script defines {names}"
    return pytest.mark.parametrize("script", [importlib.import_module(name) for name in found], ids=found)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def flags() -> types.SimpleNamespace:
    return types.SimpleNamespace(track=False, wandb_project_name="tests", wandb_entity=None)


def rows_of(path: pathlib.Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def message(call, *args: object) -> str:
    """The one line that a call ends the program with."""
    with pytest.raises(SystemExit) as error:
        call(*args)
    assert isinstance(error.value.code, str) and "\n" not in error.value.code
    return error.value.code


@scripts_with("seed_everything")
def test_one_seed_gives_the_same_numbers_everywhere(script: types.ModuleType):
    def draw(seed: int) -> list[float]:
        script.seed_everything(seed, False)
        return [random.random(), np.random.random(), torch.rand(()).item()]

    first = draw(1)
    assert draw(1) == first
    assert all(one != other for one, other in zip(first, draw(2), strict=True))


@scripts_with("seed_everything")
@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_algorithms(script: types.ModuleType, deterministic: bool, monkeypatch: pytest.MonkeyPatch):
    before = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", not deterministic)
    try:
        script.seed_everything(1, deterministic)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.deterministic == deterministic
        assert not deterministic or torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(before)


@scripts_with("layer_init")
def test_layers_start_orthogonal(script: types.ModuleType):
    layer = torch.nn.Linear(6, 4)
    assert script.layer_init(layer, 0.5, 0.25) is layer
    torch.testing.assert_close(layer.weight @ layer.weight.T, 0.25 * torch.eye(4), atol=1e-6, rtol=0)
    assert (layer.bias == 0.25).all()
    script.layer_init(layer)
    torch.testing.assert_close(layer.weight @ layer.weight.T, 2 * torch.eye(4), atol=1e-5, rtol=0)
    assert (layer.bias == 0).all()
    convolution = script.layer_init(torch.nn.Conv2d(3, 5, 2)).weight.flatten(1)
    torch.testing.assert_close(convolution @ convolution.T, 2 * torch.eye(5), atol=1e-5, rtol=0)


@scripts_with("new_run")
def test_each_run_has_a_folder_of_its_own(script: types.ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(time, "time", lambda: 1234567.8)
    names = [script.new_run("a/b:c__exp__1") for _ in range(6)]
    assert names == ["a-b-c__exp__1__1234567" + suffix for suffix in ("", "-2", "-3", "-4", "-5", "-6")]
    assert {path.name for path in pathlib.Path("runs").iterdir()} == {*names}
    assert message(script.new_run, "a/b:c__exp__1").startswith("runs/a-b-c__exp__1__1234567 exists")


@scripts_with("new_run")
def test_a_place_where_no_run_can_be_made(script: types.ModuleType):
    pathlib.Path("runs").write_text("in the way")
    assert message(script.new_run, "x").startswith("can't create runs/x__")


@scripts_with("replacing")
@pytest.mark.parametrize(
    "error", [OSError("disk full"), RuntimeError("disk full\nin three lines"), ValueError("other")]
)
def test_a_file_is_replaced_whole_or_not_at_all(script: types.ModuleType, error: Exception):
    path = pathlib.Path("file.txt")
    path.write_text("old")

    def write(failure: Exception | None) -> None:
        with script.replacing(path) as temporary:
            assert temporary.parent == path.parent and temporary != path
            temporary.write_text("new")
            assert path.read_text() == "old"
            if failure:
                raise failure

    if isinstance(error, ValueError):  # no fault of the disk: it must be seen
        with pytest.raises(ValueError, match="other"):
            write(error)
    else:
        assert message(write, error) == "can't write file.txt: disk full; what stood there before is whole"
    assert path.read_text() == "old"
    write(None)
    assert path.read_text() == "new"
    assert [p.name for p in pathlib.Path().iterdir()] == ["file.txt"]


@scripts_with("Logger")
def test_a_row_has_what_was_logged(script: types.ModuleType, flags: types.SimpleNamespace, capsys, monkeypatch):
    logger = script.Logger(flags, "run")
    logger.log(5, {"losses/a": 0.125})
    assert rows_of(logger.path) == [{"global_step": "5", "losses/a": "0.125"}]  # written at once
    logger.log(10, {"charts/b": 1 / 3})
    logger.close()
    path = pathlib.Path("runs/run/metrics.csv")
    assert logger.path == path
    assert path.read_text().splitlines()[0] == "global_step,losses/a,charts/b"
    rows = [{name: float(x) for name, x in row.items() if x} for row in rows_of(path)]
    assert rows == [{"global_step": 5, "losses/a": 0.125}, {"global_step": 10, "charts/b": 1 / 3}]
    assert capsys.readouterr().out.splitlines() == ["global_step=5 losses/a=0.125", "global_step=10 charts/b=0.333333"]
    monkeypatch.setattr(script.sys.stderr, "isatty", lambda: True)
    logger.log(15, {"losses/a": 1.0})
    assert capsys.readouterr().out == ""  # the terminal has a progress bar


@scripts_with("Logger", "save_checkpoint", "load_checkpoint")
def test_a_resumed_run_has_each_row_once(script: types.ModuleType, flags: types.SimpleNamespace):
    logger = script.Logger(flags, "run")
    logger.log(1, {"losses/a": 1.0})
    script.save_checkpoint(logger.path.with_name("checkpoint.pt"), {"rows": logger.rows})
    logger.log(2, {"losses/a": 2.0})  # and the run dies before its next checkpoint
    rows = script.load_checkpoint("runs/run/checkpoint.pt", "cpu")["rows"]
    again = script.Logger(flags, "run", rows)
    assert rows_of(again.path)[-1]["losses/a"] == "2.0"  # nothing is lost by starting
    again.log(2, {"losses/a": 2.0})
    again.log(3, {"losses/a": 3.0})
    assert [row["global_step"] for row in rows_of(again.path)] == ["1", "2", "3"]
    assert len(rows) == 1  # the checkpoint's list is its own


@scripts_with("Logger")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_ends_the_run(script: types.ModuleType, flags: types.SimpleNamespace, value: float):
    logger = script.Logger(flags, "run")
    logger.log(1, {"losses/a": 1.0, "charts/b": value})  # anything else may be
    end = message(logger.log, 2, {"losses/fine": 0.0, "losses/a": value})
    assert end.startswith(f"losses/a is {value} at step 2: ")
    assert rows_of(logger.path)[-1]["losses/a"] == str(value)


@scripts_with("save_checkpoint", "load_checkpoint")
def test_a_checkpoint_comes_back(script: types.ModuleType):
    path, layer = pathlib.Path("a.pt"), torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    state = {"network": layer.state_dict(), "optimizer": optimizer.state_dict(), "rows": [{"a": 1.5}], "no": None}
    script.save_checkpoint(path, state)
    loaded = script.load_checkpoint(str(path), "cpu")
    assert all(torch.equal(x, loaded["network"][name]) for name, x in state["network"].items())
    moments, again = (s["optimizer"]["state"][0]["exp_avg"] for s in (state, loaded))
    assert torch.equal(moments, again) and loaded["rows"] == [{"a": 1.5}] and loaded["no"] is None
    assert script.load_checkpoint(str(path), torch.device("meta"))["network"]["weight"].device.type == "meta"


@scripts_with("save_checkpoint", "load_checkpoint")
def test_a_save_that_fails_keeps_the_last_checkpoint(script: types.ModuleType, monkeypatch: pytest.MonkeyPatch):
    path = pathlib.Path("a.pt")
    script.save_checkpoint(path, {"step": 1})

    def half(state: object, target: pathlib.Path) -> None:
        pathlib.Path(target).write_bytes(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", half)
    assert message(script.save_checkpoint, path, {"step": 2}).startswith("can't write a.pt: unexpected pos")
    assert script.load_checkpoint("a.pt", "cpu") == {"step": 1}


@scripts_with("load_checkpoint", "saved_args")
def test_files_that_are_no_checkpoints(script: types.ModuleType):
    script.save_checkpoint(pathlib.Path("good.pt"), {"args": asdict(script.Args()), "x": torch.zeros(999)})
    pathlib.Path("damaged.pt").write_bytes(pathlib.Path("good.pt").read_bytes()[:2000])
    pathlib.Path("text.pt").write_text("not a checkpoint")
    torch.save(pathlib.Path, "code.pt")  # something that only unpickling code could bring back
    pathlib.Path("folder.pt").mkdir()
    for name in ("damaged.pt", "text.pt", "code.pt", "folder.pt", "nowhere.pt"):
        for read in (script.saved_args, lambda path: script.load_checkpoint(path, "cpu")):
            assert message(read, name).startswith(f"can't read the checkpoint {name}: ")


@scripts_with("saved_args")
def test_flags_come_back_from_a_checkpoint(script: types.ModuleType):
    args = script.Args(seed=7, exp_name="x")
    torch.save({"args": asdict(args)}, "good.pt")
    assert script.saved_args("good.pt") == args
    torch.save({"weights": 1}, "foreign.pt")
    torch.save({"args": asdict(args) | {"flag_of_another": 1}}, "script.pt")
    torch.save({"args": 3}, "number.pt")
    torch.save([1], "list.pt")
    for name in ("foreign.pt", "script.pt", "number.pt", "list.pt"):
        assert message(script.saved_args, name).startswith(f"{name} was written by another script, or another version")


# ------------------------------------------------------------------- Weights and Biases; slow to start: one script only

FIRST = [importlib.import_module(SCRIPTS[0])]


class Tracked:
    """What wandb.init returns."""

    def __init__(self) -> None:
        self.rows, self.finished = {}, False

    def log(self, row: dict[str, float], step: int) -> None:
        self.rows[step] = row

    def finish(self) -> None:
        self.finished = True


@scripts_with("Logger")
def test_wandb_has_what_the_csv_has(script: types.ModuleType, flags: types.SimpleNamespace, monkeypatch):
    run, given = Tracked(), {}
    wandb = types.SimpleNamespace(Error=OSError, init=lambda **settings: given.update(settings) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    flags.track = True
    logger = script.Logger(flags, "run", [{"global_step": 1, "losses/a": 1.0}])  # a resumed run: one row is there
    logger.log(2, {"losses/a": 0.5})
    logger.log(3, {"losses/a": 0.25, "charts/b": 4.0})
    logger.close()
    assert run.rows == dict(enumerate(logger.rows[1:], start=2))  # by the row's number: W&B drops one that it has
    assert run.finished and (given["name"], given["id"], given["project"]) == ("run", "run", "tests")
    assert given["resume"] == "allow" and given["config"] == vars(flags)


@pytest.mark.parametrize("script", FIRST, ids=SCRIPTS[:1])
def test_wandb_offline(script: types.ModuleType, flags: types.SimpleNamespace, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    flags.track = True
    logger = script.Logger(flags, "run")
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
