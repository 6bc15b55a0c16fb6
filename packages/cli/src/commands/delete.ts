import {
  backupOfKey,
  ChainManager,
  type ErrorCode,
  errorMessage,
  findBackup,
  isVarveError,
  type StorageDriver,
} from '@varve/core'
import type { Command } from 'commander'
import { confirm, type Question } from '../confirm.ts'
import { storedSize } from '../manifest-text.ts'
import { libvirtUriOption, stateDirOption, storageOption } from '../options.ts'
import type { Session } from '../session.ts'
import { formatSize } from '../size-text.ts'
import { formatTime } from '../time-text.ts'

/** What a backup that is there, and can be deleted, may be found to be. */
const DAMAGED: readonly ErrorCode[] = ['MANIFEST_INVALID', 'MANIFEST_VERSION']

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
  if (!options.yes) await confirm(session, await question(session, storage, backup))
  const host = await session.libvirtHost(options.libvirtUri)
  const stateDir = await session.stateDir(options.stateDir)
  await new ChainManager({ storage, host, stateDir }).delete(backup, session.run())
  await session.result({ deleted: backup }, `Backup ${backup} is deleted.`)
}

async function hasFolder(session: Session, storage: StorageDriver, backup: string): Promise<boolean> {
  for await (const { key } of storage.list('', session.call()))
    if (backupOfKey(key)?.backup === backup) return true
  return false
}

/** A backup that is damaged, or what one has left, can be deleted too, but nobody knows what it was. */
async function question(session: Session, storage: StorageDriver, backup: string): Promise<Question> {
  const found = await findBackup(storage, backup, session.call()).catch(async error => {
    const isDamaged = DAMAGED.some(code => isVarveError(error, code))
    if (isDamaged) return errorMessage(error)
    if (isVarveError(error, 'BACKUP_NOT_FOUND') && (await hasFolder(session, storage, backup)))
      return 'it has no manifest.'
    throw error
  })
  if (typeof found === 'string') {
    const text = `What there is of the backup ${backup} will be deleted for good. It cannot be read: ${found}`
    return { text, answer: backup }
  }
  const { manifest } = found
  const { instance, kind, frozenAt } = manifest
  return {
    text: `The ${kind} backup ${backup} of ${instance.name} from ${formatTime(new Date(frozenAt))} (${formatSize(storedSize(manifest))}) will be deleted for good.`,
    answer: instance.name,
  }
}
