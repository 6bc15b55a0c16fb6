import type { Host } from '@varve/core'
import type { Source } from './source.ts'

/** What the demonstration backs up: a guest, or disk images where no guest can run. */
export interface Subject {
  readonly instance: string
  readonly host: Host
  /** Holds the images `vda`, whose content is proved byte by byte, and `vdb`. */
  readonly source: Source
  /** How each act of the story reads. */
  readonly titles: Readonly<Record<'prepare' | 'full' | 'change' | 'ruin' | 'restore', string>>
  /** Makes the first disk's content; whatever writes in the background begins. */
  prepare(): Promise<void>
  /** Takes a backup, with something going on in the instance where it runs. */
  during<T>(backup: () => Promise<T>): Promise<T>
  /** Changes, zeroes and trims. Called before each increment. */
  change(round: number): Promise<void>
  /** SHA-256 of the first disk, as the instance reads it. */
  sum(): Promise<string>
  /** What must hold for the disks of a backup that was restored to the images `new-vda` and `new-vdb`. Throws where it does not; tells what does. */
  proveOthers(): Promise<string[]>
  /** Destroys the content of all disks. */
  ruin(): Promise<void>
  /** What the instance itself says once it is restored. Throws where it is not what it was. */
  proveRestored(sum: string): Promise<string[]>
}
