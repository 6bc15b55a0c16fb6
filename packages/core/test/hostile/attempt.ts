/** What is done with a storage, in this order. */
export const OPERATIONS = [
  'list',
  'verify',
  'restore',
  'over',
  'copy',
  'recover',
  'prune',
  'delete',
  'backup',
] as const

export type Operation = (typeof OPERATIONS)[number]

/** One operation on a storage that somebody has written to. */
export interface Attempt {
  readonly operation: Operation
  /** The folder of the storage. */
  readonly storage: string
  readonly backup: string
  /** A folder of its own for what is restored. */
  readonly target: string
  /** The disk of the instance, and the image that it is a copy of. */
  readonly disk: string
  readonly pristine: string
  /** The definition that the instance has. */
  readonly definition: string
}

/** How one ended. */
export interface Outcome {
  /** The error's code; `not typed: ...` for any other error. */
  readonly code?: string
  readonly result?: unknown
  /** The most memory that the process had so far, in bytes. */
  readonly memory: number
  readonly ms: number
}
