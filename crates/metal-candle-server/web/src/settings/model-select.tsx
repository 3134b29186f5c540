// A selection of the served models and adapters.
import { useStore } from '../base/store';
import { refreshModels, server } from '../api/server';
import type { Model } from '../api/types';

interface Props {
  value: string;
  onChange: (model: string) => void;
  label: string;
  id?: string;
}

export function ModelSelect({ value, onChange, label, id }: Props) {
  const { models } = useStore(server);
  const bases = models.filter((model) => !model.parent);
  const orphans = models.filter((model) => model.parent && !bases.some((base) => base.id === model.parent));
  const known = models.some((model) => model.id === value);
  return (
    <select
      id={id}
      class="model-select"
      aria-label={label}
      title={value}
      value={value}
      onFocus={() => void refreshModels(false)}
      onChange={(event) => onChange(event.currentTarget.value)}
    >
      {!known && <option value={value}>{value === '' ? 'No model' : value}</option>}
      {bases.map((base) => {
        const adapters = models.filter((model) => model.parent === base.id);
        return adapters.length === 0 ? (
          <Entry key={base.id} model={base} />
        ) : (
          <optgroup key={base.id} label={`${base.id} and its adapters`}>
            <Entry model={base} />
            {adapters.map((model) => (
              <Entry key={model.id} model={model} />
            ))}
          </optgroup>
        );
      })}
      {orphans.map((model) => (
        <Entry key={model.id} model={model} />
      ))}
    </select>
  );
}

function Entry({ model }: { model: Model }) {
  return <option value={model.id}>{model.id}</option>;
}
