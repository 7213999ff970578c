"""The page of a run: what is in it, that text stays text, and that a browser moves it."""

import html
import http.client
import json
import re
import shutil
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
from browser import in_browser, needs_chromium, text_of

import metadyn
from metadyn import view
from metadyn.cli import main

TINY = Path(__file__).parent.parent / "benchmarks" / "tiny_study.py"
EVIL = "</script><script>document.title = 'run'</script>&amp;"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run of a study whose labels are hostile, done."""
    folder = tmp_path_factory.mktemp("view")
    text = TINY.read_text().replace('"bayes", "Bayes"', f'"bayes", {EVIL!r}')
    (folder / "hostile.py").write_text(text.replace("finite, at", f"{EVIL} finite, at"))
    small = ("--outer.steps", "200", "--lstm.hidden", "8")
    assert main(["run", str(folder / "hostile.py"), "--out", str(folder / "out"), *small]) == 0
    return metadyn.RunFolder(folder / "out")


def embedded(page):
    """The JSON of a page."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(text)


def test_a_run_ends_with_its_page(run):
    page = (run.path / "report.html").read_text()
    assert page == view.page(view.collect(run))
    assert embedded(page)["done"]


def test_the_page_holds_the_numbers_of_the_run(run, capsys):
    assert main(["view", str(run.path)]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == run.path / "report.html"
    assert path.stat().st_size < 1_000_000
    data = embedded(path.read_text())
    summary = run.summary()
    assert [row["name"] for row in data["criteria"]] == [r["name"] for r in summary["criteria"]]
    assert data["config"]["--lstm.hidden"] == "8"
    assert data["environment"]["jax"] == summary["environment"]["jax"]
    (group,) = (each for each in data["groups"] if each["name"] == "tracked")
    learners = {each["name"]: each for each in group["learners"]}
    assert learners["lstm"]["steps"] == run.outer_steps()
    assert learners["bayes"]["steps"] is None
    # Mean strengths, by xarray alone.
    tracked = metadyn.load(run.path)["mode_strength"].sel(learner="lstm")
    mean = tracked.mean(["seed", "task"]).transpose("outer_step", "step", "mode")
    np.testing.assert_allclose(learners["lstm"]["curve"][0], mean, rtol=1e-3, atol=1e-6)
    # Learning times of the curves in the page, by NumPy's interpolation of the first crossing.
    curve, times = np.array(learners["bayes"]["curve"][0][0]), learners["bayes"]["time"]
    found = learners["bayes"]["t"][0][0]
    assert any(found)
    for k, t in enumerate(found):
        after = int(np.argmax(curve[:, k] >= 0.5))
        if after == 0:  # never learned
            assert t is None
            continue
        expected = np.interp(0.5, curve[after - 1 : after + 1, k], times[after - 1 : after + 1])
        assert t == pytest.approx(expected, rel=5e-3)


def test_losses_are_those_of_the_run(run):
    (losses,) = view.collect(run)["losses"]
    held = metadyn.load(run.path, "heldout")["loss"].isel(step=slice(1, None))
    mean = held.mean(["seed", "task", "step"])
    bayes, floor = mean.sel(learner="bayes")[0], 0.1**2  # σ²
    expected = (mean.sel(learner="lstm") - bayes) / (bayes - floor)
    np.testing.assert_allclose(losses["excess"][0], expected, rtol=1e-3)


def test_every_probe_on_a_task_set_has_its_losses_beside_it(run):
    (losses,) = view.collect(run)["losses"]
    data = run.results()["tracked", "lstm"]
    probed = data.assign(far=data["mode_strength"])
    groups = [*view._groups("tracked", {"lstm": probed}, page_runs=1)]
    assert [group["name"] for group in groups] == ["tracked", "tracked_far"]
    assert {group["task_set"] for group in groups} == {losses["task_set"]}


def test_text_of_a_run_stays_text(run):
    page = view.page(view.collect(run))
    assert EVIL not in page
    assert page.count("</script>") == 2  # the data's and the page's own
    data = embedded(page)
    assert EVIL in [each["label"] for group in data["groups"] for each in group["learners"]]
    titled = view.page(data | {"title": EVIL})
    assert "<title>&lt;/script&gt;" in titled
    assert EVIL not in titled
    assert "innerHTML" not in page
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)  # nothing to be fetched


