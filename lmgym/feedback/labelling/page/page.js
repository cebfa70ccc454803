// The labelling page: one item at a time. An answer counts as saved only when the server says so.

import {call, keepToken} from "./api.js";
import {check, editableText, element, fillSlots, fillText, makeCard, openCorrection} from "./cards.js";
import {completeRanks, describe, nextOpen} from "./ranking.js";

const NAME = "lmgym-annotator";
const DRAFT = "lmgym-draft";
const READ = "lmgym-guideline"; // whether the guideline was opened or closed
const $ = (id) => document.getElementById(id);

let settings = null;
let annotator = sessionStorage.getItem(NAME);
let item = null; // what the server asks about
let chosen = []; // ranks as in ranking.js
let ratings = [];
let current = 0; // the response that number keys are about
let rating = false; // whether number keys rate instead of rank
let busy = false;
let seconds = 0; // that the item was in view
let since = null;

// --- time, messages, drafts ------------------------------------------------------------------------------------

function countTime() {
  if (since !== null) seconds += (performance.now() - since) / 1000;
  since = document.hidden ? null : performance.now();
}

function alertText(text) {
  $("alert").textContent = text;
  $("alert").hidden = !text;
}

function say(text) {
  $("status").textContent = text;
}

function keepDraft() {
  if (!item) return;
  countTime();
  const draft = {assignment: item.assignment, chosen: chosen.map((rank) => rank ?? (rank === null ? 0 : -1))};
  sessionStorage.setItem(DRAFT, JSON.stringify({...draft, ratings, texts: readTexts(), seconds}));
}

function readDraft() {
  try {
    const draft = JSON.parse(sessionStorage.getItem(DRAFT));
    if (draft?.assignment !== item.assignment) return null;
    return {...draft, chosen: draft.chosen.map((rank) => (rank === -1 ? undefined : rank || null))};
  } catch {
    return null;
  }
}

// --- corrections: a text area has no carriage returns, the text may -----------------------------------------------

function plain(text) {
  return text.replace(/\r\n?/g, "\n");
}

function readTexts() {
  return [...document.querySelectorAll(".card")].map((card, i) => {
    const area = card.querySelector("textarea");
    const original = editableText(item.completions[i]);
    if (!area || area.value === plain(original)) return null;
    const windows = original.includes("\r\n") && !/(^|[^\r])\n/.test(original);
    return windows ? area.value.replace(/\n/g, "\r\n") : area.value;
  });
}

// --- showing -----------------------------------------------------------------------------------------------------

function show(name) {
  $("sign-in").hidden = name !== "sign-in";
  $("task").hidden = name !== "task";
  $("finished").hidden = name !== "finished";
  $("help").hidden = name !== "task";
  $("guideline").hidden = name === "sign-in" || !settings?.guideline;
  $("progress-box").hidden = name === "sign-in";
  $("who").hidden = name === "sign-in";
  $("who-name").textContent = annotator ?? "";
}

function showProgress({done, left, answers, wanted}) {
  $("progress").max = Math.max(done + left, 1);
  $("progress").value = done;
  $("progress-text").textContent = `You: ${done} done, ${left} left. Everybody: ${answers} of ${wanted}.`;
}

function showItem(received, message) {
  showProgress(received.progress);
  item = received.item;
  if (!item) {
    show("finished");
    say(message);
    $("finished-title").focus();
    return;
  }
  const kept = readDraft() ?? item.previous;
  const count = item.completions.length;
  chosen = Array.from({length: count}, (_, i) => (kept?.chosen ?? kept?.ranks)?.[i]);
  ratings = Array.from({length: count}, (_, i) => kept?.ratings?.[i] ?? null);
  seconds = kept?.seconds ?? 0;
  since = document.hidden ? null : performance.now();
  const nothingChosen = chosen.every((rank) => rank === null || rank === undefined);
  if (!readDraft() && nothingChosen) chosen = chosen.map(() => undefined);
  fillText($("prompt"), item.prompt);
  const on = {rank: setRank, rate: setRating, edit: keepDraft, current: setCurrent};
  $("responses").dataset.count = String(count);
  $("responses").replaceChildren(...item.completions.map((text, i) => makeCard(i, text, settings, count, on)));
  (kept?.texts ?? kept?.corrections ?? []).forEach((text, i) => showCorrection(i, text));
  show("task");
  current = nextOpen(chosen, count - 1);
  render();
  say(message);
  document.querySelectorAll(".text").forEach((box) => { box.scrollTop = 0; });
  window.scrollTo(0, 0);
  $("prompt-title").focus({preventScroll: true});
}

