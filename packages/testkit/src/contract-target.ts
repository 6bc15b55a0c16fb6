import { buffer } from 'node:stream/consumers'
import {
  type ByteRange,
  bytesBody,
  type CallOptions,
  type DriverCapabilities,
  type ErrorCode,
  type StorageDriver,
  VarveError,
} from '@varve/core'
import { expect, onTestFinished } from 'vitest'
import type { NetworkProxy } from './network-proxy.ts'
import { patternBytes } from './pattern.ts'
import { isThorough } from './thorough.ts'

/** Something that a storage's server holds, seen by other means than the driver. */
export interface RawObject {
  /** Its name below the driver's prefix: a key, or the name of something unfinished. */
  readonly name: string
  /** Size in bytes. */
  readonly size: number
}

/** A driver on an empty storage of its own, for one test. */
export interface DriverTarget {
  /** What is tested. */
  readonly driver: StorageDriver
  /**
   * All that the server holds below the driver's prefix, without the driver's help: objects, temporary
   * objects and unfinished uploads.
   */
  inspect(): Promise<RawObject[]>
  /** The bytes that the server holds under a name, without the driver's help. */
  readRaw(name: string): Promise<Uint8Array>
  /**
   * Stores an object on the server, without the driver's help: for tests that look at one which is there, of a driver whose
   * uploads cost much. Default: the driver's own `put`.
   */
  writeRaw?(key: string, bytes: Uint8Array): Promise<void>
  /**
   * Whether a name that {@link inspect} gives is of something unfinished: for a driver whose listings cost much, as it is
   * otherwise asked for one at the end of each test, in which that may not be. Not asked with `VARVE_THOROUGH=1`.
   */
  isUnfinished?(name: string): boolean
  /** Ends the driver and removes the storage. */
  dispose(): Promise<void>
}

/** A driver on a storage that has little room. */
export interface FullTarget extends DriverTarget {
  /** The room in bytes. */
  readonly capacity: number
  /** What an upload fails with that does not fit, where the server does not say why. Default: `STORAGE_FULL`. */
  readonly code?: ErrorCode
}

/** A part of the contract's tests. */
export type ContractPart =
  | 'objects'
  | 'keys'
  | 'sources'
  | 'odd sources'
  | 'publishing'
  | 'reading'
  | 'listing'
  | 'storage'
  | RemotePart

/** A part of the contract's tests that needs a {@link RemoteOptions}. */
export type RemotePart =
  | 'cut uploads'
  | 'cut replacements'
  | 'cut downloads'
  | 'cut calls'
  | 'early ends'
  | 'silence'
  | 'slowness'
  | 'pauses'
  | 'refusal'
  | 'restart'
  | 'staging'

/** How {@link describeDriver} gets at a driver, and what it can expect of it. */
export interface ContractOptions<T extends DriverTarget = DriverTarget> {
  /** What the driver must say of itself; also chooses the tests. */
  capabilities: DriverCapabilities
  /** A driver on an empty storage; called for each test. A server is better started once, outside. */
  create(): Promise<T>
  /**
   * Leaves in a target of `create` what a process leaves that is killed in the middle of an upload. Needed where the
   * driver has `cleanUp`, and only there.
   */
  leaveUnfinished?(target: T): Promise<void>
  /**
   * A second driver of the same server, whose prefix is that of a target of `create` with something added, such as
   * `backup` and `backup2`. Without it the test of neighbouring prefixes is left out.
   */
  neighbour?(target: T): Promise<StorageDriver>
  /** As `create`, on a storage that has room for `capacity` bytes and no more. Without it the tests of a full storage are left out. */
  createFull?(): Promise<FullTarget>
  /** The size of a large object in bytes. Default: 48 MiB and some. */
  largeSize?: number
  /**
   * The size in bytes of a body that opens once, half of which comes before what goes wrong with it. Default: 3000000. Twice
   * the first part and some, where a driver uploads in parts: else it has sent none by then.
   */
  streamSize?: number
  /**
   * The longest name in a key that the storage takes, in bytes. Default: 255. Less is for a storage that makes names
   * longer, as one that encrypts them; a longer name must be an error there.
   */
  longestName?: number
  /**
   * Stores each key's own text under it on the server, without the driver: for the listings of a driver whose uploads
   * cost much. Default: the driver's own `put`.
   */
  fill?(target: T, keys: readonly string[]): Promise<void>
  /** The number of objects in a long listing. Default: 2500, which is more than two pages of S3. */
  manyObjects?: number
  /**
   * How often a test repeats what goes wrong only now and then. Default: 25; fewer for a driver whose calls
   * cost much.
   */
  turns?: number
  /**
   * Whether cases that differ from one that is tried in a number alone are left out, most places of a cut too, and odd names
   * are put into fewer keys: for a suite that is to be short. Default: false. With `VARVE_THOROUGH=1` none is.
   */
  brief?: boolean
  /** For one test, in milliseconds. Default: 60000. */
  timeoutMs?: number
  /**
   * The parts that are tried. Default: all; fewer for a further setting of a driver that has passed all of them in
   * another one. With `VARVE_THOROUGH=1` all are tried.
   */
  parts?: readonly ContractPart[]
  /** For a driver whose storage is reached over a network. Without it the tests of a bad network and server are left out. */
  remote?: RemoteOptions
}

