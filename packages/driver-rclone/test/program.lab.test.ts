import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  BackupPipeline,
  bytesBody,
  type CommandEvent,
  ImageHost,
  type StorageDriver,
  type VarveEvent,
} from '@varve/core'
import { RcloneHelper } from '@varve/driver-rclone'
import { createQcow2, mountTmpfs, qemuIo } from '@varve/testkit/lab'
import { describe, expect, onTestFinished, test } from 'vitest'
import { begin, beginWithScript, listed, scriptFile } from './rclone-lab.ts'
import { folderTarget } from './rclone-target.ts'

describe('rclone itself', () => {
  test('that is not installed is named, by every call', async () => {
    const { driver } = await begin({ command: '/nonexistent/rclone' })
    const missing = { code: 'COMMAND_MISSING', message: expect.stringContaining('Install') }
    await expect(driver.put('a', bytesBody(Buffer.from('x')))).rejects.toMatchObject(missing)
    await expect(driver.stat('a')).rejects.toMatchObject(missing)
    await expect(driver.delete('a')).rejects.toMatchObject(missing)
    expect((await driver.check()).checks).toMatchObject([{ name: 'connect', ok: false }])
  })

  test('that is too old is named with both versions, when it fails or is checked', async () => {
    const { driver } = await beginWithScript(
      'case "$1" in version) echo "rclone v1.53.3-DEV"; exit;; *) echo "Error: unknown flag: --stat" >&2; exit 1;; esac',
    )
    const tooOld = { code: 'INVALID_CONFIG', message: expect.stringMatching(/1\.53\.3.*1\.59\.0/) }
    await expect(driver.stat('a')).rejects.toMatchObject(tooOld)
    const { checks } = await driver.check()
    expect(checks[0]).toMatchObject({ ok: false, message: expect.stringMatching(/1\.53\.3.*1\.59\.0/) })
  })

  test('that says much has no part of a secret in what is kept of it', async () => {
    const secret = 'hunter2-'.repeat(8)
    // 16,384 characters from the end are kept, and begin in the middle of the secret
    const command = await scriptFile(
      `echo "before ${secret}" >&2; printf "%016262d\\n" 1 >&2; echo "Failed: permission ${secret}denied" >&2; exit 1`,
    )
    const commands: CommandEvent[] = []
    const helper = new RcloneHelper({
      remoteName: 'nas',
      env: { RCLONE_CONFIG_PASS: secret },
      command,
      onCommand: event => commands.push(event),
    })
    await expect(helper.stat('a')).rejects.toThrow('permission ***denied')
    expect(JSON.stringify(commands)).not.toContain('hunter2')
    expect(commands[0]?.stderr).toMatch(/^0+1\nFailed/)
  })

  test('is understood where its words are a password, also an empty one', async () => {
    const command = await scriptFile(`case "$1" in
      config) echo '[{"Prefix":"sftp","Options":[{"Name":"pass","IsPassword":true}]}]'; exit;;
      obscure) cat; exit;;
      *) echo "Failed: permission denied" >&2; exit 1;; esac`)
    for (const [pass, words] of [
      ['denied', 'permission ***'],
      ['', 'permission denied'],
    ] as const) {
      const helper = new RcloneHelper({
        remoteName: 'nas',
        remotes: { nas: { type: 'sftp', pass } },
        command,
      })
      await expect(helper.stat('a')).rejects.toMatchObject({
        code: 'STORAGE_ACCESS_DENIED',
        message: expect.stringContaining(words),
      })
    }
  })

  test('does not see what of the environment would change it', async () => {
    const { driver } = await begin()
    process.env.RCLONE_DRY_RUN = 'true'
    onTestFinished(() => {
      delete process.env.RCLONE_DRY_RUN
    })
    await driver.put('a', bytesBody(Buffer.from('x')))
    expect(await driver.stat('a')).toMatchObject({ size: 1 })
  })
})

test('a run tells of each rclone, of why one failed to upload, and no secret', async () => {
  const full = await mountTmpfs('size=512k')
  onTestFinished(() => full.dispose())
  const command = await scriptFile('echo "the token is $TOKEN" >&2')
  const target = await folderTarget(full.path, { command, env: { TOKEN: 'hunter2-é "quoted"' } })
  onTestFinished(() => target.dispose())
  const folder = await mkdtemp(join(tmpdir(), 'varve-rclone-run-'))
  onTestFinished(() => rm(folder, { recursive: true }))
  const disk = join(folder, 'vda.qcow2')
  await createQcow2(disk, 4 * 1024 * 1024)
  await qemuIo(disk, 'qcow2', ['write -P 0x5a 1M 1M'])
  const host = new ImageHost({ instance: 'web-1', disks: { vda: disk } })
  const backups = new BackupPipeline({ host, storage: target.driver, stateDir: join(folder, 'state') })
  const events: VarveEvent[] = []
  const run = { onEvent: (event: VarveEvent) => events.push(event) }
  await expect(backups.run({ instance: 'web-1' }, run)).rejects.toMatchObject({
    code: 'STORAGE_FULL',
    message: expect.stringMatching(/^rclone rcat: failed to upload /),
  })
  const rclones = events.filter(event => event.type === 'command' && event.command === command)
  for (const event of rclones)
    expect(event).toMatchObject({ stderr: expect.stringMatching(/^the token is \*\*\*/) })
  const [upload, ...others] = rclones.filter(event => event.type === 'command' && event.args[0] === 'rcat')
  expect(upload).toMatchObject({ exitCode: 1, stderr: expect.stringContaining('disk space') })
  expect(others).toEqual([])
  expect(rclones.some(event => event.type === 'command' && event.args[0] === 'deletefile')).toBe(true)
  expect(JSON.stringify(events)).not.toContain('hunter2')
})

test.each([
  ['lsjson', (driver: StorageDriver) => driver.stat('a')],
  ['lsjson', (driver: StorageDriver) => listed(driver, '')],
  ['backend', (driver: StorageDriver) => driver.put('a/b', bytesBody(Buffer.from('x')))],
] as const)('an rclone %s that prints something else has no secret in its error', async (name, call) => {
  const secret = `hunter2-${'x'.repeat(60)}`
  // the quotation ends in the middle of the secret
  const { driver } = await beginWithScript(
    `case "$1" in ${name}) printf "%040d %s\\n" 1 "$TOKEN"; exit;; esac`,
    { env: { TOKEN: secret } },
  )
  const error = await call(driver).then(
    () => undefined,
    (error: unknown) => error,
  )
  expect(error).toMatchObject({ code: 'STORAGE_FAILED', message: expect.stringContaining('0001 ***') })
  expect(String(error)).not.toContain('hunter2')
})
