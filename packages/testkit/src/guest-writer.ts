import type { GuestProcess, LabDomain } from './lab-domain.ts'
import { pollUntil } from './lab-poll.ts'

/** Bytes that a {@link GuestWriter} writes at a time. */
export const writerBlockSize: number = 64 * 1024

/** Options of {@link LabDomain.startWriter}. */
export interface GuestWriterOptions {
  /** The guest's device, such as `/dev/vdb`. */
  readonly device: string
  /** The first block to write, in blocks of {@link writerBlockSize}. Default: 0. */
  readonly firstBlock?: number
  /** How many blocks from there on may be written. */
  readonly blocks: number
}

/** One write that the device has flushed. */
export interface GuestWrite {
  /** Counts the writer's writes, from 1. */
  readonly number: number
  /** Position, in blocks of {@link writerBlockSize}. */
  readonly block: number
}

let writerCount = 0

/** Writes marked blocks at random places of a device, one after another, each flushed before it is logged. */
export class GuestWriter {
  /** Is in the content of each block. */
  readonly name: string
  readonly #domain: LabDomain
  readonly #process: GuestProcess
  #ended = false

  constructor(domain: LabDomain, options: GuestWriterOptions) {
    writerCount += 1
    this.name = `writer${writerCount}`
    this.#domain = domain
    this.#process = domain.spawn(
      `exec writer ${this.name} ${options.device} ${options.firstBlock ?? 0} ${options.blocks}`,
    )
    const ended = (): void => {
      this.#ended = true
    }
    this.#process.result.then(ended, ended)
  }

  /** The writes done so far. One more may be under way. */
  async writes(): Promise<GuestWrite[]> {
    const { stdout } = await this.#domain.run(`touch /run/${this.name}.log; cat /run/${this.name}.log`)
    return stdout
      .split('\n')
      .filter(Boolean)
      .map(line => {
        const [number, block] = line.split(' ').map(Number)
        return { number: number ?? 0, block: block ?? 0 }
      })
  }

  /** Waits until `count` more writes are done, and returns all. Rejects when a write had failed. */
  async waitForWrites(count: number, timeoutMs = 60_000): Promise<GuestWrite[]> {
    const before = (await this.writes()).length
    return pollUntil(
      async () => {
        if (this.#ended) await this.stop()
        const writes = await this.writes()
        return writes.length >= before + count ? writes : undefined
      },
      timeoutMs,
      () => `${this.name} did not do ${count} more writes in ${timeoutMs} ms.`,
    )
  }

  /** Stops after the write under way, and returns all. Rejects when a write had failed. */
  async stop(): Promise<GuestWrite[]> {
    await this.#domain.run(`touch /run/${this.name}.stop`)
    const { exitCode, stderr } = await this.#process.result
    if (exitCode !== 0) throw new Error(`${this.name} could not write: ${stderr}`)
    return this.writes()
  }

  /** What a block holds after `write`. */
  content(write: GuestWrite): Buffer {
    return Buffer.alloc(writerBlockSize, `writer ${this.name} write ${write.number} block ${write.block}\n`)
  }
}
