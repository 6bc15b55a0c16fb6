/**
 * Backs an instance up to a folder of an FTP server, over TLS. The password is in the environment: FTP_PASSWORD.
 * A server that signs its certificate itself is trusted by that certificate's file.
 *
 *     tsx ftp.ts web-1 ftp://varve@nas.example.org nas.pem
 */
import { readFile } from 'node:fs/promises'
import { BackupPipeline, LibvirtHost } from '@varve/core'
import { FtpDriver } from '@varve/driver-ftp'

const [instance, address, caFile, stateDir = '/var/lib/varve', uri] = process.argv.slice(2)
if (!instance || !address) throw new Error('Usage: ftp INSTANCE ADDRESS [CERTIFICATE_FILE]')
const { hostname, port, username } = new URL(address)
const { FTP_PASSWORD: password = '' } = process.env

await using storage = new FtpDriver({
  host: hostname,
  port: Number(port || 21),
  username,
  password,
  pathPrefix: 'backups', // below the folder in which a login begins
  create: true,
  ...(caFile && { ca: await readFile(caFile, 'utf8') }),
})

// Connects, then writes, reads back, lists and deletes a small object; says what is wrong, and what to do.
const { ok, checks } = await storage.check()
if (!ok) throw new Error(checks.at(-1)?.message)

const host = new LibvirtHost(uri ? { uri } : {}) // qemu:///system
const backups = new BackupPipeline({ host, storage, stateDir })
const { id } = await backups.run({ instance }, { onEvent: event => console.log(event) })
console.log(`${id} is on ${storage.location}`)
