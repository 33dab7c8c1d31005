"""The template of a comparison's page, kept as Python: a Flower app carries no .html files."""

TEMPLATE = """{% from "plot" import plot -%}
{% macro grid(table) %}
{% if table.title %}
<h4>{{ table.title }}</h4>
{% endif %}
{% if table.note %}<p class="note">{{ table.note }}</p>{% endif %}
<div class="scroll" role="region" tabindex="0" aria-label="{{ table.title }}">
<table class="sortable">
<thead><tr>
{% for column in table.columns %}
<th scope="col"{% if column.text %} class="text"{% endif %} data-first="{{ column.first }}"
  {%- if column.now %} aria-sort="{{ column.now }}"{% endif %}
  {%- if column.help %} title="{{ column.help }}"{% endif %}>{{ column.title }}</th>
{% endfor %}
</tr></thead>
{% for title, rows in table.groups %}
<tbody>
{% if title %}
<tr class="group"><th scope="rowgroup" colspan="{{ table.columns | length }}">{{ title }}</th></tr>
{% endif %}
{% for row in rows %}
<tr{% if row.mark %} class="{{ row.mark }}"{% endif %}>
{% for cell in row.cells %}
{% if loop.first %}
<th scope="row">{{ cell.text | soft }}
  {%- if cell.small %}<br><small>{{ cell.small | soft }}</small>{% endif %}</th>
{% else %}
<td{% if table.columns[loop.index0].text %} class="text"{% endif %}
  {%- if cell.missing %} data-value=""
  {%- elif cell.value is not none %} data-value="{{ cell.value }}"{% endif %}>
  {%- if cell.mark %}<span class="{{ cell.mark }}">{{ cell.text | soft }}</span>
  {%- else %}{{ cell.text | soft }}{% endif %}
  {%- if cell.small %} <small>{{ cell.small }}</small>{% endif %}</td>
{% endif %}
{% endfor %}
</tr>
{% endfor %}
</tbody>
{% endfor %}
</table></div>
{% endmacro -%}
{% macro drawn(figures) %}
{% if figures %}
<div class="figures">
{% for figure in figures %}
<figure{% if figure.half %} class="half"{% endif %}>
<figcaption><h4>{{ figure.title }}</h4><p class="note">{{ figure.note }}</p></figcaption>
{{ plot(figure) }}
</figure>
{% endfor %}
</div>
{% endif %}
{% endmacro -%}
<!doctype html>
<html lang="en">
<head>
{% include "head" %}
<title>{{ comparison.study }} - FedTune comparison</title>
</head>
<body><main class="wide">
<h1>{{ comparison.question or comparison.study }}</h1>
<p class="note">The study {{ comparison.study }}, compared with FedTune: every strategy on the same
shards, from the same start, with the same cohorts and batches for a seed.</p>
<div class="verdict"><p>{{ said }}</p></div>
<dl class="facts">
  <div><dt>strategies</dt><dd>{{ strategies | length }}</dd></div>
  <div><dt>baseline</dt><dd>{{ comparison.baseline }}</dd></div>
  <div><dt>conditions</dt><dd>{{ comparison.conditions | length }}</dd></div>
  <div><dt>seeds</dt><dd>{{ comparison.seeds | join(", ") }}</dd></div>
  <div><dt>cells run</dt><dd>{{ comparison.cells - comparison.failures | length }} of
    {{ comparison.cells }}</dd></div>
  <div><dt>time of all cells</dt><dd>{{ comparison.seconds | time }}</dd></div>
  {% if comparison.target is not none %}
  <div><dt>target</dt><dd>{{ comparison.metric | words }} {{ "%g" % comparison.target }}</dd></div>
  {% endif %}
</dl>
<nav aria-label="Contents"><ul>
{% if promises %}<li><a href="#promises">Quality and leakage against epsilon</a></li>{% endif %}
{% for section in sections %}
<li><a href="#{{ section.id }}">{{ section.title }}</a></li>
{% endfor %}
{% if tuned %}<li><a href="#tuning">Tuning</a></li>{% endif %}
{% if failures %}<li><a href="#failures">Failed cells</a></li>{% endif %}
<li><a href="#how">How it was made, and how to repeat it</a></li>
</ul></nav>

{% if promises %}
<section aria-labelledby="promises">
<h2 id="promises">Quality and leakage against epsilon</h2>
<p class="note">Mean over seeds with 95 % intervals; "none" is training without any promise. Dotted:
the most that a claim allows. Open marks: an audit of some seed was invalid.</p>
{{ drawn(promises) }}
</section>
{% endif %}

{% for section in sections %}
<section aria-labelledby="{{ section.id }}">
<h2 id="{{ section.id }}">{{ section.title | soft }}</h2>
{% for part in section.parts %}
<h3>{{ part.title }}</h3>
{% if part.note %}<p class="note">{{ part.note }}</p>{% endif %}
{% if part.said %}
<ul class="said">{% for sentence in part.said %}<li>{{ sentence }}</li>{% endfor %}</ul>
{% endif %}
{% for table in part.tables %}{{ grid(table) }}{% endfor %}
{% for table in part.more %}
<details><summary>{{ table.title }}</summary>{{ grid(table) }}</details>
{% endfor %}
{{ drawn(part.figures) }}
{% endfor %}
</section>
{% endfor %}

{% if tuned %}
<section aria-labelledby="tuning">
<h2 id="tuning">Tuning</h2>
{{ grid(tuned) }}
<details><summary>{{ trials.title }}</summary>{{ grid(trials) }}</details>
{{ drawn(tuning) }}
</section>
{% endif %}

{% if failures %}
<section aria-labelledby="failures">
<h2 id="failures">Failed cells</h2>
{{ grid(failures) }}
</section>
{% endif %}

<section aria-labelledby="how">
<h2 id="how">How it was made, and how to repeat it</h2>
<ul class="said">{% for note in comparison.notes %}<li>{{ note }}</li>{% endfor %}</ul>
<p>Save the study below as <code>study.toml</code> and run
<code>fedtune compare study.toml</code> with the sources whose digest is
<code>{{ comparison.code }}</code>.</p>
<details open><summary>The study, overrides applied</summary>
<pre tabindex="0">{{ comparison.recipe }}</pre></details>
</section>
<footer>
{% include "foot" %}
</footer>
</main>
<script>{{ script | safe }}</script>
</body></html>
"""
