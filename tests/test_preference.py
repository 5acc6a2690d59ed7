"""The preference study: a page that people can use, and votes that are counted right."""

import json
import os
import shutil
import subprocess
import time

import pytest
import torch

import evaluate
import preference

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def write(path, votes, a="base", b="add", rater="me"):
    path.write_text(json.dumps({"id": "x", "a": a, "b": b, "rater": rater, "votes": [
        {"pair": i, "question": question, "left": "a", "winner": winner, "seconds": 1.}
        for i, (question, winner) in enumerate(votes)]}))
    return path


def test_two_models_have_the_elo_of_their_odds():
    """Won 3 of 4: 400 log10(3) apart; nothing lost: not infinitely far; never met: nothing to say."""
    def apart(*wins):
        table = torch.tensor([[[0., wins[0]], [wins[1], 0.]]], dtype=torch.double)
        one, two = preference.elo(table)[0].tolist()
        assert abs(one + two - 2000) < 1e-6
        return one - two
    assert abs(apart(30000., 10000.) - 190.85) < .1
    assert apart(5., 5.) == pytest.approx(0.) and 100 < apart(10., 0.) < 1000


def test_ratings_of_three_are_recovered_from_many_votes():
    truth = torch.tensor([1150., 1000., 850.], dtype=torch.double)
    odds = 1 / (1 + 10 ** ((truth[None] - truth[:, None]) / 400))
    wins = 10000 * odds * (1 - torch.eye(3, dtype=torch.double))
    found = preference.elo(wins[None])[0]
    torch.testing.assert_close(found, truth, atol=1., rtol=0)


def test_votes_are_counted_with_intervals_that_cover(tmp_path):
    """30 of 40 preferred for quality: 75 %, Wilson's interval is 60 to 86 %, the bootstrap's close to it."""
    votes = [("quality", "b")] * 30 + [("quality", "a")] * 10 + [("prompt", "tie")] * 20
    found = preference.votes([write(tmp_path / "v.json", votes)] * 2)         # handed in twice
    assert len(found) == 60
    rows = {(question, name): rest for question, name, *rest in preference.results(found)}
    rate, (low, high), rating, (worst, best) = rows["quality", "add"]
    assert rate == .75 and .56 < low < .67 and .83 < high < .92 and worst < rating < best
    assert rows["quality", "base"][0] == .25 and rating > 1000 > rows["quality", "base"][2]
    assert rows["prompt", "add"][0] == .5 and rows["prompt", "add"][2] == pytest.approx(1000)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"a": 1, "b": 2, "votes": []}',
                                     '{"id": "x", "rater": "r", "a": "m", "b": "n", "votes": [{}]}',
                                     '{"id": "x", "rater": "r", "a": "m", "b": "n", "votes": []}'])
def test_what_is_no_file_of_votes_is_a_sentence(tmp_path, content, capsys):
    (tmp_path / "v.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        evaluate.main(["--study-results", str(tmp_path / "v.json")])
    assert stop.value.code == 2 and "votes" in capsys.readouterr().err


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A study of two models and three captions, as the command writes it."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "captions.txt").write_text("a photo of a dress\n\na photo of a bag\na photo of a coat\n")
    evaluate.main(["--study", "base", "add", "--data", "fashion", "--steps", "2,1", "--prompts",
                   str(folder / "captions.txt"), "--out", str(folder / "study.html")])
    return folder / "study.html"


def test_the_page_stands_alone(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 6 and "http" not in text.replace("<!doctype html>", "")
    hostile = preference.page(["a", "b"], ["</script><script>alert(1)</script>"], torch.zeros(2, 1, 3, 4, 4))
    assert hostile.count("</script>") == text.count("</script>")


class Chromium:
    """A headless browser, spoken to through its pipe: JSON messages with a zero byte after each."""

    def __init__(self, folder):
        (inward, self.mouth), (self.ear, outward) = os.pipe(), os.pipe()
        def wire():
            os.dup2(inward, 13), os.dup2(outward, 14), os.dup2(13, 3), os.dup2(14, 4)
        self.process = subprocess.Popen(
            [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
             f"--user-data-dir={folder}/profile", "about:blank"], preexec_fn=wire, pass_fds=(3, 4),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(inward), os.close(outward)
        self.count, self.rest, self.session = 0, b"", None
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.tell("Page.enable")

    def tell(self, method, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.mouth, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                self.rest += os.read(self.ear, 65536)
            one, self.rest = self.rest.split(b"\0", 1)
            answer = json.loads(one)
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def see(self, expression):
        """The value of a JavaScript expression on the page."""
        found = self.tell("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key):
        text = {"text": " "} if key == " " else {}
        self.tell("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.tell("Input.dispatchKeyEvent", type="keyUp", key=key)

    def click(self, element):
        x, y = self.see(f"(r => [r.x + r.width / 2, r.y + r.height / 2])"
                        f"(document.querySelector('{element}').getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.tell("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def visit(self, address):
        self.tell("Page.navigate", url=address)
        for _ in range(200):
            time.sleep(.05)
            if self.see(f"location.href === '{address}' && document.readyState === 'complete'"):
                return


@pytest.mark.skipif(not BROWSER, reason="no Chromium here (Debian: apt install chromium)")
def test_people_can_vote(page, tmp_path):
    """By key and by click, on a small screen; a vote taken back; a reload in the middle; what is saved is
    what was chosen, and is counted."""
    browser = Chromium(tmp_path)
    try:
        browser.tell("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
        browser.visit(page.as_uri())
        sides = browser.see("state.asked.map(x => x.left)")
        assert len(sides) == 6 and browser.see("document.querySelector('#left img').naturalWidth") == 32
        browser.press("ArrowLeft"), browser.press("ArrowRight"), browser.press("ArrowRight")
        browser.press("Backspace")
        assert browser.see("state.votes.length") == 2
        for _ in range(50):                                  # a reload; the browser writes when it has time
            browser.visit(page.as_uri())
            if browser.see("state.votes.length") == 2:
                break
        assert browser.see("state.votes.length") == 2 and browser.see("state.asked.map(x => x.left)") == sides
        browser.press(" "), browser.click("#right")
        browser.tell("Emulation.setDeviceMetricsOverride", width=320, height=568, deviceScaleFactor=2,
                     mobile=True)
        assert browser.see("document.documentElement.scrollWidth") <= 320     # nothing sticks out
        browser.click("#left"), browser.click("#tie")
        assert "That was all" in browser.see("document.getElementById('question').textContent")
        browser.press("ArrowLeft")                           # too late to count
        browser.click("#export")
        for _ in range(100):
            time.sleep(.1)
            if saved := list(tmp_path.glob("votes-*.json")):
                break
        one = json.loads(saved[0].read_text())
    finally:
        browser.process.kill()
        browser.process.wait()
    other = {"a": "b", "b": "a"}
    chosen = [sides[0], other[sides[1]], "tie", other[sides[3]], sides[4], "tie"]
    assert [vote["winner"] for vote in one["votes"]] == chosen
    assert {(vote["pair"], vote["question"]) for vote in one["votes"]} == {
        (pair, question) for pair in range(3) for question in preference.QUESTIONS}
    assert len(preference.votes(saved)) == 6
