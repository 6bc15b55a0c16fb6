import type { EventListener, VarveEvent } from './events.ts'
import { tell } from './tell.ts'

/** What every step of a run is given. */
export interface RunOptions {
  /** Gives the run up. What it had begun is undone before its promise settles. */
  signal?: AbortSignal
  /** Is told of stages, progress, fallbacks, external commands and warnings. */
  onEvent?: EventListener
}

/** Tells the listener, whose own errors must not break a run. */
export function emit(run: RunOptions, event: VarveEvent): void {
  tell(run.onEvent, event)
}
