import { writeFile } from 'node:fs/promises'
import { join, relative } from 'node:path'
import { FtpDriver, type FtpDriverOptions } from '@varve/driver-ftp'
import { describeDriver, type RemoteTarget } from '@varve/testkit'
import { mountTmpfs, startVsftpd, type Tmpfs, type VsftpdLab } from '@varve/testkit/lab'
import { afterAll, beforeAll, describe } from 'vitest'
import { ftpTarget, optionsOf } from './ftp-target.ts'
import { openTunnel } from './ftp-tunnel.ts'

const CAPACITY = 8 * 1024 * 1024

const capabilities = { rangeRead: true, atomicPublish: true, resume: true, parallelParts: false }

describe('without TLS', () => {
  let disk: Tmpfs
  let lab: VsftpdLab
  beforeAll(async () => {
    disk = await mountTmpfs(`size=${CAPACITY}`) // the server sees the mounts of its beginning
    lab = await startVsftpd({ config: ['chroot_local_user=NO', 'delay_failed_login=0'] })
  })
  afterAll(async () => {
    await lab[Symbol.asyncDispose]()
    await disk.dispose()
  })
  const refused = async (options: Partial<FtpDriverOptions>) =>
    new FtpDriver({ ...(await optionsOf(lab, 'none')), ...options })

  describeDriver('FtpDriver', {
    capabilities,
    create: async () => ftpTarget(lab, await optionsOf(lab, 'none')),
    leaveUnfinished: ({ path }) => leaveUnfinished(lab, path),
    async neighbour({ path }) {
      await lab.makeFolder(`${path}2`)
      return new FtpDriver({ ...(await optionsOf(lab, 'none')), pathPrefix: `${relative(lab.home, path)}2` })
    },
    createFull: async () => ({
      ...(await ftpTarget(lab, await optionsOf(lab, 'none'), disk.path)),
      capacity: CAPACITY,
    }),
    largeSize: 12_000_011,
    manyObjects: 200,
    remote: {
      create: () => throughTunnel(lab, 'none'),
      restartServer: () => lab.restart(),
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
        {
          what: 'a server that offers no TLS',
          code: 'STORAGE_UNREACHABLE',
          create: () => refused({ tls: 'explicit' }),
        },
      ],
      secrets: ['lab password 5d81c4', 'not the password'],
    },
  })
})

describe('with explicit TLS', () => {
  let lab: VsftpdLab
  beforeAll(async () => {
    lab = await startVsftpd({ tls: 'explicit' })
  })
  afterAll(() => lab[Symbol.asyncDispose]())

  describeDriver('FtpDriver', {
    capabilities,
    create: async () => ftpTarget(lab, await optionsOf(lab, 'explicit')),
    parts: ['objects', 'publishing', 'reading', 'early ends'], // where the data goes another way
    largeSize: 5_000_011,
    turns: 5,
    remote: {
      create: () => throughTunnel(lab, 'explicit'),
      restartServer: () => lab.restart(),
      mostCuts: 4,
      refused: [],
      secrets: [],
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
  const tunnel = await openTunnel(lab)
  const { host, proxy } = tunnel
  const options = { ...(await optionsOf(lab, tls)), host, timeoutMs: 1500, attempts: 2 }
  const target = await ftpTarget(lab, tls === 'none' ? options : { ...options, tlsServerName: 'localhost' })
  const dispose = async () => {
    await target.dispose()
    await tunnel[Symbol.asyncDispose]()
  }
  return { ...target, proxy, dispose }
}
