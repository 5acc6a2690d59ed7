"""The user study: a page that people can use, and votes that are counted right."""

import json
import os
import shutil
import subprocess
import time

import pytest
import torch

from scripts import user_study

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def write_votes(path, votes, a="base", b="add", rater="me"):
    path.write_text(json.dumps({"id": "x", "a": a, "b": b, "rater": rater, "votes": [
        {"pair": i, "question": question, "left": "a", "winner": winner, "seconds": 1.}
        for i, (question, winner) in enumerate(votes)]}))
    return path


def elo_difference(wins, losses):
    table = torch.tensor([[[0., wins], [losses, 0.]]], dtype=torch.double)
    first, second = user_study.bradley_terry_elo(table)[0].tolist()
    assert abs(first + second - 2000) < 1e-6
    return first - second


def test_two_models_have_the_elo_of_their_odds():
    """3 wins of 4 are 400 log10(3) apart; who lost nothing is not infinitely far away."""
    assert abs(elo_difference(30000., 10000.) - 190.85) < .1
    assert elo_difference(5., 5.) == pytest.approx(0.)
    assert 100 < elo_difference(10., 0.) < 1000


def test_ratings_of_three_are_recovered_from_many_votes():
    truth = torch.tensor([1150., 1000., 850.], dtype=torch.double)
    odds = 1 / (1 + 10 ** ((truth[None] - truth[:, None]) / 400))
    wins = 10000 * odds * (1 - torch.eye(3, dtype=torch.double))
    torch.testing.assert_close(user_study.bradley_terry_elo(wins[None])[0], truth, atol=1., rtol=0)


def test_votes_are_counted_with_intervals_that_cover(tmp_path):
    """30 of 40 votes for quality: 75 %, Wilson's interval is 60 to 86 %, the bootstrap's is close to it."""
    content = [("quality", "b")] * 30 + [("quality", "a")] * 10 + [("prompt", "tie")] * 20
    votes = user_study.read_votes([write_votes(tmp_path / "v.json", content)] * 2)      # handed in twice
    assert len(votes) == 60
    rows = {(question, name): rest for question, name, *rest in user_study.summarize(votes)}
    rate, (low, high), elo, (elo_low, elo_high) = rows["quality", "add"]
    assert rate == .75 and .56 < low < .67 and .83 < high < .92 and elo_low < elo < elo_high
    assert rows["quality", "base"][0] == .25 and elo > 1000 > rows["quality", "base"][2]
    assert rows["prompt", "add"][0] == .5 and rows["prompt", "add"][2] == pytest.approx(1000)


def test_the_command_counts_votes(tmp_path, capsys):
    path = write_votes(tmp_path / "v.json", [("quality", "b"), ("quality", "tie"), ("prompt", "a")])
    user_study.main(["--count", str(path)])
    printed = capsys.readouterr().out
    assert "| quality | add | 75.0% |" in printed and "3 votes" in printed


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"a": 1, "b": 2, "votes": []}',
                                     '{"id": "x", "rater": "r", "a": "m", "b": "n", "votes": [{}]}',
                                     '{"id": "x", "rater": "r", "a": "m", "b": "n", "votes": []}'])
def test_a_file_that_holds_no_votes_is_refused(tmp_path, content, capsys):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        user_study.main(["--count", str(tmp_path / "v.json")])
    assert stop.value.code == 2 and "votes" in capsys.readouterr().err