/** A driver that a bad network stands in front of. */
export interface RemoteTarget extends DriverTarget {
  /** Every connection of the driver goes through it; those of `inspect` and `readRaw` do not. */
  readonly proxy: NetworkProxy
}

/** A driver that must be refused. */
export interface RefusedDriver {
  /** Why: `a wrong password`, `a bucket that is not there`, … */
  readonly what: string
  /** The code of the error of every call, and of the failed step of `check`. */
  readonly code: ErrorCode
  /** The driver. The test disposes of it. */
  create(): Promise<StorageDriver>
}

/** What {@link describeDriver} needs to try a driver on a network and a server that fail. */
export interface RemoteOptions {
  /**
   * A driver on an empty storage, every connection of which goes through a proxy of its own. Its timeout for a
   * server that is silent is `idleTimeoutMs`.
   */
  create(): Promise<RemoteTarget>
  /** Kills the server (SIGKILL) and starts it again, on the same port, with what it held. */
  restartServer(): Promise<void>
  /** Drivers that must be refused, whatever they are asked: wrong password, missing bucket, … */
  refused: readonly RefusedDriver[]
  /**
   * Secrets that may be in no error, in no process list and in nothing that is seen of the driver itself, such as its
   * location: as they are, escaped, in hexadecimal or in base64, also as a part of something.
   */
  secrets: readonly string[]
  /** How long the drivers of `create` wait for a server that is silent, in milliseconds. Default: 1500. */
  idleTimeoutMs?: number
  /**
   * Whether the driver keeps connections from one call to the next. Default: true; without, what befalls a first call
   * is not tried on later ones again.
   */
  keepsConnections?: boolean
  /**
   * The size in bytes of the object whose upload and download are cut, at many places. Default: 1000003. Of
   * more than one part, where a driver uploads in parts, it tries more.
   */
  cutSize?: number
  /**
   * The size in bytes of an upload that is cut and has to go on where it broke off. Default: that of a large object. More is
   * for a driver that can go on only from some megabytes back.
   */
  resumeSize?: number
  /**
   * At how many places at most a call is cut in either direction. Default: all that the suite knows, up to 14, or 3 where
   * {@link ContractOptions.brief} is set. Fewer for a driver whose calls cost much; those near the end are the last to go.
   */
  mostCuts?: number
}

/** {@link ContractOptions} with their defaults. */
export type Contract = ContractOptions &
  Required<
    Pick<ContractOptions, 'largeSize' | 'streamSize' | 'manyObjects' | 'turns' | 'brief' | 'timeoutMs'>
  >

/** Whether a part is to be tried. */
export function tries({ parts }: Contract, part: ContractPart): boolean {
  return parts === undefined || parts.includes(part)
}

