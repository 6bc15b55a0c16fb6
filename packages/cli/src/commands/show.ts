import { ChainManager, errorMessage, findBackup, isVarveError, type StorageDriver } from '@varve/core'
import type { Command } from 'commander'
import { manifestText } from '../manifest-text.ts'
import { storageOption } from '../options.ts'
import type { Session } from '../session.ts'

/** `varve show` */
export function showCommand(program: Command, session: Session): void {
  program
    .command('show')
    .summary('show everything about a backup')
    .description('Shows a backup: its disks, what it rests on, and where it is. With --json: its manifest.')
    .argument('<backup>', 'id of the backup')
    .addOption(storageOption())
    .addHelpText('after', '\nExample:\n  varve show 20261123-231543-123-9f3a1c')
    .action((backup: string, options: { storage?: string }) => show(session, backup, options))
}

async function show(session: Session, backup: string, options: { storage?: string }): Promise<void> {
  await using storage = await session.openStorage(options.storage)
  const { manifest, folder } = await findBackup(storage, backup, session.call())
  const chain = session.json ? '' : await describeChain(session, storage, backup)
  await session.result(manifest, manifestText(manifest, { folder: `${storage.location}: ${folder}`, chain }))
}

async function describeChain(session: Session, storage: StorageDriver, backup: string): Promise<string> {
  try {
    const links = await new ChainManager({ storage }).resolve(backup, session.call())
    const below = links.slice(0, -1).map(({ manifest }) => manifest.id)
    return below.length === 0 ? 'nothing' : below.reverse().join(', ')
  } catch (error) {
    // What is known of the backup is worth showing though it cannot be restored.
    if (session.signal.aborted || !isVarveError(error, 'CHAIN_BROKEN')) throw error
    return `a broken chain: ${errorMessage(error)}`
  }
}