function showCorrection(i, text) {
  const area = document.querySelectorAll(".card")[i].querySelector("textarea");
  if (text === null || !area) return;
  area.value = plain(text);
  openCorrection(area.closest(".card"), true);
}

function render() {
  const ranks = completeRanks(chosen);
  const count = ranks.length;
  if (settings.ask.includes("rank")) {
    ranks.forEach((rank, i) => check(`rank-${i}`, rank ?? (chosen[i] === null ? null : "")));
    fillSlots($("slots"), ranks, setRank);
  }
  ratings.forEach((value, i) => check(`rate-${i}`, value ?? ""));
  const keys = rating ? `${settings.scale[0]}-${Math.min(settings.scale[1], 9)} rate` : `1-${Math.min(count, 9)} rank`;
  document.querySelectorAll(".card").forEach((card, i) => {
    const here = i === current && $("shortcuts").checked && (rating || settings.ask.includes("rank"));
    card.classList.toggle("current", here);
    card.querySelector(".now").textContent = here ? `keys ${keys} this` : "";
  });
}

function setCurrent(i) {
  if (i === current) return;
  current = i;
  render();
}

function moveTo(i) {
  current = i;
  render();
  document.querySelectorAll(".card")[i].scrollIntoView({block: "nearest"});
}

// --- answering ---------------------------------------------------------------------------------------------------

function setRank(i, rank) {
  chosen[i] = rank;
  current = i;
  render();
  alertText("");
  say(`Ranks: ${describe(completeRanks(chosen))}.`);
  keepDraft();
}

function setRating(i, value) {
  ratings[i] = value;
  current = i;
  render();
  alertText("");
  keepDraft();
}

function numberKey(number) {
  const count = chosen.length;
  if (rating) {
    const [low, high] = settings.scale;
    if (number < low || number > high) return;
    setRating(current, number);
    const open = ratings.indexOf(null);
    moveTo(open < 0 ? current : open);
  } else if (settings.ask.includes("rank") && number <= count) {
    setRank(current, number === 0 ? null : number);
    moveTo(nextOpen(chosen, current));
  }
}

function findGap() {
  const texts = readTexts();
  const ranked = completeRanks(chosen).filter((rank) => rank !== null).length;
  if (texts.some((text) => text === "")) return "A corrected text must not be empty.";
  if (settings.ask.includes("rank") && ranked < 2) return "Rank at least two responses, or choose “Cannot say”.";
  if (settings.ask.includes("rate") && ratings.some((value) => value === null)) {
    return "Rate every response, or choose “Cannot say”.";
  }
  if (settings.ask.length === 1 && settings.ask[0] === "edit" && texts.every((text) => text === null)) {
    return "Correct a text, or choose “Cannot say”.";
  }
  return "";
}

async function busily(action) {
  if (busy) return;
  busy = true;
  document.querySelectorAll(".actions button").forEach((button) => button.setAttribute("aria-disabled", "true"));
  try {
    await action();
  } catch (error) {
    await fail(error);
  } finally {
    busy = false;
    document.querySelectorAll(".actions button").forEach((button) => button.removeAttribute("aria-disabled"));
  }
}

async function fail(error) {
  alertText(error.message);
  if (error.status === 409) {
    sessionStorage.removeItem(DRAFT);
    showItem(await call("next", {annotator}), "");
    alertText(error.message);
  }
  if (error.status === 0 || error.status) return;
  throw error;
}

function answer(verdict) {
  return busily(async () => {
    const gap = verdict === "judged" ? findGap() : "";
    alertText(gap);
    if (gap) return;
    countTime();
    const judged = verdict === "judged";
    const body = {annotator, assignment: item.assignment, verdict, seconds};
    if (judged && settings.ask.includes("rank")) body.ranks = completeRanks(chosen);
    if (judged && settings.ask.includes("rate")) body.ratings = ratings;
    if (judged && settings.ask.includes("edit")) body.corrections = readTexts();
    const received = await call("answer", body);
    sessionStorage.removeItem(DRAFT);
    showItem(received, verdict === "skip" ? "Skipped." : "Saved.");
  });
}

