"""What holds for the source tree as a whole: layers, names, import cost, the wheel, and calls that nobody may make."""

from __future__ import annotations

import ast
import fnmatch
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from sources import PACKAGES, ROOT, files_of, imports, modules

import lmgym
import lmgym.tasks

# A module imports from its own layer and from lower ones (to the left).
LAYERS = (
    "errors, episodes, forking, ending, output < ranges, files, kl, intervals, data < models < automata < rewards"
    " < tasks < feedback < reward_models < optimum < envs < wrappers < rollout < evaluation, scores, testing, trl"
    " < sb3, minari, remote"
    " < agents.distributed"
    " < agents.checkpoint, agents.seeds, agents.finite, agents.losses, agents.advantages, agents.master_weights"
    " < agents.agent < agents.policies < agents.batch, agents.diagnostics, agents.update"
    " < agents.memory, agents.offload, agents.learning, agents.stacked_adam, agents.stacked_batch"
    " < agents.faults < agents.on_policy_config < agents.importance"
    " < agents.on_policy, agents.groups, agents.fixed, agents.supervised, agents.remote"
    " < agents.algorithms, agents.sb3 < agents.stack, agents.many_seeds, agents.exact < agents.runs < agents.comparison"
    " < agents < builders"
)
HEIGHT = {name.strip(): height for height, layer in enumerate(LAYERS.split("<")) for name in layer.split(",")}
NAMES_OF_NOTHING = {"utils", "util", "common", "helpers", "helper", "misc"}


# --- layers ------------------------------------------------------------------------------------------------------


def part(module: str) -> str:
    """The piece of the house that a module belongs to; "" is the package `lmgym` itself, which only registers."""
    names = module.split(".")
    room = ".".join(names[:2])
    if names[0] == "agents":
        return room if room in HEIGHT else "agents"
    return "builders" if names[0] == "builders" else ".".join(names[1:2])


def upward_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports of a module that break the layers, each as "importer -> imported"."""
    own = part(module)
    return [
        f"{module} -> {name}"
        for name in imports(source, module, is_package)
        # Only agents may import the package itself: importing it is what registers the environments.
        if (part(name) not in HEIGHT and HEIGHT[own] < HEIGHT["agents.checkpoint"])
        or HEIGHT.get(part(name), 0) > HEIGHT.get(own, 0)
    ]


def test_every_module_has_a_layer() -> None:
    assert {part(module) for module in modules()} - {""} <= HEIGHT.keys()


def test_modules_import_from_their_own_layer_and_lower_ones() -> None:
    broken = [
        line
        for module, file in modules().items()
        if part(module)  # `lmgym/__init__.py` stands above the layers; what it loads is tested below
        for line in upward_imports(file.read_text(encoding="utf-8"), module, file.name == "__init__.py")
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lmgym.models.causal", "from lmgym.envs.single import RLHFEnv"),
        ("lmgym.models.causal", "from lmgym import envs"),
        ("lmgym.models.causal", "from ..envs import token"),
        ("lmgym.models.causal", "def f():\n    import lmgym.tasks.base"),
        ("lmgym.models.causal", "import lmgym"),
        ("lmgym.scores", "from agents.algorithms import ppo"),
        ("lmgym.errors", "from .kl import k1"),
    ],
)
def test_an_upward_import_is_seen(module: str, source: str) -> None:
    assert upward_imports(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lmgym.envs.single", "from lmgym.models.causal import CausalLM\nfrom lmgym import kl, errors\nimport torch"),
        ("lmgym.envs.single", "from . import vector\nfrom ..errors import LmGymError"),
        ("lmgym.episodes", "from lmgym.errors import LmGymError"),
        (
            "agents.algorithms.ppo",
            "import lmgym\nfrom agents.on_policy import Agent\nfrom lmgym.testing import check_task",
        ),
    ],
)
def test_a_downward_import_is_fine(module: str, source: str) -> None:
    assert not upward_imports(source, module)


def test_lmgym_never_imports_agents() -> None:
    for module, file in modules().items():
        if module.startswith("lmgym"):
            names = imports(file.read_text(encoding="utf-8"), module, file.name == "__init__.py")
            assert not {"agents", "builders"} & {name.split(".")[0] for name in names}, module


# --- names -------------------------------------------------------------------------------------------------------


def test_ruff_reads_every_source_file() -> None:
    """A name without a slash leaves out every directory of that name, `agents/runs` for `runs`."""
    excluded = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["extend-exclude"]
    parts = {part for file in files_of(*PACKAGES, "tests") for part in file.relative_to(ROOT).parts}
    assert not {part for part in parts for pattern in excluded if fnmatch.fnmatch(part, pattern)}


def test_every_module_is_called_after_what_it_holds() -> None:
    assert not [module for module in modules() if NAMES_OF_NOTHING & set(module.split("."))]


def test_no_module_has_a_name_of_the_standard_library() -> None:
    shadowing = {module for module in modules() if set(module.split(".")) & sys.stdlib_module_names}
    assert shadowing <= {"lmgym.envs.single"}  # the one exception, harmless because nobody runs a file of that folder


# --- importing ---------------------------------------------------------------------------------------------------


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


def test_importing_lmgym_loads_neither_torch_nor_transformers() -> None:
    assert run("import sys, lmgym; print(sorted({'torch', 'transformers'} & sys.modules.keys()))") == "[]"


@pytest.mark.slow
def test_the_public_names_load_when_they_are_used() -> None:
    """PEP 562: all are there, `dir` and so completion list them, and those that need torch load it then."""
    code = (
        "import sys, lmgym;"
        "print(sorted(dir(lmgym)) == sorted([*lmgym.__all__, '__version__']), hasattr(lmgym, 'colect'));"
        "lmgym.make_task, lmgym.suite(); print('torch' in sys.modules);"
        "lmgym.collect; print('torch' in sys.modules);"
        "import lmgym.models.sharing; print('lmgym.models.markov' in sys.modules);"  # which loads a `MarkovLM`
        "print(all(getattr(lmgym, name) for name in lmgym.__all__))"
    )
    assert run(code).splitlines() == ["True False", "False", "True", "True", "True"]


def test_one_name_means_one_thing() -> None:
    assert lmgym.register_task is lmgym.tasks.register_task


def test_importing_lmgym_costs_little_beyond_gymnasium() -> None:
    # Processor time: on a busy machine the clock says nothing.
    code = "import gymnasium, time; start = time.process_time(); import lmgym; print(time.process_time() - start)"
    assert any(float(run(code)) < 0.2 for _ in range(3))


# --- the wheel ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The file list of the wheel, built offline from a copy, so that leftovers of earlier builds cannot slip in."""
    copy = tmp_path_factory.mktemp("wheel")
    for package in ("lmgym", "agents", "conf", "tests"):
        if (ROOT / package).exists():
            shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, copy)
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    done = subprocess.run([sys.executable, "-c", build], capture_output=True, text=True, cwd=copy)
    assert done.returncode == 0, done.stderr
    (wheel,) = (copy / "dist").glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_the_wheel_holds_lmgym_alone(wheel_files: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"lmgym"}
    assert len(tops) == 2


