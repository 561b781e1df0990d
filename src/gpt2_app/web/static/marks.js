// Which characters a model wrote: sorted, apart, {start, end, log_probability?, choices?}. Nothing here changes a list.

// After ``text`` from ``from`` to ``to`` was replaced by ``length`` characters. A token that was cut loses its numbers.
export function edited(marks, from, to, length) {
  const shift = length - (to - from), out = [];
  for (const mark of marks) {
    if (mark.end <= from) out.push(mark);
    else if (mark.start >= to) out.push({ ...mark, start: mark.start + shift, end: mark.end + shift });
    else {
      if (mark.start < from) out.push({ start: mark.start, end: from });
      if (mark.end > to) out.push({ start: to + shift, end: mark.end + shift });
    }
  }
  return out;
}

// With those of tokens that were put in at ``at``.
export function inserted(marks, at, tokens) {
  const out = marks.filter((mark) => mark.end <= at);
  let place = at;
  for (const { text, log_probability, choices } of tokens) {
    if (text) out.push({ start: place, end: place + text.length, log_probability, choices });
    place += text.length;
  }
  return [...out, ...marks.filter((mark) => mark.start >= at)].sort((a, b) => a.start - b.start);
}

// The numbers of all but the last ``most`` tokens are let go, and what then touches is one mark.
export function thinned(marks, most) {
  let left = marks.filter((mark) => mark.choices).length - most;
  const out = [];
  for (const mark of marks) {
    let next = mark;
    if (mark.choices && left-- > 0) next = { start: mark.start, end: mark.end };
    const last = out.at(-1);
    if (last && !last.choices && !next.choices && last.end === next.start) out[out.length - 1] = { start: last.start, end: next.end };
    else out.push(next);
  }
  return out;
}

// What of ``before`` became what of ``after``: [from, to, new length]. ``caret`` is where the change ended.
export function difference(before, after, caret) {
  const tail = Math.min(after.length - caret, before.length);
  let suffix = 0;
  while (suffix < tail && before[before.length - 1 - suffix] === after[after.length - 1 - suffix]) suffix++;
  const most = Math.min(before.length, after.length) - suffix;
  let prefix = 0;
  while (prefix < most && before[prefix] === after[prefix]) prefix++;
  return [prefix, before.length - suffix, after.length - suffix - prefix];
}
