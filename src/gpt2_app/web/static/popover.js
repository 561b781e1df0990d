// How likely a token was, and what else might have come: on hovering, and on Ctrl+. for the token at the caret.

import { $, element, percent, say } from "./dom.js";

let shown = null;

function rows(mark, text) {
  const listed = mark.choices.some((choice) => choice.log_probability === mark.log_probability);
  const all = listed ? mark.choices : [...mark.choices, { text, log_probability: mark.log_probability, taken: true }];
  return all.map((choice) => {
    const taken = choice.taken || choice.log_probability === mark.log_probability;
    const bar = element("span", { className: "share" });
    bar.style.width = `${Math.max(1, Math.exp(choice.log_probability) * 100)}%`;
    return element("tr", { className: taken ? "taken" : "" },
      element("td", {}, visible(choice.text)), element("td", {}, bar), element("td", {}, percent(choice.log_probability)));
  });
}

const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replace(/^ | $/g, "\u00a0");

export function showToken(span) {
  if (shown === span) return;
  hideToken();
  shown = span;
  span.classList.add("seen");
  const { mark } = span, box = $("popover"), text = span.textContent;
  box.replaceChildren(element("p", {}, `${percent(mark.log_probability)} likely, under the model itself`),
    element("table", {}, element("tbody", {}, ...rows(mark, text))));
  box.hidden = false;
  const at = span.getBoundingClientRect(), size = box.getBoundingClientRect();
  const above = at.top - size.height - 8;
  box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - size.width - 8))}px`;
  box.style.top = `${above > 8 ? above : at.bottom + 8}px`;
}

export function hideToken() {
  shown?.classList.remove("seen");
  shown = null;
  $("popover").hidden = true;
}

export function tellToken(mark, text) {
  const others = mark.choices.map((choice) => `${choice.text.trim() || "space"} ${percent(choice.log_probability)}`);
  say(`${text.trim()}: ${percent(mark.log_probability)}. Likeliest: ${others.join(", ")}`);
}

// The token under the pointer; the textarea lies over the mirror, so what is below has to be asked for.
export function followPointer(root) {
  root.addEventListener("pointermove", (event) => {
    if (event.pointerType === "touch") return;
    const span = document.elementsFromPoint(event.clientX, event.clientY).find((each) => each.mark);
    if (span) showToken(span);
    else hideToken();
  });
  root.addEventListener("pointerleave", hideToken);
}
