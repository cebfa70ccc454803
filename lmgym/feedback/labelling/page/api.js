// Calls of the server. Everything is a POST of JSON, which another site cannot make a browser send here.

const TOKEN = "lmgym-token";

export class CallError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// The token comes in the part of the address that no browser sends, and then leaves the address.
export function keepToken(name = TOKEN) {
  const found = new URLSearchParams(location.hash.slice(1)).get("token");
  if (found) {
    sessionStorage.setItem(name, found);
    history.replaceState(null, "", location.pathname + location.search);
  }
}

export async function call(path, body, name = TOKEN) {
  const headers = {"Content-Type": "application/json"};
  const token = sessionStorage.getItem(name);
  if (token) headers.Authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(`api/${path}`, {method: "POST", headers, body: JSON.stringify(body), cache: "no-store"});
  } catch {
    throw new CallError(0, "The server does not answer, and nothing was saved. What you entered is still here: try again.");
  }
  let answer = {};
  try {
    answer = await response.json();
  } catch {
    // a proxy between us answered with something else
  }
  if (!response.ok) {
    const reason = typeof answer.detail === "string" ? answer.detail : `The server refused (${response.status}).`;
    throw new CallError(response.status, reason);
  }
  return answer;
}
