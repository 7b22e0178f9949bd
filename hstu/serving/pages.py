"""Two pages that need no network: one to try the server, one that says what can be asked."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from hstu.serving.model import ServedModel

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2430;--dim:#5b6472;--page:#fff;--box:#f4f6f9;--rule:#d5dae2;--link:#1d4ed8;
--bad:#b42318}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ef;--dim:#a3acba;--page:#12161d;--box:#1c222c;--rule:#3a4452;
--link:#8ab0ff;--bad:#ff9b8f}}
*{box-sizing:border-box}body{margin:0 auto;max-width:960px;padding:1rem;font:16px/1.5 system-ui,sans-serif;
color:var(--ink);background:var(--page)}h1{font-size:1.4rem;margin:.2rem 0}h2{font-size:1.1rem;margin:1.5rem 0 .3rem}
a{color:var(--link)}:focus-visible{outline:3px solid var(--link);outline-offset:2px}.dim{color:var(--dim)}
form{display:grid;gap:.7rem;padding:1rem;background:var(--box);border-radius:.5rem;margin:1rem 0}
label{display:grid;gap:.2rem;font-size:.9rem}.row{display:grid;gap:.7rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,170px),1fr))}
input,textarea,select,button{font:inherit;color:inherit;background:var(--page);border:1px solid var(--rule);
border-radius:.35rem;padding:.4rem .6rem;width:100%}textarea{font-family:ui-monospace,monospace;font-size:.85rem}
button{background:var(--link);color:var(--page);border:0;cursor:pointer;width:auto;justify-self:start;
padding:.5rem 1.2rem}
table{border-collapse:collapse;width:100%;font-size:.9rem}th,td{padding:.3rem .6rem;border-bottom:1px solid var(--rule);
text-align:left;vertical-align:top;overflow-wrap:anywhere}td.num{text-align:right;font-variant-numeric:tabular-nums}
pre{background:var(--box);padding:.7rem;border-radius:.4rem;overflow-x:auto}.bad{color:var(--bad)}
"""

_TRY = """
const at = id => document.getElementById(id), form = at('ask');
function said(text, bad) { at('status').textContent = text; at('status').className = bad ? 'bad' : 'dim'; }
function lines(text) {
  const trimmed = text.trim();
  if (trimmed.startsWith('[')) return JSON.parse(trimmed);
  return trimmed.split('\\n').map(line => line.trim()).filter(Boolean)
    .map(line => line.startsWith('{') ? JSON.parse(line) : line);
}
function question() {
  const body = {}, history = at('history').value, items = at('candidates').value;
  if (history.trim()) body.history = lines(history); else body.user = at('user').value;
  if (items.trim()) body.candidates = lines(items);
  if (at('time').value) body.request_time = at('time').value;
  if (task === 'retrieval') {
    body.k = Number(at('k').value);
    if (at('seen').value) body.filter_seen = at('seen').value === 'true';
  }
  return body;
}
function show(rows) {
  const names = [...new Set(rows.flatMap(Object.keys))], table = at('answer');
  table.replaceChildren();
  if (!rows.length) return;
  const head = table.createTHead().insertRow(), body = table.createTBody();
  for (const name of ['', ...names]) {
    const cell = document.createElement('th'); cell.scope = 'col'; cell.textContent = name; head.append(cell);
  }
  rows.forEach((row, number) => {
    const line = body.insertRow();
    line.insertCell().textContent = number + 1;
    for (const name of names) {
      const cell = line.insertCell(), value = row[name], isNumber = typeof value === 'number' && name !== 'item';
      cell.textContent = isNumber ? value.toPrecision(5) : value ?? '';
      if (isNumber) cell.className = 'num';
    }
  });
}
form.addEventListener('submit', async event => {
  event.preventDefault();
  const began = performance.now();
  said('asked ...');
  try {
    const body = JSON.stringify(question()), headers = {'Content-Type': 'application/json'};
    if (at('token').value) headers.Authorization = 'Bearer ' + at('token').value;
    const route = task === 'retrieval' ? 'recommend' : 'score';
    at('curl').textContent = `curl ${location.origin}/${route} -H 'Content-Type: application/json' -d '` +
      body.replaceAll("'", "'\\\\''") + `'`;
    const answer = await fetch(route, {method: 'POST', headers, body}), told = await answer.json();
    const rows = told.items ?? told.scores ?? [];
    show(rows);
    if (!answer.ok) said(told.error, true);
    else said(`${rows.length} items in ${(performance.now() - began).toFixed(0)} ms, checkpoint of step ${told.step}`);
  } catch (error) { show([]); said(String(error.message ?? error), true); }
});
"""


