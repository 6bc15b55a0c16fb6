import { readFile } from 'node:fs/promises'
import { BackupPipeline, LibvirtHost } from '@varve/core'
import { SftpDriver } from '@varve/driver-sftp'

const [
  instance = 'web-1',
  host = 'backup.example.org',
  username = 'varve',
  keyFile = '/etc/varve/id_ed25519',
] = process.argv.slice(2)

await using storage = new SftpDriver({
  host,
  username,
  privateKey: await readFile(keyFile, 'utf8'), // or: password
  pathPrefix: 'backups', // below the folder in which a login begins
  create: true,
  knownHosts: '/etc/ssh/ssh_known_hosts', // or: hostKey: 'SHA256:…'
})

// Logs in, then writes, reads back, lists and deletes a small object; says what is wrong, and what to do.
const { ok, checks, freeBytes } = await storage.check()
if (!ok) throw new Error(checks.at(-1)?.message)
console.log(`${freeBytes ?? 'unknown'} bytes are free`)

// A connection that breaks meanwhile is made anew, and the upload goes on where it was.
const backups = new BackupPipeline({ host: new LibvirtHost(), storage, stateDir: '/var/lib/varve' })
const { id } = await backups.run({ instance }, { onEvent: event => console.log(event) })
console.log(`${id} is on ${storage.location}`)
