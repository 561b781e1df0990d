// A link that carries a text, what it was written with, and the last suggestion's seed. It is all behind the #, which
// browsers do not send: nothing is stored anywhere.

const LONGEST = 2_000_000;

export async function pack(value) {
  const bytes = new TextEncoder().encode(JSON.stringify(value));
  const squeezed = await through(bytes, new CompressionStream("deflate-raw"));
  let text = "";
  for (const byte of squeezed) text += String.fromCharCode(byte);
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

export async function unpack(packed) {
  if (packed.length > LONGEST) throw new Error("the link is too long");
  const text = atob(packed.replaceAll("-", "+").replaceAll("_", "/"));
  const bytes = await through(Uint8Array.from(text, (each) => each.charCodeAt(0)), new DecompressionStream("deflate-raw"));
  return checked(JSON.parse(new TextDecoder().decode(bytes)));
}

async function through(bytes, stream) {
  const reader = new Blob([bytes]).stream().pipeThrough(stream).getReader();
  const parts = [];
  let size = 0;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    size += value.length;
    if (size > 8 * LONGEST) throw new Error("the link holds too much");
    parts.push(value);
  }
  const out = new Uint8Array(size);
  let at = 0;
  for (const part of parts) {
    out.set(part, at);
    at += part.length;
  }
  return out;
}

// Links come from strangers: only what is known is taken, and only as what it should be.
function checked(value) {
  if (value?.v !== 1 || typeof value.text !== "string" || typeof value.title !== "string") throw new Error("the link is damaged");
  const marks = (Array.isArray(value.marks) ? value.marks : [])
    .filter((pair) => Array.isArray(pair) && pair.every(Number.isInteger) && 0 <= pair[0] && pair[0] < pair[1] && pair[1] <= value.text.length)
    .map(([start, end]) => ({ start, end })).sort((a, b) => a.start - b.start)
    .filter((mark, i, all) => i === 0 || all[i - 1].end <= mark.start);
  return { title: value.title.slice(0, 200), text: value.text.slice(0, 1_000_000), marks, ask: checkedAsk(value.ask, value.text) };
}

function checkedAsk(ask, text) {
  if (!ask || typeof ask !== "object") return null;
  const out = { context: typeof ask.context === "string" ? ask.context : text.slice(0, Number(ask.at) || 0) };
  for (const name of ["temperature", "top_p", "top_k", "length", "max_time", "seed", "n_samples"]) {
    if (typeof ask[name] === "number" && Number.isFinite(ask[name])) out[name] = ask[name];
  }
  for (const name of ["model", "framework"]) if (typeof ask[name] === "string") out[name] = ask[name];
  return out;
}

export function shared(title, text, marks, last) {
  let ask = null;
  if (last) {
    const { context, ...rest } = last;
    ask = text.startsWith(context) ? { ...rest, at: context.length } : last;
  }
  const ranges = [];
  for (const { start, end } of marks) {
    if (ranges.length && ranges.at(-1)[1] === start) ranges.at(-1)[1] = end;
    else ranges.push([start, end]);
  }
  return { v: 1, title, text, marks: ranges, ask };
}
