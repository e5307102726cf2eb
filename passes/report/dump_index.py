"""The page from which a dump is read: what each pass did, and links to every file. It asks for nothing elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined


class DumpedPass(NamedTuple):
    """A pass and its file.

    Attributes:
        seconds: that it took.
        calls: ops that the graph calls after it.
        changes: how the counts of ops changed, as words.
    """

    file: str
    why: str
    seconds: float
    calls: int
    changes: Sequence[str]


_PAGE = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
    """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title><style>
:root { color-scheme: light dark; font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 4px 10px; border-bottom: 1px solid GrayText; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
</style></head><body>
<h1>{{ title }}</h1>
<p><a href="{{ captured }}">The graph as it was captured</a>, and what each pass made of it:</p>
<table>
<thead><tr><th>pass</th><th>why it is there</th><th class="n">ms</th><th class="n">calls</th>
<th>ops that changed</th></tr></thead>
<tbody>
{% for row in passes %}
<tr><td><a href="{{ row.file }}">{{ row.file.removesuffix('.txt') }}</a></td><td>{{ row.why }}</td>
<td class="n">{{ '%.1f' | format(1e3 * row.seconds) }}</td><td class="n">{{ row.calls }}</td>
<td>{% if row.changes %}<details><summary>{{ row.changes | length }} kinds</summary>
{% for change in row.changes %}{{ change }}<br>{% endfor %}
</details>{% else %}the graph is as it was{% endif %}</td></tr>
{% endfor %}
</tbody></table>
{% if others %}
<h2>After the passes</h2>
<ul>{% for file in others %}<li><a href="{{ file }}">{{ file }}</a></li>{% endfor %}</ul>
{% endif %}
</body></html>
"""
)


def index_page(title: str, captured: str, passes: Sequence[DumpedPass], others: Sequence[str]) -> str:
    """The page as HTML text; ``captured`` and ``others`` are files without a pass, before and after them all."""
    return _PAGE.render(title=title, captured=captured, passes=passes, others=others)
