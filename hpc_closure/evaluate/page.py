"""The frame and the style sheet of the report: light and dark, wide and narrow, no script."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><nav>{links}</nav></header>
<main>
{sections}
</main>
<footer>Scores in long form: scores.csv, scores.json. Figures as PDF: figures/.</footer>
</body>
</html>
"""

STYLE = """
:root { --ink: #1c1f23; --soft: #5d6570; --line: #d9dde2; --paper: #ffffff; --shade: #f4f6f8;
  --accent: #0072b2; --row: #e8f2f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #9aa3ae; --line: #363c44; --paper: #16191d; --shade: #1f242a;
    --accent: #6db9e8; --row: #1c2f3d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
header, main, footer { max-width: 1080px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 32px; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 44px 0 12px; padding-bottom: 5px;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 26px 0 4px; } .facts h3 { margin: 0 0 6px; }
nav { font-size: .9rem; } nav a { margin-right: 14px; white-space: nowrap; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.headlines { padding: 0; list-style: none; margin: 0; }
.headlines li { padding: 8px 14px; margin: 0 0 10px; background: var(--shade);
  border-left: 3px solid var(--accent); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr));
  gap: 20px 32px; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 2px 14px; margin: 0;
  font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.table { overflow-x: auto; margin: 14px 0 6px; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: 6px; position: sticky; left: 0;
  max-width: min(1032px, calc(100vw - 48px)); }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid var(--line);
  vertical-align: top; }
thead th { vertical-align: bottom; font-weight: 600; line-height: 1.25; }
tbody th { text-align: left; font-weight: 600; position: sticky; left: 0; background: var(--paper);
  white-space: nowrap; }
td { white-space: nowrap; }
td small { display: block; color: var(--soft); font-size: .74rem; line-height: 1.2; }
tr.model td, tr.model th { background: var(--row); }
.absent { color: var(--soft); }
.note, .notes { color: var(--soft); font-size: .88rem; margin: 6px 0; }
.notes { padding-left: 20px; }
details { margin: 10px 0; font-size: .9rem; } summary { cursor: pointer; color: var(--accent); }
figure { margin: 20px 0; padding: 10px; background: #ffffff; border: 1px solid var(--line);
  border-radius: 6px; }
figure img { width: 100%; height: auto; display: block; max-width: var(--w);
  margin: 0 auto; }
figcaption { color: #4a5058; font-size: .86rem; margin: 8px auto 0; max-width: 920px; }
pre { overflow-x: auto; background: var(--shade); padding: 12px; font-size: .8rem; }
footer { color: var(--soft); font-size: .85rem; padding-top: 36px; padding-bottom: 32px; }
@media (max-width: 560px) {
  header, main, footer { padding-left: 14px; padding-right: 14px; }
  body { font-size: 15px; } th, td { padding: 4px 7px; } figure { padding: 4px; overflow-x: auto; }
  figure img { min-width: min(620px, var(--w)); }
  dl.words { grid-template-columns: 1fr; gap: 0; } dl.words dd { margin-bottom: 6px; } }
@media print { details > * { display: block; } nav { display: none; } }
"""
