"""The report in a headless Chromium: it draws, says nothing on its console, asks for nothing, and answers to hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sagetrain.compare import report
from tests.compare.chromium import PROGRAM, Tab, drive
from tests.compare.test_compare import falling, write_run

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")
HOSTILE = "<b>x</script><script>document.title='owned'</script>"
DRAWN = "[...document.querySelectorAll('.plot')].every(plot => plot.querySelector('.scatterlayer path.js-line'))"
LINES = "[...document.querySelectorAll('.plot')].map(plot => plot.data.map(trace => trace.name))"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms of two seeds, one cut short, one arm with a name that tries to run a script."""
    parent = tmp_path_factory.mktemp("runs")
    for arm, end in (("bf16", 2.0), (HOSTILE, 2.05)):
        for seed in (0, 1):
            losses = falling(end + 0.1 * seed, 40)[: 30 if arm == HOSTILE and seed else 40]
            norm = {"grad_norm": [math.exp(-step / 5) for step in range(len(losses))]}
            changes = {"command": HOSTILE, "recipe": HOSTILE, "unigram_entropy": 3.1, "max_steps": 40}
            changes |= {"status": "failed"} if len(losses) < 40 else {}
            write_run(parent, arm, seed, losses, columns=norm, **changes)
    report([parent], parent / "out")
    return parent / "out" / "report.html"


async def opened(tab: Tab, page: Path, **options: object) -> None:
    await tab.open(page, **options)
    await tab.until(DRAWN)


def test_it_draws_in_silence_and_alone(page: Path, tmp_path: Path):
    async def use(tab: Tab) -> None:
        await opened(tab, page)
        assert await tab.ask("document.querySelectorAll('.plot').length") == 4
        assert not (await tab.ask("document.title")).startswith("owned")
        assert tab.requested == [page.as_uri()]
        buttons = await tab.ask("[...document.querySelectorAll('.modebar-btn')].map(button => button.dataset.title)")
        assert "Zoom" in buttons and not any("Share" in button for button in buttons)  # with plotly's own service
        script = "Object.assign(document.createElement('script'), {text: 'window.owned = 1'})"
        await tab.ask(f"document.body.append({script})")
        assert await tab.ask("window.owned") is None  # the content policy ran no script that it does not know
        (refused,) = tab.complaints  # and nothing else was said
        assert "Content Security Policy" in refused

    drive(tmp_path, use)


def test_labels_of_a_logarithmic_axis_say_the_value(page: Path, tmp_path: Path):
    """plotly by itself writes 5 for 0.5 there."""

    async def use(tab: Tab) -> None:
        await opened(tab, page)
        plot = "[...document.querySelectorAll('.plot')].find(plot => plot.layout.yaxis.type === 'log')"
        labels = await tab.ask(f"[...({plot}).querySelectorAll('.ytick text')].map(tick => tick.textContent)")
        assert len(labels) > 3 and [float(label) for label in labels] == sorted({float(label) for label in labels})

    drive(tmp_path, use)


def test_a_mouse_reads_values_and_zooms(page: Path, tmp_path: Path):
    async def use(tab: Tab) -> None:
        await opened(tab, page)
        await tab.ask("document.querySelector('.panels').scrollIntoView()")
        box = "document.querySelector('.plot .nsewdrag').getBoundingClientRect()"
        left, top, width, height = await tab.ask(f"(({{x, y, width, height}}) => [x, y, width, height])({box})")
        await tab.point(left + width / 2, top + height / 2)
        said = await tab.until("document.querySelector('.plot .hoverlayer').textContent")
        step, value = await tab.ask("(({x, y}) => [x[19], y[19]])(document.querySelector('.plot').data.at(2))")
        assert step == 20 and f"20BF16, mean : {value:.5g}" in said
        drag = {"y": top + height / 2, "button": "left", "buttons": 1, "clickCount": 1}
        for kind, x in ("mousePressed", 0.6), ("mouseMoved", 0.7), ("mouseMoved", 0.8), ("mouseReleased", 0.8):
            await tab.send("Input.dispatchMouseEvent", type=kind, x=left + x * width, **drag)
        where = "document.querySelector('.plot').layout.xaxis.range?.[0] > 20"
        await tab.until(where)
        await tab.ask("document.querySelector('[value=bf16]').click()")  # a zoom outlives it
        assert await tab.ask(where) and tab.complaints == []

    drive(tmp_path, use)


def test_a_keyboard_reaches_every_choice(page: Path, tmp_path: Path):
    async def use(tab: Tab) -> None:
        await opened(tab, page)
        first = "document.querySelector('.plot').data[0]"
        await tab.ask("document.querySelector('[name=arm]').focus()")
        await tab.press(" ", " ")
        names = await tab.ask(LINES)
        assert len(names) == 4 and all(not name.startswith("BF16,") for panel in names for name in panel)
        await tab.press(" ", " ")
        await tab.press("Tab")
        await tab.press("Tab")  # past the other arm
        await tab.press(" ", " ")
        assert [name for name in (await tab.ask(LINES))[0] if name.startswith("BF16")] == ["BF16, mean"]
        await tab.press("Tab")
        assert await tab.ask(f"{first}.x[9]") == 10
        await tab.press("ArrowDown")
        assert await tab.ask(f"{first}.x[9]") == 640
        dotted = await tab.ask("document.querySelector('.plot').layout.shapes.at(-1).x0")
        assert dotted == 64 * 30
        before = await tab.ask(f"{first}.y[20]")
        await tab.press("Tab")
        await tab.press("ArrowDown")
        assert await tab.ask(f"{first}.y[20]") > before  # of a falling loss a longer trailing mean is higher
        await tab.press("Tab")
        await tab.press("ArrowDown")
        assert await tab.ask(f"{first}.x[0]") >= 0.5 * 64 * 30
        await tab.ask("document.querySelector('[name=seeds]').click()")
        await tab.press("ArrowDown")  # the last tenth has nothing of a run that ended before it
        every = "document.querySelector('.plot').data.flatMap(trace => trace.x)"
        assert await tab.ask(f"Math.min(...{every})") >= 0.9 * 64 * 40
        await tab.press("Tab")
        for _ in range(30):
            if await tab.ask("document.activeElement.tagName") == "SUMMARY":
                break
            await tab.press("Tab")
        await tab.press("Enter", "\r")
        assert await tab.ask("document.activeElement.parentElement.open") and tab.complaints == []

    drive(tmp_path, use)


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_by_day_and_night(page: Path, tmp_path: Path, dark: bool):
    async def use(tab: Tab) -> None:
        await opened(tab, page, width=390, dark=dark)
        assert await tab.ask("document.documentElement.scrollWidth") <= 390
        # every text of a plot against the card behind it: WCAG asks for 4.5
        colours = await tab.ask(
            "[getComputedStyle(document.querySelector('.card')).backgroundColor, "
            "...[...document.querySelectorAll('.plot text')].map(text => getComputedStyle(text).fill)]"
        )
        card, *inks = (luminance(colour) for colour in colours)
        assert (card < 0.1) == dark and len(inks) > 20
        assert min((max(ink, card) + 0.05) / (min(ink, card) + 0.05) for ink in inks) > 4.5
        assert tab.complaints == []

    drive(tmp_path, use)


def luminance(colour: str) -> float:
    """Relative luminance of "rgb(r, g, b)"."""
    parts = [int(x) / 255 for x in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
