/**
 * Backs an instance up to a remote that `rclone config` has made.
 *
 *     tsx rclone.ts web-1 my-b2-backup bucket/backups
 */
import { BackupPipeline, LibvirtHost } from '@varve/core'
import { RcloneDriver } from '@varve/driver-rclone'

const [instance, remoteName, pathPrefix = '', stateDir = '/var/lib/varve', uri] = process.argv.slice(2)
if (!instance || !remoteName) throw new Error('Usage: rclone INSTANCE REMOTE [FOLDER]')

// `remotes` takes a remote that is only given here, with its secrets.
await using storage = new RcloneDriver({
  remoteName,
  pathPrefix,
  onCommand: ({ args, exitCode, durationMs }) =>
    console.log(`rclone ${args[0]}: ${exitCode}, ${durationMs} ms`),
})

const { ok, checks } = await storage.check()
if (!ok) throw new Error(checks.at(-1)?.message)

const host = new LibvirtHost(uri ? { uri } : {}) // qemu:///system
const { id } = await new BackupPipeline({ host, storage, stateDir }).run({ instance })
console.log(`${id} is on ${storage.location}`)
