// Small helpers. Text always goes in as text: nothing here takes markup.

export const $ = (id) => document.getElementById(id);

export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

export function percent(logProbability) {
  const share = Math.exp(logProbability) * 100;
  if (share >= 99.95) return "100 %";
  return share >= 10 ? `${share.toFixed(0)} %` : share >= 0.1 ? `${share.toFixed(1)} %` : "< 0.1 %";
}

// Said to screen readers.
export function say(text) {
  $("live").textContent = text;
}

export function notice(text, buttons = [], calm = false) {
  const box = $("notice");
  box.replaceChildren(element("p", {}, text), ...buttons.map(([label, act]) => {
    const button = element("button", { type: "button" }, label);
    button.addEventListener("click", act);
    return button;
  }));
  box.classList.toggle("calm", calm);
  box.hidden = false;
}

export function noNotice() {
  $("notice").hidden = true;
}

// Storage may be switched off; the page then forgets, and works.
export const memory = {
  get(key) {
    try { return JSON.parse(localStorage.getItem(`gpt2-write:${key}`)); } catch { return null; }
  },
  set(key, value) {
    try {
      if (value === null) localStorage.removeItem(`gpt2-write:${key}`);
      else localStorage.setItem(`gpt2-write:${key}`, JSON.stringify(value));
    } catch { /* full or forbidden */ }
  },
};
