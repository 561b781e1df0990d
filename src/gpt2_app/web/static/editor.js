// The text: a plain textarea that nobody sees, and behind it a mirror that shows the same text with what is known of it.
//
// The textarea keeps everything that people expect of one (keyboards, screen readers, selections); the mirror adds the
// tint, the ghost and the window's edge. Undo is our own, as the browser's knows nothing of tints.

import { $, element } from "./dom.js";
import { difference, edited, inserted, thinned } from "./marks.js";

const TOGETHER = 900; // ms: keystrokes closer than this are undone together
const STATES = 300;
const DETAILED = 600; // tokens whose numbers are kept

export class Editor extends EventTarget {
  constructor() {
    super();
    this.area = $("text");
    this.mirror = $("mirror");
    this.text = "";
    this.marks = [];
    this.ghost = null; // {at, tokens}
    this.windowStart = 0;
    this.windowLabel = "";
    this.drawn = false;
    this.load("", []);
    this.area.addEventListener("input", (event) => this.#typed(event));
    this.area.addEventListener("beforeinput", (event) => {
      if (event.inputType === "historyUndo" || event.inputType === "historyRedo") {
        event.preventDefault();
        if (event.inputType === "historyUndo") this.undo();
        else this.redo();
      }
    });
  }

  // A text to begin with: nothing before it can be undone.
  load(text, marks) {
    this.text = this.area.value = text;
    this.text = this.area.value; // as the browser keeps its line feeds
    this.marks = marks.filter((mark) => mark.start < mark.end && mark.end <= this.text.length);
    this.states = [{ text: this.text, marks: this.marks, caret: this.text.length }];
    this.state = 0;
    this.lastTyped = 0;
    this.ghost = null;
    this.windowStart = 0;
    this.draw();
  }

  get caret() { return this.area.selectionEnd; }

  place(caret) {
    this.area.focus({ preventScroll: true });
    this.area.setSelectionRange(caret, caret);
  }

  #typed(event) {
    const after = this.area.value;
    const [from, to, length] = difference(this.text, after, this.area.selectionEnd);
    this.marks = edited(this.marks, from, to, length);
    this.text = after;
    this.ghost = null;
    const now = performance.now();
    const joins = now - this.lastTyped < TOGETHER && this.state > 0 && !this.states[this.state].sealed && event.inputType !== "insertFromPaste";
    this.#remember(joins);
    this.lastTyped = now;
    this.draw();
    this.dispatchEvent(new Event("change"));
    this.dispatchEvent(new Event("typed"));
  }

  #remember(joins, sealed = false) {
    const state = { text: this.text, marks: this.marks, caret: this.area.selectionEnd, sealed };
    if (joins) this.states[this.state] = state;
    else {
      this.states.splice(this.state + 1, this.states.length, state);
      if (this.states.length > STATES) this.states.shift();
      this.state = this.states.length - 1;
    }
  }

  // Puts in what a model wrote, as one step.
  accept(at, tokens) {
    const added = tokens.map((token) => token.text).join("");
    this.marks = thinned(inserted(edited(this.marks, at, at, added.length), at, tokens), DETAILED);
    this.#replace(this.text.slice(0, at) + added + this.text.slice(at), at + added.length);
    this.#remember(false, true);
    this.dispatchEvent(new Event("change"));
  }

  // Another text, as one step.
  replace(text, marks) {
    this.marks = marks;
    this.#replace(text, text.length);
    this.#remember(false, true);
    this.dispatchEvent(new Event("change"));
  }

  #replace(text, caret) {
    this.text = this.area.value = text;
    this.ghost = null;
    this.place(caret);
    this.draw();
  }

  undo() { this.#go(this.state - 1); }

  redo() { this.#go(this.state + 1); }

  #go(state) {
    if (!(state in this.states)) return;
    const where = state < this.state ? this.#changedAt(this.states[state], this.states[this.state]) : this.states[state].caret;
    this.state = state;
    this.lastTyped = 0;
    this.marks = this.states[state].marks;
    this.#replace(this.states[state].text, where);
    this.dispatchEvent(new Event("change"));
    this.dispatchEvent(new Event("typed"));
  }

  #changedAt(to, from) {
    const [start, end] = difference(to.text, from.text, from.caret);
    return Math.max(start, end);
  }

  show(ghost) {
    this.ghost = ghost;
    this.draw();
  }

  setWindow(start, label) {
    if (start === this.windowStart && label === this.windowLabel) return;
    this.windowStart = start;
    this.windowLabel = label;
    this.draw();
  }

  // Once for each picture that the browser shows.
  draw() {
    if (this.drawn) return;
    this.drawn = true;
    requestAnimationFrame(() => {
      this.drawn = false;
      this.#draw();
      this.dispatchEvent(new Event("drawn"));
    });
  }

  #draw() {
    const out = document.createDocumentFragment();
    const cuts = new Set([0, this.text.length, Math.min(this.windowStart, this.text.length)]);
    if (this.ghost) cuts.add(this.ghost.at);
    for (const mark of this.marks) cuts.add(mark.start).add(mark.end);
    const places = [...cuts].sort((a, b) => a - b);
    let next = 0;
    for (let i = 0; i < places.length; i++) {
      const start = places[i], end = places[i + 1] ?? start;
      if (start === this.windowStart && start > 0) out.append(element("span", { className: "edge", "data-label": this.windowLabel }));
      if (this.ghost && start === this.ghost.at) out.append(this.#ghostSpan());
      if (end === start) continue;
      while (next < this.marks.length && this.marks[next].end <= start) next++;
      const mark = this.marks[next];
      out.append(this.#piece(start, end, mark && mark.start <= start ? mark : null));
    }
    out.append("\u200b"); // so that a line feed at the end has its line
    this.mirror.replaceChildren(out);
    const edge = this.mirror.querySelector(".edge");
    edge?.classList.toggle("late", edge.offsetLeft > this.mirror.clientWidth / 2);
  }

  #piece(start, end, mark) {
    const text = this.text.slice(start, end), outside = end <= this.windowStart;
    if (!mark && !outside) return text;
    const span = element("span", {}, text);
    if (outside) span.classList.add("outside");
    if (mark) span.classList.add("model");
    if (mark?.choices) {
      span.classList.add("token");
      span.mark = mark;
    }
    return span;
  }

  #ghostSpan() {
    return element("span", { className: "ghost" }, this.ghost.tokens.map((token) => token.text).join(""));
  }

  // Where the ghost, or else the caret's end of the text before it, is drawn.
  lineAt() {
    const ghost = this.mirror.querySelector(".ghost");
    const box = (ghost ?? this.mirror).getClientRects();
    const last = box[box.length - 1];
    const paper = this.mirror.getBoundingClientRect();
    return { bottom: (last?.bottom ?? paper.top + 36) - paper.top };
  }

  markAt(caret) {
    return this.marks.find((mark) => mark.choices && mark.start < caret && caret <= mark.end) ?? null;
  }

  spanOf(mark) {
    return [...this.mirror.querySelectorAll(".token")].find((span) => span.mark === mark) ?? null;
  }
}
