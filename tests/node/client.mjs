// A client that is not ours: publishes jobs, reads their results, calls a workflow, and looks at the services.
// Arguments: URL, token, namespace. Prints what it found as one JSON object.

import { connect } from "@nats-io/transport-node";
import { jetstream, jetstreamManager } from "@nats-io/jetstream";
import { Svcm } from "@nats-io/services";

const [url, token, namespace] = process.argv.slice(2);
const nc = await connect({ servers: url, token, name: "not-ours" });
const js = jetstream(nc, { timeout: 30_000 });
const jsm = await jetstreamManager(nc, { timeout: 30_000 });

async function submit(workflow, body, msgID) {
  const receipt = await js.publish(`${namespace}.job.${workflow}`, JSON.stringify(body), msgID ? { msgID } : {});
  return { id: msgID ?? `job-${receipt.seq}`, duplicate: receipt.duplicate };
}

async function result(id) {
  const subject = `${namespace}.result.${id}`;
  const live = nc.subscribe(subject, { max: 1, timeout: 30_000 });
  await nc.flush();
  const kept = await jsm.streams.getMessage(`${namespace}-results`, { last_by_subj: subject }).catch(() => null);
  if (kept) {
    live.unsubscribe();
    return kept.json();
  }
  for await (const message of live) {
    return message.json();
  }
}

async function call(name, body) {
  const answer = await nc.request(`${namespace}.call.${name}`, JSON.stringify(body), { timeout: 30_000 });
  const code = answer.headers?.get("Nats-Service-Error-Code");
  return code ? { code: Number(code), error: answer.headers.get("Nats-Service-Error") } : { value: answer.json() };
}

const first = await submit("answer", { question: "why?", times: 2 });
const second = await submit("answer", ["how?"], "mine");
const repeated = await submit("answer", ["how?"], "mine");
const wrong = await submit("answer", { quest: 1 });
const failing = await submit("broken", ["x"]);

const found = {
  submitted: { first, second, repeated },
  results: {
    first: await result(first.id),
    second: await result("mine"),
    wrong: await result(wrong.id),
    failing: await result(failing.id),
  },
  calls: {
    right: await call("answer", { question: "who?" }),
    wrong: await call("answer", { question: 5 }),
    nobody: await call("nobody", {}),
  },
  services: [],
};

const services = new Svcm(nc).client({ strategy: "count", maxMessages: 1, maxWait: 30_000 });
for await (const info of await services.info(namespace)) {
  found.services.push({ name: info.name, endpoints: info.endpoints.map((endpoint) => [endpoint.name, endpoint.subject]) });
}

console.log(JSON.stringify(found));
await nc.drain();
