// The request parameters that a user can set. Empty parameters are not sent, so the server's defaults apply.
import { figure } from '../base/format';

export interface Parameters {
  temperature: number | null;
  top_p: number | null;
  top_k: number | null;
  min_p: number | null;
  repetition_penalty: number | null;
  frequency_penalty: number | null;
  presence_penalty: number | null;
  max_tokens: number | null;
  seed: number | null;
  stop: string[];
  format: 'text' | 'json_object' | 'json_schema';
  schema: string;
}

export const NO_PARAMETERS: Parameters = {
  temperature: null,
  top_p: null,
  top_k: null,
  min_p: null,
  repetition_penalty: null,
  frequency_penalty: null,
  presence_penalty: null,
  max_tokens: null,
  seed: null,
  stop: [],
  format: 'text',
  schema: '',
};

export type NumberName = {
  [Name in keyof Parameters]: Parameters[Name] extends number | null ? Name : never;
}[keyof Parameters];

export interface NumberField {
  name: NumberName;
  label: string;
  hint: string;
  minimum: number;
  maximum?: number;
  step: number;
  whole?: boolean;
}

export const FIELDS: NumberField[] = [
  { name: 'temperature', label: 'Temperature', hint: '0 always selects the most likely token.', minimum: 0, maximum: 2, step: 0.1 },
  { name: 'max_tokens', label: 'Max tokens', hint: 'Maximum number of generated tokens.', minimum: 1, step: 1, whole: true },
  { name: 'seed', label: 'Seed', hint: 'Empty: a random seed, shown below each response.', minimum: 0, step: 1, whole: true },
  { name: 'top_p', label: 'Top p', hint: 'Samples from the most likely tokens with this total probability.', minimum: 0, maximum: 1, step: 0.05 },
  { name: 'top_k', label: 'Top k', hint: 'Samples from this number of most likely tokens.', minimum: 0, step: 1, whole: true },
  { name: 'min_p', label: 'Min p', hint: 'Drops tokens less likely than this fraction of the most likely token.', minimum: 0, maximum: 1, step: 0.01 },
  { name: 'repetition_penalty', label: 'Repetition penalty', hint: '1 is off.', minimum: 0.1, maximum: 2, step: 0.05 },
  { name: 'frequency_penalty', label: 'Frequency penalty', hint: '0 is off.', minimum: -2, maximum: 2, step: 0.1 },
  { name: 'presence_penalty', label: 'Presence penalty', hint: '0 is off.', minimum: -2, maximum: 2, step: 0.1 },
];

// Names in `GET /props` that differ from the names in a request.
const PROPS_NAMES: Partial<Record<NumberName, string>> = { repetition_penalty: 'repeat_penalty' };

/** The server's default of a field as text; null if the field has none. */
export function defaultText(field: NumberField, settings: Record<string, unknown>): string | null {
  if (field.name === 'seed' || field.name === 'max_tokens') return null;
  const value = settings[PROPS_NAMES[field.name] ?? field.name];
  return typeof value === 'number' ? figure(value) : null;
}

/** Parses the text of a number field: null if it is empty, undefined if it is not a number in the field's range. */
export function parseNumber(field: NumberField, text: string): number | null | undefined {
  if (text.trim() === '') return null;
  const value = Number(text);
  if (!Number.isFinite(value) || value < field.minimum || value > (field.maximum ?? Number.MAX_SAFE_INTEGER)) return undefined;
  return field.whole && !Number.isSafeInteger(value) ? undefined : value;
}

/** An error message for the text of a JSON schema; null if it is valid. */
export function schemaProblem(text: string): string | null {
  try {
    const schema: unknown = JSON.parse(text);
    return typeof schema === 'object' && schema !== null && !Array.isArray(schema) ? null : 'The schema must be a JSON object.';
  } catch (error) {
    return `The schema is not JSON: ${error instanceof Error ? error.message : error}`;
  }
}

/** The fields of a chat or completion request for these parameters. */
export function requestFields(parameters: Parameters, kind: 'chat' | 'completion'): Record<string, unknown> {
  const fields: Record<string, unknown> = {};
  for (const { name } of FIELDS) {
    if (parameters[name] !== null) fields[name] = parameters[name];
  }
  const stop = parameters.stop.filter((text) => text !== '');
  if (stop.length > 0) fields.stop = stop;
  if (kind === 'chat' && parameters.format === 'json_object') fields.response_format = { type: 'json_object' };
  if (kind === 'chat' && parameters.format === 'json_schema' && schemaProblem(parameters.schema) === null) {
    fields.response_format = {
      type: 'json_schema',
      json_schema: { name: 'answer', strict: true, schema: JSON.parse(parameters.schema) as unknown },
    };
  }
  return fields;
}

/** Validates parameters from storage or a file: drops unknown fields and clears invalid ones. */
export function readParameters(value: unknown): Parameters {
  const given = (typeof value === 'object' && value !== null ? value : {}) as Partial<Record<keyof Parameters, unknown>>;
  const parameters = { ...NO_PARAMETERS };
  for (const field of FIELDS) {
    const number = given[field.name];
    parameters[field.name] = typeof number === 'number' ? (parseNumber(field, String(number)) ?? null) : null;
  }
  if (Array.isArray(given.stop)) parameters.stop = given.stop.filter((text): text is string => typeof text === 'string');
  if (given.format === 'json_object' || given.format === 'json_schema') parameters.format = given.format;
  if (typeof given.schema === 'string') parameters.schema = given.schema;
  return parameters;
}
