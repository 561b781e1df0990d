// The page: what keys, buttons and addresses do.

import { call } from "./api.js";
import { $, memory, noNotice, notice } from "./dom.js";
import { Documents } from "./documents.js";
import { Editor } from "./editor.js";
import { followPointer, hideToken, showToken, tellToken } from "./popover.js";
import { Settings } from "./settings.js";
import { pack, shared, unpack } from "./share.js";
import { Counter, Suggestions } from "./suggestions.js";

const SWIPE = 60; // pixels

const editor = new Editor();
const settings = new Settings();
const suggestions = new Suggestions(editor, settings);
const counter = new Counter(editor, settings);
const documents = new Documents(editor, settings);

// -- keys -----------------------------------------------------------------------------------------------------

let leaving = false; // after Escape, Tab goes on to the next control, as everywhere

editor.area.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  const command = event.ctrlKey || event.metaKey, plain = !command && !event.altKey;
  if (event.key === "Tab" && plain && !event.shiftKey) {
    if (leaving) return;
    event.preventDefault();
    suggestions.ask();
  } else if (event.key === "Escape") {
    leaving = !suggestions.dismiss();
    return;
  } else if (suggestions.isOpen && plain && event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    suggestions.accept();
  } else if (suggestions.isOpen && plain && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
    event.preventDefault();
    suggestions.select(event.key === "ArrowDown" ? 1 : -1);
  } else if (command && !event.altKey && event.key.toLowerCase() === "z") {
    event.preventDefault();
    if (event.shiftKey) editor.redo();
    else editor.undo();
  } else if (command && !event.altKey && event.key.toLowerCase() === "y") {
    event.preventDefault();
    editor.redo();
  } else if (command && event.key === ".") {
    event.preventDefault();
    showAtCaret();
  } else if (suggestions.isOpen && ["ArrowLeft", "ArrowRight", "Home", "End", "PageUp", "PageDown"].includes(event.key)) {
    suggestions.dismiss(true);
  }
  leaving = false;
});
editor.area.addEventListener("blur", () => { leaving = false; });
editor.area.addEventListener("pointerdown", () => suggestions.dismiss(true));
editor.area.addEventListener("keyup", hideOnMove);

function hideOnMove(event) {
  if (event.key.startsWith("Arrow")) hideToken();
}

function showAtCaret() {
  const mark = editor.markAt(editor.caret), span = mark && editor.spanOf(mark);
  if (!span) return;
  showToken(span);
  tellToken(mark, span.textContent);
}

followPointer($("paper"));
addEventListener("scroll", hideToken, { passive: true });

$("ask").addEventListener("pointerdown", (event) => event.preventDefault());
$("ask").addEventListener("click", () => {
  editor.area.focus({ preventScroll: true });
  suggestions.ask();
});

// -- fingers --------------------------------------------------------------------------------------------------

let touched = null;
editor.area.addEventListener("touchstart", (event) => {
  touched = event.touches.length === 1 ? [event.touches[0].clientX, event.touches[0].clientY] : null;
}, { passive: true });
editor.area.addEventListener("touchend", (event) => {
  if (!touched || String(getSelection())) return;
  const [x, y] = touched, { clientX, clientY } = event.changedTouches[0];
  touched = null;
  if (Math.abs(clientX - x) < SWIPE || Math.abs(clientY - y) > SWIPE / 2) return;
  if (clientX > x) suggestions.ask();
  else suggestions.dismiss();
}, { passive: true });

// -- panels ---------------------------------------------------------------------------------------------------

const panels = ["documents", "settings", "share"];

function toggle(name, open = $(name).hidden) {
  for (const each of panels) {
    const shown = each === name && open;
    $(each).hidden = !shown;
    $(`open-${each}`).setAttribute("aria-expanded", String(shown));
  }
  if (!open) return;
  $(name).querySelector(".close").focus();
  documents.sure = null;
  if (name === "documents") documents.fill().catch(failed);
  if (name === "share") makeLink().catch(failed);
}

for (const name of panels) {
  $(`open-${name}`).addEventListener("click", () => toggle(name));
  const close = () => {
    toggle(name, false);
    $(`open-${name}`).focus();
  };
  $(name).querySelector(".close").addEventListener("click", close);
  $(name).addEventListener("keydown", (event) => event.key === "Escape" && close());
}
editor.area.addEventListener("focus", () => { for (const each of panels) if (!$(each).hidden && innerWidth < 1100) toggle(each, false); });

$("new").addEventListener("click", async () => {
  await documents.save();
  documents.start();
  toggle("documents", false);
  editor.place(0);
});
$("delete").addEventListener("click", () => documents.remove().catch(failed));
settings.addEventListener("change", () => counter.soon());
suggestions.addEventListener("asked", ({ detail }) => settings.sayLastSeed(detail.seed));
documents.addEventListener("opened", () => {
  suggestions.dismiss(true);
  suggestions.last = null;
  counter.soon();
});

function failed(error) {
  notice(error.message, [["Close", noNotice]]);
}

// -- links ----------------------------------------------------------------------------------------------------

async function makeLink() {
  const value = shared($("title").value, editor.text, editor.marks, suggestions.last);
  $("link").value = `${location.origin}/share#${await pack(value)}`;
  $("copy").textContent = "Copy";
}

$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText($("link").value);
    $("copy").textContent = "Copied";
  } catch {
    $("link").select(); // where the clipboard is not ours, the keyboard's is
  }
});

async function openShared() {
  const { title, text, marks, ask } = await unpack(location.hash.slice(1));
  documents.stopped = true; // read, and not kept unless it is asked for
  $("title").value = title;
  editor.load(text, marks);
  counter.soon();
  const keep = () => {
    noNotice();
    documents.stopped = false;
    documents.touch();
  };
  const replay = () => {
    if (ask.model && !settings.has(ask.model)) {
      notice(`This was written by ${ask.model}, which is not on this machine.`, [["Keep a copy", keep]]);
      return;
    }
    settings.load(ask);
    if (editor.text !== ask.context) editor.replace(ask.context, editor.marks.filter((mark) => mark.end <= ask.context.length));
    editor.place(ask.context.length);
    suggestions.ask({ n_samples: 3, ...settings.request(), ...ask });
  };
  notice("A shared text.", [...(ask ? [["Replay the suggestion", replay]] : []), ["Keep a copy", keep]], true);
}

// -- addresses ------------------------------------------------------------------------------------------------

async function begin() {
  settings.offer(await call("GET", "/api/models"));
  const [, kind, ...rest] = location.pathname.split("/");
  const name = decodeURIComponent(rest.join("/"));
  if (kind === "share" && location.hash.length > 1) await openShared();
  else if (kind === "doc") {
    documents.start(location.pathname);
    if (settings.has(name)) settings.load({ model: name });
    else notice(`${name} is not on this machine; this text is written with ${settings.values.model}.`, [["Close", noNotice]]);
  } else if (kind === "d") await documents.open(name);
  else await openLast();
  counter.soon();
  editor.place(editor.text.length);
  document.documentElement.dataset.ready = "true";
}

async function openLast() {
  const last = memory.get("last");
  if (last) {
    try {
      await documents.open(last);
      return;
    } catch (error) {
      if (error.status !== 404) throw error;
    }
  }
  documents.start();
}

begin().catch((error) => {
  failed(error);
  documents.start();
  document.documentElement.dataset.ready = "true";
});
