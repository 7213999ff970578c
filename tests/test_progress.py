"""On a terminal bars, elsewhere lines; on both all that a run says of itself."""

import io
import re
import time
from types import SimpleNamespace

import pytest
from rich.console import Console

import metadyn.progress
from metadyn import runner
from metadyn.progress import Progress


def said(terminal: bool) -> str:
    """What two studies of two measurements and one training say."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=160, color_system=None)
    progress = Progress(console)

    def drawn():  # now, and not when a tenth of a second is over
        if terminal:
            progress._bars.refresh()

    with progress.studies(["first", "second"]) as begin:
        for i in range(2):
            begin(i)
            with progress.training(total=10, done=0) as show:
                for step in (1, 10):
                    show(step, {"lstm": {"loss": 0.25, "excess_loss": 0.5}}, episodes=320)
                drawn()
            with progress.counting("measuring", 2) as show:
                show("SGD on tracked")
                show("Bayes [/b] on tracked")  # no markup: it is the user's own name
                drawn()
            progress.say("figures are in DIR")
    progress.say("all done")
    return text.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_every_study_says_where_it_stands(terminal):
    text = said(terminal)
    for study in ("[1/2 first] ", "[2/2 second] "):
        assert f"{study}figures are in DIR" in text
    assert "lstm: loss 0.25, excess over Bayes 0.5" in text
    assert text.rstrip().splitlines()[-1].strip().endswith("all done")


def test_a_terminal_shows_one_bar_for_all_studies_and_one_for_what_goes_on():
    text = said(terminal=True)
    last = [line for line in text.splitlines() if "studies" in line][-1]
    assert "1/2" in last  # the second of two is going on
    assert "second" in last
    assert re.search("training .*10/10", text)
    assert re.search("measuring .*1/2 .*0 s left  Bayes \\[/b] on tracked", text)
    assert "training 10/10  0 s left" not in text  # a line, which only files get


def test_a_file_gets_lines():
    text = said(terminal=False)
    assert "[2/2 second] training 10/10  0 s left  lstm: loss 0.25," in text
    assert "[2/2 second] measuring 2/2  done" in text
    assert "studies" not in text


@pytest.mark.parametrize(
    ("excess", "says"), [("excess_loss", "excess over Bayes 0.100 to 0.500"), ("else", "none")]
)
def test_many_meta_learners_are_summed_up_in_a_line(excess, says):
    text = io.StringIO()
    progress = Progress(Console(file=text, width=160, color_system=None))
    with progress.training(total=10, done=0) as show:
        show(10, {f"lstm_{i}": {"loss": 0.2, excess: 0.1 * i} for i in range(1, 6)}, 320)
    assert "training 10/10  5 meta-learners: " in text.getvalue()
    assert says in text.getvalue()
    assert "lstm_3" not in text.getvalue()


def test_nothing_is_said_to_no_console(capsys):
    progress = Progress(None)
    with progress.studies(["one"]) as begin, progress.counting("measuring", 1) as show:
        begin(0)
        show("it")
        progress.say("done")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [True, False])
def test_the_wait_for_compiling_is_in_sight(terminal, monkeypatch):
    """On a terminal seconds tick; elsewhere a line comes again, though nothing has moved."""
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
        first, *again, last = text.getvalue().splitlines()
        assert first == "compiling 0/1  lstm"
        assert 3 <= len(again) <= 7
        assert all(re.fullmatch(r"compiling 0/1  lstm  \(for [01] s\)", line) for line in again)
        assert last == "compiling 1/1  done"