def served(run):
    server = view.server(run, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def asked(server, path, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.headers["ETag"], answer.read().decode()


def going_on(run, folder):
    """A copy of a run that lacks its summary and its last checkpoint, which stand beside it."""
    live = folder / "live"
    shutil.copytree(run.path, live)
    last = max((live / "checkpoints").iterdir(), key=lambda path: int(path.name))
    (live / "summary.json").rename(folder / "summary.json")
    last.rename(folder / last.name)
    return live, last


def test_a_run_that_goes_on_is_served_anew_once_a_checkpoint_lands(run, tmp_path):
    live, last = going_on(run, tmp_path)
    with served(metadyn.RunFolder(live)) as server:
        assert server.server_address[0] == "127.0.0.1"
        code, tag, text = asked(server, "/data.json")
        data = json.loads(text)
        assert (code, data["live"], data["done"]) == (200, True, False)
        assert asked(server, "/data.json", **{"If-None-Match": tag}) == (304, tag, "")
        (tmp_path / last.name).rename(last)
        code, newer, text = asked(server, "/data.json", **{"If-None-Match": tag})
        assert code == 200
        assert newer != tag
        steps = [
            each["learners"][0]["steps"]
            for each in (data, json.loads(text))
            for each in each["groups"][:1]
        ]
        assert steps[1] == [*steps[0], int(last.name)]
        assert asked(server, "/")[2].startswith("<!doctype html>")
        assert asked(server, "/config.json")[0] == 404
        assert asked(server, "/data.json", Host="elsewhere.example:80")[0] == 403
        assert asked(server, "/data.json", Host="127.0.0.1")[0] == 200  # as browsers say of port 80
        server.shutdown()
    config = json.loads((live / "config.json").read_text()) | {"seed": 7}
    (live / "config.json").write_text(json.dumps(config))
    with served(metadyn.RunFolder(live)) as server:  # another run of the same shape
        code, other, _ = asked(server, "/data.json", **{"If-None-Match": newer})
        assert (code, other == newer) == (200, False)
        server.shutdown()


def test_bad_input_is_one_line(run, tmp_path, capsys):
    def refused(*arguments):
        assert main(["view", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()[-1:]
        return line

    assert "holds no run of metadyn" in refused(tmp_path)
    assert "holds no run of metadyn" in refused(tmp_path / "absent", "--serve", 0)
    assert "--serve" in refused(run.path, "--serve", 70000)
    assert "--serve" in refused(run.path, "--serve", "http")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused(run.path, "--serve", port)
        assert f"--serve {port}" in said
        assert "choose another port" in said
    broken = tmp_path / "broken"
    shutil.copytree(run.path, broken)
    array = next(path for path in broken.glob("measurements/*/*/arrays/**/*") if path.is_file())
    array.write_bytes(b"damaged")
    for more in ((), ("--serve", 0)):
        assert "is damaged" in refused(broken, *more)
    (broken / "summary.json").write_text("{")
    assert "cannot be read" in refused(broken)


def said(document):
    """What the page says of the slider: the outer step, and the table of slopes."""
    table = re.search(r'<table id="slopes">(.*?)</table>', document, re.DOTALL)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return text_of(document, "at"), {re.sub("<.*?>", "", row) for row in rows}


@needs_chromium
def test_in_a_browser_the_slider_moves_curves_and_slopes(run, tmp_path):
    data = view.collect(run)
    learners = data["groups"][0]["learners"]
    lstm = next(each for each in learners if each["name"] == "lstm")
    steps = len(lstm["steps"])  # so short a training has no slope: it is given one at each step
    lstm["merit"] = [[k + shift for k in range(steps)] for shift in (0.25, 0.125, 0.375)]
    page = tmp_path / "report.html"
    page.write_text(view.page(data))
    last, first = in_browser(page.as_uri()), in_browser(f"{page.as_uri()}#step=0")
    title = re.search(r"<title>(.*?)</title>", page.read_text())[1]
    assert f"<title>{title}</title>" in last  # which the hostile label would have changed
    assert html.escape(EVIL, quote=False) in last
    assert said(last)[0] == "200 of 200"
    assert said(first)[0] == "0 of 200"
    # By hand: the event that a browser sends when the slider is moved.
    moved = tmp_path / "moved.html"
    move = "$('step').value = 0; $('step').dispatchEvent(new Event('input'));"
    text = page.read_text().replace("if (whole.live) {", f"{move}\nif (whole.live) {{", 1)
    moved.write_text(text)
    assert said(in_browser(moved.as_uri())) == said(first)
    assert lstm["curve"][0][0] != lstm["curve"][0][-1]
    curves = [re.search(r'id="curves">(.*?)</div>', each, re.DOTALL)[1] for each in (last, first)]
    panels = [re.findall(r"<svg.*?</svg>", each, re.DOTALL) for each in curves]
    changed = [a != b for a, b in zip(*panels, strict=True)]
    assert changed == [True, False]  # the LSTM's; Bayes stays
    assert any("LSTM0.25 [0.125, 0.375]" in row for row in said(first)[1])
    assert any(f"LSTM{steps - 1}.25 [" in row for row in said(last)[1])


@needs_chromium
def test_in_a_browser_the_page_follows_a_run_that_goes_on(run, tmp_path):
    """Its checkpoint lands before the page asks for the second time, its end before the fourth."""
    live, last = going_on(run, tmp_path)
    run_config = []
    with served(metadyn.RunFolder(live)) as server:
        answer = server.RequestHandlerClass.do_GET

        def do_GET(handler):
            run_config.append(handler.path)
            if run_config.count("/data.json") == 2 and not last.exists():
                (tmp_path / last.name).rename(last)
            if run_config.count("/data.json") == 4 and not (live / "summary.json").exists():
                (tmp_path / "summary.json").rename(live / "summary.json")
            answer(handler)

        server.RequestHandlerClass.do_GET = do_GET
        address = f"http://127.0.0.1:{server.server_port}/"
        before = in_browser(address, 1000)
        assert run_config == ["/"]
        assert re.match("not done: outer step [0-9]+ of 200, updated", text_of(before, "state"))
        assert text_of(before, "at") != "200 of 200"
        landed = in_browser(address, 5000)  # asks after 2 and 4 seconds
        assert text_of(landed, "state").startswith("not done: outer step 200 of 200, updated")
        assert text_of(landed, "at") == "200 of 200"  # the slider was at the end, and follows
        assert landed.count("<circle") > before.count("<circle")
        ended = in_browser(address, 5000)
        assert text_of(ended, "state") == "1 of 1 criteria passed"
        server.shutdown()
