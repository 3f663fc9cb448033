// Runs a script of Filebeat's for each message on standard input: {"path", "message"} a line; prints the fields of each.
const fs = require("fs");
const vm = require("vm");

class Event {
  constructor(fields) { this.fields = fields; }
  Get(name) { return name.split(".").reduce((at, key) => (at == null ? at : at[key]), this.fields) ?? null; }
  Put(name, value) {
    const keys = name.split("."), last = keys.pop();
    const place = keys.reduce((at, key) => (at[key] ??= {}), this.fields);
    if (place === null || typeof place !== "object") throw new Error(`${name}: not an object`);
    place[last] = value;
  }
}

const context = vm.createContext({});
vm.runInContext(fs.readFileSync(process.argv[2], "utf8"), context);
for (const line of fs.readFileSync(0, "utf8").split("\n").filter(Boolean)) {
  const { path, message } = JSON.parse(line);
  const event = new Event({ message, log: { file: { path } } });
  context.process(event);
  console.log(JSON.stringify(event.fields));
}
