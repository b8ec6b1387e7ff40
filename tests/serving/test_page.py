"""The page in a headless Chromium: a script types, clicks and looks. Needs chromium and chromedriver on PATH."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import tiny
from live import KEY, LIMITS, of_latents, served
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from starflow2_jax.data.images import as_pillow

pytestmark = pytest.mark.browser
NO_PROXY = {**os.environ, "NO_PROXY": "*", "no_proxy": "*"}


@pytest.fixture(scope="module")
def running(sampler):
    with served(sampler, replace(LIMITS, editing=True)) as found:
        yield found


@contextmanager
def opened(address: str, refused: str = "400 (Bad") -> Iterator[webdriver.Chrome]:
    """The page in a browser. At the end its console holds no error but of requests that were `refused` on purpose."""
    options = webdriver.ChromeOptions()
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "disable-gpu",
        "window-size=900,1000",
        "no-proxy-server",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    assert all(programs.values()), f"the page's tests need {' and '.join(programs)} on PATH"
    options.binary_location = programs["chromium"]  # with both given, selenium looks for no downloads
    driver = webdriver.Chrome(options=options, service=Service(programs["chromedriver"]))
    try:
        driver.get(address)
        yield driver
        said = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    finally:
        driver.quit()
    assert not [message for message in said if refused not in message]


@pytest.fixture(scope="module")
def browser(running):
    with opened(running[1]) as driver:
        yield driver


@pytest.fixture
def page(browser):
    """As it is when it is opened, but for its settings, which are shown, and short answers."""
    browser.get(browser.current_url)
    WebDriverWait(browser, 60).until(lambda p: find(p, "#model").text == "tiny")
    find(browser, "#settings summary").click()
    put(browser, "#max_tokens", "30")
    return browser


@pytest.fixture
def picture(tmp_path) -> str:
    as_pillow(tiny.pixels(3)).resize((60, 40)).save(tmp_path / "scan.png")
    return str(tmp_path / "scan.png")


def find(page, css: str):
    return page.find_element(By.CSS_SELECTOR, css)


def put(page, css: str, value: str) -> None:
    field = find(page, css)
    field.clear()
    field.send_keys(value)


def send(page, panel: str) -> None:
    """Click, and wait until the answer is whole."""
    find(page, f"#{panel} .go").click()
    WebDriverWait(page, 300).until(lambda p: find(p, f"#{panel} .go").is_enabled())


def sizes(page, css: str) -> list:
    """Widths of the pictures that are shown; 0: broken."""
    return page.execute_script("return [...document.querySelectorAll(arguments[0])].map(i => i.naturalWidth)", css)


def test_draws(page):
    put(page, "#seed", "5")
    put(page, "#draw [name=text]", "draw an eight")
    send(page, "draw")
    assert sizes(page, "#draw .out img") == [6] and find(page, "#wrong").text == ""
    assert not page.find_elements(By.CSS_SELECTOR, "progress, [aria-busy]")


def seeds(page) -> list[str]:
    return [
        caption.text.split("\n")[0].split(" Save")[0]
        for caption in page.find_elements(By.CSS_SELECTOR, "#draw figcaption")
    ]


def test_several_drawings_side_by_side(page):
    """Each as alone with its seed, to save, and to be drawn again; small pictures are enlarged by a whole number."""
    put(page, "#seed", "5")
    put(page, "#draw [name=text]", "draw an eight")
    put(page, "#draw [name=n]", "3")
    send(page, "draw")
    assert sizes(page, "#draw .drawing img") == [6, 6, 6] and seeds(page) == ["seed 5", "seed 6", "seed 7"]
    images, links = (page.find_elements(By.CSS_SELECTOR, f"#draw .drawing {tag}") for tag in ("img", "a[download]"))
    drawn = [image.get_attribute("src") for image in images]
    assert [link.get_attribute("href") for link in links] == drawn and len(set(drawn)) == 3
    assert [link.get_attribute("download") for link in links] == ["seed_5.png", "seed_6.png", "seed_7.png"]
    assert {image.size["width"] for image in images} == {6 * (224 // 6)}
    assert images[0].value_of_css_property("image-rendering") == "pixelated"
    tops = {image.location["y"] for image in images[:2]}
    assert len(tops) == 1
    page.find_elements(By.CSS_SELECTOR, "#draw .again")[1].click()
    WebDriverWait(page, 300).until(lambda p: seeds(p) == ["seed 6"])
    assert find(page, "#draw .drawing img").get_attribute("src") == drawn[1]
    put(page, "#draw [name=n]", "4")  # more than the server's rows: the field says so
    find(page, "#draw .go").click()
    assert page.execute_script("return document.querySelector('#draw [name=n]').validity.rangeOverflow")


def test_the_request_can_be_copied(page):
    """The Python that the page shows is a program that gets the same picture."""
    put(page, "#seed", "5")
    put(page, "#draw [name=text]", "an \"eight\" 'of' mine")
    send(page, "draw")
    find(page, "#request summary").click()
    curl, program = (
        page.execute_script("return document.getElementById(arguments[0]).textContent", n) for n in ("curl", "python")
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=NO_PROXY)
    drawn = find(page, "#draw .drawing img").get_attribute("src")
    assert printed.returncode == 0 and drawn in printed.stdout, printed.stderr
    called = subprocess.run(curl, shell=True, capture_output=True, text=True, timeout=120, env=NO_PROXY)
    assert json.loads(called.stdout)["choices"][0]["message"]["images"][0]["image_url"]["url"] == drawn
    find(page, "[data-copy=curl]").click()
    WebDriverWait(page, 60).until(lambda p: find(p, "#copied").text)


def test_enter_sends_and_shift_enter_breaks(page):
    find(page, "#tab-chat").click()
    find(page, "#chat textarea").send_keys("one", Keys.SHIFT + Keys.ENTER, Keys.NULL, "two", Keys.ENTER)
    WebDriverWait(page, 300).until(
        lambda p: len(p.find_elements(By.CSS_SELECTOR, "#chat .say")) == 2 and find(p, "#chat .go").is_enabled()
    )
    assert find(page, "#chat .say.user").text == "you\none\ntwo"


GIVE = """
const [kind, width] = arguments, target = document.activeElement, list = new DataTransfer();
const canvas = Object.assign(document.createElement("canvas"), { width, height: 40 });
canvas.getContext("2d").fillRect(0, 0, 9, 9);
const bytes = Uint8Array.from(atob(canvas.toDataURL().split(",")[1]), c => c.charCodeAt(0));
list.items.add(new File([bytes], "a.png", { type: "image/png" }));
const event = kind === "paste" ? new ClipboardEvent(kind, { clipboardData: list, bubbles: true, cancelable: true })
  : new DragEvent(kind, { dataTransfer: list, bubbles: true, cancelable: true });
