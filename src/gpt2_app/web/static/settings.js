// What a text is written with: the form, what a document remembers of it, and colours.

import { $, element, memory } from "./dom.js";

const NAMES = { pt: "PyTorch", tf: "TensorFlow", numpy: "numpy (reference)" };
const DEFAULTS = { temperature: 0.8, top_p: 0.95, top_k: 40, length: 20, max_time: 10, seed: null };
const RANGES = ["temperature", "top_p", "top_k", "length", "max_time"];
const SAID = {
  temperature: (value) => (value ? value.toFixed(2) : "the likeliest"), top_p: (value) => (value < 1 ? value.toFixed(2) : "off"),
  top_k: (value) => (value ? String(value) : "off"), length: (value) => `${value} tokens`, max_time: (value) => `${value} s`,
};

export class Settings extends EventTarget {
  constructor() {
    super();
    this.values = { ...DEFAULTS, model: null, framework: null };
    $("form").addEventListener("submit", (event) => event.preventDefault());
    $("form").addEventListener("input", () => this.#read());
    this.#theme();
  }

  // ``known`` is what the server has.
  offer(known) {
    this.known = known;
    $("model").replaceChildren(...known.models.map(({ name, window }) =>
      element("option", { value: name }, `${name} · ${window.toLocaleString("en")} tokens`)));
    $("framework").replaceChildren(...known.frameworks.map((name) => element("option", { value: name }, NAMES[name] ?? name)));
    this.values.model = known.default;
    this.values.framework = known.frameworks[0];
    this.load(memory.get("settings") ?? {});
  }

  has(model) { return this.known.models.some(({ name }) => name === model); }

  // What is not there, or not on this machine, stays as it is.
  load(values) {
    for (const [name, value] of Object.entries(values ?? {})) {
      if (value === null && name !== "seed") continue;
      if (name === "model" && !this.has(value)) continue;
      if (name === "framework" && !this.known.frameworks.includes(value)) continue;
      if (name in this.values) this.values[name] = value;
    }
    for (const name of RANGES) $(name).value = this.values[name];
    $("model").value = this.values.model;
    $("framework").value = this.values.framework;
    $("seed").value = this.values.seed ?? "";
    this.#say();
  }

  #read() {
    for (const name of RANGES) this.values[name] = Number($(name).value);
    this.values.model = $("model").value;
    this.values.framework = $("framework").value;
    if ($("seed").validity.valid) this.values.seed = $("seed").value === "" ? null : Number($("seed").value);
    this.#say();
    memory.set("settings", { ...this.values, seed: null });
    this.dispatchEvent(new Event("change"));
  }

  #say() {
    for (const name of RANGES) {
      document.querySelector(`output[for="${name}"]`).textContent = SAID[name](this.values[name]);
      $(name).setAttribute("aria-valuetext", SAID[name](this.values[name]));
    }
    $("using").textContent = `${this.values.model} · ${NAMES[this.values.framework] ?? this.values.framework}`;
  }

  sayLastSeed(seed) {
    const keep = element("button", { type: "button", className: "link" }, "keep it");
    keep.addEventListener("click", () => {
      $("seed").value = seed;
      this.#read();
    });
    $("last-seed").replaceChildren(`The last suggestion's was ${seed}: `, keep);
  }

  request() {
    const { seed, ...rest } = this.values;
    return { ...rest, n_samples: 3, ...(seed === null ? {} : { seed }) };
  }

  #theme() {
    const choose = $("theme");
    choose.value = memory.get("theme") ?? "auto";
    const apply = () => {
      if (choose.value === "auto") delete document.documentElement.dataset.theme;
      else document.documentElement.dataset.theme = choose.value;
    };
    choose.addEventListener("input", (event) => {
      event.stopPropagation();
      memory.set("theme", choose.value === "auto" ? null : choose.value);
      apply();
    });
    apply();
  }
}
