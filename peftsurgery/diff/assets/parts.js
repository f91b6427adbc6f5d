'use strict';
/**
 * The model as parts within parts: modules, runs of equal blocks, operations. What is in a part is
 * found when it is first asked for, so a model costs what is open of it.
 */

/** So many operations that hang together are drawn as one. */
const MANY_LOOSE = 4;

/** One thing that can be drawn. */
class Part {
  /**
   * @param {'module' | 'run' | 'node' | 'port'} kind
   * @param {string} id its address in the page
   * @param {string} name what is written on it
   * @param {string} path the module it is, or is in; of a run the first block
   * @param {Part | null} up
   */
  constructor(kind, id, name, path, up) {
    this.kind = kind;
    this.id = id;
    this.name = name;
    this.path = path;
    this.up = up;
    /** The blocks that a run stands for. @type {string[]} */
    this.blocks = [];
    /** What kind of module or operation it is. @type {string} */
    this.type = '';
    /** The roles of the sites there. @type {string[]} */
    this.roles = [];
    /** @type {GraphNode | null} */
    this.node = null;
    /** What a port leads to. @type {Part | null} */
    this.source = null;
    /** @type {Sign} */
    this.sign = '';
    /** @type {Part[]} */
    this.parts = [];
    /** @type {Map<string, Link>} */
    this.links = new Map();
    /** What its graph reads, by node, if it has one. @type {Map<string, GraphNode>} */
    this.reads = new Map();
    /** Fills the part, once. @type {(() => void) | null} */
    this.grow = null;
  }

  /** Whether it has an inside. */
  get holds() {
    return this.kind === 'module' || this.kind === 'run';
  }

  /** What is in it. @returns {Part[]} */
  inside() {
    const grow = this.grow;
    this.grow = null;
    if (grow) grow();
    return this.parts;
  }

  /**
   * @param {Part} from
   * @param {Part} to
   * @param {Sign} sign
   */
  link(from, to, sign) {
    const key = `${from.id}\n${to.id}`;
    const known = this.links.get(key);
    if (known && known.sign !== sign) known.sign = '';
    else if (!known) this.links.set(key, {from, to, sign});
  }
}

/** A model's parts, seen from one side. */
class Model {
  /**
   * @param {PageData} data
   * @param {Side} side
   */
  constructor(data, side) {
    this.data = data;
    this.side = side;
    const there = data.blocks.filter((block) => block.sign !== '-');
    const gone = data.blocks.filter((block) => block.sign === '-');
    this.blocks = new Map(there.map((block) => [block.path ?? '', block]));
    const former = there.filter((block) => block.sign !== '+');
    this.former = new Map(former.map((block) => [block.was ?? block.path ?? '', block]));
    this.gone = new Map(gone.map((block) => [block.path ?? '', block]));
    /** The numbers of the changes at each path and beneath it. @type {Map<string, Set<number>>} */
    this.changed = new Map();
    data.changes.forEach((change, number) => {
      for (const path of change.at) {
        for (const around of prefixes(path)) add(this.changed, around, number);
      }
    });
    /** The roles that each module has. @type {Map<string, Set<string>>} */
    this.roles = new Map();
    for (const {name, role} of data.sites) if (role) add(this.roles, name.split(' ')[0] ?? '', role);
    this.root = new Part('module', '', data.kind, '', null);
    this.root.type = data.kind;
    this.root.grow = () => this.fill(this.root, this.blocks.get(''), '');
  }

  /**
   * Puts what a block's graphs have into a part.
   * @param {Part} owner
   * @param {BlockEntry | undefined} block
   * @param {string} path
   */
  fill(owner, block, path) {
    const graphs = block?.graphs ?? [];
    graphs.forEach((number, place) => {
      const graph = this.data.graphs[number];
      let into = owner;
      if (graphs.length > 1) {
        into = new Part('module', `${owner.id}~${place + 1}`, `form ${place + 1}`, path, owner);
        owner.parts.push(into);
      }
      if (!graph) return;
      new Grower(this, graph, into, path).grow();
      for (const node of graph.nodes) if (node.op === 'read') owner.reads.set(node.key, node);
    });
  }

