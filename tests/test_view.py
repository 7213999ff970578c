"""The page of a run: its numbers, its escaping of text, its server and its slider in a browser."""

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
    """A finished run of the tiny study, with labels that contain hostile HTML."""
    folder = tmp_path_factory.mktemp("view")
    text = TINY.read_text().replace('"bayes", "Bayes"', f'"bayes", {EVIL!r}')
    (folder / "hostile.py").write_text(text.replace("finite, at", f"{EVIL} finite, at"))
    small = ("--outer.steps", "200", "--lstm.hidden", "8")
    assert main(["run", str(folder / "hostile.py"), "--out", str(folder / "out"), *small]) == 0
    return metadyn.RunFolder(folder / "out")


def embedded(page):
    """Returns the JSON data that a page embeds."""
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
    (tracked,) = (group for group in data["groups"] if group["name"] == "tracked")
    learners = {learner["name"]: learner for learner in tracked["learners"]}
    assert learners["lstm"]["steps"] == run.outer_steps()
    assert learners["bayes"]["steps"] is None
    # The curves in the page are mean strengths, here computed by xarray alone.
    strength = metadyn.load(run.path)["mode_strength"].sel(learner="lstm")
    mean = strength.mean(["seed", "task"]).transpose("outer_step", "step", "mode")
    np.testing.assert_allclose(learners["lstm"]["curve"][0], mean, rtol=1e-3, atol=1e-6)
    # Learning times are those at which the page's curves, interpolated by NumPy, first reach 0.5.
    curve, times = np.array(learners["bayes"]["curve"][0][0]), learners["bayes"]["time"]
    crossings = learners["bayes"]["t"][0][0]
    assert any(crossings)
    for k, t in enumerate(crossings):
        first = int(np.argmax(curve[:, k] >= 0.5))
        if first == 0:  # the mode is never learned
            assert t is None
            continue
        expected = np.interp(0.5, curve[first - 1 : first + 1, k], times[first - 1 : first + 1])
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
    probed = probed.assign_coords(far_singular_value=data["singular_value"])
    groups = [*view._groups("tracked", {"lstm": probed}, page_runs=1)]
    assert [group["name"] for group in groups] == ["tracked", "tracked_far"]
    assert {group["task_set"] for group in groups} == {losses["task_set"]}


def test_text_of_a_run_stays_text(run):
    page = view.page(view.collect(run))
    assert EVIL not in page
    assert page.count("</script>") == 2  # that of the data and that of the page's program
    data = embedded(page)
    assert EVIL in [learner["label"] for group in data["groups"] for learner in group["learners"]]
    titled = view.page(data | {"title": EVIL})
    assert "<title>&lt;/script&gt;" in titled
    assert EVIL not in titled
    assert "innerHTML" not in page
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)  # it loads nothing


