// The cards of the responses and the slots below them. All text goes in as text, never as markup.

import {makeDraggable} from "./drag.js";
import {LETTERS} from "./ranking.js";

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children); // strings become text nodes
  return made;
}

// A text, or the messages of a conversation.
export function fillText(box, text) {
  if (typeof text === "string") {
    box.textContent = text;
    return;
  }
  box.replaceChildren(...text.map(({role, content}) =>
    element("div", {class: "message"}, element("strong", {class: "role"}, role), element("div", {}, content))));
}

// What can be corrected: a text, or the one message that a response is.
export function editableText(text) {
  if (typeof text === "string") return text;
  return text.length === 1 ? text[0].content : null;
}

function choices(legend, name, values, choose) {
  const set = element("fieldset", {}, element("legend", {}, legend));
  for (const [value, label, spoken] of values) {
    const input = element("input", {type: "radio", name, value: String(value), "aria-label": spoken});
    input.addEventListener("change", () => choose(value));
    set.append(element("span", {class: "choice"}, input, element("span", {"aria-hidden": "true"}, label)));
  }
  return set;
}

function chip(i, drop) {
  const made = element("span", {class: "chip", "aria-hidden": "true", title: "Drag to a rank"}, LETTERS[i]);
  made.dataset.response = String(i);
  makeDraggable(made, (slot) => drop(i, slot.dataset.rank === "" ? null : Number(slot.dataset.rank)));
  return made;
}

function correction(i, text, changed) {
  const id = `text-${i}`;
  const button = element("button", {type: "button", "aria-expanded": "false", "aria-controls": id, class: "quiet"});
  button.append("Correct the text");
  const area = element("textarea", {id, "aria-label": `Corrected text of response ${LETTERS[i]}`, dir: "auto"});
  area.hidden = true;
  area.value = text; // which turns CRLF into LF
  area.addEventListener("input", changed);
  button.addEventListener("click", () => openCorrection(area.closest(".card"), area.hidden));
  return [element("div", {}, button), area];
}

export function openCorrection(card, open) {
  const area = card.querySelector("textarea");
  if (!area) return;
  area.hidden = !open;
  card.querySelector("[aria-controls]").setAttribute("aria-expanded", String(open));
  if (open) area.focus();
}

// on: {rank(i, value), rate(i, value), edit(i), current(i)}
export function makeCard(i, text, settings, count, on) {
  const letter = LETTERS[i];
  const title = element("h3", {id: `title-${i}`}, `Response ${letter}`);
  const head = element("div", {class: "card-head"}, title, element("span", {class: "now", "aria-hidden": "true"}));
  if (settings.ask.includes("rank")) head.prepend(chip(i, on.rank));
  const body = element("div", {class: "text", tabindex: "0", role: "region", "aria-label": `Text of response ${letter}`});
  fillText(body, text);
  const card = element("article", {class: "card", "aria-labelledby": `title-${i}`}, head, body);
  if (settings.ask.includes("rank")) {
    const ranks = Array.from({length: count}, (_, r) => [r + 1, String(r + 1), `Rank ${r + 1} for response ${letter}`]);
    ranks.push([null, "None", `No rank for response ${letter}`]);
    card.append(choices("Rank", `rank-${i}`, ranks, (value) => on.rank(i, value)));
  }
  if (settings.ask.includes("rate")) {
    const [low, high] = settings.scale;
    const ratings = [];
    for (let r = low; r <= high; r += 1) ratings.push([r, String(r), `Rating ${r} for response ${letter}`]);
    card.append(choices("Rating", `rate-${i}`, ratings, (value) => on.rate(i, value)));
  }
  const editable = editableText(text);
  if (settings.ask.includes("edit") && editable !== null) card.append(...correction(i, editable, () => on.edit(i)));
  card.addEventListener("focusin", () => on.current(i));
  card.addEventListener("click", () => on.current(i));
  return card;
}

export function check(name, value) {
  for (const input of document.getElementsByName(name)) input.checked = input.value === String(value);
}

export function fillSlots(list, ranks, drop) {
  const slots = [...ranks.map((_, i) => [i + 1, i === 0 ? "1 best" : String(i + 1)]), [null, "None"]];
  const made = slots.map(([rank, name]) => {
    const held = ranks.flatMap((value, i) => (value === rank ? [i] : []));
    const spoken = held.length ? held.map((i) => LETTERS[i]).join(" and ") : "empty";
    const slot = element("li", {class: "slot", "aria-label": `${rank === null ? "Not ranked" : `Rank ${rank}`}: ${spoken}`});
    slot.dataset.rank = rank ?? "";
    slot.append(element("span", {class: "slot-name", "aria-hidden": "true"}, name), ...held.map((i) => chip(i, drop)));
    return slot;
  });
  list.replaceChildren(...made);
}
