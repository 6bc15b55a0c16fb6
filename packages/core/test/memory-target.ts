import type { LayeredExtents } from '@varve/qcow2'
import type { RestoreTarget, TargetOptions } from '../src/restore-target.ts'

/** A disk in memory that refuses to be told anything twice, and says what became of it. */
export class MemoryTarget implements RestoreTarget {
  readonly disk: Buffer
  state: 'open' | 'finished' | 'aborted' = 'open'
  inFlight = 0
  readonly #told: Uint8Array
  readonly #onWrite: (offset: number, options: TargetOptions | undefined) => Promise<void>

  /** `onWrite` runs before the bytes of a write are taken. */
  constructor(
    merged: LayeredExtents,
    onWrite: (offset: number, options: TargetOptions | undefined) => Promise<void> = async () => undefined,
  ) {
    this.disk = Buffer.alloc(merged.size, 0xee)
    this.#told = new Uint8Array(merged.size)
    this.#onWrite = onWrite
  }

  /** Whether every byte was written or zeroed. */
  get complete(): boolean {
    return !this.#told.includes(0)
  }

  async write(offset: number, data: Uint8Array, options?: TargetOptions): Promise<void> {
    this.#tell(offset, data.length)
    this.inFlight++
    try {
      await this.#onWrite(offset, options)
      this.disk.set(data, offset)
    } finally {
      this.inFlight--
    }
  }

  async zero(offset: number, length: number): Promise<void> {
    this.#tell(offset, length)
    this.disk.fill(0, offset, offset + length)
  }

  async finish(): Promise<void> {
    this.#end('finished')
  }

  async abort(): Promise<void> {
    this.#end('aborted')
  }

  #tell(offset: number, length: number): void {
    if (this.state !== 'open') throw new Error(`told of ${offset} after it was ${this.state}`)
    if (length === 0 || offset + length > this.disk.length) throw new Error(`${length} bytes at ${offset}`)
    if (this.#told.subarray(offset, offset + length).includes(1)) throw new Error(`told of ${offset} twice`)
    this.#told.fill(1, offset, offset + length)
  }

  #end(state: 'finished' | 'aborted'): void {
    if (this.state !== 'open') throw new Error(`${state} after it was ${this.state}`)
    if (this.inFlight > 0) throw new Error(`${state} with ${this.inFlight} writes in flight`)
    this.state = state
  }
}
