'use strict';
/**
 * The page: draws what is open, finds, follows links, and is worked by mouse and keys alike.
 */

/** How many things found are listed. */
const FOUND = 40;
/** Below this size no name can be read. */
const LEAST = 0.4;
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
    this.act('fit');
    if (!this.follow()) this.panel.show(this.models.both.root, '');
  }

  /**
   * Opens the modules around the runs of blocks, and no run.
   * @param {Part} part
   * @param {number} depth
   */
  openFirst(part, depth) {
    for (const each of part.inside()) {
      if (each.kind === 'module' && holdsRun(each) && depth < 4 && each.parts.length <= FEW) {
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
    const pane = this.panes.clientWidth / this.sides.length;
    const wide = this.layouts[this.sides[0] ?? 'both'].of(this.root(), this.open).width;
    if (name === 'shut') this.open.clear();
    if (name === 'in') this.zoom = Math.min(this.zoom * 1.25, 3);
    if (name === 'out') this.zoom = Math.max(this.zoom / 1.25, LEAST);
    if (name === 'fit') this.zoom = Math.min(1, Math.max(pane / wide, LEAST));
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
    /** @type {Part | null} */
    let part = found.part;
    for (; part; part = part.up) if (part.holds) this.open.add(part.id);
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
    const outer = items.find((each) => each.dataset.id === item.dataset.up);
    /** @type {Record<string, () => unknown>} */
    const keys = {
      'ArrowDown': () => items[place + 1]?.focus(),
      'ArrowUp': () => items[place - 1]?.focus(),
      'Home': () => items[0]?.focus(),
      'End': () => items.at(-1)?.focus(),
      'ArrowRight': () => (isOpen ? items[place + 1]?.focus() : this.toggleAt(id)),
      'ArrowLeft': () => {
        if (isOpen) this.toggleAt(id);
        else outer?.focus();
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
    this.place(tree, layout, {x: 0, y: 0}, 1);
    tree.style.transform = `scale(${this.zoom})`;
    const sized = make('div', {class: 'sized'}, [tree]);
    sized.style.width = `${layout.width * this.zoom}px`;
    sized.style.height = `${layout.height * this.zoom}px`;
    const title = side === 'both' ? null : make('p', {class: 'side', text: `${side}: ${label}`});
    return make('div', {class: 'pane'}, [title, sized]);
  }

  /**
   * Puts what a layout has into a tree: what is within another after it, at a deeper level. Edges
   * come before the parts, which so hide what runs beneath them.
   * @param {HTMLElement} tree
   * @param {Layout} layout
   * @param {{x: number, y: number}} from
   * @param {number} level
   */
  place(tree, layout, from, level) {
    const svg = draw('svg', {'aria-hidden': 'true', 'width': '1', 'height': '1'});
    for (const line of layout.lines) svg.append(...edge(line, from));
    tree.append(svg);
    for (const box of layout.boxes) {
      const corner = {x: from.x + box.x, y: from.y + box.y};
      tree.append(this.item(box, corner, level));
      const inner = {x: corner.x, y: corner.y + HEAD};
      if (box.inner) this.place(tree, box.inner, inner, level + 1);
    }
  }

  /**
   * @param {Box} box
   * @param {{x: number, y: number}} corner
   * @param {number} level
   */
  item({part, inner, width, height}, corner, level) {
    const {name, note} = labelOf(part);
    const isSite = part.kind !== 'port' && !part.id.includes(':');
    const rules = isSite ? this.panel.insertions.get(part.path) ?? [] : [];
    const classes = ['box', part.kind, WORDS[part.sign], inner ? 'open' : ''];
    const item = make('div', {
      'role': 'treeitem',
      'tabindex': '-1',
      'class': classes.filter(Boolean).join(' '),
      'aria-level': String(level),
      'aria-expanded': part.holds ? String(inner !== null) : undefined,
      'data-id': part.id,
      'data-up': part.up?.id,
      'data-source': part.source?.id,
    }, [
      make('span', {class: 'head'}, [
        make('span', {class: 'name'}, [
          part.sign ? `${SIGNS[part.sign]} ` : null,
          name,
          part.sign ? make('span', {class: 'hidden', text: `, ${WORDS[part.sign]} `}) : null,
        ]),
        make('span', {class: 'note', text: note}),
        rules.length ? make('span', {class: 'rule', text: '◆'}) : null,
      ]),
    ]);
    Object.assign(item.style, {
      left: `${corner.x}px`,
      top: `${corner.y}px`,
      width: `${width}px`,
      height: `${height}px`,
    });
    return item;
  }
}

/**
 * Whether there is a run of blocks in a module, at any depth.
 * @param {Part} part
 * @returns {boolean}
 */
function holdsRun(part) {
  const inner = part.parts.filter((each) => each.kind === 'module');
  return part.parts.some((each) => each.kind === 'run') || inner.some(holdsRun);
}

/**
 * An edge and its sign, from a corner.
 * @param {Line} line
 * @param {{x: number, y: number}} from
 */
function edge(line, from) {
  const points = line.points.map(({x, y}) => ({x: x + from.x, y: y + from.y}));
  const path = draw('path', {
    'd': curve(points),
    'class': WORDS[line.sign],
    'marker-end': 'url(#arrow)',
  });
  const middle = points[Math.floor(points.length / 2)];
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
