"""What a `Frame` looks like as plain text, on a terminal and as a picture."""

from __future__ import annotations

import dataclasses
import io
import re
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from lmgym.envs.rendering import INK, PAPER, REDS, SIZE, Frame, show, to_rgb, to_terminal, to_text
from lmgym.errors import InvalidArgumentError

WORDS = ["the", "film", "was", "not", "really", "good", "but", "i", "loved", "every", "single", "minute", "of", "it"]
STYLE = re.compile(r"\x1b\[[\d;]*m")
MIXED = [
    "un",
    "believ",
    "ably",
    " good",
    ",",
    "\n",
    "\n",
    "\tCaf\u00e9",
    " \u4e2d\u6587\u5b57",
    " \U0001f600",
    "<|end|>",
    "",
]
HOSTILE = ["\x1b[2J", "\x07", "\r", "\x9b31m", "\ud800", "\u202e", "\u0301", "\u2028", "\ufffd", "\x00"]


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "60", "LINES": "12"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)


def frame(count: int = 6, **changes: Any) -> Frame:
    """An episode after `count` of 40 tokens, which cost 0.0, 0.1, 0.2, ..."""
    tokens = [" " + WORDS[t % len(WORDS)] for t in range(count)]
    costs = [-0.1 * t for t in range(count)]
    running = Frame("what i thought of it:", tokens, costs, None, sum(costs), None, max_new_tokens=40)
    return dataclasses.replace(running, **changes)


def ended(count: int = 6, **changes: Any) -> Frame:
    return frame(count, **{"score": 1.25, "finish_reason": "eos", **changes})


