import type { FallbackReason } from './manifest.ts'

/** The stages of a backup, in their order; `stream` and `upload` come for each disk, of which several may be under way. */
export type BackupStage =
  | 'plan'
  | 'mark'
  | 'freeze'
  | 'export'
  | 'stream'
  | 'upload'
  | 'publish'
  | 'thaw'
  | 'retire'

/**
 * The stages of a restore, in their order; `write` comes for each disk. In place `power-off` comes before the first `write`.
 * A restore that fails goes from wherever it is to `start`, if the instance is off for it.
 */
export type RestoreStage = 'preflight' | 'write' | 'mark' | 'power-off' | 'swap' | 'start'

/** A stage begins. */
export interface StageEvent {
  /** Tells the events apart. */
  readonly type: 'stage'
  /** The stage that begins. The one before it has ended, unless it is another disk's. */
  readonly stage: BackupStage | RestoreStage
  /** One sentence for people. */
  readonly message: string
}

/** How far one disk is. Sent a few times a second, and once at its end. */
export interface ProgressEvent {
  /** Tells the events apart. */
  readonly type: 'progress'
  /** The disk, such as `vda`. */
  readonly disk: string
  /** Bytes that are done. May go back where an upload is begun again. */
  readonly bytesDone: number
  /** Bytes that there are to do: exact from the first event on. */
  readonly bytesTotal: number
  /** 0 to 100. */
  readonly percent: number
  /** Of the last few seconds. */
  readonly bytesPerSecond: number
  /** Undefined until a rate is known. */
  readonly secondsLeft?: number
}

/** A disk gets a full image where an increment was wanted. */
export interface FallbackEvent {
  /** Tells the events apart. */
  readonly type: 'fallback'
  /** The disk, such as `vda`. */
  readonly disk: string
  /** Why it gets a full image. */
  readonly reason: FallbackReason
  /** One sentence for people. */
  readonly message: string
}

/** An external program has ended. */
export interface CommandEvent {
  /** Tells the events apart. */
  readonly type: 'command'
  /** The program, such as `qemu-img`. */
  readonly command: string
  /** Its arguments; secrets are never among them. */
  readonly args: readonly string[]
  /** Undefined when it was ended by a signal or could not be started. */
  readonly exitCode: number | undefined
  /** What it printed, without what may hold secrets. */
  readonly stdout: string
  /** What it said of its work and its errors, without secrets. */
  readonly stderr: string
  /** From its start to its end, in milliseconds. */
  readonly durationMs: number
}

/** Something that someone should look at, though the run goes on. */
export interface WarningEvent {
  /** Tells the events apart. */
  readonly type: 'warning'
  /** What to look at, and what to do, in a sentence or two. */
  readonly message: string
}

/** Anything that a run tells of. */
export type VarveEvent = StageEvent | ProgressEvent | FallbackEvent | CommandEvent | WarningEvent

/** Receives the events of a run. What it throws, or rejects with where it is `async`, is ignored: a view must not break a backup. */
export type EventListener = (event: VarveEvent) => void