function undo() {
  return busily(async () => {
    alertText("");
    const received = await call("undo", {annotator});
    if (!received.undone) return say("There is nothing to undo.");
    sessionStorage.removeItem(DRAFT);
    showItem(received, "Your last answer is back. Change it and save it again.");
  });
}

// --- keys --------------------------------------------------------------------------------------------------------

const KEYS = [
  ["1 to 9", "rank of the framed response, 1 the best; the same rank twice is a tie"],
  ["0", "no rank"],
  ["N, P", "next and previous response"],
  ["R", "let the numbers rate, or rank again"],
  ["E", "correct the text"],
  ["Enter", "save"],
  ["C, S, U", "cannot say, skip, undo"],
];

const ACTIONS = {
  n: () => moveTo((current + 1) % chosen.length),
  p: () => moveTo((current + chosen.length - 1) % chosen.length),
  r: () => {
    rating = settings.ask.includes("rate") && !(rating && settings.ask.includes("rank"));
    render();
  },
  e: () => settings.ask.includes("edit") && openCorrection(document.querySelectorAll(".card")[current], true),
  c: () => answer("cannot_say"),
  s: () => answer("skip"),
  u: undo,
  enter: () => answer("judged"),
};

function onKey(event) {
  const target = event.target;
  const writes = target.matches("textarea, input:not([type=radio]):not([type=checkbox])");
  if (writes && event.key === "Escape") target.blur();
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || writes || $("task").hidden) return;
  const key = event.key.toLowerCase();
  if (key === "enter" && target.matches("button, summary, a")) return;
  if (!$("shortcuts").checked && key !== "enter") return;
  if (event.repeat && key in ACTIONS) return;
  if (/^[0-9]$/.test(key)) {
    event.preventDefault();
    numberKey(Number(key));
  } else if (key in ACTIONS) {
    event.preventDefault();
    ACTIONS[key]();
  }
}

// --- start -------------------------------------------------------------------------------------------------------

function signIn(event) {
  event.preventDefault();
  const name = $("name").value.trim();
  if (!name) return undefined;
  return busily(async () => {
    const received = await call("next", {annotator: name});
    annotator = name;
    sessionStorage.setItem(NAME, name);
    alertText("");
    showItem(received, "");
  });
}

function leave() {
  sessionStorage.removeItem(NAME);
  sessionStorage.removeItem(DRAFT);
  annotator = null;
  item = null;
  alertText("");
  say("");
  show("sign-in");
  $("name").focus();
}

async function start() {
  keepToken();
  document.addEventListener("keydown", onKey);
  document.addEventListener("visibilitychange", countTime);
  window.addEventListener("pagehide", keepDraft);
  $("sign-in").addEventListener("submit", signIn);
  $("leave").addEventListener("click", leave);
  $("save").addEventListener("click", () => answer("judged"));
  $("cannot-say").addEventListener("click", () => answer("cannot_say"));
  $("skip").addEventListener("click", () => answer("skip"));
  $("undo").addEventListener("click", undo);
  $("undo-last").addEventListener("click", undo);
  $("again").addEventListener("click", () => busily(async () => showItem(await call("next", {annotator}), "")));
  $("shortcuts").addEventListener("change", render);
  $("keys").replaceChildren(...KEYS.flatMap(([key, does]) => [element("dt", {}, element("kbd", {}, key)), element("dd", {}, does)]));
  await busily(async () => {
    settings = await call("settings", {});
    rating = !settings.ask.includes("rank") && settings.ask.includes("rate");
    $("slots").hidden = !settings.ask.includes("rank");
    $("guideline-text").textContent = settings.guideline;
    $("guideline").open = !sessionStorage.getItem(READ);
    $("guideline").addEventListener("toggle", () => sessionStorage.setItem(READ, "yes"));
    if (annotator) showItem(await call("next", {annotator}), "");
    else show("sign-in");
  });
  if (!$("sign-in").hidden) $("name").focus();
}

start();
