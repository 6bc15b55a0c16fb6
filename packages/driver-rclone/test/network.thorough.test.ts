import { randomBytes } from 'node:crypto'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { basename, dirname, join, resolve } from 'node:path'
import { RcloneDriver } from '@varve/driver-rclone'
import { describeDriver, NetworkProxy, type RemoteTarget } from '@varve/testkit'
import { mountTmpfs, type SshdLab, startSshd, type Tmpfs } from '@varve/testkit/lab'
import { execa } from 'execa'
import { afterAll, beforeAll } from 'vitest'
import { filesIn, fillFolder } from './rclone-target.ts'

const CAPACITY = 8 * 1024 * 1024
const WRONG = 'not the password'
/** Long enough for the start of a program on a busy machine. */
const IDLE_TIMEOUT_MS = 8000

/** One whose folder is looked at. */
interface FolderTarget extends RemoteTarget {
  readonly path: string
}

let disk: Tmpfs
let lab: SshdLab
let folder: string
/** Passwords as rclone's configuration has them, so that they are not obscured anew for each driver. */
let obscured: { readonly right: string; readonly wrong: string }
const proxies: NetworkProxy[] = []

/** The password is added once the server has one. */
const secrets = [WRONG]

beforeAll(async () => {
  disk = await mountTmpfs(`size=${CAPACITY}`) // the server sees the mounts of its beginning
  lab = await startSshd()
  secrets.push(lab.password)
  folder = await mkdtemp(join(tmpdir(), 'varve-rclone-network-'))
  obscured = { right: await obscure(lab.password), wrong: await obscure(WRONG) }
})
afterAll(async () => {
  for (const proxy of proxies) await proxy[Symbol.asyncDispose]()
  await lab[Symbol.asyncDispose]()
  await disk.dispose()
  await rm(folder, { recursive: true })
})

async function obscure(password: string): Promise<string> {
  const { stdout } = await execa('rclone', ['obscure', '-'], { input: password, timeout: 30_000 })
  return stdout.trim()
}

/** A driver on a folder: by its path, or by its name below where a login begins. */
async function driverOn(
  name: string,
  { port = lab.port, pass = obscured.right }: { port?: number; pass?: string } = {},
): Promise<RcloneDriver> {
  const configFile = join(folder, `${randomBytes(4).toString('hex')}.conf`)
  const server = `host = 127.0.0.1\nport = ${port}\nuser = ${lab.username}\npass = ${pass}\n`
  await writeFile(configFile, `[nas]\ntype = sftp\nshell_type = none\n${server}`)
  const pathPrefix = resolve(lab.home, name)
  return new RcloneDriver({ remoteName: 'nas', configFile, pathPrefix, timeoutMs: IDLE_TIMEOUT_MS })
}

async function throughProxy(above = lab.home): Promise<FolderTarget> {
  const path = join(above, `storage-${randomBytes(4).toString('hex')}`)
  const proxy = await NetworkProxy.start({ port: lab.port })
  proxies.push(proxy)
  await lab.makeFolder(path)
  const target: FolderTarget = {
    path,
    driver: await driverOn(path, { port: proxy.port }),
    proxy,
    inspect: () => filesIn(path),
    readRaw: key => readFile(join(path, key)),
    async writeRaw(key, bytes) {
      await lab.makeFolder(join(path, dirname(key)))
      await writeFile(join(path, key), bytes)
    },
    isUnfinished: name => basename(name).startsWith('.varve-part-'),
    async dispose() {
      proxy.cutAll()
      for (const file of await filesIn(path)) await rm(join(path, file.name)) // rclone leaves folders as well
    },
  }
  return target
}

const create = () => throughProxy()

describeDriver('RcloneDriver over SFTP', {
  capabilities: { rangeRead: true, atomicPublish: true, resume: false, parallelParts: false },
  create,
  async leaveUnfinished({ path }) {
    await lab.makeFolder(join(path, 'killed'))
    await writeFile(join(path, 'killed/.varve-part-0123456789abcdef'), 'half')
  },
  async neighbour({ path }) {
    await lab.makeFolder(`${path}2`)
    return driverOn(`${path}2`)
  },
  fill: ({ path }, keys) => fillFolder(path, keys),
  // OpenSSH does not say that its disk is full
  createFull: async () => ({ ...(await throughProxy(disk.path)), capacity: CAPACITY, code: 'UPLOAD_FAILED' }),
  largeSize: 4_000_011,
  turns: 2,
  timeoutMs: 240_000, // each call starts a program
  remote: {
    create,
    restartServer: () => lab.restart(),
    idleTimeoutMs: IDLE_TIMEOUT_MS,
    keepsConnections: false,
    cutSize: 300_007,
    mostCuts: 4,
    refused: [
      {
        what: 'a wrong password',
        code: 'STORAGE_ACCESS_DENIED',
        create: () => driverOn('', { pass: obscured.wrong }),
      },
      {
        what: 'a missing folder',
        code: 'STORAGE_NOT_FOUND',
        create: () => driverOn('missing'),
      },
    ],
    secrets,
  },
})
