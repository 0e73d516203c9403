"""Colours and type, light and dark: one set of names for the page and for the drawings in it."""

SVG_CSS = """
:root {
  --paper: #fcfbf9; --ink: #1f1e1b; --muted: #6e6c66; --rule: #e3e0d9; --wash: #f3f1ec;
  --understanding: #2b6cb0; --generation: #c05621; --text: #3a8259; --accent: #5a4fcf; --warm: #c05621;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #171715; --ink: #ecebe6; --muted: #9d9b93; --rule: #33322e; --wash: #21201d;
    --understanding: #72aee6; --generation: #f0925c; --text: #7cc79b; --accent: #a49cf5; --warm: #f0925c;
  }
}
svg { font: 12px ui-sans-serif, system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .axis { stroke: var(--muted); stroke-width: 1; opacity: .6; }
svg text { fill: var(--muted); font-variant-numeric: tabular-nums; }
svg .label { fill: var(--ink); }
svg .understanding { --c: var(--understanding); }
svg .generation { --c: var(--generation); }
svg .text { --c: var(--text); }
svg .accent { --c: var(--accent); }
svg .warm { --c: var(--warm); }
svg .muted { --c: var(--muted); }
svg .ink { --c: var(--ink); }
svg .line, svg .dots, svg .faint { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
svg .dots { stroke-width: 1.3; }
svg .faint { stroke-width: 1; opacity: .35; }
svg .dot { fill: var(--paper); stroke: var(--c); stroke-width: 1.6; }
svg .area { fill: var(--c); fill-opacity: .38; stroke: none; }
svg .hit rect { fill: transparent; }
svg .hit line { stroke: var(--ink); stroke-width: 1; opacity: 0; }
svg .hit:hover line { opacity: .45; }
svg .role.full { fill: var(--c); fill-opacity: .82; }
svg .role.kv { fill: var(--c); fill-opacity: .22; stroke: var(--c); stroke-opacity: .6; }
svg .role.skip { fill: none; stroke: var(--c); stroke-opacity: .5; stroke-dasharray: 3 3; }
"""

PAGE_CSS = """
* { box-sizing: border-box; }
html { color-scheme: light dark; background: var(--paper); }
body { margin: 0; color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 ui-sans-serif, system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 4rem 1.5rem 3rem; }
h1 { font-size: 2.1rem; line-height: 1.15; font-weight: 650; letter-spacing: -.02em; margin: 0 0 .5rem; }
header p { font-size: 1.1rem; color: var(--muted); margin: 0; max-width: 44rem; }
h2 { font-size: 1.15rem; font-weight: 650; letter-spacing: -.01em; margin: 3.5rem 0 1.2rem; padding-top: 1.1rem;
  border-top: 1px solid var(--rule); }
.note { color: var(--muted); font-size: .9rem; max-width: 44rem; margin: .8rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr));
  gap: 1.5rem 2rem; margin-top: 2.4rem; }
.tiles b { display: block; font-size: 1.75rem; font-weight: 600; letter-spacing: -.02em; line-height: 1.2;
  font-variant-numeric: tabular-nums; }
.tiles span { color: var(--muted); font-size: .85rem; }
.grid-of-figures { display: grid;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1.8rem 2.4rem; }
figure { margin: 0; }
figure.wide { margin: 0 0 1.6rem; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
figcaption { color: var(--muted); font-size: .9rem; margin-top: .6rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; margin: 1.4rem 0 .6rem; }
th, td { padding: .38rem 1.6rem .38rem 0; text-align: left; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--muted); font-weight: 500; }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right;
  font-variant-numeric: tabular-nums; }
.words td:first-child { color: var(--muted); }
.tree, .tree ul { list-style: none; margin: 0; padding: 0; }
.tree > li { margin: 0 0 1.4rem; max-width: 44rem; }
.tree ul { margin: .7rem 0 0 .4rem; padding-left: 1.1rem; border-left: 1px solid var(--rule); }
.tree li li { margin: 0 0 .8rem; }
.tree li div { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: baseline; }
.tree > li > div span { font-weight: 600; }
.tree li li span { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  font-size: .86rem; overflow-wrap: anywhere; }
.tree em { font-style: normal; margin-left: auto; font-variant-numeric: tabular-nums; }
.tree small { flex-basis: 100%; color: var(--muted); font-size: .85rem; }
.tree u { display: block; height: 5px; border-radius: 3px; background: var(--wash);
  margin-top: .3rem; text-decoration: none; }
.tree i { display: block; height: 100%; border-radius: 3px; background: var(--muted); }
.tree i.understanding { background: var(--understanding); }
.tree i.generation { background: var(--generation); }
.tree i.text { background: var(--text); }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr));
  gap: 1.6rem 1.4rem; margin-top: 1.2rem; }
.samples img { display: block; width: 100%; border-radius: 4px; image-rendering: pixelated; }
.samples h3 { font-size: .78rem; font-weight: 600; margin: .6rem 0 .15rem; }
.samples h3.understanding { color: var(--understanding); }
.samples h3.generation { color: var(--generation); }
.samples p { margin: 0; font-size: .88rem; line-height: 1.45; }
.command p { margin: 1.1rem 0 .35rem; }
pre { margin: 0; padding: .7rem .9rem; background: var(--wash); border-radius: 6px; overflow-x: auto; }
code { font: .84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
footer { margin-top: 4rem; padding-top: 1.1rem;
  border-top: 1px solid var(--rule); color: var(--muted); font-size: .82rem; }
@media print { main { padding: 0; } h2 { break-after: avoid; } figure, table { break-inside: avoid; } }
"""
