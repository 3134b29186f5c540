// Tests the answer's reducer and the tree of turns.
import { describe, expect, it } from 'vitest';
import type { ChatChunk } from '../src/api/types';
import { addChunk, type Answer, fail, finish, newAnswer, statistics, stop } from '../src/chat/answer';
import { addTurn, changeAnswer, type Conversation, messagesFor, newConversation, pathTo, readConversation, showVersion, versions } from '../src/chat/conversation';

const text = (content: string): ChatChunk => ({ choices: [{ index: 0, delta: { content }, finish_reason: null }] });
const end = (reason: string): ChatChunk => ({ choices: [{ index: 0, delta: {}, finish_reason: reason }] });
const feed = (chunks: ChatChunk[]) => chunks.reduce((answer, chunk, index) => addChunk(answer, chunk, 1000 + index * 100), newAnswer('nano', 0));

describe('an answer', () => {
  it('joins its text and ends with the finish reason', () => {
    const chunks = [text(''), { choices: [{ index: 0, delta: {} }] }, text('Hel'), text('lo'), end('stop')];
    const answer = finish(feed([...chunks, { choices: [], usage: { prompt_tokens: 9, completion_tokens: 3, prompt_tokens_details: { cached_tokens: 4 } } }]), 5000);
    expect(answer).toMatchObject({ state: 'done', text: 'Hello', finish: 'stop', first: 1200, last: 1300 });
    expect(statistics(answer)).toEqual({ tokens: 3, exact: true, prompt: 9, cached: 4, secondsToFirst: 1.2, tokensPerSecond: 20, accepted: null });
  });

  it('stays waiting on the role and on keep-alive chunks', () => {
    expect(feed([{ choices: [{ index: 0, delta: { content: '' } }] }, { choices: [{ index: 0, delta: {} }] }]).state).toBe('waiting');
  });

  it('joins tool calls by index', () => {
    const call = (index: number, name?: string, argument?: string): ChatChunk => ({
      choices: [{ index: 0, delta: { tool_calls: [{ index, function: { ...(name ? { name } : {}), ...(argument ? { arguments: argument } : {}) } }] } }],
    });
    expect(feed([call(0, 'find'), call(0, '', '{"a"'), call(1, 'sum', '{}'), call(0, '', ':1}')]).calls).toEqual([
      { name: 'find', arguments: '{"a":1}' },
      { name: 'sum', arguments: '{}' },
    ]);
  });

  it('fails on an error event and on an incomplete stream, and retains its text', () => {
    expect(feed([text('a'), { error: { message: 'broken' } }, text('b')])).toMatchObject({ state: 'failed', text: 'a', error: 'broken' });
    expect(finish(feed([text('a')]), 1)).toMatchObject({ state: 'failed', text: 'a' });
  });

  it('ignores chunks after a stop', () => {
    const stopped = stop(feed([text('a')]), 2000);
    expect(addChunk(stopped, text('b'), 3000)).toBe(stopped);
    expect(fail(stopped, 'late', 3000)).toBe(stopped);
  });
});

describe('a conversation', () => {
  const answered = (conversation: Conversation, id: string, ...texts: string[]) =>
    texts.reduce((value, text, lane) => changeAnswer(value, id, lane, (answer): Answer => ({ ...answer, state: 'done', text })), conversation);
  const turn = (id: string, parent: string | null, created: number, prompt = id) => ({ id, parent, prompt, seed: 1, created });
  const start = () => answered(addTurn({ ...newConversation('c', ['base', 'tuned'], 0), system: 'Be brief.' }, turn('one', null, 1)), 'one', 'a1', 'b1');

  it('sends each lane its own answers', () => {
    const conversation = addTurn(start(), turn('two', 'one', 2));
    expect(messagesFor(conversation, 'two', 1).map((message) => message.content)).toEqual(['Be brief.', 'one', 'b1', 'two']);
    expect(messagesFor(conversation, 'two', 0)[2]!.content).toBe('a1');
  });

  it('continues a new lane from the first one', () => {
    const single = answered(addTurn(newConversation('c', ['base'], 0), turn('one', null, 1)), 'one', 'a1');
    const wider = addTurn({ ...single, models: ['base', 'tuned'] }, turn('two', 'one', 2));
    expect(messagesFor(wider, 'two', 1).map((message) => message.content)).toEqual(['one', 'a1', 'two']);
  });

  it('omits a prompt without an answer', () => {
    const conversation = addTurn(addTurn(newConversation('c', ['base'], 0), turn('one', null, 1)), turn('two', 'one', 2));
    expect(messagesFor(conversation, 'two', 0)).toEqual([{ role: 'user', content: 'two' }]);
  });

  it('keeps versions and returns to the end of the other branch', () => {
    let conversation = answered(addTurn(start(), turn('two', 'one', 2)), 'two', 'a2', 'b2');
    conversation = addTurn(conversation, turn('other', null, 3));
    expect(pathTo(conversation, conversation.head).map(({ id }) => id)).toEqual(['other']);
    expect(versions(conversation, conversation.turns.other!).map(({ id }) => id)).toEqual(['one', 'other']);
    expect(showVersion(conversation, 'one').head).toBe('two');
  });

  it('is read back from storage with running answers stopped, and rejected if it is invalid', () => {
    const stored: unknown = JSON.parse(JSON.stringify(addTurn(start(), turn('two', 'one', 2))));
    const read = readConversation(stored)!;
    expect(read.turns.two!.answers.map((answer) => answer.state)).toEqual(['stopped', 'stopped']);
    expect(read.title).toBe('one');
    for (const damaged of [null, 3, {}, { id: 'x' }, { id: 'x', turns: { a: { id: 'a' } } }]) expect(readConversation(damaged)).toBeNull();
  });

  it('survives a loop of parents', () => {
    const conversation = newConversation('c', ['base'], 0);
    const looped = { ...conversation, turns: { a: { ...turn('a', 'b', 1), answers: [] }, b: { ...turn('b', 'a', 1), answers: [] } } };
    expect(pathTo(looped, 'a')).toHaveLength(2);
  });
});
