"""The look and the script of every page, kept as Python: a Flower app carries no .css or .js files.

The script draws each `.plot` from the JSON behind it, in the colours that the reader's system
prefers and in black on white for paper, and lets every `table.sortable` be sorted by its headers.
Without it the tables are whole and the plots are missing.
"""

STYLE = """
  :root { color-scheme: light dark; --ink: #1d2329; --soft: #5b6670; --line: #dfe4e8;
    --mark: #eef5fb; --paper: #fff; --link: #005a8d; --good: #00664a; --bad: #a34700; }
  @media (prefers-color-scheme: dark) {
    :root { --ink: #e8ebee; --soft: #a2adb7; --line: #39424a; --mark: #1e2d3a; --paper: #15191d;
      --link: #7fc4f0; --good: #4fd1a5; --bad: #ff9a5c; }
  }
  * { box-sizing: border-box; }
  body { margin: 0; background: var(--paper); color: var(--ink);
    font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
  main { max-width: 1020px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
  main.wide { max-width: 1220px; }
  h1 { font-size: 1.7rem; margin: 0 0 .25rem; line-height: 1.25; overflow-wrap: anywhere; }
  h2 { font-size: 1.15rem; margin: 2.4rem 0 .25rem; overflow-wrap: anywhere; }
  main.wide h2 { font-size: 1.4rem; margin-top: 3.2rem; padding-top: 1rem;
    border-top: 2px solid var(--line); }
  h3 { font-size: 1.15rem; margin: 2.2rem 0 .25rem; }
  h4, caption { font-size: 1rem; font-weight: 650; margin: 1.6rem 0 .1rem; text-align: left; }
  a { color: var(--link); }
  .note { color: var(--soft); margin: 0 0 .6rem; font-size: .92rem; }
  .verdict { font-size: 1.08rem; border-left: 4px solid #0072B2; padding: .2rem 0 .2rem .9rem;
    margin: 1.2rem 0 1.6rem; overflow-wrap: anywhere; }
  .verdict p { margin: 0 0 .5rem; }
  .said { margin: .2rem 0 .8rem; padding-left: 1.2rem; }
  .said li { margin: .25rem 0; overflow-wrap: anywhere; }
  .scroll { overflow-x: auto; }
  .scroll:focus-visible, button:focus-visible, summary:focus-visible {
    outline: 2px solid var(--link); outline-offset: 1px; }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
  th, td { padding: .34rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
    white-space: nowrap; }
  main.wide th, main.wide td { padding: .34rem .5rem; font-size: .92rem; }
  th { color: var(--soft); font-weight: 600; font-size: .9rem; vertical-align: bottom; }
  th:first-child, td:first-child { text-align: left; }
  th.text, td.text { text-align: left; white-space: normal; vertical-align: top;
    overflow-wrap: anywhere; min-width: 9em; }
  td.text div { max-height: 9em; overflow-y: auto; white-space: pre-wrap; min-width: 12em; }
  tbody th[scope=row] { color: var(--ink); font-weight: 500; white-space: normal;
    vertical-align: middle; overflow-wrap: anywhere; min-width: 8.5em; max-width: 20em; }
  .scroll th[scope=row] { position: sticky; left: 0; background: var(--paper); }
  tr.baseline th[scope=row] { background: var(--mark); font-weight: 600; }
  tbody th[scope=rowgroup] { padding-top: .8rem; font-size: .8rem; letter-spacing: .04em;
    text-transform: uppercase; }
  table.tops td { vertical-align: top; }
  td small, th small { color: var(--soft); font-weight: 400; }
  td small { white-space: nowrap; }
  tr.references td, tr.references th[scope=row] { color: var(--soft); }
  tr.federated, tr.baseline { background: var(--mark); font-weight: 600; }
  .better { color: var(--good); font-weight: 650; }
  .worse { color: var(--bad); font-weight: 650; }
  main.wide td.text { vertical-align: middle; min-width: 7.5em; }
  main.wide td.text:last-child { min-width: 15em; }
  th button { all: unset; cursor: pointer; color: inherit; }
  th button::after { content: " \\2195"; opacity: .45; }
  th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
  th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
  .facts { display: flex; flex-wrap: wrap; gap: .4rem 2rem; margin: 0; padding: 0; }
  .facts div { min-width: 6rem; }
  .facts dt { color: var(--soft); font-size: .85rem; }
  .facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
  .figures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 1.5rem; }
  figure { margin: 0; grid-column: span 2; min-width: 0; }
  figure.half { grid-column: span 1; }
  @media screen and (max-width: 800px) { figure.half { grid-column: span 2; } }
  .plot { overflow: hidden; }
  .plot:empty::before { content: "This plot needs JavaScript; the tables do not."; }
  nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; list-style: none; padding: 0; }
  details { margin-top: 1rem; }
  main > details { margin-top: 2rem; }
  summary { cursor: pointer; }
  pre { overflow-x: auto; background: var(--mark); padding: 1rem; font-size: .85rem; }
  code { font-size: .85rem; overflow-wrap: anywhere; }
  footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
  @media print {
    :root { --ink: #000; --soft: #444; --line: #bbb; --mark: #eee; --paper: #fff; --link: #000;
      --good: #000; --bad: #000; }
    main, main.wide { max-width: none; padding: 0; }
    main.wide th, main.wide td { font-size: .68rem; padding: .2rem .25rem; white-space: normal; }
    h2, h3, h4 { break-after: avoid; }
    figure, .plot, tr { break-inside: avoid; }
    nav, th button::after { display: none; content: none; }
    .scroll { overflow: visible; }
  }
"""

