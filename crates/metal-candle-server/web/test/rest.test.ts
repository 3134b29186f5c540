// Tests completions, curves, events, metrics, settings, syntax highlighting and names.
import { describe, expect, it } from 'vitest';
import { parseMetrics, total } from '../src/api/metrics';
import type { JobEvent, List } from '../src/api/types';
import { bytes, duration, figure } from '../src/base/format';
import { addCompletionChunk, completionText, level, NO_COMPLETION } from '../src/complete/tokens';
import { align, curvesOf, smooth } from '../src/runs/curves';
import { newEvents } from '../src/runs/feed';
import { jobRequest, NO_SETTINGS, SETTINGS, settingProblem } from '../src/runs/job-request';
import { defaultText, FIELDS, NO_PARAMETERS, parseNumber, readParameters, requestFields } from '../src/settings/parameters';
import { highlight } from '../src/text/highlight';

describe('a completion', () => {
  const chunk = (text: string, tokens: string[], values: number[]) => ({
    choices: [{ index: 0, text, logprobs: { tokens, token_logprobs: values, top_logprobs: tokens.map((token, at) => ({ [token]: values[at]!, other: -9 })) } }],
  });

  it('has one entry for each token', () => {
    const completion = addCompletionChunk(NO_COMPLETION, chunk('ab', ['a', 'b'], [-0.1, -2]));
    expect(completion.tokens).toEqual([
      { text: 'a', logProbability: -0.1, alternatives: [['a', -0.1], ['other', -9]] },
      { text: 'b', logProbability: -2, alternatives: [['b', -2], ['other', -9]] },
    ]);
  });

  it('shows the text if tokens contain parts of characters', () => {
    const completion = addCompletionChunk(NO_COMPLETION, chunk('ä', ['\ufffd', '\ufffd'], [-0.1, -2]));
    expect(completion.tokens).toEqual([{ text: 'ä', logProbability: -2, alternatives: [] }]);
    expect(completionText(completion)).toBe('ä');
  });

  it('retains its text on an error', () => {
    const broken = addCompletionChunk(addCompletionChunk(NO_COMPLETION, { choices: [{ index: 0, text: 'a' }] }), { error: { message: 'no' } });
    expect([completionText(broken), broken.error]).toEqual(['a', 'no']);
  });

  it('has six levels', () => {
    expect([0.01, 0.1, 0.3, 0.6, 0.9, 0.99].map((probability) => level(Math.log(probability)))).toEqual([0, 1, 2, 3, 4, 5]);
  });
});

describe('curves', () => {
  const event = (data: Record<string, unknown>, at = 10): JobEvent => ({ id: JSON.stringify([data, at]), created_at: at, level: 'info', message: '', type: 'metrics', data });

  it('separates the losses of rows', () => {
    const curves = curvesOf([
      event({ event: 'step', step: 1, loss: 3, learning_rate: 1e-4, tokens: 9, grad_norm: null }),
      event({ event: 'evaluation', step: 1, loss: 4 }, 12),
      event({ step: 2, train_loss: 2, full_valid_loss: 3.5 }, 14),
    ]);
    expect(Object.keys(curves)).toEqual(['train_loss', 'learning_rate', 'valid_loss']);
    expect(curves.train_loss).toEqual([{ step: 1, time: 0, value: 3 }, { step: 2, time: 4, value: 2 }]);
    expect(curves.valid_loss!.map((point) => point.value)).toEqual([4, 3.5]);
  });

  it('use the last row of a repeated step', () => {
    expect(curvesOf([event({ step: 1, loss: 3 }), event({ step: 2, loss: 9 }), event({ step: 2, loss: 2 }, 20)]).train_loss!.map((point) => point.value)).toEqual([3, 2]);
  });

  it('are aligned on all x', () => {
    expect(align([[{ x: 3, y: 1 }, { x: 1, y: 0 }], [{ x: 2, y: 5 }]])).toEqual([[1, 2, 3], [0, null, 1], [null, 5, null]]);
  });

  it('are smoothed with bias correction', () => {
    expect(smooth([2, 2, 2], 0.9).map((value) => Number(value.toFixed(9)))).toEqual([2, 2, 2]);
    expect(smooth([1, 5], 0)).toEqual([1, 5]);
  });
});

describe('events', () => {
  const all: JobEvent[] = Array.from({ length: 7 }, (_, index) => ({ id: `e${index}`, created_at: index, level: 'info', message: '' }));
  const reader = (count: number, calls: string[]) => async (query: string): Promise<List<JobEvent>> => {
    calls.push(query);
    const start = query === '' ? 0 : all.findIndex((event) => query === `&after=${event.id}`) + 1;
    return { object: 'list', data: all.slice(start, Math.min(start + 2, count)), has_more: start + 2 < count };
  };

  it('are read once, in order, over all pages', async () => {
    const known = await newEvents(reader(5, []), []);
    expect(known.map(({ id }) => id)).toEqual(['e0', 'e1', 'e2', 'e3', 'e4']);
    const calls: string[] = [];
    expect((await newEvents(reader(6, calls), known)).map(({ id }) => id)).toEqual(['e5']);
    expect(calls).toEqual(['&after=e4']);
    expect(await newEvents(reader(6, calls), [...known, all[5]!])).toEqual([]);
  });
});

