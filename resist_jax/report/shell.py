"""What all pages share: one file with its style and its script, no network."""

import base64
from html import escape

from matplotlib.figure import Figure

from resist_jax.report import plots

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 76rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .6rem 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, figcaption, li { max-width: 48rem; } p { margin: .6rem 0; }
.lead { border-left: 4px solid #0072b2;
  padding: .1rem 0 .1rem .9rem; margin: .8rem 0 1.2rem; }
.lead p { margin: .35rem 0; font-size: 1rem; }
.lead p:first-child { font-size: 1.25rem; line-height: 1.4; }
.quiet { color: #555; font-size: .9rem; }
a { color: #005a8c; } nav ul { columns: 17rem; padding-left: 1.2rem; }
nav li { break-inside: avoid; }
code { font-size: .85em; background: #f3f3f3; padding: .1em .3em; }
figure { margin: 1rem 0; } figcaption { color: #444; font-size: .9rem; }
summary { cursor: pointer; color: #005a8c; margin: .6rem 0; }

.plots { display: grid; gap: 1.2rem 2rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
.chart { width: 100%; max-width: 30rem; height: auto; display: block;
  font: 12px system-ui, sans-serif; fill: #333; touch-action: pan-y; }
.chart .title { font-size: 13.5px; font-weight: 600; fill: #222; }
.chart .grid { stroke: #e6e6e6; } .chart .frame { stroke: #555; fill: none; }
.chart .bar { stroke-width: 5; opacity: .3; } .chart .band { opacity: .16; }
.chart .small { opacity: 0; } .chart .on { stroke: #000; stroke-width: 1.6;
  opacity: 1; }
.chart g.off { display: none; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: .3rem 0; }
.legend button { font: inherit; font-size: .9rem; color: inherit; padding: .1rem
  0; border: 0; background: none; text-align: left; }
.script .legend button { cursor: pointer; }
.legend button[aria-pressed=false] { opacity: .4; text-decoration:
  line-through; }
.legend svg { vertical-align: middle; margin-right: .4rem; }
#tip { position: fixed; z-index: 9; max-width: 17rem; padding: .3rem .6rem;
  background: #222; color: #fff; font-size: .85rem; border-radius: 4px;
  pointer-events: none; }

/* A shadow at an edge shows that there is more behind it. */
.wide, .picture { overflow-x: auto; background:
  linear-gradient(90deg, #fff 40%, #fff0) local,
  linear-gradient(270deg, #fff 40%, #fff0) 100% 0 local,
  radial-gradient(farthest-side at 0 50%, #0005, #0000),
  radial-gradient(farthest-side at 100% 50%, #0005, #0000) 100% 0;
  background-repeat: no-repeat; background-size: 3rem 100%, 3rem 100%,
  .9rem 100%, .9rem 100%; }
.picture img { display: block; max-width: 100%; height: auto;
  mix-blend-mode: multiply; }
table { border-collapse: collapse; font-size: .9rem; margin: .4rem 0;
  overflow-wrap: normal; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.1rem .3rem 0;
  border-bottom: 1px solid #ddd; max-width: 24rem; }
thead th { border-bottom: 2px solid #999; font-weight: 600; }
figure .wide td { white-space: nowrap; }
figure .wide td:nth-child(2) { white-space: normal; }  /* Names. */
tbody th { font-weight: normal; color: #555; }
.pairs { columns: 22rem; column-gap: 2.5rem; margin: .4rem 0; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
.pairs div { display: flex; gap: 1rem; justify-content: space-between;
  break-inside: avoid; padding: .3rem 0; border-bottom: 1px solid #ddd; }
.pairs dt { color: #555; flex: none; max-width: 65%; }
.pairs dd { margin: 0; text-align: right; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .4em; }

.claims { list-style: none; padding: 0; margin: .6rem 0 1rem; }
.claims li { padding: .3rem 0 .3rem .8rem; margin: .5rem 0;
  border-left: 4px solid #bbb; }
.claims b { display: inline-block; padding: 0 .45rem; border-radius: 3px;
  background: #e8e8e8; font-weight: 600; margin-right: .4rem; }
.claims .holds { border-color: #0072b2; } .claims .holds b {
  background: #0072b2; color: #fff; }
.claims .part { border-color: #0072b2; } .claims .part b {
  background: #d5e8f5; color: #003b5c; }
.claims .fails { border-color: #a33a00; } .claims .fails b {
  background: #a33a00; color: #fff; }
.claims .untested b { background: #fff; outline: 1px solid #999; }

@media (max-width: 40rem) {
  .plots { grid-template-columns: 100%; }
  .lead p:first-child { font-size: 1.12rem; }
  .picture.far img { max-width: none; }
  .picture.far::before { content: 'Scroll sideways to see it all.';
    position: sticky; left: 0; color: #555; font-size: .8rem; }
  /* Each row of a table becomes a card, and each cell says what it is. */
  .wide { overflow: visible; background: none; }
  .wide table, .wide tbody, .wide tr, .wide th, .wide td { display: block;
    max-width: none; }
  .wide thead { display: none; }
  .wide tr { border: 1px solid #ddd; border-radius: 6px; margin: .6rem 0;
    padding: .35rem .7rem; }
  .wide tbody th { border: 0; padding: .1rem 0; color: #222;
    font-weight: 600; }
  .wide tbody td { border: 0; padding: .1rem 0; display: flex; gap: 1rem;
    justify-content: space-between; text-align: right; white-space: normal;
    overflow-wrap: anywhere; }
  figure .wide td:first-child { font-weight: 600; }
  .wide td:empty { display: none; }
  .wide td[data-head]::before { content: attr(data-head); color: #555;
    text-align: left; flex: 0 1 auto; max-width: 55%;
    overflow-wrap: break-word; }
}
"""
_PHONE = 480  # A picture of so many pixels can still be read on a phone.
# Names of a legend hide their lines; the point next to a pointer says its
# numbers. Without a script, all lines are shown and points have titles.
SCRIPT = """
document.documentElement.classList.add('script');
const tip = document.createElement('div');
tip.id = 'tip'; tip.hidden = true; tip.setAttribute('role', 'status');
document.body.append(tip);
let on = null;
function leave() {
  if (on) on.classList.remove('on');
  on = null; tip.hidden = true;
}
function point(event) {
  const chart = event.currentTarget;
  let best = null, least = 40;
  for (const mark of chart.querySelectorAll('g:not(.off) > .marks > path')) {
    const box = mark.getBoundingClientRect();
    const far = Math.hypot(box.x + box.width / 2 - event.clientX,
      box.y + box.height / 2 - event.clientY);
    if (far < least) { least = far; best = [mark, box]; }
  }
  leave();
  if (!best) return;
  const [mark, box] = best;
  on = mark; mark.classList.add('on');
  tip.textContent = mark.dataset.said; tip.hidden = false;
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = Math.max(8, Math.min(box.x + 12, room)) + 'px';
  const above = box.y - tip.offsetHeight - 10;
  tip.style.top = (above > 0 ? above : box.y + 16) + 'px';
}
for (const chart of document.querySelectorAll('.chart')) {
  for (const title of chart.querySelectorAll('.marks title')) {
    title.parentNode.dataset.said = title.textContent;
    title.remove();
  }
  chart.addEventListener('pointermove', point);
  chart.addEventListener('pointerdown', point);
  chart.addEventListener('pointerleave', leave);
}
addEventListener('scroll', leave, { passive: true });
for (const button of document.querySelectorAll('.legend button')) {
  button.setAttribute('aria-pressed', 'true');
  button.title = 'Hide or show this line';
  button.addEventListener('click', () => {
    const shown = button.getAttribute('aria-pressed') == 'true';
    button.setAttribute('aria-pressed', String(!shown));
    const figure = button.closest('figure');
    for (const line of figure.querySelectorAll('g[data-line]'))
      if (line.dataset.line == button.textContent)
        line.classList.toggle('off', shown);
  });
}
"""


def page(title: str, body: str) -> str:
  """Returns a page that needs no other file and loads nothing.

  Args:
    title: Title of the page; not yet escaped.
    body: HTML below the heading.

  Returns:
    HTML.
  """
  return (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{escape(title)}</title><style>{STYLE}</style></head>\n'
    f'<body><h1>{escape(title)}</h1>\n{body}\n'
    f'<script>{SCRIPT}</script></body></html>\n'
  )


def picture(figure: Figure, text: str, caption: str = '') -> str:
  """Returns a figure that stands in the page itself.

  Args:
    figure: The figure.
    text: What it shows, for those who cannot see it.
    caption: The text below it, as HTML.

  Returns:
    An HTML figure.
  """
  data = base64.b64encode(plots.render_png(figure)).decode()
  width = round(96 * figure.get_figwidth())  # CSS pixels in an inch.
  below = f'<figcaption>{caption}</figcaption>' if caption else ''
  far = ' far' if width > _PHONE else ''  # Too wide to be read on a phone.
  return (
    f'<figure><div class="picture{far}"><img alt="{escape(text)}" '
    f'width="{width}" src="data:image/png;base64,{data}"></div>{below}'
    '</figure>\n'
  )
