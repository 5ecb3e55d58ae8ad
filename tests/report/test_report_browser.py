"""The page in a real browser: it loads silently, draws what the record says, filters, and lets no answer act."""

from __future__ import annotations

import json
import re

import pytest
from comptrust import load_results
from comptrust.actors.cell import DIMENSIONS
from comptrust.actors.record import Record
from comptrust.sweep.frontier import pareto
from comptrust.sweep.report import build

MINUS = "\u2212"


@pytest.fixture(scope="module")
def rows(record):
    return {r["key"]: r for r in load_results(record).rows("select * from results")}


@pytest.fixture(scope="module")
def data(page):
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def run(browser, script, *arguments):
    return browser.execute_script(script, *arguments)


def select(browser, element_id, value):
    run(
        browser,
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('change'));",
        element_id,
        value,
    )


def type_in(browser, element_id, text):
    run(
        browser,
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'));",
        element_id,
        text,
    )


def click(browser, css):
    run(browser, "document.querySelector(arguments[0]).click()", css)


def press(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    chain = ActionChains(browser)
    for key in keys:
        chain.send_keys(key)
    chain.perform()


def test_loads_without_a_word_and_asks_for_nothing(open_page):
    browser = open_page()
    assert browser.get_log("browser") == []
    events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url.partition(":")[0] for url in asked if not url.startswith("data:")] == ["file"]


def test_heatmap_shows_every_cell_and_its_change(open_page, rows, data):
    browser = open_page()
    shown = run(
        browser,
        "return [...document.querySelectorAll('#heat tr[data-cell]')].map(r => [Number(r.dataset.cell),"
        " [...r.querySelectorAll('td.d')].map(c => c.firstChild.textContent)])",
    )
    assert len(shown) == len(rows)
    for index, texts in shown:
        row = rows[data["cells"][index]["key"]]
        dense = rows[row["dense_key"]]
        for dimension, text in zip(DIMENSIONS, texts, strict=True):
            if not row[f"{dimension}_valid"]:
                assert text == "invalid"
            else:
                value = row[dimension] - (0 if row["method"] == "dense" else dense[dimension])
                assert float(text.replace(MINUS, "-")) == pytest.approx(value, abs=0.051)


def test_refusal_that_moved_is_hatched(open_page, rows, data):
    browser = open_page()
    hatched = set(
        map(
            tuple,
            run(
                browser,
                "return [...document.querySelectorAll('td.hatch')].map(c => [Number(c.parentNode.dataset.cell), c.dataset.dim])",
            ),
        )
    )
    expected = set()
    for index, cell in enumerate(data["cells"]):
        row = rows[cell["key"]]
        dense = rows[row["dense_key"]]
        expected |= {
            (index, d) for d in DIMENSIONS if abs(row[f"{d}_refusal"] - dense[f"{d}_refusal"]) >= 0.1 and row is not dense
        }
    assert hatched == expected
    assert hatched
    assert "repeating-linear-gradient" in run(
        browser, "return getComputedStyle(document.querySelector('td.hatch')).backgroundImage"
    )


def test_bars_are_as_high_as_the_scores(open_page, rows, data):
    browser = open_page()
    select(browser, "bars-dim", "privacy")
    bars = run(
        browser,
        "return [...document.querySelectorAll('#bars .mbar')].map(b => [Number(b.dataset.cell), Number(b.getAttribute('height')),"
        " b.classList.contains('void')])",
    )
    model = data["models"][0]
    by_variant = {}
    for cell in data["cells"]:
        if cell["model"] == model["name"] and cell["method"] != "dense":
            by_variant.setdefault(cell["variant"], []).append(rows[cell["key"]]["privacy"])
    assert len(bars) == len(by_variant)
    scores, heights = [], []
    for index, height, void in bars:
        values = [v for v in by_variant[data["cells"][index]["variant"]] if v is not None]
        assert void == (not values)
        if values:
            scores.append(sum(values) / len(values))
            heights.append(height)
    per_point = heights[0] / scores[0]
    assert heights == pytest.approx([per_point * s for s in scores], rel=0.01, abs=0.6)
    assert len(run(browser, "return [...document.querySelectorAll('#bars .seed')]")) == sum(
        len(v) for v in by_variant.values() if len(v) > 1
    )
    assert run(browser, "return document.querySelectorAll('#bars .band, #bars .dense').length") == 2


