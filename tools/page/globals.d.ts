/** What the layout library of the page declares; the file itself is dagre.min.js. */
declare const dagre: {
  graphlib: {
    Graph: new () => LayoutGraph;
  };
  layout(graph: LayoutGraph, options?: {disableOptimalOrderHeuristic?: boolean}): void;
};

interface LayoutGraph {
  setGraph(label: Record<string, number>): void;
  graph(): {width?: number; height?: number};
  setDefaultEdgeLabel(make: () => object): void;
  setNode(name: string, label: {width: number; height: number}): void;
  node(name: string): {x: number; y: number};
  setEdge(from: string, to: string): void;
  edge(from: string, to: string): {points: {x: number; y: number}[]};
}
