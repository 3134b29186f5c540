// The fields of server responses that the web UI reads. Fields that older servers lack are optional.

export interface Model {
  id: string;
  object: 'model';
  created: number;
  owned_by: string;
  parent?: string | null;
  generation?: number | null;
  context_length?: number | null;
  adapter?: { rank?: number | null; method?: string | null } | null;
}

export interface Adapter {
  id: string;
  base?: string;
  generation?: number;
  method?: string | null;
  rank?: number | null;
  bytes?: number | null;
  in_flight?: number;
  source?: string | null;
  created_at?: number;
}

export interface List<T> {
  object: 'list';
  data: T[];
  has_more?: boolean;
  last_id?: string | null;
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  prompt_tokens_details?: { cached_tokens?: number } | null;
  completion_tokens_details?: { accepted_prediction_tokens?: number } | null;
}

export interface ChatChunk {
  choices?: {
    index: number;
    delta?: {
      content?: string | null;
      reasoning_content?: string | null;
      tool_calls?: { index: number; function?: { name?: string; arguments?: string } }[];
    };
    finish_reason?: string | null;
  }[];
  usage?: Usage | null;
  error?: { message?: string } | null;
}

export interface CompletionChunk {
  choices?: {
    index: number;
    text?: string;
    logprobs?: {
      tokens?: string[];
      token_logprobs?: (number | null)[];
      top_logprobs?: (Record<string, number> | null)[] | null;
    } | null;
    finish_reason?: string | null;
  }[];
  usage?: Usage | null;
  error?: { message?: string } | null;
}

export interface Finding {
  line?: number | null;
  message: string;
}

export interface FileObject {
  id: string;
  bytes: number;
  created_at: number;
  filename: string;
  purpose: string;
  status: 'uploaded' | 'processed' | 'error';
  status_details?: string | null;
  report?: { rows?: number; tokens?: number; findings?: Finding[] } | null;
}

export type JobStatus = 'validating_files' | 'queued' | 'running' | 'succeeded' | 'failed' | 'cancelled' | 'paused';

export interface Job {
  id: string;
  created_at: number;
  finished_at: number | null;
  status: JobStatus;
  model: string;
  fine_tuned_model: string | null;
  trained_tokens?: number | null;
  training_file?: string;
  validation_file?: string | null;
  seed?: number;
  hyperparameters?: Record<string, unknown> | null;
  error?: { code?: string; message?: string; param?: string | null } | null;
  estimated_finish?: number | null;
  user_provided_suffix?: string | null;
  metal_candle?: (Record<string, unknown> & { is_paused?: boolean }) | null;
}

export interface JobEvent {
  id: string;
  created_at: number;
  level: 'info' | 'warn' | 'error';
  message: string;
  type?: 'message' | 'metrics';
  data?: Record<string, unknown> | null;
}

export interface Checkpoint {
  id: string;
  created_at: number;
  fine_tuned_model_checkpoint: string;
  step_number: number;
  metrics: Record<string, unknown>;
}

export interface Plan {
  peak_memory_bytes?: number;
  seconds?: number;
  steps?: number;
  [key: string]: unknown;
}

/** The fields of `GET /props` that the web UI reads. */
export interface Props {
  n_ctx?: number;
  total_slots?: number;
  model_path?: string;
  build_info?: string;
  deterministic?: boolean;
  fill_in_the_middle?: boolean;
  running?: number;
  waiting?: number;
  default_generation_settings?: { params?: Record<string, unknown> };
  [key: string]: unknown;
}
