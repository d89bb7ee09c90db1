"""What a person sees: one line that moves on a terminal, few lines elsewhere, a table that fits."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.cells import cell_len
from rich.console import Console

from vitlab import face as module
from vitlab.face import Face, Row, duration


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def faced(terminal: bool, width: int = 80) -> tuple[Face, io.StringIO]:
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=terminal, width=width, highlight=False, soft_wrap=True, color_system=None
    )
    return Face(console), out


def screen(out: io.StringIO) -> list[str]:
    """What a terminal shows in the end, and every state of the line that moved."""
    return [re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", line) for line in re.split(r"[\r\n]", out.getvalue())]


# ---------------------------------------------------------------- elsewhere than on a terminal


def test_a_log_gets_a_line_every_few_seconds(clock: Clock) -> None:
    face, out = faced(False)
    with face.stage("pretrain") as line:
        line.say("starting 2 workers")
        for step in range(1, 601):
            clock.now += 0.1
            line.progress(step, 600, {"train/loss": 1 / step})
        line.note("kept")
    lines = out.getvalue().splitlines()
    assert lines[0] == "  pretrain: starting 2 workers"
    assert lines[1].startswith("  pretrain: step 1/600 · loss 1.0000"), (
        "the first figure after a word is news"
    )
    assert lines[-1] == "  pretrain: kept"
    assert 11 <= len(lines) - 2 <= 13
    assert "\x1b" not in out.getvalue()
    assert lines[2].startswith("  pretrain: step 51/600 · loss 0.0196 · 55 s left")


def test_nothing_is_cut_and_no_markup_is_read(clock: Clock) -> None:
    face, out = faced(False, width=40)
    with face.stage("s") as line:
        line.say("[bold]x[/bold] [0/3] " + "long " * 30)
    face.problem("data.source: given [1]; " + "word " * 30)
    face.print("[red]y")
    lines = out.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("  s: [bold]x[/bold] [0/3] long")
    assert lines[1].startswith("vitlab: data.source: given [1]; word")
    assert lines[2] == "[red]y"


# ---------------------------------------------------------------- on a terminal


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("stage", ["pretrain", "evaluate student"])
def test_the_live_line_fits_and_is_gone_in_the_end(width: int, stage: str) -> None:
    face, out = faced(True, width)
    values = {"train/loss": 0.1234, "val/top1": 0.5, "train/images_per_s": 123456.7}
    with face.stage(stage) as line:
        line.say("starting Ray " + "and more " * 20)
        assert line.bar is not None
        for step in (1, 2, 500):
            time.sleep(0.01)
            line.progress(step, 600, values)
            line.bar.refresh()
        line.note("stays")
        assert re.search(r"step 500/600 .*left$", line.text) or width < 80
    for text in screen(out):
        assert cell_len(text) <= width
        assert not text.startswith(f"{stage[:4]}…")
    assert any("starting Ray" in text and text.endswith("…") for text in screen(out))
    assert any(f"{stage} ━" in text for text in screen(out))
    assert f"  {stage}: stays" in screen(out)
    assert out.getvalue().endswith("\x1b[1A\x1b[2K"), "the line was not wiped"


def test_with_room_all_is_said_and_without_it_the_least_goes() -> None:
    values = {"train/loss": 0.1234, "val/top1": 0.5, "train/images_per_s": 12345.6}
    said = []
    for width in (120, 80, 62, 50):
        face, _ = faced(True, width)
        with face.stage("pretrain") as line:
            line.progress(1, 600, values)
            line.since -= 10
            line.progress(300, 600, values)
            said.append(line.text)
    assert said == [
        "step 300/600 · loss 0.1234 · val top-1 50.0% · 12,346 images/s · 10 s left",
        "step 300/600 · loss 0.1234 · val top-1 50.0% · 10 s left",
        "step 300/600 · val top-1 50.0% · 10 s left",
        "step 300/600 · 10 s left",
    ]


def test_a_stage_after_a_failed_one_has_its_own_line() -> None:
    face, out = faced(True)
    with pytest.raises(KeyboardInterrupt), face.stage("one"):
        raise KeyboardInterrupt
    with face.stage("two") as line:
        line.say("works")
    assert any("two" in text and "works" in text for text in screen(out))
    assert out.getvalue().count("\x1b[?25h") == 2, "the cursor stays hidden"


# ---------------------------------------------------------------- the time that is left


def test_the_time_left_counts_from_where_this_attempt_began(clock: Clock) -> None:
    face, _ = faced(True, 200)
    with face.stage("pretrain") as line:
        clock.now += 100  # workers start
        line.progress(300, 600, {})
        assert line.text == "step 300/600"
        clock.now += 10
        line.progress(310, 600, {})
        assert line.text == "step 310/600 · 4:50 min left"
        # A worker is lost: back to the checkpoint, and the restart's own time counts for nothing.
        clock.now += 60
        line.progress(305, 600, {})
        assert line.text == "step 305/600"
        clock.now += 5
        line.progress(310, 600, {})
        assert line.text == "step 310/600 · 4:50 min left"
        clock.now += 290
        line.progress(600, 600, {})
        assert line.text == "step 600/600"


def test_values_stay_until_there_are_newer_ones(clock: Clock) -> None:
    face, _ = faced(True, 200)
    with face.stage("x") as line:
        line.progress(1, 9, {"val/top1": 0.25})
        line.progress(1, 9, {"train/loss": 2.0})
        line.progress(1, 9, {"train/loss": 1.5})
        assert line.text == "step 1/9 · loss 1.5000 · val top-1 25.0%"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (4.26, "4.3 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1:00 min"),
        (119.7, "2:00 min"),
        (187, "3:07 min"),
        (3599.6, "1:00 h"),
        (3725, "1:02 h"),
        (360000, "100:00 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---------------------------------------------------------------- the end


@pytest.mark.parametrize("terminal", [True, False])
def test_the_rows_and_the_table_fit(terminal: bool) -> None:
    face, out = faced(terminal)
    for stage, outcome in (("pretrain", "resumed"), ("evaluate student", "ran"), ("finetune", "hit")):
        face.done(Row(stage, outcome, 75.3, "validation top-1 97.22%", "abcdef0123456789"))
    face.table("mae_then_finetune · digits · 120 s")
    lines = screen(out)
    assert all(cell_len(line) <= 80 for line in lines)
    assert lines[:3] == [
        "↻ pretrain         resumed  1:15 min  validation top-1 97.22%",
        "✓ evaluate student ran      1:15 min  validation top-1 97.22%",
        "• finetune         hit      1:15 min  validation top-1 97.22%",
    ]
    rows = [line.split() for line in lines if "abcdef01" in line]
    assert rows[0] == ["pretrain", "resumed", "75.3", "validation", "top-1", "97.22%", "abcdef01"]
    assert rows[1][:3] == ["evaluate", "student", "ran"]
    assert "abcdef012" not in out.getvalue()


def test_quiet_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    face = Face(quiet=True)
    with face.stage("x") as line:
        line.say("y")
        line.progress(1, 2, {})
    face.table("t")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_wait_is_said(terminal: bool) -> None:
    face, out = faced(terminal)
    with face.waiting("counting"):
        pass
    assert "counting" in out.getvalue()
