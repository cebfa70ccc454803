"""Draws the state of one episode: plain text, a coloured block on a terminal, or a picture.

Pure functions of a `Frame`; only `show` writes. The colour of a token is its cost in the reference half of the KL term:
neutral where the reference expected it, red where it did not.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import shutil
import textwrap
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

import numpy as np
from numpy.typing import NDArray

from lmgym.errors import InvalidArgumentError

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont

# Zero width non-joiner and joiner, and signs that are visible although Unicode calls them formats.
JOINERS = "\u200c\u200d"
VISIBLE_FORMATS = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
Span = tuple[str, float | None]  # a stretch of text, and how red it is, in [0, 1]; None: not coloured

NATS_A_STEP = 7  # surprise that is drawn in full red, or a multiple of it
SIZE = (960, 544)  # multiples of 16: no video codec pads or rescales them
LEFT = 40
RIGHT = 920
TEXT_SIZE = 24
LINE_HEIGHT = 38
PROMPT_LINES = 2
RESPONSE_LINES = 6
PAPER = "#ffffff"
INK = "#111418"
MUTED = "#656d76"
TRACK = "#e4e7eb"
ACCENT = "#2f6fde"
# Red, green and blue of ColorBrewer's "Reds", from a grey: even steps of lightness, and dark text is readable on all.
CHANNELS = ((242, 254, 252, 252, 251, 239), (243, 224, 187, 146, 106, 59), (245, 210, 161, 114, 74, 44))
REDS = [tuple(int(np.interp(at, range(0, 256, 51), channel)) for channel in CHANNELS) for at in range(256)]
# Of the 256 colours that every terminal has; under a light text of their own: the terminal's theme does not matter.
TERMINAL_REDS = [f"38;5;255;48;5;{color}" for color in (235, 52, 88, 124, 160)]


@dataclass(frozen=True)
class Frame:
    """One episode after t steps, as it is drawn.

    Args:
        prompt: The prompt's text.
        tokens: The text of each of the t response tokens, with its own blanks: joined they are the response.
        costs: `kl_coef * log pi_ref` of each token, <= 0, in units of reward; empty where there is no cost.
        score: The score of the response; None before the end.
        episode_return: Sum of the rewards so far.
        finish_reason: "eos" or "length"; None before the end.
        max_new_tokens: T, the most tokens a response may have.
        cost_scale: The size of a cost that is drawn in full red, in units of reward (`scale_costs`); 0 draws no colours
            and no legend.
    """

    prompt: str
    tokens: Sequence[str]
    costs: Sequence[float]
    score: float | None
    episode_return: float
    finish_reason: str | None
    max_new_tokens: int
    cost_scale: float = 1.0

    def __post_init__(self) -> None:
        if len(self.costs) not in (0, len(self.tokens)):
            raise InvalidArgumentError(f"`costs` must be empty or one per token, got {len(self.costs)} of them.")

    @property
    def has_legend(self) -> bool:
        """Whether tokens are coloured; the first frame has none yet, and shows the legend of those to come."""
        return self.cost_scale > 0 and (len(self.costs) > 0 or not self.tokens)

    @property
    def spans(self) -> list[Span]:
        """The response, one span a token. One that the reference rules out has no finite cost: full red."""
        texts = [_printable(token) for token in self.tokens]
        if not self.has_legend:
            return [(text, None) for text in texts]
        reds = np.nan_to_num(-np.asarray(self.costs, dtype=float) / self.cost_scale, nan=1.0)
        return list(zip(texts, reds.clip(0.0, 1.0).tolist(), strict=True))


def scale_costs(kl_coef: float, ref_log_probs: NDArray[np.float64]) -> float:
    """The cost that is drawn in full red: that of 7 nats, one chance in a thousand under the reference, or 14, 21, ...

    It is the smallest of these that no cost of the episode exceeds. Tokens of a random agent, which the reference would
    hardly ever choose, then still differ in colour.

    Args:
        kl_coef: price of a nat. ref_log_probs: (t,) nats of the tokens so far.
    """
    surprise = -ref_log_probs[np.isfinite(ref_log_probs)]
    steps = math.ceil(surprise.max(initial=0.0) / NATS_A_STEP - 1e-9)
    return NATS_A_STEP * max(1, steps) * kl_coef


def wait_for_turn(shown_at: float, fps: float, stream: TextIO) -> float:
    """Sleeps until it is time for the next frame on a terminal, where people watch; returns the time then.

    Args:
        shown_at: what the call before returned. fps: frames a second. stream: where to; only a terminal is waited for.
    """
    if stream.isatty():
        time.sleep(min(1 / fps, max(0.0, shown_at + 1 / fps - time.monotonic())))
    return time.monotonic()


def to_text(frame: Frame) -> str:
    """The episode as plain text (`render_mode="ansi"`): unwrapped, and free of escape codes even if a token has one."""
    said = f"prompt: {frame.prompt}\nresponse: {''.join(frame.tokens)}\nstep: {_status(frame)}"
    return _printable("\n".join([said, *_explained(frame)]))


def to_terminal(frame: Frame, width: int = 80, height: int | None = None) -> str:
    """The episode as a block for a terminal; without colours where the environment variable `NO_COLOR` is set.

    Text stays within `width` columns (50 or more), and the block within `height` lines (None: no limit), without the
    start of a response that is too long.
    """
    done = round(20 * min(1.0, len(frame.tokens) / frame.max_new_tokens))
    below = [_style("\u2501" * done, "34") + _style("\u2500" * (20 - done), "2") + f" {_status(frame)}"]
    if frame.has_legend and not os.environ.get("NO_COLOR"):
        swatches = "".join(_style("    ", code) for code in TERMINAL_REDS)
        below.append(f"{swatches} cost of a token: 0 to -{frame.cost_scale:.2g}")
    for line in _explained(frame):
        below += textwrap.wrap(line, width)
    room = width - 2  # two columns are for the ellipsis
    prompt = _tail(_wrap([(_printable(f"prompt: {frame.prompt}"), None)], room, _columns), 4)
    response = _wrap([("response: ", None), *frame.spans], room, _columns)
    if height is not None:
        response = _tail(response, max(1, height - len(prompt) - len(below)))
    text = [
        "".join(_style(part, "" if red is None else TERMINAL_REDS[round(4 * red)]) for part, red in line)
        for line in prompt + response
    ]
    return "\n".join((text + below)[-(height or 0) :])


def show(frame: Frame, stream: TextIO, previous: int = 0) -> int:
    """Writes the episode for a human (`render_mode="human"`).

    On a terminal each call draws over the block before it, and a finished episode stays on the screen, in full.
    Elsewhere (a file, a pipe, a notebook) nothing can be redrawn: the episode is written once, at its end.

    `previous` is the number of lines to draw over: what the call before returned, or 0 to start below them.
    """
    ended = frame.finish_reason is not None
    text = to_text(frame) if ended else ""
    height = 0
    if stream.isatty() and os.environ.get("TERM") != "dumb":
        columns, rows = shutil.get_terminal_size()
        # One column and one row stay free: a full last column wraps on some terminals, and the cursor needs a line.
        text = to_terminal(frame, columns - 1, None if ended else rows - 1)
        height = 0 if ended else text.count("\n") + 1
        text = (f"\x1b[{previous}A\r\x1b[J" if previous else "") + text
    if text:
        encoding = stream.encoding or "utf-8"
        text += "\n\n" if ended else "\n"
        stream.write(text.encode(encoding, "replace").decode(encoding))  # no token may end a run on an ASCII terminal
        stream.flush()
    return height


def to_rgb(frame: Frame) -> NDArray[np.uint8]:
    """The episode as a picture (`render_mode="rgb_array"`): (544, 960, 3) uint8, whatever the frame. Needs Pillow."""
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise ImportError('`render_mode="rgb_array"` needs Pillow: `pip install lmgym[render]`.') from error
    image = Image.new("RGB", SIZE, PAPER)
    draw = ImageDraw.Draw(image)
    _draw_text(draw, 28, "PROMPT", [(_printable(frame.prompt), None)], PROMPT_LINES)
    _draw_text(draw, 144, "RESPONSE", frame.spans, RESPONSE_LINES)
    _draw_footer(draw, 404, frame)
    return np.array(image, dtype=np.uint8)


def _explained(frame: Frame) -> list[str]:
    """Lines that split the return of an ended episode into its parts; none where tokens have no cost."""
    if frame.score is None or not len(frame.costs):
        return []
    of_tokens = float(sum(frame.costs))
    if not math.isclose(frame.score + of_tokens, frame.episode_return, rel_tol=1e-6, abs_tol=1e-6):
        return []
    return [
        f"env return = score {frame.score:+.3f}, and {of_tokens:+.3f} for its tokens: kl_coef * log pi_ref of each.",
        "The env cannot see the other half, -kl_coef * log pi, which a policy that samples adds.",
    ]


def _status(frame: Frame) -> str:
    score = "" if frame.score is None else f"  score: {frame.score:+.3f}"
    ending = "" if frame.finish_reason is None else f"  ({frame.finish_reason})"
    return f"{len(frame.tokens)}/{frame.max_new_tokens}  env return: {frame.episode_return:+.3f}{score}{ending}"


def _printable(text: str) -> str:
    """Replaces characters that control a terminal, hide or reorder text, or cannot be encoded: models emit anything."""
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    pairs = zip(text, " " + text, strict=False)
    return "".join(c if c == "\n" or _is_visible(c, before) else "\ufffd" for c, before in pairs)


def _is_visible(char: str, before: str) -> bool:
    """Whether a character shows as itself. Joiners do within scripts and emojis that are written with them."""
    if char in JOINERS:
        return before > "\u02ff" and unicodedata.category(before)[0] in "LMS"
    category = unicodedata.category(char)
    return category not in ("Cc", "Cf", "Cs", "Zl", "Zp") or char in VISIBLE_FORMATS


def _wrap(spans: Sequence[Span], limit: float, measure: Callable[[str], float]) -> list[list[Span]]:
    """Breaks text into lines within `limit`, apart from one blank at the end: at blanks, or else anywhere."""
    lines: list[list[tuple[str, int]]] = [[]]  # characters, each with the index of its span
    room = limit
    for index, char in ((index, char) for index, (text, _) in enumerate(spans) for char in text):
        if char == "\n":
            lines.append([])
            room = limit
        elif room >= 0 or not char.isspace():
            lines[-1].append((char, index))
            room -= measure(char)
        if room < 0 and not char.isspace():
            line = lines.pop()
            start = 1 + max((at for at, (c, _) in enumerate(line) if c.isspace()), default=len(line) - 2)
            lines += [line[:start], line[start:]]
            room = limit - sum(measure(c) for c, _ in line[start:])
    runs = [itertools.groupby(line, lambda cell: (cell[1], cell[0].isspace())) for line in lines]
    return [[("".join(c for c, _ in run), spans[index][1]) for (index, _), run in line] for line in runs]


def _tail(lines: list[list[Span]], limit: int) -> list[list[Span]]:
    return lines if len(lines) <= limit else [[("\u2026 ", None), *lines[-limit]], *lines[len(lines) - limit + 1 :]]


def _columns(text: str) -> float:
    """Columns of a terminal: Chinese, Japanese and Korean take two a character, combining marks none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)