def test_scatter_frontier_is_that_of_brute_force(open_page, rows, data):
    browser = open_page()
    for x, y in (("size_bytes", "trust"), ("mmlu", "privacy"), ("kl_dense", "worst_drop")):
        select(browser, "axis-x", x)
        select(browser, "axis-y", y)
        sign = {m["id"]: -1 if m["better"] == "max" else 1 for m in data["metrics"]}
        points = {
            i: (sign[x] * c["v"][x], sign[y] * c["v"][y])
            for i, c in enumerate(data["cells"])
            if c["v"][x] is not None and c["v"][y] is not None
        }
        best = {i for i, p in points.items() if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points.values())}
        drawn = run(
            browser,
            "return [...document.querySelectorAll('#scatter .pt')].map(p => [Number(p.dataset.cell), p.classList.contains('front')])",
        )
        assert {i for i, _ in drawn} == set(points)
        assert {i for i, front in drawn if front} == best
        assert {
            int(i)
            for i in run(browser, "return [...document.querySelectorAll('#frontier tr[data-cell]')].map(r => r.dataset.cell)")
        } >= best


def test_probabilities_are_those_of_the_command(open_page, record, data):
    browser = open_page()
    select(browser, "axis-x", "size_bytes")
    select(browser, "axis-y", "trust")
    rows = run(
        browser,
        "return [...document.querySelectorAll('#frontier tr[data-cell]')].map(r => [Number(r.dataset.cell), r.lastChild.textContent])",
    )
    found = pareto(load_results(record), minimise=["size_bytes"], maximise=["trust"], draws=400)
    expected = {r["key"]: r["probability"] for r in found.rows()}
    assert len(rows) > 5
    for index, text in rows:
        probability = expected[data["cells"][index]["key"]]
        assert (text == "\u2013") == (probability is None)
        if probability is not None:
            assert float(text.removesuffix(" %")) / 100 == pytest.approx(probability, abs=0.1)


def test_filters_narrow_every_view_and_reset_brings_all_back(open_page, data):
    browser = open_page()
    count = lambda css: run(browser, "return document.querySelectorAll(arguments[0]).length", css)
    everything = (count("#heat tr[data-cell]"), count("#scatter .pt"))
    model = data["models"][1]["name"]
    select(browser, "filter-model", model)
    mine = [c for c in data["cells"] if c["model"] == model]
    assert count("#heat tr[data-cell]") == len(mine) < everything[0]
    click(browser, "#filter-methods [data-method=wanda]")
    assert count("#heat tr[data-cell]") == sum(c["method"] == "wanda" for c in mine)
    assert (
        run(browser, "return document.getElementById('filter-count').textContent")
        == f"{sum(c['method'] == 'wanda' for c in mine)} of {len(data['cells'])} cells"
    )
    type_in(browser, "filter-find", "2:4 seed 1")
    assert count("#heat tr[data-cell]") == 1
    type_in(browser, "filter-find", "no such cell")
    assert count("#heat tr[data-cell]") == 0
    assert "No cell passes" in run(browser, "return document.getElementById('heat').textContent")
    click(browser, "#filter-reset")
    assert (count("#heat tr[data-cell]"), count("#scatter .pt")) == everything


def test_heatmap_sorts_by_a_dimension(open_page):
    browser = open_page()
    click(browser, "#heat [data-sort=privacy]")
    shown = "return [...document.querySelectorAll('#heat td[data-dim=privacy]')].map(c => c.firstChild.textContent)"
    values = [float(t.replace(MINUS, "-")) for t in run(browser, shown) if re.fullmatch(rf"[+{MINUS}]?\d+\.\d", t)]
    half = len(values) // 2
    first = [v for v in values[:half] if v < 50]  # the dense row shows its score
    assert first[:-1] == sorted(first[:-1])
    assert run(browser, "return document.querySelector('#heat th[aria-sort]').getAttribute('aria-sort')") == "ascending"


