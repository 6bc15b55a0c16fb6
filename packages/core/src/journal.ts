import { constants, type FileHandle, open, rm } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { isBackupId } from './backup-id.ts'
import { VarveError } from './errors.ts'
import type { FileState } from './file-state.ts'
import type { DiskOverlay, DiskPlace, HostReference } from './host.ts'
import { parseHeader, parseStep } from './journal-schema.ts'
import { makeFolders } from './make-folders.ts'
import type { ImageState } from './rbd.ts'
import { statIfThere } from './stat-if-there.ts'
import { inStateFolder, namesIn, textOf } from './state-folder.ts'

/** Which storage a run used; enough to tell it among those at hand, with no secret in it. */
export interface StorageReference {
  readonly type: string
  readonly location: string
}

/** What a run is about; the first record of its journal. */
export interface JournalHeader {
  readonly version: 1
  /** Id of the run; for a backup also the backup's. */
  readonly id: string
  readonly kind: 'backup' | 'restore'
  readonly instance: string
  /** libvirt's UUID of the instance of a backup, by which it is told from one that gets its name later. */
  readonly uuid?: string
  readonly host: HostReference
  readonly storage: StorageReference
  /** The disks that the run holds: target name and path. */
  readonly disks: readonly DiskPlace[]
  /** ISO 8601, UTC. */
  readonly startedAt: string
}

/** Every step that a journal may hold, in the order of the runs. The tests kill a run before and after each. */
export const JOURNAL_STEPS = [
  // backup
  'bitmap-add',
  'filesystem-freeze',
  'filesystem-thawed',
  'suspend',
  'snapshot',
  'frozen',
  'rbd-snapshot',
  'resumed',
  'export',
  'upload',
  'publish',
  'published',
  'merging',
  'pivot',
  'merged',
  'unmerged',
  // restore
  'define',
  'drop-backing',
  'power-off',
  'powered-off',
  'target-create',
  'image-create',
  'mark-incomplete',
  'write-in-place',
  'written-in-place',
  'incomplete',
  'finish',
  'defined',
  'undo',
] as const

/** The name of a step. */
export type JournalStepName = (typeof JOURNAL_STEPS)[number]

/** What each step tells. */
interface StepDetails {
  'bitmap-add': { readonly bitmap: string; readonly disks: readonly string[] }
  'filesystem-freeze': object
  'filesystem-thawed': object
  suspend: object
  snapshot: { readonly overlays: readonly DiskOverlay[] }
  /** What the overlays are on top of, from when on only their merging writes to it; nothing of block devices. */
  frozen: { readonly bases: readonly FrozenBase[] }
  'rbd-snapshot': {
    readonly snapshot: string
    readonly disks: readonly { readonly disk: string; readonly image: string }[]
  }
  resumed: object
  export: { readonly folder: string }
  upload: { readonly folder: string }
  publish: {
    /** The manifest's key, its size in bytes, and its BLAKE3. */
    readonly manifest: string
    readonly size: number
    readonly blake3: string
    /** The folder of the backup that it rests on. */
    readonly parent?: string
    readonly retire: Readonly<Record<string, readonly string[]>>
    /** The snapshots to remove, by disk, of the images in `rbd-snapshot`. */
    readonly retireSnapshots?: Readonly<Record<string, readonly string[]>>
  }
  /** The manifest was read back from the storage, with all that the backup rests on. */
  published: object
  /** What an overlay holds is about to be written to its base, which is newer than the overlay from then on. */
  merging: { readonly overlay: string }
  /** All that it holds is in its base, and the disk is about to be put there. */
  pivot: { readonly overlay: string }
  /** All that it holds is in its base, and it is about to be removed. */
  merged: { readonly overlay: string }
  /** The disk was found on it all the same: that the base has all does not hold any more. */
  unmerged: { readonly overlay: string }
  define: { readonly instance: string; readonly xml: string }
  'drop-backing': { readonly instance: string; readonly disks: readonly string[] }
  'power-off': {
    readonly instance: string
    readonly wasRunning: boolean
    readonly start: boolean
    /** How long the guest may take to shut down, in milliseconds. */
    readonly timeoutMs: number
  }
  'powered-off': object
  'target-create': {
    readonly temporary: string
    /** What tells its folder, without which nothing tells that it is gone. Journals of former versions lack it. */
    readonly folder?: string
  }
  'image-create': TargetImage
  /** A disk gets the mark by which every host knows it to be incomplete. It has these of former restores. */
  'mark-incomplete': OverwrittenDisk & { readonly mark: string; readonly former: readonly string[] }
  'write-in-place': OverwrittenDisk
  'written-in-place': object
  /** All is settled but these disks, which are to be restored again: the last such step counts. */
  incomplete: { readonly disks: readonly string[] }
  finish: { readonly renames: readonly Rename[]; readonly images?: readonly ImageRename[] }
  defined: object
  undo: object
}