def served(run):
    server = view.server(run, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def get(server, path, **headers):
    """Returns the status, entity tag and text of a server's response."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.headers["ETag"], response.read().decode()


def unfinished_copy(run, folder):
    """Copies a run, and moves its summary and its last checkpoint from the copy into `folder`."""
    live = folder / "live"
    shutil.copytree(run.path, live)
    last_checkpoint = max((live / "checkpoints").iterdir(), key=lambda path: int(path.name))
    (live / "summary.json").rename(folder / "summary.json")
    last_checkpoint.rename(folder / last_checkpoint.name)
    return live, last_checkpoint


def test_a_run_that_goes_on_is_served_anew_once_a_checkpoint_lands(run, tmp_path):
    live, last_checkpoint = unfinished_copy(run, tmp_path)
    with served(metadyn.RunFolder(live)) as server:
        assert server.server_address[0] == "127.0.0.1"
        code, old_tag, text = get(server, "/data.json")
        data = json.loads(text)
        assert (code, data["live"], data["done"]) == (200, True, False)
        assert get(server, "/data.json", **{"If-None-Match": old_tag}) == (304, old_tag, "")
        (tmp_path / last_checkpoint.name).rename(last_checkpoint)
        code, new_tag, text = get(server, "/data.json", **{"If-None-Match": old_tag})
        assert code == 200
        assert new_tag != old_tag
        steps = [
            group["learners"][0]["steps"]
            for content in (data, json.loads(text))
            for group in content["groups"][:1]
        ]
        assert steps[1] == [*steps[0], int(last_checkpoint.name)]
        assert get(server, "/")[2].startswith("<!doctype html>")
        assert get(server, "/config.json")[0] == 404
        assert get(server, "/data.json", Host="elsewhere.example:80")[0] == 403
        assert get(server, "/data.json", Host="127.0.0.1")[0] == 200  # browsers leave out port 80
        server.shutdown()
    config = json.loads((live / "config.json").read_text()) | {"seed": 7}
    (live / "config.json").write_text(json.dumps(config))
    with served(metadyn.RunFolder(live)) as server:  # a run of the same shape whose seed differs
        code, other_tag, _ = get(server, "/data.json", **{"If-None-Match": new_tag})
        assert (code, other_tag == new_tag) == (200, False)
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
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        message = refused(run.path, "--serve", port)
        assert f"--serve {port}" in message
        assert "choose another port" in message
    broken = tmp_path / "broken"
    shutil.copytree(run.path, broken)
    array = next(path for path in broken.glob("measurements/*/*/arrays/**/*") if path.is_file())
    array.write_bytes(b"damaged")
    for options in ((), ("--serve", 0)):
        assert "is damaged" in refused(broken, *options)
    (broken / "summary.json").write_text("{")
    assert "cannot be read" in refused(broken)


def position_and_slopes(document):
    """Returns the outer step that the page shows at the slider, and the rows of its slopes."""
    table = re.search(r'<table id="slopes">(.*?)</table>', document, re.DOTALL)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", table)
    return text_of(document, "at"), {re.sub("<.*?>", "", row) for row in rows}


@needs_chromium
def test_in_a_browser_the_slider_moves_curves_and_slopes(run, tmp_path):
    data = view.collect(run)
    learners = data["groups"][0]["learners"]
    lstm = next(learner for learner in learners if learner["name"] == "lstm")
    steps = len(lstm["steps"])  # training is too short for slopes, so each step is given one
    lstm["merit"] = [[k + shift for k in range(steps)] for shift in (0.25, 0.125, 0.375)]
    page = tmp_path / "report.html"
    page.write_text(view.page(data))
    at_end, at_start = in_browser(page.as_uri()), in_browser(f"{page.as_uri()}#step=0")
    title = re.search(r"<title>(.*?)</title>", page.read_text())[1]
    assert f"<title>{title}</title>" in at_end  # the hostile label's script would have changed it
    assert html.escape(EVIL, quote=False) in at_end
    assert position_and_slopes(at_end)[0] == "200 of 200"
    assert position_and_slopes(at_start)[0] == "0 of 200"
    # Moving the slider by hand sends an event, which a script sends here.
    moved_page = tmp_path / "moved.html"
    move = "$('step').value = 0; $('step').dispatchEvent(new Event('input'));"
    moved_text = page.read_text().replace("if (whole.live) {", f"{move}\nif (whole.live) {{", 1)
    moved_page.write_text(moved_text)
    assert position_and_slopes(in_browser(moved_page.as_uri())) == position_and_slopes(at_start)
    assert lstm["curve"][0][0] != lstm["curve"][0][-1]
    shown = (at_end, at_start)
    curves = [re.search(r'id="curves">(.*?)</div>', shot, re.DOTALL)[1] for shot in shown]
    panels = [re.findall(r"<svg.*?</svg>", drawing, re.DOTALL) for drawing in curves]
    panels_change = [a != b for a, b in zip(*panels, strict=True)]
    assert panels_change == [True, False]  # the LSTM's panel changes, that of Bayes does not
    assert any("LSTM0.25 [0.125, 0.375]" in row for row in position_and_slopes(at_start)[1])
    assert any(f"LSTM{steps - 1}.25 [" in row for row in position_and_slopes(at_end)[1])


@needs_chromium
def test_in_a_browser_the_page_follows_a_run_that_goes_on(run, tmp_path):
    """The last checkpoint lands before the page's second request for data, the summary before its
    fourth."""
    live, last_checkpoint = unfinished_copy(run, tmp_path)
    requests = []
    with served(metadyn.RunFolder(live)) as server:
        do_get = server.RequestHandlerClass.do_GET

        def do_GET(handler):
            requests.append(handler.path)
            if requests.count("/data.json") == 2 and not last_checkpoint.exists():
                (tmp_path / last_checkpoint.name).rename(last_checkpoint)
            if requests.count("/data.json") == 4 and not (live / "summary.json").exists():
                (tmp_path / "summary.json").rename(live / "summary.json")
            do_get(handler)

        server.RequestHandlerClass.do_GET = do_GET
        address = f"http://127.0.0.1:{server.server_port}/"
        before = in_browser(address, 1000)
        assert requests == ["/"]
        assert re.match("not done: outer step [0-9]+ of 200, updated", text_of(before, "state"))
        assert text_of(before, "at") != "200 of 200"
        landed = in_browser(address, 5000)  # the page asks for data after 2 and 4 seconds
        assert text_of(landed, "state").startswith("not done: outer step 200 of 200, updated")
        assert text_of(landed, "at") == "200 of 200"  # a slider at the end follows
        assert landed.count("<circle") > before.count("<circle")
        ended = in_browser(address, 5000)
        assert text_of(ended, "state") == "1 of 1 criteria passed"
        server.shutdown()
