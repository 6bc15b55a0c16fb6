import { fileIdentity } from './bitmap-twin.ts'
import { VarveError } from './errors.ts'
import type { Instance } from './host.ts'
import { incompleteDisks } from './incomplete.ts'
import { incompleteMarks } from './incomplete-mark.ts'
import { type JournalHeader, type OverwrittenDisk, RunJournal } from './journal.ts'
import { RBD_PREFIX } from './rbd.ts'
import { statIfThere } from './stat-if-there.ts'

/** A disk that a run is about to hold. */
interface HeldDisk {
  readonly name: string
  readonly path: string
  /** Of a file, as far as they are known. */
  readonly bitmaps?: readonly { readonly name: string }[]
  /** Of an RBD image. */
  readonly state?: { readonly id: string; readonly metadata?: ReadonlyMap<string, string> }
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
  for (const disk of disks) {
    const [mark] = incompleteMarks(disk)
    if (mark !== undefined && !mayBeIncomplete.some(({ path }) => path === disk.path))
      throw isMarked(disk, mark)
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
    `The restore ${id} of ${instance} was cut short while it wrote over the disk ${disk} (${path}), which may hold neither the old nor the restored content. Restore the disk again. To keep it as it is, remove runs/${id}.jsonl in the state folder, and the mark that the next backup tells of.`,
    { context: { run: id, instance, disk, path } },
  )
}

/** Nothing else is known of the restore: it was cut short on another host, or its journal was removed. */
function isMarked({ name, path, state }: HeldDisk, mark: string): VarveError {
  const image = state && path.slice(RBD_PREFIX.length)
  const removal = image
    ? `rbd image-meta remove ${image} ${mark}`
    : `qemu-img bitmap --remove -f qcow2 ${path} ${mark}`
  return new VarveError(
    'DISK_INCOMPLETE',
    `A restore was cut short while it wrote over the disk ${name} (${path}), which may hold neither the old nor the restored content; it has the mark ${mark}, perhaps of another host. Restore the disk again. To keep it as it is, remove the mark while the instance is off (${removal}).`,
    { context: { disk: name, path, mark } },
  )
}