@pytest.mark.parametrize("arguments,sentence", [
    (["base"], "two models"),
    (["base", "add"], "--prompts-file"),
    (["base", "add", "--prompts-file", "nowhere.txt"], "a caption per line"),
    (["base", "add", "--prompts-file", "nowhere.txt", "--steps", "4"], "one for each model"),
    (["base", "add", "--prompts-file", "nowhere.txt", "--output", "x.png"], "ending in .html"),
    (["base", "--count", "v.json"], "no models"),
])
def test_bad_requests_get_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        user_study.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and len(error.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A study of two models and three captions, as the command writes it."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "captions.txt").write_text("a photo of a dress\n\na photo of a bag\na photo of a coat\n")
    user_study.main(["base", "add", "--data", "fashion", "--steps", "2,1", "--prompts-file",
                     str(folder / "captions.txt"), "--output", str(folder / "study.html")])
    return folder / "study.html"


def test_captions_end_at_line_breaks_only(tmp_path):
    captions = ["a\u2028cat", "a\x85dog", "a\x0bbag"]
    (tmp_path / "captions.txt").write_text("\r\n".join(captions), encoding="utf-8-sig", newline="")
    assert user_study.read_prompts(tmp_path / "captions.txt") == captions


def test_guidance_on_a_student_is_warned_of(page, tmp_path, capsys):
    """Whatever stochasticity the command line chooses."""
    args = ["base", "add", "--data", "fashion", "--prompts-file", str(page.with_name("captions.txt")),
            "--output", str(tmp_path / "study.html"), "--steps", "1,1"]
    user_study.main(args)
    assert "guidance" not in capsys.readouterr().err
    user_study.main([*args, "--guidance-scale", "3", "--stochasticity", ".9"])
    assert "add: guidance mostly makes" in capsys.readouterr().err


def study_of(page_text):
    """The study that a page holds."""
    _, _, rest = page_text.partition('<script id="study" type="application/json">')
    return json.loads(rest.partition("</script>")[0])


def test_the_page_needs_nothing_else(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 6 and "http" not in text
    study = study_of(text)
    assert (study["a"], study["b"]) == ("base, 2 steps", "add, 1 step")
    assert [pair["caption"] for pair in study["pairs"]] == [
        "a photo of a dress", "a photo of a bag", "a photo of a coat"]
    hostile = user_study.render_page(["a", "b"], ["</script><script>alert(1)</script>"],
                                     torch.zeros(2, 1, 3, 4, 4))
    assert hostile.count("</script>") == text.count("</script>")


def test_a_model_can_be_compared_with_itself(tmp_path):
    (tmp_path / "captions.txt").write_text("a red umbrella\n")
    user_study.main(["base", "base", "--data", "glyphs", "--steps", "1,2", "--prompts-file",
                     str(tmp_path / "captions.txt"), "--output", str(tmp_path / "study.html")])
    study = study_of((tmp_path / "study.html").read_text(encoding="utf-8"))
    assert (study["a"], study["b"]) == ("base, 1 step", "base, 2 steps")
    assert study["pairs"][0]["a"] != study["pairs"][0]["b"]


class Chromium:
    """A headless browser, controlled through its pipe: JSON messages with a zero byte after each."""

    def __init__(self, folder):
        child_in, self.write_end = os.pipe()
        self.read_end, child_out = os.pipe()

        def connect():                                       # Chromium reads from 3 and writes to 4
            os.dup2(child_in, 13)
            os.dup2(child_out, 14)
            os.dup2(13, 3)
            os.dup2(14, 4)
        self.process = subprocess.Popen(
            [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
             f"--user-data-dir={folder}/profile", "about:blank"], preexec_fn=connect, pass_fds=(3, 4),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(child_in)
        os.close(child_out)
        self.num_messages = 0
        self.buffer = b""
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method, **params):
        self.num_messages += 1
        message = {"id": self.num_messages, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                self.buffer += os.read(self.read_end, 65536)
            answer, _, self.buffer = self.buffer.partition(b"\0")
            answer = json.loads(answer)
            if answer.get("id") == self.num_messages:
                assert "error" not in answer, answer
                return answer["result"]

    def evaluate(self, expression):
        """The value of a JavaScript expression on the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key):
        text = {"text": " "} if key == " " else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def click(self, selector):
        x, y = self.evaluate(f"(r => [r.x + r.width / 2, r.y + r.height / 2])"
                             f"(document.querySelector('{selector}').getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def open(self, address):
        self.call("Page.navigate", url=address)
        for _ in range(200):
            time.sleep(.05)
            if self.evaluate(f"location.href === '{address}' && document.readyState === 'complete'"):
                return

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.write_end)
        os.close(self.read_end)


@pytest.fixture
def browser(tmp_path):
    chromium = Chromium(tmp_path)
    yield chromium
    chromium.close()


@pytest.mark.skipif(not BROWSER, reason="no Chromium here (Debian: apt install chromium)")
def test_people_can_vote(page, browser, tmp_path):
    """With keys and clicks, on a small screen, with an undo and a reload in the middle: the saved file holds
    what was chosen, and is counted."""
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.open(page.as_uri())
    sides = browser.evaluate("state.trials.map(trial => trial.left)")
    assert len(sides) == 6 and browser.evaluate("document.querySelector('#left img').naturalWidth") == 32
    for key in ("ArrowLeft", "ArrowRight", "ArrowRight", "Backspace"):
        browser.press(key)
    assert browser.evaluate("state.votes.length") == 2
    for _ in range(50):                                      # a reload; the browser writes when it has time
        browser.open(page.as_uri())
        if browser.evaluate("state.votes.length") == 2:
            break
    assert browser.evaluate("state.votes.length") == 2
    assert browser.evaluate("state.trials.map(trial => trial.left)") == sides
    browser.press(" ")
    browser.click("#right")
    browser.call("Emulation.setDeviceMetricsOverride", width=320, height=568, deviceScaleFactor=2,
                 mobile=True)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 320    # no horizontal scrolling
    browser.click("#left")
    browser.click("#tie")
    assert "That was all" in browser.evaluate("document.getElementById('question').textContent")
    browser.press("ArrowLeft")                               # too late to count
    browser.click("#export")
    for _ in range(100):
        time.sleep(.1)
        files = list(tmp_path.glob("votes-*.json"))
        if files:
            break
    saved = json.loads(files[0].read_text())
    other = {"a": "b", "b": "a"}
    chosen = [sides[0], other[sides[1]], "tie", other[sides[3]], sides[4], "tie"]
    assert [vote["winner"] for vote in saved["votes"]] == chosen
    assert {(vote["pair"], vote["question"]) for vote in saved["votes"]} == {
        (pair, question) for pair in range(3) for question in user_study.QUESTIONS}
    assert len(user_study.read_votes(files)) == 6
