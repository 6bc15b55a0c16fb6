import { describeDriver } from '@varve/testkit'
import { startVsftpd, type VsftpdLab } from '@varve/testkit/lab'
import { afterAll, beforeAll, describe } from 'vitest'
import { ftpTarget, optionsOf } from './ftp-target.ts'

const capabilities = { rangeRead: true, atomicPublish: true, resume: true, parallelParts: false }

describe.each(['none', 'explicit'] as const)('with TLS: %s', tls => {
  let lab: VsftpdLab
  beforeAll(async () => {
    lab = await startVsftpd({ tls })
  })
  afterAll(() => lab[Symbol.asyncDispose]())

  describeDriver('FtpDriver', {
    capabilities,
    create: async () => ftpTarget(lab, await optionsOf(lab, tls)),
    largeSize: 12_000_011,
    manyObjects: 400,
  })
})
