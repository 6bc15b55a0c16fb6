import { buffer } from 'node:stream/consumers'
import { bytesBody } from '@varve/core'
import { FtpDriver, type FtpDriverOptions } from '@varve/driver-ftp'
import { PatternBody, patternBytes } from '@varve/testkit'
import { openFtpTunnel, startVsftpd, type VsftpdLab } from '@varve/testkit/lab'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { begin, commandsOf, optionsOf } from './ftp-target.ts'

const x = bytesBody(Buffer.from('x'))

describe('TLS', () => {
  let lab: VsftpdLab
  beforeAll(async () => {
    lab = await startVsftpd({ tls: 'explicit' })
  })
  afterAll(() => lab[Symbol.asyncDispose]())

  const refusal = async (options: Partial<FtpDriverOptions>) => {
    await using driver = new FtpDriver({ ...(await optionsOf(lab, 'explicit')), ...options })
    return await driver.stat('a').then(
      () => expect.unreachable('it was let in'),
      error => error,
    )
  }

  test('a certificate of an authority that is not known is refused, and the remedy named', async () => {
    const { ca: _, ...options } = await optionsOf(lab, 'explicit')
    await using driver = new FtpDriver(options)
    await expect(driver.put('a', x)).rejects.toMatchObject({
      code: 'STORAGE_UNREACHABLE',
      retryable: false,
      message: expect.stringMatching(/TLS.*self-signed.* ca /),
    })
    const { checks } = await driver.check()
    expect(checks).toMatchObject([{ name: 'connect', ok: false, message: expect.stringContaining('TLS') }])
  })

  test('a certificate for another name is refused, and the remedy named', async () => {
    expect(await refusal({ tlsServerName: 'elsewhere.example' })).toMatchObject({
      code: 'STORAGE_UNREACHABLE',
      message: expect.stringMatching(/TLS.*elsewhere\.example.*tlsServerName/),
    })
  })

  test('a certificate may be for a name that is not the host', async () => {
    const options = { ...(await optionsOf(lab, 'explicit')), tlsServerName: 'localhost' }
    await using driver = new FtpDriver(options)
    await driver.put('named', x)
    expect(await buffer(await driver.get('named'))).toEqual(Buffer.from('x'))
    await driver.delete('named')
  })

  test('a server that wants TLS refuses a login without it, and the remedy is named', async () => {
    const { ca: _, ...options } = await optionsOf(lab, 'explicit')
    await using driver = new FtpDriver({ ...options, tls: 'none' })
    await expect(driver.stat('a')).rejects.toMatchObject({
      code: 'STORAGE_ACCESS_DENIED',
      message: expect.stringMatching(/encryption.*tls/),
    })
  })

  test('a port that does not speak TLS at once is told so', async () => {
    expect(await refusal({ tls: 'implicit' })).toMatchObject({
      code: 'STORAGE_UNREACHABLE',
      message: expect.stringContaining('TLS'),
    })
  })

  test('a server that speaks TLS at once is used so', async () => {
    const { lab, driver } = await begin({ tls: 'implicit' })
    const body = new PatternBody({ size: 3_000_000, seed: 1 })
    await driver.put('a/b', body)
    expect((await buffer(await driver.get('a/b'))).equals(patternBytes(1, 0, 3_000_000))).toBe(true)
    expect(await commandsOf(lab)).not.toContain('AUTH')
  })

  test('the password and the data go over the network encrypted', async () => {
    await using tunnel = await openFtpTunnel(lab)
    const options = { ...(await optionsOf(lab, 'explicit')), host: tunnel.host }
    await using driver = new FtpDriver({ ...options, tlsServerName: 'localhost' })
    await driver.put('a', bytesBody(Buffer.from('x'.repeat(1000))))
    const log = await lab.log()
    expect(log).toMatch(/"AUTH TLS"[\s\S]*"USER varve"[\s\S]*"PROT P"[\s\S]*"STOR /)
    await driver.delete('a')
  })
})
