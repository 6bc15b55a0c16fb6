import { pipeline, Readable } from 'node:stream'
import {
  type CallOptions,
  type CleanUpOptions,
  type DriverCapabilities,
  type GetOptions,
  type PutOptions,
  type StorageDriver,
  type StorageHealth,
  type StoredObject,
  toUploadBody,
  type UploadBody,
} from '@varve/core'
import { type BytesFault, bytesWithFault, delayed, type Fault, isBytesFault, stalled } from './faults.ts'

/** The methods of a driver that can go wrong. */
export type StorageOperation = 'put' | 'get' | 'stat' | 'list' | 'delete' | 'check' | 'cleanUp'

/** A change of what the storage holds. */
interface Change {
  readonly key: string
  /** The object of that key before. */
  readonly before: StoredObject | undefined
}

/** A call that a {@link FaultyDriver} was asked for. */
export interface StorageCall {
  /** The method. */
  readonly operation: StorageOperation
  /** The key, or the prefix of a listing; empty for `check` and `cleanUp`. */
  readonly key: string
}

/** Which calls go wrong, and how. */
export interface FaultRule {
  /** The method. */
  readonly on: StorageOperation
  /** The key or what it must match. Default: any. */
  readonly key?: string | RegExp
  /** Only this one of the calls that match, counted from 1. Default: all of them. */
  readonly call?: number
  /** What goes wrong. */
  readonly fault: Fault
}

/** Rules, of which the first that matches a call counts; or a function that decides on each call. */
export type FaultScript = readonly FaultRule[] | ((call: StorageCall) => Fault | undefined)

/**
 * A driver in front of another, whose calls go wrong by a script. For faults that a real server cannot be made
 * to show at the wanted moment. Give one as the driver of another to combine faults.
 *
 * ```ts
 * const full = new VarveError('STORAGE_FULL', 'The disk is full.')
 * const storage = new FaultyDriver(driver, [
 *   { on: 'put', key: /\.qcow2$/, call: 2, fault: { kind: 'fail-at', offset: 1_000_000, error: full } },
 * ])
 * ```
 */
export class FaultyDriver implements StorageDriver {
  readonly type: string
  readonly location: string
  readonly capabilities: DriverCapabilities
  /** There where the driver behind has it. */
  readonly cleanUp?: (options: CleanUpOptions) => Promise<number>
  /** Every call so far, in order. */
  readonly calls: StorageCall[] = []
  /** In order. */
  readonly #changes: Change[] = []
  readonly #driver: StorageDriver
  readonly #decide: (call: StorageCall) => Fault | undefined

