import { fileIdentity } from './bitmap-twin.ts'
import { DiskLock } from './disk-lock.ts'
import { isVarveError } from './errors.ts'
import type { DiskPlace, Host } from './host.ts'
import { type OverwrittenDisk, RunJournal } from './journal.ts'
import { type Presence, presenceOf } from './presence.ts'
import { rbdImageOf } from './rbd.ts'
import { isClusterTold, isImageGone } from './rbd-disk.ts'
import type { RunOptions } from './run-options.ts'

/** The disks that a restore in place has left incomplete; undefined where it is not settled besides. */
export function incompleteDisks(journal: RunJournal): readonly OverwrittenDisk[] | undefined {
  const last = journal.of('incomplete').at(-1)
  return last && journal.of('write-in-place').filter(({ disk }) => last.disks.includes(disk))
}

/** Whether what was written over is at its path still; `gone` also where another file or image is there. */
export async function presenceOfOverwritten(
  { path, identity, folder, of }: OverwrittenDisk,
  host: Host,
  run: RunOptions,
): Promise<Presence> {
  const isOther = (now: string) => identity !== undefined && now !== identity
  const image = rbdImageOf(path)
  if (image === undefined) {
    const presence = await presenceOf(path, folder)
    return presence === 'there' && isOther(await fileIdentity(path)) ? 'gone' : presence
  }
  const now = await imageIdentity(image, of, host, run)
  if (now !== undefined && !isOther(now)) return 'there'
  return (await isClusterTold(of, host, run)) ? 'gone' : 'unknown'
}

async function imageIdentity(
  image: string,
  of: OverwrittenDisk['of'],
  host: Host,
  run: RunOptions,
): Promise<string | undefined> {
  try {
    const cluster = await host.rbd(of, run)
    return (await cluster.image(image, run)).id
  } catch (error) {
    if (isImageGone(error)) return undefined
    throw error
  }
}

/**
 * Whether an instance ran before a restore in place that was cut short, which left it off, and is to run again: not as long
 * as a disk of it is incomplete that is not among those which are restored now.
 */
export async function ranBeforeCut(
  stateDir: string,
  { name, disks }: { readonly name: string; readonly disks: readonly DiskPlace[] },
  restored: ReadonlySet<string>,
): Promise<boolean> {
  const own = new Set(disks.map(({ path }) => path))
  let ran = false
  for (const id of await RunJournal.unsettled(stateDir)) {
    const journal = await readIfReadable(stateDir, id)
    const incomplete = ((journal && incompleteDisks(journal)) ?? []).filter(({ path }) => own.has(path))
    if (incomplete.some(({ path }) => !restored.has(path))) return false
    const power = journal?.of('power-off').at(-1)
    if (incomplete.length > 0 && power?.instance === name) ran ||= power.wasRunning && power.start
  }
  return ran
}

/** Takes the disks of a restore that is complete off the record of those that were left incomplete before. */
export async function forgetIncomplete({ header, stateDir }: RunJournal): Promise<void> {
  const restored = new Set(header.disks.map(({ path }) => path))
  for (const id of await RunJournal.unsettled(stateDir)) await forgetDisks(stateDir, id, restored)
}

async function forgetDisks(stateDir: string, id: string, restored: ReadonlySet<string>): Promise<void> {
  // A restore of another disk of the same run may be doing this too.
  await using _ = await DiskLock.waitFor(`journal ${id}`)
  const journal = await readIfReadable(stateDir, id)
  const disks = (journal && incompleteDisks(journal)) ?? []
  const left = disks.filter(({ path }) => !restored.has(path))
  if (left.length < disks.length) await journal?.settledBut(left)
}

async function readIfReadable(stateDir: string, id: string): Promise<RunJournal | undefined> {
  return RunJournal.read(stateDir, id).catch(error => {
    if (isVarveError(error, 'RUN_UNRESOLVED')) return undefined // "recover" tells of one that cannot be read
    throw error
  })
}
