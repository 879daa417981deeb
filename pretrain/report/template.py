"""The page of a report as a Jinja template. Everything in braces is escaped; figures are inlined as data."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style | safe }}</style>
</head>
{%- macro swatch(method) %}<span class="swatch" style="background:{{ method.colour }}"></span>{% endmacro %}
{%- macro number(cell, with_change) %}<td{% if cell.best %} class="best"{% endif %}>
{%- if several or cell.best %}<span class="value">{{ cell.text }}</span>{% else %}{{ cell.text }}{% endif %}
{%- if cell.interval %} <span class="interval">{{ cell.interval }}</span>{% endif %}
{%- if cell.note %} <span class="note">{{ cell.note }}</span>{% endif %}
{%- if with_change %}<span class="change{% if cell.shown %} shown{% endif %}">{{ cell.change }}</span>{% endif %}</td>
{%- endmacro %}
<body>
<h1>{{ title }}</h1>
<p class="soft">{{ subtitle }}</p>

<h2>In short</h2>
<div class="verdicts{% if verdicts|length == 1 %} one{% endif %}">
{% for verdict in verdicts %}{% if verdict.claims %}<section class="verdict">
<h3>{{ swatch(methods[verdict.place]) }}{{ verdict.heading }}</h3>
<ul>{% for claim in verdict.claims %}
<li class="{{ 'unclear' if claim.kind == 'not shown' else claim.kind }}">{{ claim.text | unbroken }}</li>
{%- endfor %}</ul>
</section>{% else %}<p>{{ verdict.text }}</p>{% endif %}
{% endfor %}</div>
{% if several and verdicts[0].claims %}<p class="soft">Square brackets: 95&nbsp;% intervals of the differences between
the same seeds of both methods (Student&rsquo;s t). + better, &minus; worse; where an interval holds zero, no difference
is shown, which is not to say that there is none.</p>{% endif %}
{% if caveats %}<ul class="soft">{% for caveat in caveats %}<li>{{ caveat }}</li>{% endfor %}</ul>{% endif %}

<h2{% if several %} class="new-page"{% endif %}>Numbers</h2>
{%- macro legend() %}
↓ lower is better, ↑ higher is better, → 0 nearer to zero is better, → human nearer to the human text is better.
{% if methods|length > 1 %}The best of a row is bold.{% endif %}
{% if several %}Values are means over seeds with 95&nbsp;% t intervals in brackets; below them the difference from
{{ methods[0].name }} over the seeds in common, perplexities in percent, dark where its interval excludes zero.
{% elif methods|length > 1 %}Small: the ratio (&times;) to {{ methods[0].name }}, or the difference from it
(+, &minus;).{% endif %}
{% if word_intervals %}Brackets of a word similarity of one run: bootstrap over its word pairs.{% endif %}
Rare tokens are the last 20&nbsp;% of the vocabulary sorted by how often each occurs in the training data,
frequent ones the first 30&nbsp;%. Tokens are predicted with the text before them given; “human text” is
what that text holds. {{ sliding }}
{%- endmacro %}
{% if not by_method %}<div class="scroll">
<table class="numbers{% if several %} stacked{% endif %}">
<caption><strong>Table 1.</strong> {{ legend() }}</caption>
<thead><tr><th></th>{% for method in methods %}<th class="method{% if not loop.first %} changing{% endif %}">
{{ swatch(method) }}{{ method.name }}{% if several %}<span class="seeds">{{ method.seeds }}</span>{% endif %}</th>
{%- endfor %}<th class="human">human text</th></tr></thead>
{% for section in sections %}<tbody class="section">
<tr class="section"><th colspan="{{ methods|length + 2 }}">{{ section.name }}</th></tr>
{% for row in section.rows %}<tr><td>{{ row.label }}<span class="arrow">{{ row.arrow }}</span></td>
{%- for cell in row.cells %}{{ number(cell, not loop.first) }}{% endfor -%}
<td>{{ row.human }}</td></tr>
{% endfor %}</tbody>
{% endfor %}</table>
</div>
{% else %}<p class="soft">{{ legend() }}</p>
{% for section in sections %}{% set human = section.rows|selectattr("human")|list %}<div class="scroll">
<table class="numbers by-method stacked">
<caption><strong>Table 1.{{ loop.index }}.</strong> {{ section.name }}.</caption>
<thead><tr><th></th>{% for row in section.rows %}<th>{{ row.label }}<span class="arrow">{{ row.arrow }}</span></th>
{%- endfor %}</tr></thead>
<tbody>
{% for method in methods %}{% set first = loop.first %}{% set place = loop.index0 %}<tr><th scope="row">
{{- swatch(method) }}{{ method.name }} <span class="soft">{{ method.seeds }}</span></th>
{%- for row in section.rows %}{{ number(row.cells[place], not first) }}{% endfor %}</tr>
{% endfor %}{% if human %}<tr><th scope="row">human text</th>{% for row in section.rows %}<td>{{ row.human }}</td>
{%- endfor %}</tr>
{% endif %}</tbody>
</table>
</div>
{% endfor %}{% endif %}

<h2>Figures</h2>
<div class="figures">
{% for figure in figures %}<figure{% if figure.wide %} class="wide"{% endif %}>
<img src="data:image/png;base64,{{ figure.data }}" alt="{{ figure.caption }}">
<figcaption><strong>Figure {{ loop.index }}.</strong> {{ figure.caption }}</figcaption>
</figure>
{% endfor %}
</div>
{% if tokens %}
<h2>Tokens that training hardly reached</h2>
<p class="soft">Ids whose rows lie nearest to {{ tokens[0].reference }} in the output embedding, by cosine; “count” is
how often each occurs in training. At most {{ tokens[0].rows|length }} each; <code>evaluation.json</code> has more.</p>
<div class="small-tables">
{% for table in tokens %}<div><h3>{{ swatch(methods[table.place]) }}{{ table.title }}</h3>
{% if table.reference != tokens[0].reference %}<p class="soft">nearest to {{ table.reference }}</p>
{% endif %}<table><thead><tr><th>id</th><th class="text">text</th><th>count</th><th>cosine</th></tr></thead><tbody>
{% for row in table.rows %}<tr><td>{{ row.id }}</td><td class="text">{{ row.text }}</td><td>{{ row.count }}</td>
<td>{{ row.cosine }}</td></tr>
{% endfor %}</tbody></table></div>
{% endfor %}</div>
{% endif %}{% if examples %}
<h2>What the models write</h2>
<p class="soft">{{ generated }}. The first of them:</p>
{% for example in examples %}<details class="example"><summary>{{ example.prompt }} …</summary>
<dl><dt>human text</dt><dd>{{ example.human }}</dd>
{% for text in example.texts %}<dt>{{ swatch(methods[text.place]) }}{{ text.name }}, {{ text.how }}</dt>
<dd>{{ text.text }}</dd>
{% endfor %}</dl></details>
{% endfor %}{% endif %}
<h2>What was run</h2>
<div class="scroll">
<table class="facts">
{% if methods|length <= 3 %}<thead><tr><th></th>{% for method in methods %}<th class="method">
{{ swatch(method) }}{{ method.name }}</th>{% endfor %}</tr></thead>{% endif %}
<tbody>
{% for fact in facts %}<tr><th>{{ fact.label }}</th>
{%- if methods|length <= 3 %}{% for text in fact.texts %}<td>{{ text }}</td>{% endfor %}
{%- elif fact.common %}<td>{{ fact.texts[0] }}</td>
{%- else %}<td>{% for text in fact.texts %}<div>{{ swatch(methods[loop.index0]) }}{{ methods[loop.index0].name }}:
 {{ text }}</div>{% endfor %}</td>{% endif %}</tr>
{% endfor %}
</tbody>
</table>
</div>

<h2>How to run it again</h2>
{% if methods|selectattr("recipe")|list %}<p>Save a recipe as <code>recipe.yaml</code>, then:</p>{% endif %}
<pre>{% if methods|selectattr("recipe")|list %}python -m pretrain prepare recipe.yaml
python -m pretrain train recipe.yaml
{% endif %}{% for run in runs %}python -m pretrain evaluate {{ run.evaluated }}
{% endfor %}python -m pretrain report{% for run in runs %} {{ run.folder }}{% endfor %}
</pre>
{% if runs|selectattr("published")|list %}<p class="soft">PATH_TO: where a published model lies. RECIPE: the recipe on
whose corpus it was measured. The evaluation keeps neither.</p>{% endif %}
{% for method in methods if method.recipe %}<details{% if methods|length == 1 %} open{% endif %}>
<summary>Recipe of {{ method.name }}{{ method.recipe_note }}, all values</summary>
<pre>{{ method.recipe }}</pre></details>
{% endfor %}
</body>
</html>
"""
