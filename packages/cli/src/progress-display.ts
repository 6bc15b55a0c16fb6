import type { ProgressEvent } from '@varve/core'

/** Shows how far each disk is. */
export interface ProgressDisplay {
  /** Shows a line of its own. */
  line(text: string): void
  progress(event: ProgressEvent): void
  /** A stage begins: what is shown of the one before will not change any more. */
  stage(): void
  /** Leaves the terminal as it was. */
  close(): void
}
