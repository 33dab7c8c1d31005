"""The page's template, kept as Python: a Flower app carries no .html files."""

TEMPLATE = """{% from "plot" import plot -%}
<!doctype html>
<html lang="en">
<head>
<title>{{ result.name }} - FedTune</title>
{% include "head" %}
</head>
<body><main>
<h1>{{ result.name }}</h1>
<p class="note">Federated fine-tuning with FedTune: every client trained on its own rows, which
never left it; only adapters travelled.</p>
<p class="verdict">{{ result.verdict }}</p>
<dl class="facts">
  <div><dt>clients</dt><dd>{{ run.clients | length }}</dd></div>
  <div><dt>rounds</dt><dd>{{ rounds }}{% if rounds < run.experiment.rounds %} of
    {{ run.experiment.rounds }} (unfinished){% endif %}</dd></div>
  <div><dt>strategy</dt><dd>{{ run.experiment.strategy }}</dd></div>
  <div><dt>base model</dt><dd>{{ run.experiment.model.name }}</dd></div>
  <div><dt>LoRA rank</dt><dd>{{ run.experiment.adapter.rank }}</dd></div>
  <div><dt>replies set aside</dt><dd>{{ result.rejected }}</dd></div>
  {% if result.padding is not none -%}
  <div><dt>padding</dt><dd>{{ "%.0f" % (100 * result.padding) }} % of tokens</dd></div>
  {%- endif %}
</dl>

<h2>What federation bought</h2>
<p class="note">On the {{ "{:,}".format(result.test_rows) }} pooled test rows of all clients.
{{ "Brackets: 95 % interval of the accuracy for so many rows." if result.rows[0].interval }}
{{ "A client alone trains its own model and shares nothing." if "alone" in kinds }}
{{ "Centralized: trained on all rows in one place, which federation avoids."
   if "centralized" in run.references }}</p>
<div class="scroll"><table>
<tr><th>model</th>{% for m in result.metrics %}<th>{{ m | words }}</th>{% endfor %}
  <th>moved</th><th>time</th></tr>
{% for row in result.rows %}
<tr class="{{ row.kind }}"><td>{{ row.name }}</td>
  {% for m in result.metrics %}<td>{{ "%.3f" % row.numbers[m] }}
    {%- if m == "accuracy" and row.interval %} <small>[{{ "%.2f" % row.interval[0] }},
    {{ "%.2f" % row.interval[1] }}]</small>{% endif %}</td>{% endfor %}
  <td>{{ "-" if row.bytes_moved is none else row.bytes_moved | bytes }}</td>
  <td>{{ row.seconds | time }}</td></tr>
{% endfor %}
</table></div>

{% if result.own | length > 1 %}
<h2>Each client on its own test rows</h2>
<p class="note">{{ result.metrics[0] | words | capitalize }}: what each client gains or loses on
rows like its own.</p>
{% set models = ["untuned", "alone", "federated"] if "alone" in kinds
   else ["untuned", "federated"] %}
<div class="scroll"><table>
<tr><th>client</th><th>training rows</th><th>test rows</th>
  {% for m in models %}<th>{{ m }}</th>{% endfor %}</tr>
{% for client in run.clients %}
<tr><td>{{ client.name }}</td>
  <td>{{ "withheld" if client.examples is none else "{:,}".format(client.examples) }}</td>
  <td>{{ "{:,}".format(client.test_examples or 0) }}</td>
  {% for m in models %}<td>{% if m in result.own[client.name] %}
    {{- "%.3f" % result.own[client.name][m] }}{% else %}-{% endif %}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}

{% for figure in figures %}
<h2>{{ figure.title }}</h2>
<p class="note">{{ figure.note }}</p>
{{ plot(figure) }}
{% endfor %}

{% if broken %}
<h2>Privacy</h2>
<p><strong>No promise can be shown.</strong> {{ broken }}</p>
{% elif certificate %}
<h2>Privacy</h2>
<p>{{ certificate.statement }}</p>
<div class="scroll"><table>
<tr><th class="text">of the models alone</th><th>PLD</th><th>RDP</th>
  <th>to who sees the sampling</th><th>delta</th><th>z</th><th>clip</th></tr>
<tr><td class="text">epsilon</td>
  {% for key in ["eps_pld", "eps_rdp", "eps_observes_participation", "delta",
    "noise_multiplier", "clip"] %}
  <td>{{ "-" if certificate[key] is none else "%.4g" % certificate[key] }}</td>{% endfor %}</tr>
</table></div>
{% if certificate.clients %}
<div class="scroll"><table>
<tr><th>client</th><th>{{ certificate.unit }}s</th><th>rate</th><th>z</th><th>rounds</th>
  <th>epsilon</th></tr>
{% for row in certificate.clients %}
<tr><td>{{ row.client }}</td><td>{{ "{:,}".format(row.units) }}</td>
  <td>{{ "%.4g" % row.rate }}</td><td>{{ "%.4g" % row.noise_multiplier }}</td>
  <td>{{ row.rounds }}</td><td>{{ "%.4g" % row.epsilon }}</td></tr>
{% endfor %}
</table></div>
{% endif %}
<p class="note">Not covered: {{ certificate.not_covered | join("; ") }}.</p>
<details><summary>Checklist of NIST SP 800-226</summary>
<div class="scroll"><table>
{% for row in certificate.checklist %}
<tr><td class="text">{{ row.item }}</td><td class="text">{{ row.answer }}</td></tr>
{% endfor %}
</table></div></details>
{% endif %}

{% if audits %}
<h2>Audits</h2>
<p class="note">Attacks on this run. An attack that finds nothing proves nothing: read who attacked
and what was checked of the measurement. Brackets: 95 % intervals.</p>
<div class="scroll"><table class="tops">
<tr><th>audit</th><th class="text">verdict</th><th class="text">measure</th><th>value</th>
  <th>allowed</th><th class="text">how</th></tr>
{% for audit, rows in audits %}
{% for name, value, allowed, method in rows %}
<tr><td>{{ audit.audit if loop.first }}</td>
  <td class="text">{% if loop.first %}<strong class="{{ {"holds": "better",
    "broken": "worse"}.get(audit.verdict, "") }}">{{ audit.verdict }}</strong>{% endif %}</td>
  <td class="text">{{ name }}</td><td>{{ value }}</td><td>{{ allowed }}</td>
  <td class="text">{{ method }}</td></tr>
{% endfor %}
{% endfor %}
</table></div>
{% for audit, _ in audits %}
<h3>{{ audit.audit }}: {{ audit.verdict }}</h3>
<p>{{ audit.question }} {{ audit.reason[:1] | upper }}{{ audit.reason[1:].rstrip(".") }}.</p>
<p class="note">{% if audit.adversary %}Adversary: {{ audit.adversary }}. {% endif -%}
Claim: {{ audit.claim.rstrip(".") }}.
{% if audit.validity %}Validity: {{ audit.validity.rstrip(".") }}.{% endif %}</p>
{% for figure in audit_figures[audit.audit] %}
{{ plot(figure) }}
{% endfor %}
{% endfor %}
{% endif %}

{% if rejections %}
<h2>Replies that were set aside</h2>
<p class="note">They did not touch the model; the round went on with the others.</p>
<div class="scroll"><table>
<tr><th>round</th><th>client</th><th>code</th><th class="text">reason</th></tr>
{% for round, rejection in rejections %}
<tr><td>{{ round }}</td><td>{{ rejection.client }}</td><td>{{ rejection.code }}</td>
  <td class="text">{{ rejection.reason }}</td></tr>
{% endfor %}
</table></div>
{% endif %}

{% if run.samples %}
<h2>Generated answers</h2>
<p class="note">Greedy answers of the federated model to test rows, beside the reference.</p>
<div class="scroll"><table>
<tr><th>client</th><th class="text">prompt</th><th class="text">answer</th>
  <th class="text">reference</th></tr>
{% for sample in run.samples %}
<tr><td class="text">{{ sample.client }}</td>
  {% for part in [sample.prompt, sample.answer, sample.reference] %}
  <td class="text"><div>{{ part }}</div></td>
  {% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}

{% if aggregation %}
{% set columns = ["error", "relative_error", "cosine", "effective_rank", "stable_rank",
  "accumulated_effective_rank", "change", "drift", "update_cosine", "moved_A", "moved_B"] %}
<details><summary>Aggregation, round by round</summary>
<p class="note">Against the mean of the clients' products of B and A, over all modules. Effective
rank: exp of the entropy of the squared singular values; stable rank: their sum over the largest;
both of that mean, accumulated: of the whole change of the model. Change: the length of the
clients' mean change; drift: their distance from the mean, over it; update cosine: between two
clients' changes; moved: how far a client moves each factor.</p>
<div class="scroll"><table>
<tr><th>round</th>{% for c in columns %}<th>{{ c | words }}</th>{% endfor %}</tr>
{% for round, figures in aggregation %}
<tr><td>{{ round }}</td>{% for c in columns %}
  <td>{{ "%.3g" % figures[c] if c in figures else "-" }}</td>{% endfor %}</tr>
{% endfor %}
</table></div></details>
{% endif %}

<details><summary>The recipe, every key</summary><pre>{{ recipe }}</pre></details>
<footer>
{% if sha256 %}<p>SHA-256 of adapter_model.safetensors: <code>{{ sha256 }}</code></p>{% endif %}
{% include "foot" %}
</footer>
</main>
<script>{{ script | safe }}</script>
</body></html>
"""
