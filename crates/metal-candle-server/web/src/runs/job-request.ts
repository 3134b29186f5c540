// The settings of a new run, and the request that creates it.

export interface SettingField {
  name: string;
  label: string;
  hint: string;
  whole: boolean;
  minimum: number;
  maximum: number;
  /** Whether the field is part of OpenAI's request; other fields are sent in `metal_candle`. */
  official: boolean;
}

export interface Settings {
  model: string;
  training: string;
  validation: string;
  suffix: string;
  /** Empty: the latest checkpoint, the server's default. */
  serve: '' | 'none' | 'best';
  /** The texts of the number fields, by name. */
  values: Record<string, string>;
}

export const NO_SETTINGS: Settings = { model: '', training: '', validation: '', suffix: '', serve: '', values: {} };

export const SETTINGS: SettingField[] = [
  { name: 'n_epochs', label: 'Epochs', hint: 'Number of passes over the training data.', whole: true, minimum: 1, maximum: 50, official: true },
  { name: 'batch_size', label: 'Batch size', hint: 'Number of rows per step.', whole: true, minimum: 1, maximum: 256, official: true },
  { name: 'learning_rate', label: 'Learning rate', hint: 'Peak learning rate.', whole: false, minimum: 1e-9, maximum: 1, official: false },
  { name: 'rank', label: 'Rank', hint: 'The rank of the LoRA matrices.', whole: true, minimum: 1, maximum: 512, official: false },
  { name: 'alpha', label: 'Alpha', hint: 'The LoRA delta is scaled by alpha divided by rank.', whole: false, minimum: 1e-3, maximum: 1e5, official: false },
  { name: 'max_steps', label: 'Max steps', hint: 'The run ends after this number of steps.', whole: true, minimum: 1, maximum: 1_000_000, official: false },
  { name: 'save_interval', label: 'Save interval', hint: 'Number of steps between checkpoints.', whole: true, minimum: 1, maximum: 1_000_000, official: false },
  { name: 'seed', label: 'Seed', hint: 'The same seed and data train the same adapter.', whole: true, minimum: 0, maximum: 2147483647, official: true },
];

/** An error message for a name; null if it is empty or valid. */
export function nameProblem(text: string): string | null {
  return /^[A-Za-z0-9._-]{0,64}$/.test(text.trim()) ? null : 'At most 64 letters, digits, dots, dashes and underscores';
}

/** An error message for the text of a number field; null if it is empty or valid. */
export function settingProblem(field: SettingField, text: string): string | null {
  if (text.trim() === '') return null;
  const value = Number(text);
  const isValid = Number.isFinite(value) && value >= field.minimum && value <= field.maximum && (!field.whole || Number.isInteger(value));
  return isValid ? null : `${field.whole ? 'Enter a whole number' : 'Enter a number'} from ${field.minimum} to ${field.maximum}`;
}

/** The body of `POST /v1/fine_tuning/jobs`. Empty settings are not sent. */
export function jobRequest(settings: Settings): Record<string, unknown> {
  const numbers = (official: boolean, except = '') =>
    Object.fromEntries(
      SETTINGS.filter((field) => field.official === official && field.name !== except && (settings.values[field.name] ?? '').trim() !== '').map(
        (field) => [field.name, Number(settings.values[field.name])],
      ),
    );
  const extra = { ...numbers(false), ...(settings.serve ? { serve: settings.serve } : {}) };
  const seed = (settings.values.seed ?? '').trim();
  return {
    model: settings.model,
    training_file: settings.training,
    ...(settings.validation ? { validation_file: settings.validation } : {}),
    ...(settings.suffix.trim() ? { suffix: settings.suffix.trim() } : {}),
    ...(seed ? { seed: Number(seed) } : {}),
    method: { type: 'supervised', supervised: { hyperparameters: numbers(true, 'seed') } },
    ...(Object.keys(extra).length > 0 ? { metal_candle: extra } : {}),
  };
}
