'use strict';
/** What is known of a part: what changed, what it is made of, its sites and the rules at them. */

class Panel {
  /**
   * @param {PageData} data
   * @param {HTMLElement} place
   */
  constructor(data, place) {
    this.data = data;
    this.place = place;
    this.tensors = grouped(data.tensors, (each) => ownerOf(each.name));
    this.sites = grouped(data.sites, (each) => each.name.split(' ')[0] ?? '');
    this.insertions = grouped(data.insertions, (each) => each.module ?? '');
  }

  /**
   * @param {Part} part
   * @param {string} path what is meant: of a run one of its blocks
   */
  show(part, path) {
    const shown = part.source ?? part;
    const sections = [
      this.title(shown, path),
      this.changes(path),
      shown.node ? this.operation(shown.node) : null,
      this.links(shown),
      ...this.theSites(shown, path),
      ...this.theInsertions(path),
      this.parameters(path),
    ];
    this.place.replaceChildren(...sections.filter((each) => each !== null));
  }

  /**
   * @param {Part} part
   * @param {string} path
   */
  title(part, path) {
    const words = [WORDS[part.sign], part.type, part.node ? '' : 'module'];
    const [last] = part.blocks.slice(-1);
    const run = last && part.blocks.length > 1;
    return section(null, [
      make('h2', {text: path || this.data.kind, class: 'path'}),
      make('p', {text: words.filter(Boolean).join(' · '), class: 'note'}),
      run ? make('p', {text: `${part.blocks.length} equal blocks: ${part.path} to ${last}`}) : null,
      link(part.node && part.id.includes(':') ? part.id : path, 'link to this part'),
    ]);
  }

  /** @param {string} path */
  changes(path) {
    const found = this.data.changes.filter((each) => each.at.includes(path));
    if (!found.length) return null;
    const items = found.map((each) => {
      const [colour, sign] = [WORDS[each.sign], make('b', {text: `${SIGNS[each.sign]} `})];
      return make('li', {class: colour}, [sign, each.text]);
    });
    return section('Changes', [make('ul', {class: 'changes'}, items)]);
  }

  /** @param {GraphNode} node */
  operation(node) {
    const old = node.old ?? {};
    /** @type {[string, string | undefined][]} */
    const rows = [
      ['operator', node.op],
      ['arguments', node.form],
      ['shape', node.shape],
      ['made by adapter', node.by],
      ['code', node.code],
    ];
    const was = {operator: old.op, arguments: old.form, shape: old.shape};
    return section('Operation', [table(rows, was)]);
  }

  /** @param {Part} part */
  links(part) {
    const around = part.up;
    if (!around) return null;
    const all = [...around.links.values()];
    const takes = all.filter((each) => each.to === part).map((each) => each.from);
    const gives = all.filter((each) => each.from === part).map((each) => each.to);
    if (!takes.length && !gives.length) return null;
    return section('Around it', [
      listed('takes', takes.map((each) => link((each.source ?? each).id, each.name))),
      listed('goes to', gives.map((each) => link(each.id, each.name))),
    ]);
  }

  /**
   * @param {Part} part
   * @param {string} path
   */
  theSites(part, path) {
    const block = blockOf(part);
    return (this.sites.get(path) ?? []).map((site) => {
      const facts = Object.entries(site.facts ?? {});
      const bindings = Object.entries(site.bindings ?? {});
      const heading = `Site: ${site.name.slice(path.length).trim()}`;
      const made = nodeIn(block, site.bindings?.y ?? site.bindings?.o ?? '')?.part?.node;
      const names = bindings.map(([name, key]) => {
        const bound = nodeIn(block, key);
        const value = bound?.part ? link(bound.part.id, bound.text) : bound?.text ?? key;
        return make('tr', {}, [make('th', {text: name, scope: 'row'}), make('td', {}, [value])]);
      });
      return section(heading, [
        table([['role', site.role ?? '-'], ...facts, ['code', made?.code]], site.old ?? {}),
        names.length ? make('h4', {text: 'bindings'}) : null,
        names.length ? make('table', {}, [make('tbody', {}, names)]) : null,
      ]);
    });
  }

  /** @param {string} path */
  theInsertions(path) {
    return (this.insertions.get(path) ?? []).map((each) => {
      const lines = this.data.rules[each.rule] ?? [];
      const sign = each.would ? 'Would match:' : SIGNS[each.sign ?? ''];
      const heading = `${sign} ${each.adapter} on ${each.role}`.trim();
      const adds = (each.parameters ?? []).map((name) => make('li', {}, [make('code', {text: name})]));
      return section(heading, [
        make('pre', {text: lines.join('\n'), class: 'rule'}),
        adds.length ? make('ul', {}, adds) : null,
      ]);
    });
  }

  /** @param {string} path */
  parameters(path) {
    const found = this.tensors.get(path) ?? [];
    if (!found.length) return null;
    const rows = found.map((each) => {
      const kept = each.kind === 'parameter' ? (each.trained ? 'trained' : 'frozen') : each.kind;
      const tied = each.tied && each.tied !== each.name ? `, tied to ${each.tied}` : '';
      const trained = each.old?.trained === undefined ? '' : each.old.trained ? 'trained' : 'frozen';
      const before = [each.old?.text, trained].filter(Boolean).join(', ');
      const was = before ? ` (was ${before})` : '';
      const sign = SIGNS[each.sign ?? ''];
      /** @type {[string, string]} */
      const row = [`${sign} ${leafOf(each.name)}`.trim(), `${each.text}, ${kept}${tied}${was}`];
      return row;
    });
    return section('Parameters and buffers', [table(rows, {})]);
  }
}

/**
 * What a binding's name stands for in the graph of a block.
 * @param {Part} block
 * @param {string} key
 * @returns {{part: Part | null, text: string} | null}
 */
function nodeIn(block, key) {
  for (const part of walk(block)) {
    if (part.node && isCalled(part.node, key)) {
      return {part, text: `${part.name} ${part.node.shape ?? ''}`.trim()};
    }
  }
  const read = [...block.reads.values()].find((each) => isCalled(each, key));
  return read ? {part: null, text: `${read.module ?? ''} ${read.shape ?? ''}`.trim()} : null;
}

/**
 * Whether a node has this key in the model that it is in.
 * @param {GraphNode} node
 * @param {string} key
 */
function isCalled(node, key) {
  return (node.after ?? node.key.replace(/^\+/, '')) === key;
}

/**
 * The part whose graph a part is in.
 * @param {Part} part
 */
function blockOf(part) {
  let block = part.kind === 'run' ? part : part.up ?? part;
  while (block.up && block.kind !== 'run') block = block.up;
  return block;
}

/**
 * The parts in one, but not those in blocks that are called there.
 * @param {Part} part
 * @returns {Generator<Part>}
 */
function* walk(part) {
  for (const each of part.inside()) {
    if (each.kind !== 'port') yield each;
    if (each.kind === 'module') yield* walk(each);
  }
}

/**
 * @template T
 * @param {T[]} things
 * @param {(thing: T) => string} by
 * @returns {Map<string, T[]>}
 */
function grouped(things, by) {
  /** @type {Map<string, T[]>} */
  const found = new Map();
  for (const each of things) {
    const known = found.get(by(each));
    if (known) known.push(each);
    else found.set(by(each), [each]);
  }
  return found;
}
