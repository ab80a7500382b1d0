"""The Jinja2 template of the report: one page that needs no script and no other file."""

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root {
  color-scheme: light dark;
  --back: #fbfbfa; --card: #ffffff; --ink: #1d2329; --soft: #5d6873; --line: #dfe3e7; --accent: #0072b2;
}
@media (prefers-color-scheme: dark) {
  :root { --back: #14181c; --card: #1c2228; --ink: #e4e8ec; --soft: #9aa6b2; --line: #323b44; --accent: #6cb9ea; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .7rem; padding-top: 1rem; border-top: 2px solid var(--accent);
  overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
p, li { max-width: 46rem; }
.soft { color: var(--soft); font-size: .875rem; }
.warning { border-left: 4px solid #d55e00; padding: .3rem .8rem; background: var(--card); }
.scroll, .plots img, pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.scroll, pre { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: right; vertical-align: baseline; }
th.text, td.text { text-align: left; }
td { white-space: nowrap; }
.steps td.text { white-space: normal; overflow-wrap: anywhere; min-width: 12rem; }
thead th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line); vertical-align: bottom; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tbody th { font-weight: 600; overflow-wrap: anywhere; position: sticky; left: 0; background: var(--card); }
.runs tbody th { min-width: 6rem; }
.tasks tbody th { min-width: 10rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: .8rem; }
.plots img, .scroll img { display: block; background: #ffffff; padding: .4rem; }
.plots img { width: 100%; }
.scroll img { zoom: .75; }
.scroll:has(img) { width: fit-content; max-width: 100%; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--accent); }
pre { padding: .8rem; font-size: .8rem; line-height: 1.4; }
</style>
</head>
<body>
<main>
{% macro table(kind, cells, n_text_columns) %}
<div class="scroll"><table class="{{ kind }}">
<thead><tr>
{% for cell in cells[0] %}
<th scope="col"{% if loop.index <= n_text_columns %} class="text"{% endif %}>{{ cell }}</th>
{% endfor %}
</tr></thead>
<tbody>
{% for row in cells[1:] %}
<tr>
<th scope="row" class="text">{{ row[0] }}</th>
{% for cell in row[1:] %}
<td{% if loop.index < n_text_columns %} class="text"{% endif %}>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
{% endmacro %}
<h1>{{ title }}</h1>
<p class="soft">Continual instruction tuning, measured by kpig_fast {{ version }}.</p>

<h2>Comparison</h2>
{% if different_tasks %}
<p class="warning">The runs were not evaluated on the same tasks after their last steps, so their means are over
different tasks.</p>
{% endif %}
{{ table("runs", comparison, 1) }}
<ul class="soft">
<li>P: performance by each task's metric, 0–100, higher is better. V: share of answers that violate the task's
constraints, in percent, lower is better. Means over tasks, after the last step; seen tasks are those learnt so far, and
the untrained model is measured over the same tasks.</li>
<li>Gain: information gain of the key parts of the instruction. 0: masking them does not
change how probable the answer is.</li>
<li>Forgetting: best earlier P minus final P, mean over the tasks learnt before the last step. Backward transfer:
final P minus P right after learning. Both in points.</li>
<li>Seconds: planning and training, without evaluation.</li>
</ul>

<div class="plots">
{% for plot in curves %}
<img src="{{ plot | data_uri }}" alt="{{ plot.title }}, by number of tasks learnt">
{% endfor %}
</div>

{% for run in runs %}
<h2>Run {{ run.name }}</h2>
<p>Strategy {{ run.strategy }}, {{ run.n_steps }} steps.</p>
<div class="scroll"><img src="{{ run.heat_map | data_uri }}" alt="{{ run.heat_map.title }}"></div>

<h3>Tasks after the last step</h3>
{{ table("tasks", run.tasks, 2) }}
{% if run.not_scored %}
<p class="soft">Not scored, because the metric needs a judge, and not part of P: {{ run.not_scored | join(", ") }}</p>
{% endif %}

{% if run.steps %}
<h3>Steps and what they replayed</h3>
{{ table("steps", run.steps, 3) }}
{% endif %}
{% if run.config %}
<details><summary>Config of {{ run.name }}</summary><pre>{{ run.config }}</pre></details>
{% endif %}
{% if run.environment %}
<details><summary>Environment of {{ run.name }}</summary><pre>{{ run.environment }}</pre></details>
{% endif %}
{% endfor %}
</main>
</body>
</html>
"""