def test_the_wheel_holds_all_of_lmgym(wheel_files: set[str]) -> None:
    source = {file.relative_to(ROOT).as_posix() for file in (ROOT / "lmgym").rglob("*") if file.is_file()}
    source = {name for name in source if "__pycache__" not in name and "/." not in name}
    assert source <= wheel_files, f"not packed: {sorted(source - wheel_files)}"
    assert "lmgym/py.typed" in wheel_files


def test_the_wheel_stays_small() -> None:
    files = [file for file in (ROOT / "lmgym").rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) < 12_000_000  # before compression


# --- versions ----------------------------------------------------------------------------------------------------


TESTED_EXTRAS = ("minari", "render", "agents", "feedback", "test")


def test_the_lowest_versions_are_those_that_the_project_declares() -> None:
    """Each pin begins with the minimum; torch's is another, for its size."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *(line for name in TESTED_EXTRAS for line in extras[name])]
    minima = dict(line.split(">=") for line in declared if ">=" in line)
    lines = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("#")[0].strip().split("==") for line in lines if not line.startswith("#"))
    assert minima.keys() <= pins.keys()
    for name in minima.keys() - {"torch"}:
        assert f"{pins[name]}.".startswith(f"{minima[name]}."), name


# --- calls that nobody may make ----------------------------------------------------------------------------------

SEEDERS = {
    "np.random.seed": "seeds the generator of the whole process: use numpy.random.default_rng",
    "numpy.random.seed": "seeds the generator of the whole process: use numpy.random.default_rng",
    "random.seed": "seeds the generator of the whole process: use random.Random",
    "torch.manual_seed": "seeds the generator of the whole process: pass a torch.Generator, or fork_rng around it",
    "torch.random.manual_seed": "seeds the generator of the whole process: pass a torch.Generator",
    "torch.cuda.manual_seed": "seeds the generator of the whole process: pass a torch.Generator",
    "torch.cuda.manual_seed_all": "seeds the generator of the whole process: pass a torch.Generator",
}


# Who may import by a name: of all that, `agents.runs.trust.named_code` tells what comes from a config.
IMPORTERS = {
    "importlib.import_module": {
        "lmgym/__init__.py",
        "lmgym/tasks/registry.py",
        "lmgym/rewards/base.py",
        "agents/sb3/algorithms.py",
        "agents/questions/protocol.py",  # a file of studies/, which no config can add to
    },
    "hydra.utils.get_class": {"agents/runs/plan.py"},
    "hydra.utils.get_object": set(),
    "hydra.utils.get_method": set(),
    "hydra.utils.instantiate": set(),
    "import_module": set(),
    "__import__": set(),
    "runpy.run_path": set(),
    "runpy.run_module": set(),
    "exec": set(),
    "eval": set(),
    "OmegaConf.load": set(),  # would resolve ${oc.env:...} of a stranger's config
}


class ForbiddenCalls(ast.NodeVisitor):
    """Collects "line: reason" for calls and imports that break what the project promises."""

    def __init__(self, file: str = "") -> None:
        self.found: list[str] = []
        self._file = file
        self._forks = 0

    def visit_With(self, node: ast.With) -> None:
        forks = any("fork_rng" in ast.unparse(item.context_expr) for item in node.items)
        self._forks += forks
        self.generic_visit(node)
        self._forks -= forks

    def visit_Import(self, node: ast.Import) -> None:
        if any(alias.name.split(".")[0] == "pickle" for alias in node.names):
            self._add(node, "pickle runs what it loads")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        writes = all(alias.name in ("Pickler", "PicklingError") for alias in node.names)
        if node.module and node.module.split(".")[0] == "pickle" and not writes:
            self._add(node, "pickle runs what it loads")

    def visit_Call(self, node: ast.Call) -> None:
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name == "torch.multinomial":
            self._add(
                node, "torch.multinomial draws a number for every word of the vocabulary: use lmgym.models.sampling"
            )
        if name == "torch.load" and keywords.get("weights_only") != "True":
            self._add(node, "torch.load without weights_only=True runs what it loads")
        loads = name.rpartition(".")[2] in ("from_pretrained", "from_config")
        if keywords.get("trust_remote_code", "False" if not loads else None) != "False":
            self._add(node, f"{name} without trust_remote_code=False asks whether to run what it loads, or runs it")
        if name in IMPORTERS and self._file not in IMPORTERS[name]:
            self._add(node, f"{name} may import what a run directory names: see agents/runs/trust.py")
        if name in SEEDERS and not (self._forks and name.startswith("torch.")):
            self._add(node, f"{name} {SEEDERS[name]}")
        self.generic_visit(node)

    def _add(self, node: ast.stmt | ast.expr, reason: str) -> None:
        self.found.append(f"{node.lineno}: {reason}")


def forbidden(source: str, file: str = "") -> list[str]:
    visitor = ForbiddenCalls(file)
    visitor.visit(ast.parse(source))
    return visitor.found


@pytest.mark.slow
def test_nobody_makes_a_forbidden_call() -> None:
    found = []
    for file in modules().values():
        source = file.read_text(encoding="utf-8")
        found += [f"{file}:{line}" for line in forbidden(source, file.relative_to(ROOT).as_posix())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "tokens = torch.multinomial(probs, 1)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "import pickle",
        "def f():\n    from pickle import loads",
        "from pickle import Pickler, loads",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name)",
        "AutoConfig.from_pretrained(name, trust_remote_code=given)",
        "self._auto_class.from_config(config)",
        "pipeline('text-generation', name, trust_remote_code=True)",
        "importlib.import_module(name)",
        "hydra.utils.instantiate(config)",
        "OmegaConf.load(path)",
        "np.random.seed(0)",
        "torch.manual_seed(0)",
        "with torch.no_grad():\n    torch.manual_seed(0)",
        "with torch.random.fork_rng():\n    np.random.seed(0)",
        "with torch.random.fork_rng():\n    pass\ntorch.manual_seed(0)",
    ],
)
def test_a_forbidden_call_is_seen(source: str) -> None:
    assert len(forbidden(source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=False)",
        "from pickle import Pickler, PicklingError",
        "rng = np.random.default_rng(0)\nrng.multinomial(1, p)",
        "generator = torch.Generator().manual_seed(0)",
        "with torch.random.fork_rng(devices=[]):\n    torch.manual_seed(0)",
    ],
)
def test_a_harmless_call_is_left_alone(source: str) -> None:
    assert not forbidden(source)
