"""The anatomy of a run on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Numbers = Mapping[str, Any]
STATES = 8  # that are printed and drawn
_MAX_STEPS = 16  # rows of a table; of more steps the ones with the largest shares are shown
_TEXT = 40  # characters of a state


def anatomy_table(found: Numbers) -> str:
    """The content of `anatomy.json` as plain text."""
    gap = found["gap"]
    title = f"{found['agent']} on {found['task']}, seed {found['seed']}, after {found['step']:,} tokens"
    bounds = gap["gap"]
    interval = "" if bounds["low"] == bounds["high"] else f" ({bounds['low']:.4f} to {bounds['high']:.4f})"
    head = f"{title}: V* - J = {gap['optimum']:.4f} - {gap['value']:.4f} = {bounds['mean']:.4f}{interval}"
    parts = [head, _steps(gap), _states(gap), _masses(gap["masses"]), _learning(found)]
    return "\n\n".join(parts)


def share_of(part: float, gap: Numbers) -> str:
    """A part of the gap in percent."""
    whole = gap["gap"]["mean"]
    return f"{100 * part / whole:.0f} %" if whole > 0 else "-"


def _steps(gap: Numbers) -> str:
    shares = [part["mean"] for part in gap["by_step"]]
    chosen = sorted(sorted(range(len(shares)), key=lambda t: -shares[t])[:_MAX_STEPS])
    rows = [["step", "share", "of gap", "running", "entropy", "entropy of pi*"]]
    for t in chosen:
        entropies = [gap["entropy"][t], gap["optimal_entropy"][t]]
        cells = [_number(x, 3) for x in (gap["running"][t], *entropies)]
        rows.append([str(t), f"{shares[t]:.4f}", share_of(shares[t], gap), *cells])
    rest = f"\n({len(shares) - len(chosen)} steps with smaller shares)" if len(chosen) < len(shares) else ""
    return align(rows) + rest


def _states(gap: Numbers) -> str:
    rows = [["state", "share", "of gap", "visits", "KL", "too likely", "too unlikely"]]
    for state in gap["states"][:STATES]:
        share = state["share"]["mean"]
        numbers = [f"{share:.4f}", share_of(share, gap), f"{state['visits']:.3f}", f"{state['kl']:.3f}"]
        tokens = [token_text(state[name]) for name in ("too_likely", "too_unlikely")]
        rows.append([state_text(state, _TEXT), *numbers, *tokens])
    return align(rows, left=(0, 5, 6)) if len(rows) > 1 else "No state has a share."


def state_text(state: Numbers, width: int) -> str:
    """A state in words: its prompt, the response so far, and the state of the automaton."""
    prompt = "" if state["prompt"] is None else f"{_ended(state['prompt'], width // 2)!r}, "
    automaton_state = state["automaton_state"]
    said = _ended(state["response"], width // 2)
    if not state["step"]:
        return f"{prompt}at the start"
    if automaton_state is None:
        return f"{prompt}then {said!r}"
    after = f"after {said!r}, " if said else ""
    return f"{prompt}{after}step {state['step']}, q{automaton_state}"


def token_text(odds: Numbers) -> str:
    """A token with its probability under the policy, and under pi*."""
    return f"{odds['token']!r} {odds['probability']:.2f} (pi* {odds['optimal']:.2f})"


def _ended(text: str, width: int) -> str:
    """The end of a text."""
    return text if len(text) <= width else f"...{text[-width:]}"


def _masses(masses: Numbers) -> str:
    lines = []
    if masses["best"] is not None:
        three = " and ".join(
            f"{masses[name]:.4f} {who}"
            for name, who in (("optimal_best", "under pi*"), ("reference_best", "under the reference"))
        )
        lines.append(f"best responses (pass@1)   {masses['best']:.4f}; {three}")
    if masses["lost"] is not None:
        detail = ""
        if masses["overconfident"] is not None:
            detail = f": {masses['overconfident']:.4f} over-confident, {masses['underexplored']:.4f} under-explored"
        lines.append(f"mass that pi* has elsewhere   {masses['lost']:.4f}{detail}")
    return "\n".join(lines) if lines else "The masses of responses are not known."


def _learning(found: Numbers) -> str:
    """What keeps the policy from getting better."""
    lines = []
    critic = found["critic"]
    if critic is not None:
        explained = _number(critic["explained_variance"], 3)
        spread = f"V^pi varies by {critic['spread']:.4f}"
        lines.append(f"critic         off by {critic['rmse']:.4f} ({spread}); explains {explained} of its variance")
    reach = found["policy_class"]
    if reach is not None and reach["share"] is not None:
        lines.append(f"policy class   its weights can follow at least {reach['share']:.3f} of the steepest way up")
    for name, text in (
        ("update", "the update"),
        ("policy", "without the critic's loss"),
        ("exact_values", "and with V^pi for the critic"),
    ):
        quality = None if found["estimator"] is None else found["estimator"][name]
        if quality is not None:
            cosine = f"cosine {quality['cosine']:.3f} ± {1.96 * quality['cosine_error']:.3f}"
            noise = quality["variance"] / quality["norm"] ** 2 if quality["norm"] else float("inf")
            lines.append(f"estimator      {text}: {cosine} with the gradient of J, noise {noise:.3g} times its square")
    lines += [f"{name.replace('_', ' '):12}   not known: {reason}" for name, reason in found["unknown"].items()]
    return "\n".join(lines)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def align(rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """Rows of cells in columns, those in `left` on the left, the others on the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def examples_table(examples: Sequence[Numbers], colours: bool) -> str:
    """Responses with the share of their tokens: a colour, or a number after each that has some.

    Args:
        examples: of `anatomy.json`. colours: whether the terminal shows them.
    """
    top = max((token["share"] for example in examples for token in example["tokens"]), default=0.0)
    lines = []
    for example in examples:
        tokens = "".join(_mark(token, top, colours) for token in example["tokens"])
        lines.append(f"{example['prompt']!r} > {tokens}")
    return "\n".join(lines)


def _mark(token: Numbers, top: float, colours: bool) -> str:
    """A token on a background from none to red; without colours with its share where that counts."""
    weight = token["share"] / top if top > 0 else 0.0
    if not colours:
        return f"{token['token']}[{token['share']:.3f}]" if weight > 0.05 else str(token["token"])
    fade = round(255 * (1 - 0.75 * weight))
    text = str(token["token"])
    return text if weight < 0.02 else f"\033[30;48;2;255;{fade};{fade}m{text}\033[0m"