describe('metrics', () => {
  it('are parsed with labels and summed', () => {
    const samples = parseMetrics('# HELP x y\nx_total{a="1",b="q\\"}"} 2\nx_total{a="2"} 3\ny NaN\nz +Inf\nbroken line here\n');
    expect(total(samples, 'x_total')).toBe(5);
    expect(total(samples, 'x_total', { a: '1', b: 'q"}' })).toBe(2);
    expect([total(samples, 'y'), total(samples, 'z')]).toEqual([null, Infinity]);
  });
});

describe('settings', () => {
  const field = (name: string) => FIELDS.find((entry) => entry.name === name)!;

  it('accept numbers in range only', () => {
    expect(['', '0', ' 0.5 ', '3', 'x', '1e999', '-1'].map((text) => parseNumber(field('temperature'), text))).toEqual([null, 0, 0.5, undefined, undefined, undefined, undefined]);
    expect([parseNumber(field('max_tokens'), '1.5'), parseNumber(field('max_tokens'), '0')]).toEqual([undefined, undefined]);
  });

  it('show the defaults of the server', () => {
    const defaults = { temperature: 0.7, repeat_penalty: 1.1, seed: 0, top_p: null };
    expect(FIELDS.map((entry) => defaultText(entry, defaults)).filter((text) => text !== null)).toEqual(['0.7', '1.1']);
  });

  it('are sent only if they are set', () => {
    expect(requestFields(NO_PARAMETERS, 'chat')).toEqual({});
    expect(requestFields({ ...NO_PARAMETERS, temperature: 0, stop: ['', 'end'], format: 'json_schema', schema: '{"type":"object"}' }, 'chat')).toEqual({
      temperature: 0,
      stop: ['end'],
      response_format: { type: 'json_schema', json_schema: { name: 'answer', strict: true, schema: { type: 'object' } } },
    });
  });

  it('are read from damaged storage', () => {
    for (const value of [null, 1, 'x', [], { temperature: 'hot', stop: 3, format: 'xml', seed: -4 }]) expect(readParameters(value)).toEqual(NO_PARAMETERS);
  });

  it('are sent in the request for a job', () => {
    expect(jobRequest({ ...NO_SETTINGS, model: 'nano', training: 'file-1', suffix: ' docs ', serve: 'best', values: { n_epochs: '2', rank: '8', seed: '5' } })).toEqual({
      model: 'nano', training_file: 'file-1', suffix: 'docs', seed: 5,
      method: { type: 'supervised', supervised: { hyperparameters: { n_epochs: 2 } } },
      metal_candle: { rank: 8, serve: 'best' },
    });
    const epochs = SETTINGS.find((entry) => entry.name === 'n_epochs')!;
    expect(['', '3', '0', '1.5', 'x'].map((text) => settingProblem(epochs, text) === null)).toEqual([true, true, false, false, false]);
  });
});

describe('syntax highlighting', () => {
  const samples: [string, string][] = [
    ['rust', 'fn a<\'a>(x: &\'a str) -> char { /* c */ let r = r#"raw " text"#; println!("{x}"); \'\\n\' } // end\n#[test]\n"unterminated'],
    ['python', '@dec\ndef f(a: int) -> str:\n    """doc"""\n    return f\'{a}\' # c\n"""open'],
    ['json', '{"key": [1, -2.5e3, true, null, "text"], "open'],
    ['brainfuck', '+[-]'],
  ];

  it('never changes the text', () => {
    for (const [language, code] of samples) {
      for (let length = 0; length <= code.length; length += 1) {
        expect(highlight(code.slice(0, length), language).map(([, text]) => text).join('')).toBe(code.slice(0, length));
      }
    }
  });

  it('finds the kinds of pieces', () => {
    const kinds = new Map(highlight(samples[0]![1], 'rust').map(([kind, text]) => [text, kind]));
    expect([kinds.get('fn'), kinds.get("'a"), kinds.get('r#"raw " text"#'), kinds.get('println!'), kinds.get("'\\n'"), kinds.get('#[test]')]).toEqual([
      'keyword', 'lifetime', 'string', 'macro', 'string', 'attribute',
    ]);
  });

  it('is fast on adversarial text', () => {
    const start = performance.now();
    for (const part of ['/*', '"', "'", '#[', 'r#"', '"""', '\\', '<<', 'a!(']) {
      for (const language of ['rust', 'python', 'json']) highlight(part.repeat(20_000), language);
    }
    expect(performance.now() - start).toBeLessThan(2000);
  });
});

describe('figures', () => {
  it('are short', () => {
    expect([0, 0.00012, 0.1234, 12.345, 123.45, 12345.6, 1e9].map(figure)).toEqual(['0', '1.20e-4', '0.123', '12.3', '123.5', '12,346', '1.00e+9']);
    expect([0, 999, 1500, 31_457_280].map(bytes)).toEqual(['0 B', '999 B', '1.5 kB', '31.5 MB']);
    expect([0.05, 2, 75, 7300].map(duration)).toEqual(['50 ms', '2.0 s', '1 min 15 s', '2 h 1 min']);
  });
});
