"""report.html: what a workdir holds, as one self-contained page.

The page loads nothing, runs no script but the one that sorts its tables, and treats every text it shows (outputs,
titles, names) as hostile.
The same workdir gives the same bytes.
"""

import importlib.resources
import pathlib
from typing import Any

import jinja2
from markupsafe import Markup

from listopd_jax import files
from listopd_jax.report import findings, plots, script
from listopd_jax.report.guarded_section import gain
from listopd_jax.report.inputs import Inputs, first_point, read_inputs
from listopd_jax.report.recommendation import recommendation
from listopd_jax.report.sections import SECTIONS, key_figures
from listopd_jax.report.wording import visible

REPORT = "report.html"
_TEMPLATE = importlib.resources.files("listopd_jax.report") / "report.html.jinja"


def write_report(workdir: str | pathlib.Path) -> pathlib.Path:
    """Write `workdir`/report.html from whatever the run has produced so far, and return its path.

    Raises UserError if the workdir does not exist or one of its files is broken.
    """
    path = pathlib.Path(workdir) / REPORT
    files.write_text(path, render(read_inputs(workdir)))
    return path


def render(inputs: Inputs) -> str:
    """The page as text; for a sweep the page of its first point, with the others next to it."""
    inputs = first_point(inputs)
    dark = "".join(f"--c{light[1:]}:{shade};" for light, shade in plots.DARK.items())
    environment = jinja2.Environment(
        autoescape=True,
        finalize=_show,
        # A misspelt name raises; by default it would be an empty place on the page.
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made = [section(inputs) for section in SECTIONS]
    return environment.from_string(_TEMPLATE.read_text("utf-8")).render(
        headline=findings.headline(inputs.found),
        recommended=recommendation(inputs),
        sentences=[*findings.sentences(inputs.found), *gain(inputs)],
        figures=key_figures(inputs.found),
        sections=[section for section in made if section is not None],
        run=[str(inputs.config[name]) for name in ("preset", "device") if inputs.config.get(name)],
        dark=Markup(dark),
        policy=script.POLICY,
        script=Markup(script.TEXT),
    )


def _show(value: Any) -> Any:
    """The text that the template writes for `value`: with nothing hidden in it, escaped after that."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
