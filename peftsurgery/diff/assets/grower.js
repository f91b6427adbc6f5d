'use strict';
/**
 * How the parts of one graph are made: its operations put into their modules, blocks that are called
 * alike one after the other made one, and edges drawn where both of their ends are.
 */

/** So many operations that hang together are drawn as one. */
const MANY_LOOSE = 4;

/** Makes the parts of one graph. */
class Grower {
  /**
   * @param {Model} model
   * @param {Graph} graph
   * @param {Part} owner
   * @param {string} base the path of the block whose graph it is
   */
  constructor(model, graph, owner, base) {
    this.model = model;
    this.graph = graph;
    this.owner = owner;
    this.base = base;
    /** @type {Map<string, Part>} */
    this.holders = new Map([['', owner]]);
    /** The part that each node is drawn as. @type {(Part | undefined)[]} */
    this.places = [];
    /** How many operations each module has in it. @type {Map<string, number>} */
    this.sizes = new Map();
  }

  grow() {
    const nodes = this.graph.nodes.map((node) => asSeen(node, this.model.side));
    const apart = nodes.filter((node) => node.op === 'getitem').flatMap((node) => node.in ?? []);
    const takenApart = new Set(apart.map((number) => nodes[number]?.key ?? ''));
    const shown = nodes.map((node) => {
      const hidden = node.op === 'read' || isNumber(node, takenApart);
      return !hidden && isOn(node, this.model.side);
    });
    nodes.forEach((node, number) => {
      if (!shown[number] || node.op === 'call' || this.isResult(node)) return;
      for (const path of prefixes(node.module ?? '')) {
        this.sizes.set(path, (this.sizes.get(path) ?? 0) + 1);
      }
    });
    nodes.forEach((node, number) => {
      if (!shown[number]) this.places.push(undefined);
      else if (node.op === 'call') this.places.push(this.call(node));
      else if (this.isResult(node)) this.places.push(this.places[node.in?.[0] ?? 0]);
      else this.places.push(this.operation(node));
    });
    for (const part of this.base ? [] : [...this.holders.values()]) this.gather(part);
    nodes.forEach((node, number) => this.connect(node, this.places[number]));
    for (const [path, part] of this.holders) if (path) this.conclude(part);
  }

  /**
   * Whether a node only takes one of several results of a block, and is drawn as that.
   * @param {GraphNode} node
   */
  isResult(node) {
    return node.op === 'getitem' && this.graph.nodes[node.in?.[0] ?? -1]?.op === 'call';
  }

  /**
   * Makes one part of many operations that stand beside modules and hang together, as those of
   * masks and positions do, so that the model is seen before them.
   * @param {Part} holder
   */
  gather(holder) {
    const loose = new Set(holder.parts.filter((each) => each.node && each.id.includes(':')));
    if (loose.size < MANY_LOOSE || loose.size === holder.parts.length) return;
    for (const part of loose) if (isEnd(part)) loose.delete(part);
    /** @type {Map<Part, Part[]>} */
    const beside = new Map([...loose].map((part) => [part, []]));
    this.graph.nodes.forEach((node, number) => {
      const to = this.places[number];
      for (const place of node.in ?? []) {
        const from = this.places[place];
        if (!to || !from || !loose.has(from) || !loose.has(to)) continue;
        beside.get(from)?.push(to);
        beside.get(to)?.push(from);
      }
    });
    let count = 0;
    for (const start of loose) {
      const group = reached(start, beside);
      group.forEach((part) => loose.delete(part));
      if (group.size < MANY_LOOSE) continue;
      count += 1;
      const name = `${group.size} operations`;
      const part = new Part('module', `${holder.id}:group-${count}`, name, holder.path, holder);
      part.parts = [...group];
      holder.parts = [...holder.parts.filter((each) => !group.has(each)), part];
      for (const each of group) each.up = part;
      this.holders.set(part.id, part);
    }
  }

