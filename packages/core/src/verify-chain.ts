import type { Catalog, StoredBackup } from './backups.ts'
import { type ChainWalk, filesOf, missingObjects, objectsOf } from './chain.ts'
import { checkDisk, checkFile, type ObjectReader } from './check-objects.ts'
import type { ErrorCode, VarveError } from './errors.ts'
import { fanOut } from './fan-out.ts'
import type { StorageDriver } from './storage.ts'
import { tell } from './tell.ts'

/** Disks that are read at the same time. */
const DISKS_AT_ONCE = 2

const PROGRESS_INTERVAL_MS = 200

/** Something that is wrong with a backup or with what it rests on. */
export interface VerifyProblem {
  /** The backup of the chain that it was found in. */
  readonly backup: string
  /** The code of the error that a restore would meet. */
  readonly code: ErrorCode
  /** What is wrong and what to do. */
  readonly message: string
  /** The object that is wrong, where it is one. */
  readonly key?: string
  /** Where in the object the first damaged block begins, in bytes. */
  readonly offset?: number
}

/** How far a deep verification is. */
export interface VerifyProgress {
  /** Bytes that were read; less than the total at the end where an object could not be read. */
  readonly bytesDone: number
  /** Bytes of all the objects that are read; known from the first report on. */
  readonly bytesTotal: number
}

/** What `ChainManager.verify` found. */
export interface VerifyReport {
  /** The backup that was verified. */
  readonly backup: string
  /** What it was verified with: the full backup first, itself last. Shorter where the chain is broken. */
  readonly chain: readonly string[]
  /** Whether every byte was read. */
  readonly deep: boolean
  /** Whether nothing is wrong. */
  readonly ok: boolean
  /** Everything that is wrong; the oldest backup's first. */
  readonly problems: readonly VerifyProblem[]
}

/** What {@link verifyChain} looks at. */
export interface VerifyChainOptions {
  readonly storage: StorageDriver
  /** The backup to verify. */
  readonly backup: string
  readonly walk: ChainWalk
  readonly objects: Catalog['objects']
  readonly deep: boolean
  readonly signal: AbortSignal
  readonly onProgress?: ((progress: VerifyProgress) => void) | undefined
}

/** Finds everything that is wrong with a backup and what it rests on. A storage that fails is thrown. */
export async function verifyChain(options: VerifyChainOptions): Promise<VerifyReport> {
  const { backup, walk, objects, deep } = options
  const { links, problem } = walk
  const missing = links.flatMap(link =>
    missingObjects(link, objects).map(error => problemOf(link.manifest.id, error)),
  )
  const problems = [
    ...(problem ? [problemOf(backup, problem)] : []),
    ...missing,
    ...(deep ? await readEverything(options, new Set(missing.map(({ key }) => key))) : []),
  ]
  return {
    backup,
    chain: links.map(({ manifest }) => manifest.id),
    deep,
    ok: problems.length === 0,
    problems,
  }
}

async function readEverything(
  { storage, walk, signal, onProgress }: VerifyChainOptions,
  skip: ReadonlySet<string | undefined>,
): Promise<VerifyProblem[]> {
  const read = walk.links.flatMap(objectsOf).filter(({ key }) => !skip.has(key))
  const progress = new ByteProgress(
    read.reduce((total, { size }) => total + size, 0),
    onProgress,
  )
  const found = await fanOut(
    walk.links.flatMap(checksOf),
    { concurrency: DISKS_AT_ONCE, signal },
    async ({ link, check }, signal) => {
      const onBytes = (bytes: number) => progress.add(bytes)
      const damages = await check({ storage, folder: link.folder, skip, signal, onBytes })
      return damages.map(error => problemOf(link.manifest.id, error))
    },
  )
  progress.tell()
  return found.flat()
}

interface ObjectCheck {
  readonly link: StoredBackup
  readonly check: (reader: ObjectReader) => Promise<VarveError[]>
}

function checksOf(link: StoredBackup): ObjectCheck[] {
  return [
    ...link.manifest.disks.map(disk => ({ link, check: (reader: ObjectReader) => checkDisk(reader, disk) })),
    ...filesOf(link.manifest).map(file => ({
      link,
      check: (reader: ObjectReader) => checkFile(reader, file),
    })),
  ]
}

function problemOf(backup: string, { code, message, context }: VarveError): VerifyProblem {
  const { key, offset } = context
  return {
    backup,
    code,
    message,
    ...(typeof key === 'string' && { key }),
    ...(typeof offset === 'number' && { offset }),
  }
}

/** Counts bytes and tells of them a few times a second. */
class ByteProgress {
  readonly #total: number
  readonly #onProgress: ((progress: VerifyProgress) => void) | undefined
  #done = 0
  #toldAt = Number.NEGATIVE_INFINITY

  constructor(total: number, onProgress: ((progress: VerifyProgress) => void) | undefined) {
    this.#total = total
    this.#onProgress = onProgress
  }

  add(bytes: number): void {
    this.#done += bytes
    const now = performance.now()
    if (now - this.#toldAt < PROGRESS_INTERVAL_MS) return
    this.#toldAt = now
    this.tell()
  }

  tell(): void {
    tell(this.#onProgress, { bytesDone: this.#done, bytesTotal: this.#total })
  }
}