def _style(text: str, code: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if text and code and not os.environ.get("NO_COLOR") else text


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    from PIL import ImageFont

    return ImageFont.load_default(size=size)


@functools.lru_cache(maxsize=4096)
def _pixels(text: str) -> float:
    """Width of a text, with blanks wider than the font's, so that the boxes of two words do not touch."""
    return _font(TEXT_SIZE).getlength(_drawable(text)) + 4 * text.count(" ")


def _drawable(text: str) -> str:
    """The nearest text that Pillow's font can draw: it has no accents, one dash, and boxes for other characters."""
    text = unicodedata.normalize("NFKD", text).translate({0x2013: "-", 0x2014: "-", 0x2212: "-"})
    return "".join(c for c in text if not unicodedata.combining(c))


def _put(draw: ImageDraw.ImageDraw, x: float, y: float, text: str, size: int = 14, color: str = MUTED) -> None:
    """Writes text from `x` on, centred on the height `y`."""
    draw.text((x, y), _drawable(text), fill=color, font=_font(size), anchor="lm")


def _draw_text(draw: ImageDraw.ImageDraw, top: int, label: str, spans: Sequence[Span], limit: int) -> None:
    _put(draw, LEFT, top, label)
    letters: list[tuple[float, float, str]] = []
    for row, line in enumerate(_tail(_wrap(spans, RIGHT - LEFT - 24, _pixels), limit)):  # 24 are for the ellipsis
        x = float(LEFT)
        y = float(top + 34 + row * LINE_HEIGHT)
        for text, red in line:
            letters.append((x, y, text))
            if red is not None and not text.isspace():
                draw.rectangle((round(x) - 2, y - 16, round(x + _pixels(text)) + 1, y + 15), REDS[round(255 * red)])
            x += _pixels(text)
    for x, y, text in letters:  # after all boxes: that of a token reaches under the last letter of its neighbour
        _put(draw, x, y, text, TEXT_SIZE, INK)


def _draw_footer(draw: ImageDraw.ImageDraw, top: int, frame: Frame) -> None:
    done = (RIGHT - LEFT) * min(1.0, len(frame.tokens) / frame.max_new_tokens)
    draw.rectangle((LEFT, top, RIGHT, top + 5), TRACK)
    draw.rectangle((LEFT, top, LEFT + done, top + 5), ACCENT if frame.tokens else TRACK)
    steps = f"{len(frame.tokens)} / {frame.max_new_tokens}"
    score = "-" if frame.score is None else f"{frame.score:+.3f}"
    numbers = (steps, f"{frame.episode_return:+.3f}", score, frame.finish_reason or "-")
    for x, label, value in zip(range(LEFT, RIGHT, 220), ("STEP", "ENV RETURN", "SCORE", "END"), numbers, strict=True):
        _put(draw, x, top + 30, label)
        _put(draw, x, top + 60, value, 28, MUTED if value == "-" else INK)
    if not frame.has_legend:
        return
    middle = top + 108
    _put(draw, LEFT, middle, "COST OF A TOKEN")
    _put(draw, LEFT + 145, middle, "0")
    for step, color in enumerate(REDS):
        draw.line((LEFT + 160 + step, middle - 6, LEFT + 160 + step, middle + 6), color)
    _put(draw, LEFT + 424, middle, f"-{frame.cost_scale:.2g}   (kl_coef * log pi_ref, in units of reward)")