target.dispatchEvent(event);
"""


@pytest.mark.parametrize("kind", ["paste", "drop"])
def test_pictures_are_pasted_and_dropped(page, kind):
    """Into the panel that is shown: its field has the picture, a small view shows it, and it is sent."""
    find(page, "#tab-chat").click()
    put(page, "#chat textarea", "read it")
    page.execute_script(GIVE, kind, 200)
    WebDriverWait(page, 60).until(lambda p: sizes(p, "#chat .thumb") == [200])
    send(page, "chat")
    assert sizes(page, "#chat .say.user img") == [200]
    WebDriverWait(page, 60).until(lambda p: not find(p, "#chat .thumb").is_displayed())


def test_chats_with_pictures(page, picture):
    find(page, "#tab-chat").click()
    assert not find(page, "#draw").is_displayed()
    find(page, "#chat [name=image]").send_keys(picture)
    put(page, "#chat textarea", "read it")
    send(page, "chat")
    put(page, "#chat textarea", "<b>and</b> now?")
    send(page, "chat")
    said = [box.get_attribute("class") for box in page.find_elements(By.CSS_SELECTOR, "#chat .say")]
    assert said == ["say user", "say assistant"] * 2
    assert sizes(page, "#chat .say.user img") == [60] and 0 not in sizes(page, "#chat .say.assistant img")
    assert "<b>and</b> now?" in find(page, "#chat .say.user:nth-of-type(3)").text
    put(page, "#chat textarea", "draw " * 300)
    send(page, "chat")
    assert "shorten the prompt" in find(page, "#wrong").text
    assert len(page.find_elements(By.CSS_SELECTOR, "#chat .say")) == 4
    find(page, "#fresh").click()
    assert not page.find_elements(By.CSS_SELECTOR, "#chat .say")


def test_edits(page, picture):
    find(page, "#tab-edit").click()
    find(page, "#edit [name=image]").send_keys(picture)
    put(page, "#edit [name=text]", "mirror it")
    put(page, "#edit [name=image_guidance]", "1000")
    send(page, "edit")
    assert "image_guidance must be from 0 to 100" in find(page, "#wrong").text
    put(page, "#edit [name=image_guidance]", "1.5")
    page.execute_script("linear.value = 'true'")
    send(page, "edit")
    assert sizes(page, "#edit .say.user img") == [60] and sizes(page, "#edit .drawing img") == [6]


def test_ranks(page, picture):
    find(page, "#tab-rank").click()
    find(page, "#rank [name=image]").send_keys(picture)
    put(page, "#rank textarea", "an eight\n\na seven")
    send(page, "rank")
    rows = [row.text.rsplit(" ", 1) for row in page.find_elements(By.CSS_SELECTOR, "#rank tbody tr")]
    assert sorted(caption for caption, _ in rows) == ["a seven", "an eight"] and float(rows[0][1]) >= float(rows[1][1])


def bubbles(page) -> list[str]:
    return [box.text for box in page.find_elements(By.CSS_SELECTOR, "#chat .say")]


def test_half_an_answer_does_not_stay(page, running, monkeypatch):
    """Stopped, or broken off by a fault: nothing of it is on the page or sent with the next turn, and the words are
    there to be sent again."""
    worker = running[0].worker
    find(page, "#tab-chat").click()
    for name, value in (("max_tokens", "120"), ("temperature", "1"), ("seed", "3")):
        put(page, f"#{name}", value)
    put(page, "#chat textarea", "hello")
    step = worker._turn
    with monkeypatch.context() as slowly:
        slowly.setattr(worker, "_turn", lambda: (time.sleep(0.3), step()))
        find(page, "#chat .go").click()
        WebDriverWait(page, 60).until(lambda p: len(bubbles(p)) == 2 and bubbles(p)[1] != "model")  # some of it
        find(page, "#halt").click()
        WebDriverWait(page, 60).until(lambda p: find(p, "#chat .go").is_enabled())
    assert find(page, "#wrong").text == "Stopped." and bubbles(page) == []
    with monkeypatch.context() as broken:
        broken.setattr(worker, "_heard", lambda *_: 1 / 0)
        send(page, "chat")
    assert "this request failed" in find(page, "#wrong").text and bubbles(page) == []
    assert find(page, "#chat textarea").get_attribute("value") == "hello"
    send(page, "chat")
    assert find(page, "#wrong").text == "" and len(bubbles(page)) == 2
    assert "Cut off here" in bubbles(page)[1]  # a random model does not end by itself
    assert page.execute_script("return turns.length") == 2


def test_arrow_keys_choose_a_tab(page):
    find(page, "#tab-draw").click()
    for key, name in ((Keys.ARROW_LEFT, "rank"), (Keys.ARROW_RIGHT, "draw"), (Keys.ARROW_RIGHT, "chat")):
        page.switch_to.active_element.send_keys(key)
        assert page.switch_to.active_element.get_attribute("id") == f"tab-{name}"
        assert find(page, f"#{name}").is_displayed()


def test_asks_for_the_key(sampler):
    with served(sampler, key=KEY) as (_, address), opened(address, refused="401 (Un") as page:
        WebDriverWait(page, 60).until(lambda p: "needs its API key" in find(p, "#model").text)
        put(page, "#key", "another" + Keys.TAB)
        put(page, "#draw [name=text]", "draw an eight")
        send(page, "draw")
        assert "needs its API key" in find(page, "#wrong").text
        put(page, "#key", KEY + Keys.TAB)
        WebDriverWait(page, 60).until(lambda p: find(p, "#model").text == "tiny")
        put(page, "#max_tokens", "30")
        send(page, "draw")
        assert sizes(page, "#draw .out img") == [6] and find(page, "#wrong").text == ""


def test_a_model_that_draws_nothing_chats():
    with served(of_latents()) as (_, address), opened(address) as page:
        WebDriverWait(page, 60).until(lambda p: find(p, "#model").text == "tiny")
        shown = [tab.text for tab in page.find_elements(By.CSS_SELECTOR, "[role=tab]") if tab.is_displayed()]
        assert shown == ["Chat"] and find(page, "#chat").is_displayed() and not find(page, "#draw").is_displayed()
        find(page, "#tab-chat").send_keys(Keys.ARROW_LEFT)
        assert page.switch_to.active_element.get_attribute("id") == "tab-chat"
        put(page, "#chat textarea", "hello")
        send(page, "chat")
        assert find(page, "#wrong").text == "" and len(bubbles(page)) == 2
