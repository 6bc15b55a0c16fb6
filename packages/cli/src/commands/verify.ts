import { ChainManager, type VerifyProgress, type VerifyReport } from '@varve/core'
import type { Command } from 'commander'
import { EXIT } from '../exit-code.ts'
import { storageOption } from '../options.ts'
import type { Session } from '../session.ts'

interface VerifyOptions {
  deep?: boolean
  storage?: string
}

/** `varve verify` */
export function verifyCommand(program: Command, session: Session): void {
  program
    .command('verify')
    .summary('look for damage to a backup and what it rests on')
    .description(
      'Looks whether a backup can be restored: the manifests of its chain, and every object with its size. With --deep every byte is read and compared with its digest. Damage is exit code 1.',
    )
    .argument('<backup>', 'id of the backup')
    .option('--deep', 'read everything')
    .addOption(storageOption())
    .addHelpText('after', '\nExample:\n  varve verify 20261123-231543-123-9f3a1c --deep')
    .action((backup: string, options: VerifyOptions) => verify(session, backup, options))
}

async function verify(session: Session, backup: string, options: VerifyOptions): Promise<void> {
  await using storage = await session.openStorage(options.storage)
  const { deep = false } = options
  const report = await new ChainManager({ storage }).verify(backup, {
    deep,
    ...session.call(),
    onProgress: showProgress(session),
  })
  if (!report.ok) session.exitCode = EXIT.failed
  await session.result(report, verifyText(report))
}

function showProgress(session: Session): (progress: VerifyProgress) => void {
  const startedAt = performance.now()
  const { onEvent } = session.run()
  return ({ bytesDone, bytesTotal }) => {
    const seconds = (performance.now() - startedAt) / 1000
    const bytesPerSecond = seconds < 1 ? 0 : bytesDone / seconds // too little to tell a rate from
    onEvent?.({
      type: 'progress',
      disk: 'verify',
      bytesDone,
      bytesTotal,
      percent: bytesTotal === 0 ? 100 : (bytesDone / bytesTotal) * 100,
      bytesPerSecond,
      ...(bytesPerSecond > 0 && { secondsLeft: (bytesTotal - bytesDone) / bytesPerSecond }),
    })
  }
}

/** What `varve verify` found. */
export function verifyText({ backup, chain, deep, ok, problems }: VerifyReport): string {
  if (ok) {
    const below = chain.length - 1
    const others = below === 1 ? 'the backup it rests on' : `the ${below} backups it rests on`
    const whole = below === 0 ? 'is whole' : `and ${others} are whole`
    return `Backup ${backup} ${whole}: ${deep ? 'every byte has its recorded digest' : 'every object is there with its size'}.`
  }
  const lines = problems.map(({ backup, code, message, offset }) => {
    const place = offset === undefined ? '' : ` (from byte ${offset})`
    return `  ${backup}: ${message}${place} [${code}]`
  })
  return [`Backup ${backup} is DAMAGED.`, ...lines].join('\n')
}
