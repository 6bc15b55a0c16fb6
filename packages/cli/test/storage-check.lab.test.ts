import { mkdir, mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { freePorts, type SshdLab, startSshd, startVsftpd, type VsftpdLab } from '@varve/testkit/lab'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { cli } from './test-terminal.ts'

const WRONG = 'not the password'
const STEPS = ['connect', 'write', 'read', 'list', 'delete']

let folder: string
let sshd: SshdLab
let vsftpd: VsftpdLab
let closedPort: number

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-check-'))
  sshd = await startSshd()
  // a server without a known certificate, that lets nobody delete
  vsftpd = await startVsftpd({ tls: 'explicit', config: ['cmds_denied=DELE', 'delay_failed_login=0'] })
  await mkdir(join(sshd.home, 'fixed'), { mode: 0o755 }) // root's
  await mkdir(join(vsftpd.home, 'fixed'), { mode: 0o755 })
  await writeFile(join(folder, 'ca.pem'), await vsftpd.certificate())
  ;[closedPort = 0] = await freePorts(1)
})
afterAll(async () => {
  await sshd?.[Symbol.asyncDispose]()
  await vsftpd?.[Symbol.asyncDispose]()
  await rm(folder, { recursive: true })
})

const sftp = () => ({
  type: 'sftp',
  host: '127.0.0.1',
  port: sshd.port,
  username: sshd.username,
  password: { env: 'SFTP_PASSWORD' },
})
const ftp = () => ({
  type: 'ftp',
  host: '127.0.0.1',
  port: vsftpd.port,
  username: vsftpd.username,
  password: { env: 'FTP_PASSWORD' },
})
const trusted = () => ({ ...ftp(), ca: { file: join(folder, 'ca.pem') }, tls: 'explicit' })

/** What `varve storage check` prints of a storage, for people and for programs. */
async function check(storage: object) {
  const cwd = await mkdtemp(join(folder, 'cwd-'))
  await writeFile(join(cwd, 'varve.config.json'), JSON.stringify({ storages: { nas: storage } }))
  const env = { SFTP_PASSWORD: sshd.password, FTP_PASSWORD: vsftpd.password, WRONG_PASSWORD: WRONG }
  const [text, json] = await Promise.all([
    cli(['storage', 'check', 'nas'], { cwd, env }),
    cli(['storage', 'check', 'nas', '--json'], { cwd, env }),
  ])
  const shown = JSON.stringify([text, json])
  for (const secret of Object.values(env)) expect(shown).not.toContain(secret)
  expect({ stderr: json.stderr, code: json.code }).toEqual({ stderr: '', code: text.code })
  return { code: text.code, text: text.stdout, document: JSON.parse(json.stdout) }
}

test('a storage that works passes every step, and a host key that nobody has confirmed is told of', async () => {
  const { code, text, document } = await check(sftp())
  expect(code).toBe(0)
  expect(document).toMatchObject({ type: 'sftp', ok: true })
  expect(document.checks).toEqual(STEPS.map(name => ({ name, ok: true })))
  expect(document.freeBytes).toBeGreaterThan(0)
  expect(document.notice).toContain(await sshd.fingerprint())
  expect(text).toContain(`The storage sftp ${document.location} works`)
  for (const step of STEPS) expect(text).toMatch(new RegExp(`^ {2}${step} +ok$`, 'm'))
  expect(text).toContain(document.notice)
})

test.concurrent.each<[string, () => object, string, string, RegExp]>([
  [
    'a port that nobody listens on',
    () => ({ ...sftp(), port: closedPort }),
    'connect',
    'STORAGE_UNREACHABLE',
    /nothing accepts connections/,
  ],
  [
    'an FTP port that nobody listens on',
    () => ({ ...ftp(), port: closedPort }),
    'connect',
    'STORAGE_UNREACHABLE',
    /refused/,
  ],
  [
    'a host without an address',
    () => ({ ...sftp(), host: 'nowhere.invalid' }),
    'connect',
    'STORAGE_UNREACHABLE',
    /nowhere\.invalid.*name/,
  ],
  [
    'an FTP host without an address',
    () => ({ ...ftp(), host: 'nowhere.invalid' }),
    'connect',
    'STORAGE_UNREACHABLE',
    /nowhere\.invalid.*the host is not known/,
  ],
  [
    'a certificate of an unknown authority',
    () => ({ ...ftp(), tls: 'explicit' }),
    'connect',
    'STORAGE_UNREACHABLE',
    /TLS.*self-signed/,
  ],
  [
    'a server that does not begin with TLS',
    () => ({ ...trusted(), tls: 'implicit' }),
    'connect',
    'STORAGE_UNREACHABLE',
    /TLS/,
  ],
  [
    'another host key than the pinned one',
    () => ({ ...sftp(), hostKey: `SHA256:${'A'.repeat(43)}` }),
    'connect',
    'STORAGE_ACCESS_DENIED',
    /host key/,
  ],
  [
    'a wrong password',
    () => ({ ...sftp(), password: { env: 'WRONG_PASSWORD' } }),
    'connect',
    'STORAGE_ACCESS_DENIED',
    /password/,
  ],
  [
    'a wrong FTP password',
    () => ({ ...trusted(), password: { env: 'WRONG_PASSWORD' } }),
    'connect',
    'STORAGE_ACCESS_DENIED',
    /password/,
  ],
  ['a missing folder', () => ({ ...sftp(), pathPrefix: 'none' }), 'connect', 'STORAGE_NOT_FOUND', /none/],
  [
    'a missing FTP folder',
    () => ({ ...trusted(), pathPrefix: 'none' }),
    'connect',
    'STORAGE_NOT_FOUND',
    /none/,
  ],
  [
    'a folder that may not be written to',
    () => ({ ...sftp(), pathPrefix: 'fixed' }),
    'write',
    'STORAGE_ACCESS_DENIED',
    /permission/i,
  ],
  [
    'an FTP folder that may not be written to',
    () => ({ ...trusted(), pathPrefix: 'fixed' }),
    'write',
    'STORAGE_ACCESS_DENIED',
    /permission/i,
  ],
  ['a server that lets nobody delete', () => trusted(), 'delete', 'STORAGE_ACCESS_DENIED', /permission/i],
])('%s is told from all else, with exit code 1', async (_, storage, failing, failure, message) => {
  const { code, text, document } = await check(storage())
  expect(code).toBe(1)
  expect(document.ok).toBe(false)
  const passed = STEPS.slice(0, STEPS.indexOf(failing)).map(name => ({ name, ok: true }))
  expect(document.checks).toEqual([
    ...passed,
    { name: failing, ok: false, code: failure, message: expect.stringMatching(message) },
  ])
  expect(text).toContain(`The storage ${document.type} ${document.location} does not work`)
  for (const { name } of passed) expect(text).toMatch(new RegExp(`^ {2}${name} +ok$`, 'm'))
  expect(text).toMatch(new RegExp(`^ {2}${failing} +FAILED: .*${message.source}`, `${message.flags}m`))
})