  /**
   * The part of a module, made if need be within those around it.
   * @param {string} path relative to the block
   * @returns {Part}
   */
  holder(path) {
    const known = this.holders.get(path);
    if (known) return known;
    const up = this.holder(ownerOf(path));
    const whole = join(this.base, path);
    const part = new Part('module', this.address(whole), leafOf(path), whole, up);
    part.type = this.graph.types[path] ?? '';
    part.roles = [...(this.model.roles.get(whole) ?? [])];
    up.parts.push(part);
    this.holders.set(path, part);
    return part;
  }

  /**
   * An operation; one that is alone in its module is drawn as that module.
   * @param {GraphNode} node
   * @returns {Part}
   */
  operation(node) {
    const module = node.module ?? '';
    const alone = prefixes(module).find((path) => path && this.sizes.get(path) === 1);
    const up = this.holder(alone === undefined ? module : ownerOf(alone));
    const path = join(this.base, module);
    const id = this.address(alone === undefined ? `${path}:${node.key}` : path);
    const name = alone === undefined ? nameOf(node, this.base) : alone.slice(ownerOf(alone).length);
    const part = new Part('node', id, name.replace(/^\./, ''), path, up);
    part.node = node;
    part.type = alone === undefined ? '' : node.op;
    part.sign = node.sign ?? '';
    if (alone !== undefined) part.roles = [...(this.model.roles.get(path) ?? [])];
    up.parts.push(part);
    return part;
  }

  /**
   * A called block; one like the block before it in the list joins that.
   * @param {GraphNode} node
   * @returns {Part}
   */
  call(node) {
    const called = join(this.base, node.module ?? '');
    const block = this.model.called(node, called, this.base);
    const path = block?.path ?? called;
    const list = ownerOf(node.module ?? '');
    const up = this.holder(ownerOf(list));
    const look = this.look(path, block);
    const known = up.parts.findLast((each) => each.kind === 'run');
    const named = this.model.side === 'a' ? block?.was ?? path : path;
    if (known?.blocks.includes(path)) return known;
    if (known && this.looks.get(known) === `${list} ${look}`) {
      known.blocks.push(path);
      known.name = `${known.name.replace(/\.\.\d+$/, '')}..${leafOf(named)}`;
      return known;
    }
    const sign = block?.sign === '-' ? '-' : '';
    const name = join(leafOf(list), leafOf(named));
    const part = new Part('run', `${sign}${path}`, name, path, up);
    part.blocks = [path];
    part.sign = this.signOf(block, path);
    part.type = this.model.data.graphs[block?.graphs?.[0] ?? -1]?.kind ?? '';
    part.grow = () => this.model.fill(part, block, path);
    this.looks.set(part, `${list} ${look}`);
    up.parts.push(part);
    return part;
  }

  /** What a run's blocks have in common. @type {Map<Part, string>} */
  looks = new Map();

  /**
   * @param {string} path
   * @param {BlockEntry | undefined} block
   */
  look(path, block) {
    const changes = this.model.changesBeneath(path);
    return JSON.stringify([block?.graphs, block?.sign, changes]);
  }

  /**
   * @param {BlockEntry | undefined} block
   * @param {string} path
   * @returns {Sign}
   */
  signOf(block, path) {
    if (block?.sign) return block.sign;
    return this.model.changesBeneath(path).length ? '~' : '';
  }

  /**
   * The addresses in a block that is gone are not those of one that has its path now.
   * @param {string} path
   */
  address(path) {
    return this.owner.id.startsWith('-') ? `-${path}` : path;
  }

  /**
   * Draws what a node takes, in the innermost part that both are in; what comes into a module from
   * outside comes through a port.
   * @param {GraphNode} node
   * @param {Part | undefined} to
   */
  connect(node, to) {
    if (!to) return;
    for (const [number, sign] of taken(node, this.model.side)) {
      const from = this.places[number];
      if (!from || from === to) continue;
      const around = new Set(this.chain(from));
      let inner = to;
      while (inner.up && !around.has(inner.up)) {
        this.port(inner.up, from, inner, sign);
        inner = inner.up;
      }
      const common = inner.up ?? this.owner;
      const start = [from, ...this.chain(from)].find((each) => each.up === common);
      if (start && start !== inner) common.link(start, inner, sign);
    }
  }

