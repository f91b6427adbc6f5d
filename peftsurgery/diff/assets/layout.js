'use strict';
/**
 * Where parts are drawn. A part that is open is laid out by itself, with what is open in it as boxes
 * of their own size; so what is closed costs nothing, and what did not change is not done again.
 */

/**
 * @typedef {{part: Part, x: number, y: number, width: number, height: number,
 *   inner: Layout | null}} Box
 * @typedef {{points: {x: number, y: number}[], sign: Sign}} Line
 * @typedef {{width: number, height: number, boxes: Box[], lines: Line[]}} Layout
 */

const HEAD = 30;
const BOX = {height: 40, port: 24, least: 64, most: 340, pad: 22};
/** With more parts than this, edges may cross more often than they must. */
const MANY = 200;

class Layouts {
  constructor() {
    /** @type {Map<string, Layout>} */
    this.known = new Map();
    const context = document.createElement('canvas').getContext('2d');
    if (context) context.font = '13px monospace';
    /** The width of a character, in pixels. */
    this.character = context ? context.measureText('m').width : 8;
  }

  /**
   * @param {Part} part
   * @param {Set<string>} open the addresses of open parts
   * @returns {Layout}
   */
  of(part, open) {
    const key = this.key(part, open);
    const known = this.known.get(key);
    if (known) return known;
    const made = this.make(part, open);
    this.known.set(key, made);
    return made;
  }

  /**
   * What a layout depends on: which parts in it are open.
   * @param {Part} part
   * @param {Set<string>} open
   * @returns {string}
   */
  key(part, open) {
    const inner = part.inside().filter((each) => each.holds && open.has(each.id));
    return `${part.id}(${inner.map((each) => this.key(each, open)).join()})`;
  }

  /**
   * @param {Part} part
   * @param {Set<string>} open
   * @returns {Layout}
   */
  make(part, open) {
    const graph = new dagre.graphlib.Graph();
    const parts = part.inside();
    graph.setGraph({nodesep: 16, edgesep: 10, ranksep: 26, marginx: 14, marginy: 14});
    graph.setDefaultEdgeLabel(() => ({}));
    const boxes = parts.map((each) => this.box(each, open));
    boxes.forEach((box, number) => {
      graph.setNode(String(number), {width: box.width, height: box.height});
    });
    const numbers = new Map(parts.map((each, number) => [each, String(number)]));
    const links = [...part.links.values()];
    for (const {from, to} of links) {
      graph.setEdge(numbers.get(from) ?? '', numbers.get(to) ?? '');
    }
    dagre.layout(graph, {disableOptimalOrderHeuristic: parts.length > MANY});
    boxes.forEach((box, number) => {
      const {x, y} = graph.node(String(number));
      box.x = x - box.width / 2;
      box.y = y - box.height / 2;
    });
    const lines = links.map(({from, to, sign}) => {
      const edge = graph.edge(numbers.get(from) ?? '', numbers.get(to) ?? '');
      return {points: edge.points, sign};
    });
    const {width = 0, height = 0} = graph.graph();
    boxes.sort((one, other) => one.y - other.y || one.x - other.x);
    return {width: finite(width), height: finite(height), boxes, lines};
  }

  /**
   * @param {Part} part
   * @param {Set<string>} open
   * @returns {Box}
   */
  box(part, open) {
    const inner = part.holds && open.has(part.id) ? this.of(part, open) : null;
    const {name, note} = labelOf(part);
    const letters = inner ? name.length + note.length + 3 : Math.max(name.length, note.length);
    const sign = part.sign ? 3 : 0;
    const text = Math.min((letters + sign) * this.character + BOX.pad, BOX.most);
    const width = Math.max(text, BOX.least, inner?.width ?? 0);
    const flat = part.kind === 'port' ? BOX.port : BOX.height;
    return {part, x: 0, y: 0, width, height: inner ? inner.height + HEAD : flat, inner};
  }
}

/**
 * What is written on a part: its name, and beneath it what it is.
 * @param {Part} part
 */
function labelOf(part) {
  if (part.kind === 'port') return {name: `from ${part.name}`, note: ''};
  const times = part.blocks.length > 1 ? ` ×${part.blocks.length}` : '';
  const shape = part.node?.shape?.replace(/^[a-z0-9]+/, '') ?? '';
  const by = shape || !part.node?.by ? '' : part.node.by;
  const what = [part.type, part.holds ? '' : shape, by].filter(Boolean).join(' ');
  const note = [part.roles[0], what].filter(Boolean).join(' · ');
  return {name: `${part.name}${times}`, note};
}

/**
 * A line through points, with rounded corners.
 * @param {{x: number, y: number}[]} points
 */
function curve(points) {
  const [first, ...rest] = points;
  const last = rest.pop();
  if (!first || !last) return '';
  let path = `M${at(first)}`;
  rest.forEach((point, number) => {
    const next = rest[number + 1] ?? last;
    const half = {x: (point.x + next.x) / 2, y: (point.y + next.y) / 2};
    path += `Q${at(point)} ${at(number + 1 < rest.length ? half : last)}`;
  });
  return rest.length ? path : `${path}L${at(last)}`;
}

/** @param {{x: number, y: number}} point */
function at(point) {
  return `${point.x.toFixed(1)},${point.y.toFixed(1)}`;
}

/** The size of a graph of nothing is not a number. @param {number} value */
function finite(value) {
  return Number.isFinite(value) ? value : 0;
}