class Tty(io.StringIO):
    """A stream to a terminal; `screen` plays back what a reader sees (and could scroll back to)."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        lines = [""]
        row = 0
        for part in re.findall(r"\x1b\[\d*[A-Za-z]|\n|\r|[^\x1b\n\r]+", STYLE.sub("", self.getvalue())):
            if part == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif part == "\x1b[J":
                lines[row:] = [""]
            elif part.startswith("\x1b"):
                assert part[-1] == "A"
                row -= int(part[2:-1])
                assert row >= 0
            elif part != "\r":
                lines[row] += part
        return lines


# --- plain text ---


def test_text_holds_the_episode_word_for_word() -> None:
    text = to_text(ended(tokens=MIXED, costs=()))
    assert "what i thought of it:" in text
    assert "".join(MIXED).replace("\t", "    ") in text
    assert "12/40" in text
    assert "+1.250" in text
    assert "eos" in text
    assert f"{frame().episode_return:+.3f}" in text


def test_text_of_a_running_episode_has_no_score() -> None:
    assert "score" not in to_text(frame())
    assert "eos" not in to_text(frame())


def test_text_has_no_control_characters_even_if_a_token_has() -> None:
    hostile = to_text(frame(prompt="".join(HOSTILE), tokens=HOSTILE, costs=()))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", to_text(frame()) + hostile)


def test_costs_must_match_the_tokens() -> None:
    with pytest.raises(InvalidArgumentError, match=r"`costs` must be empty or one per token, got 2 of them\."):
        frame(3, costs=[0.0, -1.0])


# --- terminal ---


def test_terminal_shows_the_same_words_as_the_text() -> None:
    for shown in (frame(), ended(30), ended(tokens=MIXED, costs=()), frame(0)):
        block = STYLE.sub("", to_terminal(shown, width=50))
        for words in (shown.prompt, "".join(shown.tokens)):
            assert "".join(words.split()) in "".join(block.split())
    assert "+1.250" in STYLE.sub("", to_terminal(ended()))


def test_terminal_colours_tokens_by_cost() -> None:
    def style_of(word: str, block: str) -> str:
        found = re.search(rf"(\x1b\[[\d;]+m){word}\x1b\[0m", block)
        assert found is not None
        return found[1]

    block = to_terminal(frame(3, costs=[0.0, -0.5, -1.0]))
    assert len({style_of(word, block) for word in ("the", "film", "was")}) == 3
    equal = to_terminal(frame(3, costs=[-0.5, -0.5, -0.5]))
    assert len({style_of(word, equal) for word in ("the", "film", "was")}) == 1
    # At full red a token stays there, and what the reference rules out is full red.
    beyond = to_terminal(frame(3, costs=[-1.0, -7.0, -np.inf]))
    assert len({style_of(word, beyond) for word in ("the", "film", "was")}) == 1
    assert style_of("the", beyond) == style_of("was", block)
    scaled = to_terminal(frame(3, costs=[0.0, -5.0, -10.0], cost_scale=10.0))
    assert style_of("film", scaled) == style_of("film", block)


def test_terminal_without_costs_has_neither_colour_nor_legend() -> None:
    assert "cost" in to_terminal(frame())
    for plain in (frame(costs=()), frame(cost_scale=0.0), frame(0, cost_scale=0.0)):
        assert "48;5" not in to_terminal(plain)
        assert "cost" not in to_terminal(plain)


def test_no_color_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "")  # the convention: set, and not empty
    assert "\x1b" in to_terminal(ended())
    monkeypatch.setenv("NO_COLOR", "1")
    block = to_terminal(ended())
    assert "\x1b" not in block
    assert "cost" not in block  # nothing is coloured: nothing to explain
    assert "".join(ended().tokens) in block


@pytest.mark.parametrize("width", [50, 80])
def test_terminal_lines_fit_the_width(width: int) -> None:
    for tokens in (["x" * 300], ["\u4e2d" * 200], [" " * 200, "end"], [f" {word}" for word in WORDS * 10], ["\n"] * 5):
        for line in STYLE.sub("", to_terminal(frame(tokens=tokens, costs=()), width)).split("\n"):
            assert sum(1 + (c == "\u4e2d") for c in line) <= width


def test_terminal_breaks_between_words() -> None:
    lines = STYLE.sub("", to_terminal(frame(tokens=["un", "like", "ly "] * 40, costs=()), width=50)).split("\n")
    assert len(lines) > 8
    assert all(word in ("prompt:", "response:", "unlikely") for line in lines[1:-1] for word in line.split())


def test_terminal_block_keeps_the_end_of_a_long_response() -> None:
    tokens = [f" w{t}" for t in range(400)]
    block = STYLE.sub("", to_terminal(frame(tokens=tokens, costs=(), max_new_tokens=400), width=60, height=10))
    assert block.count("\n") + 1 == 10
    assert "\u2026" in block
    assert "w399" in block
    assert "w1 " not in block


# --- show ---


def test_show_redraws_one_block_on_a_terminal() -> None:
    stream = Tty()
    previous = 0
    for count in range(31):
        previous = show(frame(count), stream, previous)
        assert stream.screen() == [*STYLE.sub("", to_terminal(frame(count), 59, 11)).split("\n"), ""]
    assert show(ended(31), stream, previous) == 0
    first = STYLE.sub("", to_terminal(ended(31), 59)).split("\n")
    assert stream.screen() == [*first, "", ""]
    show(frame(0), stream, 0)  # the next episode leaves the finished one where it is
    assert stream.screen() == [*first, "", *STYLE.sub("", to_terminal(frame(0), 59)).split("\n"), ""]


def test_show_never_draws_more_than_the_screen_can_take_back() -> None:
    stream = Tty()
    previous = 0
    for count in range(0, 400, 20):
        previous = show(frame(count, max_new_tokens=400), stream, previous)
        assert previous < 12
    show(ended(400, max_new_tokens=400), stream, previous)
    assert len(stream.screen()) > 12  # the finished episode is shown in full
    assert "\u2026" not in stream.getvalue().rsplit("\x1b[J", 1)[1]


def test_show_moves_the_cursor_but_does_not_colour_under_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Tty()
    show(frame(2), stream, show(frame(1), stream))
    assert not STYLE.search(stream.getvalue())
    assert sum("response" in line for line in stream.screen()) == 1


@pytest.mark.parametrize("stream", [io.StringIO(), Tty()], ids=["pipe", "dumb terminal"])
def test_show_writes_once_where_nothing_can_be_redrawn(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    if stream.isatty():
        monkeypatch.setenv("TERM", "dumb")
    for count in range(6):
        assert show(frame(count), stream) == 0
    assert stream.getvalue() == ""
    assert show(ended(6), stream) == 0
    assert stream.getvalue() == to_text(ended(6)) + "\n\n"


def test_show_survives_a_stream_that_knows_ascii_only() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    show(ended(tokens=[*MIXED, *HOSTILE], costs=()), stream)
    assert b"unbelievably good" in raw.getvalue()


# --- picture ---


@pytest.fixture
def _pillow() -> None:
    pytest.importorskip("PIL")


def has(picture: np.ndarray, color: tuple[int, ...]) -> np.ndarray:
    """Where the picture, above its footer, has this colour."""
    return (picture[:400] == color).all(axis=-1)


@pytest.mark.usefixtures("_pillow")
@pytest.mark.parametrize(
    "shown",
    [
        frame(0),
        frame(),
        ended(),
        ended(40, score=-1e9, episode_return=float("-inf"), finish_reason="length"),
        frame(2000, max_new_tokens=2000),
        frame(cost_scale=0.0),
        frame(tokens=MIXED, costs=[-0.3] * len(MIXED)),
        frame(prompt="".join(HOSTILE), tokens=HOSTILE, costs=[-np.inf, np.nan] * 5),
        frame(prompt="x" * 5000, tokens=["y" * 5000], costs=[-0.5]),
        frame(prompt="", tokens=["\n"] * 40, costs=()),
    ],
    ids=["empty", "running", "ended", "length", "long", "plain", "mixed", "hostile", "unbroken", "newlines"],
)
def test_every_picture_has_the_same_shape(shown: Frame) -> None:
    picture = to_rgb(shown)
    assert picture.shape == (SIZE[1], SIZE[0], 3)
    assert picture.dtype == np.uint8
    assert not any(side % 2 for side in picture.shape[:2])  # what yuv420p, the codec of RecordVideo, asks for
    margins = (picture[:, :36], picture[:, -30:], picture[:16], picture[-16:], picture[388:402])
    assert all((margin == 255).all() for margin in margins), "text runs out of its place"


@pytest.mark.usefixtures("_pillow")
def test_picture_colours_tokens_by_cost() -> None:
    picture = to_rgb(frame(2, costs=[0.0, -1.0]))
    likely = has(picture, REDS[0])
    unlikely = has(picture, REDS[-1])
    assert likely.sum() > 200
    assert unlikely.sum() > 200
    assert np.nonzero(likely)[1].max() < np.nonzero(unlikely)[1].min()  # the first token is the one on the left
    assert not has(to_rgb(frame(2, costs=[0.0, 0.0])), REDS[-1]).any()
    assert not has(to_rgb(frame(2, costs=())), REDS[0]).any()
    np.testing.assert_array_equal(to_rgb(frame(2, costs=[0.0, -np.inf])), picture)
    middle = to_rgb(frame(2, costs=[0.0, -1.0], cost_scale=2.0))
    assert has(middle, REDS[128]).any()
    assert not has(middle, REDS[-1]).any()


@pytest.mark.usefixtures("_pillow")
def test_picture_of_a_step_adds_one_token_and_moves_the_bar() -> None:
    before = to_rgb(frame(4))
    after = to_rgb(frame(5))
    rows, columns = np.nonzero((before != after).any(axis=-1))
    assert rows.min() > 144  # the prompt stays
    tokens = columns[rows < 400]
    assert tokens.max() - tokens.min() < 150  # one word
    bars = [(to_rgb(frame(count))[406] == (47, 111, 222)).all(axis=-1).sum() for count in (0, 10, 20, 40)]
    assert bars[0] == 0
    np.testing.assert_allclose(np.diff(bars), [220, 220, 440], atol=2)


@pytest.mark.usefixtures("_pillow")
def test_picture_shows_the_score_at_the_end_and_the_last_lines() -> None:
    assert (to_rgb(frame()) != to_rgb(ended()))[410:490, 480:].any()
    long, longer = (frame(count, costs=(), max_new_tokens=2000, episode_return=0.0) for count in (1000, 1001))
    assert (to_rgb(long) != to_rgb(longer))[:400].any()
    other = dataclasses.replace(long, tokens=["so", *long.tokens[1:]])
    assert (to_rgb(long) == to_rgb(other)).all()  # its first line has scrolled out


@pytest.mark.usefixtures("_pillow")
def test_picture_keeps_a_long_prompt_away_from_the_response() -> None:
    short = to_rgb(frame())
    long = to_rgb(frame(prompt="word " * 1000))
    assert (short[:130] != long[:130]).any()
    np.testing.assert_array_equal(short[130:], long[130:])


@pytest.mark.usefixtures("_pillow")
def test_picture_does_not_depend_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = to_rgb(ended())
    monkeypatch.setenv("NO_COLOR", "1")
    np.testing.assert_array_equal(to_rgb(ended()), picture)


def test_text_is_readable_on_every_red_and_reds_darken() -> None:
    def luminance(color: tuple[float, ...]) -> float:  # of WCAG 2
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (c / 255 for c in color)]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    ink = luminance(tuple(bytes.fromhex(INK[1:])))
    scale = np.array([luminance(red) for red in REDS])
    assert ((scale + 0.05) / (ink + 0.05) >= 4.5).all()
    assert (np.diff(scale[::15]) < 0).all()
    assert luminance(tuple(bytes.fromhex(PAPER[1:]))) > scale[0]


def test_picture_without_pillow_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install lmgym\[render\]"):
        to_rgb(frame())


class Typewriter(gym.Env[int, int]):
    """An env that does nothing but show: five tokens an episode."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}
    render_mode = "rgb_array"
    observation_space = action_space = gym.spaces.Discrete(6)

    def reset(self, **_: Any) -> tuple[int, dict[str, Any]]:
        self.count = 0
        return 0, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict[str, Any]]:
        self.count += 1
        return self.count, 0.0, self.count == 5, False, {}

    def render(self) -> np.ndarray:  # type: ignore[override]
        return to_rgb(ended(5) if self.count == 5 else frame(self.count))