/**
 * A target for the test that runs. At the test's end the server must hold what the driver lists and nothing
 * else, or nothing unfinished, whatever the test was about.
 */
export async function begin<T extends DriverTarget>(create: () => Promise<T>): Promise<T> {
  const target = await create()
  onTestFinished(async () => {
    try {
      await expectTidy(target)
    } finally {
      await target.dispose()
    }
  })
  return target
}

/** Expects the server to hold what the driver lists and nothing else, or nothing unfinished where the target can tell. */
export async function expectTidy(target: DriverTarget): Promise<void> {
  const raw = await rawNames(target)
  if (target.isUnfinished && !isThorough) {
    expect(raw.filter(name => target.isUnfinished?.(name))).toEqual([])
  } else {
    expect(raw).toEqual(await listed(target.driver))
  }
}

/** The names of everything on the server, sorted. */
export async function rawNames(target: DriverTarget): Promise<string[]> {
  return (await target.inspect()).map(object => object.name).sort()
}

/** The keys that a driver lists, sorted. */
export async function listed(driver: StorageDriver, prefix = '', options?: CallOptions): Promise<string[]> {
  const keys: string[] = []
  for await (const { key } of driver.list(prefix, options)) keys.push(key)
  return keys.sort()
}

/** An object, or a range of it, as the driver reads it. */
export async function read(driver: StorageDriver, key: string, range?: ByteRange): Promise<Buffer> {
  return buffer(await driver.get(key, range ? { range } : {}))
}

/** Has an object be there, for a test that is not about how it came there. */
export async function place(
  target: DriverTarget,
  key: string,
  object: Uint8Array | { seed: number; size: number },
): Promise<void> {
  const bytes = object instanceof Uint8Array ? object : bytesOf(object)
  if (target.writeRaw) await target.writeRaw(key, bytes)
  else await target.driver.put(key, bytesBody(bytes))
}

/** Expects an object to be these bytes, by the driver and by the server. */
export async function expectStored(target: DriverTarget, key: string, bytes: Uint8Array): Promise<void> {
  const [given, raw] = await Promise.all([read(target.driver, key), target.readRaw(key)])
  expect(given.equals(bytes), 'the driver reads other bytes').toBe(true)
  expect(Buffer.from(raw).equals(bytes), 'the server holds other bytes').toBe(true)
}

/** The same, and that the driver tells the object's size. */
export async function expectFound(target: DriverTarget, key: string, bytes: Uint8Array): Promise<void> {
  expect(await target.driver.stat(key)).toMatchObject({ key, size: bytes.byteLength })
  await expectStored(target, key, bytes)
}

/** Expects several objects to be these bytes by the server, and to be listed with their sizes by the driver. */
export async function expectAllStored(
  target: DriverTarget,
  prefix: string,
  objects: ReadonlyMap<string, Uint8Array>,
): Promise<void> {
  const sizes = new Map<string, number>()
  for await (const { key, size } of target.driver.list(prefix)) sizes.set(key, size)
  expect(sizes).toEqual(new Map([...objects].map(([key, bytes]) => [key, bytes.byteLength])))
  for (const [key, bytes] of objects) {
    const raw = Buffer.from(await target.readRaw(key))
    expect(raw.equals(bytes), `the server holds other bytes under ${key}`).toBe(true)
  }
}

/** Expects that nothing is stored, visible or not. */
export async function expectNothing(target: DriverTarget): Promise<void> {
  expect(await target.inspect()).toEqual([])
}

/** What an error of a code looks like, for `rejects.toMatchObject` and its like. */
export function errorOf(code: string): { name: string; code: string } {
  return { name: 'VarveError', code }
}

/** What a caller gives a call up for: the error of another one, which is not to be taken for this one's. */
export const anotherError: VarveError = new VarveError('DISK_BUSY', 'another run failed', {
  context: { published: 'another' },
  retryable: true,
})

/** The bytes of a pattern body. */
export function bytesOf({ seed, size }: { seed: number; size: number }): Buffer {
  return patternBytes(seed, 0, size)
}
