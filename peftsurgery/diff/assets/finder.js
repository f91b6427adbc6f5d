'use strict';
/** The search: every part by its name, type, role and tensors; one keystroke, one list. */

class Finder {
  /** @param {Page} page */
  constructor(page) {
    this.page = page;
    const field = element('find');
    if (!(field instanceof HTMLInputElement)) throw new Error('the search is no field');
    this.field = field;
    this.list = element('results');
    this.said = element('found');
    /** What can be found, made when it is first asked for. @type {{id: string, text: string}[]} */
    this.known = [];
    this.chosen = -1;
    field.addEventListener('input', () => this.find());
    field.addEventListener('keydown', (event) => this.press(event));
    field.addEventListener('blur', () => setTimeout(() => this.hide(), 200));
    this.list.addEventListener('mousedown', (event) => {
      const item = event.target instanceof Element ? event.target.closest('li') : null;
      if (item) this.go(item.dataset.id ?? '');
      event.preventDefault();
    });
  }

  /** @returns {{id: string, text: string}[]} */
  all() {
    if (this.known.length) return this.known;
    const {panel, models} = this.page;
    /** @type {Part[]} */
    const waiting = [models.both.root];
    for (let part = waiting.pop(); part; part = waiting.pop()) {
      const inner = part.inside().filter((each) => each.kind !== 'port');
      waiting.push(...inner.filter((each) => each.holds).reverse());
      for (const each of inner) {
        const words = [each.id, each.type, each.node?.op, ...each.roles];
        const adapters = (panel.insertions.get(each.path) ?? []).map((one) => one.adapter);
        const text = [...new Set([...words, ...adapters].filter(Boolean))].join(' · ');
        this.known.push({id: each.id, text});
      }
    }
    return this.known;
  }

  find() {
    const wanted = this.field.value.trim().toLowerCase();
    const all = wanted ? this.all() : [];
    const found = all.filter((each) => each.text.toLowerCase().includes(wanted));
    const items = found.slice(0, FOUND).map((each, number) => make('li', {
      'role': 'option', 'id': `result-${number}`, 'data-id': each.id, 'text': each.text,
      'aria-selected': 'false',
    }));
    this.list.replaceChildren(...items);
    this.list.hidden = !items.length;
    this.field.setAttribute('aria-expanded', String(items.length > 0));
    this.said.textContent = wanted ? `${found.length} found` : '';
    this.choose(-1);
  }

  /** @param {KeyboardEvent} event */
  press(event) {
    const count = this.list.children.length;
    if (event.key === 'ArrowDown') this.choose(Math.min(this.chosen + 1, count - 1));
    else if (event.key === 'ArrowUp') this.choose(Math.max(this.chosen - 1, 0));
    else if (event.key === 'Escape') this.hide();
    else if (event.key === 'Enter') {
      const item = this.list.children[Math.max(this.chosen, 0)];
      if (item instanceof HTMLElement) this.go(item.dataset.id ?? '');
    } else return;
    event.preventDefault();
  }

  /** @param {number} number */
  choose(number) {
    this.chosen = number;
    [...this.list.children].forEach((item, place) => {
      item.setAttribute('aria-selected', String(place === number));
      if (place === number) item.scrollIntoView({block: 'nearest'});
    });
    this.field.setAttribute('aria-activedescendant', number < 0 ? '' : `result-${number}`);
  }

  /** @param {string} id */
  go(id) {
    this.hide();
    location.hash = `#/${encodeURIComponent(id)}`;
    this.page.follow();
  }

  hide() {
    this.list.hidden = true;
    this.field.setAttribute('aria-expanded', 'false');
  }
}
