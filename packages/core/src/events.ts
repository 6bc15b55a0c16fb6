import type { FallbackReason } from './manifest.ts'

/** The stages of a backup, in their order. */
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

/** The stages of a restore, in their order. */
export type RestoreStage = 'preflight' | 'power-off' | 'write' | 'swap' | 'mark' | 'start'

/** A stage begins. */
export interface StageEvent {
  readonly type: 'stage'
  readonly stage: BackupStage | RestoreStage
  /** One sentence for people. */
  readonly message: string
}

/** How far one disk is. Sent a few times a second, and once at its end. */
export interface ProgressEvent {
  readonly type: 'progress'
  /** The disk, such as `vda`. */
  readonly disk: string
  /** Bytes done and to do; the total is exact from the first event on. */
  readonly bytesDone: number
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
  readonly type: 'fallback'
  readonly disk: string
  readonly reason: FallbackReason
  /** One sentence for people. */
  readonly message: string
}

/** An external program has ended. */
export interface CommandEvent {
  readonly type: 'command'
  readonly command: string
  /** Its arguments; secrets are never among them. */
  readonly args: readonly string[]
  /** Undefined when it was ended by a signal or could not be started. */
  readonly exitCode: number | undefined
  readonly stdout: string
  readonly stderr: string
  readonly durationMs: number
}

/** Something that someone should look at, though the run goes on. */
export interface WarningEvent {
  readonly type: 'warning'
  readonly message: string
}

/** Anything that a run tells of. */
export type VarveEvent = StageEvent | ProgressEvent | FallbackEvent | CommandEvent | WarningEvent

/** Receives the events of a run. What it throws is ignored: a view must not break a backup. */
export type EventListener = (event: VarveEvent) => void
