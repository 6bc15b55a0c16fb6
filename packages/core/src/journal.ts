import { type FileHandle, mkdir, open, readdir, readFile, rm } from 'node:fs/promises'
import { join } from 'node:path'
import { isBackupId } from './backup-id.ts'
import { VarveError } from './errors.ts'
import type { DiskOverlay, HostReference } from './host.ts'

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
  readonly host: HostReference
  readonly storage: StorageReference
  /** The disks that the run holds: target name and path. */
  readonly disks: readonly { readonly name: string; readonly path: string }[]
  /** ISO 8601, UTC. */
  readonly startedAt: string
}

/** A side effect of a run, recorded before it happens. */
export type JournalStep =
  // backup
  | { readonly step: 'bitmap-add'; readonly bitmap: string; readonly disks: readonly string[] }
  | { readonly step: 'filesystem-freeze' }
  | { readonly step: 'filesystem-thawed' }
  | { readonly step: 'snapshot'; readonly overlays: readonly DiskOverlay[] }
  | { readonly step: 'export'; readonly folder: string }
  | { readonly step: 'upload'; readonly folder: string }
  | {
      readonly step: 'publish'
      readonly manifest: string
      readonly retire: Readonly<Record<string, readonly string[]>>
    }
  // restore
  | { readonly step: 'target-create'; readonly temporary: string }
  | {
      readonly step: 'power-off'
      readonly instance: string
      readonly wasRunning: boolean
      readonly start: boolean
    }
  | { readonly step: 'write-in-place'; readonly disk: string; readonly path: string }
  | { readonly step: 'written-in-place' }
  | { readonly step: 'define'; readonly instance: string; readonly xml: string }
  | { readonly step: 'finish'; readonly renames: readonly Rename[] }
  | { readonly step: 'defined' }
  | { readonly step: 'undo' }

/** A complete new file and the name that it takes. */
export interface Rename {
  readonly temporary: string
  readonly target: string
}

/** A step of one name. */
export type JournalStepOf<S extends JournalStep['step']> = Extract<JournalStep, { step: S }>

/**
 * The record of what one run has done to its host and storage, kept in `<stateDir>/runs/<id>.jsonl`. Every
 * step is on the disk before it happens, so that whatever interrupts the run, another process knows what may
 * have to be undone. The file is removed once the run is settled.
 */
export class RunJournal {
  readonly header: JournalHeader
  readonly #path: string
  readonly #steps: JournalStep[]

  private constructor(path: string, header: JournalHeader, steps: JournalStep[]) {
    this.#path = path
    this.header = header
    this.#steps = steps
  }

  /** Begins a journal; the header is on the disk when this resolves. */
  static async begin(stateDir: string, header: JournalHeader): Promise<RunJournal> {
    const folder = runsFolder(stateDir)
    await mkdir(folder, { recursive: true, mode: 0o700 })
    const path = join(folder, `${header.id}.jsonl`)
    await appendLine(path, header, 'ax')
    await syncFolder(folder)
    return new RunJournal(path, header, [])
  }

  /** The journals of runs that have not been settled: of those that go on, and of those that died. */
  static async unsettled(stateDir: string): Promise<RunJournal[]> {
    const folder = runsFolder(stateDir)
    const names = await readdir(folder).catch(error => {
      if (error instanceof Error && 'code' in error && error.code === 'ENOENT') return []
      throw error
    })
    const journals: RunJournal[] = []
    for (const name of names.sort()) {
      if (!name.endsWith('.jsonl') || !isBackupId(name.slice(0, -'.jsonl'.length))) continue
      const journal = await readJournal(join(folder, name))
      if (journal) journals.push(new RunJournal(join(folder, name), journal.header, journal.steps))
    }
    return journals
  }

  /** What was recorded so far, in order. */
  get steps(): readonly JournalStep[] {
    return this.#steps
  }

  /** The steps of one name, in order. */
  of<S extends JournalStep['step']>(name: S): JournalStepOf<S>[] {
    return this.#steps.filter((step): step is JournalStepOf<S> => step.step === name)
  }

  /** Records a step; it is on the disk when this resolves, and only then may it be done. */
  async record(step: JournalStep): Promise<void> {
    await appendLine(this.#path, step, 'a')
    this.#steps.push(step)
  }

  /** The run left nothing to settle: its journal goes. */
  async settled(): Promise<void> {
    await rm(this.#path, { force: true })
  }
}

function runsFolder(stateDir: string): string {
  return join(stateDir, 'runs')
}

async function appendLine(path: string, value: object, flags: string): Promise<void> {
  const file: FileHandle = await open(path, flags, 0o600)
  try {
    await file.appendFile(`${JSON.stringify(value)}\n`)
    await file.datasync()
  } finally {
    await file.close()
  }
}

async function syncFolder(folder: string): Promise<void> {
  const handle = await open(folder)
  try {
    await handle.sync()
  } finally {
    await handle.close()
  }
}

async function readJournal(
  path: string,
): Promise<{ header: JournalHeader; steps: JournalStep[] } | undefined> {
  const text = await readFile(path, 'utf8').catch(error => {
    if (error instanceof Error && 'code' in error && error.code === 'ENOENT') return '' // settled in between
    throw error
  })
  // A last line without its end was cut short, so its step was never begun.
  const lines = text.split('\n').slice(0, -1)
  try {
    const [header, ...steps] = lines.map(line => JSON.parse(line))
    if (header === undefined) return undefined // died before its first step
    if (header.version !== 1) throw new Error(`version ${header.version}`)
    return { header, steps }
  } catch (error) {
    throw new VarveError(
      'RUN_UNRESOLVED',
      `The run journal ${path} cannot be read. Look at the instance's disks for an overlay or a bitmap of Varve's, put them right and move the file away.`,
      {
        context: { path },
        cause: error,
      },
    )
  }
}