def test_keyboard_walks_the_heatmap_and_opens_a_cell(open_page):
    from selenium.webdriver.common.keys import Keys

    browser = open_page()
    assert run(browser, "return document.querySelectorAll('#heat td[tabindex=\"0\"]').length") == 1
    run(browser, "document.querySelector('#heat td[tabindex=\"0\"]').focus()")
    press(browser, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    where = run(
        browser,
        "const c = document.activeElement; return [c.dataset.dim, [...document.querySelectorAll('tr[data-cell]')].indexOf(c.parentNode)]",
    )
    assert where == [DIMENSIONS[1], 1]
    assert run(browser, "return !document.querySelector('.tip').hidden")
    press(browser, Keys.ENTER)
    assert run(browser, "return document.getElementById('cell').open")
    press(browser, Keys.ESCAPE)
    assert not run(browser, "return document.getElementById('cell').open")
    assert run(browser, "return document.activeElement.dataset.dim") == DIMENSIONS[1]
    press(browser, Keys.HOME)
    assert run(browser, "return document.activeElement.dataset.dim") == DIMENSIONS[0]


def test_keyboard_reaches_every_control_from_the_top(open_page):
    from selenium.webdriver.common.keys import Keys

    browser = open_page()
    run(
        browser,
        "window.seen = []; document.addEventListener('focusin', e => window.seen.push(e.target.id || e.target.closest('[id]').id));",
    )
    press(browser, *[Keys.TAB] * 260)
    seen = set(run(browser, "return window.seen"))
    wanted = (
        "theme filter-model filter-methods filter-find filter-reset heat bars-model bars-dim axis-x axis-y scatter radar-add"
        " items-cell items-dim items-change items-find items-unveil"
    )
    assert set(wanted.split()) <= seen


def test_chosen_points_go_to_the_profile(open_page):
    browser = open_page()
    drawn = lambda: set(run(browser, "return [...document.querySelectorAll('#radar .poly')].map(p => p.dataset.cell)"))
    before = drawn()
    assert before
    other = run(browser, "return [...document.querySelectorAll('#scatter .pt:not(.chosen)')][0].dataset.cell")
    run(
        browser,
        "document.querySelector(`#scatter .pt[data-cell=\"${arguments[0]}\"]`).dispatchEvent(new MouseEvent('click', {bubbles: true}))",
        other,
    )
    assert drawn() == before | {other} or len(before) == 6
    assert other in drawn()
    assert run(browser, "return document.querySelectorAll('#radar-table thead th').length") == len(drawn()) + 1


def test_hostile_answers_stay_text(open_page, synthetic):
    browser = open_page()
    select(browser, "items-cell", "")
    texts = ""
    for dimension in ("adversarial", "stereotype"):
        select(browser, "items-dim", dimension)
        run(
            browser, "const e = document.getElementById('items-unveil'); e.checked = true; e.dispatchEvent(new Event('change'))"
        )
        while True:
            texts += run(browser, "return document.getElementById('items-list').textContent")
            if run(browser, "return document.getElementById('items-next').disabled"):
                break
            click(browser, "#items-next")
    for hostile in synthetic.HOSTILE[:3]:
        assert hostile in texts
    assert "access ⟦U+202E⟧gnp.exe⟦U+202C⟧⟦U+2066⟧⟦U+200B⟧ granted" in texts
    assert "⟦U+2028⟧" in texts
    assert "⟦U+0000⟧" in texts
    assert "Hessian is singular </script>" in run(browser, "return document.getElementById('failures').textContent")
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", run(browser, "return document.documentElement.textContent"))
    assert run(browser, "return window.pwned") is None
    assert run(
        browser,
        "return [document.scripts.length, document.images.length, document.querySelectorAll('iframe,object,embed,form,base').length]",
    ) == [2, 0, 0]
    assert browser.get_log("browser") == []


def test_policy_stops_injected_script_and_requests(open_page):
    browser = open_page()
    blocked = browser.execute_async_script(
        """const done = arguments[0]; const seen = [];
        document.addEventListener('securitypolicyviolation', e => seen.push(e.effectiveDirective));
        const script = document.createElement('script');
        try { script.text = 'window.pwned = 5'; } catch (e) { seen.push('trusted-types'); script.append('window.pwned = 5'); }
        document.body.append(script);
        const image = document.createElement('img'); image.src = 'http://127.0.0.1:9/x.png'; document.body.append(image);
        fetch('http://127.0.0.1:9/').catch(() => setTimeout(() => done([seen, window.pwned ?? null]), 50));"""
    )
    assert blocked[1] is None
    assert {"img-src", "connect-src", "trusted-types"} <= set(blocked[0])


def test_provoking_answers_are_blurred_until_asked(open_page):
    browser = open_page()
    select(browser, "items-cell", "")
    select(browser, "items-dim", "toxicity")
    blur = "return getComputedStyle(document.querySelector('#items-list .text')).filter"
    assert "blur" in run(browser, blur)
    assert run(browser, "return document.querySelector('#items-list .veil .text').getAttribute('aria-hidden')") == "true"
    click(browser, "#items-list .veil button")
    assert run(browser, blur) == "none"
    assert run(browser, "return document.activeElement.className") == "item"
    assert "blur" in run(
        browser, "return getComputedStyle(document.querySelectorAll('#items-list .item')[1].querySelector('.text')).filter"
    )


def test_answers_filter_by_outcome(open_page, data):
    browser = open_page()
    select(browser, "items-cell", "")
    select(browser, "items-change", "correct \u2192 refused")
    total = int(run(browser, "return document.getElementById('items-count').textContent").split(" of ")[1])
    names = data["items"]["outcomes"]
    assert total == sum(
        r[5] is not None and (names[r[5]], names[r[6]]) == ("correct", "refused") for r in data["items"]["rows"]
    )
    assert set(run(browser, "return [...document.querySelectorAll('.item')].map(i => i.dataset.change)")) == {
        "correct \u2192 refused"
    }


CONTRAST = """
const canvas = Object.assign(document.createElement('canvas'), {width: 1, height: 1}).getContext('2d', {willReadFrequently: true});
const rgb = (...layers) => { canvas.clearRect(0, 0, 1, 1); for (const c of layers) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
const light = (c) => { const [r, g, b] = c.map(v => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const ground = (e) => { const layers = []; for (; e; e = e.parentElement) layers.unshift(getComputedStyle(e).backgroundColor);
  return layers; };
return [...document.querySelectorAll(arguments[0])].map(e => { const under = ground(e);
  const [a, b] = [light(rgb(...under)), light(rgb(...under, getComputedStyle(e).color))];
  return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.textContent.slice(0, 40), e.className]; }).sort((a, b) => a[0] - b[0])[0];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(
    "css", ["#heat td.d, #heat th", ".pill", ".note, .lead, nav a, small, .eyebrow", "main p, main td, main th, button, select"]
)
def test_text_reads_well_in_both_themes(open_page, scheme, css):
    ratio, text, name = run(open_page(scheme=scheme), CONTRAST, css)
    assert ratio >= 4.5, (text, name)


def test_theme_follows_the_system_and_the_button(open_page):
    ground = "return getComputedStyle(document.body).backgroundColor"
    light, dark = run(open_page(scheme="light"), ground), run(open_page(scheme="dark"), ground)
    assert light != dark
    browser = open_page(scheme="dark")
    click(browser, "#theme")
    assert run(browser, ground) == light
    click(browser, "#theme")
    assert run(browser, ground) == dark
    click(browser, "#theme")
    assert run(browser, "return document.getElementById('theme').textContent") == "Theme: auto"


@pytest.mark.parametrize("width", [360, 768, 1600])
def test_no_width_makes_the_page_scroll_sideways(open_page, width):
    assert run(open_page(width=width), "return document.scrollingElement.scrollWidth") <= width


@pytest.mark.parametrize("width", [360, 768])
def test_a_long_name_without_a_break_does_not_either(open_page, synthetic, tmp_path, width):
    record = Record(tmp_path / "long")
    for spec in synthetic.specs()[:4]:
        rows = synthetic.answers(spec, 6)
        record.commit({**synthetic.cell_row(spec), "model": "a" * 100}, synthetic.measured(rows, spec, intervals=False), rows)
    browser = open_page(build(load_results(record.uri), tmp_path / "r.html"), width=width)
    assert run(browser, "return document.scrollingElement.scrollWidth") <= width


def test_prints_light_whole_and_without_controls(open_page):
    browser = open_page(scheme="dark", media="print")
    assert run(browser, "return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert run(
        browser,
        "return [...document.querySelectorAll('.top, .filters, .controls, .pager')].every(e => getComputedStyle(e).display === 'none')",
    )
    assert run(browser, "const h = document.getElementById('heat'); return h.scrollHeight <= h.clientHeight + 1")
    pdf = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert len(pdf["data"]) > 50_000