@pytest.mark.usefixtures("_pillow")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_gymnasium_records_a_video(tmp_path: Path) -> None:
    moviepy = pytest.importorskip("moviepy")
    env = gym.wrappers.RecordVideo(Typewriter(), str(tmp_path / "videos"), episode_trigger=lambda _: True)
    env.reset()
    while not env.step(0)[2]:
        pass
    env.close()
    (path,) = tmp_path.glob("videos/*.mp4")
    with moviepy.VideoFileClip(str(path)) as clip:
        assert tuple(clip.size) == SIZE
        last = clip.get_frame(clip.duration - 0.01).astype(int)
    assert np.abs(last - to_rgb(ended(5))).mean() < 4  # lossy, but the picture that was drawn


@pytest.mark.parametrize("control", list("\u202a\u202e\u2066\u200f\u061c\u200b\u2060\ufeff\u2028"))
def test_what_hides_or_reorders_text_is_shown(control: str) -> None:
    frame = Frame(f"a{control}b", [f"c{control}", "d"], [], None, 0.0, None, 4)
    for text in (to_text(frame), to_terminal(frame)):
        assert control not in text
        assert text.count("\ufffd") == 2


def test_joiners_stay_where_a_script_or_an_emoji_is_written_with_them() -> None:
    persian = "\u0645\u06cc\u200c\u062e"
    family = "\U0001f468\u200d\U0001f469"
    written = to_text(Frame(persian, [family, "a\u200db", "\u0600"], [], None, 0.0, None, 4))
    assert persian in written
    assert family in written
    assert "a\ufffdb\u0600" in written
