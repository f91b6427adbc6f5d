"""What every page has: its style, its script, and the policy that keeps it off the network."""

from __future__ import annotations

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

STYLE = """
:root{color-scheme:light dark;--line:#8885;
--add:#1a7f37;--cut:#c0262d;--alter:#8a5a00;--name:#0a62b8}
@media (prefers-color-scheme:dark){:root{
--add:#56d364;--cut:#ff8a80;--alter:#e3b341;--name:#79b8ff}}
body{font:14px/1.5 system-ui,sans-serif;margin:0}
main{max-width:70rem;margin:0 auto;padding:1rem}
h1{font-size:1.25rem;overflow-wrap:anywhere}
h2{font-size:1rem;display:inline}
section{margin:1rem 0;overflow-x:auto}
code{font:13px/1.5 ui-monospace,monospace;overflow-wrap:anywhere}
table{border-collapse:collapse}
th,td{padding:.1rem .8rem .1rem 0;border-bottom:1px solid var(--line)}
.figures th,.heat th{text-align:left;font-weight:600}
.figures td{text-align:right;font-variant-numeric:tabular-nums}
.heat td{text-align:right;padding:.1rem .5rem}
.changes{list-style:none;padding:0;margin:.3rem 0}
.changes li{padding:.1rem .3rem}
li:target{outline:2px solid var(--name)}
a{text-decoration:none;font:bold 13px ui-monospace,monospace;padding:0 .3rem}
a:focus-visible,summary:focus-visible,input:focus-visible{outline:2px solid var(--name)}
.added a,a.added{color:var(--add)}.removed a,a.removed{color:var(--cut)}
.changed a,a.changed{color:var(--alter)}.renamed a,a.renamed{color:var(--name)}
details details,.leaf{margin-left:1.2rem}
.note{opacity:.75}
summary{cursor:pointer}
"""

SCRIPT = """
'use strict';
/** The search field. @type {HTMLInputElement} */
const field = document.querySelector('#find');
/** Where it is said how many were found. @type {HTMLElement} */
const found = document.querySelector('#found');
/** Everything that has a name. @type {HTMLElement[]} */
const named = [...document.querySelectorAll('.changes li, .leaf, section details details')];

/** Show what has the searched text in it, and open what it lies in. */
function find() {
  const wanted = field.value.trim().toLowerCase();
  let count = 0;
  for (const each of named) {
    const matches = each.textContent.toLowerCase().includes(wanted);
    each.hidden = !matches;
    if (matches && wanted) {
      count += 1;
      const around = each.parentElement.closest('details');
      if (around) around.open = true;
    }
  }
  found.textContent = wanted ? `${count} found` : '';
}

/** Open what a link points into. */
function follow() {
  const target = document.getElementById(location.hash.slice(1));
  const around = target && target.closest('details');
  if (around) {
    around.open = true;
    target.scrollIntoView({block: 'center'});
  }
}

field.addEventListener('input', find);
addEventListener('hashchange', follow);
addEventListener('keydown', (event) => {
  if (event.key === '/' && document.activeElement !== field) {
    event.preventDefault();
    field.focus();
  }
});
follow();
"""
