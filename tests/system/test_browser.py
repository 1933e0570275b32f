"""The report in a real browser, as a reader uses it: `make test-browser`.

Needs Chromium on the machine and the package playwright.
"""

import io
import json
import re
import shutil
import threading

import matplotlib.image
import numpy as np
import pytest

from experiments.analysis import run_directory
from experiments.bench import page as bench_page
from experiments.reporting import live as live_pages
from experiments.reporting import page as report
from experiments.training import attention_maps
from support.benchmarks import results_of
from support.runs import CELLS, keep, of_picture, write_run

pytestmark = pytest.mark.slow
sync_api = pytest.importorskip("playwright.sync_api")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATH = next(filter(None, map(shutil.which, NAMES)), None)


@pytest.fixture(scope="module")
def browser():
    if PATH is None:
        pytest.skip("there is no Chromium on this machine")
    quiet = ["disable-background-networking", "disable-component-update", "disable-sync"]
    flags = [f"--{name}" for name in ("no-sandbox", "disable-gpu", "no-first-run", *quiet)]
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=PATH, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory, and what its base keeps of each example."""
    path = write_run(tmp_path_factory.mktemp("browser") / "run")
    cells = [cell for cell in run_directory.load(path).cells if cell.status == "done"]
    maps = {cell.id: keep(cell, 3, tokens=9 + (cell.base == "recall")) for cell in cells}
    report.write_report(path)
    return path, maps


@pytest.fixture
def page(browser, run):
    """The report from its file; nothing may be asked of a network or said in the console."""
    tab = browser.new_page(viewport={"width": 1200, "height": 900})
    messages, urls = [], []
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.on("request", lambda request: urls.append(request.url))
    url = f"file://{run[0]}/report.html"
    tab.goto(url)
    tab.wait_for_selector(".readout")
    yield tab
    assert messages == [] and set(urls) == {url}
    tab.close()


def column(page, number):
    cells = page.locator(f"#group1-cells tbody tr:not([hidden]) td:nth-child({number})")
    return cells.all_text_contents()


def test_a_click_on_a_heading_sorts_and_so_does_the_keyboard(page):
    heading = page.locator("#group1-cells th button", has_text="validation/loss").first
    heading.click()
    up = [float(text.split()[0]) for text in column(page, 2) if text]
    assert up == sorted(up) and len(up) == 4
    assert [text for text in column(page, 2)[4:]] == ["", ""]  # without a result: last
    heading.focus()
    page.keyboard.press("Enter")
    down = [float(text.split()[0]) for text in column(page, 2) if text]
    assert down == up[::-1]


def test_the_filter_shows_what_has_all_its_words(page):
    page.fill("input[type=search] >> nth=0", "heads")
    assert column(page, 1) == ["heads=2", "heads=8"]
    assert page.locator("output").first.text_content() == "2 of 6 cells"
    page.fill("input[type=search] >> nth=0", "score better")
    assert column(page, 1) == ["score=additive"]
    page.fill("input[type=search] >> nth=0", "")
    assert len(column(page, 1)) == 6


def test_a_name_of_the_legend_hides_its_curve(page):
    label = page.locator("[id='label|text.score=additive|score']")
    line = page.locator("[id='line|text.score=additive|score']")
    other = page.locator("[id='line|text|score']")
    band = page.locator("[id='band|text.score=additive|score']")
    assert line.is_visible() and band.is_visible() and label.get_attribute("aria-checked") == "true"
    label.click()
    assert not line.is_visible() and not band.is_visible() and other.is_visible()
    assert label.get_attribute("aria-checked") == "false"
    label.focus()
    page.keyboard.press("Enter")
    assert line.is_visible()
    page.keyboard.press("Space")
    assert not line.is_visible()


def explorer(page, number=0):
    return page.locator(".explorer").nth(number)


def test_pointing_at_a_query_tells_its_weights(page, run):
    place = explorer(page)
    weights = run[1]["text"][0]["cross"].weights[0, 0, 3]
    place.locator(".queries li").nth(3).hover()
    readout = place.locator(".readout").text_content()
    best = int(weights.argmax())
    assert readout.startswith(f"t3 (4) attends to t{best} ({best + 1}) ")
    assert float(readout.split(") ")[2].split(",")[0].rstrip(".")) == pytest.approx(
        weights.max(), abs=0.01
    )
    shares = place.locator(".keys li").evaluate_all(
        "items => items.map(item => parseFloat(item.style.getPropertyValue('--share')))"
    )
    assert np.argmax(shares) == best
    drawn = place.locator(".lines").evaluate(
        """c => {
          const pixels = c.getContext('2d').getImageData(c.width - 3, 0, 1, c.height).data;
          const rows = Array(Math.floor(c.height / 16)).fill(0);
          for (let y = 0; y < c.height; y++) rows[Math.floor(y / 16)] += pixels[4 * y + 3];
          return rows;
        }"""
    )
    assert np.argmax(drawn) == best
    expected = 100 * np.sqrt(weights / run[1]["text"][0]["cross"].weights.max())
    np.testing.assert_allclose(shares, expected, atol=1.5)
    page.mouse.move(0, 0)
    assert "entropy" in place.locator(".readout").text_content()


def test_the_explorer_is_used_by_the_keyboard(page, run):
    place = explorer(page)
    place.locator(".queries").focus()
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    assert place.locator(".readout").text_content().startswith("t1 (2) attends to")
    assert place.locator(".queries [aria-selected=true]").text_content() == "t1"
    page.keyboard.press("Escape")
    assert "entropy" in place.locator(".readout").text_content()
    head = place.locator(".heads button").nth(5)
    head.focus()
    page.keyboard.press("Enter")
    sync_api.expect(place.locator(".readout")).to_contain_text("Layer 2, head 2")
    assert head.evaluate("button => button === document.activeElement")


def test_the_entropy_of_a_head_is_that_of_its_weights(page, run):
    weights = run[1]["text"][0]["cross"].weights  # [L, H, T, S]
    entropy = -np.sum(weights * np.log(np.where(weights > 0, weights, 1)), -1).mean(-1)
    shown = explorer(page).locator(".heads button").all_text_contents()
    assert len(shown) == 8
    for text, expected in zip(shown, entropy.ravel(), strict=True):
        assert float(text.split("·")[1]) == pytest.approx(expected, abs=0.03)


def test_examples_kinds_and_cells_are_chosen(page, run):
    place = explorer(page)
    assert place.locator(".panel").count() == 1
    place.get_by_label("beside").select_option("text.score=additive")
    sync_api.expect(place.locator(".panel")).to_have_count(2)
    place.get_by_label("example").select_option(label="3")
    place.get_by_label("kind").select_option("decoder")
    page.wait_for_timeout(500)
    place.locator(".panel").nth(1).locator(".queries li").nth(8).hover()
    for panel, id in ((0, "text"), (1, "text.score=additive")):
        weights = run[1][id][2]["decoder"].weights[0, 0, 8]
        readout = place.locator(".readout").nth(panel).text_content()
        assert readout.startswith(f"t8 (9) attends to t{weights.argmax()} ")
    names = place.locator(".strip button span:nth-of-type(1)").all_text_contents()
    assert len(names) == 4 and "score=additive" in names
    page.reload()  # as a live page does
    page.wait_for_selector(".readout")
    assert place.get_by_label("beside").input_value() == "text.score=additive"
    assert place.get_by_label("kind").input_value() == "decoder"
    page.evaluate("sessionStorage.clear()")


def test_what_is_drawn_is_not_blank(page):
    for selector in (".heat", ".lines", ".heads canvas", ".strip canvas"):
        drawn = page.locator(f".explorer {selector}").first.evaluate(
            "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data"
            ".filter((x, i) => i % 4 == 3 && x > 0).length / (c.width * c.height)"
        )
        assert 0.01 < drawn <= 1, selector


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A run of images whose second cell has a register; of captions is what words attend to."""
    path = write_run(tmp_path_factory.mktemp("pictures") / "run", CELLS[:2])
    maps = {}
    for cell, registers in zip(run_directory.load(path).cells, ([], ["register 1"]), strict=True):
        patches = of_picture((2, 3), before=[attention_maps.CLASS_TOKEN, *registers])
        words = of_picture((2, 3), queries=["a", "red", "a", "square"])
        maps[cell.id] = {"image": patches, "cross": words}
        (cell.path / "attention.npz").write_bytes(attention_maps.dump([maps[cell.id]]))
    report.write_report(path)
    return path, maps


