'use strict';
/**
 * What a page is given: the JSON that peftsurgery/diff/overlay.py makes, schema peftsurgery.page/1.
 *
 * @typedef {'' | '+' | '-' | '~' | '>'} Sign added, removed, changed, renamed; '' is as it was
 *
 * @typedef {object} GraphNode an operation; `in` and `was` are places in the list it stands in
 * @property {string} key
 * @property {string} op
 * @property {string} [module]
 * @property {number[]} [in]
 * @property {number[]} [was]
 * @property {string} [form]
 * @property {string} [shape]
 * @property {string} [code]
 * @property {string} [by]
 * @property {Sign} [sign]
 * @property {Record<string, string>} [old]
 * @property {string} [after] its key in the second model, if that is another
 *
 * @typedef {{kind: string, types: Record<string, string>, nodes: GraphNode[]}} Graph
 * @typedef {{path?: string, graphs?: number[], sign?: Sign, was?: string}} BlockEntry
 * @typedef {{name: string, text: string, kind: string, trained: boolean, tied?: string,
 *   sign?: Sign, was?: string, old?: Record<string, unknown>}} TensorEntry
 * @typedef {{name: string, kind: string, role?: string, facts?: Record<string, string>,
 *   bindings?: Record<string, string>, sign?: Sign, was?: string,
 *   old?: Record<string, unknown>}} SiteEntry
 * @typedef {{name: string, adapter: string, module?: string, role: string, parameters?: string[],
 *   rule: number, sign?: Sign, would?: boolean}} InsertionEntry
 * @typedef {{part: string, sign: Sign, where: string, text: string, count: number,
 *   at: string[]}} Change
 *
 * @typedef {object} PageData
 * @property {string} kind
 * @property {boolean} compared whether two models are laid over each other
 * @property {[string, string]} names
 * @property {Graph[]} graphs
 * @property {BlockEntry[]} blocks
 * @property {TensorEntry[]} tensors
 * @property {SiteEntry[]} sites
 * @property {InsertionEntry[]} insertions
 * @property {string[][]} rules
 * @property {Change[]} changes
 *
 * @typedef {'both' | 'a' | 'b'} Side which of the models is shown
 * @typedef {{from: Part, to: Part, sign: Sign}} Link
 */
