import { BackupPipeline, LibvirtHost } from '@varve/core'
import { RcloneDriver } from '@varve/driver-rclone'

const [instance = 'web-1', remoteName = 'my-b2-backup', pathPrefix = 'bucket/backups'] = process.argv.slice(2)

// A remote that `rclone config` has made. `remotes` takes one that is only given here, with its secrets.
await using storage = new RcloneDriver({
  remoteName,
  pathPrefix,
  onCommand: ({ args, exitCode, durationMs }) =>
    console.log(`rclone ${args[0]}: ${exitCode}, ${durationMs} ms`),
})

const { ok, checks } = await storage.check()
if (!ok) throw new Error(checks.at(-1)?.message)

const backups = new BackupPipeline({ host: new LibvirtHost(), storage, stateDir: '/var/lib/varve' })
const { id } = await backups.run({ instance })
console.log(`${id} is on ${storage.location}`)
