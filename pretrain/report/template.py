"""The page of a report as a Jinja template. Everything in braces is escaped; figures are inlined as data."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  :root { --ink: #222; --soft: #666; --line: #dcdcdc; --wash: #f6f7f9; }
  * { box-sizing: border-box; }
  body { margin: 0 auto; max-width: 1080px; padding: 2.2rem 1.6rem 4rem; color: var(--ink); background: #fff;
         font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
  h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
  h2 { font-size: 1.2rem; margin: 2.6rem 0 .7rem; padding-bottom: .3rem; border-bottom: 2px solid var(--ink); }
  p { margin: .5rem 0; max-width: 78ch; }
  .soft { color: var(--soft); }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
  th, td { padding: .32rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
  th:first-child, td:first-child { text-align: left; padding-left: .2rem; }
  thead th { border-bottom: 2px solid var(--ink); overflow-wrap: anywhere; }
  tr.section th { text-align: left; padding-top: 1.1rem; font-size: .8rem;
                  letter-spacing: .04em; text-transform: uppercase; color: var(--soft);
                  border-bottom-color: var(--ink); }
  td.best { font-weight: 700; }
  thead th.changing { padding-right: 5.2rem; }
  td .change { display: inline-block; min-width: 4.2rem; margin-left: .3rem; color: var(--soft); font-weight: 400;
               font-size: .84em; white-space: nowrap; }
  .arrow { color: var(--soft); white-space: nowrap; padding-left: .35rem; }
  table.facts td, table.facts th { text-align: left; overflow-wrap: anywhere; }
  table.facts tbody th { font-weight: 400; color: var(--soft); width: 11rem; white-space: nowrap; }
  .swatch { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .4rem; }
  .figures { display: grid; grid-template-columns: 1fr 1fr; gap: 1.6rem 1.2rem; align-items: start; }
  figure { margin: 0; break-inside: avoid; }
  figure.wide { grid-column: 1 / -1; }
  figure img { width: 100%; height: auto; display: block; }
  figcaption { font-size: .88rem; color: var(--soft); line-height: 1.45; margin-top: .35rem; max-width: 95ch; }
  ul { padding-left: 1.2rem; max-width: 78ch; }
  pre { background: var(--wash); border: 1px solid var(--line); border-radius: 4px; padding: .8rem 1rem;
        font-size: .8rem; line-height: 1.4; overflow-x: auto; }
  summary { cursor: pointer; margin: .6rem 0; overflow-wrap: anywhere; }
  @media (max-width: 700px) { .figures { grid-template-columns: 1fr; } }
  @media print {
    @page { margin: 14mm; }
    body { max-width: none; padding: 0; font-size: 10.5pt; }
    h2 { break-after: avoid; }
    tr { break-inside: avoid; }
    pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 7.5pt; }
    .scroll { overflow: visible; }
  }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="soft">{{ subtitle }}</p>

<h2>In short</h2>
{% for sentence in findings %}<p>{{ sentence }}</p>
{% endfor %}
{% if caveats %}<ul class="soft">{% for caveat in caveats %}<li>{{ caveat }}</li>{% endfor %}</ul>{% endif %}

<h2>Numbers</h2>
<p class="soft">↓ lower is better, ↑ higher is better, → 0 nearer to zero is better.
{% if runs|length > 1 %}The best of a row is bold;
small: the ratio (&times;) to {{ runs[0].name }}, or the difference from it (+, &minus;).{% endif %}
Rare tokens are the last 20&nbsp;% of the vocabulary sorted by how often each occurs in the training data,
frequent ones the first 30&nbsp;%. Tokens are predicted with the text before them given; “human text” is
what that text holds.</p>
<div class="scroll">
<table class="numbers">
<thead><tr><th></th>{% for run in runs %}<th{% if not loop.first %} class="changing"{% endif %}>
<span class="swatch" style="background:{{ run.colour }}"></span>{{ run.name }}</th>{% endfor %}
<th>human text</th></tr></thead>
<tbody>
{% for section in sections %}
<tr class="section"><th colspan="{{ runs|length + 2 }}">{{ section.name }}</th></tr>
{% for row in section.rows %}<tr><td>{{ row.label }}<span class="arrow">{{ row.arrow }}</span></td>
{%- for cell in row.cells %}<td{% if cell.best %} class="best"{% endif %}>{{ cell.text }}
{%- if not loop.first %}<span class="change">{{ cell.change }}</span>{% endif %}</td>{% endfor -%}
<td>{{ row.human }}</td></tr>
{% endfor %}{% endfor %}
</tbody>
</table>
</div>

<h2>Figures</h2>
<div class="figures">
{% for figure in figures %}<figure{% if figure.wide %} class="wide"{% endif %}>
<img src="data:image/png;base64,{{ figure.data }}" alt="{{ figure.caption }}">
<figcaption>{{ figure.caption }}</figcaption>
</figure>
{% endfor %}
</div>

<h2>What was run</h2>
<div class="scroll">
<table class="facts">
<thead><tr><th></th>{% for run in runs %}<th>
<span class="swatch" style="background:{{ run.colour }}"></span>{{ run.name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for label, values in facts %}<tr><th>{{ label }}</th>{% for value in values %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table>
</div>

<h2>How to run it again</h2>
<p>Save a recipe as <code>recipe.yaml</code>, then:</p>
<pre>python -m pretrain prepare recipe.yaml
python -m pretrain train recipe.yaml
{% for run in runs %}python -m pretrain evaluate {{ run.command_folder }}
{% endfor %}python -m pretrain report{% for run in runs %} {{ run.command_folder }}{% endfor %}
</pre>
{% for run in runs %}<details{% if runs|length == 1 %} open{% endif %}>
<summary>Recipe of {{ run.name }}, all values</summary>
<pre>{{ run.recipe }}</pre></details>
{% endfor %}
</body>
</html>
"""
