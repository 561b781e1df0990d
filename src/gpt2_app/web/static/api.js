// The server: JSON in and out, and the stream of a suggestion.

export class Refused extends Error {
  constructor(status, body, retryAfter) {
    super(body?.error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.body = body;
    this.retryAfter = retryAfter;
  }
}

async function refusal(response) {
  let body = null;
  try { body = await response.json(); } catch { /* no JSON */ }
  return new Refused(response.status, body, Number(response.headers.get("retry-after")) || null);
}

export async function call(method, path, body, options = {}) {
  const response = await fetch(path, {
    method,
    headers: body === undefined ? {} : { "content-type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
    ...options,
  });
  if (!response.ok) throw await refusal(response);
  return response.status === 204 ? null : response.json();
}

// Server-sent events of a POST, as [name, data]. Aborting the signal tells the server to stop.
export async function* events(path, body, signal) {
  const response = await fetch(path, {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      const parts = held.split("\n\n");
      held = parts.pop();
      for (const part of parts) {
        let name = "message", data = "";
        for (const line of part.split("\n")) {
          if (line.startsWith("event: ")) name = line.slice(7);
          if (line.startsWith("data: ")) data += line.slice(6);
        }
        yield [name, JSON.parse(data)];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
