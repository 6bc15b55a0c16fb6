import { ChainManager, findBackup } from '@varve/core'
import type { Command } from 'commander'
import { confirm } from '../confirm.ts'
import { storedSize } from '../manifest-text.ts'
import { libvirtUriOption, stateDirOption, storageOption } from '../options.ts'
import type { Session } from '../session.ts'
import { formatSize } from '../size-text.ts'
import { formatTime } from '../time-text.ts'

interface DeleteOptions {
  yes?: boolean
  storage?: string
  libvirtUri?: string
  stateDir?: string
}

/** `varve delete` */
export function deleteCommand(program: Command, session: Session): void {
  program
    .command('delete')
    .summary('delete a backup that no other one rests on')
    .description('Deletes a backup for good. One that others rest on is refused.')
    .argument('<backup>', 'id of the backup')
    .option('-y, --yes', 'do not ask')
    .addOption(storageOption())
    .addOption(libvirtUriOption())
    .addOption(stateDirOption())
    .addHelpText('after', '\nExample:\n  varve delete 20261123-231543-123-9f3a1c')
    .action((backup: string, options: DeleteOptions) => deleteBackup(session, backup, options))
}

async function deleteBackup(session: Session, backup: string, options: DeleteOptions): Promise<void> {
  await using storage = await session.openStorage(options.storage)
  if (!options.yes) {
    const { manifest } = await findBackup(storage, backup, session.call())
    const { instance, kind, frozenAt } = manifest
    await confirm(session, {
      text: `The ${kind} backup ${backup} of ${instance.name} from ${formatTime(new Date(frozenAt))} (${formatSize(storedSize(manifest))}) will be deleted for good.`,
      answer: instance.name,
    })
  }
  const host = await session.libvirtHost(options.libvirtUri)
  const stateDir = await session.stateDir(options.stateDir)
  await new ChainManager({ storage, host, stateDir }).delete(backup, session.run())
  await session.result({ deleted: backup }, `Backup ${backup} is deleted.`)
}
