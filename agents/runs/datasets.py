"""What `python -m agents.dataset` does: has policies answer a task's prompts, as Minari data sets for offline RL."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.runs.completions import BATCH_SIZE, Request, Writer, is_run, load_writers, prompts_of
from lmgym.errors import InvalidArgumentError

if TYPE_CHECKING:
    from lmgym.episodes import Episodes
    from lmgym.wrappers import PolicyKL

MIXED = "mixed"
_OF_THE_VECTOR_ENV = ("autoreset_mode", "vectorization_mode", "num_envs")


def names_of(request: Request, task: str) -> dict[str, str]:
    """The data set of each policy: "lmgym/echo-4/reference-v0"; a run is named as its directory is.

    Raises:
        InvalidArgumentError: where two policies would have the same.
    """
    names: dict[str, str] = {}
    for policy in request.policies:
        plain = Path(policy).resolve().name if is_run(policy) else policy
        name = f"lmgym/{task}/{re.sub(r'[^A-Za-z0-9_.-]', '-', plain)}-v0"
        if name in names.values():
            raise InvalidArgumentError(f"`policies` must have names of their own, and two make {name!r}.")
        names[policy] = name
    return names


def split_policies(policies: Sequence[str]) -> tuple[list[str], bool]:
    """The policies without `mixed`, and whether it is among them.

    Raises:
        InvalidArgumentError: for `mixed` with fewer than two others.
    """
    others = [name for name in policies if name != MIXED]
    is_mixed = len(others) < len(policies)
    if is_mixed and len(others) < 2:
        raise InvalidArgumentError(f"`policies` must have two others beside 'mixed', got {list(policies)}.")
    return others, is_mixed


def write_datasets(
    request: Request,
    root: str | None,
    *,
    mixed: bool = False,
    trusted: Sequence[str] = (),
    start: Callable[[int], Callable[[int], object]] | None = None,
) -> list[tuple[Path, int, int]]:
    """Writes a data set a policy, `samples` episodes a prompt; and one of all of them together if it is to be `mixed`.

    Args:
        request: whose policies answer which prompts. root: the directory of data sets; None is Minari's own.
        mixed: whether the episodes of all policies are one more data set, in the order of their prompts.
        trusted: modules that the runs among the policies may name.
        start: called with how many episodes will be written; gives what is called with the number of those that are.

    Returns:
        For each data set its directory, its episodes and its steps.

    Raises:
        LmGymError: for what cannot be, before anything is sampled.
    """
    from lmgym.minari import check_minari, write_minari

    check_minari()
    from lmgym.optimum import find_known

    writers = load_writers(request, trusted)
    check_log_probs(writers)
    names = names_of(request, writers[0].task)
    if mixed:
        names[MIXED] = f"lmgym/{writers[0].task}/{MIXED}-v0"
        check_same_mdp(writers)
    check_new(names.values(), root)
    count = len(prompts_of(writers[0].envs, request)) * request.samples * len(writers)
    progress = None if start is None else start(count * (2 if mixed else 1))
    by_name = {writer.name: writer for writer in writers}
    found = []
    for policy, episodes in answers(request, writers, mixed=mixed).items():
        writer = by_name.get(policy, writers[0])
        optimum = find_known(writer.envs.task, request.split)
        directory = write_minari(
            names[policy],
            episodes,
            env_of(writer),
            root=root,
            optimum=optimum,
            progress=progress,
            algorithm_name=policy,
            description=describe(policy, writer.task, request, is_known=optimum is not None),
        )
        found.append((directory, len(episodes), episodes.num_tokens))
    return found


def check_new(names: Iterable[str], root: str | None) -> None:
    """Raises `InvalidArgumentError` where a data set is there already."""
    from lmgym.minari import dataset_directory

    for name in names:
        directory = dataset_directory(name, root)
        if directory.exists():
            raise InvalidArgumentError(f"`out` must not have {str(directory)!r} yet: move it away.")


def check_log_probs(writers: Sequence[Writer]) -> None:
    """Raises `InvalidArgumentError` where a policy does not know the log-probs of its tokens, which rewards need."""
    for writer in writers:
        if not writer.agent.knows_log_probs:
            raise InvalidArgumentError(
                f"`policies` must know the log-probs of their tokens, of which the KL in the rewards is, and "
                f"{writer.name!r} does not."
            )


def check_same_mdp(writers: Sequence[Writer]) -> None:
    """Raises `InvalidArgumentError` where policies are of different problems, whose rewards cannot be mixed."""
    for writer in writers:
        if env_settings(writer) != env_settings(writers[0]):
            raise InvalidArgumentError(
                f"`policies` must be of one problem to be mixed, and {writer.name!r} has {env_settings(writer)}, "
                f"{writers[0].name!r} {env_settings(writers[0])}."
            )


def answers(request: Request, writers: Sequence[Writer], *, mixed: bool) -> dict[str, Episodes]:
    """The episodes of each policy, and those of all of them."""
    from lmgym.episodes import Episodes

    found = {writer.name: sample_episodes(request, writer, i) for i, writer in enumerate(writers)}
    if mixed:
        together = Episodes.concatenate([replace(episodes, values=None) for episodes in found.values()])
        found[MIXED] = together[together.prompt_index.argsort(stable=True)]
    return found


def sample_episodes(request: Request, writer: Writer, stream: int) -> Episodes:
    """`samples` episodes a prompt, drawn by a stream of their own: that of the policy with this number."""
    from agents.seeds import DATASETS, torch_generator
    from lmgym.episodes import Episodes

    generator = torch_generator(request.seed, DATASETS, stream)
    repeated = [prompt for prompt in prompts_of(writer.envs, request) for _ in range(request.samples)]
    parts = [
        writer.agent.respond(writer.envs, repeated[i : i + BATCH_SIZE], generator=generator)
        for i in range(0, len(repeated), BATCH_SIZE)
    ]
    return Episodes.concatenate(parts)


def env_settings(writer: Writer) -> dict[str, Any]:
    """The keyword arguments of `gym.make` for the MDP of a policy."""
    spec = writer.envs.spec
    assert spec is not None
    return {name: x for name, x in spec.kwargs.items() if name not in _OF_THE_VECTOR_ENV}


def env_of(writer: Writer) -> PolicyKL:
    """The MDP of a policy as a single env that takes tokens with their log-probs."""
    import gymnasium as gym

    from lmgym.wrappers import PolicyKL

    return PolicyKL(gym.make("lmgym/RLHF-v0", **env_settings(writer)))


def describe(policy: str, task: str, request: Request, *, is_known: bool) -> str:
    """What a data set holds, in sentences; `is_known`: whether it has the scores of the reference and of the best."""
    scores = " ref_min_score is J of the reference, ref_max_score is V*." if is_known else ""
    return (
        f"{request.samples} episodes of each prompt of the {request.split} split of lmgym's {task}, by {policy}. "
        f"Rewards are score and KL, both halves.{scores}"
    )
