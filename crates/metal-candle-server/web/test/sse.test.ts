// Tests the reader of server-sent events with chunks that end at any byte.
import { describe, expect, it } from 'vitest';
import { readEvents, type ServerEvent } from '../src/api/sse';

const TEXT =
  ': comment\n\ndata: {"a":"ä€😀\u2028"}\r\n\r\nevent: named\ndata:first\ndata: second\rid: 7\r\rretry: 3\n\ndata: [DONE]\n\ndata: without an end';
const EVENTS: ServerEvent[] = [
  { event: 'message', data: '{"a":"ä€😀\u2028"}' },
  { event: 'named', data: 'first\nsecond' },
  { event: 'message', data: '[DONE]' },
];

function body(parts: Uint8Array[], onCancel = () => undefined as void): ReadableStream<Uint8Array> {
  const left = [...parts];
  return new ReadableStream({
    pull(controller) {
      const part = left.shift();
      if (part) controller.enqueue(part);
      else controller.close();
    },
    cancel: onCancel,
  });
}

async function read(parts: Uint8Array[]): Promise<ServerEvent[]> {
  const events: ServerEvent[] = [];
  for await (const event of readEvents(body(parts))) events.push(event);
  return events;
}

describe('readEvents', () => {
  const bytes = new TextEncoder().encode(TEXT);

  it('returns the same events for a cut at every byte', async () => {
    for (let cut = 0; cut <= bytes.length; cut += 1) {
      expect(await read([bytes.slice(0, cut), bytes.slice(cut)])).toEqual(EVENTS);
    }
  });

  it('returns the same events for single bytes', async () => {
    expect(await read([...bytes].map((byte) => Uint8Array.of(byte)))).toEqual(EVENTS);
  });

  it('cancels the body when the loop ends early', async () => {
    let cancelled = false;
    const parts = [bytes, bytes];
    for await (const event of readEvents(body(parts, () => void (cancelled = true)))) {
      expect(event).toEqual(EVENTS[0]);
      break;
    }
    expect(cancelled).toBe(true);
  });
});