/** A disk that a restore writes over. */
export interface OverwrittenDisk {
  readonly disk: string
  readonly path: string
  /** Tells the file, or the RBD image, from another one that takes its path later. */
  readonly identity?: string
  /**
   * What tells the folder of a file, without which nothing tells that it is gone. A device has none: its node comes and goes.
   * Journals of former versions lack it.
   */
  readonly folder?: string
  /** The disk whose cluster an RBD image is in; see {@link TargetImage}. */
  readonly of?: TargetImage['of']
}

/** The file under an overlay, as it was frozen. */
export interface FrozenBase extends FileState {
  readonly overlay: string
}

/** A step of one name. */
export type JournalStepOf<S extends JournalStepName> = S extends JournalStepName
  ? { readonly step: S } & StepDetails[S]
  : never

/** A side effect of a run, recorded before it happens. */
export type JournalStep = JournalStepOf<JournalStepName>

/** A complete new file and the name that it takes. */
export interface Rename {
  readonly temporary: string
  readonly target: string
  /** Tells the file once it has its name. Journals of former versions lack it. */
  readonly identity?: string
  /** The file that it replaces, to which nobody may write from then on. Journals of former versions lack it. */
  readonly replaces?: FileState
  /** Whether nothing may be replaced by it. Default: false. */
  readonly isNew?: boolean
}

/** An RBD image that a restore makes. */
export interface TargetImage {
  /** `<pool>/[<namespace>/]<image>` */
  readonly image: string
  /** The disk whose cluster it is in; absent where it is in the cluster of the host's own options. */
  readonly of?: { readonly instance: string; readonly disk: string }
}

/** A complete new RBD image and the name that it takes, `<pool>/[<namespace>/]<image>`. */
export interface ImageRename extends TargetImage {
  readonly target: string
  /** The id that Ceph gave it, by which it is known once it has its name. */
  readonly id: string
  /** The image that it replaces, to which nobody may write from then on. Journals of former versions lack it. */
  readonly replaces?: ImageState
  /** Whether nothing may be replaced by it. Default: false. */
  readonly isNew?: boolean
}

/**
 * The record of what one run has done to its host and storage, kept in `<stateDir>/runs/<id>.jsonl`. Every
 * step is on the disk before it happens, so that whatever interrupts the run, another process knows what may
 * have to be undone. The file is removed once the run is settled; that of a restore in place which left a disk incomplete,
 * once the disk has been restored.
 */
export class RunJournal {
  readonly header: JournalHeader
  readonly stateDir: string
  readonly #path: string
  readonly #steps: JournalStep[]
  /** Bytes of the whole lines. What is beyond them was cut short, by a full disk or a power cut. */
  #length: number

  private constructor(stateDir: string, header: JournalHeader, steps: JournalStep[], length: number) {
    this.stateDir = stateDir
    this.#path = pathOf(stateDir, header.id)
    this.header = header
    this.#steps = steps
    this.#length = length
  }

  /**
   * Begins a journal; the header is on the disk when this resolves.
   *
   * @throws STATE_DIR_FAILED; there is no journal then
   */
  static async begin(stateDir: string, header: JournalHeader): Promise<RunJournal> {
    const path = pathOf(stateDir, header.id)
    const length = await inStateFolder(path, () => createFile(path, [header]))
    return new RunJournal(stateDir, header, [], length)
  }

  /**
   * The ids of the runs that have not been settled: of those that go on, of those that died, and of restores in place that
   * left a disk incomplete.
   *
   * @throws STATE_DIR_FAILED
   */
  static async unsettled(stateDir: string): Promise<string[]> {
    const names = await namesIn(runsFolder(stateDir))
    return names
      .filter(name => name.endsWith(SUFFIX))
      .map(name => name.slice(0, -SUFFIX.length))
      .filter(isBackupId)
      .sort()
  }

  /**
   * Reads the journal of a run; undefined where it has none any more, or died before its first step.
   *
   * @throws STATE_DIR_FAILED, RUN_UNRESOLVED
   */
  static async read(stateDir: string, id: string): Promise<RunJournal | undefined> {
    const path = pathOf(stateDir, id)
    const { lines, length } = await readLines(path)
    return readable(path, () => {
      const [header, ...steps]: unknown[] = lines.map(line => JSON.parse(line))
      if (header === undefined) return undefined
      return new RunJournal(stateDir, parseHeader(header), steps.map(parseStep), length)
    })
  }

  /**
   * Removes what a process has left of a journal that died before the header was whole, and so before it did anything. Not
   * within an hour: it may be being written.
   *
   * @throws STATE_DIR_FAILED
   */
  static async removeBegun(stateDir: string, id: string): Promise<void> {
    const path = join(runsFolder(stateDir), id + SUFFIX)
    await inStateFolder(path, async () => {
      const { mtimeMs } = (await statIfThere(path)) ?? { mtimeMs: Number.POSITIVE_INFINITY }
      if (Date.now() - mtimeMs > BEGUN_FOR_MS) await rm(path, { force: true })
    })
  }

