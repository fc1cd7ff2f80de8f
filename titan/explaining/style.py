"""How the page looks, and what its script does: light and dark, phone, desk and paper. It needs nothing from anywhere."""

from __future__ import annotations

from titan.drawing.svg import STYLE

CSS = """
:root { --ink: #24292f; --soft: #57606a; --paper: #fff; --card: #f6f8fa; --edge: #d0d7de; --accent: #0969da;
  color-scheme: light dark }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9198a1; --paper: #0d1117; --card: #161b22; --edge: #30363d; --accent: #58a6ff }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 62rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere }
h1 { font-size: 1.5rem; line-height: 1.2; margin: .5rem 0 } h2 { font-size: 1.25rem; margin: 2.5rem 0 .25rem }
h3 { font-size: 1rem; margin: 1rem 0 .25rem } p { margin: .5rem 0 }
nav a { margin-right: .9rem; display: inline-block; padding: .3rem 0 } a { color: var(--accent) }
.lesson { border-left: 3px solid var(--accent); padding-left: .75rem; max-width: 46rem }
.note, .below, .formula, .letters { font-size: .875rem; color: var(--soft) } .big { font-size: 1.1rem; font-weight: 600 }
.formula { font-variant-numeric: tabular-nums } .letters { font-style: italic }
.found b { border-bottom: 2px dotted var(--soft) }
ul { padding-left: 1.1rem; margin: .4rem 0 } .numbers li { margin: .15rem 0 } .every { list-style: none; padding: 0 }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 6px; padding: .25rem .9rem .5rem;
  margin: .7rem 0 }
.card h3 { margin-top: .5rem } .cards { display: grid;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: .7rem }
.cards .card { margin: 0 }
.row { margin: .55rem 0 } .what { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 .8rem }
.track { background: var(--card); border: 1px solid var(--edge); border-radius: 3px; overflow: hidden;
  min-height: .8rem }
.bar { height: .8rem; min-width: 2px }
.strip { display: flex; border-radius: 4px; overflow: hidden } .strip .bar { height: 1.6rem }
.ranks { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 4rem)); gap: 3px }
.ranks button { min-width: 0; min-height: 2.1rem; padding: 0; border: 0; border-radius: 4px; font: inherit;
  font-size: .85rem; cursor: pointer }
.ranks button.near { outline: 3px solid var(--ink); outline-offset: -3px }
.ranks button[aria-pressed=true] { outline: 5px double var(--ink); outline-offset: -4px; font-weight: 800;
  transform: scale(1.08) }
button:focus-visible, summary:focus-visible, a:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px }
.band { margin: .8rem 0 .25rem } .verdict { font-size: 1.1rem } summary { cursor: pointer; padding: .4rem 0 }
.picture { margin: .5rem 0; overflow-x: auto } .picture svg { width: 100%; max-width: 45rem; height: auto }
@media screen { .picture svg { min-width: 34rem } }
@media screen and (max-width: 36rem) { .picture::after { content: "wider than the screen: move it sideways"; display: block;
  position: sticky; left: 0; width: fit-content; font-size: .875rem; color: var(--soft) } }
@media (max-width: 34rem) { .ranks { gap: 2px } .ranks button { font-size: .72rem } }
@media print {
  body { max-width: none; font-size: 11pt } nav { display: none } .row, .card, .ranks, figure { break-inside: avoid }
  h2, h3 { break-after: avoid } .bar, .ranks button { print-color-adjust: exact; -webkit-print-color-adjust: exact }
}
"""

SCRIPT = """
const ranks = [...document.querySelectorAll("[data-rank]")], panel = document.getElementById("rank");
const place = button => button.dataset.at.split(",");
function show(chosen) {
  for (const other of ranks) {
    const apart = place(other).filter((at, axis) => at !== place(chosen)[axis]).length;
    other.classList.toggle("near", apart === 1);
    other.setAttribute("aria-pressed", other === chosen);
  }
  panel.innerHTML = document.getElementById("rank-" + chosen.dataset.rank).innerHTML;
  panel.hidden = false;
}
for (const button of ranks) {
  button.setAttribute("aria-pressed", false);
  button.addEventListener("click", () => show(button));
}
if (ranks.length) show(ranks[0]);
"""


def styles() -> str:
    """The page's, and the pictures'."""
    return CSS + STYLE
