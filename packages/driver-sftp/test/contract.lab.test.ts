import { mkdir, writeFile } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { SftpDriver, type SftpDriverOptions } from '@varve/driver-sftp'
import { describeDriver, NetworkProxy } from '@varve/testkit'
import { mountTmpfs, type SshdLab, startSshd, type Tmpfs } from '@varve/testkit/lab'
import { isThorough } from '@varve/testkit/thorough'
import { afterAll, beforeAll } from 'vitest'
import { login, sftpTarget } from './sftp-target.ts'

const MIB = 1024 * 1024
const CAPACITY = 8 * MIB

let disk: Tmpfs
let lab: SshdLab
/** The password is added once the server has one. */
const secrets = ['not the password']

beforeAll(async () => {
  disk = await mountTmpfs(`size=${CAPACITY}`) // the server sees the mounts of its beginning
  lab = await startSshd()
  secrets.push(lab.password)
})

afterAll(async () => {
  await lab[Symbol.asyncDispose]()
  await disk.dispose()
})

describeDriver('SftpDriver', {
  capabilities: { rangeRead: true, atomicPublish: true, resume: true, parallelParts: false },
  create: () => sftpTarget(lab),
  async leaveUnfinished({ path }) {
    await lab.makeFolder(join(path, 'killed'))
    await writeFile(join(path, 'killed/.varve-part-0123456789abcdef'), 'half')
  },
  async neighbour({ path }) {
    await lab.makeFolder(`${path}2`)
    return new SftpDriver({ ...(await login(lab)), pathPrefix: `${path}2` })
  },
  createFull: async () => ({ ...(await sftpTarget(lab, {}, disk.path)), capacity: CAPACITY }),
  async fill({ path }, keys) {
    const make = async (key: string) => {
      await mkdir(join(path, dirname(key)), { recursive: true })
      await writeFile(join(path, key), key)
    }
    await Promise.all(keys.map(make))
  },
  largeSize: (isThorough ? 24 : 6) * MIB + 12345,
  turns: isThorough ? 25 : 8,
  manyObjects: 1000, // a folder of them takes more than one answer
  brief: true,
  remote: {
    async create() {
      const proxy = await NetworkProxy.start({ port: lab.port })
      const { username, password } = lab
      const target = await sftpTarget(lab, {
        port: proxy.port,
        timeoutMs: 1500,
        retries: 1,
        username,
        password,
      })
      const dispose = async () => {
        await target.dispose()
        await proxy[Symbol.asyncDispose]()
      }
      return { ...target, proxy, dispose }
    },
    restartServer: () => lab.restart(),
    resumeSize: 20 * MIB, // of which 8 are known to be durable well before the end
    refused: [
      {
        what: 'a wrong password',
        code: 'STORAGE_ACCESS_DENIED',
        create: () => refused({ password: 'not the password' }),
      },
      {
        what: 'an unknown user',
        code: 'STORAGE_ACCESS_DENIED',
        create: () => refused({ username: 'nobody-at-all' }),
      },
      {
        what: 'another host key than the pinned one',
        code: 'STORAGE_ACCESS_DENIED',
        create: () => refused({ hostKey: `SHA256:${'A'.repeat(43)}` }),
      },
      {
        what: 'a missing folder',
        code: 'STORAGE_NOT_FOUND',
        create: () => refused({ pathPrefix: 'missing/folder' }),
      },
    ],
    secrets,
  },
})

/** A driver that logs in with a password, where the options do not say otherwise. */
async function refused(options: Partial<SftpDriverOptions>): Promise<SftpDriver> {
  const { host, port, username, hostKey } = await login(lab)
  return new SftpDriver({
    host,
    port,
    username,
    password: lab.password,
    hostKey,
    timeoutMs: 5000,
    ...options,
  })
}
