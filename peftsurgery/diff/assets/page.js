'use strict';
/**
 * The page: draws what is open, finds, follows links, and is worked by mouse and keys alike.
 */

/** How many things found are listed. */
const FOUND = 40;
/** A module is open from the start if it has no more than this in it. */
const FEW = 60;

class Page {
  /** @param {PageData} data */
  constructor(data) {
    this.data = data;
    /** @type {Record<Side, Model>} */
    this.models = {both: new Model(data, 'both'), a: new Model(data, 'a'), b: new Model(data, 'b')};
    this.layouts = {both: new Layouts(), a: new Layouts(), b: new Layouts()};
    /** @type {Side[]} */
    this.sides = ['both'];
    /** The addresses of what is open. @type {Set<string>} */
    this.open = new Set();
    this.selected = '';
    this.zoom = 1;
    this.panes = element('panes');
    this.panel = new Panel(data, element('panel'));
    this.finder = new Finder(this);
    this.openFirst(this.models.both.root, 0);
    this.listen();
    this.draw();
    if (!this.follow()) this.panel.show(this.models.both.root, '');
  }

  /**
   * Opens the modules around the runs of blocks, and no run.
   * @param {Part} part
   * @param {number} depth
   */
  openFirst(part, depth) {
    for (const each of part.inside()) {
      const holds = each.kind === 'module' && each.parts.some((inner) => inner.kind === 'run');
      if (holds && depth < 3 && each.parts.length <= FEW) {
        this.open.add(each.id);
        this.openFirst(each, depth + 1);
      }
    }
  }

  listen() {
    this.panes.addEventListener('click', (event) => {
      const item = itemOf(event.target);
      if (!item || getSelection()?.toString()) return;
      this.toggle(item.dataset.id ?? '');
      this.select(item.dataset.id ?? '', true);
    });
    this.panes.addEventListener('keydown', (event) => this.press(event));
    this.panes.addEventListener('focusin', (event) => {
      const item = itemOf(event.target);
      if (item && item.dataset.id !== this.selected) this.select(item.dataset.id ?? '', false);
    });
    addEventListener('hashchange', () => this.follow());
    addEventListener('keydown', (event) => {
      const typing = event.target instanceof HTMLInputElement;
      if (event.key === '/' && !typing) {
        event.preventDefault();
        this.finder.field.focus();
      }
    });
    for (const name of ['fit', 'in', 'out', 'shut']) {
      element(`do-${name}`).addEventListener('click', () => this.act(name));
    }
    for (const choice of document.querySelectorAll('input[name=view]')) {
      choice.addEventListener('change', () => {
        this.sides = choice instanceof HTMLInputElement && choice.value === 'two' ? ['a', 'b'] : ['both'];
        this.draw();
      });
    }
  }

  /** @param {string} name */
  act(name) {
    const pane = this.panes.firstElementChild;
    const wide = this.layouts[this.sides[0] ?? 'both'].of(this.root(), this.open).width;
    if (name === 'shut') this.open.clear();
    if (name === 'in') this.zoom = Math.min(this.zoom * 1.25, 3);
    if (name === 'out') this.zoom = Math.max(this.zoom / 1.25, 0.2);
    if (name === 'fit' && pane) this.zoom = Math.min(1, Math.max(pane.clientWidth / wide, 0.2));
    this.draw();
  }

  root() {
    return this.models[this.sides[0] ?? 'both'].root;
  }

  /** @param {string} id */
  toggle(id) {
    const found = this.find(id);
    if (!found?.part.holds || !found.part.inside().length) return;
    if (!this.open.delete(id)) this.open.add(id);
    this.draw();
  }

  /**
   * The part with an address, in any of the models shown.
   * @param {string} id
   */
  find(id) {
    for (const side of [...this.sides, /** @type {Side} */ ('both')]) {
      const found = this.models[side].locate(id);
      if (found) return found;
    }
    return null;
  }

  /**
   * @param {string} id
   * @param {boolean} focus
   */
  select(id, focus) {
    const port = this.panes.querySelector(`[data-id="${CSS.escape(id)}"]`);
    const source = port instanceof HTMLElement ? port.dataset.source : undefined;
    const found = this.find(source ?? id);
    if (!found) return;
    this.selected = id;
    this.panel.show(found.part, found.path);
    history.replaceState(null, '', `#/${encodeURIComponent(source ?? id)}`);
    for (const item of this.items()) mark(item, item.dataset.id === id);
    if (focus) this.items().find((item) => item.dataset.id === id)?.focus({preventScroll: true});
  }

  /**
   * Opens what is around the part that the address names, and shows it.
   * @returns {boolean} whether there is one
   */
  follow() {
    if (!location.hash.startsWith('#/')) return false;
    const wanted = decoded(location.hash.slice(2));
    const found = this.find(wanted);
    if (!found) return false;
    for (let part = found.part.up; part; part = part.up) this.open.add(part.id);
    this.selected = found.part.id;
    this.draw();
    this.panel.show(found.part, found.path);
    const item = this.items().find((each) => each.dataset.id === found.part.id);
    item?.scrollIntoView({block: 'center', inline: 'center'});
    item?.focus({preventScroll: true});
    return true;
  }

  /** What is drawn and can be gone to, in reading order. */
  items() {
    return /** @type {HTMLElement[]} */ ([...this.panes.querySelectorAll('[role=treeitem]')]);
  }

