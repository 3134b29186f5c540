// The state of a streamed completion: tokens with their probabilities and alternatives.
import type { CompletionChunk, Usage } from '../api/types';

export interface CompletionToken {
  text: string;
  /** The natural logarithm of the probability; null if the server sent none. */
  logProbability: number | null;
  alternatives: [text: string, logProbability: number][];
}

export interface Completion {
  tokens: CompletionToken[];
  finish: string | null;
  error: string | null;
  usage: Usage | null;
}

export const NO_COMPLETION: Completion = { tokens: [], finish: null, error: null, usage: null };

export function addCompletionChunk(completion: Completion, chunk: CompletionChunk): Completion {
  if (chunk.error) return { ...completion, error: chunk.error.message ?? 'The server reported an error.' };
  const next = chunk.usage ? { ...completion, usage: chunk.usage } : completion;
  const choice = chunk.choices?.find((candidate) => candidate.index === 0);
  if (!choice) return next;
  const finish = choice.finish_reason ?? next.finish;
  const added = tokensOf(choice.text ?? '', choice.logprobs);
  return { ...next, finish, tokens: added.length === 0 ? next.tokens : [...next.tokens, ...added] };
}

type LogProbabilities = NonNullable<CompletionChunk['choices']>[number]['logprobs'];

/** Returns the text as one token if its tokens do not join to the text: they contain parts of characters or a stop string. */
function tokensOf(text: string, given: LogProbabilities): CompletionToken[] {
  if (text === '') return [];
  const names = given?.tokens ?? [];
  const values = given?.token_logprobs ?? [];
  if (names.length > 0 && names.join('') === text) {
    return names.map((name, index) => ({
      text: name,
      logProbability: values[index] ?? null,
      alternatives: Object.entries(given?.top_logprobs?.[index] ?? {}).sort((a, b) => b[1] - a[1]),
    }));
  }
  const known = values.filter((value) => value !== null);
  return [{ text, logProbability: known.length === 0 ? null : Math.min(...known), alternatives: [] }];
}

export function completionText(completion: Completion): string {
  return completion.tokens.map((token) => token.text).join('');
}

/** A level from 0 (unlikely) to 5 (nearly certain), which selects a colour of the style sheet. */
export function level(logProbability: number): number {
  const probability = Math.exp(logProbability);
  return [0.05, 0.2, 0.5, 0.8, 0.95].filter((bound) => probability >= bound).length;
}

/** The geometric mean of the token probabilities. */
export function meanProbability(completion: Completion): number | null {
  const values = completion.tokens.flatMap((token) => (token.logProbability === null ? [] : [token.logProbability]));
  return values.length === 0 ? null : Math.exp(values.reduce((sum, value) => sum + value, 0) / values.length);
}
