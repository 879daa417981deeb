"""How the page looks, on a screen and in print."""

STYLE = """
  :root { --ink: #1d1d1f; --soft: #666; --line: #dcdcdc; --wash: #f6f7f9; }
  * { box-sizing: border-box; }
  body { margin: 0 auto; max-width: 1080px; padding: 2.2rem 1.6rem 4rem; color: var(--ink); background: #fff;
         font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
  h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
  h2 { font-size: 1.2rem; margin: 2.6rem 0 .7rem; padding-bottom: .3rem; border-bottom: 2px solid var(--ink); }
  h3 { font-size: 1rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
  p { margin: .5rem 0; max-width: 78ch; overflow-wrap: anywhere; }
  .soft { color: var(--soft); }
  .scroll { overflow-x: auto; }
  .swatch { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .4rem; }
  ul { padding-left: 1.2rem; max-width: 78ch; }

  .verdicts { display: grid; grid-template-columns: repeat(auto-fill, minmax(28rem, 1fr)); gap: 1.1rem 2rem; }
  .verdicts.one { grid-template-columns: 1fr; }
  .verdict { break-inside: avoid; }
  .verdict ul { list-style: none; padding: 0; margin: 0; }
  .verdict li { padding-left: 1.5rem; position: relative; font-size: .93rem; }
  .verdict li::before { position: absolute; left: .15rem; font-weight: 700; }
  .better::before { content: "+"; color: #00734f; }
  .worse::before { content: "\\2212"; color: #b34700; }
  .changed::before { content: "\\2260"; }
  .verdict li.unclear { color: var(--soft); }
  .unclear::before { content: "\\00b7"; }

  table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums;
          border-top: 2px solid var(--ink); border-bottom: 2px solid var(--ink); }
  caption { caption-side: top; text-align: left; font-size: .88rem; line-height: 1.45; color: var(--soft);
            padding: 0 0 .6rem; }
  caption strong, figcaption strong { color: var(--ink); }
  th, td { padding: .2rem .55rem; text-align: right; vertical-align: top; font-weight: 400; }
  th:first-child, td:first-child { text-align: left; padding-left: .2rem; }
  thead th { border-bottom: 1px solid var(--ink); font-weight: 700; vertical-align: bottom; }
  thead th.method { overflow-wrap: anywhere; }
  thead th.human { width: 4.4rem; }
  thead .seeds { display: block; font-weight: 400; font-size: .84em; color: var(--soft); }
  tr.section th { text-align: left; padding-top: .85rem; font-style: italic; }
  tbody.section + tbody.section tr.section th { border-top: 1px solid var(--line); }
  table.numbers tbody tr:not(.section) td:first-child { padding-left: 1.1rem; }
  tr:last-child > td, tr:last-child > th { padding-bottom: .5rem; }
  td.best .value { font-weight: 700; }
  td .interval, td .change, td .note { color: var(--soft); font-size: .84em; white-space: nowrap; }
  td .change { display: inline-block; min-width: 4.2rem; margin-left: .3rem; }
  thead th.changing { padding-right: 5.2rem; }
  table.stacked td .interval, table.stacked td .change, table.stacked td .note {
    display: block; margin: 0; min-width: 0; line-height: 1.35; }
  table.stacked tbody td { padding-bottom: .38rem; }
  table.stacked thead th.changing { padding-right: .55rem; }
  td .change.shown { color: var(--ink); }
  .arrow { color: var(--soft); white-space: nowrap; padding-left: .35rem; }
  table.by-method { margin-bottom: 1.4rem; }
  table.by-method thead th { vertical-align: bottom; hyphens: auto; line-height: 1.25; }
  table.by-method th[scope=row] { text-align: left; overflow-wrap: anywhere; }
  table.facts td, table.facts th { text-align: left; overflow-wrap: anywhere; }
  table.facts tbody th { color: var(--soft); width: 11rem; white-space: nowrap; }
  table.facts td > div { padding-left: 1.2rem; text-indent: -1.2rem; }
  th.text { text-align: left; }
  td.text { text-align: left; font-family: ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }

  .figures { display: grid; grid-template-columns: 1fr 1fr; gap: 1.6rem 1.2rem; align-items: start; }
  figure { margin: 0; break-inside: avoid; }
  figure.wide { grid-column: 1 / -1; }
  figure img { width: 100%; height: auto; display: block; }
  figcaption { font-size: .88rem; color: var(--soft); line-height: 1.45; margin-top: .35rem; max-width: 95ch; }

  .small-tables { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1.4rem 1.6rem;
                  margin-top: .8rem; }
  .small-tables > div { break-inside: avoid; }
  details.example { border-top: 1px solid var(--line); }
  details.example dl { margin: 0 0 1rem; display: grid; grid-template-columns: 13rem 1fr; gap: .35rem 1rem;
                       font-size: .9rem; line-height: 1.45; }
  details.example dt { color: var(--soft); overflow-wrap: anywhere; }
  details.example dd { margin: 0; overflow-wrap: anywhere; }
  pre { background: var(--wash); border: 1px solid var(--line); border-radius: 4px; padding: .8rem 1rem;
        font-size: .8rem; line-height: 1.4; overflow-x: auto; }
  summary { cursor: pointer; margin: .6rem 0; overflow-wrap: anywhere; }

  @media (max-width: 700px) {
    .figures { grid-template-columns: 1fr; }
    .verdicts { grid-template-columns: 1fr; }
    details.example dl { grid-template-columns: 1fr; }
  }
  @media print {
    @page { size: A4; margin: 14mm; }
    body { max-width: none; padding: 0; font-size: 9.5pt; -webkit-print-color-adjust: exact;
           print-color-adjust: exact; }
    p, ul { max-width: none; }
    h1 { font-size: 16pt; }
    h2, h2 + p { break-after: avoid; }
    h2 { margin-top: 1.6rem; }
    h2.new-page { break-before: page; margin-top: 0; }
    h3, caption { break-after: avoid; }
    tr { break-inside: avoid; }
    tr.section { break-after: avoid; }
    thead { display: table-header-group; }
    table.numbers { font-size: 8.2pt; }
    table.numbers th, table.numbers td { padding-left: .35rem; padding-right: .35rem; }
    .verdicts { grid-template-columns: 1fr 1fr; }
    .small-tables { grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); }
    details.example::details-content { content-visibility: visible; display: block; block-size: auto; }
    pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 7.5pt; }
    .scroll { overflow: visible; }
  }
"""
