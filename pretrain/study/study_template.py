"""The page of a study as a Jinja template, in the look of the reports of runs. Everything in braces is escaped."""

from pretrain.report.page_style import STYLE as RUN_STYLE

STYLE = (
    RUN_STYLE
    + """
  .question { font-size: 1.12rem; max-width: 75ch; margin: .9rem 0 0; padding-left: .9rem;
              border-left: 3px solid var(--ink); }
  .answers { display: grid; grid-template-columns: repeat(auto-fill, minmax(29rem, 1fr)); gap: .3rem 2.2rem; }
  .answer { break-inside: avoid; margin: 0 0 1.1rem; }
  .answer h3 { font-size: 1rem; margin: 0 0 .15rem; max-width: 78ch; }
  .answer ul { margin: .1rem 0; }
  .answer li { font-size: .92rem; line-height: 1.45; margin: .12rem 0; }
  .answer ul { padding-left: 1.1rem; }
  sup { font-size: .75em; line-height: 0; }
  .answers-head { font-size: .95rem; font-style: italic; font-weight: 400; color: var(--soft); margin: 1.3rem 0 .6rem; }
  table.book { border-top: 2px solid var(--ink); border-bottom: 2px solid var(--ink); font-size: .85rem; }
  table.book th, table.book td { border-bottom: 0; padding: .2rem .5rem; font-weight: 400; }
  table.book thead th { border-bottom: 1px solid var(--ink); font-weight: 700; vertical-align: bottom;
                        line-height: 1.25; overflow-wrap: normal; }
  table.book.fits thead th:nth-child(2) { text-align: left; }
  table.book tbody + tbody tr:first-child > * { border-top: 1px solid var(--line); }
  table.book tbody th { text-align: left; padding-left: .2rem; white-space: nowrap; }
  table.book tr:last-child > * { padding-bottom: .4rem; }
  table.book td { white-space: nowrap; }
  table.book td.words { text-align: left; white-space: normal; }
  table.book tr.group th { font-style: italic; padding-top: .55rem; }
  table.book .interval { display: block; color: var(--soft); font-size: .86em; line-height: 1.25; }
  table.book td.claimed .value { font-weight: 700; }
  table.book td.better .value { color: #00664a; }
  table.book td.worse .value { color: #a84300; }
  .caption { font-size: .88rem; color: var(--soft); line-height: 1.45; margin: 1.4rem 0 .5rem; max-width: 95ch; }
  .caption b, figcaption b { color: var(--ink); }
  .figures.one { grid-template-columns: 1fr; gap: 2rem; }
  @media (max-width: 700px) { .answers { grid-template-columns: 1fr; } }
  @media print {
    .answers { grid-template-columns: 1fr 1fr; }
    .answers-head, .caption { break-after: avoid; }
    table.book { font-size: 7.6pt; }
    table.book th, table.book td { padding-left: .25rem; padding-right: .25rem; }
  }
"""
)

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style | safe }}</style>
</head>
{%- macro swatch(place) %}<span class="swatch" style="background:{{ colours[place] }}"></span>{% endmacro %}
{%- macro answers_of(answers) %}<div class="answers">{% for answer in answers %}<section class="answer">
<h3>{{ swatch(answer.place) }}{{ answer.head }}</h3>
<ul>{% for sentence in answer.sentences %}<li>{{ sentence | raised }}</li>{% endfor %}</ul>
</section>
{% endfor %}</div>{% endmacro %}
{%- macro rows_of(table) %}<div class="scroll"><table class="book{{ " fits" if table.words else "" }}">
<thead><tr>{% for head in table.heads %}<th>{{ head }}</th>{% endfor %}</tr></thead>
{% for group in table.groups %}<tbody>
<tr class="group"><th colspan="{{ table.heads|length }}">{{ swatch(group.place) }}{{ group.label }}</th></tr>
{% for row in group.rows %}<tr><th>{{ row.head }}</th>{% for cell in row.cells %}<td class="{{ cell.kind }}">
{%- if cell.interval is defined %}<span class="value">{{ cell.text }}</span>
{%- if cell.interval %}<span class="interval">{{ cell.interval }}</span>{% endif %}
{%- else %}{{ cell.text | raised }}{% endif %}</td>
{%- endfor %}</tr>
{% endfor %}</tbody>{% endfor %}
</table></div>{% endmacro %}
<body>
<h1>{{ title }}</h1>
<p class="soft">{{ subtitle }}</p>
<p class="question">{{ question }}</p>

<h2>The answer</h2>
<p class="answers-head">Does degeneration grow or fade with {{ scale }}?</p>
{{ answers_of(degeneration) }}
{% if changes %}<p class="answers-head">What does the method change? Differences between runs with the same seed.</p>
{{ answers_of(changes) }}{% endif %}
<p class="soft">Square brackets: 95&nbsp;% intervals. A loss is the logarithm of a perplexity, in nats per token of the
test split. Isotropy is 1 for a round cloud of output embeddings and near 0 for a narrow cone; the mean shift is 0 for a
cloud around the origin.</p>
{% if caveats %}<ul class="soft">{% for caveat in caveats %}<li>{{ caveat }}</li>{% endfor %}</ul>{% endif %}

<h2>The grid</h2>
<div class="scroll"><table class="facts"><tbody>
{% for label, value in grid %}<tr><th>{{ label }}</th><td>{{ value }}</td></tr>
{% endfor %}</tbody></table></div>

<h2>Figures</h2>
<div class="figures one">
{% for picture in pictures %}<figure class="wide">
<img src="data:image/png;base64,{{ picture.data }}" alt="{{ picture.caption }}">
<figcaption><b>Figure {{ loop.index }}.</b> {{ picture.caption }}</figcaption>
</figure>
{% endfor %}
</div>

<h2>Numbers</h2>
{% for table in tables %}<p class="caption"><b>Table {{ loop.index }}.</b> {{ table.caption }}</p>
{{ rows_of(table) }}
{% endfor %}

<h2>How to run it again</h2>
<pre>{{ command }}</pre>
<div class="scroll"><table class="facts"><tbody>
{% for label, value in facts %}<tr><th>{{ label }}</th><td>{{ value }}</td></tr>
{% endfor %}</tbody></table></div>
</body>
</html>
"""