  /** @param {KeyboardEvent} event */
  press(event) {
    const item = itemOf(event.target);
    if (!item || event.altKey || event.ctrlKey || event.metaKey) return;
    const tree = item.closest('[role=tree]');
    const items = this.items().filter((each) => tree?.contains(each));
    const place = items.indexOf(item);
    const isOpen = item.getAttribute('aria-expanded') === 'true';
    const id = item.dataset.id ?? '';
    const outer = item.parentElement?.closest('[role=treeitem]');
    /** @type {Record<string, () => unknown>} */
    const keys = {
      'ArrowDown': () => items[place + 1]?.focus(),
      'ArrowUp': () => items[place - 1]?.focus(),
      'Home': () => items[0]?.focus(),
      'End': () => items.at(-1)?.focus(),
      'ArrowRight': () => (isOpen ? items[place + 1]?.focus() : this.toggleAt(id)),
      'ArrowLeft': () => {
        if (isOpen) this.toggleAt(id);
        else if (outer instanceof HTMLElement) outer.focus();
      },
      'Enter': () => this.toggleAt(id),
      ' ': () => this.toggleAt(id),
      '+': () => this.act('in'),
      '-': () => this.act('out'),
    };
    const act = keys[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  /** @param {string} id */
  toggleAt(id) {
    this.toggle(id);
    this.select(id, true);
  }

  /** Draws all that is open; where the reader was looking stays. */
  draw() {
    const seen = [...this.panes.children].map((pane) => [pane.scrollLeft, pane.scrollTop]);
    const fresh = seen.length !== this.sides.length;
    const panes = this.sides.map((side) => this.pane(side));
    this.panes.replaceChildren(...panes);
    panes.forEach((pane, number) => {
      const [left = 0, top = 0] = seen[number] ?? [];
      const middle = (pane.scrollWidth - pane.clientWidth) / 2;
      pane.scrollTo(fresh ? middle : left, fresh ? 0 : top);
    });
    const items = this.items();
    const chosen = items.find((item) => item.dataset.id === this.selected);
    if (chosen) mark(chosen, true);
    else if (items[0]) items[0].tabIndex = 0;
  }

  /** @param {Side} side */
  pane(side) {
    const layout = this.layouts[side].of(this.models[side].root, this.open);
    const [a, b] = this.data.names;
    const label = side === 'both' ? 'the model' : side === 'a' ? a : b;
    const tree = make('div', {role: 'tree', 'aria-label': `Graph of ${label}`, class: 'tree'});
    tree.append(...this.inner(layout));
    tree.style.width = `${layout.width}px`;
    tree.style.height = `${layout.height}px`;
    tree.style.transform = `scale(${this.zoom})`;
    const sized = make('div', {class: 'sized'}, [tree]);
    sized.style.width = `${layout.width * this.zoom}px`;
    sized.style.height = `${layout.height * this.zoom}px`;
    const title = side === 'both' ? null : make('p', {class: 'side', text: `${side}: ${label}`});
    return make('div', {class: 'pane'}, [title, sized]);
  }

  /** @param {Layout} layout */
  inner(layout) {
    const svg = draw('svg', {
      width: String(layout.width),
      height: String(layout.height),
      'aria-hidden': 'true',
    });
    for (const line of layout.lines) svg.append(...edge(line));
    return [svg, ...layout.boxes.map((box) => this.box(box))];
  }

  /** @param {Box} box */
  box(box) {
    const {part, inner} = box;
    const {name, note} = labelOf(part);
    const rules = part.kind === 'port' ? [] : this.panel.insertions.get(part.path) ?? [];
    const said = [SIGNS[part.sign], name].filter(Boolean).join(' ');
    const spoken = [name, note, WORDS[part.sign], ...part.roles.slice(1)].filter(Boolean).join(', ');
    const classes = ['box', part.kind, WORDS[part.sign], inner ? 'open' : ''];
    const item = make('div', {
      'role': 'treeitem',
      'tabindex': '-1',
      'class': classes.filter(Boolean).join(' '),
      'aria-label': spoken,
      'aria-expanded': part.holds ? String(inner !== null) : undefined,
      'data-id': part.id,
      'data-source': part.source?.id,
    }, [
      make('span', {class: 'head'}, [
        make('span', {class: 'name', text: said}),
        make('span', {class: 'note', text: note}),
        rules.length && !part.id.includes(':') ? make('span', {class: 'rule', text: '◆'}) : null,
      ]),
      inner ? make('div', {role: 'group', class: 'inner'}, this.inner(inner)) : null,
    ]);
    Object.assign(item.style, {
      left: `${box.x}px`,
      top: `${box.y}px`,
      width: `${box.width}px`,
      height: `${box.height}px`,
    });
    return item;
  }
}

/**
 * An edge and its sign.
 * @param {Line} line
 */
function edge(line) {
  const path = draw('path', {
    'd': curve(line.points),
    'class': WORDS[line.sign],
    'marker-end': 'url(#arrow)',
  });
  const middle = line.points[Math.floor(line.points.length / 2)];
  if (!line.sign || !middle) return [path];
  const sign = draw('text', {x: String(middle.x + 4), y: String(middle.y + 4), class: WORDS[line.sign]});
  sign.textContent = SIGNS[line.sign];
  return [path, sign];
}

/**
 * @param {HTMLElement} item
 * @param {boolean} chosen
 */
function mark(item, chosen) {
  item.tabIndex = chosen ? 0 : -1;
  item.setAttribute('aria-selected', String(chosen));
}

/** @param {EventTarget | null} target */
function itemOf(target) {
  const found = target instanceof Element ? target.closest('[role=treeitem]') : null;
  return found instanceof HTMLElement ? found : null;
}

/** @param {string} id */
function element(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no ${id}`);
  return found;
}

/** @param {string} text */
function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

new Page(JSON.parse(element('data').textContent ?? ''));
