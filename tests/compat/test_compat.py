"""Other libraries as they are released, each in a virtual environment of its own: `pytest -m network tests/compat`.

An environment borrows the packages of the present one and puts its own before them. Where a library holds back a
version that lmgym needs, the version is put in its place afterwards, which is what `instead` says.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
import venv
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
pytestmark = [pytest.mark.network, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Library:
    """Packages to install, the script to run, and versions put in the place of what the packages ask for."""

    packages: tuple[str, ...]
    script: str
    instead: tuple[str, ...] = ()


LIBRARIES = {
    "torchrl": Library(("torchrl",), "torchrl_env.py"),
    "tianshou": Library(("tianshou>=2",), "tianshou_agents.py"),
    "rllib": Library(("ray[rllib]",), "rllib_ppo.py"),
    "d3rlpy": Library(("d3rlpy", "minari[create,hdf5]"), "minari_d3rlpy.py", ("gymnasium==1.4.0",)),
    "imitation": Library(
        ("imitation",),
        "imitation_preferences.py",
        ("gymnasium==1.4.0", "stable-baselines3==2.9.2", "huggingface_hub==2.4.0"),
    ),
    "trl": Library(("trl", "datasets"), "trl_grpo.py"),
}  # fmt: skip


def make_environment(directory: Path, packages: tuple[str, ...], instead: tuple[str, ...] = ()) -> Path:
    """The Python of a new environment with packages, beside the torch that is there, which no library may replace."""
    venv.create(directory / "venv", with_pip=False)
    python = directory / "venv" / "bin" / "python"
    own = next((directory / "venv" / "lib").glob("python*")) / "site-packages"
    (own / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pin = directory / "torch.txt"
    pin.write_text(f"torch=={version('torch').partition('+')[0]}\n")
    for wanted in filter(None, (packages, instead)):
        command = [str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir", "--constraint", str(pin), *wanted]
        subprocess.run(command, check=True)
    return python


def run(command: list[str], directory: Path, *paths: Path) -> None:
    """Runs a command with folders on the path, this one and the root among them."""
    path = os.pathsep.join(str(folder) for folder in (ROOT, HERE, *paths))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, timeout=900)
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_works(name: str, tmp_path: Path) -> None:
    library = LIBRARIES[name]
    python = make_environment(tmp_path, library.packages, library.instead)
    run([str(python), str(HERE / library.script)], tmp_path)


@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
def test_cleanrl_works(algorithm: str, tmp_path: Path) -> None:
    """Its programs take an id and nothing else; `CLEANRL` is where a clone of its repository lies."""
    if "CLEANRL" not in os.environ:
        pytest.skip("set CLEANRL to a clone of CleanRL")
    clone = Path(os.environ["CLEANRL"])
    python = make_environment(tmp_path, ("tyro", "tensorboard"))
    options = ["--env-id", "ids:keyword-onehot-v0", "--total-timesteps", "2048", "--no-cuda"]
    if algorithm == "dqn":
        options += ["--learning-starts", "500"]
    run([str(python), str(clone / "cleanrl" / f"{algorithm}.py"), *options], tmp_path, clone)
