"""Progress: bars on a terminal, lines elsewhere, and every message of a run in both."""

import io
import re
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

import metadyn.progress
from metadyn import runner
from metadyn.progress import Progress


def output(terminal: bool) -> str:
    """Returns the output of two studies, each with one training and two measurements."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=160, color_system=None)
    progress = Progress(console)

    def draw():  # at once, in place of after a tenth of a second
        if terminal:
            progress._bars.refresh()

    with progress.studies(["first", "second"]) as begin:
        for i in range(2):
            begin(i)
            with progress.training(total=10, done=0) as show:
                for step in (1, 10):
                    show(step, {"lstm": {"loss": 0.25, "excess_loss": 0.5}}, episodes=320)
                draw()
            with progress.counting("measuring", 2) as show:
                show("SGD on tracked")
                show("Bayes [/b] on tracked")  # a user's name is not markup
                draw()
            progress.say("figures are in DIR")
    progress.say("all done")
    return text.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_every_study_reports_its_progress(terminal):
    text = output(terminal)
    for study in ("[1/2 first] ", "[2/2 second] "):
        assert f"{study}figures are in DIR" in text
    assert "lstm: loss 0.25, excess over Bayes 0.5" in text
    assert text.rstrip().splitlines()[-1].strip().endswith("all done")


def test_a_terminal_shows_one_bar_for_all_studies_and_one_for_the_current_phase():
    text = output(terminal=True)
    last = [line for line in text.splitlines() if "studies" in line][-1]
    assert "1/2" in last  # the second of two is running
    assert "second" in last
    assert re.search("training .*10/10", text)
    assert re.search("measuring .*1/2 .*0 s left  Bayes \\[/b] on tracked", text)
    assert "training 10/10  0 s left" not in text  # a line that only files get


def test_a_file_gets_lines():
    text = output(terminal=False)
    assert "[2/2 second] training 10/10  0 s left  lstm: loss 0.25," in text
    assert "[2/2 second] measuring 2/2  done" in text
    assert "studies" not in text


@pytest.mark.parametrize(
    ("metric", "summary"), [("excess_loss", "excess over Bayes 0.100 to 0.500"), ("else", "none")]
)
def test_many_meta_learners_are_summed_up_in_a_line(metric, summary):
    text = io.StringIO()
    progress = Progress(Console(file=text, width=160, color_system=None))
    with progress.training(total=10, done=0) as show:
        show(10, {f"lstm_{i}": {"loss": 0.2, metric: 0.1 * i} for i in range(1, 6)}, 320)
    assert "training 10/10  5 meta-learners: " in text.getvalue()
    assert summary in text.getvalue()
    assert "lstm_3" not in text.getvalue()


def test_without_a_console_nothing_is_printed(capsys):
    progress = Progress(None)
    with progress.studies(["one"]) as begin, progress.counting("measuring", 1) as show:
        begin(0)
        show("it")
        progress.say("done")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [True, False])
def test_the_wait_for_compiling_is_visible(terminal, monkeypatch):
    """On a terminal seconds tick. Elsewhere the line is repeated, though nothing has moved."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=160, color_system=None)
    monkeypatch.setattr(metadyn.progress, "LINE_EVERY", 0.2)
    loop = SimpleNamespace(trained={"lstm": None}, compiled=lambda name: time.sleep(1.3))
    plan = SimpleNamespace(outer=SimpleNamespace(checkpoint_steps=(0,)))
    runner.Runner.prepare(
        SimpleNamespace(
            progress=Progress(console), loop=loop, plan=plan, stored=[], calls=lambda: []
        )
    )
    if terminal:
        ticks = re.findall(r"0/1 (\S+) lstm", text.getvalue())
        assert {"0:00:00", "0:00:01"} <= {*ticks}
    else:
        first, *repeated, last = text.getvalue().splitlines()
        assert first == "compiling 0/1  lstm"
        assert 3 <= len(repeated) <= 7
        assert all(re.fullmatch(r"compiling 0/1  lstm  \(for [01] s\)", line) for line in repeated)
        assert last == "compiling 1/1  done"