@pytest.fixture
def of_pictures(browser, pictures):
    """The explorer of images, at a telephone's width and in the dark: nothing may overflow."""
    tab = browser.new_page(viewport={"width": 360, "height": 900}, color_scheme="dark")
    messages = []
    tab.on("console", lambda message: messages.append(message.text))
    tab.on("pageerror", lambda error: messages.append(str(error)))
    tab.goto(f"file://{pictures[0]}/report.html")
    tab.wait_for_selector(".readout")
    yield tab
    # Chromium remarks on how this test reads what is drawn.
    assert [text for text in messages if "willReadFrequently" not in text] == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= 360
    tab.close()


def colors(overlay):
    """How strong each patch of an overlay is in colour, from 0 to 1."""
    opacities = overlay.locator("canvas").evaluate(
        "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
        ".filter((x, i) => i % 4 === 3)"
    )
    return np.array(opacities) / 200


def panel(page, number, cell=0):
    """The picture, the chosen head over it, the rollout."""
    return page.locator(".panel").nth(cell).locator(".pictures .overlay").nth(number)


def choose_patches(page):
    """Patches that look at patches; first is shown what words look at."""
    page.get_by_label("kind").select_option("image")
    sync_api.expect(page.locator(".words button")).to_have_count(0)


def point_at(page, row, column):
    """At a patch of 2 × 3, on the chosen head over the picture."""
    box = panel(page, 1).bounding_box()
    x, y = box["width"] * (column + 0.5) / 3, box["height"] * (row + 0.5) / 2
    panel(page, 1).hover(position={"x": x, "y": y})


