"""Style and script of the page of an explanation (html.py). Colours are those of the pictures (timeline.py)."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --bg: #fbfbf9; --fg: #1d1f24; --soft: #5d6470; --card: #fff; --edge: #dcdfe4;
  --tint: #eef1f5; --taken: #e3f2e8; --compute: #0072b2; --wait: #d55e00; --send: #009e73; --network: #e69f00;
  --whole: #cc79a7; }
@media (prefers-color-scheme: dark) { :root { --bg: #14161a; --fg: #e6e8ec; --soft: #9aa3b0; --card: #1c1f25;
  --edge: #333842; --tint: #22262e; --taken: #16352a; --compute: #3d9fdc; --wait: #f07b2e; --send: #27c093;
  --network: #f2b632; --whole: #dd93bc; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 28px 24px 80px; }
h1 { font-size: 26px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 36px 0 8px; padding-top: 12px; border-top: 1px solid var(--edge); }
h3 { font-size: 15px; margin: 18px 0 6px; }
.sub, .legend span, small { color: var(--soft); }
.sub { margin: 2px 0 10px; }
code, pre { font: 12.5px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { overflow-x: auto; background: var(--tint); padding: 10px 12px; border-radius: 6px; }
.warn { border-left: 4px solid var(--wait); background: var(--tint); padding: 8px 12px; white-space: pre-wrap; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 18px 0; }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 12px 14px; }
.card h3 { margin: 0; font-size: 13px; font-weight: 500; color: var(--soft); }
.card b { font-size: 23px; font-variant-numeric: tabular-nums; }
.card p { margin: 2px 0 0; font-size: 12.5px; color: var(--soft); }
.bar { display: flex; height: 26px; border-radius: 5px; overflow: hidden; background: var(--tint); }
.bar i { display: block; min-width: 1px; }
.legend { list-style: none; padding: 0; margin: 8px 0; display: flex; flex-wrap: wrap;
  gap: 4px 22px; font-size: 13.5px; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; }
.k-attention { background: var(--compute); } .k-on-shards { background: var(--send); }
.k-whole { background: var(--whole); } .k-gathers { background: var(--network); }
.l-compute { background: var(--compute); fill: var(--compute); } .l-wait { background: var(--wait); fill: var(--wait); }
.l-send { background: var(--send); fill: var(--send); }
.l-network { background: var(--network); fill: var(--network); }
.line { display: flex; background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 8px; }
.names { flex: none; width: 92px; font-size: 12.5px; line-height: 1.25; }
.names div { height: 40px; padding-top: 4px; } .names small { display: block; font-size: 11px; }
.scroll { flex: 1; overflow-x: auto; min-width: 0; } svg { display: block; }
rect:hover { stroke: var(--fg); stroke-width: 1.5; }
.grid { stroke: var(--edge); stroke-width: 1; opacity: .6; } .rule { stroke: var(--soft); stroke-dasharray: 4 3; }
.ticks { position: relative; height: 20px; font-size: 11.5px; color: var(--soft); }
.ticks span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.ticks span:first-child { transform: none; } .ticks span:last-child { transform: translateX(-100%); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th { text-align: left; font-weight: 600; color: var(--soft); }
th { border-bottom: 1px solid var(--edge); white-space: nowrap; }
th, td { padding: 4px 9px; vertical-align: top; } tbody tr + tr td { border-top: 1px solid var(--tint); }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.plan td:first-child { white-space: nowrap; } .taken td { background: var(--taken); font-weight: 600; }
.cost { width: 90px; height: 8px; margin-top: 6px; background: var(--tint); border-radius: 4px; overflow: hidden; }
.cost i { display: block; height: 100%; background: var(--compute); }
details { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; margin: 8px 0; padding: 0 12px; }
summary { cursor: pointer; padding: 7px 0; font-weight: 600; } summary span { font-weight: 400; color: var(--soft); }
.code details { overflow-x: auto; } .code td { border-top: 1px solid var(--tint); padding: 2px 8px; }
.code td:nth-child(2) { min-width: 340px; max-width: 560px; overflow-wrap: anywhere; }
.code td:nth-child(3) { white-space: nowrap; } .code td:nth-child(6) { color: var(--soft); min-width: 150px; }
.code td:nth-child(7) { color: var(--soft); max-width: 340px; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.p { width: 5px; padding: 0 !important; } .p-sharded .p, .w-sharded { background: var(--send); }
.p-whole .p, .w-whole { background: var(--whole); } .p-wire .p, .w-wire { background: var(--network); }
.p-wire code { font-weight: 600; } .quiet { display: none; } .show-views .quiet { display: table-row; opacity: .6; }
.hide { display: none !important; }
label { white-space: nowrap; } input[type=search] { font: inherit; padding: 2px 8px; border: 1px solid var(--edge);
  border-radius: 6px; background: var(--card); color: var(--fg); }
"""

SCRIPT = """
"use strict";
const zoom = document.getElementById("zoom");
if (zoom) zoom.addEventListener("input", () => {
  document.getElementById("wide").style.width = 100 * zoom.value + "%";
});
for (const section of document.querySelectorAll("section")) {
  const code = section.querySelector(".code"), views = section.querySelector(".views");
  const find = section.querySelector(".find");
  if (!code) continue;
  views.addEventListener("change", () => code.classList.toggle("show-views", views.checked));
  find.addEventListener("input", () => {
    const wanted = find.value.toLowerCase();
    for (const row of code.querySelectorAll("tr")) {
      row.classList.toggle("hide", wanted !== "" && !row.textContent.toLowerCase().includes(wanted));
    }
  });
}
"""