def try_page(model: ServedModel) -> str:
    """Return a page with a form that asks for recommendations, or scores, and shows them."""
    task, users, items = model.opened.config.task, model.questions.users, model.questions.items
    user = str(users.originals[0]) if len(users.originals) else ""
    some = [str(item) for item in items.originals[:3]]
    retrieval = task == "retrieval"
    more = """<label>items<input id=k type=number min=1 value=10></label>
<label>items seen before<select id=seen><option value="">as evaluated<option value=true>left out
<option value=false>may come again</select></label>""" if retrieval else ""  # fmt: skip
    asked = "" if retrieval else escape("\n".join(some))
    wanted = "for the answer, all if empty" if retrieval else "to score"
    columns = ", ".join(json.dumps(name) for name in _columns(model))
    body = f"""<h1>{escape(model.opened.run.path.name)}</h1>
<p class=dim>A {task} run, step {model.step}: {len(users.originals):,} users, {len(items.originals):,} items.
<a href="docs">What can be asked</a>, <a href="metrics">metrics</a>.</p>
<form id=ask><div class=row><label>user of the data set<input id=user value="{escape(user)}" autocomplete=off></label>
{more}<label>time of the request<input id=time placeholder="that of the last event"></label>
<label>token<input id=token type=password autocomplete=off placeholder="if the server has one"></label></div>
<label>or a history: an item a line, or JSON with {escape(columns)}<textarea id=history rows=4
placeholder="{escape(chr(10).join(some))}"></textarea></label>
<label>candidates {wanted}: an item a line<textarea id=candidates rows=2>{asked}
</textarea></label><button>Ask</button></form>
<p id=status class=dim role=status>Nothing asked yet.</p><table id=answer></table>
<h2>The same from a command line</h2><pre id=curl tabindex=0>Ask first.</pre>
<script>const task = {json.dumps(task)};{_TRY}</script>"""
    return _page(model.opened.run.path.name, body)


def _columns(model: ServedModel) -> list[str]:
    columns, schema = model.questions.columns, model.opened.dataset.schema
    names = [columns.item, *([columns.time] if schema.time is not None else [])]
    return [*names, *([columns.action] if columns.use_actions else []), *columns.contexts, *columns.features]


def docs_page(api: dict[str, Any]) -> str:
    """Return a page about all routes of an OpenAPI description."""
    schemas, parts = api["components"]["schemas"], []
    for path, methods in api["paths"].items():
        for method, told in methods.items():
            content = told.get("requestBody", {}).get("content", {}).get("application/json", {})
            answer = told["responses"].get("200", {}).get("content", {}).get("application/json", {})
            parts.append(
                f"<h2>{method.upper()} {escape(path)}</h2><p>{escape(told.get('description', ''))}</p>"
                + _fields("body", content.get("schema", {}), schemas)
                + _fields("answer", answer.get("schema", {}), schemas)
            )
    about = "An error is {&quot;error&quot;: one line}: "
    errors = "; ".join(f"{code} {escape(text)}" for code, text in _errors(api).items())
    head = f"<h1>{escape(api['info']['title'])} {escape(api['info']['version'])}</h1><p>{about}{errors}.</p>"
    links = '<p><a href="./">Try it</a>, <a href="openapi.json">OpenAPI description</a></p>'
    return _page("What can be asked", head + links + "".join(parts))


def _errors(api: dict[str, Any]) -> dict[str, str]:
    responses = api["paths"]["/recommend"]["post"]["responses"]
    return {code: told["description"] for code, told in responses.items() if code not in ("200", "422")}


def _fields(title: str, schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    """Return a table of the fields of a body."""
    name = schema.get("$ref", "").rsplit("/", 1)[-1]
    if name not in schemas:
        return ""
    rows = "".join(
        f"<tr><th scope=row>{escape(field)}</th><td>{escape(_type(told))}</td>"
        f"<td>{escape(_default(field, told, name, schemas))}</td><td>{escape(told.get('description', ''))}</td></tr>"
        for field, told in schemas[name].get("properties", {}).items()
    )
    head = "".join(f"<th scope=col>{column}</th>" for column in (title, "type", "default", "meaning"))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _type(told: dict[str, Any]) -> str:
    if "anyOf" in told:
        return " or ".join(dict.fromkeys(_type(each) for each in told["anyOf"] if each.get("type") != "null"))
    if "enum" in told:
        return " or ".join(json.dumps(value) for value in told["enum"])
    kind = str(told.get("type", "value"))
    return f"list of {_type(told['items'])}" if kind == "array" and told.get("items") else kind


def _default(field: str, told: dict[str, Any], name: str, schemas: dict[str, Any]) -> str:
    if "default" in told:
        return "" if told["default"] is None else json.dumps(told["default"])
    return "required" if field in schemas[name].get("required", []) else ""


def _page(title: str, body: str) -> str:
    return (
        '<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f'<link rel=icon href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style></head>'
        f"<body>{body}</body></html>"
    )
