// Probabilities of llama.cpp after each token: llama_reader.mjs HOME MODEL.gguf ADAPTER.gguf|- IDS
// Prints a list of [token, probability] lists as JSON. HOME has npm's node-llama-cpp.
import {readFile} from "node:fs/promises";
import {pathToFileURL} from "node:url";

const [, , home, modelPath, filePath, ids] = process.argv;
const {getLlama} = await import(pathToFileURL(`${home}/node_modules/node-llama-cpp/dist/index.js`));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath});
const lora = filePath === "-" ? undefined : {adapters: [{filePath, scale: 1}]};
const context = await model.createContext({contextSize: 64, lora, flashAttention: false});
const tokens = JSON.parse(await readFile(ids, "utf8"));
const asked = tokens.map((token) => [token, {generateNext: {probabilities: true}}]);
const found = await context.getSequence().controlledEvaluate(asked);
const said = JSON.stringify(found.map((each) => [...each.next.probabilities.entries()]));
process.stdout.write(said, () => process.exit(0));
