// The owner's page: how many answers there are, and how good they are.

import {call, keepToken} from "./api.js";
import {element} from "./cards.js";

const OWNER = "lmgym-owner-token";
const $ = (id) => document.getElementById(id);

function share({agreeing, pairs}) {
  return pairs ? `${Math.round((100 * agreeing) / pairs)} % of ${pairs}` : "–";
}

function alpha(value) {
  return value === null ? "not known yet" : value.toFixed(3);
}

function row(person) {
  const seconds = person.seconds === null ? "–" : person.seconds.toFixed(1);
  const cells = [person.judged, person.cannot_say, person.skip, seconds];
  cells.push(share(person.with_others), share(person.with_gold), share(person.with_self));
  return element("tr", {}, element("th", {scope: "row"}, person.name), ...cells.map((cell) => element("td", {}, String(cell))));
}

async function refresh() {
  try {
    const report = await call("report", {}, OWNER);
    $("alert").hidden = true;
    $("summary").textContent =
      `${report.answers} answers in ${report.labels}. ${report.items} of ${report.to_label} items judged, ` +
      `${report.shared} by several annotators. Alpha of rankings: ${alpha(report.alpha_ranks)}. ` +
      `Alpha of ratings: ${alpha(report.alpha_ratings)}.`;
    $("annotators").replaceChildren(...report.annotators.map(row));
  } catch (error) {
    $("alert").textContent = error.message;
    $("alert").hidden = false;
  }
}

keepToken(OWNER);
$("refresh").addEventListener("click", refresh);
refresh();
