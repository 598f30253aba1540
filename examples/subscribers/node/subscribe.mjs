// Reads a topology's results with nothing but an MQTT client and a msgpack library.
//
//   npm install
//   node subscribe.mjs mqtt://127.0.0.1:18830 'digits/digits/out/#' [count]

import { decode } from "@msgpack/msgpack";
import mqtt from "mqtt";

const [url = "mqtt://127.0.0.1:18830", topic = "digits/digits/out/#", count = "Infinity"] = process.argv.slice(2);

// A tensor is {dtype: "<f4", shape: [2, 3], data: Uint8Array}: C order, little endian.
const readers = {
  "|b1": [1, (v, i) => v.getUint8(i) !== 0],
  "|i1": [1, (v, i) => v.getInt8(i)],
  "|u1": [1, (v, i) => v.getUint8(i)],
  "<i2": [2, (v, i) => v.getInt16(i, true)],
  "<u2": [2, (v, i) => v.getUint16(i, true)],
  "<i4": [4, (v, i) => v.getInt32(i, true)],
  "<u4": [4, (v, i) => v.getUint32(i, true)],
  "<i8": [8, (v, i) => v.getBigInt64(i, true)],
  "<u8": [8, (v, i) => v.getBigUint64(i, true)],
  "<f4": [4, (v, i) => v.getFloat32(i, true)],
  "<f8": [8, (v, i) => v.getFloat64(i, true)],
};

function values({ dtype, shape, data }) {
  if (!(dtype in readers)) throw new Error(`no reader for ${dtype}`);
  const [size, read] = readers[dtype];
  // The bytes are a view on the packet, at any offset: a DataView reads them where they are.
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  const n = shape.reduce((a, b) => a * b, 1);
  return Array.from({ length: n }, (_, i) => read(view, i * size));
}

function line({ type, id, body }) {
  if (type !== "predictions/1") return `${id}  ${type}  ${JSON.stringify(body, (_, v) => (typeof v === "bigint" ? String(v) : v))}`;
  const scores = values(body.scores);
  const answers = body.labels.map((label, i) => `${label} ${scores[i].toFixed(2)}`).join(", ");
  const known = body.attributes?.label;
  return `${id}  ${answers || "nothing"}${known === undefined ? "" : `  (it is ${known})`}`;
}

let seen = 0;
const client = mqtt.connect(url, { protocolVersion: 5 });
client.on("connect", () => {
  console.log("connected");
  client.subscribe(topic);
});
client.on("error", (error) => console.error(error.message));
client.on("message", (name, payload) => {
  // Times are nanoseconds: more than a double holds exactly, so whole numbers of 64 bits come as BigInt.
  const message = decode(payload, { useBigInt64: true });
  console.log(name, line(message));
  if (++seen >= Number(count)) client.end();
});
