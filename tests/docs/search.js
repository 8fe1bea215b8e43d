// The search of the built site, in Node: `node search.js WORKER INDEX STEMS`, queries as a JSON list on the standard input.
// Prints for each query the addresses that are found, best first. The scripts are those that a browser runs.
const fs = require("fs");
const vm = require("vm");

const [worker, index, stems] = process.argv.slice(2);
const queries = JSON.parse(fs.readFileSync(0, "utf8"));
let receive, answer;
const scope = {
  console,
  addEventListener: (_, listener) => { receive = listener; },
  postMessage: (message) => { answer = message; },
};
scope.self = scope;
vm.createContext(scope);
for (const script of [worker, stems]) vm.runInContext(fs.readFileSync(script, "utf8"), scope);

async function ask(type, data) {
  answer = undefined;
  await receive({ data: { type, data } });
  while (answer === undefined) await new Promise((done) => setImmediate(done));
  return answer.data;
}

(async () => {
  const { config, docs } = JSON.parse(fs.readFileSync(index, "utf8"));
  await ask(0, { config, docs, options: {} });
  const found = [];
  for (const query of queries) found.push((await ask(2, scope.withStems(query))).items.map((group) => group.map((u) => u.location)));
  console.log(JSON.stringify(found));
})();