  constructor(driver: StorageDriver, script: FaultScript) {
    this.#driver = driver
    this.#decide = typeof script === 'function' ? script : byRules(script)
    this.type = driver.type
    this.location = driver.location
    this.capabilities = driver.capabilities
    const cleanUp = driver.cleanUp?.bind(driver)
    if (cleanUp) {
      this.cleanUp = async options => around(this.#begin('cleanUp', ''), options, () => cleanUp(options))
    }
  }

  async put(key: string, body: UploadBody | Readable, options: PutOptions = {}): Promise<StoredObject> {
    const fault = this.#begin('put', key)
    try {
      return await around(fault, options, async () => {
        const upload = isBytesFault(fault) ? bodyWithFault(toUploadBody(body), fault) : body
        const stored = await this.#changing(key, options, () => this.#driver.put(key, upload, options))
        return resized(stored, fault)
      })
    } finally {
      if (body instanceof Readable) body.destroy()
    }
  }

  async get(key: string, options: GetOptions = {}): Promise<Readable> {
    const fault = this.#begin('get', key)
    let opened: Readable | undefined
    try {
      return await around(fault, options, async () => {
        opened = await this.#driver.get(key, options)
        return isBytesFault(fault) ? streamWithFault(opened, fault, options.range?.start) : opened
      })
    } catch (error) {
      opened?.destroy() // nobody gets it
      throw error
    }
  }

  async stat(key: string, options: CallOptions = {}): Promise<StoredObject | undefined> {
    const fault = this.#begin('stat', key)
    return around(fault, options, async () => resized(await this.#driver.stat(key, options), fault))
  }

  async *list(prefix: string, options: CallOptions = {}): AsyncGenerator<StoredObject> {
    const fault = this.#begin('list', prefix)
    if (fault?.kind === 'fail-before') throw fault.error
    if (fault?.kind === 'stall') await stalled(options.signal)
    const former = fault?.kind === 'stale' ? this.#former(fault.changes) : new Map<string, undefined>()
    for await (const object of this.#driver.list(prefix, options))
      if (!former.has(object.key)) yield resized(object, fault)
    for (const [key, object] of former) if (object && key.startsWith(prefix)) yield object
    if (fault?.kind === 'late') await delayed(fault.ms, options.signal)
    if (fault?.kind === 'fail-after') throw fault.error
  }

  async delete(key: string, options: CallOptions = {}): Promise<void> {
    return around(this.#begin('delete', key), options, () =>
      this.#changing(key, options, () => this.#driver.delete(key, options)),
    )
  }

  async check(options: CallOptions = {}): Promise<StorageHealth> {
    return around(this.#begin('check', ''), options, () => this.#driver.check(options))
  }

  /** Disposes of the driver behind it. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#driver[Symbol.asyncDispose]()
  }

  /** Makes a change and remembers it. */
  async #changing<T>(key: string, options: CallOptions, change: () => Promise<T>): Promise<T> {
    const { signal } = options
    const before = await this.#driver.stat(key, signal ? { signal } : {})
    const result = await change()
    this.#changes.push({ key, before })
    return result
  }

  /** The objects of those keys that the last `count` changes were of, as they were before. */
  #former(count: number): Map<string, StoredObject | undefined> {
    const last = this.#changes.slice(Math.max(0, this.#changes.length - count))
    return new Map(last.toReversed().map(({ key, before }) => [key, before]))
  }

  #begin(operation: StorageOperation, key: string): Fault | undefined {
    const call = { operation, key }
    this.calls.push(call)
    return this.#decide(call)
  }
}

function byRules(rules: readonly FaultRule[]): (call: StorageCall) => Fault | undefined {
  const counts = new Map<FaultRule, number>()
  return ({ operation, key }) => {
    let fault: Fault | undefined
    for (const rule of rules) {
      const matches = typeof rule.key === 'string' ? rule.key === key : (rule.key?.test(key) ?? true)
      if (rule.on !== operation || !matches) continue
      const count = (counts.get(rule) ?? 0) + 1
      counts.set(rule, count)
      if (rule.call === undefined || rule.call === count) fault ??= rule.fault
    }
    return fault
  }
}

async function around<T>(
  fault: Fault | undefined,
  { signal }: CallOptions,
  work: () => Promise<T>,
): Promise<T> {
  if (fault?.kind === 'fail-before') throw fault.error
  if (fault?.kind === 'stall') await stalled(signal)
  const result = await work()
  if (fault?.kind === 'late') await delayed(fault.ms, signal)
  if (fault?.kind === 'fail-after') throw fault.error
  return result
}

function resized<T extends StoredObject | undefined>(object: T, fault: Fault | undefined): T {
  return object && fault?.kind === 'resize' ? { ...object, size: object.size + fault.by } : object
}

function bodyWithFault(body: UploadBody, fault: BytesFault): UploadBody {
  const keepsSize = fault.kind !== 'end-at' && fault.kind !== 'append'
  return {
    ...(keepsSize && body.size !== undefined ? { size: body.size } : {}),
    replayable: body.replayable,
    open: range => streamWithFault(body.open(range), fault, range?.start),
  }
}

function streamWithFault(stream: Readable, fault: BytesFault, start = 0): Readable {
  // The streams end each other; an error comes out of the last one, which is the caller's. Where that one is destroyed
  // first, nobody else listens any more to what the other says of the same abort.
  stream.on('error', () => undefined)
  return pipeline(stream, bytesWithFault(fault, start), () => undefined)
}
