// The state of a model's response: text, finish reason and statistics, updated by streamed chunks.
import type { ChatChunk, Usage } from '../api/types';

export interface Answer {
  model: string;
  state: 'waiting' | 'streaming' | 'done' | 'stopped' | 'failed';
  text: string;
  reasoning: string;
  /** Tool calls, with arguments as the model wrote them. */
  calls: { name: string; arguments: string }[];
  finish: string | null;
  error: string | null;
  usage: Usage | null;
  /** Times in milliseconds: of the request, the first chunk with text and the last. */
  started: number;
  first: number | null;
  last: number | null;
  /** Number of chunks with text: estimates the number of tokens until the server sends the usage. */
  chunks: number;
}

export function newAnswer(model: string, now: number): Answer {
  return {
    model, state: 'waiting', text: '', reasoning: '', calls: [], finish: null, error: null, usage: null,
    started: now, first: null, last: null, chunks: 0,
  };
}

export function isRunning(answer: Answer): boolean {
  return answer.state === 'waiting' || answer.state === 'streaming';
}

/** Adds a chunk. Keep-alive chunks, whose delta is empty, change nothing. */
export function addChunk(answer: Answer, chunk: ChatChunk, now: number): Answer {
  if (!isRunning(answer)) return answer;
  if (chunk.error) return fail(answer, chunk.error.message ?? 'The server reported an error.', now);
  let next = answer;
  if (chunk.usage) next = { ...next, usage: chunk.usage };
  const choice = chunk.choices?.find((candidate) => candidate.index === 0);
  const delta = choice?.delta;
  const text = delta?.content ?? '';
  const reasoning = delta?.reasoning_content ?? '';
  const calls = delta?.tool_calls ?? [];
  if (text !== '' || reasoning !== '' || calls.length > 0) {
    next = {
      ...next,
      state: 'streaming',
      text: next.text + text,
      reasoning: next.reasoning + reasoning,
      calls: calls.reduce(addCall, next.calls),
      first: next.first ?? now,
      last: now,
      chunks: next.chunks + 1,
    };
  }
  if (choice?.finish_reason) next = { ...next, finish: choice.finish_reason };
  return next;
}

type CallDelta = NonNullable<NonNullable<NonNullable<ChatChunk['choices']>[number]['delta']>['tool_calls']>[number];

function addCall(calls: Answer['calls'], delta: CallDelta): Answer['calls'] {
  const next = [...calls];
  const call = next[delta.index] ?? { name: '', arguments: '' };
  next[delta.index] = {
    name: call.name + (delta.function?.name ?? ''),
    arguments: call.arguments + (delta.function?.arguments ?? ''),
  };
  return next;
}

/** Ends an answer after its stream. A stream without a finish reason is incomplete. */
export function finish(answer: Answer, now: number): Answer {
  if (!isRunning(answer)) return answer;
  if (answer.finish === null) return fail(answer, 'The connection closed before the response was complete.', now);
  return { ...answer, state: 'done', last: answer.last ?? now };
}

export function stop(answer: Answer, now: number): Answer {
  return isRunning(answer) ? { ...answer, state: 'stopped', last: answer.last ?? now } : answer;
}

export function fail(answer: Answer, error: string, now: number): Answer {
  return isRunning(answer) ? { ...answer, state: 'failed', error, last: answer.last ?? now } : answer;
}

/** An answer from storage. An answer that was streaming when the page was closed is marked as stopped. */
export function interrupted(stored: Answer): Answer {
  const answer = { ...newAnswer('', 0), ...stored };
  return isRunning(answer) ? { ...answer, state: 'stopped' } : answer;
}

export interface Statistics {
  tokens: number;
  /** Whether the server counted the tokens. */
  exact: boolean;
  prompt: number | null;
  cached: number | null;
  secondsToFirst: number | null;
  tokensPerSecond: number | null;
  accepted: number | null;
}

export function statistics(answer: Answer): Statistics {
  const tokens = answer.usage?.completion_tokens ?? answer.chunks;
  const writing = answer.first !== null && answer.last !== null ? (answer.last - answer.first) / 1000 : 0;
  return {
    tokens,
    exact: answer.usage !== null,
    prompt: answer.usage?.prompt_tokens ?? null,
    cached: answer.usage?.prompt_tokens_details?.cached_tokens ?? null,
    secondsToFirst: answer.first === null ? null : (answer.first - answer.started) / 1000,
    tokensPerSecond: tokens > 1 && writing > 0 ? (tokens - 1) / writing : null,
    accepted: answer.usage?.completion_tokens_details?.accepted_prediction_tokens ?? null,
  };
}
