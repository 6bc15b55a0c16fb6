import { fileIdentity } from './bitmap-twin.ts'
import { VarveError } from './errors.ts'
import type { Instance } from './host.ts'
import { incompleteDisks } from './incomplete.ts'
import { type JournalHeader, type OverwrittenDisk, RunJournal } from './journal.ts'
import { statIfThere } from './stat-if-there.ts'

/** A disk that a run is about to hold. */
interface HeldDisk {
  readonly name: string
  readonly path: string
  /** Of an RBD image. */
  readonly state?: { readonly id: string }
}

/**
 * Refuses disks on which a run was cut short, and those of an instance whose backup was: such a disk may be on
 * another file by now, when somebody made a snapshot. Also those that a restore in place has left incomplete,
 * unless they are among `mayBeIncomplete`. To be called with the disks held: the run is then known to be dead.
 *
 * @throws RUN_UNRESOLVED, DISK_INCOMPLETE
 */
export async function assertNoUnsettledRun(
  stateDir: string,
  instance: Pick<Instance, 'name' | 'uuid'> | undefined,
  disks: readonly HeldDisk[],
  mayBeIncomplete: readonly { readonly path: string }[] = [],
): Promise<void> {
  const paths = new Set(disks.map(({ path }) => path))
  const names = new Set(disks.map(({ name }) => name))
  for (const header of await RunJournal.headers(stateDir)) {
    const ofInstance = header.kind === 'backup' && instance !== undefined && isOf(instance, header)
    const disk = header.disks.find(({ name, path }) => paths.has(path) || (ofInstance && names.has(name)))
    if (!disk) continue
    const journal = header.kind === 'restore' ? await RunJournal.read(stateDir, header.id) : undefined
    const incomplete = journal && incompleteDisks(journal)
    if (!incomplete) throw unresolved(header, disk)
    for (const left of incomplete) {
      const isHere = ({ path }: { readonly path: string }) => path === left.path
      const held = disks.find(isHere)
      if (held && !mayBeIncomplete.some(isHere) && (await isSame(held, left)))
        throw isIncomplete(header, left)
    }
  }
}

/** Whether a run was one of this instance, and not of a former one of its name. */
function isOf({ name, uuid }: Pick<Instance, 'name' | 'uuid'>, header: JournalHeader): boolean {
  const isKnown = uuid !== undefined && header.uuid !== undefined
  return header.instance === name && (!isKnown || header.uuid === uuid)
}

/** Whether what is there is what was written over, and not another one under its path. */
async function isSame({ path, state }: HeldDisk, { identity }: OverwrittenDisk): Promise<boolean> {
  if (identity === undefined) return true
  if (state) return state.id === identity
  return (await statIfThere(path)) !== undefined && (await fileIdentity(path)) === identity
}

function unresolved({ id, kind, instance }: JournalHeader, { name, path }: HeldDisk): VarveError {
  return new VarveError(
    'RUN_UNRESOLVED',
    `The ${kind} ${id} of ${instance} was cut short on the disk ${name} (${path}). Run "varve recover" first.`,
    { context: { run: id, kind, instance, disk: name, path } },
  )
}

function isIncomplete({ id, instance }: JournalHeader, { disk, path }: OverwrittenDisk): VarveError {
  return new VarveError(
    'DISK_INCOMPLETE',
    `The restore ${id} of ${instance} was cut short while it wrote over the disk ${disk} (${path}), which may hold neither the old nor the restored content. Restore the disk again. To keep it as it is, remove runs/${id}.jsonl in the state folder.`,
    { context: { run: id, instance, disk, path } },
  )
}
