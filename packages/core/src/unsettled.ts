import { VarveError } from './errors.ts'
import { RunJournal } from './journal.ts'

/**
 * Refuses disks on which a run was cut short, and those of an instance whose backup was: such a disk may be on
 * another file by now, when somebody made a snapshot. To be called with the disks held: the run is then known
 * to be dead.
 *
 * @throws RUN_UNRESOLVED
 */
export async function assertNoUnsettledRun(
  stateDir: string,
  instance: string | undefined,
  disks: readonly { readonly name: string; readonly path: string }[],
): Promise<void> {
  const paths = new Set(disks.map(({ path }) => path))
  const names = new Set(disks.map(({ name }) => name))
  for (const header of await RunJournal.headers(stateDir)) {
    const ofInstance = header.kind === 'backup' && header.instance === instance
    const disk = header.disks.find(({ name, path }) => paths.has(path) || (ofInstance && names.has(name)))
    if (!disk) continue
    throw new VarveError(
      'RUN_UNRESOLVED',
      `The ${header.kind} ${header.id} of ${header.instance} was cut short on the disk ${disk.name} (${disk.path}). Run "varve recover" first.`,
      {
        context: {
          run: header.id,
          kind: header.kind,
          instance: header.instance,
          disk: disk.name,
          path: disk.path,
        },
      },
    )
  }
}
