"""The machine's Chromium, driven by Playwright, with everything noted that a page of ours must not do."""

import contextlib
import shutil
from collections.abc import Iterator

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@contextlib.contextmanager
def chromium() -> Iterator:
    """A headless browser; the test is skipped where Playwright or a Chromium is missing."""
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the test extra")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"needs one of {', '.join(NAMES)} on PATH")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=QUIET)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, url: str, width: int = 1200, scheme: str = "light") -> Iterator:
    """`url` in a window of its own; at the end no script had failed, nothing was refused, nobody else was asked."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    yield page
    here = url.split("/")[2]
    assert said == []
    assert [one for one in asked if one.split("/")[2] != here and not one.startswith("data:")] == []
    page.close()


WIDER = """() => [...document.querySelectorAll('body *')].filter((element) => {
  const box = element.getBoundingClientRect();
  return box.width && box.right > innerWidth + 1 && !element.closest('.scroll, pre, svg');
}).map((element) => element.outerHTML.slice(0, 120))"""
"""Elements that stick out of the window, other than within what scrolls."""

OVERLAPS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll('figure svg')) {
    const texts = [...svg.querySelectorAll('text')].filter((text) => text.textContent.trim());
    const boxes = texts.map((text) => [text.textContent.trim(), text.getBoundingClientRect()]);
    boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
      const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
      const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
      if (wide > 1 && high > 2) found.push([a, b]);
    }));
  }
  return found;
}"""
"""Pairs of labels of one figure that lie on each other."""

FAINT = """() => {
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((x) => x / 255)
      .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const found = [];
  for (const element of document.querySelectorAll('h1, h2, h3, p, li, th, td, dt, dd, small, a, figure text')) {
    const style = getComputedStyle(element), svg = element instanceof SVGElement;
    const colour = svg ? style.fill : style.color;
    if (!element.textContent.trim() || !colour.startsWith('rgb(')) continue;
    const one = light(colour), ratio = (Math.max(one, paper) + 0.05) / (Math.min(one, paper) + 0.05);
    if (ratio < 4.5) found.push([element.tagName, element.textContent.trim().slice(0, 40), colour, ratio.toFixed(2)]);
  }
  return found;
}"""
"""Texts whose contrast with the paper is below 4.5 (WCAG 2.2, 1.4.3)."""
