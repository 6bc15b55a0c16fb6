import type { Host } from '@varve/core'

/** What the demonstration backs up: a guest, or disk images where no guest can run. */
export interface Subject {
  readonly instance: string
  readonly host: Host
  /** The images by disk name; the first one holds the files, whose content is proved byte by byte. */
  readonly disks: Readonly<Record<string, string>>
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
  /** What must hold for the other disks of a restored backup. Throws where it does not; tells what does. */
  proveOthers(restored: Readonly<Record<string, string>>): Promise<string[]>
  /** Destroys the content of all disks. */
  ruin(): Promise<void>
  /** What the instance itself says once it is restored. Throws where it is not what it was. */
  proveRestored(sum: string): Promise<string[]>
}