  /**
   * @param {Part} holder
   * @param {Part} from
   * @param {Part} to
   * @param {Sign} sign
   */
  port(holder, from, to, sign) {
    const id = `${holder.id}<${from.id}`;
    let port = holder.parts.find((each) => each.id === id);
    if (!port) {
      port = new Part('port', id, from.name, holder.path, holder);
      port.source = from;
      holder.parts.push(port);
    }
    holder.link(port, to, sign);
  }

  /**
   * The parts around one, up to the graph's.
   * @param {Part} part
   * @returns {Part[]}
   */
  chain(part) {
    const found = [];
    for (let each = part.up; each; each = each.up) {
      found.push(each);
      if (each === this.owner) break;
    }
    return found;
  }

  /**
   * Gives a module the sign that its parts have in common, or says that something in it changed.
   * @param {Part} part
   */
  conclude(part) {
    const signs = new Set(this.signsIn(part));
    const [only] = signs;
    if (signs.size === 1 && only) part.sign = only;
    else if (signs.size > 1) part.sign = '~';
    else if (part.id.includes(':')) part.sign = '';
    else if (this.model.changesBeneath(part.path).length) part.sign = '~';
  }

  /**
   * @param {Part} part
   * @returns {Sign[]}
   */
  signsIn(part) {
    const inner = part.parts.filter((each) => each.kind !== 'port');
    return inner.flatMap((each) => (each.kind === 'module' ? this.signsIn(each) : [each.sign]));
  }
}

/**
 * What is reached from a part, itself with it.
 * @param {Part} start
 * @param {Map<Part, Part[]>} beside
 * @returns {Set<Part>}
 */
function reached(start, beside) {
  const found = new Set([start]);
  for (const part of found) for (const next of beside.get(part) ?? []) found.add(next);
  return found;
}

/** Whether a part is an input or the output. @param {Part} part */
function isEnd(part) {
  return part.node?.op === 'input' || part.node?.op === 'output';
}

/**
 * Whether a node is a size or a device: no tensor, and nothing that tensors are taken out of.
 * @param {GraphNode} node
 * @param {Set<string>} taken what the nodes are whose values are taken apart
 */
function isNumber(node, taken) {
  const fixed = ['input', 'output', 'call', 'read'].includes(node.op);
  return !fixed && !node.shape && !node.sign && !node.by && !taken.has(node.key);
}

/**
 * The numbers of the nodes that a node takes, with the signs of these edges.
 * @param {GraphNode} node
 * @param {Side} side
 * @returns {[number, Sign][]}
 */
function taken(node, side) {
  const now = node.in ?? [];
  const was = node.was ?? now;
  if (side !== 'both') return (side === 'a' ? was : now).map((each) => [each, '']);
  const own = node.sign === '+' || node.sign === '-' ? node.sign : '';
  /** @type {[number, Sign][]} */
  const kept = now.map((each) => [each, was.includes(each) ? own : '+']);
  const cut = was.filter((each) => !now.includes(each));
  return [...kept, ...cut.map((each) => /** @type {[number, Sign]} */ ([each, '-']))];
}

/**
 * A node as one side has it.
 * @param {GraphNode} node
 * @param {Side} side
 * @returns {GraphNode}
 */
function asSeen(node, side) {
  return side === 'a' ? {...node, ...node.old} : node;
}

/**
 * @param {GraphNode} node
 * @param {Side} side
 */
function isOn(node, side) {
  return !(side === 'a' && node.sign === '+') && !(side === 'b' && node.sign === '-');
}

/**
 * @param {GraphNode} node
 * @param {string} base
 */
function nameOf(node, base) {
  if (node.op !== 'input') return node.op;
  return base ? `input ${node.form ?? ''}` : node.form ?? node.key;
}