SCRIPT = """
"use strict";
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const places = [...document.querySelectorAll(".plot")];
const PAPER_WIDTH = 680;

function themed(layout, isDark) {
  const [ink, line, paper] = isDark
    ? ["#e8ebee", "#39424a", "#15191d"] : ["#1d2329", "#dfe4e8", "#ffffff"];
  const change = {"font.color": ink, "hoverlabel.bgcolor": paper, "hoverlabel.bordercolor": line,
    "hoverlabel.font.color": ink};
  for (const axis of Object.keys(layout).filter(key => /^[xy]axis/.test(key)))
    for (const part of ["gridcolor", "linecolor", "zerolinecolor"])
      change[`${axis}.${part}`] = line;
  return change;
}
function draw(place) {
  const figure = JSON.parse(document.getElementById(place.id + "-data").textContent);
  place.style.minHeight = figure.layout.height + "px";
  for (const [path, value] of Object.entries(themed(figure.layout, dark.matches))) {
    const [outer, inner, last] = path.split(".");
    const part = figure.layout[outer] ??= {};
    if (last) (part[inner] ??= {})[last] = value;
    else part[inner] = value;
  }
  Plotly.newPlot(place, figure.data, figure.layout, {
    responsive: true, displaylogo: false,
    modeBarButtons: [["toImage", "autoScale2d", "resetScale2d"]],
    toImageButtonOptions: {format: "svg", filename: place.id},
  });
}
// One plot at a time, so that the page answers while it draws.
function drawFrom(number) {
  if (number >= places.length) return;
  draw(places[number]);
  setTimeout(drawFrom, 0, number + 1);
}
function repaint(isDark, sizeOf) {
  for (const place of places.filter(p => p.layout))
    Plotly.relayout(place, {...themed(place.layout, isDark), ...sizeOf(place)});
}
function onPaper(place) {
  const share = place.parentElement.classList.contains("half") ? 0.48 : 1;
  return {autosize: false, width: PAPER_WIDTH * share};
}
dark.addEventListener("change", () => repaint(dark.matches, () => ({})));
window.addEventListener("beforeprint", () => {
  places.filter(place => !place.layout).forEach(draw);
  repaint(false, onPaper);
});
window.addEventListener("afterprint", () => {
  repaint(dark.matches, () => ({autosize: true, width: null}));
});

function keyOf(cell) {
  if (!cell.hasAttribute("data-value")) return cell.textContent.trim().toLowerCase();
  const value = cell.getAttribute("data-value");
  return value === "" ? null : Number(value);
}
function compare(a, b) {
  return typeof a === "number" && typeof b === "number" ? a - b : a < b ? -1 : a > b ? 1 : 0;
}
function sort(table, head) {
  const now = head.getAttribute("aria-sort");
  const up = now ? now === "descending" : head.dataset.first !== "descending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  for (const body of table.tBodies) {
    const rows = [...body.rows].filter(row => !row.classList.contains("group"));
    const keyed = rows.map(row => [keyOf(row.cells[head.cellIndex]), row]);
    keyed.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);  // what is missing: last
      return up ? compare(a, b) : compare(b, a);
    });
    body.append(...keyed.map(([, row]) => row));
  }
}
for (const table of document.querySelectorAll("table.sortable"))
  for (const head of table.tHead.rows[0].cells) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.addEventListener("click", () => sort(table, head));
    head.append(button);
  }
drawFrom(0);
"""