  /**
   * The block that a call node calls: one that is gone as it was, and on the first model's side the
   * one that had this path there.
   * @param {GraphNode} node
   * @param {string} path
   * @param {string} base the block whose graph the node is in
   */
  called(node, path, base) {
    if (this.side === 'a') {
      const was = join(this.blocks.get(base)?.was ?? base, path.slice(base ? base.length + 1 : 0));
      return this.former.get(was) ?? this.gone.get(was);
    }
    const gone = this.gone.get(path);
    return gone && (node.sign === '-' || !this.blocks.has(path)) ? gone : this.blocks.get(path);
  }

  /**
   * The changes that a place has, and those beneath it.
   * @param {string} path
   * @returns {number[]}
   */
  changesBeneath(path) {
    return [...(this.changed.get(path) ?? [])];
  }

  /**
   * The part with an address, and the path that is meant by it: a block in a run is its own. What is
   * not drawn by itself, such as a tensor, leads to what it is in.
   * @param {string} address
   * @returns {{part: Part, path: string} | null}
   */
  locate(address) {
    const gone = address.startsWith('-') ? '-' : '';
    const [wanted = '', key] = address.slice(gone.length).split(':');
    let part = this.root;
    let here = wanted;
    for (;;) {
      if (!gone && !key && here === part.path) break;
      const next = part.inside().find((each) => leadsTo(each, gone, here));
      if (!next) break;
      const block = next.blocks.find((each) => isWithin(here, each));
      if (block !== undefined) here = next.path + here.slice(block.length);
      part = next;
    }
    const found = (key && operationIn(part, key)) || part;
    if (found === this.root && wanted) return null;
    const drawn = found.path === here;
    const rest = drawn || !found.path ? '' : here.slice(found.path.length);
    return {part: found, path: rest ? wanted.slice(0, -rest.length) : wanted};
  }
}

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
 * An operation that a part has beside its modules.
 * @param {Part} part
 * @param {string} key
 * @returns {Part | undefined}
 */
function operationIn(part, key) {
  const groups = part.inside().filter((each) => each.kind === 'module' && each.id.includes(':'));
  return [part, ...groups].flatMap((each) => each.parts).find((each) => each.node?.key === key);
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
 * Whether the way to a path goes through a part.
 * @param {Part} part
 * @param {string} gone
 * @param {string} path
 */
function leadsTo(part, gone, path) {
  if (part.kind === 'port' || part.id.includes(':')) return false;
  const lost = part.kind === 'run' && part.id.startsWith('-') ? '-' : '';
  if (part.kind === 'run') return lost === gone && part.blocks.some((b) => isWithin(path, b));
  return isWithin(path, part.path);
}

/**
 * @param {string} path
 * @param {string} around
 */
function isWithin(path, around) {
  return path === around || path.startsWith(`${around}.`);
}

/**
 * A path and all that it lies in, the outermost ("") first.
 * @param {string} path
 */
function prefixes(path) {
  const names = path ? path.split('.') : [];
  return ['', ...names.map((_, place) => names.slice(0, place + 1).join('.'))];
}

/**
 * @param {GraphNode} node
 * @param {string} base
 */
function nameOf(node, base) {
  if (node.op !== 'input') return node.op;
  return base ? `input ${node.form ?? ''}` : node.form ?? node.key;
}

/** @param {string} path */
function ownerOf(path) {
  return path.slice(0, Math.max(path.lastIndexOf('.'), 0));
}

/** @param {string} path */
function leafOf(path) {
  return path.slice(path.lastIndexOf('.') + 1);
}

/**
 * @param {string} base
 * @param {string} path
 */
function join(base, path) {
  return base && path ? `${base}.${path}` : base || path;
}

/**
 * @template K, V
 * @param {Map<K, Set<V>>} map
 * @param {K} key
 * @param {V} value
 */
function add(map, key, value) {
  const known = map.get(key);
  if (known) known.add(value);
  else map.set(key, new Set([value]));
}