  /**
   * What the runs are about that have not been settled, whatever their steps are.
   *
   * @throws STATE_DIR_FAILED, RUN_UNRESOLVED
   */
  static async headers(stateDir: string): Promise<JournalHeader[]> {
    const headers: JournalHeader[] = []
    for (const id of await RunJournal.unsettled(stateDir)) {
      const path = pathOf(stateDir, id)
      const [line] = (await readLines(path)).lines
      if (line !== undefined) headers.push(readable(path, () => parseHeader(JSON.parse(line))))
    }
    return headers
  }

  /** What was recorded so far, in order. */
  get steps(): readonly JournalStep[] {
    return this.#steps
  }

  /** The steps of one name, in order. */
  of<S extends JournalStepName>(name: S): JournalStepOf<S>[] {
    return this.#steps.filter((step): step is JournalStepOf<S> & JournalStep => step.step === name)
  }

  /**
   * Records a step; it is on the disk when this resolves, and only then may it be done. Where the file is gone, as by
   * somebody who cleans up, it is made anew with all that it held.
   *
   * @throws STATE_DIR_FAILED
   */
  async record(step: JournalStep): Promise<void> {
    const whole = [this.header, ...this.#steps, step]
    this.#length = await inStateFolder(this.#path, () =>
      writeLines(this.#path, [step], this.#length).catch(error => {
        if (error.code === 'ENOENT') return createFile(this.#path, whole)
        throw error
      }),
    )
    this.#steps.push(step)
  }

  /**
   * The run left nothing to settle but these disks, which are to be restored again. Without any its journal goes.
   *
   * @throws STATE_DIR_FAILED
   */
  async settledBut(incomplete: readonly OverwrittenDisk[]): Promise<void> {
    if (incomplete.length === 0) await this.settled()
    else await this.record({ step: 'incomplete', disks: incomplete.map(({ disk }) => disk) })
  }

  /**
   * The run left nothing to settle: its journal goes.
   *
   * @throws STATE_DIR_FAILED
   */
  async settled(): Promise<void> {
    await inStateFolder(this.#path, async () => {
      await rm(this.#path, { force: true })
      await syncFolder(dirname(this.#path)) // one that a power cut brings back would be settled again
    })
  }
}

const SUFFIX = '.jsonl'
/** How long a header may be being written, which takes milliseconds. */
const BEGUN_FOR_MS = 60 * 60 * 1000

function runsFolder(stateDir: string): string {
  return join(stateDir, 'runs')
}

function pathOf(stateDir: string, id: string): string {
  return join(runsFolder(stateDir), id + SUFFIX)
}

/** Makes a journal that is not there and resolves with its length, all of it durable; or leaves none. */
async function createFile(path: string, values: readonly object[]): Promise<number> {
  const folder = dirname(path)
  for (const made of await makeFolders(folder)) await syncFolder(dirname(made))
  await (await open(path, 'ax', 0o600)).close()
  try {
    const length = await writeLines(path, values, 0)
    await syncFolder(folder)
    return length
  } catch (error) {
    await rm(path, { force: true })
    throw error
  }
}

/** Writes lines after the first `length` bytes of a file that is there and resolves with its new length, all durable. */
async function writeLines(path: string, values: readonly object[], length: number): Promise<number> {
  const lines = Buffer.from(values.map(value => `${JSON.stringify(value)}\n`).join(''))
  const file: FileHandle = await open(path, constants.O_WRONLY | constants.O_APPEND)
  try {
    await file.truncate(length)
    await file.appendFile(lines)
    await file.datasync()
  } finally {
    await file.close()
  }
  return length + lines.byteLength
}

async function syncFolder(folder: string): Promise<void> {
  const handle = await open(folder)
  try {
    await handle.sync()
  } finally {
    await handle.close()
  }
}

/** The whole lines of a journal and their length in bytes; none where it was settled in between. */
async function readLines(path: string): Promise<{ lines: string[]; length: number }> {
  const text = (await textOf(path)) ?? ''
  // A last line without its end was cut short, so its step was never begun.
  const whole = text.slice(0, text.lastIndexOf('\n') + 1)
  return { lines: whole.split('\n').slice(0, -1), length: Buffer.byteLength(whole) }
}

/** @throws RUN_UNRESOLVED */
function readable<T>(path: string, parse: () => T): T {
  try {
    return parse()
  } catch (cause) {
    throw new VarveError(
      'RUN_UNRESOLVED',
      `The run journal ${path} cannot be read. Look at the instance's disks for an overlay or a bitmap of Varve's, put them right and move the file away.`,
      { context: { path }, cause },
    )
  }
}