def test_a_head_is_laid_over_its_picture(of_pictures, pictures):
    choose_patches(of_pictures)
    one = pictures[1]["text"]["image"]
    patches = one.weights[..., 1:]  # [L, H, T, 6]
    readout = of_pictures.locator(".readout")
    for query, name in ((0, "class token"), (1 + 5, "r2c3"), (1 + 1, "r1c2")):
        if query:
            point_at(of_pictures, *divmod(query - 1, 3))
        unit = max(4 / 6, patches[:, :, query].max())
        expected = np.sqrt(patches[:, :, query] / unit)
        np.testing.assert_allclose(colors(panel(of_pictures, 1)), expected[0, 0], atol=0.03)
        for k, small in enumerate(of_pictures.locator(".heads .overlay").all()):
            np.testing.assert_allclose(colors(small), expected[k // 2, k % 2], atol=0.03)
        best = one.key[int(one.weights[0, 0, query].argmax())]
        assert f" nats: {name} attends to {best} " in readout.text_content()
        mark = of_pictures.locator(".pictures .patch").first
        assert mark.is_visible() == bool(query)
    of_pictures.locator("header").hover()
    assert "class token attends to" in readout.text_content()
    of_pictures.locator(".heads button").nth(3).click()
    sync_api.expect(readout).to_contain_text("Layer 2, head 2")
    unit = max(4 / 6, patches[:, :, 0].max())
    np.testing.assert_allclose(
        colors(panel(of_pictures, 1)), np.sqrt(patches[1, 1, 0] / unit), atol=0.03
    )
    said = of_pictures.locator(".classes").text_content()
    assert said == "Class: a cat; the model says a dog."


def test_the_rollout_is_that_of_all_layers(of_pictures, pictures):
    choose_patches(of_pictures)
    flow = attention_maps.rollout(list(pictures[1]["text"]["image"].weights))[:, 1:]
    for query in (0, 1 + 4):
        if query:
            point_at(of_pictures, *divmod(query - 1, 3))
        unit = max(4 / 6, flow[query].max())
        np.testing.assert_allclose(
            colors(panel(of_pictures, 2)), np.sqrt(flow[query] / unit), atol=0.03
        )


def test_patches_are_chosen_by_the_keyboard(of_pictures):
    choose_patches(of_pictures)
    picture, query = panel(of_pictures, 0), of_pictures.get_by_label("query").first
    picture.focus()
    for key, name in (
        *(("ArrowRight", "r1c1"), ("ArrowRight", "r1c2"), ("ArrowDown", "r2c2")),
        *(("ArrowDown", "r2c2"), ("ArrowLeft", "r2c1"), ("Escape", "class token")),
    ):
        of_pictures.keyboard.press(key)
        assert f" nats: {name} attends" in of_pictures.locator(".readout").text_content()
        assert query.evaluate("e => e.selectedOptions[0].textContent") == name
    query.select_option("r2c3")
    assert "r2c3 attends" in of_pictures.locator(".readout").text_content()


def test_the_same_patch_in_two_cells(of_pictures, pictures):
    choose_patches(of_pictures)
    of_pictures.get_by_label("beside").select_option("text.score=additive")
    sync_api.expect(of_pictures.locator(".panel")).to_have_count(2)
    point_at(of_pictures, 1, 0)
    weights = [pictures[1][id]["image"].weights for id in ("text", "text.score=additive")]
    rows = [w[..., -3, -6:] for w in weights]  # of r2c1 to patches
    unit = max(4 / 6, *(row.max() for row in rows))
    for cell, row in enumerate(rows):
        shown = colors(panel(of_pictures, 1, cell))
        np.testing.assert_allclose(shown, np.sqrt(row[0, 0] / unit), atol=0.03)
    unit = max(4 / 6, *(row[0, 0].max() for row in rows))
    for small, row in zip(of_pictures.locator(".strip .overlay").all(), rows, strict=True):
        np.testing.assert_allclose(colors(small), np.sqrt(row[0, 0] / unit), atol=0.03)


def test_words_look_at_a_picture(of_pictures, pictures):
    words = of_pictures.locator(".words button")
    sync_api.expect(words).to_have_count(4)
    assert words.all_text_contents() == ["a", "red", "a", "square"]
    weights = pictures[1]["text"]["cross"].weights
    for i, word in enumerate(words.all()):
        unit = max(4 / 6, weights[0, 0].max())
        np.testing.assert_allclose(colors(word), np.sqrt(weights[0, 0, i] / unit), atol=0.03)
    words.nth(2).focus()
    of_pictures.keyboard.press("Enter")
    assert words.nth(2).get_attribute("aria-pressed") == "true"
    assert "a (3) attends to" in of_pictures.locator(".readout").text_content()
    unit = max(4 / 6, weights[:, :, 2].max())
    shown = colors(panel(of_pictures, 1))
    np.testing.assert_allclose(shown, np.sqrt(weights[0, 0, 2] / unit), atol=0.03)
    assert of_pictures.locator(".pictures figure").count() == 2  # there is no rollout


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_screenshot_is_not_blank(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.wait_for_timeout(200)
    pixels = matplotlib.image.imread(io.BytesIO(page.screenshot(full_page=True)))[..., :3]
    assert pixels.std() > 0.05
    assert (np.median(pixels) > 0.5) == (scheme == "light")
    wide = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert wide  # tables scroll by themselves


def test_the_page_fits_a_telephone(page):
    page.set_viewport_size({"width": 390, "height": 800})
    page.locator(".settings select").first.select_option(index=1)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """The page of a benchmark with all its figures, and with long names."""
    results = results_of(*([4.0**i, 3.9**i, 4.1**i] for i in range(4)))
    for row in results["comparisons"][0]["rows"]:
        row["name"] = f"{row['name']} of the contenders that have rather long names, with options"
    return bench_page.write(results, tmp_path_factory.mktemp("benchmark"))


@pytest.fixture(params=[360, 768, 1300, 2560])
def width(request):
    """Pixels: of a telephone, a tablet, a laptop's window, a large screen."""
    return request.param


@pytest.fixture(params=["report", "benchmark"])
def sized(request, width, browser, run, benchmark):
    """A page in a window of some width."""
    tab = browser.new_page(viewport={"width": width, "height": 900})
    tab.goto(f"file://{run[0] / 'report.html' if request.param == 'report' else benchmark}")
    yield tab
    tab.close()


def test_figures_fit_their_boxes(sized, width):
    assert sized.evaluate("document.documentElement.scrollWidth") <= width
    figures = sized.locator("figure")
    sizes = figures.evaluate_all("all => all.map(e => [e.scrollWidth, e.clientWidth])")
    assert len(sizes) > 4 and all(inner <= outer for inner, outer in sizes)
    # All that is written in a figure is inside of it, and large enough to read.
    texts = figures.evaluate_all(
        """all => all.flatMap(figure => {
          const box = figure.getBoundingClientRect();
          return [...figure.querySelectorAll("svg text")].map(text => {
            const own = text.getBoundingClientRect();
            return [own.left - box.left, box.right - own.right, Math.max(own.width, own.height)];
          });
        })"""
    )
    assert len(texts) > 40
    assert all(min(left, right) >= -1 and size > 5 for left, right, size in texts)


def test_the_page_uses_the_width_it_has(sized, width):
    places = sized.locator("figure").evaluate_all("all => all.map(e => e.offsetTop)")
    beside = max(map(places.count, places))
    assert width // 900 < beside <= max(1, width // 400)
    assert sized.locator(".figures").first.evaluate("e => e.clientWidth") > 0.9 * width - 20


def test_tables_keep_their_first_column_in_sight(sized, width):
    moved = sized.locator(".scroll").evaluate_all(
        """all => all.flatMap(box => {
          box.scrollLeft = 10000;
          const left = box.getBoundingClientRect().left;
          return [...box.querySelectorAll("tr > :first-child")].map(
            cell => [box.scrollLeft, cell.getBoundingClientRect().left - left]);
        })"""
    )
    assert len(moved) > 4 and max(abs(place) for _, place in moved) < 1
    assert width > 360 or max(scrolled for scrolled, _ in moved) > 50


def test_it_is_printed(page):
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 1000, "height": 700})  # A4, landscape, within its margins
    widths = page.locator("table").evaluate_all("tables => tables.map(t => t.scrollWidth)")
    assert max(widths) <= 1000
    assert not page.locator(".controls").first.is_visible()
    assert page.locator(".heat").first.is_visible()
    assert len(page.pdf()) > 50_000


def test_settings_of_two_cells_are_compared(page):
    place = page.locator(".settings")
    place.get_by_label("this cell").select_option("text")
    place.get_by_label("and this").select_option("text.heads=2")
    rows = place.locator("tbody tr").all_text_contents()
    assert rows == ["model.num_heads42"]
    place.get_by_label("and this").select_option("text")
    assert "no setting differs" in place.locator("tbody").text_content()


def test_every_control_can_be_reached_by_tab(page):
    focused = set()
    page.locator("body").focus()
    for _ in range(250):
        page.keyboard.press("Tab")
        focused.add(
            page.evaluate(
                "(e => [e.tagName, e.getAttribute('role'), e.className].join(' '))"
                "(document.activeElement)"
            )
        )
    kinds = " | ".join(map(str, focused))
    for control in ("INPUT", "SELECT", "BUTTON", "switch", "listbox", "SUMMARY"):
        assert control in kinds


def test_a_live_page_follows_the_sweep(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(live_pages, "_PAUSE", 0.2)
    monkeypatch.setattr(live_pages, "_SHARE", 0.0)
    write_run(tmp_path, [*CELLS[:2], (*CELLS[2][:4], None)], layers=1, heads=1)
    live = live_pages.Live([tmp_path], lambda version: report.live_page([tmp_path], version))
    with live_pages.server(live) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.new_page()
        messages = []
        page.on("console", lambda message: messages.append(message.text))
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        assert "2 of 3 cells done" in page.text_content("header")
        page.locator("#group1-cells th button").first.click()
        page.locator("[id='label|text.score=additive|score']").click()
        cell = tmp_path / "cells/text.heads=2"
        cell.mkdir()
        for name in ("config.json", "result.json"):
            other = json.loads((tmp_path / "cells/text" / name).read_text())
            (cell / name).write_text(json.dumps(other))
        sync_api.expect(page.locator("header")).to_contain_text("3 of 3 cells", timeout=30_000)
        assert page.locator("#group1-cells th").first.get_attribute("aria-sort") == "ascending"
        hidden = page.locator("[id='label|text.score=additive|score']")
        assert hidden.get_attribute("aria-checked") == "false"
        (tmp_path / "sweep.json").rename(tmp_path / "kept.json")
        page.goto(f"http://127.0.0.1:{server.server_port}/?now")
        page.wait_for_timeout(500)
        (tmp_path / "kept.json").rename(tmp_path / "sweep.json")
        sync_api.expect(page.locator("header")).to_contain_text("3 of 3 cells", timeout=30_000)
        page.close()
        server.shutdown()
    assert [text for text in messages if not re.search("favicon|404|503", text)] == []
