"""The two pages of `train/report.py`, as jinja2 templates. Kept in a module, so that they are always installed."""

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1080px;
       margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; margin: 0; }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .6rem; }
.quiet { color: #777; }
img { width: 100%; height: auto; }
.numbers { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1.5rem 0; }
.numbers div { background: #f5f7fa; border-radius: 8px; padding: .55rem .9rem; }
.numbers b { display: block; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
.numbers span { color: #666; font-size: .82rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ececec; text-align: right;
         font-variant-numeric: tabular-nums; }
th { color: #666; font-weight: 600; }
th:first-child, td:first-child, .text { text-align: left; }
pre { background: #f5f7fa; border-radius: 8px; padding: 1rem; overflow-x: auto; font-size: .82rem; }
summary { cursor: pointer; font-weight: 600; margin: 1.5rem 0 .5rem; }
</style>
</head>
<body>
"""

REPORT_PAGE = (
    _HEAD.replace("TITLE", "{{ name }} - Entrocraft")
    + """<h1>{{ name }}</h1>
<p class="quiet">Entropy held to a schedule by choosing which rollouts the policy learns from.</p>
<div class="numbers" id="summary">
{% for label, value in summary.items() %}
<div><b>{{ value | shown }}</b><span>{{ label }}</span></div>
{% endfor %}
</div>
<img alt="Curves of the run" src="{{ picture }}">
<p class="quiet">Entropy is drawn as measured at each step. Elsewhere a faint line is the value at each step and the
bold one its moving average over a twentieth of the steps; points are evaluations.</p>

{% if evaluations %}
<h2>Evaluations on held-out prompts</h2>
{% if evaluation_picture %}
<img alt="Evaluations over training prompts" src="{{ evaluation_picture }}">
<p class="quiet">Shaded: 95 % intervals over resampled problems.</p>
{% endif %}
<div class="wide"><table id="evaluations">
<tr><th>step</th>{% for name in evaluations.names %}<th>{{ name | spoken }}</th>{% endfor %}</tr>
{% for row in evaluations.rows %}
<tr>{% for value in row %}<td>{{ value | shown }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}

{% if decisions %}
<h2>The last decisions, and why</h2>
<div class="wide"><table id="decisions">
<tr><th>step</th><th>entropy</th><th>target</th><th>kept</th><th class="text">reason</th></tr>
{% for row in decisions %}
<tr><td>{{ row.step }}</td><td>{{ row.get("entropy") | shown }}</td><td>{{ row.get("target") | shown }}</td>
<td>{{ row.get("kept_fraction") | shown }}</td><td class="text">{{ row.reason }}</td></tr>
{% endfor %}
</table></div>
{% endif %}

<h2>Events</h2>
{% if event_counts %}
<p id="event-counts">{% for kind, count in event_counts %}{{ kind }}: {{ count }}{{ "; " if not loop.last }}{% endfor %}
</p>
<div class="wide"><table id="events">
<tr><th>kind</th><th class="text">what</th></tr>
{% for event in events %}
<tr><td>{{ event.kind }}</td><td class="text">{% for key, value in event.items() if key != "kind" %}
{{ key }} = {{ value }}{{ ", " if not loop.last }}{% endfor %}</td></tr>
{% endfor %}
</table></div>
{% else %}
<p class="quiet">None: no step was skipped, no prompt dropped, no reward timed out.</p>
{% endif %}

{% if samples %}
<details>
<summary>Samples of rollouts</summary>
<div class="wide"><table id="samples">
<tr><th>step</th><th class="text">of</th><th>reward</th><th>tokens</th><th class="text">prompt, gold answer,
response</th></tr>
{% for row in samples %}
<tr><td>{{ row.step }}</td><td class="text">{{ row.kind }}{% if row.get("set") %} ({{ row.get("set") }}){% endif %}</td>
<td>{{ row.reward | shown }}</td><td>{{ row.tokens | shown }}{% if row.get("truncated") %}, cut off{% endif %}</td>
<td class="text"><pre>{{ row.prompt }}</pre><pre>{{ row.answer }}</pre><pre>{{ row.response }}</pre></td></tr>
{% endfor %}
</table></div>
</details>
{% endif %}

<details open>
<summary>Every metric</summary>
<div class="wide"><table id="metrics">
<tr><th>metric</th><th>first</th><th>last</th><th>mean of the last tenth</th><th>lowest</th><th>highest</th></tr>
{% for row in metrics %}
<tr>{% for value in row %}<td>{{ value | shown }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
</details>

<details>
<summary>Configuration</summary>
{% if config is none %}
<p class="quiet">The folder of the run holds no config.yaml.</p>
{% else %}
<pre id="config">{{ config }}</pre>
{% endif %}
</details>
</body>
</html>
"""
)

COMPARE_PAGE = (
    _HEAD.replace("TITLE", "Comparison - Entrocraft")
    + """<h1>{{ arms | length }} runs</h1>
<p class="quiet">{{ arms | join(" · ") }}</p>
<img alt="Curves of the runs" src="{{ picture }}">
<p class="quiet">Entropy is drawn as measured at each step. Elsewhere a faint line is the value at each step and the
bold one its moving average over a twentieth of the steps; points are evaluations. "At the end" is the mean over the
last tenth of the steps; the tracking error is the mean of |entropy - target| after the first third.</p>
<h2>In numbers</h2>
<div class="wide"><table id="comparison">
<tr><th></th>{% for arm in arms %}<th>{{ arm }}</th>{% endfor %}</tr>
{% for label in labels %}
<tr><td>{{ label }}</td>{% for arm in arms %}<td>{{ summaries[arm].get(label) | shown }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
</body>
</html>
"""
)
