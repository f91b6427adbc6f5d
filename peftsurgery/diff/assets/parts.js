'use strict';
/**
 * The model as parts within parts: modules, runs of equal blocks, operations. What is in a part is
 * found when it is first asked for, so a model costs what is open of it.
 */

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
