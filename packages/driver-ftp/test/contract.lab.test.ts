import { mkdir, writeFile } from 'node:fs/promises'
import { dirname, join, relative } from 'node:path'
import { FtpDriver, type FtpDriverOptions } from '@varve/driver-ftp'
import { type ContractOptions, describeDriver, type RefusedDriver, type RemoteTarget } from '@varve/testkit'
import { mountTmpfs, openFtpTunnel, startVsftpd, type Tmpfs, type VsftpdLab } from '@varve/testkit/lab'
import { isThorough } from '@varve/testkit/thorough'
import { afterAll, beforeAll, describe } from 'vitest'
import { ftpTarget, optionsOf } from './ftp-target.ts'

const CAPACITY = 8 * 1024 * 1024

/** With TLS, what is about the data: it goes another way. */
const SCOPE: Record<'none' | 'explicit', Pick<ContractOptions, 'parts' | 'largeSize' | 'turns'>> = {
  none: { largeSize: 6_000_011 },
  explicit: {
    parts: ['publishing', 'reading', 'early ends'],
    largeSize: 5_000_011,
    turns: 5,
  },
}
const REMOTE_SCOPE = { none: {}, explicit: { mostCuts: 4 } }

describe.each(['none', 'explicit'] as const)('with TLS: %s', tls => {
  let disk: Tmpfs
  let lab: VsftpdLab
  /** The password is added once the server has one. */
  const secrets = ['not the password']
  beforeAll(async () => {
    disk = await mountTmpfs(`size=${CAPACITY}`) // the server sees the mounts of its beginning
    lab = await startVsftpd({ tls, config: ['chroot_local_user=NO', 'delay_failed_login=0'] })
    secrets.push(lab.password)
  })
  afterAll(async () => {
    await lab[Symbol.asyncDispose]()
    await disk.dispose()
  })
  const refused = async (options: Partial<FtpDriverOptions>) =>
    new FtpDriver({ ...(await optionsOf(lab, tls)), ...options })
  const otherTls: RefusedDriver =
    tls === 'none'
      ? {
          what: 'a server that offers no TLS',
          code: 'STORAGE_UNREACHABLE',
          create: () => refused({ tls: 'explicit' }),
        }
      : {
          what: 'a login without the TLS that the server insists on',
          code: 'STORAGE_ACCESS_DENIED',
          create: async () => {
            const { ca: _, ...options } = await optionsOf(lab, tls)
            return new FtpDriver({ ...options, tls: 'none' })
          },
        }

  describeDriver('FtpDriver', {
    capabilities: { rangeRead: true, atomicPublish: true, resume: true, parallelParts: false },
    create: async () => ftpTarget(lab, await optionsOf(lab, tls)),
    leaveUnfinished: ({ path }) => leaveUnfinished(lab, path),
    async neighbour({ path }) {
      await lab.makeFolder(`${path}2`)
      return new FtpDriver({ ...(await optionsOf(lab, tls)), pathPrefix: `${relative(lab.home, path)}2` })
    },
    createFull: async () => ({
      ...(await ftpTarget(lab, await optionsOf(lab, tls), disk.path)),
      capacity: CAPACITY,
    }),
    async fill({ path }, keys) {
      const make = async (key: string) => {
        await mkdir(join(path, dirname(key)), { recursive: true })
        await writeFile(join(path, key), key)
      }
      await Promise.all(keys.map(make))
    },
    turns: isThorough ? 25 : 8,
    manyObjects: 300, // a listing has no pages
    brief: true,
    ...SCOPE[tls],
    remote: {
      create: () => throughTunnel(lab, tls),
      restartServer: () => lab.restart(),
      ...REMOTE_SCOPE[tls],
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
          what: 'a missing folder',
          code: 'STORAGE_NOT_FOUND',
          create: () => refused({ pathPrefix: 'missing/folder' }),
        },
        otherTls,
      ],
      secrets,
    },
  })
})

/** What a killed upload leaves in a folder. */
async function leaveUnfinished(lab: VsftpdLab, path: string): Promise<void> {
  await lab.makeFolder(join(path, 'killed'))
  await writeFile(join(path, 'killed/.varve-part-0123456789abcdef'), 'half')
}

/** A target all connections of which go through a network proxy. */
async function throughTunnel(lab: VsftpdLab, tls: 'explicit' | 'none'): Promise<RemoteTarget> {
  const tunnel = await openFtpTunnel(lab)
  const { host, proxy } = tunnel
  const options = { ...(await optionsOf(lab, tls)), host, timeoutMs: 1500, attempts: 2 }
  const target = await ftpTarget(lab, tls === 'none' ? options : { ...options, tlsServerName: 'localhost' })
  const dispose = async () => {
    await target.dispose()
    await tunnel[Symbol.asyncDispose]()
  }
  return { ...target, proxy, dispose }
}
