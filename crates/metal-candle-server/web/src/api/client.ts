// Sends requests to this server, asks for a key after a 401, and turns error answers into `ApiError`.
import { createStore } from '../base/store';

const KEY = 'metal-candle.key';

export class ApiError extends Error {
  constructor(
    readonly status: number,
    message: string,
    readonly code: string | null = null,
    readonly param: string | null = null,
  ) {
    super(message);
  }
}

/** The question for a key while it is open; `wrong` after a key was refused. */
export const keyQuestion = createStore<{ wrong: boolean } | null>(null);

/** Whether the last request reached the server. */
export const reachable = createStore(true);

let key: string | null = null;
try {
  key = sessionStorage.getItem(KEY);
} catch {
  // Without storage the key lasts until the page is closed.
}

let waiting: Promise<boolean> | null = null;
let answer: ((given: boolean) => void) | null = null;

/** Opens the question, or joins the one that is open. Resolves to false if no key was given. */
function askForKey(refused: string | null): Promise<boolean> {
  if (refused !== key) return Promise.resolve(true);
  waiting ??= new Promise((resolve) => {
    answer = resolve;
    keyQuestion.set({ wrong: refused !== null });
  });
  return waiting;
}

/** Answers the question; null dismisses it. */
export function giveKey(given: string | null): void {
  if (given !== null) {
    key = given;
    try {
      sessionStorage.setItem(KEY, given);
    } catch {
      // As above.
    }
  }
  keyQuestion.set(null);
  answer?.(given !== null);
  waiting = null;
  answer = null;
}

export function forgetKey(): void {
  key = null;
  try {
    sessionStorage.removeItem(KEY);
  } catch {
    // As above.
  }
}

export interface Call {
  method?: 'GET' | 'POST' | 'DELETE';
  json?: unknown;
  form?: FormData;
  signal?: AbortSignal;
  /** False for requests in the background: they must not open the question for a key. */
  ask?: boolean;
}

/** Returns the answer of a request that succeeded. Paths are relative to the page, so a proxy may add a prefix. */
export async function request(path: string, call: Call = {}): Promise<Response> {
  for (;;) {
    const used = key;
    const headers = new Headers();
    if (used !== null) headers.set('authorization', `Bearer ${used}`);
    if (call.json !== undefined) headers.set('content-type', 'application/json');
    let response: Response;
    try {
      response = await fetch(path, {
        method: call.method ?? 'GET',
        headers,
        body: call.json !== undefined ? JSON.stringify(call.json) : (call.form ?? null),
        signal: call.signal ?? null,
        cache: 'no-store',
        credentials: 'omit',
        redirect: 'error',
      });
    } catch (error) {
      if (call.signal?.aborted) throw error;
      reachable.set(false);
      throw new ApiError(0, 'The server does not answer. It may have stopped.');
    }
    reachable.set(true);
    if (response.ok) return response;
    if (response.status === 401 && call.ask !== false && (await askForKey(used))) continue;
    throw await readError(response);
  }
}

export async function requestJson<T>(path: string, call: Call = {}): Promise<T> {
  const response = await request(path, call);
  try {
    return (await response.json()) as T;
  } catch (error) {
    if (call.signal?.aborted) throw error;
    throw new ApiError(response.status, 'The server sent an answer that is not JSON.');
  }
}

async function readError(response: Response): Promise<ApiError> {
  const text = await response.text().catch(() => '');
  try {
    const { error } = JSON.parse(text) as { error?: { message?: unknown; code?: unknown; param?: unknown } };
    if (typeof error?.message === 'string') {
      const string = (value: unknown) => (typeof value === 'string' ? value : null);
      return new ApiError(response.status, error.message, string(error.code), string(error.param));
    }
  } catch {
    // Not the server's own error, for example the page of a proxy.
  }
  return new ApiError(response.status, `The server answered with status ${response.status}.`);
}

/** A sentence for people about anything that was thrown. */
export function describeError(error: unknown): string {
  if (error instanceof ApiError) {
    const sentence = error.message.charAt(0).toUpperCase() + error.message.slice(1);
    if (error.status === 403) return `${sentence}${/[.!?]$/.test(sentence) ? '' : '.'} This needs an admin key.`;
    return sentence;
  }
  return error instanceof Error ? error.message : String(error);
}
