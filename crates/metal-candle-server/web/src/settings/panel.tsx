// The parameter panel of a conversation or completion.
import { useEffect, useId, useState } from 'preact/hooks';
import { defaultText, FIELDS, NO_PARAMETERS, type NumberField, type Parameters, parseNumber, schemaProblem } from './parameters';

interface Props {
  value: Parameters;
  onChange: (value: Parameters) => void;
  /** The server's defaults, shown in empty fields. */
  defaults: Record<string, unknown>;
  kind: 'chat' | 'completion';
}

export function ParameterPanel({ value, onChange, defaults, kind }: Props) {
  const set = (part: Partial<Parameters>) => onChange({ ...value, ...part });
  const stopId = useId();
  const changed = JSON.stringify(value) !== JSON.stringify(NO_PARAMETERS);
  const field = (entry: NumberField) => (
    <NumberInput key={entry.name} field={entry} value={value[entry.name]} fallback={defaultText(entry, defaults)} onChange={(number) => set({ [entry.name]: number })} />
  );
  return (
    <div class="parameters">
      {FIELDS.slice(0, 3).map(field)}
      <details>
        <summary>Sampling</summary>
        {FIELDS.slice(3).map(field)}
      </details>
      <details open={value.stop.length > 0 ? true : undefined}>
        <summary>Stop strings</summary>
        <label class="field" for={stopId}>
          <span class="visually-hidden">Stop strings, one per line</span>
        </label>
        <textarea
          id={stopId}
          rows={3}
          placeholder="One per line"
          value={value.stop.join('\n')}
          onInput={(event) => set({ stop: event.currentTarget.value === '' ? [] : event.currentTarget.value.split('\n') })}
        />
      </details>
      {kind === 'chat' && <Format value={value} set={set} />}
      <button type="button" class="quiet" disabled={!changed} onClick={() => onChange(NO_PARAMETERS)}>
        Reset to server defaults
      </button>
    </div>
  );
}

function Format({ value, set }: { value: Parameters; set: (part: Partial<Parameters>) => void }) {
  const id = useId();
  const problem = value.format === 'json_schema' ? schemaProblem(value.schema || '{}') : null;
  return (
    <>
      <div class="field">
        <label for={id}>Response format</label>
        <select id={id} value={value.format} onChange={(event) => set({ format: event.currentTarget.value as Parameters['format'] })}>
          <option value="text">Text</option>
          <option value="json_object">JSON</option>
          <option value="json_schema">JSON schema</option>
        </select>
      </div>
      {value.format === 'json_schema' && (
        <>
          <textarea
            class="mono"
            rows={7}
            aria-label="JSON schema"
            aria-invalid={problem !== null}
            placeholder={'{"type": "object",\n "properties": {}}'}
            spellcheck={false}
            value={value.schema}
            onInput={(event) => set({ schema: event.currentTarget.value })}
          />
          {problem !== null && <p class="hint bad">{problem}</p>}
        </>
      )}
    </>
  );
}

function NumberInput(props: { field: NumberField; value: number | null; fallback: string | null; onChange: (value: number | null) => void }) {
  const { field, value, fallback, onChange } = props;
  const [text, setText] = useState(value === null ? '' : String(value));
  const id = useId();
  // An external change, for example a reset, replaces the text, unless the text is another form of the same number.
  useEffect(() => {
    if (parseNumber(field, text) !== value) setText(value === null ? '' : String(value));
  }, [value]);
  const parsed = parseNumber(field, text);
  const range = field.maximum === undefined ? `of at least ${field.minimum}` : `from ${field.minimum} to ${field.maximum}`;
  return (
    <div class="field">
      <label for={id} title={field.hint}>
        {field.label}
      </label>
      <input
        id={id}
        inputMode="decimal"
        autocomplete="off"
        value={text}
        placeholder={fallback ?? (field.name === 'seed' ? 'random' : 'default')}
        aria-invalid={parsed === undefined}
        title={field.hint}
        onInput={(event) => {
          setText(event.currentTarget.value);
          const next = parseNumber(field, event.currentTarget.value);
          if (next !== undefined) onChange(next);
        }}
      />
      {parsed === undefined && (
        <p class="hint bad" role="alert">
          {field.whole ? 'Enter a whole number ' : 'Enter a number '}
          {range}
        </p>
      )}
    </div>
  );
}
