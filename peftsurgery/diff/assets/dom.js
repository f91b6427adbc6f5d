'use strict';
/** Elements, made without ever reading a text as HTML. */

/** @type {Record<Sign, string>} */
const WORDS = {'': '', '+': 'added', '-': 'removed', '~': 'changed', '>': 'renamed'};
/** @type {Record<Sign, string>} */
const SIGNS = {'': '', '+': '+', '-': '−', '~': '~', '>': '>'};

/**
 * @param {string} tag
 * @param {Record<string, string | undefined>} [attributes] `text` is what stands in it
 * @param {(Node | string | null)[]} [inner]
 * @returns {HTMLElement}
 */
function make(tag, attributes = {}, inner = []) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === 'text') made.textContent = value ?? '';
    else if (value !== undefined && value !== '') made.setAttribute(name, value);
  }
  made.append(...inner.filter((each) => each !== null));
  return made;
}

/**
 * An element of a drawing, which the page has one of from the start.
 * @param {string} tag
 * @param {Record<string, string>} attributes
 */
function draw(tag, attributes) {
  const space = document.querySelector('svg')?.namespaceURI ?? null;
  const made = /** @type {SVGElement} */ (document.createElementNS(space, tag));
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/**
 * @param {string | null} heading
 * @param {(Node | null)[]} inner
 */
function section(heading, inner) {
  return make('section', {}, [heading === null ? null : make('h3', {text: heading}), ...inner]);
}

/**
 * @param {string} address
 * @param {string} text
 */
function link(address, text) {
  return make('a', {href: `#/${encodeURIComponent(address)}`, text});
}

/**
 * Names and values; `was` has what some of them were.
 * @param {[string, string | undefined][]} rows
 * @param {Record<string, unknown>} was
 */
function table(rows, was) {
  const made = rows.filter(([, value]) => value).map(([name, value]) => {
    const old = was[name] === undefined ? null : make('del', {text: String(was[name])});
    const now = make('td', {}, [old, old ? ' → ' : null, value ?? '']);
    return make('tr', {}, [make('th', {scope: 'row', text: name}), now]);
  });
  return make('table', {}, [make('tbody', {}, made)]);
}

/**
 * @param {string} word
 * @param {HTMLElement[]} inner
 */
function listed(word, inner) {
  if (!inner.length) return null;
  const items = inner.flatMap((each, number) => (number ? [', ', each] : [each]));
  return make('p', {}, [`${word} `, ...items]);
}
